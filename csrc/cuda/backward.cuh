// The backward kernels.
//
//   resident  one launch, 3E: a team of blocks loads x and dy of a group of channels into its
//             shared memory, sums there, exchanges the sums, writes dx from shared memory.
//   reduce    5E, or 3E where the L2 keeps the group: sums of each block's rows to the workspace;
//   + apply   then every block joins its group's and writes its rows of dx.
//   reduce    frozen statistics with gradients of the parameters, 3E: dx does not depend on the
//   + finish  sums, so the reduction writes it.
//   apply     frozen statistics, dx alone.
#pragma once

#include "../activation.h"
#include "exchange.cuh"
#include "launch.h"
#include "slab.cuh"

namespace bnext {

using BackwardCall = Call<BackwardArgs>;

template <class C>
struct BackwardCoefficients {
  Affine<C> affine;  // the forward's
  InputGrad<C> grad;
};
static_assert(sizeof(BackwardCoefficients<float>) <= kCoefficients * sizeof(float) &&
              sizeof(BackwardCoefficients<double>) <= kCoefficients * sizeof(double));

__device__ inline bool is_frozen(const BackwardArgs& args) {
  return !args.save_stats;
}
__device__ inline double mean_of(const BackwardArgs& args, int64_t c) {
  return is_frozen(args) ? read(args.running_mean, c, 0) : args.save_stats[c];
}
__device__ inline double invstd_of(const BackwardCall& call, int64_t c) {
  const BackwardArgs& args = call.args;
  return is_frozen(args) ? inverse_std(read(args.running_var, c, 1), args.eps)
                         : args.save_stats[call.problem.c + c];
}

// Sets the coefficients that need no sums; with frozen statistics dx = a * dy. Ends with a barrier.
template <class C>
__device__ inline void set_coefficients(const BackwardCall& call, int64_t channel0, int channels,
                                        BackwardCoefficients<C>* coefficients) {
  const BackwardArgs& args = call.args;
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += call.plan.threads) {
    const int64_t c = channel0 + i;
    const double mean = mean_of(args, c), invstd = invstd_of(call, c);
    const double weight = read(args.weight, c, 1);
    coefficients[i] = {make_affine<C>(mean, invstd, weight, read(args.bias, c, 0)),
                       make_input_grad<C>(mean, invstd, weight, 0, 0)};
  }
  sync_block();
}

__device__ inline void write_param_grads(const BackwardCall& call, int64_t c,
                                         const GradSums& sums) {
  write(call.args.grad_weight, c, sums.dy_xmu * invstd_of(call, c));
  write(call.args.grad_bias, c, sums.dy);
}

template <class C>
__device__ inline InputGrad<C> input_grad_of(const BackwardCall& call, int64_t c,
                                             const GradSums& sums) {
  const double count = static_cast<double>(call.problem.count());
  return make_input_grad<C>(mean_of(call.args, c), invstd_of(call, c), read(call.args.weight, c, 1),
                            sums.dy / count, sums.dy_xmu / count);
}

// Both, from sums about the rounded mean. `writes`: only one block of a team writes to memory.
template <class C>
__device__ inline InputGrad<C> finish_backward(const BackwardCall& call, int64_t c, GradSums sums,
                                               bool writes) {
  const double mean = mean_of(call.args, c);
  sums.dy_xmu -= (mean - static_cast<double>(static_cast<C>(mean))) * sums.dy;
  if (writes) write_param_grads(call, c, sums);
  return input_grad_of<C>(call, c, sums);
}

// Items in registers at once: there are two operands.
template <class Source>
inline constexpr int kTileItems = Source::kItems / 2;

// Some of a thread's items in registers: x, and dy where the ReLU passed.
template <class T, int V, int kCount>
struct GradTile {
  static constexpr int kItems = kCount;
  Pack<T, V> x[kItems], dy[kItems];
  Item at[kItems];
  bool valid[kItems];
};

// Whether the ReLU let element v of an item pass: by the mask, or by the sign of z, computed from x
// as the forward did.
template <class C, class Items>
__device__ inline bool passes(const BackwardCall& call, const Items& items, const Item& item, int v,
                              const Affine<C>& affine, C x) {
  if (call.problem.act == Act::kNone) return true;
  if (!call.args.mask) return Activation<Act::kRelu>::passes(apply(affine, x));
  constexpr int V = Items::kElements;
  return own_mask_bits<V>(call.args.mask[items.mask_offset(item)]) >> v & 1;
}

