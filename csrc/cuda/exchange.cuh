// How partial results meet: threads of a block, then blocks of a team, always in the same order, so
// that results are the same bit for bit. All of it is one reduction, join_entries().
#pragma once

#include "../formulas.h"
#include "slab.cuh"

namespace bnext {

// What a block tells of a channel's values.
struct Moments {
  double count, pilot, delta, m2;  // of them; a value; their mean less that; squares about the mean
};
static_assert(sizeof(Moments) <= kPartialBytes && sizeof(GradSums) <= kPartialBytes);

struct Pair {
  double a = 0, b = 0;
};

// What becomes of a channel's sums: coefficients, aligned for the widest access. Sums lie before
// them.
template <class C>
struct alignas(16) Quad {
  C x, y, z, w;
};
static_assert(sizeof(Quad<double>) <= kResultBytes && kSumBytes % alignof(Quad<double>) == 0);

// The dynamic shared memory of a block, as CudaPlan::shared_bytes counts it.
struct SharedLayout {
  unsigned char* slabs;  // resident: [warps][items_per_thread][operands][32] items
  double* scratch;       // [warps][columns of a warp][bins of a column][2]
  void* partials;        // [group] of this block
  double* records;       // [group][4]: what is kept of a channel besides coefficients
  void* results;         // [group] of Quad
  void* prepared;        // [group], backward: coefficients that need no sums

