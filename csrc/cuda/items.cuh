// Which elements a thread owns: the matrix of CudaPlan (plan.h) in device arithmetic.
//
//   rows (NCHW), group of 2 channels, 4 warps:         columns (channels_last), V = 4, 2 columns:
//        item 0  item 1 ... item 32                        bins 0-3  bins 4-7
//     channel 0  t0   t1 ...  (warp 2's) t64 ...      row 0   t0         t1
//     channel 1  t32  t33 ... (warp 3's) t96 ...      row 1   t2         t3      (t32: row 16)
//
// A thread's k-th item is a step of `step` rows of the matrix after the one before. All threads of
// a block count as many steps, so that whole warps can meet in shuffles; which of its items a
// thread has is known to `owns`, of whole steps, and to `valid`, of what is left after the last
// one.
#pragma once

#include "elements.cuh"

namespace bnext {

// What a kernel is launched with.
template <class Args>
struct Call {
  Problem problem;
  CudaPlan plan;
  Args args;
  void* workspace;
  int64_t first_group;  // of this launch
};

// The rows of the matrix that a block of a team owns: [first, first + count).
struct RowRange {
  int64_t first;
  int count;
};

__device__ inline RowRange rows_of(const CudaPlan& plan, int64_t rank) {
  const int64_t first = rank * plan.rows_per_block, left = plan.rows - first;
  return {first, static_cast<int>(left < 0                     ? 0
                                  : left < plan.rows_per_block ? left
                                                               : plan.rows_per_block)};
}

// How many channels a group has: the last one has fewer, a team without a group has none.
__device__ inline int channels_of(const Problem& problem, const CudaPlan& plan, int64_t group) {
  const int64_t left = problem.c - group * plan.group;
  return static_cast<int>(left < 0 ? 0 : left < plan.group ? left : plan.group);
}

// Place k of kPlaces scattered ones, as a share of 2^32: they hit neither the first value nor, in
// step, the lines of an image. Of each part of 1 / kPlaces, the fraction of k times the golden
// ratio.
inline constexpr int kPlaces = 32;
__device__ inline unsigned fraction(unsigned k) {
  return k * 0x9e3779b9u + 0x80000000u;
}
__device__ inline unsigned place(unsigned k) {
  return k << 27 | fraction(k) >> 5;
}

template <IndexMap kMap, int V, Ends kEnds>
class Items {
 public:
  static constexpr int kElements = V;
  static constexpr bool kRows = kMap == IndexMap::kRows;
  static constexpr int kBins = kRows ? 1 : V;  // whose sums a thread keeps
  // Coefficients that it keeps: of each bin, or of the only one twice, for pairs of elements. They
  // are loaded as volatile, number by number: what one load brings lies in adjacent registers, and
  // hot loops would put the pairs together.
  static constexpr int kLanes = kBins == 1 && V > 1 ? 2 : kBins;
  // Whether elements of other rows stand in an item beside the only bin's; of other slices, which
  // have bins that nobody reads.
  static constexpr bool kRagged = kRows && kEnds == Ends::kRagged;
  static constexpr bool kSliced = is_sliced(kMap, kEnds);
  static constexpr bool kWhole = kEnds == Ends::kWhole;

