// The double backward's kernels, of activations that need no more than where they passed: a
// gradient is rarely differentiated, so there are few, and they sum in double.
//
//   reduce    3E: sums of each block's rows to the workspace,
//   + apply   up to 6E: every block joins its group's and writes its rows.
#pragma once

#include "channel.cuh"

namespace bnext {

using DoubleBackwardCall = Call<DoubleBackwardArgs>;

// The forward's coefficients, and those of make_double_backward.
template <class C>
struct DoubleBackwardTerms {
  Affine<C> affine;
  C invstd, a_u, a_h, a_1, b_g, b_u, b_h, b_1;
};
// What a block knows of a channel, in place of its partials and all that follows those.
template <class C>
struct DoubleBackwardChannel {
  DoubleBackwardSums sums;
  DoubleBackwardTerms<C> terms;
};
static_assert(sizeof(DoubleBackwardChannel<double>) <=
              kPartialBytes + kRecordBytes + kResultBytes + kPreparedBytes);
static_assert(sizeof(DoubleBackwardSums) == kDoubleBackwardPartialBytes);

// Sums as pairs, of which the last has one.
inline constexpr int kDoubleBackwardPairs = 3;
__device__ inline void set_pair(DoubleBackwardSums& sums, int pair, const Pair& values) {
  double& first = pair == 0 ? sums.u : pair == 1 ? sums.u_xmu : sums.u_g;
  first = values.a;
  if (pair < 2) (pair == 0 ? sums.g : sums.g_xmu) = values.b;
}
__device__ inline void add_pair(Pair& to, int pair, const DoubleBackwardSums& sums) {
  to.a += pair == 0 ? sums.u : pair == 1 ? sums.u_xmu : sums.u_g;
  to.b += pair == 0 ? sums.g : pair == 1 ? sums.g_xmu : 0;
}

__device__ inline DoubleBackwardSums* double_backward_sums_of(const DoubleBackwardCall& call,
                                                              int64_t team, int64_t rank) {
  return static_cast<DoubleBackwardSums*>(call.workspace) +
         (team * call.plan.team_blocks + rank) * call.plan.group;
}

// The forward's coefficients. Ends with a barrier.
template <class C>
__device__ inline DoubleBackwardChannel<C>* prepare(const DoubleBackwardCall& call,
                                                    const SharedLayout& shared, int64_t channel0,
                                                    int channels) {
  auto* const known = static_cast<DoubleBackwardChannel<C>*>(shared.partials);
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += call.plan.threads) {
    const ChannelStatistics s = statistics_of(call, channel0 + i);
    const double bias = read(call.args.bias, channel0 + i, 0);
    known[i].terms.affine = make_affine<C>(s.mean, s.invstd, s.weight, bias, s.low);
  }
  sync_block();
  return known;
}

// A thread's items of the three tensors, and where the activation passed.
template <class T, int V, class Items>
class DoubleBackwardOperands {
  using C = compute_t<T>;

 public:
  struct Values {
    C x[V], u[V], g[V];  // g where the activation passed
    unsigned passed;
  };

  __device__ DoubleBackwardOperands(const DoubleBackwardCall& call, const Items& items,
                                    const DoubleBackwardChannel<C>* known)
      : items_(items),
        act_(call.problem.act),
        param_(static_cast<C>(call.args.act_param)),
        mask_(call.args.mask ? call.args.mask + items.mask_base() : nullptr),
        x_(items_in<T, V>(call.args.input, items)),
        u_(items_in<T, V>(call.args.grad_grad_input, items)),
        g_(items_in<T, V>(call.args.grad_out, items)) {
#pragma unroll
    for (int v = 0; v < Items::kBins; ++v) affine_[v] = known[items.channel(v)].terms.affine;
  }

  __device__ C mean(int v) const { return affine_[v % Items::kBins].mean; }

  __device__ Values operator()(int k, unsigned at) const {
    Values values;
    load(x_ + at).unpack(values.x);
    load(u_ + at).unpack(values.u);
    load(g_ + at).unpack(values.g);
    values.passed = 0;
    if (act_ == Act::kNone) return values;
    if (mask_) {
      values.passed = items_.bits_of_byte(mask_[items_.mask(k)]);
    } else {
      C z[V];
#pragma unroll
      for (int v = 0; v < V; ++v) z[v] = apply(affine_[v % Items::kBins], values.x[v]);
      values.passed = passing_bits(act_, z);
    }
    through(values.passed, values.g);
    return values;
  }
  __device__ void through(unsigned passed, C (&values)[V]) const {
    if (act_ != Act::kNone) activate_backward(act_, param_, passed, values);
  }

 private:
  const Items& items_;
  Act act_;
  C param_;
  const uint8_t* mask_;
  const Item<T, V>*x_, *u_, *g_;
  Affine<C> affine_[Items::kBins];
};

