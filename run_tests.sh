#!/usr/bin/env bash
# Check the code and run the tests, in the environment that run_all.sh uses; arguments go to pytest.
#
#   ./run_tests.sh                   everything; tests of GPU code are skipped, with the reason, where there is no GPU
#   ./run_tests.sh -m "not slow"     the quick ones, in minutes
#   ./run_tests.sh -n 0              one after another: the rest goes by two workers, test by test
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source requirements/environment.sh

prepare_environment
"$PYTHON" -m ruff check .
workers=2
! cuda_answers || workers=0 # GPUs are for one test at a time
exec "$PYTHON" -m pytest -n "$workers" "$@"
