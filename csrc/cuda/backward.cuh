// The backward kernels.
//
//   resident  one launch, 3E: a team of blocks loads x and dy of a group of channels into its
//             shared memory, sums there, exchanges the sums, writes dx from shared memory.
//   reduce    5E, or 3E where the L2 keeps the group: sums of each block's rows to the workspace;
//   + apply   then every block joins its group's and writes its rows of dx.
//   reduce    frozen statistics with gradients of the parameters, 3E: dx does not depend on the
//   + finish  sums, so the reduction writes it.
//   apply     frozen statistics, dx alone, 2E; or from given sums, 3E.
#pragma once

#include "channel.cuh"

namespace bnext {

// Coefficients that a thread keeps: where any activation is passed, no registers are left for
// pairs.
template <Gate kGate, class Items>
inline constexpr int lanes_of = kGate == Gate::kAny ? Items::kBins : Items::kLanes;

// The coefficients of dx for the bins of a thread.
template <class C, bool kFrozen, int kLanes>
struct InputGradOf {
  C a[kLanes], b[kLanes], c[kLanes], unit[kLanes], minus_mean_units[kLanes];

  template <class Items>
  __device__ InputGradOf(const Items& items, const SharedLayout& shared) {
#pragma unroll
    for (int v = 0; v < kLanes; ++v) {
      const int channel = items.channel(v % Items::kBins);
      if constexpr (kFrozen) {
        a[v] = shared.quads<C>()[channel].x;
      } else {
        const volatile Prepared<C>& p = static_cast<const Prepared<C>*>(shared.prepared)[channel];
        const volatile Quad<C>& q = shared.quads<C>()[channel];
        a[v] = q.x, b[v] = q.y, c[v] = q.z;
        unit[v] = p.unit, minus_mean_units[v] = -p.mean_units;
      }
    }
  }
  // With frozen statistics dx does not depend on x, not even where x is inf or nan.
  template <int V>
  __device__ void operator()(C (&dx)[V], const C (&x)[V], const C (&dy)[V]) const {
    if constexpr (kFrozen)
      for_each(dx, [](auto dy, auto a) { return multiply(a, dy); }, dy, a);
    else
      for_each(
          dx,
          [](auto x, auto dy, auto a, auto b, auto c, auto unit, auto minus) {
            return multiply_add(a, dy, multiply_add(b, multiply_add(x, unit, minus), c));
          },
          x, dy, a, b, c, unit, minus_mean_units);
  }
};

// Where dx and the residual's gradient go.
template <class T, int V, Gate kGate>
class GradientsOut {
 public:
  template <class Items>
  __device__ GradientsOut(const BackwardCall& call, const Items& items)
      : has_input_(call.args.grad_input),
        has_residual_(compiled(call.args.grad_residual)),
        input_(items_in<T, V>(call.args.grad_input, items)),
        residual_(items_in<T, V>(call.args.grad_residual, items)),
        keep_(call.plan.keeps_output) {}

  // Which are asked for is known of all gates but one (see with_gate).
  template <class Grad, class Items>
  __device__ void store(const Grad& grad, const Items& items, int k, unsigned to,
                        const compute_t<T> (&x)[V], const compute_t<T> (&dy)[V],
                        const Item<T, V>& dy_item) const {
    compute_t<T> dx[V];
    grad(dx, x, dy);
    if (kGate != Gate::kAny || has_input_)
      store_own(keep_, items, k, input_ + to, Item<T, V>::pack(dx));
    if constexpr (kGate == Gate::kMask) store_own(keep_, items, k, residual_ + to, dy_item);
    if (kGate == Gate::kAny && has_residual_)
      store_own(keep_, items, k, residual_ + to, Item<T, V>::pack(dy));
  }

