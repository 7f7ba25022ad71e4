// The activation: y = f(z), z = bn(x) + residual. Its kinds, what backward needs of each, f and
// f'. Includes the standard library only.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>

// Small functions of host and device, inline on both: gcc left some out of line.
#ifdef __CUDACC__
#define BNEXT_HD __host__ __device__
#else
#define BNEXT_HD [[gnu::always_inline]]
#endif

namespace bnext {

enum class Act : uint8_t {
  kNone,
  kRelu,
  kRelu6,
  kLeakyRelu,
  kSilu,
  kHardswish,
  kGelu,
  kGeluTanh,
  kElu,
  kTanh,
  kSigmoid,
};

// What backward needs to know of z: where f' takes which of two values (a bit, kept in a mask
// where there is a residual), or z itself (computed again from the input and the residual).
enum class Needs : uint8_t { kNothing, kSign, kSum };

struct ActTraits {
  const char* name;
  Needs needs;
};

// In the order of Act.
inline constexpr ActTraits kActs[] = {
    {"none", Needs::kNothing},    {"relu", Needs::kSign},     {"relu6", Needs::kSign},
    {"leaky_relu", Needs::kSign}, {"silu", Needs::kSum},      {"hardswish", Needs::kSum},
    {"gelu", Needs::kSum},        {"gelu_tanh", Needs::kSum}, {"elu", Needs::kSum},
    {"tanh", Needs::kSum},        {"sigmoid", Needs::kSum},
};
inline constexpr Act kLastAct = static_cast<Act>(std::size(kActs) - 1);
static_assert(kLastAct == Act::kSigmoid);

constexpr const ActTraits& traits(Act a) {
  return kActs[static_cast<size_t>(a)];
}
constexpr const char* to_string(Act a) {
  return traits(a).name;
}
constexpr const char* to_string(Needs n) {
  return n == Needs::kNothing ? "nothing" : n == Needs::kSign ? "sign" : "sum";
}

template <class T>
BNEXT_HD inline T select(bool condition, const T& yes, const T& no) {
  return condition ? yes : no;
}

// Each kind: f(z), and f'(z) times dy. Where two values of f' are enough, passes(z) chooses, and
// gradient(passed, dy) follows. T is a scalar or a vector with operators and functions of its own;
// `a` is the parameter. At the kinks and at NaN as torch.
template <Act>
struct Activation;

template <>
struct Activation<Act::kRelu> {
  static constexpr Needs needs = Needs::kSign;
  template <class T>
  BNEXT_HD static auto passes(const T& z) {
    return !(z <= T(0));
  }
  template <class T>
  BNEXT_HD static T f(const T& z, const T&) {
    return select(passes(z), z, T(0));
  }
  template <class Passed, class T>
  BNEXT_HD static T gradient(const Passed& passed, const T& dy, const T&) {
    return select(passed, dy, T(0));
  }
};

template <>
struct Activation<Act::kRelu6> : Activation<Act::kRelu> {
  template <class T>
  BNEXT_HD static auto passes(const T& z) {
    return (!(z <= T(0))) & (!(T(6) <= z));
  }
  template <class T>
  BNEXT_HD static T f(const T& z, const T&) {
    return select(passes(z), z, select(z <= T(0), T(0), T(6)));
  }
};

template <>
struct Activation<Act::kLeakyRelu> {
  static constexpr Needs needs = Needs::kSign;
  template <class T>
  BNEXT_HD static auto passes(const T& z) {
    return T(0) < z;
  }
  template <class T>
  BNEXT_HD static T f(const T& z, const T& a) {
    return select(passes(z), z, z * a);
  }
  template <class Passed, class T>
  BNEXT_HD static T gradient(const Passed& passed, const T& dy, const T& a) {
    return select(passed, dy, dy * a);
  }
};

template <>
struct Activation<Act::kSilu> {
  static constexpr Needs needs = Needs::kSum;
  template <class T>
  BNEXT_HD static T f(const T& z, const T&) {
    return z * sigmoid(z);
  }
  template <class T>
  BNEXT_HD static T df(const T& z, const T&) {
    const T s = sigmoid(z);
    return s * fma(z, T(1) - s, T(1));
  }
};

template <>
struct Activation<Act::kHardswish> {
  static constexpr Needs needs = Needs::kSum;
  template <class T>
  BNEXT_HD static T f(const T& z, const T&) {
    const T share = select(z <= T(-3), T(0), select(T(3) <= z, T(1), (z + T(3)) * T(1.0 / 6)));
    return z * share;
  }
  template <class T>
  BNEXT_HD static T df(const T& z, const T&) {
    const T slope = z * T(1.0 / 3) + T(0.5);
    return select(z <= T(-3), T(0), select(z < T(3), slope, T(1)));
  }
};

template <>
struct Activation<Act::kGelu> {
  static constexpr Needs needs = Needs::kSum;
  template <class T>
  BNEXT_HD static T f(const T& z, const T&) {
    return z * cdf(z);
  }
  template <class T>
  BNEXT_HD static T df(const T& z, const T&) {
    using std::exp;
    return cdf(z) + z * exp(z * z * T(-0.5)) * T(0.39894228040143268);  // 1 / sqrt(2 pi)
  }

