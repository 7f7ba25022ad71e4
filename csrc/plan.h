// The plan: which kernel family runs a problem on a device, and how the work is cut. Pure functions
// of (Problem, device): no torch, no CUDA, no allocation. Every threshold of the project lives in
// plan.cpp.
#pragma once

#include <cstdint>
#include <string>

#include "batch_norm.h"

namespace bnext {

enum class Isa : uint8_t { kDefault, kAvx2, kAvx512 };

struct CpuInfo {
  Isa isa;
  int threads;
  int64_t l1_bytes, l2_bytes, l3_bytes;  // L1d and L2 of a core, the L3 a core shares
};

enum class Family : uint8_t {
  kElementwise,  // nothing to reduce first: one pass
  kResident,     // a task reads its channels once, they stay in its cache for the second pass
  kStreaming,    // all threads reduce, then all threads apply: memory is read twice
};

// How memory is cut into independent reductions ("lanes").
enum class IndexMap : uint8_t {
  kRows,     // a lane is a channel: runs of HW adjacent elements, reduced along the run
  kColumns,  // a lane is a column: adjacent lanes are adjacent in memory, reduced down the rows
};

// The reduction of a lane is cut into chunks (small enough for two passes in L1), and the chunks
// into slices that threads may reduce separately. Both depend on the problem alone, so that the
// result is the same whatever the family and the number of threads.
struct CpuPlan {
  Isa isa;
  Family family;
  IndexMap map;
  int64_t lanes;              // C, or C * lanes_per_channel
  int64_t lanes_per_channel;  // HW where short rows are taken as columns, else 1
  int64_t rows;               // rows a lane passes through: N, or N * HW
  int64_t row_stride;         // elements between a lane's rows
  int64_t width;              // adjacent elements of a lane in a row: HW, or 1
  int64_t segments;           // pieces a long row is cut into
  int64_t segment_width;
  int64_t chunk_rows;
  int64_t chunks;  // per lane
  int64_t slices;  // per lane
  int64_t block;   // lanes per task
  int64_t tasks;   // of one pass, over all threads
  int64_t grain;   // tasks a thread takes at least
  bool nontemporal_stores;
  int64_t bytes_moved,
      bytes_floor;  // between memory and caches; second reads that hit the L3 not counted

  bool operator==(const CpuPlan&) const = default;
};

// Fresh outputs from here on are advised to use huge pages.
inline constexpr int64_t kHugePageMinBytes = 4 << 20;

CpuPlan plan_cpu(const Problem& problem, const CpuInfo& cpu);

std::string to_string(Isa isa);
std::string to_string(Family family);
std::string to_string(IndexMap map);
std::string to_string(const CpuPlan& plan);

}  // namespace bnext
