// The forward kernels.
//
//   resident  one launch, 2E: a team of blocks loads a group of channels into its shared memory,
//             reduces it there, exchanges moments, normalises from shared memory.
//   reduce    3E, or 2E where the L2 keeps the group: moments of each block's rows to the
//   + apply   workspace; then every block joins its group's and normalises its rows.
//   apply     alone with given statistics, 2E.
//   reduce    moments alone, E.
//   + finish
//
// Each block sums about a pilot of its own, the mean of some of its values, so that sums of squares
// do not cancel (Chan, Golub & LeVeque 1983), and whether they did is for it alone to tell.
#pragma once

#include "activation.cuh"
#include "exchange.cuh"
#include "launch.h"

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

// The statistics of a channel: the mean in two doubles, 1 / std, the sum of squares about the mean.
struct Statistics {
  double mean, low, invstd, m2;
};
static_assert(sizeof(Statistics) <= kRecordBytes);

__device__ inline Statistics statistics_of(const ForwardCall& call, const Pair& sums,
                                           const Moments& first) {
  const double count = static_cast<double>(call.problem.count());
  const double delta = sums.a / count, difference = sums.b - sums.a * delta;
  const double m2 = difference < 0 ? 0 : difference;  // NaN stays
  const double mean = first.pilot + delta, rounded = mean - first.pilot;
  const double low = first.pilot - (mean - rounded) + (delta - rounded);
  return {mean, low - low == 0 ? low : 0, inverse_std(m2 / count, call.args.eps), m2};
}

// Adds a block's moments to sums about the first block's pilot.
__device__ inline void add_moments(Pair& sums, const Moments& m, const Moments& first) {
  if (m.count == 0) return;
  const double shift = m.pilot - first.pilot + m.delta;
  sums.a = fma(m.count, shift, sums.a);
  sums.b += fma(m.count * shift, shift, m.m2);
}

// Writes what outlives the call, of the channels that this block finished.
__device__ inline void write_statistics(const ForwardCall& call, const SharedLayout& shared,
                                        int64_t channel0, int channels, int64_t rank) {
  const ForwardArgs& args = call.args;
  const double factor = averaging_factor(args);
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += call.plan.threads) {
    if (!finishes(call.plan, rank, i)) continue;
    const Statistics& s = reinterpret_cast<const Statistics*>(shared.records)[i];
    const int64_t c = channel0 + i;
    const auto save = [&](double* to, double second) {
      if (to) to[c] = s.mean, to[call.problem.c + c] = second, to[2 * call.problem.c + c] = s.low;
    };
    save(args.moments, s.m2);
    save(args.save_stats, s.invstd);
    move_running(args.running_mean, c, factor, s.mean);
    move_running(args.running_var, c, factor,
                 s.m2 / (static_cast<double>(call.problem.count()) - 1));
  }
}

template <class C>
__device__ inline Quad<C> quad_of(const Affine<C>& a) {
  return {a.mean, a.scale, a.shift, 0};
}

// Pilots, weights and biases of a group, before its sums: what the loads of each cost is over when
// those arrive. A warp takes a channel, a thread a place. Ends with a barrier.
template <class T, class Items>
__device__ inline void find_pilots(const ForwardCall& call, const Items& items, int64_t group,
                                   int channels, Quad<compute_t<T>>* quads) {
  using C = compute_t<T>;
  const T* const x = static_cast<const T*>(call.args.input);
  const int warps = call.plan.threads / kWarpThreads;
  const unsigned lane = threadIdx.x % kWarpThreads;
  static_assert(kPlaces == kWarpThreads);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / kWarpThreads; i < channels; i += warps) {
    C sum = items.total() > 0 ? to_compute(x[items.value_at(group, i, lane)]) : C(0);
    sum *= C(1. / kPlaces);
    for (int d = kWarpThreads / 2; d > 0; d /= 2) sum += shuffle_xor(sum, d);
    // It stands in an item for the elements of other rows.
    if constexpr (Items::kRagged) sum = to_compute(from_compute<T>(sum));
    const int64_t c = group * call.plan.group + i;
    if (lane == 0)
      quads[i] = {sum - sum == 0 ? sum : C(0), static_cast<C>(read(call.args.weight, c, 1)),
                  static_cast<C>(read(call.args.bias, c, 0)), 0};
  }
  sync_block();
}