  template <class C>
  __device__ Quad<C>* quads() const {
    return static_cast<Quad<C>*>(results);
  }
};

__device__ inline SharedLayout shared_layout(const CudaPlan& plan) {
  unsigned char* const base = shared_memory();
  unsigned char* const scratch = base + plan.slab_bytes;
  unsigned char* const partials = scratch + plan.scratch_bytes();
  unsigned char* const records = partials + plan.group * kPartialBytes;
  unsigned char* const results = records + plan.group * kRecordBytes;
  return {base,    reinterpret_cast<double*>(scratch), partials, reinterpret_cast<double*>(records),
          results, results + plan.group * kResultBytes};
}

// Calls finish(channel, sums) for each channel, on one thread, with the sums of what
// add(sums, channel, entry) adds for each entry.
template <class Add, class Finish>
__device__ inline void join_entries(const CudaPlan& plan, int channels, int entries, const Add& add,
                                    const Finish& finish) {
  int width = 1;  // threads of a channel
  while (width < entries && width < kWarpThreads) width *= 2;
#pragma unroll 1
  for (int base = 0; base < channels * width; base += plan.threads) {
    const int channel = (base + static_cast<int>(threadIdx.x)) >> log2_of(width);
    const int first = static_cast<int>(threadIdx.x) & (width - 1);
    Pair sums;
    if (channel < channels)
#pragma unroll 2
      for (int e = first; e < entries; e += width) add(sums, channel, e);
#pragma unroll 1
    for (int d = width / 2; d > 0; d /= 2) {
      sums.a += shuffle_xor(sums.a, d);
      sums.b += shuffle_xor(sums.b, d);
    }
    if (channel < channels && first == 0) finish(channel, sums);
  }
}

// Rounds in which threads of a warp with the same column halve what each holds of their sums, and
// then store what they kept. `at`: where it goes.
template <int kValues>
__device__ inline void halve(const double (&values)[kValues], int d, int columns, double* at) {
  if constexpr (kValues > 1) {
    if (d >= columns) {
      const bool upper = threadIdx.x & d;
      double half[kValues / 2];
#pragma unroll
      for (int i = 0; i < kValues / 2; ++i) {
        const double gives = upper ? values[i] : values[i + kValues / 2];
        half[i] = (upper ? values[i + kValues / 2] : values[i]) + shuffle_xor(gives, d);
      }
      halve(half, d / 2, columns, at + (upper ? kValues / 2 : 0));
      return;
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) at[i] = values[i];
  } else {
    double value = values[0];
    const bool stores = (threadIdx.x & (2 * d - 1) & ~(columns - 1)) == 0;
#pragma unroll 1
    for (; d >= columns; d /= 2) value += shuffle_xor(value, d);
    if (stores) at[0] = value;
  }
}

// Joins the sums of a block's threads and calls finish(channel of the group, sums) for each
// channel.
template <class Items, class C, int kBins, class Finish>
__device__ inline void join_threads(const Items& items, const Sums<C, kBins>& sums,
                                    const CudaPlan& plan, const SharedLayout& shared, int channels,
                                    const Finish& finish) {
  const int columns = kWarpThreads / plan.warp_rows, warps = plan.threads / kWarpThreads;
  const int warp = threadIdx.x / kWarpThreads, column = threadIdx.x & (columns - 1);
  double values[2 * kBins];
#pragma unroll
  for (int v = 0; v < kBins; ++v) {
    values[2 * v] = sums.total_a[v];  // of a thread that owns nothing, zeros
    values[2 * v + 1] = sums.total_b[v];
  }
  const int warp_values = columns * 2 * kBins, log_values = log2_of(warp_values);
  halve(values, kWarpThreads / 2, columns,
        shared.scratch + warp * warp_values + column * 2 * kBins);
  sync_block();
  // An entry is a bin of a warp; those of a set of columns are every warp_sets-th.
  const int bins = static_cast<int>(plan.bins_per_channel), sets = plan.warp_sets;
  join_entries(
      plan, channels, bins * (warps / sets),
      [&](Pair& to, int channel, int entry) {
        int bin = channel, warp_of_set = entry;
        if (bins > 1) {
          const int of_channel = entry % bins;
          bin = plan.interleaved ? of_channel * channels + channel : channel * bins + of_channel;
          warp_of_set = entry / bins;
        }
        if constexpr (Items::kSliced) bin += items.before_slice(warp_of_set);
        const int set = bin * 2 >> log_values, place = bin * 2 & (warp_values - 1);
        const double* const from =
            shared.scratch + ((warp_of_set * sets + set) << log_values) + place;
        to.a += from[0];
        to.b += from[1];
      },
      finish);
}

// Joins the sums of a block's threads to partials of its channels, by partial(channel, sums, again,
// fits): `fits` becomes false where floats were no good, and then all is summed once more by
// sum_again(), and those channels take that. `unfit`: [group]. Ends with a barrier.
template <class P, class Items, class Sums, class SumAgain, class Partial>
__device__ inline void settle(const Items& items, const Sums& sums, const CudaPlan& plan,
                              const SharedLayout& shared, int channels, void* unfit,
                              const SumAgain& sum_again, const Partial& partial) {
  P* const partials = static_cast<P*>(shared.partials);
  bool* const is_unfit = static_cast<bool*>(unfit);
  // A loop, so that joining is compiled once.
#pragma unroll 1
  for (bool again = false;; again = true) {
    bool any = false;
    join_threads(items, sums, plan, shared, channels, [&](int channel, const Pair& sum) {
      bool fits = true;
      if (again && !is_unfit[channel]) return;
      const P found = partial(channel, sum, again, fits);
      partials[channel] = found;
      is_unfit[channel] = !fits;
      any = any || !fits;
    });
    if (!any_of_block(any) || again) return;
    sum_again();
  }
}

// Where the partial results of a block of a team lie in the workspace, and the results of a team.
template <class P>
__device__ inline P* workspace_of(void* workspace, const CudaPlan& plan, int64_t team,
                                  int64_t rank) {
  return reinterpret_cast<P*>(static_cast<unsigned char*>(workspace) +
                              (team * plan.team_blocks + rank) * plan.group * kPartialBytes);
}
template <class R>
__device__ inline R* results_of(void* workspace, const CudaPlan& plan, int64_t team) {
  return reinterpret_cast<R*>(static_cast<unsigned char*>(workspace) +
                              plan.teams * plan.team_blocks * plan.group * kPartialBytes +
                              team * plan.group * kResultBytes);
}

// Copies this block's partial results to global memory.
template <class P>
__device__ inline void publish(const CudaPlan& plan, const SharedLayout& shared, int channels,
                               P* to) {
  const P* const partials = static_cast<const P*>(shared.partials);
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += plan.threads) to[i] = partials[i];
}