  __device__ Items(const Problem& problem, const CudaPlan& plan, int64_t group, int64_t rank)
      : problem_(problem), plan_(plan), range_(rows_of(plan, rank)) {
    const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
    const int sets = plan.warp_sets, per_warp = plan.warp_rows, set = warp % sets;
    const int column = lane & (kWarpThreads / per_warp - 1);
    const int step = plan.threads / kWarpThreads / sets * per_warp;
    row_ = warp / sets * per_warp + lane * per_warp / kWarpThreads;
    if constexpr (kSliced && V > 1)  // rows of a warp at which slices begin at the same place
      row_ = lane * per_warp / kWarpThreads * (step / per_warp) + warp / sets;
    if (group >= plan.groups) range_.count = 0;
    full_ = range_.count / step;
    const int rest = range_.count % step;
    total_ = full_ + (rest > 0);
    if constexpr (kRows) {
      first_bin_ = set;
      const int64_t c = group * plan.group + set;
      owns_ = set < plan.group && c < problem.c;
      const int64_t channel = owns_ ? c : problem.c - 1;
      const int64_t sample = range_.first / plan.row_items;
      const unsigned start = static_cast<unsigned>(range_.first % plan.row_items);
      const int64_t row_of_memory = sample * problem.c + channel;
      first_ = opaque(start + row_);
      step_ = step;
      jump_ = opaque(static_cast<unsigned>(problem.c * problem.hw / V - plan.row_items));
      before_ = before(channel);
      base_ = (row_of_memory * problem.hw - before_) / V;
      mask_base_ = row_of_memory * problem.mask_bytes_of_hw();
      if constexpr (kRagged) {
        const int64_t last = problem.numel() / V - 1 - base_;
        last_ = last < UINT32_MAX ? static_cast<unsigned>(last) : UINT32_MAX;
      }
    } else if constexpr (kSliced) {
      const int64_t start = range_.first * problem.c + group * plan.group;
      const int64_t row_bytes = problem.mask_bytes_of_slices();
      const int channels = channels_of(problem, plan, group);
      const int place = set * (kWarpThreads / per_warp) + column;
      before_ = static_cast<int>(start + row_ * problem.c);
      before_ = before_slice(row_);
      first_bin_ = place * V - before_;
      const int over = first_bin_ + V - channels, last = (before_ + channels - 1) / V;
      own_ = kAll << (first_bin_ < 0 ? -first_bin_ : 0) & shift_right(kAll, over < 0 ? 0 : over);
      // Where none are its own, it reads others that there are, and writes its part of a mask.
      owns_ = own_ != 0 ||
              (problem.has_mask && channels > 0 && place * V < problem.slice_bytes() * kMaskBits);
      const int item = place < last ? place : last;
      base_ = start / kMaskBits * (kMaskBits / V);
      first_ =
          opaque(static_cast<unsigned>((start + row_ * problem.c - before_) / V - base_ + item));
      step_ = opaque(static_cast<unsigned>(step * problem.c / V));
      mask_base_ = range_.first * row_bytes + group * problem.slice_bytes();
      mask_first_ = static_cast<unsigned>(row_ * row_bytes + place * V / kMaskBits);
      mask_step_ = static_cast<unsigned>(step * row_bytes);
    } else {
      const int64_t row_items = plan.row_items;
      first_bin_ = (set * (kWarpThreads / per_warp) + column) * V;
      const int64_t bin = group * plan.group_bins() + first_bin_;
      owns_ = first_bin_ < plan.group_bins() && bin < problem.c * plan.bins_per_channel &&
              group < plan.groups;
      const int mine = owns_ ? first_bin_ : 0;
      first_ = opaque(static_cast<unsigned>(row_ * row_items + mine / V));
      step_ = opaque(static_cast<unsigned>(step * row_items));
      base_ = range_.first * row_items + group * plan.group_bins() / V;
      mask_base_ = range_.first * ceil_div(problem.c, kMaskBits) + group * plan.group / kMaskBits;
      mask_first_ = static_cast<unsigned>(row_ * ceil_div(problem.c, kMaskBits) + mine / kMaskBits);
      mask_step_ = static_cast<unsigned>(step * ceil_div(problem.c, kMaskBits));
    }
    owns_rest_ = owns_ && row_ < rest;
  }

  // Steps, of which the first `full` are whole.
  __device__ int full() const { return full_; }
  __device__ int total() const { return total_; }
  // Whether the thread has an item in each whole step, and in any one.
  __device__ bool owns() const { return owns_; }
  __device__ bool valid(int k) const { return k < full_ ? owns_ : owns_rest_; }