// Loads the items k, k + direction, ... in [first, last), and zeroes dy where the ReLU blocked.
template <class T, int V, class Items, class Source>
__device__ inline void load_tile(const BackwardCall& call, const Items& items,
                                 const Affine<compute_t<T>> (&affine)[Items::kBins],
                                 const Source& x, const Source& dy, bool reads_x, Item& item, int k,
                                 int first, int last, int direction,
                                 GradTile<T, V, kTileItems<Source>>& tile) {
#pragma unroll
  for (int i = 0; i < tile.kItems; ++i) {
    const int j = k + direction * i;
    tile.at[i] = item;
    tile.valid[i] = j >= first && j < last && items.valid(item);
    if (tile.valid[i]) {
      const int64_t offset = items.offset(item);
      if (reads_x) tile.x[i] = x(j, offset);
      tile.dy[i] = dy(j, offset);
    }
    if (direction > 0)
      items.advance(item);
    else
      items.retreat(item);
  }
  if (call.problem.act == Act::kNone) return;
#pragma unroll
  for (int i = 0; i < tile.kItems; ++i)
    if (tile.valid[i]) {
#pragma unroll
      for (int v = 0; v < V; ++v)
        tile.dy[i].keep(
            v, passes(call, items, tile.at[i], v, affine[v % Items::kBins], tile.x[i].get(v)));
    }
}

// Sums what for_each() lists, in accumulators of type A; returns whether A was wide enough.
template <class A, class C, class ForEach>
__device__ inline bool sum_products(C mean, const ForEach& for_each, GradSums& sums) {
  A dy_sum = 0, dy_xmu_sum = 0;
  bool zero = true;
  for_each([&](C x, C dy) {
    const C xmu = x - mean;
    dy_sum += static_cast<A>(dy);
    dy_xmu_sum = fma(static_cast<A>(dy), static_cast<A>(xmu), dy_xmu_sum);
  });
  sums = {static_cast<double>(dy_sum), static_cast<double>(dy_xmu_sum)};
  if (fits_float(dy_xmu_sum)) return true;
  for_each([&](C x, C dy) { zero &= dy == 0 || x == mean; });
  return zero;
}

// Adds a tile to the sums of a thread's bins.
template <class T, int V, int kItems, int kBins>
__device__ inline void add_tile(ThreadGradSums<kBins>& sums, const GradTile<T, V, kItems>& tile,
                                const Affine<compute_t<T>> (&affine)[kBins]) {
  using C = compute_t<T>;
#pragma unroll
  for (int bin = 0; bin < kBins; ++bin) {
    GradSums tile_sums;
    const bool fits = sum_products<C>(
        affine[bin].mean,
        [&](const auto& f) {
#pragma unroll
          for (int i = 0; i < tile.kItems; ++i)
            if (tile.valid[i]) {
#pragma unroll
              for (int v = bin; v < V; v += kBins) f(tile.x[i].get(v), tile.dy[i].get(v));
            }
        },
        tile_sums);
    sums.unfit |= static_cast<unsigned>(!fits) << bin;
    sums.bins[bin] = join(sums.bins[bin], tile_sums);
  }
}

// Sums again, in double, the bins that did not fit in floats.
template <class T, int V, class Items, class Source>
__device__ inline void settle(const BackwardCall& call, const Items& items,
                              const Affine<compute_t<T>> (&affine)[Items::kBins], const Source& x,
                              const Source& dy, ThreadGradSums<Items::kBins>& sums) {
  using C = compute_t<T>;
  if constexpr (sizeof(C) < sizeof(double)) {
#pragma unroll
    for (int bin = 0; bin < Items::kBins; ++bin)
      if (sums.unfit >> bin & 1)
        sum_products<double>(
            affine[bin].mean,
            [&](const auto& f) {
              Item item = items.at(0);
#pragma unroll 1
              for (int k = 0; k < items.iterations(); ++k, items.advance(item)) {
                if (!items.valid(item)) continue;
                const int64_t offset = items.offset(item);
                const Pack<T, V> x_pack = x(k, offset), dy_pack = dy(k, offset);
#pragma unroll
                for (int v = bin; v < V; v += Items::kBins)
                  if (passes(call, items, item, v, affine[bin], x_pack.get(v)))
                    f(x_pack.get(v), dy_pack.get(v));
              }
            },
            sums.bins[bin]);
  }
}

