#!/usr/bin/env bash
# Check the code and run the tests, in the environment that run_all.sh uses; arguments go to pytest.
#
#   ./run_tests.sh                   everything; tests of GPU code are skipped, with the reason, where there is no GPU
#   ./run_tests.sh -m "not slow"     the quick ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source requirements/environment.sh

prepare_environment
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest "$@"
