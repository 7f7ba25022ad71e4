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

// Whether a backward kernel has a loop that activations share.
template <int V, IndexMap kMap, Ends kEnds>
inline constexpr bool is_shared = V <= most_shared_vector(kMap, kEnds);

// kShared: whether the kernel has a loop of any gate too.
template <class Loops, bool kShared>
__device__ inline bool has_loop_of_its_own(const Problem& p) {
  return Loops::kAlone && (!kShared || has_gate_of_its_own(p)) && (!p.has_mask || Loops::kMasks);
}

// f(gate). kDone: what passes a sign has passed it.
template <class Loops, bool kShared, bool kDone, class F>
__device__ inline void with_gate(const Problem& p, const F& f) {
  if constexpr (Loops::kAlone)
    if (has_loop_of_its_own<Loops, kShared>(p)) {
      if constexpr (Loops::kMasks)
        if (p.has_mask) return f(Constant<Gate::kMask>{});
      if constexpr (!kDone)
        if (p.act != Act::kNone) return f(Constant<Gate::kSign>{});
      return f(Constant<Gate::kNone>{});
    }
  if constexpr (kShared) f(Constant<Gate::kAny>{});
}

// dy of the k-th item's element v through the gate, whichever it is.
template <class T, int V, bool kShared, class Items, class C>
__device__ inline C pass_one(const BackwardCall& call, const Items& items, int k, int v,
                             const Affine<C>& affine, C x, C dy) {
  const BackwardArgs& args = call.args;
  const Act act = call.problem.act;
  const C param = static_cast<C>(args.act_param);
  C dy_value[1] = {dy}, z[1] = {apply(affine, x)};
  if (act == Act::kNone) return dy;
  if (args.mask) {
    const uint8_t byte = args.mask[items.mask_base() + items.mask(k)];
    activate_backward(act, param, items.bits_of_byte(byte) >> v, dy_value);
    return dy_value[0];
  }
  if (kShared && args.residual)
    z[0] += to_compute(static_cast<const T*>(args.residual)[(items.base() + items(k)) * V + v]);
  activate_backward<sizeof(T) == 2>(kShared ? act : Act::kRelu, param, z, dy_value);
  return dy_value[0];
}

// A thread's view of it: affines of its bins, and what else there is to read.
template <Gate kGate, class T, int V, class Items>
class GateOf {
  using C = compute_t<T>;
  static constexpr int kBins = Items::kBins, kUnits = Item<T, V>::kUnits;
  static constexpr bool kByThreshold = kGate == Gate::kSign && Item<T, V>::kPairs;
  static constexpr bool kQuick = sizeof(T) == 2;
  using Relu = Activation<Act::kRelu>;

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
        act_(call.problem.act),
        param_(static_cast<C>(call.args.act_param)),
        mask_(compiled(call.args.mask) ? call.args.mask + items.mask_base() : nullptr),
        residual_(compiled(call.args.residual) ? items_in<T, V>(call.args.residual, items)
                                               : nullptr) {
#pragma unroll
    for (int v = 0; v < kBins; ++v) {
      const Prepared<C>& p = prepared[items.channel(v)];
      affine_[v] = {p.mean, p.scale, p.shift};
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

  __device__ C mean(int v) const { return affine_[v % kBins].mean; }

  // What there is to read besides x and dy of the k-th item, `at` items from the base.
  __device__ More more(int k, unsigned at) const {
    More m;
    if constexpr (kGate == Gate::kMask || kGate == Gate::kAny)
      if (mask_) m.bits = items_.bits_of_byte(mask_[items_.mask(k)]);
    if constexpr (kGate == Gate::kAny)
      if (residual_) m.residual = load(residual_ + at);
    return m;
  }

  // dy of an item as computed with, and in elements but for kAny.
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
    }
  }

 private:
  __device__ C z(int v, C x) const { return apply(affine_[v % kBins], x); }

  const Items& items_;
  Act act_;
  C param_;
  const uint8_t* mask_;
  const Item<T, V>* residual_;
  Affine<C> affine_[kBins];
  unsigned threshold_[kUnits], sign_[kUnits];
};

}  // namespace bnext
