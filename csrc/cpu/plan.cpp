// The CPU plan and its thresholds. Measurements beside them: AMD EPYC (Zen 5), 2 cores, 48 KiB L1d,
// 1 MiB L2, 32 MiB L3; see benchmarks/results/.
#include "plan.h"

#include <algorithm>

namespace bnext {
namespace {

// Two passes over a chunk of each operand stay in a 32 KiB L1 with room for the next chunk's lines.
constexpr int64_t kChunkElements = 4096;
// Rows of columns whose float sums join in double: few enough to be exact, enough to hide the
// joining.
constexpr int64_t kChunkRows = 256;
// Blocks of columns and pieces of rows are multiples of this: whole vectors, whole bytes of a mask.
constexpr int64_t kTileUnit = 64;
// Below this, a run of adjacent elements fills too few vectors and is taken as columns.
constexpr int64_t kMinRowWidth = 16;
// Partial results per call, over all bins: 16 B each, far below any L2.
constexpr int64_t kMaxPartials = 4096;
constexpr int64_t kMaxSlices = 256;
// A resident task aims at this much memory: enough to stream, small enough to balance threads.
constexpr int64_t kTaskBytes = 256 * 1024;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kVectorLanes = 16;
// Fewer elements are not worth waking a thread for (ATen's grain).
constexpr int64_t kMinThreadElements = 32768;

// Bytes of a slab that stays cached from a thread's first pass to its second: its own L2, or its
// share of half the L3 (the other half is left to outputs and other threads).
int64_t resident_bytes(const CpuInfo& cpu) {
  return std::max(cpu.l2_bytes, cpu.l3_bytes / 2 / std::max(cpu.threads, 1));
}

}  // namespace

CpuPlan plan_cpu(const Problem& p, const CpuInfo& cpu) {
  CpuPlan plan{};
  plan.isa = cpu.isa;
  // Bytes of a mask belong to rows of memory.
  const bool short_rows = !p.channels_last && p.hw < kMinRowWidth && !p.has_mask;
  const bool columns = p.channels_last || short_rows;
  plan.map = columns ? IndexMap::kColumns : IndexMap::kRows;
  plan.bins_per_channel = short_rows ? p.hw : 1;
  plan.bins = p.c * plan.bins_per_channel;
  plan.rows = p.channels_last ? p.n * p.hw : p.n;
  plan.row_stride = columns ? plan.bins : p.c * p.hw;
  plan.width = columns ? 1 : p.hw;

  plan.segments = columns ? 1 : ceil_div(p.hw, kChunkElements);
  plan.segment_width =
      round_up(ceil_div(plan.width, plan.segments), plan.segments > 1 ? kTileUnit : 1);
  plan.chunk_rows = columns ? kChunkRows : std::max<int64_t>(1, kChunkElements / plan.width);
  plan.chunks = ceil_div(plan.rows, plan.chunk_rows) * plan.segments;
  plan.slices = std::min(plan.chunks, std::clamp<int64_t>(kMaxPartials / plan.bins, 1, kMaxSlices));

  const int64_t element_bytes = element_size(p.dtype);
  const int64_t bin_bytes = plan.rows * plan.width * element_bytes * operands(p.stage);
  // Columns stream: a slab of some columns is scattered over all rows, and reading it once took 1.6
  // times as long as reading whole rows twice (ResNet-50's shapes, N = 32, float32: 3.1 copies
  // against 1.9).
  const bool resident =
      !columns && p.applies() && p.c >= cpu.threads && bin_bytes <= resident_bytes(cpu);
  plan.family = !is_training(p.stage) ? Family::kElementwise
                : resident            ? Family::kResident
                                      : Family::kStreaming;
  if (plan.family == Family::kResident) {
    const int64_t blocks =
        std::max<int64_t>({1, kTasksPerThread * cpu.threads, bin_bytes * plan.bins / kTaskBytes});
    plan.block = ceil_div(plan.bins, blocks);
    plan.tasks = ceil_div(plan.bins, plan.block);
  } else {
    const int64_t blocks = ceil_div(kTasksPerThread * cpu.threads, plan.slices);
    plan.block =
        std::min(plan.bins, round_up(ceil_div(plan.bins, blocks), columns ? kTileUnit : 1));
    plan.tasks = ceil_div(plan.bins, plan.block) * plan.slices;
  }
  plan.grain =
      std::max<int64_t>(1, kMinThreadElements / std::max<int64_t>(1, p.numel() / plan.tasks));

  // A non-temporal store saves reading the line first, but evicts what the next layer wants to
  // read: taken where input and output together outgrow the L3, so that the output would not have
  // stayed there.
  const int64_t run = columns ? plan.bins : p.hw;
  plan.nontemporal_stores =
      run % kVectorLanes == 0 && plan.bins_per_channel == 1 && 2 * p.bytes() > cpu.l3_bytes;

  plan.bytes_floor = p.bytes_floor();
  const bool misses =
      plan.family == Family::kStreaming && p.applies() && p.bytes_read() > cpu.l3_bytes / 2;
  plan.bytes_moved = plan.bytes_floor + (misses ? p.bytes_read() : 0);
  return plan;
}

}  // namespace bnext
