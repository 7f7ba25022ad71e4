#!/usr/bin/env bash
# Runs tests under AddressSanitizer and UndefinedBehaviorSanitizer, which see what the emulator does
# not: a thread's own arrays, and arithmetic.
#   tests/native/sanitize.sh [pytest arguments]   (default: all calls of the CUDA kernels)
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- tests/native/test_native.py tests/native/test_native_numerics.py
library() { ${CXX:-g++} -print-file-name="$1"; }
export BNEXT_EMULATION=sanitized
# The runtimes must come first in the process; Python's own leaks are not ours to report.
export LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:${ASAN_OPTIONS-}
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:${UBSAN_OPTIONS-}
exec "${PYTHON:-python}" -m pytest --capture=sys -q "$@"
