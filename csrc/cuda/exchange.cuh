// Joins partial results of the threads of a block, then of the blocks of a team, always in the same
// order, so results are the same bit for bit. P is Moments<double> or GradSums.
#pragma once

#include "items.cuh"
#include "statistics.cuh"

namespace bnext {

static_assert(sizeof(Moments<double>) <= kPartialBytes && sizeof(GradSums) <= kPartialBytes);

// The dynamic shared memory of a block, as CudaPlan::shared_bytes counts it.
struct SharedLayout {
  unsigned char* slabs;  // resident: [operands][items_per_thread][threads] accesses
  void* scratch;         // [kJoinBins] partial results
  void* partials;        // [group_bins] partial results of this block
  void* coefficients;    // [group]
};

__device__ inline SharedLayout shared_layout(const CudaPlan& plan, int64_t slab_bytes) {
  const auto aligned = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  unsigned char* const base = shared_memory();
  unsigned char* const scratch = base + aligned(slab_bytes);
  unsigned char* const partials = scratch + aligned(kJoinBins * kPartialBytes);
  return {base, scratch, partials, partials + aligned(plan.group_bins() * kPartialBytes)};
}

// Joins the partial results of a block's threads and leaves them in partials[bin of the group].
// In each round as many threads of a bin give their sums away as the scratch memory holds.
template <class P, class Sums, class Items>
__device__ inline void join_threads(const Sums& thread_sums, const Items& items,
                                    const CudaPlan& plan, const SharedLayout& shared) {
  constexpr int kBins = Items::kBins;
  P sums[kBins];
#pragma unroll
  for (int v = 0; v < kBins; ++v) sums[v] = thread_sums.of(v);
  if constexpr (Items::kWholeWarps)
    for (int d = kWarpThreads / 2; d > 0; d /= 2) sums[0] = join(sums[0], shuffled(sums[0], d));
  P* const scratch = static_cast<P*>(shared.scratch);
  P* const partials = static_cast<P*>(shared.partials);
  const int row_bins = items.joining_bins(), bin = items.first_bin();
  const int place = items.joining_place(), scratch_rows = static_cast<int>(kJoinBins) / row_bins;
  for (int live = items.joining_threads(); live > 1;) {
    const int giving = live / 2 < scratch_rows ? live / 2 : scratch_rows, first = live - giving;
    if (items.joins() && place >= first && place < live)
      for (int v = 0; v < kBins; ++v) scratch[(place - first) * row_bins + bin + v] = sums[v];
    sync_block();
    if (items.joins() && place < giving)
      for (int v = 0; v < kBins; ++v) sums[v] = join(sums[v], scratch[place * row_bins + bin + v]);
    sync_block();
    live = first;
  }
  if (items.joins() && place == 0)
    for (int v = 0; v < kBins; ++v)
      if (bin + v < plan.group_bins()) partials[bin + v] = sums[v];
  sync_block();
}

// Calls finish(channel of the group, sum) for each channel, on one thread, with the join of
// get(channel, entry) over all entries.
template <class P, class Get, class Finish>
__device__ inline void join_entries(const CudaPlan& plan, int channels, int64_t entries,
                                    const Get& get, const Finish& finish) {
  int width = 1;  // threads of a channel
  while (width < entries && width < kWarpThreads) width *= 2;
  for (int base = 0; base < channels * width; base += plan.threads) {
    const int channel = (base + static_cast<int>(threadIdx.x)) / width;
    const int first = static_cast<int>(threadIdx.x) % width;
    P sum{};
    if (channel < channels)
      for (int e = first; e < entries; e += width) sum = join(sum, get(channel, e));
    for (int d = width / 2; d > 0; d /= 2) sum = join(sum, shuffled(sum, d));
    if (channel < channels && first == 0) finish(channel, sum);
  }
}

// join_entries over this block's bins of each channel.
template <class P, class Finish>
__device__ inline void join_bins(const CudaPlan& plan, const SharedLayout& shared, int channels,
                                 const Finish& finish) {
  const P* const partials = static_cast<const P*>(shared.partials);
  const int bins = static_cast<int>(plan.bins_per_channel);
  join_entries<P>(
      plan, channels, bins, [&](int channel, int bin) { return partials[channel * bins + bin]; },
      finish);
}

// This block's partial results by channel, in shared memory, for other blocks. Call it after
// join_threads. Ends with a barrier if it joined bins.
template <class P>
__device__ inline P* partials_of_channels(const CudaPlan& plan, const SharedLayout& shared,
                                          int channels) {
  if (plan.bins_per_channel == 1) return static_cast<P*>(shared.partials);
  P* const joined = static_cast<P*>(shared.scratch);
  join_bins<P>(plan, shared, channels, [&](int channel, const P& sum) { joined[channel] = sum; });
  sync_block();
  return joined;
}

// A block's partial results in the workspace.
template <class P>
__device__ inline P* workspace_of(void* workspace, const CudaPlan& plan, int64_t team,
                                  int64_t rank) {
  return reinterpret_cast<P*>(static_cast<unsigned char*>(workspace) +
                              (team * plan.team_blocks + rank) * plan.group * kPartialBytes);
}

// Copies this block's partial results to global memory.
template <class P>
__device__ inline void publish(const CudaPlan& plan, const SharedLayout& shared, int channels,
                               P* to) {
  const P* const partials = partials_of_channels<P>(plan, shared, channels);
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += plan.threads) to[i] = partials[i];
}

// Joins what all blocks of a team published.
template <class P, class Finish>
__device__ inline void join_published(const CudaPlan& plan, void* workspace, int64_t team,
                                      int channels, const Finish& finish) {
  join_entries<P>(
      plan, channels, plan.team_blocks,
      [&](int channel, int rank) { return workspace_of<P>(workspace, plan, team, rank)[channel]; },
      finish);
}

// Shows this block's partial results to its team and joins the team's for finish(). `turn` counts
// the exchanges of this launch. Ends with a barrier.
template <class P, class Finish>
__device__ inline void exchange(const CudaPlan& plan, const SharedLayout& shared, void* workspace,
                                int channels, int64_t team, int64_t rank, int64_t turn,
                                const Finish& finish) {
  if (plan.team == Team::kGrid) {
    // All blocks meet in every turn, so none still reads what this one wrote two turns ago.
    const int64_t slot = turn % 2 * plan.teams + team;
    publish<P>(plan, shared, channels, workspace_of<P>(workspace, plan, slot, rank));
    sync_grid();
    join_published<P>(plan, workspace, slot, channels, finish);
    sync_block();
  } else if (plan.team == Team::kCluster) {
    P* const own = partials_of_channels<P>(plan, shared, channels);
    sync_cluster();
    join_entries<P>(
        plan, channels, plan.team_blocks,
        [&](int channel, int from) { return in_block_of_cluster(own, from)[channel]; }, finish);
    sync_cluster();  // no block exits or overwrites its partials while another reads them
  } else {
    join_bins<P>(plan, shared, channels, finish);
    sync_block();
  }
}

}  // namespace bnext
