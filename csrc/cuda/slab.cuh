// Where the elements of a thread's items are: in shared memory, or global.
//
// A slab is a thread's own store: slot k of each operand of a warp holds its threads' k-th items,
// so neighbours access neighbouring banks, a slot is an immediate of an access, and no barrier is
// needed between a thread's copy and its reading.
#pragma once

#include "sums.cuh"

namespace bnext {

template <class T, int V, int kOperands>
class Slab {
 public:
  static constexpr bool kShared = true;

  __device__ Slab(unsigned char* memory, const CudaPlan& plan)
      : own_(reinterpret_cast<Item<T, V>*>(memory) +
             threadIdx.x / kWarpThreads * static_cast<unsigned>(plan.items_per_thread) * kOperands *
                 kWarpThreads +
             threadIdx.x % kWarpThreads) {}

  __device__ Item<T, V>* slot(int k, int operand) const {
    return own_ + (k * kOperands + operand) * kWarpThreads;
  }
  // The k-th item of this thread.
  __device__ Item<T, V> operator()(int k, int operand, unsigned) const {
    return load(slot(k, operand));
  }
  __device__ compute_t<T> element(int k, int operand, unsigned, int v) const {
    return to_compute(reinterpret_cast<const T*>(slot(k, operand))[v]);
  }

 private:
  Item<T, V>* own_;
};

template <class T, int V, int kOperands>
struct Global {
  static constexpr bool kShared = false;

  const Item<T, V>* operands[kOperands];  // from Items::base() on

  __device__ Item<T, V> operator()(int, int operand, unsigned at) const {
    return load(operands[operand] + at);
  }
  __device__ compute_t<T> element(int, int operand, unsigned at, int v) const {
    return to_compute(reinterpret_cast<const T*>(operands[operand] + at)[v]);
  }
};

// A tensor's items from a thread's base on.
template <class T, int V, class Items>
__device__ inline const Item<T, V>* items_in(const void* tensor, const Items& items) {
  return opaque(static_cast<const Item<T, V>*>(tensor) + items.base());
}
template <class T, int V, class Items>
__device__ inline Item<T, V>* items_in(void* tensor, const Items& items) {
  return opaque(static_cast<Item<T, V>*>(tensor) + items.base());
}

// Stores an item at `to`, at ragged ends what is the thread's.
template <class Items, class T, int V>
__device__ inline void store_own(const Keep& keep, const Items& items, int k, Item<T, V>* to,
                                 const Item<T, V>& item) {
  const unsigned own = items.elements(k);
  if (own != (1u << V) - 1) return store_some(reinterpret_cast<T*>(to), item, own);
  keep.store(to, item);
}

// Batches that a slab is loaded in: the reduction of one runs while the next is on its way.
inline constexpr int kBatches = 2;

template <class Items>
__device__ inline int whole_tiles(const Items& items) {
  return items.full() - items.full() % kTile;
}
// Items of a batch, of whole tiles; what is left is a batch of its own.
template <class Items>
__device__ inline int batch_of(const Items& items) {
  return (whole_tiles(items) / kTile + kBatches - 1) / kBatches * kTile;
}

// Copies a thread's items of each operand into its slab.
template <class T, int V, int kOperands, class Items>
__device__ inline void copy_items(const Items& items, const Global<T, V, kOperands>& from,
                                  const Slab<T, V, kOperands>& slab) {
  constexpr int kBytes = static_cast<int>(sizeof(Item<T, V>));
  if (!items.owns()) return;
  const auto copy = [&](int k, auto count, auto checked) {
    if (checked && !items.valid(k)) return;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const unsigned at = items(k + i);
#pragma unroll
      for (int o = 0; o < kOperands; ++o) {
        if constexpr (kBytes >= 4)
          copy_async<kBytes>(slab.slot(k + i, o), from.operands[o] + at);
        else
          store(slab.slot(k + i, o), load(from.operands[o] + at));
      }
    }
  };
  const int tiles = whole_tiles(items), batch = batch_of(items);
  int k = 0;
#pragma unroll 1
  for (int b = 1; b <= kBatches; ++b) {
#pragma unroll 1
    for (const int end = b * batch < tiles ? b * batch : tiles; k < end; k += kTile)
      copy(k, Count<kTile>{}, Checked<false>{});
    commit_copies();
  }
#pragma unroll 1
  for (; k < items.total(); ++k) copy(k, Count<1>{}, Checked<true>{});
  commit_copies();
}

// sum_items over each batch once it is there.
template <bool kOnce, class Items, class Sums, class Add>
__device__ inline void sum_as_they_land(const Items& items, Sums& sums, const Add& add) {
  const int tiles = whole_tiles(items), batch = batch_of(items);
#pragma unroll 1
  for (int b = 0; b <= kBatches; ++b) {
    commit_copies();  // of nothing, so that those still pending are always as many
    wait_for_copies<kBatches + 1>();
    const int first = b * batch < tiles ? b * batch : tiles;
    const int next = first + batch < tiles ? first + batch : tiles;
    const bool is_last = b == kBatches;
    sum_items<kOnce>(items, is_last ? tiles : first, is_last ? items.total() : next, sums, add);
  }
}

}  // namespace bnext
