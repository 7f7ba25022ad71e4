// How a plan runs on a CPU: which kernel works on which span, in which order, and the per-channel
// work in between, in doubles. Threads are injected: parallel(n, f) calls f(begin, end) on parts of
// [0, n). Includes no torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "../formulas.h"
#include "../moments.h"
#include "kernels.h"

namespace bnext {

// A bfloat16 of a parameter; the kernels convert theirs as vectors.
struct HostBFloat16 {
  uint16_t bits;

  HostBFloat16() = default;
  explicit HostBFloat16(double value) {
    const float single = static_cast<float>(value);
    uint32_t word;
    std::memcpy(&word, &single, sizeof word);
    const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;  // to nearest even
    bits = static_cast<uint16_t>(std::isnan(single) ? 0x7fc0 : rounded);
  }
  operator double() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
};

inline double read(ParamIn v, int64_t c, double absent) {
  if (!v) return absent;
  return visit_dtype<HostBFloat16, _Float16>(v.dtype, [&](auto t) -> double {
    return static_cast<const decltype(t)*>(v.data)[c * v.stride];
  });
}

inline double read(ParamOut v, int64_t c) {
  return read(ParamIn{v.data, v.stride, v.dtype}, c, 0);
}

inline void write(ParamOut v, int64_t c, double value) {
  if (!v) return;
  visit_dtype<HostBFloat16, _Float16>(v.dtype, [&](auto t) {
    static_cast<decltype(t)*>(v.data)[c * v.stride] = static_cast<decltype(t)>(value);
  });
}

// Scratch of one call: `arrays` of `length` values, readable kBinPadding past their ends.
template <class T>
class Arrays {
 public:
  Arrays(int64_t arrays, int64_t length)
      : length_(length + kBinPadding), data_(new (std::nothrow) T[arrays * length_]()) {
    if (!data_)
      throw std::runtime_error("bnext: not enough memory: you tried to allocate " +
                               std::to_string(arrays * length_ * sizeof(T)) + " bytes.");
  }
  T* operator[](int64_t i) { return data_.get() + i * length_; }

 private:
  int64_t length_;
  std::unique_ptr<T[]> data_;
};

// The spans of a plan. C is the compute type: double for float64, else float.
template <class C, class Parallel>
class Schedule {
 public:
  Schedule(const CpuPlan& plan, const Problem& problem, const Parallel& parallel)
      : p_(plan), q_(problem), parallel_(parallel) {}

  // The counter must move whatever the plan, so it does here.
  void train_forward(const ForwardArgs& args) {
    // Scratch comes first: where memory runs out, nothing may have been counted.
    Arrays<double> partials(2 * p_.slices + 1, std::max(p_.bins, p_.slices));
    double* const counts = partials[2 * p_.slices];  // values of a bin in each slice
    for (int64_t slice = 0; slice < p_.slices; ++slice)
      counts[slice] = static_cast<double>(slice_values(slice));
    Arrays<C> coefficients(3, p_.bins);
    double factor = args.momentum;
    if (args.num_batches_tracked) ++*args.num_batches_tracked;
    if (args.cumulative)
      factor = args.num_batches_tracked ? 1 / static_cast<double>(*args.num_batches_tracked) : 0;
    const ForwardArrays arrays{coefficients[0], coefficients[1], coefficients[2]};

    const auto& k = table<ForwardKernels>();
    const auto reduce = [&](int64_t slice, int64_t bin0, int64_t bin1) {
      k.moments(p_, span(slice, bin0, bin1), args.input, partial(partials, slice));
    };
    const auto finish = [&](int64_t c) {
      const Moments<double> m = moments(partials, counts, c);
      const Statistics s{m.mean, inverse_std(m.m2 / m.count, args.eps)};
      save(args, c, s);
      update_running(args, factor, c, m);
      set_affine(coefficients, c, s, args.weight, args.bias);
    };
    const auto apply = [&](int64_t slice, int64_t bin0, int64_t bin1) {
      k.apply(p_, span(slice, bin0, bin1), arrays, args, q_.act);
    };
    run(reduce, finish, apply);
  }

  void eval_forward(const ForwardArgs& args) {
    Arrays<C> coefficients(3, p_.bins);
    const ForwardArrays arrays{coefficients[0], coefficients[1], coefficients[2]};
    for (int64_t c = 0; c < q_.c; ++c)
      set_affine(coefficients, c,
                 {read(args.frozen_mean, c, 0), inverse_std(read(args.frozen_var, c, 1), args.eps)},
                 args.weight, args.bias);
    const auto& k = table<ForwardKernels>();
    for_each_task([&](int64_t slice, int64_t bin0, int64_t bin1) {
      k.apply(p_, span(slice, bin0, bin1), arrays, args, q_.act);
    });
  }

