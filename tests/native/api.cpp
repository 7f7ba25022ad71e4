// The emulator for ctypes.
#include <utility>

#include "machine.h"

using namespace bnext::emulation;

extern "C" {
extern const char __ehdr_start[] __attribute__((visibility("hidden")));  // the linker's

void bnext_set_seed(uint64_t seed) {
  set_seed(seed);
}
void bnext_set_defect(int number) {
  defect = number;
}
void bnext_set_limits(const Limits* l) {
  limits = *l;
}
void bnext_get_statistics(Statistics* s) {
  *s = std::exchange(statistics, {});
}
const char* bnext_error() {
  return error().c_str();
}

// Addresses in the library of the kernels launched since the last call: their number, and the first
// `room`.
int64_t bnext_launched(uint64_t* addresses, int64_t room) {
  int64_t n = 0;
  for (const uintptr_t address : launched)
    if (n++ < room) addresses[n - 1] = address - reinterpret_cast<uintptr_t>(__ehdr_start);
  launched.clear();
  return n;
}

// Values of 16 bits to float and back, for the test of the conversions.
void bnext_to_float(int is_bfloat16, int64_t n, const uint16_t* from, float* to) {
  for (int64_t i = 0; i < n; ++i)
    to[i] = is_bfloat16 ? bnext::to_float(bnext::bfloat16{from[i]})
                        : bnext::to_float(bnext::float16{from[i]});
}
void bnext_from_float(int is_bfloat16, int64_t n, const float* from, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    bnext::bfloat16 b;
    bnext::float16 h;
    bnext::from_float(from[i], b);
    bnext::from_float(from[i], h);
    to[i] = is_bfloat16 ? b.bits : h.bits;
  }
}
}
