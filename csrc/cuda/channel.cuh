// What the backwards know of a channel: its statistics, then the coefficients and the gradients of
// its parameters, which come of them and of the sums.
#pragma once

#include "gate.cuh"

namespace bnext {

// What is read of a channel once; in place of it, later, the gradients of its parameters.
struct ChannelStatistics {
  double mean, low, invstd, weight;

  // What the mean loses where it is rounded to C, as kernels subtract it.
  template <class C>
  __device__ double rounding() const {
    return mean - static_cast<double>(static_cast<C>(mean)) + low;
  }
};
static_assert(sizeof(ChannelStatistics) <= kRecordBytes);

template <class Args>
__device__ inline bool is_frozen(const Args& args) {
  return !args.save_stats;
}

template <class Args>
__device__ inline ChannelStatistics statistics_of(const Call<Args>& call, int64_t c) {
  const Args& args = call.args;
  const double weight = read(args.weight, c, 1);
  if (is_frozen(args))
    return {read(args.running_mean, c, 0), 0, inverse_std(read(args.running_var, c, 1), args.eps),
            weight};
  const double* const mean = args.save_stats + c;
  return {mean[0], mean[2 * call.problem.c], mean[call.problem.c], weight};
}

// The power of two next below 1 / std: x - mean and its products stay within what floats hold.
template <class C>
__device__ inline C unit_of(double invstd, C mean) {
  const C unit = static_cast<C>(ldexp(1.0, ilogb(invstd)));
  return unit > 0 && mean * unit - mean * unit == 0 ? unit : C(1);
}

// The coefficients that need no sums; dx = results.x * dy where the statistics are frozen. Ends
// with a barrier.
template <class T, bool kThresholds>
__device__ inline void prepare(const BackwardCall& call, const SharedLayout& shared,
                               int64_t channel0, int channels) {
  using C = compute_t<T>;
  auto* const prepared = static_cast<Prepared<C>*>(shared.prepared);
  auto* const records = reinterpret_cast<ChannelStatistics*>(shared.records);
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += call.plan.threads) {
    const ChannelStatistics s = statistics_of(call, channel0 + i);
    const double bias = read(call.args.bias, channel0 + i, 0);
    const Affine<C> affine = make_affine<C>(s.mean, s.invstd, s.weight, bias, s.low);
    const C unit = unit_of(s.invstd, affine.mean);
    records[i] = s;
    prepared[i] = {affine.mean, affine.scale, affine.shift, 0, 0, unit, affine.mean * unit, 0};
    if constexpr (kThresholds && sizeof(T) == 2)
      if (call.problem.act == Act::kRelu && !call.problem.has_mask) {
        unsigned threshold, sign;
        find_threshold<T>(affine, threshold, sign);
        prepared[i].threshold = float_of(threshold);
        prepared[i].sign = float_of(sign);
      }
    shared.quads<C>()[i] = {affine.scale, 0, 0, 0};
  }
  sync_block();
}

__device__ inline void add_sums(Pair& sums, const GradSums& s, const GradSums&) {
  sums.a += s.dy;
  sums.b += s.dy_xmu;
}

// dx's coefficients from the means of dy and dy h.
template <class C>
__device__ inline Quad<C> input_grad(const ChannelStatistics& s, C unit, double mean_dy,
                                     double mean_dy_h) {
  const InputGrad<double> grad =
      make_input_grad<double>(s.mean, s.invstd, s.weight, mean_dy, mean_dy_h);
  return {static_cast<C>(grad.a), static_cast<C>(grad.b * (s.invstd / unit)),
          static_cast<C>(grad.c - grad.b * s.rounding<C>() * s.invstd), 0};
}

// The same from sums about the rounded mean; the parameters' gradients go to the record.
template <class C>
__device__ inline Quad<C> finish_backward(const BackwardCall& call, const SharedLayout& shared,
                                          int channel, const Pair& sums) {
  auto& record = reinterpret_cast<ChannelStatistics*>(shared.records)[channel];
  const ChannelStatistics s = record;
  const C unit = static_cast<const Prepared<C>*>(shared.prepared)[channel].unit;
  const double count = static_cast<double>(call.problem.count());
  const double sum_dy_h = (sums.b - s.rounding<C>() * sums.a) * s.invstd;
  const Quad<C> grad = input_grad(s, unit, sums.a / count, sum_dy_h / count);
  record = {sums.a, sum_dy_h, 0, 0};  // last: ragged rows spill a register otherwise
  return grad;
}

__device__ inline void write_param_grads(const BackwardCall& call, const SharedLayout& shared,
                                         int64_t channel0, int channels, int64_t rank) {
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += call.plan.threads) {
    if (!finishes(call.plan, rank, i)) continue;
    write(call.args.grad_bias, channel0 + i, shared.records[4 * i]);
    write(call.args.grad_weight, channel0 + i, shared.records[4 * i + 1]);
  }
}

}  // namespace bnext
