// How memory is cut: the accesses and the index map, the groups of channels, the threads of a
// block. Part of plan.cpp. Includes the standard library only.
#pragma once

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "plan.h"

namespace bnext {
namespace {

// A line of 128 bytes is what DRAM and the L2 fetch best (2.75 TB/s in pieces of 64 bytes on an
// H100, 1.59 in pieces of 32, 2.89 contiguous; measured by the quack project): no group is a
// narrower slab.
constexpr int64_t kMinSlabBytes = 128;
// A row shorter than a line is taken as columns, whatever vector divides it: a warp would touch a
// line per thread.
constexpr int64_t kMinRowBytes = 128;
// Items of a thread below which threads of a block are better spent on another channel: four loads
// in flight.
constexpr int64_t kMinItemsPerThread = 4;
// Kernels count the items of a block, and from its first one, in 32 bits.
constexpr int64_t kMaxBlockItems = (int64_t{1} << 31) - kMaxCudaThreads;

// Kernels count the elements of a ragged row in 31 bits, and those of two items more.
constexpr int64_t kMaxRaggedRow = (int64_t{1} << 31) - 64;

// Channels of a group, each of which takes 100 to 200 bytes of shared memory besides the slab.
constexpr int64_t kMaxGroup = 256;
struct Layout {
  IndexMap map;
  int vector;
  int64_t bins_per_channel;
  std::vector<int64_t> groups;  // channels of a group, to choose from: widest first
  bool interleaved = false;
  Ends ends = Ends::kWhole;

