// What dy goes through on its way back: the activation's derivative, from what backward knows of z.
#pragma once

#include "../formulas.h"
#include "activation.cuh"
#include "exchange.cuh"
#include "launch.h"

namespace bnext {

using BackwardCall = Call<BackwardArgs>;

enum class Gate : uint8_t {
  kNone,  // no activation
  kSign,  // ReLU, by the sign of z, computed from x as the forward did
  kMask,  // ReLU and ReLU6, by a mask
  kAny,   // any, from z, or from a mask where that is enough
};

// Coefficients of a channel that need no sums. ReLU's sign in 16 bits: z does not fall as
// x xor `sign` rises, and passes where that is greater than `threshold`.
template <class C>
struct Prepared {
  C mean, scale, shift;      // the forward's
  C threshold, sign;         // as bits
  C unit, mean_units, none;  // a power of two near 1 / std, and the mean times it
};
static_assert(sizeof(Prepared<double>) <= kPreparedBytes);

// The last of the ordered values of T at which z does not pass, by bisection: exact, since rounding
// keeps the order.
template <class T>
__device__ inline void find_threshold(const Affine<float>& affine, unsigned& threshold,
                                      unsigned& sign) {
  constexpr int kInfinity = std::is_same_v<T, bfloat16> ? 0x7f80 : 0x7c00;
  const auto bits = [](int key) {
    return static_cast<unsigned short>(key < 0 ? 0x8000 | -key : key);
  };
  sign = affine.scale < 0 ? 0x8000 : 0;
  const auto passes_at = [&](int key) {
    const unsigned short x = static_cast<unsigned short>(bits(key) ^ sign);
    return Activation<Act::kRelu>::passes(apply(affine, to_compute(reinterpret_cast<const T&>(x))));
  };
  int low = -kInfinity, high = kInfinity;
#pragma unroll 1
  while (high - low > 1) {
    const int middle = (low + high) >> 1;
    (passes_at(middle) ? high : low) = middle;
  }
  threshold = bits(passes_at(kInfinity - 1) ? low : kInfinity);
}

// A thread's view of it: affines of its bins, and what else there is to read.
template <Gate kGate, class T, int V, class Items>
class GateOf {
  using C = compute_t<T>;
  static constexpr int kBins = Items::kBins, kUnits = Item<T, V>::kUnits;
  static constexpr bool kByThreshold = kGate == Gate::kSign && Item<T, V>::kPairs;
  static constexpr bool kQuick = sizeof(T) == 2;
  using Relu = Activation<Act::kRelu>;
  // From shared memory each time, where there are no registers for it.
  static constexpr bool kReadsAffine = kGate == Gate::kAny && kBins > 1;

 public:
  static constexpr bool kReadsX = kGate == Gate::kSign || kGate == Gate::kAny;
  // Whether dy becomes zero or stays as it is: what a slab may keep instead of it.
  static constexpr bool kIsExact = kGate == Gate::kSign || kGate == Gate::kMask;

  struct More {  // of an item
    unsigned bits = 0;
    Item<T, V> residual;
  };

  __device__ GateOf(const BackwardCall& call, const Items& items, const Prepared<C>* prepared)
      : items_(items),
        prepared_(prepared),
        act_(call.problem.act),
        param_(static_cast<C>(call.args.act_param)),
        mask_(kMasks && call.args.mask ? call.args.mask + items.mask_base() : nullptr),
        residual_(call.args.residual ? items_in<T, V>(call.args.residual, items) : nullptr) {
#pragma unroll
    for (int v = 0; v < kBins; ++v) {
      if constexpr (kReadsAffine) {
        channel_[v] = static_cast<unsigned>(items.channel(v));
      } else {
        const Prepared<C>& p = prepared[items.channel(v)];
        affine_[v] = {p.mean, p.scale, p.shift};
      }
    }
    if constexpr (kByThreshold) {
#pragma unroll
      for (int i = 0; i < (kBins == 1 ? 1 : kUnits); ++i) {
        const Prepared<C>& low = prepared[items.channel(2 * i)];
        const Prepared<C>& high = prepared[items.channel(kBins == 1 ? 0 : 2 * i + 1)];
        threshold_[i] = bits_of(low.threshold) | bits_of(high.threshold) << 16;
        sign_[i] = bits_of(low.sign) | bits_of(high.sign) << 16;
      }
    }
  }

