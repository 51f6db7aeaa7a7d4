#!/usr/bin/env bash
# Measure this machine, draw the figures and write REPORT.md.
#
#   ./run_all.sh                            everything, in the profile for this machine; goes on where it stopped
#   ./run_all.sh --profile smoke            the quickest pass (smoke, standard or full)
#   ./run_all.sh --only overlap,bandwidth   some sections
#   ./run_all.sh --report-only              figures and report from the stored data; needs no GPU
#   ./run_all.sh --help                     this text and every option of `python -m maco_lib run`
#
# The environment: MACO_PYTHON if set, else the active one if it has what MACO needs, else .venv, made on the first run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source requirements/environment.sh

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' run_all.sh
    echo
fi
prepare_environment
if [[ ${1:-} == --report-only ]]; then
    shift
    exec "$PYTHON" -m maco_lib report "$@"
fi
exec "$PYTHON" -m maco_lib run "$@"
