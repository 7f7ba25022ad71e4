// The plan: which kernel family runs a problem on a device, and how the work is cut. Pure functions
// of (Problem, device): no torch, no CUDA, no allocation. The thresholds that depend on the device
// are in plan.cpp and plan_cuda.cpp. Sizes that belong to a kernel's own code stand beside it
// (tiles.h, slab.cuh).
#pragma once

#include <cstdint>
#include <optional>
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

struct CudaInfo {
  int capability;  // compute capability times 10: 80, 90, 100, 120; for reports, no plan reads it
  int sms;
  int64_t shared_bytes_per_sm, shared_bytes_per_block;  // the latter with the opt-in attribute
  int64_t l2_bytes;
  int max_cluster_blocks;  // 1: none

  bool operator==(const CudaInfo&) const = default;
};

// The blocks that own a group of channels together, and how they exchange their sums.
enum class Team : uint8_t {
  kBlock,    // one block
  kCluster,  // a thread-block cluster, through distributed shared memory
  kGrid,     // blocks of a cooperative launch, through global memory
  kStream,   // blocks of separate launches, through global memory
};

// Memory is a matrix of rows, and a row is cut into accesses of `vector` adjacent elements
// ("items").
//   rows:    a row is a segment of one channel in one sample: rows = N * segments, of segment_width
//            elements (the last segment of a sample may be shorter). `threads / group` adjacent
//            threads own one channel of the group: thread t takes items t, t + threads / group, ...
//            of the channel's rows, an item row being padded to whole bytes of a ReLU mask.
//   columns: a row is everything between two pixels (channels_last, a lane is a channel) or two
//            samples (short rows: a lane is one pixel of a channel). A group is `group_lanes`
//            adjacent lanes = columns of items; thread t owns item column t % columns and takes
//            rows t / columns, + threads / columns, ...
// A block of a team owns rows_per_block adjacent rows of the group, the last one fewer.
struct CudaPlan {
  Family family;
  IndexMap map;
  Team team;
  int vector;                       // elements per access; divides every row
  int threads;                      // per block
  int64_t lanes_per_channel;        // columns: HW where short rows are taken as columns, else 1
  int64_t rows;                     // of the matrix
  int64_t segments, segment_width;  // rows: of a sample's channel
  int64_t group;                    // channels of a group, the last one fewer
  int64_t groups;
  int64_t columns;  // columns: items of a group side by side
  int64_t team_blocks;
  int64_t teams;  // at work side by side; each takes every teams-th group
  int64_t rows_per_block;
  int64_t items_per_thread;   // resident: what a thread keeps of each operand
  int64_t groups_per_launch;  // streaming: what the L2 keeps from the first read to the second
  int64_t launches;
  int64_t shared_bytes, workspace_bytes;
  int64_t bytes_moved, bytes_floor;

  constexpr int64_t group_lanes() const { return group * lanes_per_channel; }
  bool operator==(const CudaPlan&) const = default;
};

// What kernels and plan agree on.
inline constexpr int kMaxCudaThreads = 512;
// Threads that have registers enough for the sums and coefficients of their lanes: 128 each of an
// SM's 65536, 168 for four lanes, 255 for eight.
constexpr int max_cuda_threads(IndexMap map, int vector) {
  return map == IndexMap::kRows || vector == 1 ? kMaxCudaThreads : vector == 4 ? 384 : 256;
}
inline constexpr int kWarpThreads = 32;
inline constexpr int kMaskBits = 8;  // elements of a row whose mask bits share a byte
inline constexpr int64_t kMaxGroupLanes = 512;
// Bytes of a block's partial result of one lane (see exchange.cuh).
inline constexpr int64_t kPartialBytes = 24;
// Room for the coefficients of a channel, in values of the compute type.
inline constexpr int64_t kCoefficients = 8;
// Shared memory for joining the threads of a block: partial results of this many lanes.
inline constexpr int64_t kJoinLanes = 512;

// What the user insists on, for tests and measurements; it counts where there is a choice, in
// training. A family or team that cannot serve is an error.
struct CudaChoice {
  std::optional<Family> family;  // kResident or kStreaming
  std::optional<Team> team;      // of the resident family: not kStream
};

CudaPlan plan_cuda(const Problem& problem, const CudaInfo& cuda, const CudaChoice& choice = {});

// BNEXT_CUDA_FAMILY and BNEXT_CUDA_TEAM.
CudaChoice cuda_choice_of_environment();

std::string to_string(Isa isa);
std::string to_string(Family family);
std::string to_string(IndexMap map);
std::string to_string(Team team);
std::string to_string(const CpuPlan& plan);
std::string to_string(const CudaPlan& plan);

}  // namespace bnext