  // Items before the k-th in the tensor, less base().
  __device__ int64_t base() const { return base_; }
  __device__ unsigned operator()(int k) const {
    const unsigned at = offset_of(index(k));
    return kRagged && at > last_ ? last_ : at;
  }
  // Which elements of the k-th item are the channel's, as bits: of some that a thread has, none.
  __device__ unsigned elements(int k) const {
    // Eight predicates would take registers from one item to the next.
    if constexpr (kSliced) return V == 8 ? opaque_again(own_) : own_;
    if constexpr (!kRagged) return kAll;
    const unsigned i = index(k);
    const int place = static_cast<int>(i - sample(i) * row_items()) * V - before_;
    const int over = place - (static_cast<int>(problem_.hw) - V);
    return kAll << (place < 0 ? -place : 0) & shift_right(kAll, over < 0 ? 0 : over);
  }
  __device__ bool has(int k, int v) const { return elements(k) >> v & 1; }

  // Bytes before its own in the mask, and the place of its bits there.
  __device__ int64_t mask_base() const { return mask_base_; }
  __device__ unsigned mask(int k) const {
    if constexpr (!kRows) return mask_first_ + static_cast<unsigned>(k) * mask_step_;
    const unsigned i = index(k);
    if constexpr (!kRagged) return offset_of(i) / kThreadsPerMaskByte<V>;
    const unsigned jump = (static_cast<unsigned>(problem_.c) - 1) * row_items();
    return (sample(i) * jump + i) / kThreadsPerMaskByte<V>;
  }
  __device__ unsigned bits_of_byte(unsigned byte) const {
    return byte >> (V * (threadIdx.x % kThreadsPerMaskByte<V>));
  }
  __device__ bool writes_mask() const { return threadIdx.x % kThreadsPerMaskByte<V> == 0; }

  // The bin of the group of the thread's element v, its channel in the group.
  __device__ int bin(int v) const { return kRows ? first_bin_ : first_bin_ + v; }
  __device__ int channel(int v) const {
    if (!owns_ || (kSliced && !(own_ >> v & 1))) return 0;
    if (plan_.interleaved) return bin(v) % static_cast<int>(problem_.c);
    return plan_.bins_per_channel == 1 ? bin(v) : bin(v) / static_cast<int>(plan_.bins_per_channel);
  }

  // Sliced: elements before the slice's in its first item, or in the first byte of its mask, in a
  // row of the block. The same a step later.
  __device__ int before_slice(int row) const {
    const unsigned unit = V == 1 ? 1 : problem_.has_mask ? kMaskBits : V;
    const unsigned elements = static_cast<unsigned>(row - row_) * static_cast<unsigned>(problem_.c);
    return static_cast<int>((static_cast<unsigned>(before_) + elements) & (unit - 1));
  }

  // Of a channel of the group, in this block: how many values at most, how many, and where the
  // k-th of kPlaces is in the tensor.
  __device__ double most() const {
    return static_cast<double>(range_.count) * (kRows ? V : plan_.bins_per_channel);
  }
  __device__ double count(int64_t group, int channel) const {
    if constexpr (!kRagged) return most();
    const int64_t c = group * plan_.group + channel;
    const auto values_before = [&](int64_t row) {
      return row / plan_.row_items * problem_.hw + place_in_row(row, c, 0, problem_.hw);
    };
    return static_cast<double>(values_before(range_.first + range_.count) -
                               values_before(range_.first));
  }
  __device__ int64_t value_at(int64_t group, int channel, unsigned k) const {
    const int64_t row = range_.first + multiply_high(range_.count, place(k));
    const int64_t c = group * plan_.group + channel;
    if constexpr (kRows) {
      const int64_t at = place_in_row(row, c, multiply_high(V, fraction(k)), problem_.hw - 1);
      return (row / plan_.row_items * problem_.c + c) * problem_.hw + at;
    } else {
      const unsigned bins = static_cast<unsigned>(plan_.bins_per_channel);
      const int64_t first = kSliced ? row * problem_.c : row * plan_.row_items * V;
      const int64_t bin = multiply_high(bins, fraction(k));
      return first + (plan_.interleaved ? bin * problem_.c + c : c * bins + bin);
    }
  }

