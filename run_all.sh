#!/usr/bin/env bash
# Measure this machine, draw the figures and write REPORT.md; ./run_all.sh --help lists the options, in any order.
#
# The environment: MACO_PYTHON if set, else the active one if it has what MACO needs, else .venv, made on the first start.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source requirements/environment.sh

prepare_environment
exec "$PYTHON" -m maco_lib run "$@"
