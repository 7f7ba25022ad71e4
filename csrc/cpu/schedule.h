// How a plan runs on a CPU: which kernel works on which span, in which order, and the per-channel
// work in between, in doubles. Threads are injected: parallel(n, f) calls f(begin, end) on parts of
// [0, n). Includes no torch.
#pragma once

#include <algorithm>
#include <cmath>

#include "../formulas.h"
#include "coefficients.h"
#include "probe.h"
#include "row_mask.h"

namespace bnext {

// The tasks of a plan. C is the compute type: double for float64, else float.
//
// Sums are about a pilot p, a value near the mean of its channel, in floats that are never added to
// more than a few others before they turn to double; they join by plain additions in an order that
// the problem sets. With S1 and S2 the sums of x - p and its square,
//   delta = S1 / N,   mean = p + delta,   M2 = S2 - S1 delta
// loses nothing while N delta^2 <= M2. Where that fails, or floats over- or underflowed, the
// channel is summed once more, in double.
template <class C, class Parallel>
class Schedule {
 public:
  Schedule(const CpuPlan& plan, const Problem& problem, const Parallel& parallel)
      : p_(plan), q_(problem), parallel_(parallel) {}

  // The counter must move whatever the plan, so it does here.
  void train_forward(ForwardArgs args) {
    // Scratch comes first: where memory runs out, nothing may have been counted.
    RowMask mask(p_, q_, args.mask);
    const auto& k = table<ForwardKernels>();
    Arrays<double> partials(kSums * p_.slices, q_.c);
    Coefficients<C> pilots(p_, k.spread, 1), affine(p_, k.spread, 3);
    Coefficients<double> centres(p_, k.spread_double, 1);
    const Params params(args, args.running_mean, args.running_var, q_.c);
    double factor = args.momentum;
    if (args.num_batches_tracked) ++*args.num_batches_tracked;
    if (args.cumulative)
      factor = args.num_batches_tracked ? 1 / static_cast<double>(*args.num_batches_tracked) : 0;

    const double count = static_cast<double>(q_.count());
    const double per_value = 1 / count, unbiased = 1 / (count - 1);
    const auto begin = [&](int64_t c0, int64_t c1) {
      k.pilots(p_, c0, c1, args.input, pilots.values(0));
      for (int64_t c = c0; c < c1 && !sums_probe.pilots.empty(); ++c)
        pilots.at(0, c) = static_cast<C>(sums_probe.pilots[c % sums_probe.pilots.size()]);
      pilots.publish(c0, c1, 0, 1);
    };
    const auto reduce = [&](const Task& task, bool exact) {
      double* sums[kSums];
      of_slice(partials, task.slice, sums);
      if (exact)
        k.moments_in_double(p_, task, args.input, centres.of(0), sums);
      else
        k.moments(p_, task, args.input, pilots.of(0), sums);
    };
    const auto settle = [&](int64_t c, const double* sums, bool exact) {
      const double centre = exact ? centres.at(0, c) : static_cast<double>(pilots.at(0, c));
      const double delta = sums[0] * per_value;
      double m2 = sums[1] - sums[0] * delta;
      const bool fits =
          count * delta * delta <= m2 && m2 < HUGE_VAL && m2 + count * args.eps >= count * kTiny;
      if (!exact && !fits) {
        centres.at(0, c) = std::isfinite(centre + delta) ? centre + delta : centre;
        return false;
      }
      if (m2 < 0) m2 = 0;
      const Statistics s = {centre + delta, inverse_std(m2 * per_value, args.eps),
                            std::isfinite(delta) ? two_sum_error(centre, delta) : 0};
      const auto save = [&](double* to, double second) {
        if (to) to[c] = s.mean, to[q_.c + c] = second, to[2 * q_.c + c] = s.low;
      };
      save(args.moments, m2);
      save(args.save_stats, s.invstd);
      params.mean[c] = (1 - factor) * params.mean[c] + factor * s.mean;
      params.var[c] = (1 - factor) * params.var[c] + factor * (m2 * unbiased);
      set_affine(affine, c, s, params);
      return true;
    };
    const auto again = [&](int64_t c0, int64_t c1) { centres.publish(c0, c1, 0, 1); };
    const auto finish = [&](int64_t c0, int64_t c1) {
      write(args.running_mean, c0, c1, params.mean);
      write(args.running_var, c0, c1, params.var);
      affine.publish(c0, c1, 0, 3);
    };
    const auto apply = [&](const Task& task) {
      if (q_.applies()) k.apply(p_, task, {affine.of(0), affine.of(1), affine.of(2)}, args, q_.act);
    };
    run<kSums>(partials, begin, reduce, settle, again, finish, apply);
    mask.store(parallel_);
  }

