#!/usr/bin/env bash
# Builds, tests and measures bnext on a machine with a GPU, nvcc and a CUDA torch; no network.
#
#   benchmarks/on_gpu.sh OUT [build|test|verify|sanitize|bench|train|ncu]...
#
# Without parts: all of them. Each takes less than ten minutes; every call builds what changed.
# OUT gets CSV, plots, summary.txt and logs.tgz. The exit status is 1 if any part failed.
# PYTHON chooses the interpreter (python3); BNEXT_DRY_RUN=1 only prints the commands.
set -uo pipefail

all=(build test verify sanitize bench train ncu)
usage() { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit "$1"; }
[[ ${1:-} == -h || ${1:-} == --help ]] && usage 0
[[ $# -ge 1 && $1 != -* ]] || usage 2
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
parts=("${@:-${all[@]}}")
for part in "${parts[@]}"; do
    [[ " ${all[*]} " == *" $part "* ]] || { echo "no such part: $part" >&2; usage 2; }
done
[[ ${parts[0]} == build ]] || parts=(build "${parts[@]}")

cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD OMP_WAIT_POLICY=PASSIVE
export MAX_JOBS=${MAX_JOBS:-$(nproc)} BNEXT_CUDA=${BNEXT_CUDA:-1}

run() {
    echo "+ $*"
    [[ -n ${BNEXT_DRY_RUN:-} ]] || "$@"
}

build() { run "$python" setup.py build_ext --inplace && run "$python" -m bnext.introspect; }

run_tests() {
    local parallel=()
    "$python" -c "import xdist" 2> /dev/null && parallel=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
    run env FAIL_WITHOUT_CUDA=1 "$python" -m pytest -q "${parallel[@]}"
}

verify() { run "$python" -m bnext.verify --device cuda; }

# Without torch's cache every tensor is an allocation of its own, which ends where it ends.
sanitize() {
    local failed=0 tool
    for tool in memcheck racecheck synccheck initcheck; do
        run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --error-exitcode 1 "$python" -m bnext.verify --device cuda --small || failed=1
    done
    return $failed
}

bench() { run "$python" -m benchmarks gpu --out "$out" --minutes "${BENCH_MINUTES:-8}"; }
train() { run "$python" -m benchmarks resnet50 --out "$out"; }
ncu() { run "$python" -m benchmarks dram --out "$out"; }

mkdir -p "$out/logs"
: > "$out/summary.txt"
failed=0
for part in "${parts[@]}"; do
    echo "=== $part"
    start=$SECONDS
    command=$part
    [[ $part == test ]] && command=run_tests
    "$command" 2>&1 | tee "$out/logs/$part.log"
    status=${PIPESTATUS[0]}
    ((status)) && failed=1
    echo "$part: exit status $status after $((SECONDS - start)) s" >> "$out/summary.txt"
    [[ $part == build && $status -ne 0 ]] && break
done
[[ -f $out/ncu.log ]] && mv "$out/ncu.log" "$out/logs/ncu-counters.log"
tar -C "$out" -czf "$out/logs.tgz" logs && rm -r "$out/logs"
echo "=== summary"
cat "$out/summary.txt"
exit $failed
