// What csrc/cuda/device.cuh provides, for the host compiler: kernels run on a CPU, every thread of
// a grid a fiber of one operating-system thread. A switch between fibers happens only in the
// functions below; which fiber goes on is drawn at random from a seed. See machine.h for what is
// checked.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __global__
#ifdef BNEXT_INSTRUMENTED
// gcc instruments no store of a struct that a function returns in registers: there are no calls.
#define __device__ __attribute__((always_inline))
#else
#define __device__
#endif
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorInvalidClusterSize = 912,
};

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
// Those of the running fiber.
extern Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace bnext {

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster_blocks = 1;
  bool cooperative = false;
};

namespace emulation {

// The number of the defect that a build of kernels with defects shows (test_native_defects.py).
extern int defect;

using Where = std::source_location;
enum class Scope { kWarp, kBlock, kCluster, kGrid };

void sync(Scope scope, Where where);
bool any_of_block(bool says, Where where);
void arrive_cluster(Where where);
void wait_cluster(Where where);
uint64_t shuffle_xor(uint64_t bits, int thread_bits, Where where);
unsigned char* shared_memory();
void* in_block_of_cluster(void* shared, int rank, Where where);
void copy_async(void* shared, const void* global, int bytes, Where where);
void commit_copies();
void wait_for_copies(int pending);
void expect_aligned(const void* address, size_t bytes, Where where);

struct Kernel {
  void (*run)(void (*function)(), const void* args);
  void (*function)();
  const void* args;
  size_t args_bytes;
};
cudaError_t launch(const Kernel& kernel, const LaunchShape& shape);

constexpr float power_of_two(int exponent) {
  float p = 1;
  for (; exponent > 0; --exponent) p *= 2;
  for (; exponent < 0; ++exponent) p /= 2;
  return p;
}

}  // namespace emulation

// 16 bits of sign, exponent and fraction; conversions round to nearest, ties to even.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline void from_float(float x, bfloat16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  y.bits = static_cast<uint16_t>(std::isnan(x) ? 0x7fff : rounded >> 16);
}

inline float to_float(float16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float magnitude = exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                          : exponent == 0
                              ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return (x.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

inline void from_float(float x, float16& y) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const float a = std::fabs(x);
  if (!(a < 65520)) {  // what would round to 2^16, infinity and NaN
    y.bits = static_cast<uint16_t>(sign | (std::isnan(x) ? 0x7fff : 0x7c00));
    return;
  }
  // nearbyint rounds to nearest even. A fraction that reaches the next power of two carries into
  // the exponent, as it should.
  const int exponent = a < emulation::power_of_two(-14) ? -14 : std::ilogb(a);
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(a, 10 - exponent)));
  y.bits = static_cast<uint16_t>(sign | (((exponent + 14) << 10) + fraction));
}

// Two elements in a word.
template <class T>
inline void unpack(unsigned word, T, float& first, float& second) {
  first = to_float(T{static_cast<uint16_t>(word)});
  second = to_float(T{static_cast<uint16_t>(word >> 16)});
}
inline float relu(float z) {
  return z <= 0 ? 0 : z;
}
template <bool kRelu, class T>
inline unsigned pack(float first, float second, T) {
  T low, high;
  from_float(kRelu ? relu(first) : first, low);
  from_float(kRelu ? relu(second) : second, high);
  return low.bits | static_cast<unsigned>(high.bits) << 16;
}

