// The functions of csrc/cpu/vec_math.h for ctypes, called as generic code calls them: floats and
// doubles as vectors and one by one. n is a multiple of 16.
#include "../../csrc/cpu/vec_math.h"

namespace {

using bnext::BNEXT_ISA_NAMESPACE::kLanes;
using bnext::BNEXT_ISA_NAMESPACE::Vec;

template <class X, class T, class F>
void each(const T* in, T* out, int64_t n, F f) {
  constexpr int64_t step = sizeof(X) / sizeof(T);
  for (int64_t i = 0; i < n; i += step) {
    X x;
    std::memcpy(&x, in + i, sizeof x);
    x = f(x);
    std::memcpy(out + i, &x, sizeof x);
  }
}

}  // namespace

#define FUNCTION(library, name)                                                  \
  extern "C" void bnext_##name(const void* in, void* out, int64_t n, int kind) { \
    const auto f = [](const auto& x) {                                           \
      using library::name;                                                       \
      return name(x);                                                            \
    };                                                                           \
    const auto run = [&]<class X, class T>(X, T) {                               \
      each<X>(static_cast<const T*>(in), static_cast<T*>(out), n, f);            \
    };                                                                           \
    if (kind == 0) run(Vec<float>(), float());                                   \
    if (kind == 1) run(Vec<double>(), double());                                 \
    if (kind == 2) run(float(), float());                                        \
    if (kind == 3) run(double(), double());                                      \
  }
FUNCTION(std, exp)
FUNCTION(std, expm1)
FUNCTION(bnext::BNEXT_ISA_NAMESPACE, sigmoid)
FUNCTION(std, tanh)
FUNCTION(std, erf)