// Stores dx and the residual's gradient of a tile. With frozen statistics dx does not depend on x,
// not even where x is inf or nan.
template <class T, int V, int kItems, class Items>
__device__ inline void store_tile(const BackwardCall& call, const Items& items,
                                  const InputGrad<compute_t<T>> (&grad)[Items::kBins],
                                  const GradTile<T, V, kItems>& tile) {
  using C = compute_t<T>;
  const BackwardArgs& args = call.args;
#pragma unroll
  for (int i = 0; i < tile.kItems; ++i)
    if (tile.valid[i]) {
      const int64_t offset = items.offset(tile.at[i]);
      if (args.grad_input) {
        Pack<T, V> dx;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const InputGrad<C>& g = grad[v % Items::kBins];
          const C dy = tile.dy[i].get(v);
          dx.set(v, is_frozen(args) ? g.a * dy : apply(g, dy, tile.x[i].get(v)));
        }
        store_streaming(reinterpret_cast<Pack<T, V>*>(static_cast<T*>(args.grad_input) + offset),
                        dx);
      }
      if (args.grad_residual)
        store_streaming(reinterpret_cast<Pack<T, V>*>(static_cast<T*>(args.grad_residual) + offset),
                        tile.dy[i]);
    }
}

// A thread's own copy of its bins' coefficients.
template <class C, int kBins>
struct BinCoefficients {
  Affine<C> affine[kBins];
  InputGrad<C> grad[kBins];

  template <class Items>
  __device__ BinCoefficients(const Items& items, const Problem& problem, int64_t channel0,
                             const BackwardCoefficients<C>* coefficients) {
#pragma unroll
    for (int bin = 0; bin < kBins; ++bin)
      if (items.channel(bin) < problem.c) {
        const BackwardCoefficients<C>& of_channel = coefficients[items.channel(bin) - channel0];
        affine[bin] = of_channel.affine;
        grad[bin] = of_channel.grad;
        grad[bin].mean = affine[bin].mean;  // equal already; now they share a register
      }
  }
};

// Adds items [first, last) of a thread to the sums of its bins. With kWritesFrozen and frozen
// statistics it also writes their dx.
template <class T, int V, bool kWritesFrozen, class Items, class Source>
__device__ inline void add_items(const BackwardCall& call, const Items& items,
                                 const BinCoefficients<compute_t<T>, Items::kBins>& bins, int first,
                                 int last, const Source& x, const Source& dy,
                                 ThreadGradSums<Items::kBins>& sums) {
  constexpr int kItems = kTileItems<Source>;
  Item item = items.at(first);
#pragma unroll 1
  for (int k = first; k < last; k += kItems) {
    GradTile<T, V, kItems> tile;
    load_tile(call, items, bins.affine, x, dy, true, item, k, first, last, 1, tile);
    add_tile(sums, tile, bins.affine);
    if constexpr (kWritesFrozen)
      if (is_frozen(call.args)) store_tile(call, items, bins.grad, tile);
  }
}

// dx of a thread's items, last items first: what a reduction read last is still in the caches.
template <class T, int V, class Items, class Source>
__device__ inline void apply_backward(const BackwardCall& call, const Items& items,
                                      const BinCoefficients<compute_t<T>, Items::kBins>& bins,
                                      const Source& x, const Source& dy) {
  if (!call.args.grad_input && !call.args.grad_residual) return;
  const bool recomputes = call.problem.act != Act::kNone && !call.args.mask;
  const bool reads_x = recomputes || !is_frozen(call.args);
  const int count = items.iterations();
  Item item = items.at(count - 1);
#pragma unroll 1
  for (int k = count - 1; k >= 0; k -= kTileItems<Source>) {
    GradTile<T, V, kTileItems<Source>> tile;
    load_tile(call, items, bins.affine, x, dy, reads_x, item, k, 0, count, -1, tile);
    store_tile(call, items, bins.grad, tile);
  }
}