  void eval_forward(ForwardArgs args) {
    RowMask mask(p_, q_, args.mask);
    const auto& k = table<ForwardKernels>();
    Coefficients<C> affine(p_, k.spread, 3);
    const Params params(args, args.frozen_mean, args.frozen_var, q_.c);
    for (int64_t c = 0; c < q_.c; ++c) set_affine(affine, c, statistics(args, params, c), params);
    affine.publish(0, q_.c, 0, 3);
    for_each_task(false, [&](const Task& task) {
      k.apply(p_, task, {affine.of(0), affine.of(1), affine.of(2)}, args, q_.act);
    });
    mask.store(parallel_);
  }

  void backward(BackwardArgs args) {
    RowMask mask(p_, q_, args.mask);
    mask.load(parallel_);
    const auto& k = table<BackwardKernels>();
    const bool frozen = !args.save_stats;
    const bool applies = args.grad_input || args.grad_residual;
    const double* const means = args.grad_means;
    Arrays<double> partials(kSums * p_.slices, q_.c);
    Coefficients<C> a(p_, k.spread, 7);
    const Params params(args, args.running_mean, args.running_var, q_.c);
    const double per_value = 1 / static_cast<double>(q_.count());
    const auto call = [&](const auto& kernel, const Task& task) {
      double* sums[kSums];
      of_slice(partials, task.slice, sums);
      kernel(p_, task, {a.of(0), a.of(1), a.of(2), a.of(3), a.of(4), a.of(5), a.of(6)}, args,
             q_.act, sums);
    };
    const auto begin = [&](int64_t c0, int64_t c1) {
      for (int64_t c = c0; c < c1; ++c) {
        const Statistics s = statistics(args, params, c);
        set_affine(a, c, s, params);
        if (frozen) set_input_grad(a, c, s, params.weight[c], 0, 0);
        if (means) set_input_grad(a, c, s, params.weight[c], means[c], means[q_.c + c]);
      }
      a.publish(c0, c1, 0, frozen || means ? 7 : forward_arrays());
    };
    if (means) {
      begin(0, q_.c);
      return for_each_task(false, [&](const Task& task) {
        if (is_any(q_.act) && stages(element_size(q_.dtype))) call(k.sums, task);
        call(k.apply, task);
      });
    }
    if (frozen && !args.grad_weight && !args.grad_bias) {
      begin(0, q_.c);
      return for_each_task(false, [&](const Task& task) { call(k.frozen, task); });
    }
    const auto reduce = [&](const Task& task, bool exact) {
      call(exact ? k.sums_in_double : frozen && applies ? k.frozen_and_sums : k.sums, task);
    };
    const auto settle = [&](int64_t c, const double* partial, bool exact) {
      const Statistics s = statistics(args, params, c);
      const GradSums sums{partial[0], partial[1] - s.rounding() * partial[0]};
      const bool fits =
          std::isfinite(sums.dy) && std::isfinite(sums.dy_xmu) &&
          (sums.dy_xmu == 0 || std::abs(sums.dy_xmu) >= static_cast<double>(q_.count()) * kTiny);
      if (!exact && !fits) return false;
      if (!frozen)
        set_input_grad(a, c, s, params.weight[c], sums.dy * per_value,
                       sums.dy_xmu * s.invstd * per_value);
      params.weight[c] = sums.dy_xmu * s.invstd;  // from here on their gradients
      params.bias[c] = sums.dy;
      return true;
    };
    const auto again = [](int64_t, int64_t) {};
    const auto finish = [&](int64_t c0, int64_t c1) {
      write(args.grad_weight, c0, c1, params.weight);
      write(args.grad_bias, c0, c1, params.bias);
      if (!frozen) a.publish(c0, c1, 3, 7);
    };
    const auto apply = [&](const Task& task) {
      if (!frozen && applies) call(k.apply, task);
    };
    run<kSums>(partials, begin, reduce, settle, again, finish, apply);
  }