  bool is_sliced() const { return bnext::is_sliced(map, ends); }
};

// Bytes of one channel's input (backward: and gradient) that a resident team holds.
int64_t channel_bytes(const Problem& p) {
  return p.count() * element_size(p.dtype) * operands(p.stage);
}

int widest(const Problem& p, IndexMap map, Ends ends) {
  if (p.dtype == DType::kFloat64) return 1;
  const bool is_shared = is_backward(p.stage) && !has_gate_of_its_own(p);
  const int most = p.stage == Stage::kDoubleBackward ? kMaxDoubleBackwardVector
                   : is_shared                       ? most_shared_vector(map, ends)
                                                     : kMaskBits;
  return std::min(static_cast<int>(16 / element_size(p.dtype)), most);
}

std::vector<int> vectors(const Problem& p) {
  std::vector<int> fit;
  for (const int v : {8, 4, 1}) {
    const int64_t bytes = v * element_size(p.dtype);
    if (v == 1 || (bytes <= p.alignment && v <= widest(p, IndexMap::kRows, Ends::kWhole)))
      fit.push_back(v);
  }
  return fit;
}

// Channels of the narrowest group of columns: whole mask bytes and items, no narrower slab than
// memory likes, or all channels.
int64_t least_columns_group(const Problem& p, int64_t bins_per_channel) {
  const int64_t unit = kMaskBits / std::gcd<int64_t>(bins_per_channel, kMaskBits);
  const int64_t bytes = unit * bins_per_channel * element_size(p.dtype);
  return std::min(p.c, unit * ceil_div(kMinSlabBytes, bytes));
}

// Multiples of the narrowest group that leave the last group nearly whole.
std::vector<int64_t> column_groups(const Problem& p, int64_t bins_per_channel, int vector) {
  const int64_t least = least_columns_group(p, bins_per_channel);
  const int64_t most = std::min<int64_t>(kMaxGroupBins, int64_t{kMaxCudaThreads} * vector);
  std::vector<int64_t> groups;
  for (int64_t factor = 16; factor > 1; factor /= 2) {
    const int64_t group = std::min(p.c, factor * least);
    const bool fits =
        group * bins_per_channel <= most && group <= kMaxGroup && group > factor / 2 * least;
    if (fits && round_up(p.c, group) * 8 <= p.c * 9) groups.push_back(group);
  }
  groups.push_back(least);
  return groups;
}

// Channels that are few items each share a block, as long as blocks fill the GPU.
int64_t row_group(const Problem& p, const CudaInfo& cuda, int vector) {
  const int64_t items = p.n * ceil_div(p.hw, kMaskBits) * (kMaskBits / vector);
  constexpr int kThreads = kMaxCudaThreads / 2;
  int64_t group = kThreads / kWarpThreads;
  while (group > 1 &&
         (group * items > kThreads * kMinItemsPerThread || ceil_div(p.c, group) < cuda.sms))
    group /= 2;
  return group;
}

int64_t shared_bytes_of_channel(const Problem& p) {
  return kPartialBytes + kRecordBytes + kResultBytes + (is_backward(p.stage) ? kPreparedBytes : 0);
}

// What a row of memory is cut into: items, with a mask bytes of it.
int64_t row_unit(const Problem& p, int vector) {
  return p.has_mask ? kMaskBits : vector;
}

// The widest vector that divides rows of memory, and with it the index map: rows of odd length
// (7x7) are wide when several channels are taken as columns. 14x14 is rows of four in 16 bits too:
// as columns of eight a quarter of the threads would have nothing. A mask is of rows: those that
// are no whole bytes are ragged.
Layout choose_layout(const Problem& p, const CudaInfo& cuda) {
  const std::vector<int> fit = vectors(p);
  const bool is_short = p.hw * element_size(p.dtype) < kMinRowBytes;
  const bool divides = p.hw > 4 && p.hw % 4 == 0 && fit.front() >= 4;
  const int widest_column = widest(p, IndexMap::kColumns, Ends::kWhole);
  for (const int v : fit) {
    if (p.channels_last) {
      if (v > widest_column) continue;
      const bool has_slices = p.has_mask && p.is_sliced();
      if (p.c % v == 0 && !has_slices) return {IndexMap::kColumns, v, 1, column_groups(p, 1, v)};
      // Three channels: every eight pixels begin at an aligned address again. One group has all
      // channels, and at most as many items.
      const int64_t pixels = v / std::gcd<int64_t>(p.c, v);
      const int64_t shared = kMaxCudaThreads / 2 * v * kSumBytes + p.c * shared_bytes_of_channel(p);
      if (!p.has_mask && p.c % 4 != 0 && p.count() % pixels == 0 && p.c <= kMaxGroup &&
          shared <= cuda.shared_bytes_per_block)
        return {IndexMap::kColumns, v, pixels, {p.c}, true};
      if (v == 1 && p.needs_aligned_slices())
        throw std::invalid_argument("bnext: a mask of slices of channels, but unaligned tensors");
      if (v == 1 || (p.is_sliced() && p.numel() % kMaskBits == 0 && v == widest_column))
        return {IndexMap::kColumns, v, 1, {p.slice()}, false, Ends::kRagged};
      continue;
    }
    const int64_t unit = row_unit(p, v);
    // Division by multiplication takes no divisor of one.
    const bool rows = p.hw % unit == 0 && (p.hw > v || p.n == 1);
    const int column = std::min(v, widest_column);
    const bool columns = !p.has_mask && p.c * p.hw % column == 0 && p.hw <= kMaxGroupBins &&
                         least_columns_group(p, p.hw) * p.hw <= kMaxGroupBins;
    if (columns && (is_short || !(rows || divides)))
      return {IndexMap::kColumns, column, p.hw, column_groups(p, p.hw, column)};
    // Rows of odd length begin at the same place of an aligned item in each sample, or at its
    // start.
    const bool whole_items = p.hw % v == 0;
    const bool ragged = v <= widest(p, IndexMap::kRows, Ends::kRagged) && p.hw % unit != 0 &&
                        (p.has_mask || !divides) && (whole_items || p.c * p.hw % unit == 0) &&
                        p.hw < kMaxRaggedRow;
    const Ends ends = ragged ? Ends::kRagged : Ends::kWhole;
    if (rows || ragged) return {IndexMap::kRows, v, 1, {row_group(p, cuda, v)}, false, ends};
  }
  throw std::invalid_argument("bnext: a mask of rows of more than 2^31 elements, not whole bytes");
}

// Items that the widest spread of a slice over them takes.
int64_t items_of_slice(const Problem& p, int vector) {
  if (p.has_mask) return p.slice_bytes() * kMaskBits / vector;
  return ceil_div(vector - 1 + p.slice(), vector);
}

// Ragged rows of as many items as the widest spread of one over them takes.
int64_t items_of_row(const Problem& p, const Layout& layout) {
  const int64_t unit = row_unit(p, layout.vector);
  if (layout.ends == Ends::kWhole) return p.hw / layout.vector;
  return ceil_div(unit - 1 + p.hw, unit) * (unit / layout.vector);
}

// Steps of a block through its rows.
int64_t items_of_thread(const CudaPlan& plan) {
  const int64_t step = plan.threads / kWarpThreads / plan.warp_sets * plan.warp_rows;
  return ceil_div(plan.rows_per_block, step);
}

void set_threads(CudaPlan& plan, const Problem& p, int threads) {
  plan.threads = threads;
  plan.items_per_thread = items_of_thread(plan);
  plan.slab_bytes =
      operands(p.stage) * plan.items_per_thread * threads * plan.vector * element_size(p.dtype);
  plan.slab_bytes = round_up(plan.slab_bytes, 32);
  plan.shared_bytes =
      plan.slab_bytes + plan.scratch_bytes() + plan.group * shared_bytes_of_channel(p);
}

// Down to three quarters of the threads, where that leaves fewer slots of the slab empty.
void fit_threads(CudaPlan& plan, const Problem& p) {
  const int most = plan.threads;
  const int unit = kWarpThreads * (plan.has_phases() ? kSliceRows : plan.warp_sets);
  int best = most;
  const auto slots = [&](int threads) {
    set_threads(plan, p, threads);
    return plan.items_per_thread * threads;
  };
  int64_t least = slots(most);
  for (int threads = most - unit; threads >= unit && threads * 4 >= most * 3; threads -= unit)
    if (const int64_t taken = slots(threads); taken < least) best = threads, least = taken;
  set_threads(plan, p, best);
}

// i / divisor as (i * magic >> 32) >> shift, for i below 2^31 and a divisor of 2 to 2^31: the
// magic's error is less than the divisor, at most 2^(shift + 1).
void set_divisor(CudaPlan& plan, int64_t divisor) {
  while (int64_t{2} << plan.magic_shift < divisor) ++plan.magic_shift;
  const unsigned __int128 power = static_cast<unsigned __int128>(1) << (32 + plan.magic_shift);
  plan.magic = static_cast<uint32_t>((power + divisor - 1) / divisor);
}

// Rows of the matrix that a block may own at most.
int64_t most_rows(const Problem& p, const CudaPlan& plan) {
  if (plan.map == IndexMap::kColumns) return std::max<int64_t>(1, kMaxBlockItems / plan.row_items);
  if (plan.magic == 0) return kMaxBlockItems;
  const int64_t mask_items = (p.has_mask ? p.c : 1) * plan.row_items;
  const int64_t sample = std::max(p.c * p.hw / plan.vector, mask_items);
  if (sample > kMaxBlockItems / 3)
    throw std::invalid_argument("bnext: a sample of more than 2^29 accesses");
  return (kMaxBlockItems / sample - 2) * plan.row_items;
}

// Groups of `group` channels for teams of `team_blocks`, or of more where those cannot count so
// far. All but the family, the team's kind and what goes with them is set.
CudaPlan cut(const Problem& p, const Layout& layout, int64_t group, int64_t team_blocks,
             int threads, bool resident) {
  CudaPlan plan{};
  plan.map = layout.map;
  plan.vector = layout.vector;
  plan.bins_per_channel = layout.bins_per_channel;
  plan.interleaved = layout.interleaved;
  plan.group = group;
  plan.groups = ceil_div(p.c, group);
  if (layout.map == IndexMap::kRows) {
    plan.ends = layout.ends;
    plan.row_items = items_of_row(p, layout);
    plan.rows = p.n * plan.row_items;
    plan.warp_rows = kWarpThreads;
    plan.warp_sets = static_cast<int>(group);
    if (p.n > 1) set_divisor(plan, plan.row_items);
  } else {
    plan.ends = layout.ends;
    plan.row_items = ceil_div(p.c * layout.bins_per_channel, plan.vector);
    plan.rows = p.channels_last ? p.count() / layout.bins_per_channel : p.n;
    const int64_t items = plan.is_sliced() ? items_of_slice(p, plan.vector)
                                           : ceil_div(plan.group_bins(), plan.vector);
    // Neighbours in a byte of a mask are neighbours in a warp.
    int64_t columns = p.has_mask ? kMaskBits / plan.vector : 1;
    while (columns < items && columns < kWarpThreads) columns *= 2;
    plan.warp_rows = static_cast<int>(kWarpThreads / columns);
    plan.warp_sets = static_cast<int>(ceil_div(items, columns));
  }
  plan.team_blocks = std::max(team_blocks, ceil_div(plan.rows, most_rows(p, plan)));
  // Rows begin at whole bytes of a mask.
  const int64_t unit = layout.map == IndexMap::kRows ? kMaskBits / plan.vector : 1;
  plan.rows_per_block = round_up(ceil_div(plan.rows, plan.team_blocks), unit);
  const int sets = kWarpThreads * plan.warp_sets;
  set_threads(plan, p, std::max(threads / sets * sets, sets));
  if (resident)
    fit_threads(plan, p);
  else
    plan.shared_bytes -= plan.slab_bytes, plan.slab_bytes = plan.items_per_thread = 0;
  plan.launches = 1;
  plan.groups_per_launch = plan.groups;
  return plan;
}

}  // namespace
}  // namespace bnext
