// Which elements a thread owns: the matrix of CudaPlan (plan.h) in device arithmetic.
//
//   rows (NCHW), group of 2 channels, 128 threads:     columns (channels_last), V = 4:
//        item 0   item 1  ...                               bins 0-3  bins 4-7  ...
//     row 0  t0      t1     t2 ...  } channel 0:         row 0   t0         t1
//     row 1  ...  t62  t63  t0 ...  } threads 0-63       row 1   t2         t3
//     row 0  t64     t65    ...     } channel 1
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

// The rows that a block of a team owns: [first, first + count).
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

// An item, by its row in the block's range and its place in that row.
struct Item {
  int row, place;
};

// Items of one channel, shared by plan.threads / plan.group adjacent threads (whole warps): thread
// t takes items t, t + threads, ... of the channel's rows laid end to end. A row's items are padded
// to whole mask bytes, so that neighbours in a byte are neighbouring threads.
template <int V>
class RowItems {
 public:
  static constexpr int kElements = V;
  static constexpr int kBins = 1;            // bins whose sums a thread keeps
  static constexpr bool kWholeWarps = true;  // the threads of a warp share them

  __device__ RowItems(const Problem& problem, const CudaPlan& plan, int64_t group, int64_t rank)
      : problem_(problem),
        plan_(plan),
        range_(rows_of(plan, rank)),
        threads_(plan.threads / static_cast<int>(plan.group)),
        per_row_(static_cast<int>(ceil_div(plan.segment_width, kMaskBits)) *
                 kThreadsPerMaskByte<V>),
        channel_(group * plan.group + threadIdx.x / threads_) {
    if (channel_ >= problem.c) range_.count = 0;
    step_ = {threads_ / per_row_, threads_ % per_row_};
  }

  // The same for all threads of a warp.
  __device__ int iterations() const {
    return static_cast<int>(ceil_div(static_cast<int64_t>(range_.count) * per_row_, threads_));
  }
  __device__ Item at(int k) const {
    const int64_t i = static_cast<int64_t>(k) * threads_ + threadIdx.x % threads_;
    return {static_cast<int>(i / per_row_), static_cast<int>(i % per_row_)};
  }
  __device__ void advance(Item& item) const {
    item.row += step_.row;
    item.place += step_.place;
    if (item.place >= per_row_) item.place -= per_row_, ++item.row;
  }
  __device__ void retreat(Item& item) const {
    item.row -= step_.row;
    item.place -= step_.place;
    if (item.place < 0) item.place += per_row_, --item.row;
  }
  __device__ bool valid(const Item& item) const {
    if (item.row >= range_.count) return false;
    const int64_t place = static_cast<int64_t>(item.place) * V;
    if (plan_.segments == 1) return place < problem_.hw;
    return place < plan_.segment_width && segment_start(item) + place < problem_.hw;
  }
  // Elements before the item in the tensor.
  __device__ int64_t offset(const Item& item) const {
    return row_of_memory(item) * problem_.hw + segment_start(item) +
           static_cast<int64_t>(item.place) * V;
  }
  // Bytes before the item's in the mask.
  __device__ int64_t mask_offset(const Item& item) const {
    return row_of_memory(item) * problem_.mask_row_bytes() +
           (segment_start(item) + static_cast<int64_t>(item.place) * V) / kMaskBits;
  }
  __device__ int64_t channel(int) const { return channel_; }

  // How a thread's sums join those of others: its first bin in the group, and its place among the
  // threads of that bin once each warp has joined its own.
  __device__ int first_bin() const { return threadIdx.x / threads_; }
  __device__ int joining_threads() const { return threads_ / kWarpThreads; }
  __device__ int joining_place() const { return threadIdx.x % threads_ / kWarpThreads; }
  __device__ int joining_bins() const { return static_cast<int>(plan_.group); }
  __device__ bool joins() const { return threadIdx.x % kWarpThreads == 0; }

 private:
  __device__ int64_t sample(const Item& item) const {
    return plan_.segments == 1 ? range_.first + item.row
                               : (range_.first + item.row) / plan_.segments;
  }
  __device__ int64_t segment_start(const Item& item) const {
    return plan_.segments == 1 ? 0
                               : (range_.first + item.row) % plan_.segments * plan_.segment_width;
  }
  __device__ int64_t row_of_memory(const Item& item) const {
    return sample(item) * problem_.c + channel_;
  }

  const Problem& problem_;
  const CudaPlan& plan_;
  RowRange range_;
  int threads_, per_row_;
  int64_t channel_;
  Item step_;
};

// Items of one column: V adjacent bins, down the rows. Threads left over from whole rows idle.
template <int V>
class ColumnItems {
 public:
  static constexpr int kElements = V;
  static constexpr int kBins = V;
  static constexpr bool kWholeWarps = false;

  __device__ ColumnItems(const Problem& problem, const CudaPlan& plan, int64_t group, int64_t rank)
      : problem_(problem),
        plan_(plan),
        range_(rows_of(plan, rank)),
        columns_(static_cast<int>(plan.columns)),
        bins_(problem.c * plan.bins_per_channel),
        bin_(group * plan.group_bins() + static_cast<int64_t>(threadIdx.x % columns_) * V) {
    if (group >= plan.groups) range_.count = 0;
  }

  __device__ int iterations() const {
    return static_cast<int>(ceil_div(range_.count, joining_threads()));
  }
  __device__ Item at(int k) const { return {k * joining_threads() + joining_place(), 0}; }
  __device__ void advance(Item& item) const { item.row += joining_threads(); }
  __device__ void retreat(Item& item) const { item.row -= joining_threads(); }
  __device__ bool valid(const Item& item) const { return item.row < range_.count && joins(); }
  __device__ int64_t offset(const Item& item) const {
    return (range_.first + item.row) * bins_ + bin_;
  }
  __device__ int64_t mask_offset(const Item& item) const {
    return (range_.first + item.row) * problem_.mask_row_bytes() + bin_ / kMaskBits;
  }
  __device__ int64_t channel(int bin) const {
    return plan_.bins_per_channel == 1 ? bin_ + bin : (bin_ + bin) / plan_.bins_per_channel;
  }

  __device__ int first_bin() const { return static_cast<int>(threadIdx.x) % columns_ * V; }
  __device__ int joining_threads() const { return plan_.threads / columns_; }
  __device__ int joining_place() const { return static_cast<int>(threadIdx.x) / columns_; }
  __device__ int joining_bins() const { return columns_ * V; }
  __device__ bool joins() const { return joining_place() < joining_threads() && bin_ < bins_; }

 private:
  const Problem& problem_;
  const CudaPlan& plan_;
  RowRange range_;
  int columns_;
  int64_t bins_, bin_;
};

template <IndexMap kMap, int V>
struct ItemsOf {
  using type = RowItems<V>;
};
template <int V>
struct ItemsOf<IndexMap::kColumns, V> {
  using type = ColumnItems<V>;
};

}  // namespace bnext
