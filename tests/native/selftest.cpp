// Kernels whose only purpose is to be right, or wrong in one way, under the emulator: sums of rows
// of floats over a block, a cluster, a grid. `defect` is what is left out or done wrong; the tests
// show that each is found.
#include "../../csrc/cuda/device.cuh"
#include "buffers.h"

namespace bnext {
namespace {

enum Defect {
  kNone,
  // block
  kNoBarrier,
  kNoBarrierBeforeReuse,
  kDivergentBarrier,
  kEarlyExit,
  kPartialShuffle,
  kNoBoundsCheck,
  kSharedOverflow,
  kUninitialised,
  // cluster
  kNoClusterBarrier,
  kNoClusterBarrierAtEnd,
  kNoSuchRank,
  // grid
  kNoGridBarrier,
  // copies
  kNoWait,
  kWaitsForTooFew,
  kNoCommit,
  kReadsAnothersCopy,
  kMisalignedCopy,
  kSlotReusedTooEarly,
  // launch
  kNotCooperative,
  kTooManyThreads,
  kTooMuchShared,
  kClusterDoesNotDivide,
  kGridTooLarge,
  // within a thread
  kLocalOverflow,
  kShiftTooFar,
};

struct Args {
  const float* in;  // [rows, n]
  float* out;       // [rows]
  float* partials;  // [blocks]
  int n;
  int rows;
  int defect;
};

__device__ inline float warp_sum(float v) {
  for (int bits = 16; bits > 0; bits /= 2) v += shuffle_xor(v, bits);
  return v;
}

// The sum of v over the block, in `scratch` of one float per warp; right in thread 0.
__device__ inline float block_sum(float v, float* scratch, int defect) {
  const int place = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  v = warp_sum(v);
  if (place == 0) scratch[warp] = v;
  if (defect == kDivergentBarrier && warp == 1)
    sync_block();
  else if (defect != kNoBarrier)
    sync_block();
  float sum = 0;
  if (threadIdx.x == 0)
    for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += scratch[i];
  if (defect != kNoBarrierBeforeReuse) sync_block();
  return sum;
}

__global__ void sum_rows(Args a) {
  float* const scratch = reinterpret_cast<float*>(shared_memory());
  if (a.defect == kEarlyExit && threadIdx.x == 40) return;
  for (int row = static_cast<int>(blockIdx.x); row < a.rows; row += static_cast<int>(gridDim.x)) {
    float v = 0;
    const int end = a.n + (a.defect == kNoBoundsCheck && row + 1 == a.rows ? 1 : 0);
    for (int i = static_cast<int>(threadIdx.x); i < end; i += static_cast<int>(blockDim.x))
      v += a.in[row * a.n + i];
    if (a.defect == kPartialShuffle && threadIdx.x < 16) v = shuffle_xor(v, 8);
    if (a.defect == kSharedOverflow) scratch[blockDim.x / 32] = 0;
    if (a.defect == kUninitialised && threadIdx.x == 0) v += scratch[0] * 0;
    float local[4] = {};
    local[a.defect == kLocalOverflow ? row + 4 : row % 4] = v;
    if (a.defect == kShiftTooFar) v *= static_cast<float>(1 << (row + 32));
    const float sum = block_sum(v + 0 * local[a.n % 4], scratch, a.defect);
    if (threadIdx.x == 0) a.out[row] = sum;
  }
}

// A cluster per row: every block sums a part, rank 0 fetches the parts.
__global__ void sum_by_cluster(Args a) {
  float* const scratch = reinterpret_cast<float*>(shared_memory());
  float* const part = scratch + blockDim.x / 32;
  const int team = a.n / 64, row = static_cast<int>(blockIdx.x) / team;
  const int rank = static_cast<int>(blockIdx.x) % team;
  const float v = a.in[row * a.n + rank * 64 + static_cast<int>(threadIdx.x)];
  const float sum = block_sum(v, scratch, a.defect);
  if (threadIdx.x == 0) *part = sum;
  if (a.defect != kNoClusterBarrier) sync_cluster();
  if (rank == 0 && threadIdx.x == 0) {
    float total = 0;
    for (int r = 0; r < team; ++r)
      total += *in_block_of_cluster(part, r + (a.defect == kNoSuchRank ? 1 : 0));
    a.out[row] = total;
  }
  if (a.defect != kNoClusterBarrierAtEnd) sync_cluster();
}

// The whole grid for all rows, one after the other; partials in two parities.
__global__ void sum_by_grid(Args a) {
  float* const scratch = reinterpret_cast<float*>(shared_memory());
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  for (int row = 0; row < a.rows; ++row) {
    const float v = a.in[row * a.n + block * 64 + static_cast<int>(threadIdx.x)];
    const float sum = block_sum(v, scratch, a.defect);
    float* const partials = a.partials + row % 2 * blocks;
    if (threadIdx.x == 0) partials[block] = sum;
    if (a.defect != kNoGridBarrier) sync_grid();
    if (block == row % blocks && threadIdx.x == 0) {
      float total = 0;
      for (int i = 0; i < blocks; ++i) total += partials[i];
      a.out[row] = total;
    }
  }
}

// Rows through two slots of asynchronous copies, four floats per thread.
__global__ void sum_copies(Args a) {
  float* const slots = reinterpret_cast<float*>(shared_memory());
  float* const scratch = slots + 8 * blockDim.x;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto slot = [&](int row) { return slots + (row % 2 * threads + thread) * 4; };
  const auto fetch = [&](int row) {
    if (row < a.rows)
      copy_async<16>(slot(row) + (a.defect == kMisalignedCopy ? 1 : 0),
                     a.in + row * a.n + thread * 4);
    if (a.defect != kNoCommit) commit_copies();
  };
  fetch(0);
  for (int row = 0; row < a.rows; ++row) {
    if (a.defect == kSlotReusedTooEarly && row + 2 < a.rows) fetch(row + 2);
    fetch(row + 1);
    if (a.defect == kWaitsForTooFew)
      wait_for_copies<2>();
    else if (a.defect != kNoWait)
      wait_for_copies<1>();
    const float* const mine = slot(row);
    float v = mine[0] + mine[1] + mine[2] + mine[3];
    if (a.defect == kReadsAnothersCopy) v += 0 * slots[(row % 2 * threads + (thread ^ 1)) * 4];
    const float sum = block_sum(v, scratch, a.defect);
    if (thread == 0) a.out[row] = sum;
  }
  wait_for_copies<0>();
}

}  // namespace
}  // namespace bnext