// Joins what all blocks of a team published: add(sums, partial, the first block's partial).
template <class P, class Add, class Finish>
__device__ inline void join_published(const CudaPlan& plan, void* workspace, int64_t team,
                                      int channels, const Add& add, const Finish& finish) {
  join_entries(
      plan, channels, static_cast<int>(plan.team_blocks),
      [&](Pair& sums, int channel, int rank) {
        add(sums, workspace_of<P>(workspace, plan, team, rank)[channel],
            workspace_of<P>(workspace, plan, team, 0)[channel]);
      },
      [&](int channel, const Pair& sums) {
        finish(channel, sums, workspace_of<P>(workspace, plan, team, 0)[channel]);
      });
}

// Whether a block of a team finishes a channel for others, or for all.
__device__ inline bool finishes(const CudaPlan& plan, int64_t rank, int channel) {
  return plan.team == Team::kGrid ? channel % plan.team_blocks == rank : rank == 0;
}

// Joins the partial results of a team's blocks, and leaves finish(channel, sums, the first block's
// partial) in quads() of each. Ends with a barrier of the block, in a cluster with an arrival at
// the cluster's: wait_for_team() comes before this block leaves or writes its partials again.
template <class P, class C, class Add, class Finish>
__device__ inline void exchange(const CudaPlan& plan, const SharedLayout& shared, void* workspace,
                                int channels, int64_t team, int64_t rank, const Add& add,
                                const Finish& finish) {
  Quad<C>* const results = shared.quads<C>();
  P* const own = static_cast<P*>(shared.partials);
  const int blocks = static_cast<int>(plan.team_blocks);
  if (plan.team == Team::kGrid) {
    // The blocks share out the channels, and read what the others made of theirs.
    publish<P>(plan, shared, channels, workspace_of<P>(workspace, plan, team, rank));
    sync_grid();
    Quad<C>* const done = results_of<Quad<C>>(workspace, plan, team);
    const int first = static_cast<int>(rank);
    const int mine = first < channels ? (channels - first + blocks - 1) / blocks : 0;
    join_entries(
        plan, mine, blocks,
        [&](Pair& sums, int i, int from) {
          const int channel = first + i * blocks;
          add(sums, workspace_of<P>(workspace, plan, team, from)[channel],
              workspace_of<P>(workspace, plan, team, 0)[channel]);
        },
        [&](int i, const Pair& sums) {
          const int channel = first + i * blocks;
          done[channel] = finish(channel, sums, workspace_of<P>(workspace, plan, team, 0)[channel]);
        });
    sync_grid();
    for (int i = static_cast<int>(threadIdx.x); i < channels; i += plan.threads)
      results[i] = done[i];
  } else {
    const bool is_cluster = plan.team == Team::kCluster;
    if (is_cluster) sync_cluster();
    const auto of = [&](int from) { return is_cluster ? in_block_of_cluster(own, from) : own; };
    join_entries(
        plan, channels, blocks,
        [&](Pair& sums, int channel, int from) { add(sums, of(from)[channel], of(0)[channel]); },
        [&](int channel, const Pair& sums) {
          results[channel] = finish(channel, sums, of(0)[channel]);
        });
    if (is_cluster) arrive_cluster();
  }
  sync_block();
}

__device__ inline void wait_for_team(const CudaPlan& plan) {
  if (plan.team == Team::kCluster) wait_cluster();
}

}  // namespace bnext