  void double_backward(DoubleBackwardArgs args) {
    RowMask mask(p_, q_, args.mask);
    mask.load(parallel_);
    const auto& k = table<DoubleBackwardKernels>();
    const bool frozen = !args.save_stats, needs_sums = !frozen || args.grad_weight;
    constexpr int kDoubleSums = 5;
    Arrays<double> partials(kDoubleSums * p_.slices, q_.c);
    if (!needs_sums) std::fill_n(partials[0], kDoubleSums * p_.slices * q_.c, 0.0);
    Coefficients<C> a(p_, k.spread, 11);
    const Params params(args, args.running_mean, args.running_var, q_.c);
    Arrays<double> grad_grads(2, q_.c);
    read(args.grad_grad_weight, q_.c, 0, grad_grads[0]);
    read(args.grad_grad_bias, q_.c, 0, grad_grads[1]);
    const auto arrays = [&] {
      return DoubleBackwardArrays{a.of(0), a.of(1), a.of(2), a.of(3), a.of(4), a.of(5),
                                  a.of(6), a.of(7), a.of(8), a.of(9), a.of(10)};
    };
    const auto begin = [&](int64_t c0, int64_t c1) {
      for (int64_t c = c0; c < c1; ++c) set_affine(a, c, statistics(args, params, c), params);
      a.publish(c0, c1, 0, forward_arrays());
    };
    const auto reduce = [&](const Task& task, bool) {
      if (!needs_sums) return;
      double* sums[kDoubleSums];
      of_slice(partials, task.slice, sums);
      k.sums(p_, task, arrays(), args, q_.act, sums);
    };
    const auto settle = [&](int64_t c, const double* sums, bool) {
      const Statistics s = statistics(args, params, c);
      const auto d = make_double_backward(
          {sums[0], sums[1], sums[2], sums[3], sums[4]}, static_cast<double>(q_.count()), frozen,
          s.rounding(), s.invstd, params.weight[c], grad_grads[0][c], grad_grads[1][c]);
      int64_t array = 3;
      for (const double value : {s.invstd, d.a_u, d.a_h, d.a_1, d.b_g, d.b_u, d.b_h, d.b_1})
        a.at(array++, c) = static_cast<C>(value);
      params.weight[c] = d.grad_weight;
      return true;
    };
    const auto again = [](int64_t, int64_t) {};
    const auto finish = [&](int64_t c0, int64_t c1) {
      write(args.grad_weight, c0, c1, params.weight);
      a.publish(c0, c1, 3, 11);
    };
    const auto apply = [&](const Task& task) {
      if (q_.applies()) k.apply(p_, task, arrays(), args, q_.act);
    };
    run<kDoubleSums>(partials, begin, reduce, settle, again, finish, apply);
  }

 private:
  static constexpr int kSums = 2;
  // Sums of squares or products below this lost digits to underflow: a float's least normal is
  // 2^-126.
  static constexpr double kTiny = 0x1p-100;

  template <class Table>
  const Table& table() const {
    return kernels<Table>(p_.isa, q_.dtype);
  }

  // Of a forward's mean, scale and shift, those that a backward reads.
  int64_t forward_arrays() const { return q_.act == Act::kNone ? 1 : 3; }

  struct Statistics {
    double mean, invstd, low = 0;  // the mean is mean + low

    // What the mean loses where it is rounded to the compute type, as kernels subtract it.
    double rounding() const { return mean - static_cast<double>(static_cast<C>(mean)) + low; }
  };
  // What a + b loses to rounding (Knuth's TwoSum); NaN where the sum is not finite.
  static double two_sum_error(double a, double b) {
    const double sum = a + b, b_rounded = sum - a;
    return (a - (sum - b_rounded)) + (b - b_rounded);
  }

  template <int kCount>
  void of_slice(Arrays<double>& partials, int64_t slice, double* (&sums)[kCount]) const {
    for (int i = 0; i < kCount; ++i) sums[i] = partials[kCount * slice + i];
  }

  // Parameters and running statistics, as doubles.
  struct Params {
    template <class Args, class Running>
    Params(const Args& args, const Running& running_mean, const Running& running_var, int64_t count)
        : arrays(4, count), weight(arrays[0]), bias(arrays[1]), mean(arrays[2]), var(arrays[3]) {
      read(args.weight, count, 1, weight);
      read(args.bias, count, 0, bias);
      read(running_mean, count, 0, mean);
      read(running_var, count, 1, var);
    }
    Arrays<double> arrays;
    double *const weight, *const bias, *const mean, *const var;
  };

  // The batch's, as saved, or else the running ones.
  template <class Args>
  Statistics statistics(const Args& args, const Params& params, int64_t c) const {
    if (args.save_stats)
      return {args.save_stats[c], args.save_stats[q_.c + c], args.save_stats[2 * q_.c + c]};
    return {params.mean[c], inverse_std(params.var[c], args.eps)};
  }