 private:
  template <class T>
  BNEXT_HD static T cdf(const T& z) {
    using std::erf;
    return T(0.5) + T(0.5) * erf(z * T(0.70710678118654752));
  }
};

template <>
struct Activation<Act::kGeluTanh> {
  static constexpr Needs needs = Needs::kSum;
  template <class T>
  BNEXT_HD static T f(const T& z, const T&) {
    return z * (T(0.5) + T(0.5) * t(z));
  }
  template <class T>
  BNEXT_HD static T df(const T& z, const T&) {
    const T u = t(z), inner = T(kScale) + z * z * T(3 * kScale * kCubic);
    return T(0.5) + T(0.5) * (u + z * (T(1) - u * u) * inner);
  }

 private:
  static constexpr double kScale = 0.79788456080286536, kCubic = 0.044715;  // sqrt(2 / pi)
  template <class T>
  BNEXT_HD static T t(const T& z) {
    using std::tanh;
    return tanh(z * (T(kScale) + z * z * T(kScale * kCubic)));
  }
};

template <>
struct Activation<Act::kElu> {
  static constexpr Needs needs = Needs::kSum;
  template <class T>
  BNEXT_HD static T f(const T& z, const T& a) {
    using std::expm1;
    return select(z <= T(0), a * expm1(z), z);
  }
  template <class T>
  BNEXT_HD static T df(const T& z, const T& a) {
    using std::exp;
    return select(z <= T(0), a * exp(z), T(1));
  }
};

template <>
struct Activation<Act::kTanh> {
  static constexpr Needs needs = Needs::kSum;
  template <class T>
  BNEXT_HD static T f(const T& z, const T&) {
    using std::tanh;
    return tanh(z);
  }
  template <class T>
  BNEXT_HD static T df(const T& z, const T& a) {
    const T t = f(z, a);
    return T(1) - t * t;
  }
};

template <>
struct Activation<Act::kSigmoid> {
  static constexpr Needs needs = Needs::kSum;
  template <class T>
  BNEXT_HD static T f(const T& z, const T&) {
    return sigmoid(z);
  }
  template <class T>
  BNEXT_HD static T df(const T& z, const T&) {
    const T s = sigmoid(z);
    return s * (T(1) - s);
  }
};

// g(Activation<a>), of those that need the sign or the sum.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class G>
BNEXT_HD inline decltype(auto) visit_sign(Act a, const G& g) {
  switch (a) {
    case Act::kRelu6:
      return g(Activation<Act::kRelu6>{});
    case Act::kLeakyRelu:
      return g(Activation<Act::kLeakyRelu>{});
    default:
      return g(Activation<Act::kRelu>{});
  }
}
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class G>
BNEXT_HD inline decltype(auto) visit_act(Act a, const G& g) {
  switch (a) {
    case Act::kSilu:
      return g(Activation<Act::kSilu>{});
    case Act::kHardswish:
      return g(Activation<Act::kHardswish>{});
    case Act::kGelu:
      return g(Activation<Act::kGelu>{});
    case Act::kGeluTanh:
      return g(Activation<Act::kGeluTanh>{});
    case Act::kElu:
      return g(Activation<Act::kElu>{});
    case Act::kTanh:
      return g(Activation<Act::kTanh>{});
    case Act::kSigmoid:
      return g(Activation<Act::kSigmoid>{});
    default:
      return visit_sign(a, g);
  }
}

}  // namespace bnext
