// Where the elements of a thread's items are: in global memory, or in a slab of shared memory. Slot
// k of thread t holds its k-th item, so adjacent threads access adjacent banks, and a thread needs
// no barrier to read what it copied.
#pragma once

#include "items.cuh"

namespace bnext {

template <class T, int V>
struct SharedSource {
  // Items in registers at once. Few will do: shared memory has low latency.
  static constexpr int kItems = sizeof(Pack<T, V>) >= 16 ? 2 : 4;

  const Pack<T, V>* slab;
  // The k-th item of this thread, `offset` elements into the tensor.
  __device__ const Pack<T, V>& operator()(int k, int64_t) const {
    return slab[k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)];
  }
};

template <class T, int V>
struct GlobalSource {
  // Enough to keep memory busy.
  static constexpr int kItems = sizeof(Pack<T, V>) >= 16 ? 4 : 8;

  const T* data;
  __device__ const Pack<T, V>& operator()(int, int64_t offset) const {
    return *reinterpret_cast<const Pack<T, V>*>(data + offset);
  }
};

// A slab is loaded in this many batches: one is reduced while the next are on their way.
inline constexpr int kBatches = 4;

// Copies a thread's items of each operand into its slab, and calls reduce(first, last) for ranges
// of them as they arrive.
template <class T, int V, int kOperands, class Items, class Reduce>
__device__ inline void load_and_reduce(const Items& items, const T* const (&operands)[kOperands],
                                       Pack<T, V>* const (&slabs)[kOperands],
                                       const Reduce& reduce) {
  constexpr int kBytes = static_cast<int>(sizeof(Pack<T, V>));
  const int count = items.iterations(), stride = static_cast<int>(blockDim.x);
  const int batch = (count + kBatches - 1) / kBatches;
  Item item = items.at(0);
#pragma unroll 1
  for (int b = 0; b < kBatches; ++b) {
#pragma unroll 1
    for (int k = b * batch; k < count && k < (b + 1) * batch; ++k) {
      if (items.valid(item)) {
        const int64_t offset = items.offset(item);
        const int slot = k * stride + static_cast<int>(threadIdx.x);
#pragma unroll
        for (int o = 0; o < kOperands; ++o) {
          if constexpr (kBytes >= 4)
            copy_async<kBytes>(slabs[o] + slot, operands[o] + offset);
          else
            slabs[o][slot] = *reinterpret_cast<const Pack<T, V>*>(operands[o] + offset);
        }
      }
      items.advance(item);
    }
    commit_copies();
  }
  static_assert(kBatches == 4, "one wait for each");
#pragma unroll 1
  for (int b = 0; b < kBatches; ++b) {
    if (b == 0) wait_for_copies<3>();
    if (b == 1) wait_for_copies<2>();
    if (b == 2) wait_for_copies<1>();
    if (b == 3) wait_for_copies<0>();
    const int first = b * batch, last = first + batch;
    if (first < count) reduce(first, last < count ? last : count);
  }
}

}  // namespace bnext