inline unsigned nonzero_halves(unsigned word) {
  return (word & 0xffff ? 0xffff : 0) | (word >> 16 ? 0xffff0000 : 0);
}
template <class T>
inline unsigned greater_halves(unsigned a, unsigned b, T) {
  float a_values[2], b_values[2];
  unpack(a, T{}, a_values[0], a_values[1]);
  unpack(b, T{}, b_values[0], b_values[1]);
  return (a_values[0] <= b_values[0] ? 0 : 0xffff) | (a_values[1] <= b_values[1] ? 0 : 0xffff0000);
}
inline unsigned halves_of_signs(unsigned word, int low) {
  return (word >> (8 * low + 7) & 1 ? 0xffff : 0) | (word >> (8 * low + 15) & 1 ? 0xffff0000 : 0);
}
inline unsigned bits_of(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float quick_exp(float x) {
  return std::exp(x);
}
inline float quick_reciprocal(float x) {
  return 1 / x;
}

struct float2 {
  float x, y;
};
inline float2 add(float2 x, float2 y) {
  return {x.x + y.x, x.y + y.y};
}
inline float2 multiply(float2 x, float2 y) {
  return {x.x * y.x, x.y * y.y};
}
inline float2 multiply_add(float2 x, float2 y, float2 z) {
  return {std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y)};
}

inline unsigned shift_right(unsigned x, unsigned places) {
  return places < 32 ? x >> places : 0;
}
inline unsigned multiply_high(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
template <class T>
inline T opaque(T x) {
  return x;
}
inline int log2_of(int power) {
  return 31 - __builtin_clz(static_cast<unsigned>(power));
}
inline unsigned opaque_again(unsigned x) {
  return x;
}

inline void sync_block(emulation::Where where = emulation::Where::current()) {
  emulation::sync(emulation::Scope::kBlock, where);
}
inline void sync_cluster(emulation::Where where = emulation::Where::current()) {
  emulation::sync(emulation::Scope::kCluster, where);
}
inline bool any_of_block(bool says, emulation::Where where = emulation::Where::current()) {
  return emulation::any_of_block(says, where);
}
inline void arrive_cluster(emulation::Where where = emulation::Where::current()) {
  emulation::arrive_cluster(where);
}
inline void wait_cluster(emulation::Where where = emulation::Where::current()) {
  emulation::wait_cluster(where);
}
inline void sync_grid(emulation::Where where = emulation::Where::current()) {
  emulation::sync(emulation::Scope::kGrid, where);
}

template <class T>
inline T shuffle_xor(T v, int thread_bits, emulation::Where where = emulation::Where::current()) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  bits = emulation::shuffle_xor(bits, thread_bits, where);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline unsigned char* shared_memory() {
  return emulation::shared_memory();
}

template <class T>
inline T* in_block_of_cluster(T* shared, int rank,
                              emulation::Where where = emulation::Where::current()) {
  return static_cast<T*>(emulation::in_block_of_cluster(shared, rank, where));
}

template <int kBytes>
inline void copy_async(void* shared, const void* global,
                       emulation::Where where = emulation::Where::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulation::copy_async(shared, global, kBytes, where);
}
inline void commit_copies() {
  emulation::commit_copies();
}
template <int kPending>
inline void wait_for_copies() {
  emulation::wait_for_copies(kPending);
}

template <class T>
inline T load(const T* from, emulation::Where where = emulation::Where::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulation::expect_aligned(from, sizeof(T), where);
  return *from;
}
template <class T>
inline void store(T* to, const T& value, emulation::Where where = emulation::Where::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulation::expect_aligned(to, sizeof(T), where);
  *to = value;
}
template <class T>
inline T load_streaming(const T* from, emulation::Where where = emulation::Where::current()) {
  return load(from, where);
}
struct Keep {
  explicit Keep(bool) {}
  template <class T>
  void store(T* global, const T& value,
             emulation::Where where = emulation::Where::current()) const {
    bnext::store(global, value, where);
  }
};

template <class Args>
inline cudaError_t launch(void (*kernel)(Args), const LaunchShape& shape, void*, const Args& args) {
  static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= 4096);
  const auto run = [](void (*function)(), const void* its_args) {
    reinterpret_cast<void (*)(Args)>(function)(*static_cast<const Args*>(its_args));
  };
  return emulation::launch({run, reinterpret_cast<void (*)()>(kernel), &args, sizeof args}, shape);
}

}  // namespace bnext
