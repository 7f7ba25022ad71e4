// The forward kernels.
//
//   resident  one launch, 2E: a team of blocks loads a group of channels into its shared memory,
//             reduces it there, exchanges moments, normalises from shared memory.
//   reduce    3E, or 2E where the L2 keeps the group: moments of each block's rows to the
//   + apply   workspace; then every block joins its group's and normalises its rows.
//   apply     alone with frozen statistics, 2E.
#pragma once

#include "../activation.h"
#include "exchange.cuh"
#include "launch.h"
#include "slab.cuh"

namespace bnext {

using ForwardCall = Call<ForwardArgs>;

// The weight of this batch in the running statistics. For a cumulative average, an earlier launch
// has already counted it.
__device__ inline double averaging_factor(const ForwardArgs& args) {
  if (!args.cumulative) return args.momentum;
  return args.num_batches_tracked ? 1 / static_cast<double>(*args.num_batches_tracked) : 0;
}

__device__ inline void count_batch(const ForwardArgs& args) {
  if (blockIdx.x == 0 && threadIdx.x == 0 && args.num_batches_tracked && !args.cumulative)
    ++*args.num_batches_tracked;
}

// What outlives the call.
__device__ inline void save_statistics(const ForwardCall& call, int64_t c, double mean,
                                       double invstd) {
  call.args.save_stats[c] = mean;
  call.args.save_stats[call.problem.c + c] = invstd;
  call.args.save_stats[2 * call.problem.c + c] = 0;
}
__device__ inline void update_running(const ForwardArgs& args, int64_t c,
                                      const Moments<double>& m) {
  const double factor = averaging_factor(args);
  const auto update = [&](ParamOut running, double value) {
    if (!running) return;
    const double old = read(ParamIn{running.data, running.stride, running.dtype}, c, 0);
    write(running, c, (1 - factor) * old + factor * value);
  };
  update(args.running_mean, m.mean);
  update(args.running_var, m.m2 / (m.count - 1));  // unbiased
}

template <class C>
__device__ inline Affine<C> affine_of(const ForwardArgs& args, int64_t c, double mean,
                                      double invstd) {
  return make_affine<C>(mean, invstd, read(args.weight, c, 1), read(args.bias, c, 0));
}

// All of these. `writes`: only one block of a team writes to global memory.
template <class C>
__device__ inline Affine<C> finish_forward(const ForwardCall& call, int64_t c,
                                           const Moments<double>& m, bool writes) {
  const double invstd = inverse_std(m.m2 / m.count, call.args.eps);
  if (writes) {
    save_statistics(call, c, m.mean, invstd);
    update_running(call.args, c, m);
  }
  return affine_of<C>(call.args, c, m.mean, invstd);
}

// y = act(x * scale + shift + residual) of a thread's items, last items first: what a reduction
// read last is still in the caches.
template <class T, int V, class Items, class Source>
__device__ inline void apply_forward(const ForwardCall& call, const Items& items,
                                     const Affine<compute_t<T>>* coefficients, int64_t channel0,
                                     const Source& source) {
  using C = compute_t<T>;
  const ForwardArgs& args = call.args;
  const T* const residual = static_cast<const T*>(args.residual);
  Affine<C> affine[Items::kBins];
#pragma unroll
  for (int bin = 0; bin < Items::kBins; ++bin)
    if (items.channel(bin) < call.problem.c)
      affine[bin] = coefficients[items.channel(bin) - channel0];
  constexpr int kItems = Source::kItems;
  Item item = items.at(items.iterations() - 1);
#pragma unroll 1
  for (int k = items.iterations() - 1; k >= 0; k -= kItems) {
    Pack<T, V> x[kItems], z[kItems];
    Item at[kItems];
    bool valid[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      at[i] = item;
      valid[i] = k >= i && items.valid(item);
      if (valid[i]) {
        const int64_t offset = items.offset(item);
        x[i] = source(k - i, offset);
        if (residual) z[i] = load_streaming(reinterpret_cast<const Pack<T, V>*>(residual + offset));
      }
      items.retreat(item);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      unsigned bits = 0;
      if (valid[i]) {
        Pack<T, V> y;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          C value = apply(affine[v % Items::kBins], x[i].get(v));
          if (residual) value = value + z[i].get(v);
          if (call.problem.act == Act::kRelu) {
            const bool passed = Activation<Act::kRelu>::passes(value);
            bits |= static_cast<unsigned>(passed) << v;
            value = Activation<Act::kRelu>::f(value, value);
          }
          y.set(v, value);
        }
        store_streaming(
            reinterpret_cast<Pack<T, V>*>(static_cast<T*>(args.output) + items.offset(at[i])), y);
      }
      if (args.mask) {
        bits = join_mask_bits<V>(bits);
        if (valid[i] && threadIdx.x % kThreadsPerMaskByte<V> == 0)
          args.mask[items.mask_offset(at[i])] = static_cast<uint8_t>(bits);
      }
    }
  }
}

// Adds items [first, last) of a thread to the moments of its bins.
template <class T, int V, class Items, class Source>
__device__ inline void add_items(const Items& items, int first, int last, const Source& source,
                                 ThreadMoments<Items::kBins>& sums) {
  constexpr int kItems = 2 * Source::kItems;
  Item item = items.at(first);
#pragma unroll 1
  for (int k = first; k < last; k += kItems) {
    Tile<T, V, kItems> tile;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      tile.valid[i] = k + i < last && items.valid(item);
      if (tile.valid[i]) tile.x[i] = source(k + i, items.offset(item));
      items.advance(item);
    }
    add_tile(sums, tile);
  }
}

