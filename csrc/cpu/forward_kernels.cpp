// The forward kernels: moments reads its input once, apply reads it (and the residual) and writes
// the output. Compiled per instruction set (BNEXT_ISA_NAMESPACE, see setup.py).
#include <cmath>

#include "../formulas.h"
#include "act.h"

namespace bnext::BNEXT_ISA_NAMESPACE {
namespace {

inline float to_scalar(float x) {
  return x;
}
inline double to_scalar(double x) {
  return x;
}
inline float to_scalar(bfloat16 x) {
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}
inline float to_scalar(float16 x) {
  HostFloat16 value;
  std::memcpy(&value, &x, sizeof value);
  return value;
}

// A pilot is the mean of values at scattered places, which depend on the number of values alone:
// neighbours of the first value, or evenly spaced ones, are one of padding, a drift or a pattern.
// Refused channels (see Schedule) of 10,000 of normal values: 44 with the first 8, none so.
inline int64_t place_of(int64_t k, int64_t places, int64_t values) {
  const double x = 0.6180339887498949 * static_cast<double>(k) + 0.5;
  return static_cast<int64_t>(static_cast<double>(values) *
                              (static_cast<double>(k) + (x - std::floor(x))) /
                              static_cast<double>(places));
}

// The sum of `count` rows of values, as a tree, into the first.
template <class C>
inline void tree_sum(C* values, int64_t count, int64_t row) {
  for (count /= 2; count > 0; count /= 2)
    for (int64_t i = 0; i < count * row; ++i) values[i] += values[i + count * row];
}

template <class T>
void pilots(const CpuPlan& p, int64_t c0, int64_t c1, const void* input, void* out) {
  using C = compute_t<T>;
  constexpr int64_t kTile = 64, kMaxPlaces = 64, kNeighbours = 16;
  const T* x = static_cast<const T*>(input);
  C* const pilot = static_cast<C*>(out);
  const int64_t samples = p.rows * p.fold + p.rest / (p.channels * p.width);
  const int64_t values = samples * p.width;
  const bool runs = p.width >= kNeighbours && values >= 784;
  const int64_t places = p.width == 1 && values >= 4096 ? 64 : runs ? 8 : 32;
  int64_t first[kMaxPlaces];  // element of channel 0
  for (int64_t k = 0; k < places; ++k) {
    const int64_t i = place_of(k, places, values), pixel = i % p.width;
    first[k] = i / p.width * p.channels * p.width +
               (runs ? std::min(pixel, p.width - kNeighbours) : pixel);
  }
  C sum[kMaxPlaces * kTile];
  // Side by side: neighbours of one channel, or values of several.
  const int64_t tile = runs ? 1 : kTile, step = runs ? 1 : p.width;
  const C share = C(1) / static_cast<C>(places * (runs ? kNeighbours : 1));
  for (int64_t c = c0; c < c1; c += tile) {
    const int64_t channels = std::min(tile, c1 - c), row = runs ? kNeighbours : channels;
    for (int64_t k = 0; k < places; ++k)
      for (int64_t i = 0; i < row; ++i)
        sum[k * row + i] = to_scalar(x[first[k] + c * p.width + i * step]) * share;
    tree_sum(sum, places, row);
    if (runs) tree_sum(sum, kNeighbours, 1);
    for (int64_t i = 0; i < channels; ++i) pilot[c + i] = sum[i] - sum[i] == 0 ? sum[i] : 0;
  }
}

template <class T, IndexMap kMap, class A>
struct Moments : BodyOf<T, kMap, 1, 0> {
  using Accumulator = A;
  static constexpr int kSums = 2;
  const void* centre;

  auto at(int64_t bin) const { return PerUnit<kMap, T, A>(centre, bin); }

  Unit<T> load(const PerUnit<kMap, T, A>&, const Place& place) const {
    return load_unit(this->in[0] + place.element);
  }
  template <class Keep>
  void add(const PerUnit<kMap, T, A>& c, const Place&, const Unit<T>& x, const Keep& kept,
           Vec<A> (*sums)[kSums]) const {
    unrolled<kVecs<T>>([&](auto j) {
      const Vec<A> d = keep(kept, j, convert<A>(x.v[j]) - c[j]);
      sums[j][0] = sums[j][0] + d;
      sums[j][1] = fma(d, d, sums[j][1]);
    });
  }
};

template <class T, IndexMap kIndexMap, Kind kKind, bool kResidual>
struct Forward : BodyOf<T, kIndexMap, 1 + kResidual, 1, true> {
  using C = compute_t<T>;
  static constexpr int kTogether = kKind == Kind::kAny ? AnyAct<T>::kUnits : 1;
  ForwardArrays arrays;
  AnyAct<T> act;

  struct Coefficients {
    PerUnit<kIndexMap, T> mean, scale, shift;
  };
  Coefficients at(int64_t bin) const {
    return {{arrays.mean, bin}, {arrays.scale, bin}, {arrays.shift, bin}};
  }

  Unit<T> load(const Coefficients& k, const Place& place) const {
    const Unit<T> x = load_unit(this->in[0] + place.element);
    Unit<T> residual, y;
    if constexpr (kResidual) residual = load_unit(this->in[1] + place.element);
    unrolled<kVecs<T>>([&](auto j) {
      y.v[j] = bnext::apply(Affine<Vec<C>>{k.mean[j], k.scale[j], k.shift[j]}, x.v[j]);
      if constexpr (kResidual) y.v[j] = y.v[j] + residual.v[j];
    });
    if constexpr (kResidual && kKind != Kind::kNone)
      if (this->mask)
        write_bits<T>(this->mask + place.mask_row, place.bit,
                      to_bits(act.template passes<kKind>(y)));
    if constexpr (kKind == Kind::kRelu)
      unrolled<kVecs<T>>([&](auto j) { y.v[j] = Activation<Act::kRelu>::f(y.v[j], {}); });
    return y;
  }
  void finish(Unit<T>* y, int count) const { act.activate(y->v, count * kVecs<T>); }
  template <bool kNontemporal>
  void apply(const Coefficients&, const Place& place, const Unit<T>& y) const {
    store_unit<kNontemporal>(this->out[0] + place.element, y);
  }
};

template <class T>
struct Table {
  template <class A>
  static void moments(const CpuPlan& p, const Task& task, const void* input, const void* centre,
                      Sums sums) {
    with_map(p.map, [&](auto map) {
      sum(Moments<T, map, A>{{{static_cast<const T*>(input)}, {}, nullptr}, centre}, p, task, sums);
    });
  }
  static void apply(const CpuPlan& p, const Task& task, const ForwardArrays& arrays,
                    const ForwardArgs& args, Act act) {
    with_map(p.map, [&](auto map) {
      with_kind(act, [&](auto kind) {
        with_bool(args.residual != nullptr, [&](auto residual) {
          Forward<T, map, kind, residual> body;
          body.in[0] = static_cast<const T*>(args.input);
          if constexpr (residual) body.in[1] = static_cast<const T*>(args.residual);
          body.out[0] = static_cast<T*>(args.output);
          body.mask = args.mask;
          body.arrays = arrays;
          body.act = {act, args.act_param};
          BNEXT_ISA_NAMESPACE::apply(body, p, task);
        });
      });
    });
  }
  using C = compute_t<T>;
  static constexpr ForwardKernels value{spread<T, C>,      pilots<T>,       moments<C>,
                                        spread<T, double>, moments<double>, apply};
};

}  // namespace

template <>
const ForwardKernels& kernels(DType dtype) {
  return table_of<Table>(dtype);
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
