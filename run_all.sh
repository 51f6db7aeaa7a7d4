#!/usr/bin/env bash
# Measure this machine, draw the figures and write REPORT.md; ./run_all.sh --help lists the options, in any order.
#
# A section that fails costs only itself: the others go on, and the last lines say what failed and how to go on.
#
# The environment: MACO_PYTHON if set, else the active one if it has what MACO needs, else .venv, made on the first start.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source requirements/environment.sh

prepare_environment
exec "$PYTHON" -m study run "$@"