  void backward(const BackwardArgs& args) {
    const bool frozen = !args.save_stats;
    Arrays<double> partials(2 * p_.slices, p_.bins);
    Arrays<C> coefficients(7, p_.bins);
    const BackwardArrays arrays{coefficients[0], coefficients[1], coefficients[2], coefficients[3],
                                coefficients[4], coefficients[5], coefficients[6]};
    for (int64_t c = 0; c < q_.c; ++c) {
      set_affine(coefficients, c, statistics(args, c), args.weight, args.bias);
      if (frozen) set_input_grad(coefficients, args, c, {0, 0});
    }
    const auto& k = table<BackwardKernels>();
    const auto reduce = [&](int64_t slice, int64_t bin0, int64_t bin1) {
      k.sums(p_, span(slice, bin0, bin1), arrays, args, q_.act, partial(partials, slice));
    };
    const auto finish = [&](int64_t c) {
      const GradSums sums = grad_sums(partials, args, c);
      write(args.grad_weight, c, sums.dy_xmu * statistics(args, c).invstd);
      write(args.grad_bias, c, sums.dy);
      if (!frozen) set_input_grad(coefficients, args, c, sums);
    };
    const auto apply = [&](int64_t slice, int64_t bin0, int64_t bin1) {
      k.apply(p_, span(slice, bin0, bin1), arrays, args, q_.act, {});
    };
    const bool applies = args.grad_input || args.grad_residual;
    const bool sums = !frozen || args.grad_weight || args.grad_bias;
    if (!frozen && applies) {
      run(reduce, finish, apply);
      return;
    }
    const auto kernel = !sums ? k.frozen : applies ? k.frozen_and_sums : k.sums;
    for_each_task([&](int64_t slice, int64_t bin0, int64_t bin1) {
      kernel(p_, span(slice, bin0, bin1), arrays, args, q_.act, partial(partials, slice));
    });
    for (int64_t c = 0; sums && c < q_.c; ++c) finish(c);
  }

  void double_backward(const DoubleBackwardArgs& args) {
    const auto& k = table<DoubleBackwardKernels>();
    const bool frozen = !args.save_stats;
    constexpr int kSums = 5;
    Arrays<double> partials(kSums * p_.slices, p_.bins);
    Arrays<C> a(11, p_.bins);
    const DoubleBackwardArrays arrays{a[0], a[1], a[2], a[3], a[4], a[5],
                                      a[6], a[7], a[8], a[9], a[10]};
    for (int64_t c = 0; c < q_.c; ++c)
      set_affine(a, c, statistics(args, c), args.weight, args.bias);
    const auto reduce = [&](int64_t slice, int64_t bin0, int64_t bin1) {
      if (frozen && !args.grad_weight) return;  // what follows is made of no sums
      double* sums[kSums];
      for (int i = 0; i < kSums; ++i) sums[i] = partials[kSums * slice + i];
      k.sums(p_, span(slice, bin0, bin1), arrays, args, q_.act, sums);
    };
    const auto finish = [&](int64_t c) {
      double total[kSums] = {};
      for_each_partial(c, [&](int64_t slice, int64_t bin) {
        for (int i = 0; i < kSums; ++i) total[i] += partials[kSums * slice + i][bin];
      });
      const Statistics s = statistics(args, c);
      const auto d = make_double_backward(
          {total[0], total[1], total[2], total[3], total[4]}, static_cast<double>(q_.count()),
          frozen, s.rounding(), s.invstd, read(args.weight, c, 1),
          read(args.grad_grad_weight, c, 0), read(args.grad_grad_bias, c, 0));
      int64_t array = 3;
      for (const double value : {s.invstd, d.a_u, d.a_h, d.a_1, d.b_g, d.b_u, d.b_h, d.b_1})
        fill(a, array++, c, {static_cast<C>(value)});
      write(args.grad_weight, c, d.grad_weight);
    };
    const auto apply = [&](int64_t slice, int64_t bin0, int64_t bin1) {
      if (q_.applies()) k.apply(p_, span(slice, bin0, bin1), arrays, args, q_.act);
    };
    run(reduce, finish, apply);
  }

 private:
  template <class Table>
  const Table& table() const {
    return kernels<Table>(p_.isa, q_.dtype);
  }

  struct Statistics {
    double mean, invstd;

    // What the mean loses where it is rounded to the compute type, as kernels subtract it.
    double rounding() const { return mean - static_cast<double>(static_cast<C>(mean)); }
  };

  // f(slice, bin) for the partial results of a channel, in the order in which they join.
  template <class F>
  void for_each_partial(int64_t c, const F& f) const {
    for (int64_t bin = c * p_.bins_per_channel; bin < (c + 1) * p_.bins_per_channel; ++bin)
      for (int64_t slice = 0; slice < p_.slices; ++slice) f(slice, bin);
  }

