// How a GPU runs a problem.
#pragma once

#include <optional>

#include "../plan.h"

namespace bnext {

struct CudaInfo {
  int capability;  // compute capability times 10, as in 90; only for reports: no plan reads it
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

inline std::string to_string(Team team) {
  return team == Team::kBlock     ? "block"
         : team == Team::kCluster ? "cluster"
         : team == Team::kGrid    ? "grid"
                                  : "stream";
}

// Memory is a matrix of rows, and a row is cut into accesses of `vector` adjacent elements
// ("items").
//   rows:    a row is a segment of one channel in one sample: rows = N * segments, of segment_width
//            elements (the last segment of a sample may be shorter). `threads / group` adjacent
//            threads own one channel of the group: thread t takes items t, t + threads / group, ...
//            of the channel's rows, an item row being padded to whole bytes of a ReLU mask.
//   columns: a row is everything between two pixels (channels_last, a bin is a channel) or two
//            samples (short rows: a bin is one pixel of a channel). A group is `group_bins`
//            adjacent bins = columns of items; thread t owns item column t % columns and takes
//            rows t / columns, + threads / columns, ...
// A block of a team owns rows_per_block adjacent rows of the group; the last block has fewer.
struct CudaPlan {
  Family family;
  IndexMap map;
  Team team;
  int vector;                       // elements per access; divides every row
  int threads;                      // per block
  int64_t bins_per_channel;         // columns: HW where short rows are taken as columns, else 1
  int64_t rows;                     // of the matrix
  int64_t segments, segment_width;  // rows: of a sample's channel
  int64_t group;                    // channels of a group; the last one has fewer
  int64_t groups;
  int64_t columns;  // columns: items of a group side by side
  int64_t team_blocks;
  int64_t teams;  // at work at once; each takes every teams-th group
  int64_t rows_per_block;
  int64_t items_per_thread;   // resident: what a thread keeps of each operand
  int64_t groups_per_launch;  // streaming: what the L2 keeps from the first read to the second
  int64_t launches;
  int64_t shared_bytes, workspace_bytes;
  int64_t bytes_moved, bytes_floor;

  constexpr int64_t group_bins() const { return group * bins_per_channel; }

  // visit(name, pointer to member) for every field: for text, bindings and tests.
  template <class Visit>
  static void fields(const Visit& visit) {
    visit("family", &CudaPlan::family);
    visit("index_map", &CudaPlan::map);
    visit("team", &CudaPlan::team);
    visit("vector", &CudaPlan::vector);
    visit("threads", &CudaPlan::threads);
    visit("bins_per_channel", &CudaPlan::bins_per_channel);
    visit("rows", &CudaPlan::rows);
    visit("segments", &CudaPlan::segments);
    visit("segment_width", &CudaPlan::segment_width);
    visit("group", &CudaPlan::group);
    visit("groups", &CudaPlan::groups);
    visit("columns", &CudaPlan::columns);
    visit("team_blocks", &CudaPlan::team_blocks);
    visit("teams", &CudaPlan::teams);
    visit("rows_per_block", &CudaPlan::rows_per_block);
    visit("items_per_thread", &CudaPlan::items_per_thread);
    visit("groups_per_launch", &CudaPlan::groups_per_launch);
    visit("launches", &CudaPlan::launches);
    visit("shared_bytes", &CudaPlan::shared_bytes);
    visit("workspace_bytes", &CudaPlan::workspace_bytes);
    visit("bytes_moved", &CudaPlan::bytes_moved);
    visit("bytes_floor", &CudaPlan::bytes_floor);
  }

  bool operator==(const CudaPlan&) const = default;
};

inline constexpr int kMaxCudaThreads = 512;
// How many threads find registers for the sums and coefficients of their bins among an SM's 65536:
// 128 each, 168 for four bins, 255 for eight.
constexpr int max_cuda_threads(IndexMap map, int vector) {
  return map == IndexMap::kRows || vector == 1 ? kMaxCudaThreads : vector == 4 ? 384 : 256;
}
inline constexpr int kWarpThreads = 32;
inline constexpr int kMaskBits = 8;  // elements of a row whose mask bits share a byte
inline constexpr int64_t kMaxGroupBins = 512;
// Bytes of a block's partial result of one bin (see exchange.cuh).
inline constexpr int64_t kPartialBytes = 24;
// Room for the coefficients of a channel, in values of the compute type.
inline constexpr int64_t kCoefficients = 8;
// Shared memory for joining the threads of a block: partial results of this many bins.
inline constexpr int64_t kJoinBins = 512;

// What the user forces, for tests and measurements. It only counts in training, where there is a
// choice. A family or team that cannot serve is an error.
struct CudaChoice {
  std::optional<Family> family;  // kResident or kStreaming
  std::optional<Team> team;      // of the resident family: not kStream
};

CudaPlan plan_cuda(const Problem& problem, const CudaInfo& cuda, const CudaChoice& choice = {});

// BNEXT_CUDA_FAMILY and BNEXT_CUDA_TEAM.
CudaChoice cuda_choice_of_environment();

}  // namespace bnext
