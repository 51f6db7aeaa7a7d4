# shellcheck shell=bash
# Sourced by run_all.sh and run_tests.sh: prepare_environment sets PYTHON to the interpreter to use.
#
#   1. MACO_PYTHON, as it is
#   2. the python3 on the PATH (an activated environment), when it has everything that requirements/needs.py asks for
#   3. .venv in the checkout, made here from requirements/cuda.txt if an NVIDIA driver answers, else requirements/cpu.txt

TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
DISK_GB_CPU=8
DISK_GB_CUDA=30

say() { echo "maco: $*" >&2; }

fail() {
    say "$*"
    exit 1
}

python_fits() { # PYTHON: it runs and MACO supports its version
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' > /dev/null 2>&1
}

python_version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2> /dev/null; }

cuda_answers() { command -v nvidia-smi > /dev/null && timeout 20 nvidia-smi -L > /dev/null 2>&1; }

find_base_python() { # prints an interpreter that can make a virtual environment
    local candidate
    for candidate in python3 python3.12 python3.11 python3.13; do
        if python_fits "$candidate" && "$candidate" -c 'import ensurepip, venv' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    local found
    found=$(python_version python3) && found="python3 is $found" || found="python3 does not run"
    fail "no Python 3.11 to 3.13 with venv and pip was found ($found); install one, or name one in MACO_PYTHON"
}

packages_done() {
    if grep -q '^Installing collected packages: .*,' "$LOG"; then
        echo "$(find "$VENV"/lib/python*/site-packages -maxdepth 1 -name '*.dist-info' | wc -l) of $NUM_PACKAGES installed"
    else
        echo "$(grep -c -E '^(Collecting|Processing) ' "$LOG") of $NUM_PACKAGES fetched"
    fi
}

# Runs "$@" with its output in $LOG and says every 15 s how far it is; an interrupt ends it too.
with_progress() { # DOING COMMAND...
    local doing=$1 pid status=0 next=15
    shift
    "$@" >> "$LOG" 2>&1 < /dev/null & # keeps the lock, should this shell be killed
    pid=$!
    trap 'kill "$pid" 2> /dev/null; wait "$pid" || true; say "interrupted"; exit 130' INT TERM HUP
    while kill -0 "$pid" 2> /dev/null; do
        sleep 0.5
        if ((SECONDS - START >= next)); then
            say "$doing: $(packages_done) … $((SECONDS - START)) s"
            next=$((SECONDS - START + 15))
        fi
    done
    wait "$pid" || status=$?
    trap - INT TERM HUP
    return "$status"
}

pip_install() { # DOING ARGUMENTS...
    local doing=$1
    shift
    with_progress "$doing" "$VENV/bin/python" -m pip install --no-input --no-deps --progress-bar off --retries 3 "$@"
}

explain_failure() {
    local unreachable='NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeout|ProxyError|Temporary failure in name'
    if grep -q 'No space left on device' "$LOG"; then
        fail "the disk filled up while installing into $VENV (pip's output: $LOG)"
    elif grep -q -E "$unreachable|No matching distribution" "$LOG"; then
        fail "the package index cannot be reached or lacks a package: is there a network? (pip's output: $LOG)"
    fi
    fail "pip could not install $LOCK (pip's output: $LOG)"
}

install_torch_cpu() { # the registry that pip is set up with, else PyTorch's own index of CPU builds
    local torch
    torch=$(grep '^torch==' "$LOCK")
    pip_install "installing $torch" "$torch" || pip_install "installing $torch" --index-url "$TORCH_CPU_INDEX" "$torch"
}

make_venv() {
    local base needed_gb=$DISK_GB_CPU free_gb
    base=$(find_base_python) || exit 1
    [[ $KIND == cuda ]] && needed_gb=$DISK_GB_CUDA
    free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1000000))
    ((free_gb >= needed_gb)) || fail "the $KIND environment needs $needed_gb GB of free disk and $PWD has $free_gb GB"

    NUM_PACKAGES=$(grep -c '==' "$LOCK")
    START=$SECONDS
    say "making .venv with Python $(python_version "$base"): $NUM_PACKAGES packages of $LOCK"
    rm -rf "$VENV"
    mkdir "$VENV"
    : > "$LOG"
    "$base" -m venv "$VENV" >> "$LOG" 2>&1 || fail "python -m venv failed (its output: $LOG)"
    if [[ $KIND == cpu ]]; then
        install_torch_cpu || explain_failure
    fi
    pip_install "installing $LOCK" -r "$LOCK" || explain_failure
    # editable, so that notebooks opened by hand find maco_lib wherever they are started
    pip_install "installing maco" --no-build-isolation --editable . || explain_failure
    lock_hash > "$STAMP" # written last: a .venv without it is one whose installation was cut short
    say "the environment is ready after $((SECONDS - START)) s"
}

lock_hash() { sha256sum "$LOCK" | cut -d' ' -f1; }

prepare_environment() {
    local lacking cuda=() # the checkout is the working directory
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    if [[ -n ${MACO_PYTHON:-} ]]; then
        PYTHON=$MACO_PYTHON
        [[ -n $(python_version "$PYTHON") ]] || fail "MACO_PYTHON=$PYTHON does not run"
        python_fits "$PYTHON" || fail "MACO_PYTHON=$PYTHON is Python $(python_version "$PYTHON"); MACO needs 3.11 to 3.13"
        lacking=$("$PYTHON" requirements/needs.py) || say "MACO_PYTHON=$PYTHON lacks ${lacking//$'\n'/, }; used all the same"
        return
    fi

    KIND=cpu
    if cuda_answers; then
        KIND=cuda cuda=(--cuda)
    fi
    if python_fits python3; then
        PYTHON=python3
        lacking=$(python3 requirements/needs.py "${cuda[@]}") && return
        [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]] || say "the active environment lacks ${lacking//$'\n'/, }; using .venv"
    fi

    LOCK=requirements/$KIND.txt VENV=.venv LOG=.venv/install.log STAMP=.venv/maco-lock
    PYTHON=$VENV/bin/python
    exec 9> .venv.lock
    flock -n 9 || { say "waiting for another start that is making .venv"; flock 9; }
    if [[ ! -f $STAMP || $(< "$STAMP") != "$(lock_hash)" ]] || ! python_fits "$PYTHON"; then
        if [[ -d $VENV && ! -f $LOG ]]; then
            fail ".venv was not made by MACO: move it away, or activate an environment that has what MACO needs"
        fi
        make_venv
    fi
    exec 9>&-
}
