// Huge pages for large fresh outputs.
#pragma once

#include <cstdint>

namespace bnext {

// Advises the kernel to back the aligned inside of [data, data + bytes) with huge pages where that
// pays. Does nothing for small memory, with BNEXT_HUGEPAGES=0, or where the kernel refuses.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace bnext
