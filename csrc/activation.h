// The activation y = f(z) of z = bn(x) + residual: its kinds, what backward needs of each, which
// backends' kernels take it, and f itself. T is a device scalar or a host vector with operator<=,
// operator! and keep() of its own. Includes only the standard library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>

// Small functions of host and device. Always inline on the host: gcc left some out of line.
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

// What backward needs to know of z: nothing; which of two values f' takes (one bit, kept in a mask
// where there is a residual); or z itself (computed again from the input and the residual).
enum class Needs : uint8_t { kNothing, kSign, kSum };

struct ActTraits {
  const char* name;
  Needs needs;
  bool on_cpu, on_cuda;  // whether the kernels take it; if not, torch's operation follows them
};

// In the order of Act.
inline constexpr ActTraits kActs[] = {
    {"none", Needs::kNothing, true, true},  {"relu", Needs::kSign, true, true},
    {"relu6", Needs::kSign, false, false},  {"leaky_relu", Needs::kSign, false, false},
    {"silu", Needs::kSum, false, false},    {"hardswish", Needs::kSum, false, false},
    {"gelu", Needs::kSum, false, false},    {"gelu_tanh", Needs::kSum, false, false},
    {"elu", Needs::kSum, false, false},     {"tanh", Needs::kSum, false, false},
    {"sigmoid", Needs::kSum, false, false},
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

// Whether z passes the activation. NaN does, as in torch.
template <class T>
BNEXT_HD inline auto passes(const T& z) {
  return !(z <= T(0));
}

template <class T>
BNEXT_HD inline T keep(bool passed, T z) {
  return passed ? z : T(0);
}

// f(z) and dy * f'(z), given whether z passed.
template <Act kAct, class Passed, class T>
BNEXT_HD inline T activate(const Passed& passed, const T& z) {
  static_assert(kAct == Act::kRelu);
  return keep(passed, z);
}
template <Act kAct, class Passed, class T>
BNEXT_HD inline T activate_backward(const Passed& passed, const T& dy) {
  static_assert(kAct == Act::kRelu);
  return keep(passed, dy);
}

}  // namespace bnext