template <class T, int V, IndexMap kMap>
__global__ void __launch_bounds__(max_cuda_threads(kMap, V), 1)
    batch_norm_resident_backward_kernel(const __grid_constant__ BackwardCall call) {
  using C = compute_t<T>;
  using Items = typename ItemsOf<kMap, V>::type;
  const CudaPlan& plan = call.plan;
  const int64_t slab_items = plan.items_per_thread * plan.threads;
  const SharedLayout shared = shared_layout(plan, 2 * slab_items * sizeof(Pack<T, V>));
  Pack<T, V>* const x_slab = reinterpret_cast<Pack<T, V>*>(shared.slabs);
  Pack<T, V>* const dy_slab = x_slab + slab_items;
  auto* const coefficients = static_cast<BackwardCoefficients<C>*>(shared.coefficients);
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  // All blocks take equally many turns: one without a group still has to meet the others.
  for (int64_t turn = 0; turn * plan.teams < plan.groups; ++turn) {
    const int64_t group = turn * plan.teams + team, channel0 = group * plan.group;
    const int channels = channels_of(call.problem, plan, group);
    const Items items(call.problem, plan, group, rank);
    const SharedSource<T, V> x{x_slab}, dy{dy_slab};
    set_coefficients(call, channel0, channels, coefficients);
    ThreadGradSums<Items::kBins> sums;
    {
      const BinCoefficients<C, Items::kBins> bins(items, call.problem, channel0, coefficients);
      load_and_reduce<T, V, 2>(
          items,
          {static_cast<const T*>(call.args.input), static_cast<const T*>(call.args.grad_out)},
          {x_slab, dy_slab}, [&](int first, int last) {
            add_items<T, V, false>(call, items, bins, first, last, x, dy, sums);
          });
      settle<T, V>(call, items, bins.affine, x, dy, sums);
    }
    join_threads<GradSums>(sums, items, plan, shared);
    exchange<GradSums>(plan, shared, call.workspace, channels, team, rank, turn,
                       [&](int channel, const GradSums& all) {
                         coefficients[channel].grad =
                             finish_backward<C>(call, channel0 + channel, all, rank == 0);
                       });
    const BinCoefficients<C, Items::kBins> bins(items, call.problem, channel0, coefficients);
    apply_backward<T, V>(call, items, bins, x, dy);
    sync_block();  // before the coefficients of the next turn
  }
}

template <class T, int V, IndexMap kMap>
__global__ void __launch_bounds__(max_cuda_threads(kMap, V), 1)
    batch_norm_reduce_backward_kernel(const __grid_constant__ BackwardCall call) {
  using C = compute_t<T>;
  using Items = typename ItemsOf<kMap, V>::type;
  const CudaPlan& plan = call.plan;
  const SharedLayout shared = shared_layout(plan, 0);
  auto* const coefficients = static_cast<BackwardCoefficients<C>*>(shared.coefficients);
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  const int64_t group = call.first_group + team, channel0 = group * plan.group;
  const int channels = channels_of(call.problem, plan, group);
  const Items items(call.problem, plan, group, rank);
  set_coefficients(call, channel0, channels, coefficients);
  const BinCoefficients<C, Items::kBins> bins(items, call.problem, channel0, coefficients);
  ThreadGradSums<Items::kBins> sums;
  const GlobalSource<T, V> x{static_cast<const T*>(call.args.input)};
  const GlobalSource<T, V> dy{static_cast<const T*>(call.args.grad_out)};
  add_items<T, V, true>(call, items, bins, 0, items.iterations(), x, dy, sums);
  settle<T, V>(call, items, bins.affine, x, dy, sums);
  join_threads<GradSums>(sums, items, plan, shared);
  publish<GradSums>(plan, shared, channels,
                    workspace_of<GradSums>(call.workspace, plan, team, rank));
}

template <class T, int V, IndexMap kMap>
__global__ void __launch_bounds__(max_cuda_threads(kMap, V), 1)
    batch_norm_apply_backward_kernel(const __grid_constant__ BackwardCall call) {
  using C = compute_t<T>;
  using Items = typename ItemsOf<kMap, V>::type;
  const CudaPlan& plan = call.plan;
  const SharedLayout shared = shared_layout(plan, 0);
  auto* const coefficients = static_cast<BackwardCoefficients<C>*>(shared.coefficients);
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  const int64_t group = call.first_group + team, channel0 = group * plan.group;
  const int channels = channels_of(call.problem, plan, group);
  set_coefficients(call, channel0, channels, coefficients);
  if (!is_frozen(call.args)) {
    join_published<GradSums>(
        plan, call.workspace, team, channels, [&](int channel, const GradSums& all) {
          coefficients[channel].grad = finish_backward<C>(call, channel0 + channel, all, rank == 0);
        });
    sync_block();
  }
  const Items items(call.problem, plan, group, rank);
  const BinCoefficients<C, Items::kBins> bins(items, call.problem, channel0, coefficients);
  apply_backward<T, V>(call, items, bins,
                       GlobalSource<T, V>{static_cast<const T*>(call.args.input)},
                       GlobalSource<T, V>{static_cast<const T*>(call.args.grad_out)});
}

// The parameters' gradients from the sums of a reduction; a block per group.
template <class T>
__global__ void __launch_bounds__(kMaxCudaThreads, 1)
    batch_norm_finish_backward_kernel(const __grid_constant__ BackwardCall call) {
  const CudaPlan& plan = call.plan;
  const int64_t group = call.first_group + blockIdx.x;
  join_published<GradSums>(plan, call.workspace, blockIdx.x, channels_of(call.problem, plan, group),
                           [&](int channel, const GradSums& all) {
                             finish_backward<compute_t<T>>(call, group * plan.group + channel, all,
                                                           true);
                           });
}

}  // namespace bnext
