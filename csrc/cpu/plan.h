// How a CPU runs a problem.
#pragma once

#include "../plan.h"

namespace bnext {

enum class Isa : uint8_t { kDefault, kAvx2, kAvx512 };

struct CpuInfo {
  Isa isa;
  int threads;
  int64_t l1_bytes, l2_bytes, l3_bytes;  // L1d and L2 of a core, the L3 a core shares
};

inline std::string to_string(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "default";
}

// What is summed to one result is a bin: a channel, or a pixel of one where short rows are columns.
//
//   the rows of a bin                      all bins of a tensor
//   row 0  | segment | segment |  chunk    slice 0  | block | block | block |   a task is a block
//   row 1  |         |         |  0 and 1  slice 1  |       |       |       |   of one slice, or
//   row 2  |         |         |  chunk    slice 2  |       |       |       |   of all (resident)
//   row 3  |         |         |  2 and 3
//
// A chunk is some rows of one segment, small enough for two passes in L1. A slice is some chunks,
// which threads may sum separately. Both depend on the problem alone, so that the result is the
// same whatever the family and the number of threads. A kernel walks over tiles: a chunk of one bin
// (rows) or of some adjacent bins (columns).
struct CpuPlan {
  Isa isa;
  Family family;
  IndexMap map;
  int64_t bins;              // C, or C * bins_per_channel
  int64_t bins_per_channel;  // HW where short rows are taken as columns, else 1
  int64_t rows;              // rows a bin passes through: N, or N * HW
  int64_t row_stride;        // elements between a bin's rows
  int64_t width;             // adjacent elements of a bin in a row: HW, or 1
  int64_t segments;          // pieces a long row is cut into
  int64_t segment_width;
  int64_t chunk_rows;
  int64_t chunks;  // per bin
  int64_t slices;  // per bin
  int64_t block;   // bins per task
  int64_t tasks;   // of one pass, over all threads
  int64_t grain;   // tasks a thread takes at least
  bool nontemporal_stores;
  int64_t bytes_moved,
      bytes_floor;  // between memory and caches; second reads that hit the L3 not counted

  // visit(name, pointer to member) for every field: for text, bindings and tests.
  template <class Visit>
  static void fields(const Visit& visit) {
    visit("isa", &CpuPlan::isa);
    visit("family", &CpuPlan::family);
    visit("index_map", &CpuPlan::map);
    visit("bins", &CpuPlan::bins);
    visit("bins_per_channel", &CpuPlan::bins_per_channel);
    visit("rows", &CpuPlan::rows);
    visit("row_stride", &CpuPlan::row_stride);
    visit("width", &CpuPlan::width);
    visit("segments", &CpuPlan::segments);
    visit("segment_width", &CpuPlan::segment_width);
    visit("chunk_rows", &CpuPlan::chunk_rows);
    visit("chunks", &CpuPlan::chunks);
    visit("slices", &CpuPlan::slices);
    visit("block", &CpuPlan::block);
    visit("tasks", &CpuPlan::tasks);
    visit("grain", &CpuPlan::grain);
    visit("nontemporal_stores", &CpuPlan::nontemporal_stores);
    visit("bytes_moved", &CpuPlan::bytes_moved);
    visit("bytes_floor", &CpuPlan::bytes_floor);
  }

  bool operator==(const CpuPlan&) const = default;
};

// Fresh outputs from here on are advised to use huge pages.
inline constexpr int64_t kHugePageMinBytes = 4 << 20;

CpuPlan plan_cpu(const Problem& problem, const CpuInfo& cpu);

}  // namespace bnext