// Moments of this block's values of each channel of the group, in shared.partials. `sum`: calls its
// argument, which adds items to the sums, for all of them.
template <class T, int V, class Items, class Source, class Sum>
__device__ inline void reduce_forward(const ForwardCall& call, const Items& items, int64_t group,
                                      int channels, const SharedLayout& shared,
                                      const Source& source, const Sum& sum) {
  using C = compute_t<T>;
  constexpr int kBins = Items::kBins;
  C minus_pilot[Items::kLanes], pilot[V];
#pragma unroll
  for (int v = 0; v < V; ++v) pilot[v] = shared.quads<C>()[items.channel(v % kBins)].x;
#pragma unroll
  for (int v = 0; v < Items::kLanes; ++v) minus_pilot[v] = -pilot[v];
  const Item<T, V> pilots = Item<T, V>::pack(pilot);
  Sums<C, kBins> sums;
  sum(sums, [&](int k, auto count) {
    Item<T, V> item[count];
    C a[V], b[V];
#pragma unroll
    for (int i = 0; i < count; ++i) item[i] = source(k + i, 0, Source::kShared ? 0 : items(k + i));
#pragma unroll
    for (int i = 0; i < count; ++i) {
      C x[V];
      if constexpr (Items::kRagged) item[i].keep(items.elements(k + i), pilots);
      item[i].unpack(x);
      add_to(x, minus_pilot);
      add_products(a, b, x, x, i == 0);
    }
    sums.template add<V>(a, b);
  });
  Moments* const partials = static_cast<Moments*>(shared.partials);
  const double eps = call.args.eps;
  settle<Moments>(
      items, sums, call.plan, shared, channels, shared.records,
      [&] {
        sum_again<V>(items, sums, [&](int k, int v, double& a, double& b) {
          if (!items.has(k, v)) return;
          const Moments& m = partials[items.channel(v)];
          const double d = source.element(k, 0, items(k), v) - (m.pilot + m.delta);
          a += d;
          b = fma(d, d, b);
        });
      },
      [&](int channel, const Pair& sum, bool again, bool& fits) -> Moments {
        const double count = items.count(group, channel);
        if (count == 0) return {};
        double pilot = shared.quads<C>()[channel].x;
        if (again) pilot = partials[channel].pilot + partials[channel].delta;
        double delta = sum.a / count;
        const double m2 = sum.b - sum.a * delta, least = count * 0x1p-100;
        fits = count * delta * delta <= m2 && m2 < INFINITY && m2 + count * eps >= least;
        if (!again && !(delta - delta == 0)) delta = 0;  // a pilot that may do
        return {count, pilot, delta, m2 < 0 ? 0 : m2};
      });
}

// What an apply loop is compiled for.
enum class Fused : uint8_t { kNone, kAdd, kRelu, kAddRelu, kAny };

// f(what is fused)
template <class Loops, class F>
__device__ inline void with_fused(const Problem& p, const F& f) {
  if constexpr (Loops::kAlone) {
    if (p.act == Act::kNone)
      return p.residual ? f(Constant<Fused::kAdd>{}) : f(Constant<Fused::kNone>{});
    if (p.act == Act::kRelu && !p.residual) return f(Constant<Fused::kRelu>{});
  }
  if constexpr (Loops::kMasks)
    if (p.act == Act::kRelu) return f(Constant<Fused::kAddRelu>{});
  f(Constant<Fused::kAny>{});
}