  __device__ C mean(int v) const { return affine(v).mean; }

  // What there is to read besides x and dy of the k-th item, `at` items from the base.
  __device__ More more(int k, unsigned at) const {
    More m;
    if constexpr (kGate == Gate::kMask || kGate == Gate::kAny)
      if (mask_) m.bits = items_.bits_of_byte(mask_[items_.mask(k)]);
    if constexpr (kGate == Gate::kAny)
      if (residual_) m.residual = load(residual_ + at);
    return m;
  }

  // dy of an item, in elements and as computed with.
  __device__ void pass(const Item<T, V>& x_item, const C (&x)[V], const More& more,
                       Item<T, V>& dy_item, C (&dy)[V]) const {
    if constexpr (kGate == Gate::kMask) dy_item.keep(more.bits);
    if constexpr (kByThreshold) {
#pragma unroll
      for (int i = 0; i < kUnits; ++i)
        dy_item.units[i] &= greater_halves(x_item.units[i] ^ sign_[kBins == 1 ? 0 : i],
                                           threshold_[kBins == 1 ? 0 : i], T{});
    }
    dy_item.unpack(dy);
    if constexpr (kGate == Gate::kSign && !kByThreshold) {
#pragma unroll
      for (int v = 0; v < V; ++v) dy[v] = Relu::gradient(Relu::passes(z(v, x[v])), dy[v], C(0));
      dy_item = Item<T, V>::pack(dy);
    }
    if constexpr (kGate == Gate::kAny) {
      if (mask_) {
        activate_backward(act_, param_, more.bits, dy);
      } else {
        C z_values[V];
#pragma unroll
        for (int v = 0; v < V; ++v) z_values[v] = z(v, x[v]);
        if (residual_) {
          C added[V];
          more.residual.unpack(added);
#pragma unroll
          for (int v = 0; v < V; ++v) z_values[v] += added[v];
        }
        activate_backward<kQuick>(act_, param_, z_values, dy);
      }
      dy_item = Item<T, V>::pack(dy);
    }
  }

  // dy of one element, of one bin.
  __device__ C pass_one(int k, unsigned at, int v, const Affine<C>& affine, C x, C dy) const {
    C dy_value[1] = {dy};
    if constexpr (kGate == Gate::kMask || kGate == Gate::kAny)
      if (mask_) {
        activate_backward(act_, param_, items_.bits_of_byte(mask_[items_.mask(k)]) >> v, dy_value);
        return dy_value[0];
      }
    if constexpr (kGate == Gate::kSign)
      return Relu::gradient(Relu::passes(apply(affine, x)), dy, C(0));
    if constexpr (kGate == Gate::kAny) {
      C z_value[1] = {apply(affine, x)};
      if (residual_) z_value[0] += to_compute(reinterpret_cast<const T*>(residual_ + at)[v]);
      activate_backward<kQuick>(act_, param_, z_value, dy_value);
      return dy_value[0];
    }
    return dy;
  }

 private:
  __device__ Affine<C> affine(int v) const {
    if constexpr (!kReadsAffine) return affine_[v % kBins];
    const Prepared<C>& p = prepared_[opaque_again(channel_[v % kBins])];
    return {p.mean, p.scale, p.shift};
  }
  __device__ C z(int v, C x) const { return apply(affine(v), x); }

  const Items& items_;
  const Prepared<C>* prepared_;
  Act act_;
  C param_;
  const uint8_t* mask_;
  const Item<T, V>* residual_;
  unsigned channel_[kBins];
  Affine<C> affine_[kBins];
  unsigned threshold_[kUnits], sign_[kUnits];
};

}  // namespace bnext
