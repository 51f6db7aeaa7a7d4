#!/usr/bin/env bash
# Measure this machine, draw the figures and write REPORT.md.
#
#   ./run_all.sh                            measure what is missing; an interrupted run goes on where it stopped
#   ./run_all.sh --profile smoke            the quickest pass (smoke, standard or full; standard is the default)
#   ./run_all.sh --only overlap,bandwidth   some sections
#   ./run_all.sh --force                    measure again what is stored already
#   ./run_all.sh --only overlap -p num_ranks=2   set a parameter of a section
#   ./run_all.sh --machine NAME             go on in data/NAME instead of this host's own folder
#   ./run_all.sh --report-only              figures and report from the stored data; measures nothing, needs no GPU
#
# A section that fails costs only itself: the others go on, and the last lines say what failed and how to go on.
#
# The environment: MACO_PYTHON if set, else the active one if it has what MACO needs, else .venv, made on the first start.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source requirements/environment.sh

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' run_all.sh
    exit
fi
prepare_environment
exec "$PYTHON" -m maco_lib run "$@"
