#!/usr/bin/env bash
# Builds the C++ with AddressSanitizer and UndefinedBehaviorSanitizer and runs pytest under them:
#   tests/sanitize.sh [pytest arguments]
# in a copy of the repository's files under build/sanitize, so the normal build stays as it is.
# PYTHON chooses the interpreter; it needs what `pip install -e .[test]` and the build need.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
copy=build/sanitize

mkdir -p "$copy"
git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
        [ -e "$file" ] && printf '%s\0' "$file"
    done |
    xargs -0 cp --parents --preserve=timestamps -t "$copy"
cd "$copy"
BNEXT_SANITIZE=address,undefined BNEXT_CUDA=0 "$python" setup.py -q build_ext --inplace

# The runtime must come first in the process. libstdc++ is loaded with it, so that it finds
# __cxa_throw there; Python's own leaks are not ours to report.
library() { ${CXX:-g++} -print-file-name="$1"; }
export LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:${ASAN_OPTIONS-}
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:${UBSAN_OPTIONS-}
# Not --capture=fd: it would swallow the report of the sanitizer that ends the process.
exec "$python" -m pytest --capture=sys "$@"