  // From sums to statistics.
  Moments<double> moments(Arrays<double>& partials, const double* counts, int64_t c) const {
    Moments<double> all{0, 0, 0};
    for_each_partial(c, [&](int64_t slice, int64_t bin) {
      const Partial part = partial(partials, slice);
      const Moments<double> m{counts[slice], part.first[bin], part.second[bin]};
      if (m.count > 0) all = all.count > 0 ? combine(all, m) : m;
    });
    return all;
  }
  GradSums grad_sums(Arrays<double>& partials, const BackwardArgs& args, int64_t c) const {
    GradSums all{0, 0};
    for_each_partial(c, [&](int64_t slice, int64_t bin) {
      all.dy += partial(partials, slice).first[bin];
      all.dy_xmu += partial(partials, slice).second[bin];
    });
    all.dy_xmu -= statistics(args, c).rounding() * all.dy;  // kernels subtract the rounded mean
    return all;
  }

  // From statistics to what outlives the call.
  void save(const ForwardArgs& args, int64_t c, const Statistics& s) const {
    args.save_stats[c] = s.mean;
    args.save_stats[q_.c + c] = s.invstd;
  }
  void update_running(const ForwardArgs& args, double factor, int64_t c,
                      const Moments<double>& m) const {
    const auto update = [&](ParamOut running, double value) {
      if (running) write(running, c, (1 - factor) * read(running, c) + factor * value);
    };
    update(args.running_mean, m.mean);
    update(args.running_var, m.m2 / (m.count - 1));  // unbiased
  }

  // A backward's: the batch's, or else the running ones.
  template <class Args>
  Statistics statistics(const Args& args, int64_t c) const {
    if (args.save_stats) return {args.save_stats[c], args.save_stats[q_.c + c]};
    return {read(args.running_mean, c, 0), inverse_std(read(args.running_var, c, 1), args.eps)};
  }
  int64_t chunk_of(int64_t slice) const {
    return std::min(p_.chunks, slice * ((p_.chunks + p_.slices - 1) / p_.slices));
  }
  Span span(int64_t slice, int64_t bin0, int64_t bin1) const {
    return {chunk_of(slice), chunk_of(slice + 1), bin0, bin1};
  }
  int64_t slice_values(int64_t slice) const {
    return chunk_values(p_, chunk_of(slice), chunk_of(slice + 1));
  }
  Partial partial(Arrays<double>& partials, int64_t slice) const {
    return {partials[2 * slice], partials[2 * slice + 1]};
  }

  // From statistics and sums to coefficients: the same values in `arrays` [first, ...) for every
  // bin of channel c.
  void fill(Arrays<C>& arrays, int64_t first, int64_t c, std::initializer_list<C> values) const {
    for (const C value : values)
      std::fill_n(arrays[first++] + c * p_.bins_per_channel, p_.bins_per_channel, value);
  }
  void set_affine(Arrays<C>& arrays, int64_t c, const Statistics& s, ParamIn weight,
                  ParamIn bias) const {
    const auto a = make_affine<C>(s.mean, s.invstd, read(weight, c, 1), read(bias, c, 0));
    fill(arrays, 0, c, {a.mean, a.scale, a.shift});
  }
  void set_input_grad(Arrays<C>& arrays, const BackwardArgs& args, int64_t c,
                      const GradSums& sums) const {
    const Statistics s = statistics(args, c);
    const double count = static_cast<double>(q_.count());
    const auto g = make_input_grad<C>(s.mean, s.invstd, read(args.weight, c, 1), sums.dy / count,
                                      sums.dy_xmu / count);
    fill(arrays, 3, c, {g.invstd, g.a, g.b, g.c});
  }

  // f(slice, bin0, bin1) for every task; each thread takes its own last one first, so that a
  // second pass begins with what the first left in the cache.
  template <class F>
  void for_each_task(const F& f) const {
    const int64_t blocks = (p_.bins + p_.block - 1) / p_.block;
    parallel_(blocks * p_.slices, p_.grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = end - 1; task >= begin; --task) {
        const int64_t bin0 = task % blocks * p_.block;
        f(task / blocks, bin0, std::min(p_.bins, bin0 + p_.block));
      }
    });
  }

  template <class Reduce, class Finish, class Apply>
  void run(const Reduce& reduce, const Finish& finish, const Apply& apply) const {
    if (p_.family == Family::kResident) {
      parallel_(p_.tasks, p_.grain, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t bin0 = task * p_.block, bin1 = std::min(p_.bins, bin0 + p_.block);
          for (int64_t slice = 0; slice < p_.slices; ++slice) reduce(slice, bin0, bin1);
          for (int64_t c = bin0 / p_.bins_per_channel; c < bin1 / p_.bins_per_channel; ++c)
            finish(c);
          for (int64_t slice = p_.slices; slice-- > 0;) apply(slice, bin0, bin1);
        }
      });
    } else {
      for_each_task(reduce);
      for (int64_t c = 0; c < q_.c; ++c) finish(c);
      for_each_task(apply);
    }
  }

  const CpuPlan& p_;
  const Problem& q_;
  const Parallel& parallel_;
};

}  // namespace bnext
