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

inline constexpr int64_t kSumBytes = 16;  // of a bin: two doubles

// How the items of a row of memory, or of its slice, end.
enum class Ends : uint8_t {
  kWhole,
  kRagged,  // with elements of others, up to an aligned access or a whole byte of the mask
};

inline std::string to_string(Ends ends) {
  return ends == Ends::kWhole ? "whole" : "ragged";
}

// Whether rows of channels_last are cut into slices: see CudaPlan.
constexpr bool is_sliced(IndexMap map, Ends ends) {
  return map == IndexMap::kColumns && ends == Ends::kRagged;
}

// Memory is cut into accesses of `vector` adjacent elements ("items"), and they are a matrix.
//   rows:    a column is a channel, a row one of its items, sample after sample, of row_items each.
//   columns: a column is an item of `vector` adjacent bins, a row everything between two pixels
//            (channels_last, a bin is a channel) or two samples (short rows: a bin is one pixel of
//            a channel), of row_items items.
// Rows of channels_last that nothing wide divides are cut into slices of channels (see Problem): a
// group is a slice, of whole items and of two that it shares with its neighbours. Where slices
// begin in an item changes from row to row; rows of a thread, and of its warp, are as many apart as
// make that the same.
//
// A group is `group` adjacent channels. Of a block's warps every warp_sets-th has the same columns,
// 32 / warp_rows adjacent ones (rows: one), and in a step takes warp_rows rows of them. A block of
// a team owns rows_per_block adjacent rows of the group, the last one fewer.
struct CudaPlan {
  Family family;
  IndexMap map;
  Team team;
  int vector;                // elements per access
  int threads;               // per block
  int warp_rows, warp_sets;  // see above
  int64_t bins_per_channel;  // columns: HW where short rows are taken as columns, else 1
  bool interleaved;          // columns: a row is bins_per_channel pixels of all channels instead
  int64_t rows;              // of the matrix
  int64_t row_items;         // rows: of a sample's channel
  Ends ends;                 // rows: of a sample's channel, in items; columns: of a slice
  int magic_shift;           // rows: i / row_items is (i * magic >> 32) >> magic_shift, below 2^31
  uint32_t magic;            // 0: there is one sample
  int64_t group;             // channels of a group, the last one fewer
  int64_t groups;
  int64_t team_blocks;
  int64_t teams;  // at work at once; each takes every teams-th group
  int64_t rows_per_block;
  int64_t items_per_thread;   // resident: what a thread keeps of each operand
  int64_t groups_per_launch;  // streaming: what the L2 keeps from the first read to the second
  int64_t launches;
  bool keeps_output;  // in the L2, for what reads it next
  int64_t slab_bytes, shared_bytes, workspace_bytes;
  int64_t bytes_moved, bytes_floor;

  constexpr int64_t group_bins() const { return group * bins_per_channel; }
  constexpr bool is_sliced() const { return bnext::is_sliced(map, ends); }
  // Whether slices begin in the midst of items.
  constexpr bool has_phases() const { return is_sliced() && vector > 1; }
  // Of a warp's sums, before the warps of a block join theirs.
  constexpr int64_t scratch_bytes() const {
    return threads / warp_rows * (map == IndexMap::kRows ? 1 : vector) * kSumBytes;
  }

  // visit(name, pointer to member) for every field: for text, bindings and tests.
  template <class Visit>
  static void fields(const Visit& visit) {
    visit("family", &CudaPlan::family);
    visit("index_map", &CudaPlan::map);
    visit("team", &CudaPlan::team);
    visit("vector", &CudaPlan::vector);
    visit("threads", &CudaPlan::threads);
    visit("warp_rows", &CudaPlan::warp_rows);
    visit("warp_sets", &CudaPlan::warp_sets);
    visit("bins_per_channel", &CudaPlan::bins_per_channel);
    visit("interleaved", &CudaPlan::interleaved);
    visit("rows", &CudaPlan::rows);
    visit("row_items", &CudaPlan::row_items);
    visit("ends", &CudaPlan::ends);
    visit("magic_shift", &CudaPlan::magic_shift);
    visit("magic", &CudaPlan::magic);
    visit("group", &CudaPlan::group);
    visit("groups", &CudaPlan::groups);
    visit("team_blocks", &CudaPlan::team_blocks);
    visit("teams", &CudaPlan::teams);
    visit("rows_per_block", &CudaPlan::rows_per_block);
    visit("items_per_thread", &CudaPlan::items_per_thread);
    visit("groups_per_launch", &CudaPlan::groups_per_launch);
    visit("launches", &CudaPlan::launches);
    visit("keeps_output", &CudaPlan::keeps_output);
    visit("slab_bytes", &CudaPlan::slab_bytes);
    visit("shared_bytes", &CudaPlan::shared_bytes);
    visit("workspace_bytes", &CudaPlan::workspace_bytes);
    visit("bytes_moved", &CudaPlan::bytes_moved);
    visit("bytes_floor", &CudaPlan::bytes_floor);
  }

  bool operator==(const CudaPlan&) const = default;
};

// What kernels and plan agree on.
// Threads of a block: by the kernels' launch bounds, that many registers fill an SM, or two blocks
// of half as many threads.
inline constexpr int kMaxCudaThreads = 512;
// Elements of an access, of those kernels that would have too few registers for eight of 16 bits:
// the double backward, and the backward that activations share (see has_gate_of_its_own) but for
// whole rows.
inline constexpr int kMaxDoubleBackwardVector = 4;
constexpr int most_shared_vector(IndexMap map, Ends ends) {
  return map == IndexMap::kRows && ends == Ends::kWhole ? 8 : 4;
}
inline constexpr int kWarpThreads = 32;
inline constexpr int kMaskBits = 8;  // elements of a row whose mask bits share a byte
// Rows after which slices begin at the same place of an item, or of a byte of the mask, again.
inline constexpr int kSliceRows = kMaskBits;
inline constexpr int64_t kMaxGroupBins = 512;
// Shared memory of a channel (see exchange.cuh): a block's partial result, what is kept of it
// besides, coefficients that come of the sums, and those that need none.
inline constexpr int64_t kPartialBytes = 32, kRecordBytes = 32, kResultBytes = 32;
inline constexpr int64_t kPreparedBytes = 64;  // backward
// A block's partial result of a double backward, in the workspace.
inline constexpr int64_t kDoubleBackwardPartialBytes = 40;

// What the user forces, for tests and measurements. It only counts in training, where there is a
// choice. A family or team that cannot serve is an error.
struct CudaChoice {
  std::optional<Family> family;  // kResident or kStreaming
  std::optional<Team> team;      // of the resident family: not kStream
  int spare_sms = 0;             // that a grid leaves to others' kernels
};

// Whether a backward passes dy through no activation, a sign or a mask: kernels have a loop for
// each of these alone. It writes dx, and behind a mask the residual's gradient.
constexpr bool has_gate_of_its_own(const Problem& p) {
  const bool is_sign = p.has_mask ? p.act != Act::kLeakyRelu : p.act == Act::kRelu;
  const bool writes = p.need_input && p.need_residual == p.has_mask;
  const bool sums_alone = is_training(p.stage) && !p.applies();
  return (writes || sums_alone) && (p.act == Act::kNone || is_sign);
}

CudaPlan plan_cuda(const Problem& problem, const CudaInfo& cuda, const CudaChoice& choice = {});

// BNEXT_CUDA_FAMILY, BNEXT_CUDA_TEAM and BNEXT_CUDA_SPARE_SMS.
CudaChoice cuda_choice_of_environment();

}  // namespace bnext
