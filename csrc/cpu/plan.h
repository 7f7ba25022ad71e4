// How a CPU runs a problem.
#pragma once

#include "../plan.h"

namespace bnext {

enum class Isa : uint8_t { kDefault, kAvx2, kAvx512 };

struct CpuInfo {
  Isa isa;
  int threads;
  int64_t l1_bytes, l2_bytes, l3_bytes;  // L1d and L2 of a core, what it can count on of its L3
};

inline std::string to_string(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "default";
}

// Memory is rows, `row_stride` elements apart.
//
//   rows: a row is a sample             columns: a row is `fold` pixels or samples
//   row 0 | channel 0 | channel 1 |     row 0 | 0 0 0 1 1 1 2 2 2 |    `width` columns of each
//   row 1 | channel 0 | channel 1 |     row 1 | 0 0 0 1 1 1 2 2 2 |    channel, and once more
//         : `width` elements each             :                        for each fold
//   a row of a channel is one run       what does not fill a row: `rest` elements after the last
//
// A slice is some rows (or pieces of long ones), which threads may sum separately; a block is some
// channels. A task is a block of one slice, or of all (resident). Slices depend on the problem
// alone, and so the result is the same whatever the family and the number of threads.
struct CpuPlan {
  Isa isa;
  Family family;
  IndexMap map;
  int64_t channels, width, fold, rows, row_stride, rest;
  int64_t pieces;  // of a row of a channel: kPiece elements, the last up to twice as many
  int64_t slices;  // of all rows * pieces
  int64_t block;   // channels of a task
  int64_t blocks;  // the last one takes what remains
  int64_t tasks;   // of one pass, over all threads
  int64_t grain;   // tasks a thread takes at least
  bool nontemporal_stores;
  int64_t bytes_moved,
      bytes_floor;  // between memory and caches; second reads that hit the L3 not counted

  // Elements of a piece; a multiple of what any instruction set sums before it turns to double.
  static constexpr int64_t kPiece = 16384;

  int64_t columns() const { return fold * channels * width; }
  int64_t first_channel(int64_t block_index) const {
    return block_index == blocks ? channels : block_index * block;
  }
  // Of rows * pieces.
  int64_t first_chunk(int64_t slice) const { return rows * pieces * slice / slices; }

  // visit(name, pointer to member) for every field: for text, bindings and tests.
  template <class Visit>
  static void fields(const Visit& visit) {
    visit("isa", &CpuPlan::isa);
    visit("family", &CpuPlan::family);
    visit("index_map", &CpuPlan::map);
    visit("channels", &CpuPlan::channels);
    visit("width", &CpuPlan::width);
    visit("fold", &CpuPlan::fold);
    visit("rows", &CpuPlan::rows);
    visit("row_stride", &CpuPlan::row_stride);
    visit("rest", &CpuPlan::rest);
    visit("pieces", &CpuPlan::pieces);
    visit("slices", &CpuPlan::slices);
    visit("block", &CpuPlan::block);
    visit("blocks", &CpuPlan::blocks);
    visit("tasks", &CpuPlan::tasks);
    visit("grain", &CpuPlan::grain);
    visit("nontemporal_stores", &CpuPlan::nontemporal_stores);
    visit("bytes_moved", &CpuPlan::bytes_moved);
    visit("bytes_floor", &CpuPlan::bytes_floor);
  }

  bool operator==(const CpuPlan&) const = default;
};

// Activations that have no kernels of their own.
constexpr bool is_any(Act act) {
  return act != Act::kNone && act != Act::kRelu;
}
// Whether the sums of a backward leave any activation's dy f'(z) in the memory of grad_residual, or
// else grad_input, for what writes dx: not where storing it would round it, as in 16 bits.
constexpr bool stages(int64_t element_bytes) {
  return element_bytes > 2;
}

// Fresh outputs from here on are advised to use huge pages.
inline constexpr int64_t kHugePageMinBytes = 4 << 20;

CpuPlan plan_cpu(const Problem& problem, const CpuInfo& cpu);

}  // namespace bnext
