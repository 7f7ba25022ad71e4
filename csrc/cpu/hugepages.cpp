#include "hugepages.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "plan.h"

namespace bnext {

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  static const bool enabled = [] {
    const char* value = std::getenv("BNEXT_HUGEPAGES");
    return !value || std::strcmp(value, "0") != 0;
  }();
  if (!enabled || bytes < kHugePageMinBytes) return;
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace bnext