// y = act((x - mean) scale + shift + residual) of a thread's items.
template <class T, int V, Fused kFused, class Items, class Source>
__device__ inline void apply_items(const ForwardCall& call, const Items& items,
                                   const SharedLayout& shared, const Source& source) {
  using C = compute_t<T>;
  constexpr int kBins = Items::kBins;
  constexpr bool kQuick = sizeof(T) == 2;
  const ForwardArgs& args = call.args;
  const Act act = call.problem.act;
  const C param = static_cast<C>(args.act_param);
  constexpr bool kAny = kFused == Fused::kAny, kMasks = kFused == Fused::kAddRelu || kAny;
  constexpr bool kRelu = kFused == Fused::kRelu || kFused == Fused::kAddRelu;
  const bool adds = kAny ? compiled(args.residual) != nullptr : kMasks || kFused == Fused::kAdd;
  // Where threads meet in shuffles, those that own nothing go along; else they are done here.
  constexpr bool kMeets = kMasks && kThreadsPerMaskByte<V> > 1;
  if (!kMeets && !items.owns()) return;
  C minus_mean[Items::kLanes], scale[Items::kLanes], shift[Items::kLanes];
#pragma unroll
  for (int v = 0; v < Items::kLanes; ++v) {
    const volatile Quad<C>& q = shared.quads<C>()[items.channel(v % kBins)];
    minus_mean[v] = -q.x, scale[v] = q.y, shift[v] = q.z;
  }
  const Item<T, V>* const residual = items_in<T, V>(args.residual, items);
  Item<T, V>* const output = items_in<T, V>(args.output, items);
  const bool masks = kMasks && (kAny ? compiled(args.mask) : args.mask);
  uint8_t* const mask = args.mask + items.mask_base();
  const Keep keep(call.plan.keeps_output);
  // Four accesses of a thread at a time.
  constexpr int kItems = kAny || kMasks || kFused == Fused::kAdd ? 2 : 4;
  for_items<kItems, kItems, kAny, kMeets>(items, [&](int k, auto count, const auto& has) {
    Item<T, V> x_item[count]{};
    [[maybe_unused]] Item<T, V> residual_item[count]{};
    unsigned to[count];
    bool valid[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      valid[i] = has(k + i);
      if (!valid[i]) continue;
      to[i] = items(k + i);
      if (adds) residual_item[i] = load_streaming(residual + to[i]);
      x_item[i] = source(k + i, 0, to[i]);
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
      C z[V];
      x_item[i].unpack(z);
      for_each(  // apply() of formulas.h
          z,
          [](auto x, auto minus, auto scale, auto shift) {
            return multiply_add(add(x, minus), scale, shift);
          },
          z, minus_mean, scale, shift);
      if (adds) {
        C more[V];
        residual_item[i].unpack(more);
        add_to(z, more);
      }
      [[maybe_unused]] unsigned bits = 0;
      if (kAny && masks) bits = passing_bits(act, z);
      if constexpr (kAny) activate<kQuick>(act, param, z);
      const Item<T, V> y = Item<T, V>::template pack<kRelu>(z);
      if (valid[i]) store_own(keep, items, k + i, output + to[i], y);
      if constexpr (kMasks)
        if (masks) {
          if constexpr (kRelu) bits = y.nonzero();
          if constexpr (!Items::kWhole) bits &= items.elements(k + i);
          bits = join_mask_bits<V>(valid[i] ? bits : 0);
          if (valid[i] && items.writes_mask()) mask[items.mask(k + i)] = static_cast<uint8_t>(bits);
        }
    }
  });
}

template <class T, int V, IndexMap kMap, class Items, class Source>
__device__ inline void apply_forward(const ForwardCall& call, const Items& items,
                                     const SharedLayout& shared, const Source& source) {
  with_fused<Loops<T, V, kMap>>(
      call.problem, [&](auto fused) { apply_items<T, V, fused>(call, items, shared, source); });
}

template <class T, int V, IndexMap kMap, Ends kEnds>
__global__ void __launch_bounds__(kMaxCudaThreads, 1)
    batch_norm_resident_forward_kernel(const __grid_constant__ ForwardCall call) {
  using C = compute_t<T>;
  const CudaPlan& plan = call.plan;
  const SharedLayout shared = shared_layout(plan);
  const Slab<T, V, 1> slab(shared.slabs, plan);
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  count_batch(call.args);
  // All blocks take equally many turns: one without a group still has to meet the others.
  for (int64_t turn = 0; turn * plan.teams < plan.groups; ++turn) {
    const int64_t group = turn * plan.teams + team, channel0 = group * plan.group;
    const int channels = channels_of(call.problem, plan, group);
    const Items<kMap, V, kEnds> items(call.problem, plan, group, rank);
    copy_items(items, Global<T, V, 1>{{items_in<T, V>(call.args.input, items)}}, slab);
    if (turn > 0) sync_block();  // the last one's records have been read
    find_pilots<T>(call, items, group, channels, shared.quads<C>());
    reduce_forward<T, V>(
        call, items, group, channels, shared, slab,
        [&](auto& sums, const auto& add) { sum_as_they_land<false>(items, sums, add); });
    exchange<Moments, C>(plan, shared, call.workspace, channels, team, rank, add_moments,
                         [&](int i, const Pair& sums, const Moments& first) {
                           const Statistics s = statistics_of(call, sums, first);
                           reinterpret_cast<Statistics*>(shared.records)[i] = s;
                           const Quad<C> q = shared.quads<C>()[i];
                           return quad_of(make_affine<C>(s.mean, s.invstd, q.y, q.z, s.low));
                         });
    apply_forward<T, V, kMap>(call, items, shared, slab);
    write_statistics(call, shared, channel0, channels, rank);
    wait_for_team(plan);
  }
}