 private:
  static constexpr unsigned kAll = (1u << V) - 1;

  // Ragged: elements of other rows before the first of a channel's, in the first item or in those
  // that share the first byte of a mask; none where rows begin elsewhere in each sample.
  __device__ int before(int64_t channel) const {
    if constexpr (!kRagged) return 0;
    const int64_t unit = problem_.has_mask ? kMaskBits : V;
    return problem_.c * problem_.hw % unit ? 0 : static_cast<int>(channel * problem_.hw % unit);
  }
  // Of a row of the matrix: the place of its element v in the row of memory, within [0, most].
  __device__ int64_t place_in_row(int64_t row, int64_t channel, unsigned v, int64_t most) const {
    const int64_t place = row % plan_.row_items * V + v - before(channel);
    return place < 0 ? 0 : place < most ? place : most;
  }
  __device__ unsigned row_items() const { return static_cast<unsigned>(plan_.row_items); }
  // Rows: the place of the item among its channel's, laid end to end from the first sample's.
  __device__ unsigned index(int k) const { return first_ + static_cast<unsigned>(k) * step_; }
  __device__ unsigned sample(unsigned i) const {
    return multiply_high(i, plan_.magic) >> plan_.magic_shift;
  }
  __device__ unsigned offset_of(unsigned i) const {
    if constexpr (!kRows) return i;
    return sample(i) * jump_ + i;
  }

  const Problem& problem_;
  const CudaPlan& plan_;
  RowRange range_;
  int row_, full_, total_, first_bin_, before_ = 0;
  bool owns_, owns_rest_;
  unsigned own_ = kAll;
  unsigned first_, step_, jump_ = 0, mask_first_ = 0, mask_step_ = 0, last_ = 0;
  int64_t base_, mask_base_;
};

template <bool kIs>
using Checked = std::bool_constant<kIs>;
template <int kItems>
using Count = std::integral_constant<int, kItems>;

// f(k, how many items, which of them there are), last items first: what a reduction read last is
// still in the caches. What no tile holds comes by kRest at a time: one, or kTile. kOnce: there is
// one f, for it is much code. kMeets: threads meet in it, also those without items; else the thread
// has some.
template <int kTile, int kRest, bool kOnce, bool kMeets, class Items, class F>
__device__ inline void for_items(const Items& items, const F& f) {
  const int total = items.total(), full = items.full();
  const auto valid = [&](int k) { return k < total && items.valid(k); };
  if constexpr (kOnce && !kMeets) {
    const int last = items.valid(total - 1) ? total - 1 : total - 2;
#pragma unroll 1
    for (int k = last + 1 - kTile; k > -kTile; k -= kTile)
      f(k, Count<kTile>{}, [](int k) { return kTile == 1 || k >= 0; });
  } else {
    const int tiles = kOnce ? (total + kTile - 1) / kTile * kTile : full - full % kTile;
    if constexpr (!kOnce && kRest == kTile) {
      if (tiles < total) f(tiles, Count<kTile>{}, valid);
    } else if constexpr (!kOnce) {
#pragma unroll 1
      for (int k = total - 1; k >= tiles; --k) f(k, Count<1>{}, valid);
    }
#pragma unroll 1
    for (int k = tiles - kTile; k >= 0; k -= kTile)
      if constexpr (kOnce)
        f(k, Count<kTile>{}, valid);
      else
        f(k, Count<kTile>{}, [&](int) { return !kMeets || items.owns(); });
  }
}

}  // namespace bnext
