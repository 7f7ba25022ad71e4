// Which instruction set and caches this machine has. Includes the standard library only.
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>

#include "cpu_info.h"
#include "kernels.h"

namespace bnext {

namespace isa_default {
template <class Table>
const Table& kernels(DType dtype);
}  // namespace isa_default
#if defined(__x86_64__)
namespace isa_avx2 {
template <class Table>
const Table& kernels(DType dtype);
}  // namespace isa_avx2
namespace isa_avx512 {
template <class Table>
const Table& kernels(DType dtype);
}  // namespace isa_avx512
#endif

template <class Table>
const Table& kernels([[maybe_unused]] Isa isa, DType dtype) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return isa_avx512::kernels<Table>(dtype);
  if (isa == Isa::kAvx2) return isa_avx2::kernels<Table>(dtype);
#endif
  return isa_default::kernels<Table>(dtype);
}
template const ForwardKernels& kernels(Isa, DType);
template const BackwardKernels& kernels(Isa, DType);
template const DoubleBackwardKernels& kernels(Isa, DType);

namespace {

bool supports(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return isa == Isa::kDefault;
}

Isa select_isa() {
  const Isa best = supports(Isa::kAvx512) ? Isa::kAvx512
                   : supports(Isa::kAvx2) ? Isa::kAvx2
                                          : Isa::kDefault;
  const char* asked = std::getenv("BNEXT_CPU_CAPABILITY");
  if (!asked || !*asked) return best;
  for (const Isa isa : {Isa::kDefault, Isa::kAvx2, Isa::kAvx512})
    if (to_string(isa) == asked && supports(isa)) return isa;
  throw std::runtime_error(
      "bnext: BNEXT_CPU_CAPABILITY: expected default, avx2 or avx512, and no more than this "
      "machine's " +
      to_string(best) + ", got \"" + asked + "\"");
}

// sysfs first: sysconf reports some machines' L3 of all sockets together.
int64_t cache_bytes(int index, int sysconf_name, int64_t otherwise) {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
  int64_t kib = 0;
  if (file >> kib && kib > 0) return kib << 10;
  const long bytes = sysconf(sysconf_name);
  return bytes > 0 ? bytes : otherwise;
}

}  // namespace

CpuInfo cpu_info(int threads) {
  // index1 is the instruction cache.
  static const CpuInfo info{select_isa(), 1, cache_bytes(0, _SC_LEVEL1_DCACHE_SIZE, 32 << 10),
                            cache_bytes(2, _SC_LEVEL2_CACHE_SIZE, 512 << 10),
                            cache_bytes(3, _SC_LEVEL3_CACHE_SIZE, 0)};
  CpuInfo with_threads = info;
  with_threads.threads = threads;
  return with_threads;
}

}  // namespace bnext