// kernel: 0 rows, 1 cluster, 2 grid, 3 copies. Returns whether the launch succeeded.
extern "C" int bnext_selftest(int kernel, int defect, int rows, int n, const float* in,
                              float* out) {
  using namespace bnext;
  using emulation::Kind;
  emulation::clear_error();
  emulation::Buffers memory;
  const int blocks = kernel == 0 ? 3 : kernel == 1 ? rows * n / 64 : kernel == 2 ? n / 64 : 1;
  const Args args{memory.add(in, int64_t{4} * rows * n, Kind::kInput, "in"),
                  memory.add(out, int64_t{4} * rows, Kind::kOutput, "out"),
                  static_cast<float*>(memory.scratch(int64_t{8} * blocks)),
                  n,
                  rows,
                  defect};
  LaunchShape shape{blocks, 64, 8};
  void (*function)(Args) = sum_rows;
  if (kernel == 1) {
    function = sum_by_cluster;
    shape.shared_bytes += 4;
    shape.cluster_blocks = n / 64;
  } else if (kernel == 2) {
    function = sum_by_grid;
    shape.cooperative = defect != kNotCooperative;
  } else if (kernel == 3) {
    function = sum_copies;
    shape.threads = n / 4;
    shape.shared_bytes = int64_t{32} * shape.threads + shape.threads / 8;
  }
  if (defect == kTooManyThreads) shape.threads = 1056;
  if (defect == kTooMuchShared) shape.shared_bytes = 227 * 1024 + 1;
  if (defect == kClusterDoesNotDivide) shape.cluster_blocks = 2;
  if (defect == kGridTooLarge) {
    shape.cooperative = true;
    shape.blocks = 132 * 32 + 1;
  }
  const bool ok = launch(function, shape, nullptr, args) == cudaSuccess;
  return memory.copy_back() && ok;
}