// Sums again, in double, the bins that did not fit in floats.
template <class T, int V, class Items, class Source>
__device__ inline void settle(const Items& items, const Source& source,
                              ThreadMoments<Items::kBins>& sums) {
  if constexpr (sizeof(compute_t<T>) < sizeof(double)) {
#pragma unroll
    for (int bin = 0; bin < Items::kBins; ++bin)
      if (sums.unfit >> bin & 1) {
        bool fits;
        const Moments<double> m = two_pass<double>(
            static_cast<int>(sums.count),
            [&](const auto& f) {
              Item item = items.at(0);
#pragma unroll 1
              for (int k = 0; k < items.iterations(); ++k, items.advance(item)) {
                if (!items.valid(item)) continue;
                const Pack<T, V> x = source(k, items.offset(item));
#pragma unroll
                for (int v = bin; v < V; v += Items::kBins) f(x.get(v));
              }
            },
            fits);
        sums.mean[bin] = m.mean;
        sums.m2[bin] = m.m2;
      }
  }
}

template <class T, int V, IndexMap kMap>
__global__ void __launch_bounds__(max_cuda_threads(kMap, V), 1)
    batch_norm_resident_forward_kernel(const __grid_constant__ ForwardCall call) {
  using C = compute_t<T>;
  using Items = typename ItemsOf<kMap, V>::type;
  const CudaPlan& plan = call.plan;
  const SharedLayout shared =
      shared_layout(plan, plan.items_per_thread * plan.threads * sizeof(Pack<T, V>));
  Pack<T, V>* const slab = reinterpret_cast<Pack<T, V>*>(shared.slabs);
  auto* const coefficients = static_cast<Affine<C>*>(shared.coefficients);
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  count_batch(call.args);
  // All blocks take equally many turns: one without a group still has to meet the others.
  for (int64_t turn = 0; turn * plan.teams < plan.groups; ++turn) {
    const int64_t group = turn * plan.teams + team, channel0 = group * plan.group;
    const Items items(call.problem, plan, group, rank);
    ThreadMoments<Items::kBins> sums;
    const SharedSource<T, V> source{slab};
    load_and_reduce<T, V, 1>(
        items, {static_cast<const T*>(call.args.input)}, {slab},
        [&](int first, int last) { add_items<T, V>(items, first, last, source, sums); });
    settle<T, V>(items, source, sums);
    join_threads<Moments<double>>(sums, items, plan, shared);
    exchange<Moments<double>>(plan, shared, call.workspace, channels_of(call.problem, plan, group),
                              team, rank, turn, [&](int channel, const Moments<double>& m) {
                                coefficients[channel] =
                                    finish_forward<C>(call, channel0 + channel, m, rank == 0);
                              });
    // join_threads has barriers before the next turn writes its coefficients.
    apply_forward<T, V>(call, items, coefficients, channel0, source);
  }
}

template <class T, int V, IndexMap kMap>
__global__ void __launch_bounds__(max_cuda_threads(kMap, V), 1)
    batch_norm_reduce_forward_kernel(const __grid_constant__ ForwardCall call) {
  using Items = typename ItemsOf<kMap, V>::type;
  const CudaPlan& plan = call.plan;
  const SharedLayout shared = shared_layout(plan, 0);
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  if (call.first_group == 0) count_batch(call.args);
  const int64_t group = call.first_group + team;
  const Items items(call.problem, plan, group, rank);
  ThreadMoments<Items::kBins> sums;
  const GlobalSource<T, V> source{static_cast<const T*>(call.args.input)};
  add_items<T, V>(items, 0, items.iterations(), source, sums);
  settle<T, V>(items, source, sums);
  join_threads<Moments<double>>(sums, items, plan, shared);
  publish<Moments<double>>(plan, shared, channels_of(call.problem, plan, group),
                           workspace_of<Moments<double>>(call.workspace, plan, team, rank));
}

template <class T, int V, IndexMap kMap>
__global__ void __launch_bounds__(max_cuda_threads(kMap, V), 1)
    batch_norm_apply_forward_kernel(const __grid_constant__ ForwardCall call) {
  using C = compute_t<T>;
  using Items = typename ItemsOf<kMap, V>::type;
  const CudaPlan& plan = call.plan;
  const ForwardArgs& args = call.args;
  const SharedLayout shared = shared_layout(plan, 0);
  auto* const coefficients = static_cast<Affine<C>*>(shared.coefficients);
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  const int64_t group = call.first_group + team, channel0 = group * plan.group;
  const int channels = channels_of(call.problem, plan, group);
  if (is_training(call.problem.stage)) {
    join_published<Moments<double>>(
        plan, call.workspace, team, channels, [&](int channel, const Moments<double>& m) {
          coefficients[channel] = finish_forward<C>(call, channel0 + channel, m, rank == 0);
        });
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < channels; i += plan.threads) {
      const int64_t c = channel0 + i;
      coefficients[i] = affine_of<C>(args, c, read(args.frozen_mean, c, 0),
                                     inverse_std(read(args.frozen_var, c, 1), args.eps));
    }
  }
  sync_block();
  const Items items(call.problem, plan, group, rank);
  apply_forward<T, V>(call, items, coefficients, channel0,
                      GlobalSource<T, V>{static_cast<const T*>(args.input)});
}

}  // namespace bnext