template <class T, int V, IndexMap kMap, Ends kEnds>
__global__ void __launch_bounds__(kMaxCudaThreads, 1)
    batch_norm_reduce_double_backward_kernel(const __grid_constant__ DoubleBackwardCall call) {
  using C = compute_t<T>;
  using MyItems = Items<kMap, V, kEnds>;
  constexpr int kBins = MyItems::kBins;
  const CudaPlan& plan = call.plan;
  const SharedLayout shared = shared_layout(plan);
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  const int64_t group = call.first_group + team;
  const int channels = channels_of(call.problem, plan, group);
  const MyItems items(call.problem, plan, group, rank);
  const auto* const known = prepare<C>(call, shared, group * plan.group, channels);
  const DoubleBackwardOperands<T, V, MyItems> operands(call, items, known);
  Sums<C, kBins> sums[kDoubleBackwardPairs];
#pragma unroll 1
  for (int k = 0; k < items.total(); ++k) {
    if (!items.valid(k) || !items.elements(k)) continue;
    const auto values = operands(k, items(k));
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (!items.has(k, v)) continue;
      const double u = static_cast<double>(values.u[v]), g = static_cast<double>(values.g[v]);
      const double xmu = static_cast<double>(values.x[v]) - static_cast<double>(operands.mean(v));
      const int bin = v % kBins;
      sums[0].total_a[bin] += u, sums[0].total_b[bin] += g;
      sums[1].total_a[bin] += u * xmu, sums[1].total_b[bin] += g * xmu;
      sums[2].total_a[bin] += u * g;
    }
  }
  DoubleBackwardSums* const to = double_backward_sums_of(call, team, rank);
#pragma unroll
  for (int pair = 0; pair < kDoubleBackwardPairs; ++pair) {
    join_threads(items, sums[pair], plan, shared, channels,
                 [&](int channel, const Pair& values) { set_pair(to[channel], pair, values); });
    sync_block();  // the scratch memory is free again
  }
}

template <class C>
__device__ inline void finish_double_backward(const DoubleBackwardCall& call, int64_t c,
                                              DoubleBackwardChannel<C>& known, bool writes) {
  const DoubleBackwardArgs& args = call.args;
  const ChannelStatistics s = statistics_of(call, c);
  const DoubleBackwardCoefficients k = make_double_backward(
      known.sums, static_cast<double>(call.problem.count()), is_frozen(args), s.rounding<C>(),
      s.invstd, s.weight, read(args.grad_grad_weight, c, 0), read(args.grad_grad_bias, c, 0));
  if (writes) write(args.grad_weight, c, k.grad_weight);
  known.terms = {known.terms.affine,    static_cast<C>(s.invstd), static_cast<C>(k.a_u),
                 static_cast<C>(k.a_h), static_cast<C>(k.a_1),    static_cast<C>(k.b_g),
                 static_cast<C>(k.b_u), static_cast<C>(k.b_h),    static_cast<C>(k.b_1)};
}

template <class T, int V, IndexMap kMap, Ends kEnds>
__global__ void __launch_bounds__(kMaxCudaThreads, 1)
    batch_norm_apply_double_backward_kernel(const __grid_constant__ DoubleBackwardCall call) {
  using C = compute_t<T>;
  using MyItems = Items<kMap, V, kEnds>;
  constexpr int kBins = MyItems::kBins;
  const CudaPlan& plan = call.plan;
  const DoubleBackwardArgs& args = call.args;
  const SharedLayout shared = shared_layout(plan);
  const int64_t team = blockIdx.x / plan.team_blocks, rank = blockIdx.x % plan.team_blocks;
  const int64_t group = call.first_group + team, channel0 = group * plan.group;
  const int channels = channels_of(call.problem, plan, group);
  DoubleBackwardChannel<C>* const known = prepare<C>(call, shared, channel0, channels);
#pragma unroll 1
  for (int pair = 0; pair < kDoubleBackwardPairs; ++pair)
    join_entries(
        plan, channels, static_cast<int>(plan.team_blocks),
        [&](Pair& sums, int channel, int from) {
          add_pair(sums, pair, double_backward_sums_of(call, team, from)[channel]);
        },
        [&](int channel, const Pair& sums) { set_pair(known[channel].sums, pair, sums); });
  sync_block();
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += plan.threads)
    finish_double_backward(call, channel0 + i, known[i], rank == 0);
  sync_block();

  const MyItems items(call.problem, plan, group, rank);
  const DoubleBackwardOperands<T, V, MyItems> operands(call, items, known);
  DoubleBackwardTerms<C> terms[kBins];
#pragma unroll
  for (int v = 0; v < kBins; ++v) terms[v] = known[items.channel(v)].terms;
  const Item<T, V>* const added = items_in<T, V>(args.grad_grad_residual, items);
  Item<T, V>* const grad_grad_out = items_in<T, V>(args.grad_grad_out, items);
  Item<T, V>* const grad_input = items_in<T, V>(args.grad_input, items);
  if (!args.grad_grad_out && !args.grad_input) return;
  const Keep keep(plan.keeps_output);
#pragma unroll 1
  for (int k = items.total() - 1; k >= 0; --k) {
    if (!items.valid(k) || !items.elements(k)) continue;
    const unsigned at = items(k);
    const auto values = operands(k, at);
    C z[V]{}, dx[V];
    if (args.grad_grad_residual) load(added + at).unpack(z);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const DoubleBackwardTerms<C>& c = terms[v % kBins];
      const C h = (values.x[v] - c.affine.mean) * c.invstd;
      z[v] = fma(values.u[v], c.a_u, fma(h, c.a_h, c.a_1)) + z[v];
      dx[v] = fma(values.g[v], c.b_g, fma(values.u[v], c.b_u, fma(h, c.b_h, c.b_1)));
    }
    operands.through(values.passed, z);
    if (args.grad_grad_out) store_own(keep, items, k, grad_grad_out + at, Item<T, V>::pack(z));
    if (args.grad_input) store_own(keep, items, k, grad_input + at, Item<T, V>::pack(dx));
  }
}

}  // namespace bnext