template <class T, int V, IndexMap kMap, Ends kEnds>
__global__ void __launch_bounds__(kMaxCudaThreads, 1)
    batch_norm_reduce_forward_kernel(const __grid_constant__ ForwardCall call) {
  using C = compute_t<T>;
  const CudaPlan& plan = call.plan;
  const SharedLayout shared = shared_layout(plan);
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  if (call.first_group == 0) count_batch(call.args);
  const int64_t group = call.first_group + team;
  const int channels = channels_of(call.problem, plan, group);
  const Items<kMap, V, kEnds> items(call.problem, plan, group, rank);
  find_pilots<T>(call, items, group, channels, shared.quads<C>());
  const Global<T, V, 1> source{{items_in<T, V>(call.args.input, items)}};
  reduce_forward<T, V>(
      call, items, group, channels, shared, source,
      [&](auto& sums, const auto& add) { sum_items<false>(items, 0, items.total(), sums, add); });
  publish<Moments>(plan, shared, channels, workspace_of<Moments>(call.workspace, plan, team, rank));
}

template <class T, int V, IndexMap kMap, Ends kEnds>
__global__ void __launch_bounds__(kMaxCudaThreads, 1)
    batch_norm_apply_forward_kernel(const __grid_constant__ ForwardCall call) {
  using C = compute_t<T>;
  const CudaPlan& plan = call.plan;
  const ForwardArgs& args = call.args;
  const SharedLayout shared = shared_layout(plan);
  Quad<C>* const quads = shared.quads<C>();
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  const int64_t group = call.first_group + team, channel0 = group * plan.group;
  const int channels = channels_of(call.problem, plan, group);
  const bool training = is_training(call.problem.stage);
  const auto finish = [&](int i, const Statistics& s) {
    const int64_t c = channel0 + i;
    quads[i] = quad_of(
        make_affine<C>(s.mean, s.invstd, read(args.weight, c, 1), read(args.bias, c, 0), s.low));
  };
  if (training) {
    join_published<Moments>(plan, call.workspace, team, channels, add_moments,
                            [&](int i, const Pair& sums, const Moments& first) {
                              const Statistics s = statistics_of(call, sums, first);
                              reinterpret_cast<Statistics*>(shared.records)[i] = s;
                              finish(i, s);
                            });
  } else {
    const double* const given = args.save_stats ? args.save_stats + channel0 : nullptr;
    const int64_t c = call.problem.c;
    for (int i = static_cast<int>(threadIdx.x); i < channels; i += plan.threads)
      finish(i, given
                    ? Statistics{given[i], given[2 * c + i], given[c + i], 0}
                    : Statistics{read(args.frozen_mean, channel0 + i, 0), 0,
                                 inverse_std(read(args.frozen_var, channel0 + i, 1), args.eps), 0});
  }
  sync_block();
  const Items<kMap, V, kEnds> items(call.problem, plan, group, rank);
  apply_forward<T, V, kMap>(call, items, shared,
                            Global<T, V, 1>{{items_in<T, V>(args.input, items)}});
  if (training) write_statistics(call, shared, channel0, channels, rank);
}

// The statistics from the moments of a reduction; a block per group.
template <class T>
__global__ void __launch_bounds__(kMaxCudaThreads, 1)
    batch_norm_finish_forward_kernel(const __grid_constant__ ForwardCall call) {
  const CudaPlan& plan = call.plan;
  const SharedLayout shared = shared_layout(plan);
  const int64_t group = call.first_group + blockIdx.x;
  const int channels = channels_of(call.problem, plan, group);
  join_published<Moments>(plan, call.workspace, blockIdx.x, channels, add_moments,
                          [&](int i, const Pair& sums, const Moments& first) {
                            reinterpret_cast<Statistics*>(shared.records)[i] =
                                statistics_of(call, sums, first);
                          });
  sync_block();
  write_statistics(call, shared, group * plan.group, channels, 0);
}

}  // namespace bnext
