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
    double factor = args.momentum;
    if (args.num_batches_tracked) ++*args.num_batches_tracked;
    if (args.cumulative)
      factor = args.num_batches_tracked ? 1 / static_cast<double>(*args.num_batches_tracked) : 0;

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
      const double count = static_cast<double>(q_.count()), delta = sums[0] / count;
      double m2 = sums[1] - sums[0] * delta;
      const bool fits =
          count * delta * delta <= m2 && m2 < HUGE_VAL && m2 + count * args.eps >= count * kTiny;
      if (!exact && !fits) {
        centres.at(0, c) = std::isfinite(centre + delta) ? centre + delta : centre;
        return false;
      }
      if (m2 < 0) m2 = 0;
      const Statistics s = {centre + delta, inverse_std(m2 / count, args.eps),
                            std::isfinite(delta) ? two_sum_error(centre, delta) : 0};
      save(args, c, s);
      update_running(args, factor, c, s.mean, m2 / (count - 1));  // unbiased
      set_affine(affine, c, s, args.weight, args.bias);
      return true;
    };
    const auto again = [&](int64_t c0, int64_t c1) { centres.publish(c0, c1, 0, 1); };
    const auto finish = [&](int64_t c0, int64_t c1) { affine.publish(c0, c1, 0, 3); };
    const auto apply = [&](const Task& task) {
      k.apply(p_, task, {affine.of(0), affine.of(1), affine.of(2)}, args, q_.act);
    };
    run<kSums>(partials, begin, reduce, settle, again, finish, apply);
    mask.store(parallel_);
  }

  void eval_forward(ForwardArgs args) {
    RowMask mask(p_, q_, args.mask);
    const auto& k = table<ForwardKernels>();
    Coefficients<C> affine(p_, k.spread, 3);
    for (int64_t c = 0; c < q_.c; ++c)
      set_affine(affine, c,
                 {read(args.frozen_mean, c, 0), inverse_std(read(args.frozen_var, c, 1), args.eps)},
                 args.weight, args.bias);
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
    const bool needs_sums = !frozen || args.grad_weight || args.grad_bias;
    Arrays<double> partials(kSums * p_.slices, q_.c);
    Coefficients<C> a(p_, k.spread, 7);
    const auto call = [&](const auto& kernel, const Task& task) {
      double* sums[kSums];
      of_slice(partials, task.slice, sums);
      kernel(p_, task, {a.of(0), a.of(1), a.of(2), a.of(3), a.of(4), a.of(5), a.of(6)}, args,
             q_.act, sums);
    };
    const auto begin = [&](int64_t c0, int64_t c1) {
      for (int64_t c = c0; c < c1; ++c) {
        set_affine(a, c, statistics(args, c), args.weight, args.bias);
        if (frozen) set_input_grad(a, args, c, {0, 0});
      }
      a.publish(c0, c1, 0, frozen ? 7 : forward_arrays());
    };
    const auto reduce = [&](const Task& task, bool exact) {
      call(exact               ? k.sums_in_double
           : !needs_sums       ? k.frozen
           : frozen && applies ? k.frozen_and_sums
                               : k.sums,
           task);
    };
    const auto settle = [&](int64_t c, const double* partial, bool exact) {
      if (!needs_sums) return true;
      const Statistics s = statistics(args, c);
      const GradSums sums{partial[0], partial[1] - s.rounding() * partial[0]};
      const bool fits =
          std::isfinite(sums.dy) && std::isfinite(sums.dy_xmu) &&
          (sums.dy_xmu == 0 || std::abs(sums.dy_xmu) >= static_cast<double>(q_.count()) * kTiny);
      if (!exact && !fits) return false;
      write(args.grad_weight, c, sums.dy_xmu * s.invstd);
      write(args.grad_bias, c, sums.dy);
      if (!frozen) set_input_grad(a, args, c, sums);
      return true;
    };
    const auto again = [](int64_t, int64_t) {};
    const auto finish = [&](int64_t c0, int64_t c1) {
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
    const bool frozen = !args.save_stats;
    constexpr int kDoubleSums = 5;
    Arrays<double> partials(kDoubleSums * p_.slices, q_.c);
    Coefficients<C> a(p_, k.spread, 11);
    const auto arrays = [&] {
      return DoubleBackwardArrays{a.of(0), a.of(1), a.of(2), a.of(3), a.of(4), a.of(5),
                                  a.of(6), a.of(7), a.of(8), a.of(9), a.of(10)};
    };
    const auto begin = [&](int64_t c0, int64_t c1) {
      for (int64_t c = c0; c < c1; ++c)
        set_affine(a, c, statistics(args, c), args.weight, args.bias);
      a.publish(c0, c1, 0, forward_arrays());
    };
    const auto reduce = [&](const Task& task, bool) {
      if (frozen && !args.grad_weight) return;  // what follows is made of no sums
      double* sums[kDoubleSums];
      of_slice(partials, task.slice, sums);
      k.sums(p_, task, arrays(), args, q_.act, sums);
    };
    const auto settle = [&](int64_t c, const double* sums, bool) {
      const Statistics s = statistics(args, c);
      const auto d = make_double_backward(
          {sums[0], sums[1], sums[2], sums[3], sums[4]}, static_cast<double>(q_.count()), frozen,
          s.rounding(), s.invstd, read(args.weight, c, 1), read(args.grad_grad_weight, c, 0),
          read(args.grad_grad_bias, c, 0));
      int64_t array = 3;
      for (const double value : {s.invstd, d.a_u, d.a_h, d.a_1, d.b_g, d.b_u, d.b_h, d.b_1})
        a.at(array++, c) = static_cast<C>(value);
      write(args.grad_weight, c, d.grad_weight);
      return true;
    };
    const auto again = [](int64_t, int64_t) {};
    const auto finish = [&](int64_t c0, int64_t c1) { a.publish(c0, c1, 3, 11); };
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

  // From statistics to what outlives the call.
  void save(const ForwardArgs& args, int64_t c, const Statistics& s) const {
    args.save_stats[c] = s.mean;
    args.save_stats[q_.c + c] = s.invstd;
    args.save_stats[2 * q_.c + c] = s.low;
  }
  void update_running(const ForwardArgs& args, double factor, int64_t c, double mean,
                      double variance) const {
    const auto update = [&](ParamOut running, double value) {
      if (running) write(running, c, (1 - factor) * read(running, c) + factor * value);
    };
    update(args.running_mean, mean);
    update(args.running_var, variance);
  }

  // A backward's: the batch's, or else the running ones.
  template <class Args>
  Statistics statistics(const Args& args, int64_t c) const {
    if (args.save_stats)
      return {args.save_stats[c], args.save_stats[q_.c + c], args.save_stats[2 * q_.c + c]};
    return {read(args.running_mean, c, 0), inverse_std(read(args.running_var, c, 1), args.eps)};
  }

  // From statistics and sums to coefficients.
  void set_affine(Coefficients<C>& arrays, int64_t c, const Statistics& s, ParamIn weight,
                  ParamIn bias) const {
    const auto a = make_affine<C>(s.mean, s.invstd, read(weight, c, 1), read(bias, c, 0), s.low);
    arrays.at(0, c) = a.mean, arrays.at(1, c) = a.scale, arrays.at(2, c) = a.shift;
  }
  void set_input_grad(Coefficients<C>& arrays, const BackwardArgs& args, int64_t c,
                      const GradSums& sums) const {
    const Statistics s = statistics(args, c);
    const double count = static_cast<double>(q_.count());
    const auto g = make_input_grad<C>(s.mean, s.invstd, read(args.weight, c, 1), sums.dy / count,
                                      sums.dy_xmu / count, s.low);
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
