#!/usr/bin/env bash
# Builds, tests and measures bnext on a machine with a GPU, nvcc and a CUDA torch; no network.
#
#   benchmarks/on_gpu.sh OUT [build|small|bench|rest|ncu|train|verify|test|TOOL]...
#
# Without parts: all of them, the most wanted first; a TOOL is one of compute-sanitizer's: memcheck,
# racecheck, synccheck, initcheck. Every call builds what changed, and a call with one part takes less
# than LIMIT_MINUTES (9.5) with that. A part that OUT/done lists has passed before and is left out: call
# again after an interruption. OUT gets CSV, plots, summary.txt and logs. The exit status is 1 if any
# part failed. PYTHON chooses the interpreter (python3); BNEXT_DRY_RUN=1 only prints the commands.
set -uo pipefail

tools=(memcheck racecheck synccheck initcheck)
all=(build small bench ncu rest train verify "${tools[@]}" test)
usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit "$1"; }
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
# Minutes that are left of this call.
left() { awk -v all="${LIMIT_MINUTES:-9.5}" -v gone="$SECONDS" 'BEGIN { print all - gone / 60 }'; }
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD OMP_WAIT_POLICY=PASSIVE
export MAX_JOBS=${MAX_JOBS:-$(nproc)} BNEXT_CUDA=${BNEXT_CUDA:-1}

run() {
    echo "+ $*"
    [[ -n ${BNEXT_DRY_RUN:-} ]] || "$@"
}

build() { run "$python" setup.py build_ext --inplace && run "$python" -m bnext.introspect; }

# What needs no GPU was tested where there was none, and builds in folders that processes share.
run_tests() {
    local parallel=()
    "$python" -c "import xdist" 2> /dev/null && parallel=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
    run env FAIL_WITHOUT_CUDA=1 "$python" -m pytest -q "${parallel[@]}" \
        --ignore tests/native --ignore tests/packaging
}

small() { run "$python" -m bnext.verify --device cuda --small; }
verify() { run "$python" -m bnext.verify --device cuda; }

# Without torch's cache every tensor is an allocation of its own, which ends where it ends.
sanitize() {
    run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" \
        --error-exitcode 1 "$python" -m bnext.verify --device cuda --small
}
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }
synccheck() { sanitize synccheck; }
initcheck() { sanitize initcheck; }

# The 53 layers of ResNet-50 in both layouts, then everything else.
wanted='^256x.*(bfloat16|float32).* bn$'
bench() {
    run "$python" -m benchmarks gpu --out "$out/bench" --minutes "$(left)" --filter "$wanted"
}
rest() { run "$python" -m benchmarks gpu --out "$out/rest" --minutes "$(left)"; }
train() { run "$python" -m benchmarks resnet50 --out "$out" --minutes "$(left)"; }
ncu() { run "$python" -m benchmarks dram --out "$out"; }

mkdir -p "$out/logs"
failed=0
touch "$out/done"
for part in "${parts[@]}"; do
    [[ $part != build ]] && grep -qx "$part" "$out/done" && continue
    echo "=== $part"
    start=$SECONDS
    command=$part
    [[ $part == test ]] && command=run_tests
    "$command" 2>&1 | tee "$out/logs/$part.log"
    status=${PIPESTATUS[0]}
    ((status)) && failed=1
    ((status)) || [[ $part == build || -n ${BNEXT_DRY_RUN:-} ]] || echo "$part" >> "$out/done"
    echo "$part: exit status $status after $((SECONDS - start)) s" >> "$out/summary.txt"
    [[ $part == build && $status -ne 0 ]] && break
done
[[ -f $out/ncu.log ]] && mv "$out/ncu.log" "$out/logs/ncu-counters.log"
echo "=== summary"
cat "$out/summary.txt"
exit $failed