 private:
  bool has_input_, has_residual_;
  Item<T, V>*input_, *residual_;
  Keep keep_;
};

// Adds a thread's items to its sums; with kFrozen writes dx too. sum(once, add): calls add, which
// adds items to the sums, for all of them; `once` as kOnce of sum_items.
template <class T, int V, Gate kGate, bool kFrozen, class Items, class Source, class Sums,
          class Sum>
__device__ inline void sum_backward(const BackwardCall& call, const Items& items,
                                    const SharedLayout& shared, const Source& source, Sums& sums,
                                    const Sum& sum) {
  using C = compute_t<T>;
  constexpr bool kAny = kGate == Gate::kAny;
  const GateOf<kGate, T, V, Items> gate(call, items,
                                        static_cast<const Prepared<C>*>(shared.prepared));
  constexpr int kLanes = lanes_of<kGate, Items>;
  const InputGradOf<C, true, kLanes> frozen_grad(items, shared);
  const GradientsOut<T, V, kGate> out(call, items);
  sum(Constant<kAny>{}, [&](int k, auto count) {
    // Items of both operands that take registers. Slices have fewer left.
    constexpr bool kFew = kAny || (Items::kSliced && V == 8 && Source::kShared);
    constexpr int kLoads = kFew || std::is_same_v<decltype(count), Count<1>> ? 1 : 2;
    C a[V]{}, b[V]{};
#pragma unroll(kAny ? 1 : kTile)
    for (int j = 0; j < count; j += kLoads) {
      Item<T, V> x_item[kLoads], dy_item[kLoads];
      typename GateOf<kGate, T, V, Items>::More more[kLoads];
      unsigned at[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int n = k + j + i;
        at[i] = items(n);
        more[i] = gate.more(n, at[i]);
        x_item[i] = source(n, 0, at[i]);
        dy_item[i] = source(n, 1, at[i]);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        C x[V], dy[V];
        if constexpr (Items::kRagged) {
          const unsigned own = items.elements(k + j + i);
          x_item[i].keep(own);
          // A mask has no bits of others; kAny's dy is set below.
          if constexpr (kGate == Gate::kNone || kGate == Gate::kSign) dy_item[i].keep(own);
        }
        x_item[i].unpack(x);
        gate.pass(x_item[i], x, more[i], dy_item[i], dy);
        if constexpr (Source::kShared && gate.kIsExact)
          store(source.slot(k + j + i, 1), dy_item[i]);
        if constexpr (kFrozen) out.store(frozen_grad, items, k + j + i, at[i], x, dy, dy_item[i]);
        // f' of what is added in other rows may be NaN.
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (kAny && !items.has(k + j + i, v)) dy[v] = 0;
        C minus_mean[kLanes];
#pragma unroll
        for (int v = 0; v < kLanes; ++v) minus_mean[v] = -gate.mean(v);
        add_to(x, minus_mean);
        add_products(a, b, dy, x, !kAny && j + i == 0);
      }
    }
    sums.template add<V>(a, b);
  });
}

// GradSums of this block for each channel of the group, in shared.partials; where the statistics
// are frozen also dx. sum(once, sums, add): as of sum_backward.
template <class T, int V, IndexMap kMap, bool kShared, class Items, class Source, class Sum>
__device__ inline void reduce_backward(const BackwardCall& call, const Items& items, int channels,
                                       const SharedLayout& shared, const Source& source,
                                       const Sum& sum) {
  using C = compute_t<T>;
  constexpr bool kSlab = Source::kShared;
  Sums<C, Items::kBins> sums;
  const auto sum_all = [&](auto once, const auto& add) { sum(once, sums, add); };
  with_gate<Loops<T, V, kMap>, kShared, false>(call.problem, [&](auto gate) {
    if constexpr (!kSlab && !Items::kSliced)
      if (is_frozen(call.args))
        return sum_backward<T, V, gate, true>(call, items, shared, source, sums, sum_all);
    sum_backward<T, V, gate, false>(call, items, shared, source, sums, sum_all);
  });
  const double least = items.most() * 0x1p-100;
  settle<GradSums>(
      items, sums, call.plan, shared, channels, shared.results,
      [&] {
        // A slab keeps dy as an exact gate has left it.
        const bool passed = kSlab && has_loop_of_its_own<Loops<T, V, kMap>, kShared>(call.problem);
        const auto* const prepared = static_cast<const Prepared<C>*>(shared.prepared);
        sum_again<V>(items, sums, [&](int k, int v, double& a, double& b) {
          if (!items.has(k, v)) return;
          const Prepared<C>& p = prepared[items.channel(v)];
          const unsigned at = items(k);
          const C x = source.element(k, 0, at, v);
          C dy = source.element(k, 1, at, v);
          if (!passed)
            dy = pass_one<T, V, kShared>(call, items, k, v, {p.mean, p.scale, p.shift}, x, dy);
          const double xmu = static_cast<double>(x) - static_cast<double>(p.mean);
          a += static_cast<double>(dy);
          b = fma(static_cast<double>(dy), xmu, b);
        });
      },
      [&](int, const Pair& s, bool, bool& fits) -> GradSums {
        const bool finite = s.a - s.a == 0 && s.b - s.b == 0;
        fits = sizeof(C) == sizeof(double) || (finite && (s.b == 0 || fabs(s.b) >= least));
        return {s.a, s.b};
      });
}

// dx of a thread's items.
template <class T, int V, Gate kGate, bool kFrozen, class Items, class Source>
__device__ inline void apply_items(const BackwardCall& call, const Items& items,
                                   const SharedLayout& shared, const Source& source) {
  using C = compute_t<T>;
  constexpr bool kAny = kGate == Gate::kAny;
  // A slab keeps dy as the reduction has left it.
  constexpr bool kDone = Source::kShared && GateOf<kGate, T, V, Items>::kIsExact;
  using GateHere = GateOf<kDone ? Gate::kNone : kGate, T, V, Items>;
  const GateHere gate(call, items, static_cast<const Prepared<C>*>(shared.prepared));
  const InputGradOf<C, kFrozen, lanes_of<kGate, Items>> grad(items, shared);
  const GradientsOut<T, V, kGate> out(call, items);
  // Four accesses of a thread at a time, or those of one item, where more take too many registers.
  constexpr bool kReadsX = !kFrozen || GateHere::kReadsX;
  constexpr int kItems = kAny || (Items::kSliced && V == 8) ? 1 : kReadsX ? 2 : 4;
  for_items<kItems, 1, kAny, false>(items, [&](int k, auto count, const auto& has) {
    Item<T, V> x_item[count], dy_item[count];
    typename GateHere::More more[count];
    unsigned at[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (!has(k + i)) continue;
      at[i] = items(k + i);
      more[i] = gate.more(k + i, at[i]);
      if constexpr (kReadsX) x_item[i] = source(k + i, 0, at[i]);
      dy_item[i] = source(k + i, 1, at[i]);
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (!has(k + i)) continue;
      C x[V], dy[V];
      if constexpr (kReadsX) x_item[i].unpack(x);
      gate.pass(x_item[i], x, more[i], dy_item[i], dy);
      out.store(grad, items, k + i, at[i], x, dy, dy_item[i]);
    }
  });
}

template <class T, int V, IndexMap kMap, bool kShared, bool kFrozen, class Items, class Source>
__device__ inline void apply_backward(const BackwardCall& call, const Items& items,
                                      const SharedLayout& shared, const Source& source) {
  if (!items.owns()) return;
  with_gate<Loops<T, V, kMap>, kShared, Source::kShared>(call.problem, [&](auto gate) {
    apply_items<T, V, gate, kFrozen>(call, items, shared, source);
  });
}

template <class T, int V, class Items>
__device__ inline Global<T, V, 2> operands_of(const BackwardCall& call, const Items& items) {
  return {{items_in<T, V>(call.args.input, items), items_in<T, V>(call.args.grad_out, items)}};
}

template <class T, int V, IndexMap kMap, Ends kEnds>
__global__ void __launch_bounds__(kMaxCudaThreads, 1)
    batch_norm_resident_backward_kernel(const __grid_constant__ BackwardCall call) {
  const CudaPlan& plan = call.plan;
  const SharedLayout shared = shared_layout(plan);
  const Slab<T, V, 2> slab(shared.slabs, plan);
  constexpr bool kShared = is_shared<V, kMap, kEnds> && !is_sliced(kMap, kEnds);  // see plan.cpp
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  // All blocks take equally many turns: one without a group still has to meet the others.
  for (int64_t turn = 0; turn * plan.teams < plan.groups; ++turn) {
    const int64_t group = turn * plan.teams + team, channel0 = group * plan.group;
    const int channels = channels_of(call.problem, plan, group);
    const Items<kMap, V, kEnds> items(call.problem, plan, group, rank);
    copy_items(items, operands_of<T, V>(call, items), slab);
    if (turn > 0) sync_block();  // the last one's records have been read
    prepare<T, Loops<T, V, kMap>::kAlone>(call, shared, channel0, channels);
    reduce_backward<T, V, kMap, kShared>(
        call, items, channels, shared, slab,
        [&](auto once, auto& sums, const auto& add) { sum_as_they_land<once>(items, sums, add); });
    exchange<GradSums, compute_t<T>>(plan, shared, call.workspace, channels, team, rank, add_sums,
                                     [&](int i, const Pair& sums, const GradSums&) {
                                       return finish_backward<compute_t<T>>(call, shared, i, sums);
                                     });
    apply_backward<T, V, kMap, kShared, false>(call, items, shared, slab);
    write_param_grads(call, shared, channel0, channels, rank);
    wait_for_team(plan);
  }
}

template <class T, int V, IndexMap kMap, Ends kEnds>
__global__ void __launch_bounds__(kMaxCudaThreads, 1)
    batch_norm_reduce_backward_kernel(const __grid_constant__ BackwardCall call) {
  const CudaPlan& plan = call.plan;
  const SharedLayout shared = shared_layout(plan);
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  const int64_t group = call.first_group + team;
  const int channels = channels_of(call.problem, plan, group);
  const Items<kMap, V, kEnds> items(call.problem, plan, group, rank);
  prepare<T, Loops<T, V, kMap>::kAlone>(call, shared, group * plan.group, channels);
  reduce_backward<T, V, kMap, is_shared<V, kMap, kEnds>>(
      call, items, channels, shared, operands_of<T, V>(call, items),
      [&](auto once, auto& sums, const auto& add) {
        sum_items<once>(items, 0, items.total(), sums, add);
      });
  publish<GradSums>(plan, shared, channels,
                    workspace_of<GradSums>(call.workspace, plan, team, rank));
}

template <class T, int V, IndexMap kMap, Ends kEnds, bool kFrozen>
__global__ void __launch_bounds__(kMaxCudaThreads, 1)
    batch_norm_apply_backward_kernel(const __grid_constant__ BackwardCall call) {
  using C = compute_t<T>;
  const CudaPlan& plan = call.plan;
  const SharedLayout shared = shared_layout(plan);
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  const int64_t group = call.first_group + team, channel0 = group * plan.group;
  const int channels = channels_of(call.problem, plan, group);
  prepare<T, Loops<T, V, kMap>::kAlone>(call, shared, channel0, channels);
  const bool training = is_training(call.problem.stage);
  if constexpr (!kFrozen) {
    Quad<C>* const quads = shared.quads<C>();
    if (training) {
      join_published<GradSums>(plan, call.workspace, team, channels, add_sums,
                               [&](int i, const Pair& sums, const GradSums&) {
                                 quads[i] = finish_backward<C>(call, shared, i, sums);
                               });
    } else {
      const auto* const records = reinterpret_cast<const ChannelStatistics*>(shared.records);
      const auto* const prepared = static_cast<const Prepared<C>*>(shared.prepared);
      const double* const means = call.args.grad_means + channel0;
      for (int i = static_cast<int>(threadIdx.x); i < channels; i += plan.threads)
        quads[i] = input_grad(records[i], prepared[i].unit, means[i], means[call.problem.c + i]);
    }
    sync_block();
  }
  const Items<kMap, V, kEnds> items(call.problem, plan, group, rank);
  apply_backward<T, V, kMap, is_shared<V, kMap, kEnds>, kFrozen>(call, items, shared,
                                                                 operands_of<T, V>(call, items));
  if (!kFrozen && training) write_param_grads(call, shared, channel0, channels, rank);
}

// The parameters' gradients from the sums of a reduction; a block per group.
template <class T>
__global__ void __launch_bounds__(kMaxCudaThreads, 1)
    batch_norm_finish_backward_kernel(const __grid_constant__ BackwardCall call) {
  const CudaPlan& plan = call.plan;
  const SharedLayout shared = shared_layout(plan);
  const int64_t group = call.first_group + blockIdx.x, channel0 = group * plan.group;
  const int channels = channels_of(call.problem, plan, group);
  prepare<T, false>(call, shared, channel0, channels);
  join_published<GradSums>(plan, call.workspace, blockIdx.x, channels, add_sums,
                           [&](int i, const Pair& sums, const GradSums&) {
                             finish_backward<compute_t<T>>(call, shared, i, sums);
                           });
  sync_block();
  write_param_grads(call, shared, channel0, channels, 0);
}

}  // namespace bnext
