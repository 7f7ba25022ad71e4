// The CPU plan and its thresholds. Measurements beside them: AVX2 on an EPYC Milan (Zen 3), 2
// cores, 512 KiB L2, unless another machine is named; see benchmarks/results/.
#include "plan.h"

#include <algorithm>
#include <numeric>

namespace bnext {
namespace {

// Rows of up to so many elements of a channel are taken as columns: a row of 49 pays a tail and a
// fold (24x2048x7x7, float32: 3.8 ms as rows, 0.95 as columns). Rows of 196 lose as columns.
constexpr int64_t kShortRow = 128;
// Columns are folded to whole vectors where a folded row stays this short: its coefficients and
// sums share the L1 (C = 33 in bfloat16: 1.69 ms with a tail in each row, 0.69 folded).
constexpr int64_t kMaxFoldedColumns = 2048;
constexpr int64_t kMinColumns = 64;  // and are at least this many: a vector of any dtype, twice
// A slice sums at least so many values, or rows of columns: what it costs to join stays far below.
constexpr int64_t kSliceElements = 65536, kSliceRows = 128, kMaxSlices = 128;
constexpr int64_t kTasksPerThread = 4;
// Fewer elements are not worth waking a thread for (ATen's grain).
constexpr int64_t kMinThreadElements = 32768;

constexpr int64_t kCacheLine = 64;

// Bytes of a channel that stay cached from a thread's first pass to its second: its own L2, or its
// share of half the L3 (the other half is left to outputs and other threads).
int64_t resident_bytes(const CpuInfo& cpu) {
  return std::max(cpu.l2_bytes, cpu.l3_bytes / 2 / std::max(cpu.threads, 1));
}

// How rows of `columns` elements lie in longer ones of whole vectors.
int64_t fold_of(int64_t columns, int64_t vector) {
  int64_t fold = vector / std::gcd(columns, vector);
  while (fold * columns < kMinColumns) fold *= 2;
  return columns >= kMinColumns && fold * columns > kMaxFoldedColumns ? 1 : fold;
}

}  // namespace

CpuPlan plan_cpu(const Problem& p, const CpuInfo& cpu) {
  CpuPlan plan{};
  const int64_t element_bytes = element_size(p.dtype);
  plan.isa = cpu.isa;
  const bool columns = p.channels_last || p.hw <= kShortRow;
  plan.map = columns ? IndexMap::kColumns : IndexMap::kRows;
  plan.channels = p.c;
  plan.width = p.channels_last ? 1 : p.hw;
  const int64_t all_rows = p.channels_last ? p.n * p.hw : p.n;
  const int64_t vector =
      element_bytes == 2 ? 32 : 16;  // elements: of any instruction set, and a line
  plan.fold = columns ? fold_of(p.c * plan.width, vector) : 1;
  plan.rows = all_rows / plan.fold;
  plan.row_stride = plan.fold * p.c * plan.width;
  plan.rest = all_rows % plan.fold * p.c * plan.width;
  plan.pieces = columns ? 1 : std::max<int64_t>(1, plan.width / CpuPlan::kPiece);
  const int64_t slice_rows = std::max(kSliceRows, kSliceElements / plan.row_stride);
  plan.slices = std::clamp<int64_t>(
      columns ? plan.rows / slice_rows : plan.rows * plan.width / kSliceElements, 1,
      std::min(kMaxSlices, std::max<int64_t>(1, plan.rows * plan.pieces)));

  // Channels last, a block is scattered over all rows: slabs of columns took twice as long as whole
  // rows read twice (C = 256, float32: 19.4 ms against 10.5). Blocks of short rows are whole lines.
  const int64_t channel_bytes = all_rows * plan.width * element_bytes * operands(p.stage);
  const int64_t unit = columns ? vector : 1;
  const bool resident = !p.channels_last && plan.fold == 1 && is_training(p.stage) && p.applies() &&
                        p.c >= unit * cpu.threads && unit * channel_bytes <= resident_bytes(cpu);
  plan.family = !is_training(p.stage) ? Family::kElementwise
                : resident            ? Family::kResident
                                      : Family::kStreaming;
  // A block that is summed and one that is prefetched share the L2 with what is written.
  const int64_t in_l2 = cpu.l2_bytes * 5 / 16 / channel_bytes;
  const int64_t wanted = resident ? std::min(in_l2, p.c / (kTasksPerThread * cpu.threads))
                                  : p.c * plan.slices / (kTasksPerThread * cpu.threads);
  plan.block = std::clamp<int64_t>(wanted / unit * unit, std::min(unit, p.c), p.c);
  if (plan.fold > 1) plan.block = p.c;
  plan.blocks = p.c / plan.block;
  plan.tasks = plan.blocks * (resident ? 1 : plan.slices);
  plan.grain =
      std::max<int64_t>(1, kMinThreadElements / std::max<int64_t>(1, p.numel() / plan.tasks));

  // A non-temporal store saves reading the line first, but evicts what the next layer wants to
  // read: taken where the output would fill the L3 (channels last 24x2048x7x7, float32, with 8 MiB
  // of L3: 3.3 ms without, 1.8 with). Rows of columns must be whole lines.
  plan.nontemporal_stores =
      p.bytes() >= cpu.l3_bytes * 3 / 4 &&
      (!columns || (plan.row_stride * element_bytes % kCacheLine == 0 && plan.rest == 0));

  plan.bytes_floor = p.bytes_floor();
  const bool misses =
      plan.family == Family::kStreaming && p.applies() && p.bytes_read() > cpu.l3_bytes / 2;
  // What is staged in dx is written twice; else the residual is read once more.
  const bool more = p.stage == Stage::kTrainBackward && is_any(p.act) &&
                    (stages(element_bytes) ? !p.need_residual : p.residual);
  plan.bytes_moved =
      plan.bytes_floor + (misses ? p.bytes_read() : 0) + (misses && more ? p.bytes() : 0);
  return plan;
}

}  // namespace bnext
