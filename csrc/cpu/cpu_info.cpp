// Which instruction set and caches this machine has. Includes the standard library only.
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
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
  unsigned eax, ebx, ecx, edx;  // clang's __builtin_cpu_supports does not know f16c
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
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

std::string cache_file(int index, const char* name) {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/" +
                     name);
  std::string line;
  std::getline(file, line);
  return line;
}

// sysfs first: sysconf reports some machines' L3 of all sockets together.
int64_t cache_bytes(int index, int sysconf_name, int64_t otherwise) {
  const int64_t kib = std::atoll(cache_file(index, "size").c_str());
  if (kib > 0) return kib << 10;
  const long bytes = sysconf(sysconf_name);
  return bytes > 0 ? bytes : otherwise;
}

// "0-3,8" is 5 CPUs.
int64_t shared_cpus(int index) {
  std::istringstream list(cache_file(index, "shared_cpu_list"));
  int64_t cpus = 0;
  for (std::string range; std::getline(list, range, ',');) {
    const size_t dash = range.find('-');
    const int64_t first = std::atoll(range.c_str());
    cpus += 1 + (dash == std::string::npos ? 0 : std::atoll(range.c_str() + dash + 1) - first);
  }
  return std::max<int64_t>(cpus, 1);
}

// A small virtual machine is told of an L3 that it shares with others: of 32 MiB, a copy on 2 CPUs
// ran at the L3's speed up to 6 to 8 MiB.
int64_t l3_bytes() {
  constexpr int64_t kPerCpu = 4 << 20;
  return std::min(cache_bytes(3, _SC_LEVEL3_CACHE_SIZE, 0), kPerCpu * shared_cpus(3));
}

}  // namespace

CpuInfo cpu_info(int threads) {
  // index1 is the instruction cache.
  static const CpuInfo info{select_isa(), 1, cache_bytes(0, _SC_LEVEL1_DCACHE_SIZE, 32 << 10),
                            cache_bytes(2, _SC_LEVEL2_CACHE_SIZE, 512 << 10), l3_bytes()};
  CpuInfo with_threads = info;
  with_threads.threads = threads;
  return with_threads;
}

}  // namespace bnext
