# shellcheck shell=bash
# Sourced by run_all.sh and run_tests.sh: prepare_environment sets PYTHON to the interpreter to use.
#
#   1. MACO_PYTHON, as it is
#   2. the python3 on the PATH (an activated environment), when it has everything that requirements/needs.py asks for
#   3. .venv in the checkout, made here from requirements/cuda.txt if an NVIDIA driver answers, else requirements/cpu.txt
#
# .venv is filled by uv, which pip brings. pip itself installs torch's CPU build, since its configuration may say where
# that is to be had, and everything where uv is not to be had or cannot reach the packages. All checks the lock's hashes.

TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
DISK_FULL='No space left on device|Disk quota exceeded'
WRONG_HASH='DO NOT MATCH THE HASHES|Hash mismatch for'
UNREACHABLE='NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeout|ProxyError|No matching distribution'

say() { echo "maco: $*" >&2; }
fail() { say "$*"; exit 1; }
python_version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2> /dev/null; }
python_fits() { [[ $(python_version "$1") =~ ^3\.1[1-3]\. ]]; }
cuda_answers() { command -v nvidia-smi > /dev/null && timeout 20 nvidia-smi -L > /dev/null 2>&1; }

find_base_python() { # prints an interpreter that can make a virtual environment; in a shell of its own
    for candidate in python3 python3.12 python3.11 python3.13; do
        if python_fits "$candidate" && "$candidate" -c 'import ensurepip, venv' 2> /dev/null; then
            echo "$candidate" && return
        fi
    done
    fail "no Python 3.11 to 3.13 with venv and pip was found (python3 is $(python_version python3 || echo absent));" \
        "install one, or name one in MACO_PYTHON"
}

with_progress() { # DOING COMMAND...: its output goes to $LOG, the last line is said every 15 s; an interrupt ends it
    local doing=$1 pid status=0 halves=0
    "${@:2}" >> "$LOG" 2>&1 < /dev/null & # keeps the lock, should this shell be killed
    pid=$!
    trap 'kill "$pid" 2> /dev/null; wait "$pid" || true; say "interrupted"; exit 130' INT TERM HUP
    while kill -0 "$pid" 2> /dev/null; do
        sleep 0.5
        ((++halves % 30)) || say "$doing … $((SECONDS - START)) s ($(tail -n 1 "$LOG" | cut -c 1-80))"
    done
    wait "$pid" || status=$?
    trap - INT TERM HUP
    return "$status"
}

by_pip() { # DOING LOCK [OPTIONS]
    with_progress "$1" "$PYTHON" -m pip install --no-deps --no-input --no-compile --progress-bar off --retries 3 \
        --require-hashes -r "${@:2}"
}

# PACKAGE: prints a file with the lock's lines of that package, its hashes among them
only() { sed -n "/^$1==/,/[^\\\\]\$/p" "$LOCK" > "$VENV/$1.txt" && echo "$VENV/$1.txt"; }

explain_failure() {
    local why="$LOCK could not be installed"
    if grep -q -E "$DISK_FULL" "$LOG"; then
        why="the disk filled up while installing into $VENV"
    elif grep -q -E "$WRONG_HASH" "$LOG"; then
        why=$(grep -E '==[^ ]+ from |Hash mismatch for' "$LOG" | grep -o -E '[A-Za-z0-9._-]+==[A-Za-z0-9.+]+' | tail -n 1)
        why+=" as offered does not have the hash that $LOCK gives"
    elif grep -q -E "$UNREACHABLE" "$LOG"; then
        why="the package index cannot be reached or lacks a package: is there a network?"
    fi
    fail "$why (what was said: $LOG)"
}

install_packages() {
    by_pip "installing uv" "$(only uv)" || true # without it pip installs everything
    if [[ $KIND == cpu ]]; then # from where pip is set up to look, else PyTorch's own index of CPU builds
        by_pip "installing torch" "$(only torch)" ||
            by_pip "installing torch" "$(only torch)" --index-url "$TORCH_CPU_INDEX" || explain_failure
    fi
    if ! with_progress "installing $LOCK" \
        "$VENV/bin/uv" pip install --no-deps --python "$PYTHON" --require-hashes -r "$LOCK"; then
        ! grep -q -E "$DISK_FULL|$WRONG_HASH" "$LOG" || explain_failure
        say "uv is not to be had or cannot reach the packages; pip installs them, which takes minutes"
        by_pip "installing $LOCK" "$LOCK" || explain_failure
    fi
    # so that notebooks opened by hand find maco_lib wherever they are started
    echo "$PWD" > "$(echo $VENV/lib/python3*/site-packages)/maco.pth"
}

make_venv() {
    local base free_gb needed_gb=8
    [[ ! -d $VENV || -f $LOG ]] ||
        fail ".venv was not made by MACO: move it away, or activate an environment that has what MACO needs"
    base=$(find_base_python)
    [[ $KIND == cpu ]] || needed_gb=30
    free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1000000))
    ((free_gb >= needed_gb)) || fail "the $KIND environment needs $needed_gb GB of free disk and $PWD has $free_gb GB"
    START=$SECONDS
    say "making .venv with Python $(python_version "$base"): $(grep -c '==' "$LOCK") packages of $LOCK"
    rm -rf "$VENV" && mkdir "$VENV" && : > "$LOG"
    "$base" -m venv "$VENV" >> "$LOG" 2>&1 || fail "python -m venv failed (what it said: $LOG)"
    install_packages
    lock_hash > "$STAMP" # written last: a .venv without it is one whose installation was cut short
    say "the environment is ready after $((SECONDS - START)) s"
}

lock_hash() { sha256sum "$LOCK" | cut -d' ' -f1; }
venv_ready() { [[ -f $STAMP && $(< "$STAMP") == "$(lock_hash)" ]] && python_fits "$PYTHON"; }

hold_lock() { # one start at a time makes .venv
    exec 9> .venv.lock
    flock -n -E 75 9 2> /dev/null || case $? in
        75) say "waiting for another start that is making .venv" && flock 9 ;;
        *) say "the file system of $PWD has no locks (flock): don't start twice at the same time" ;;
    esac
}

prepare_environment() {
    local lacking # the checkout is the working directory
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    if [[ -n ${MACO_PYTHON:-} ]]; then
        PYTHON=$MACO_PYTHON
        [[ -n $(python_version "$PYTHON") ]] || fail "MACO_PYTHON=$PYTHON does not run"
        python_fits "$PYTHON" || fail "MACO_PYTHON=$PYTHON is Python $(python_version "$PYTHON"); MACO needs 3.11 to 3.13"
        lacking=$("$PYTHON" requirements/needs.py) || say "MACO_PYTHON=$PYTHON lacks ${lacking//$'\n'/, }; used all the same"
        return
    fi
    cuda_answers && KIND=cuda || KIND=cpu
    if python_fits python3; then
        PYTHON=python3
        lacking=$(python3 requirements/needs.py "$KIND") && return
        [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]] || say "the active environment lacks ${lacking//$'\n'/, }; using .venv"
    fi
    LOCK=requirements/$KIND.txt VENV=.venv LOG=.venv/install.log STAMP=.venv/maco-lock PYTHON=.venv/bin/python
    ! venv_ready || return 0
    [[ -w . ]] || fail "$PWD cannot be written, so .venv cannot be made: copy the checkout, or name an interpreter in MACO_PYTHON"
    hold_lock
    venv_ready || make_venv
    exec 9>&-
}