  // From statistics and means to coefficients.
  void set_affine(Coefficients<C>& arrays, int64_t c, const Statistics& s, const Params& p) const {
    const auto a = make_affine<C>(s.mean, s.invstd, p.weight[c], p.bias[c], s.low);
    arrays.at(0, c) = a.mean, arrays.at(1, c) = a.scale, arrays.at(2, c) = a.shift;
  }
  void set_input_grad(Coefficients<C>& arrays, int64_t c, const Statistics& s, double weight,
                      double mean_dy, double mean_dy_h) const {
    const auto g = make_input_grad<C>(s.mean, s.invstd, weight, mean_dy, mean_dy_h, s.low);
    arrays.at(3, c) = g.invstd, arrays.at(4, c) = g.a, arrays.at(5, c) = g.b;
    arrays.at(6, c) = g.c;
  }

  // f(task) for every task. A thread sums its own last one first and writes that one's results
  // last, so that a second pass begins with what the first left in the cache.
  template <class F>
  void for_each_task(bool reverse, const F& f) const {
    parallel_(p_.blocks * p_.slices, p_.grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t task = reverse ? begin + end - 1 - i : i, block = task % p_.blocks;
        f(Task{task / p_.blocks, p_.first_channel(block), p_.first_channel(block + 1), 0});
      }
    });
  }

  // begin(c0, c1); reduce(task, false); settle(channel, its sums, false), which may refuse them:
  // then again(c0, c1) and the same in double. At last finish(c0, c1) and apply(task).
  template <int kCount, class Begin, class Reduce, class Settle, class Again, class Finish,
            class Apply>
  void run(Arrays<double>& partials, const Begin& begin, const Reduce& reduce, const Settle& settle,
           const Again& again, const Finish& finish, const Apply& apply) const {
    // Whether a channel waits for its sums.
    std::unique_ptr<bool[]> waits(new (std::nothrow) bool[q_.c]);
    if (!waits) throw std::runtime_error("bnext: not enough memory");
    std::fill_n(waits.get(), q_.c, true);
    const auto settle_all = [&](int64_t c0, int64_t c1, bool exact) {
      constexpr int64_t kTile = 64;
      int64_t refused = 0;
      for (int64_t first = c0; first < c1; first += kTile) {
        const int64_t count = std::min(kTile, c1 - first);
        double total[kCount][kTile] = {}, error[kCount][kTile] = {};
        for (int64_t slice = 0; slice < p_.slices; ++slice)
          for (int i = 0; i < kCount; ++i) {
            const double* part = partials[kCount * slice + i] + first;
            for (int64_t c = 0; c < count; ++c) {
              error[i][c] += two_sum_error(total[i][c], part[c]);
              total[i][c] += part[c];
            }
          }
        for (int64_t c = 0; c < count; ++c) {
          double sums[kCount];
          for (int i = 0; i < kCount; ++i)
            sums[i] = total[i][c] + (std::isfinite(error[i][c]) ? error[i][c] : 0);
          if (waits[first + c]) refused += waits[first + c] = !settle(first + c, sums, exact);
        }
      }
      if (refused > 0) {
        sums_probe.slow_channels += refused;
        again(c0, c1);
      }
      return refused == 0;
    };

    if (p_.family == Family::kResident) {
      parallel_(p_.tasks, p_.grain, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          const int64_t c0 = p_.first_channel(block), c1 = p_.first_channel(block + 1);
          const auto for_slices = [&](const auto& f) {
            for (int64_t slice = 0; slice < p_.slices; ++slice) f(Task{slice, c0, c1, 0});
          };
          begin(c0, c1);
          for_slices([&](const Task& task) { reduce(task, false); });
          if (!settle_all(c0, c1, false)) {
            for_slices([&](const Task& task) { reduce(task, true); });
            settle_all(c0, c1, true);
          }
          finish(c0, c1);
          const int64_t ahead = block + 1 < last ? (c1 - c0) * p_.width : 0;
          for (int64_t slice = p_.slices; slice-- > 0;) apply(Task{slice, c0, c1, ahead});
        }
      });
      return;
    }
    begin(0, q_.c);
    for_each_task(true, [&](const Task& task) { reduce(task, false); });
    if (!settle_all(0, q_.c, false)) {
      for_each_task(true, [&](const Task& task) { reduce(task, true); });
      settle_all(0, q_.c, true);
    }
    finish(0, q_.c);
    for_each_task(false, apply);
  }

  const CpuPlan& p_;
  const Problem& q_;
  const Parallel& parallel_;
};

}  // namespace bnext
