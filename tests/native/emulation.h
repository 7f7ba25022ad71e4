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
  cudaErrorLaunchFailure = 719,
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

inline void sync_block(emulation::Where where = emulation::Where::current()) {
  emulation::sync(emulation::Scope::kBlock, where);
}
inline void sync_cluster(emulation::Where where = emulation::Where::current()) {
  emulation::sync(emulation::Scope::kCluster, where);
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
inline T load_streaming(const T* global, emulation::Where where = emulation::Where::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulation::expect_aligned(global, sizeof(T), where);
  return *global;
}
template <class T>
inline void store_streaming(T* global, const T& value,
                            emulation::Where where = emulation::Where::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulation::expect_aligned(global, sizeof(T), where);
  *global = value;
}

template <class Args>
inline cudaError_t launch(void (*kernel)(Args), const LaunchShape& shape, void*, const Args& args) {
  static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= 4096);
  const auto run = [](void (*function)(), const void* its_args) {
    reinterpret_cast<void (*)(Args)>(function)(*static_cast<const Args*>(its_args));
  };
  return emulation::launch({run, reinterpret_cast<void (*)()>(kernel), &args, sizeof args}, shape);
}

}  // namespace bnext
