// Memory of the emulated GPU: a block of its own, of the exact size, for each array of the host.
#pragma once

#include <cstring>
#include <vector>

#include "machine.h"

namespace bnext::emulation {

class Buffers {
 public:
  Buffers() = default;
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;
  ~Buffers() {
    for (const Buffer& b : buffers_) {
      remove_region(b.device);
      std::free(b.allocated);
    }
  }

  // Null for a host array that is null. Outputs and scratch start as NaNs. `offset` bytes beyond an
  // address aligned to 64.
  template <class T>
  T* add(T* host, int64_t bytes, Kind kind, const char* name, size_t offset = 0) {
    return host == nullptr ? nullptr : static_cast<T*>(add_bytes(host, bytes, kind, name, offset));
  }
  void* scratch(int64_t bytes) {
    return add_bytes(nullptr, bytes, Kind::kScratch, "the workspace");
  }

  // Copies to the host's arrays what kernels may have written. False: an output was left unwritten.
  bool copy_back() {
    bool complete = true;
    for (const Buffer& b : buffers_) {
      if (b.kind == Kind::kOutput || b.kind == Kind::kState) std::memcpy(b.host, b.device, b.bytes);
      complete = complete && (b.kind != Kind::kOutput || fully_written(b.device));
    }
    return complete;
  }

 private:
  struct Buffer {
    void* host;
    void* allocated;
    void* device;
    size_t bytes;
    Kind kind;
  };
  std::vector<Buffer> buffers_;

  void* add_bytes(const void* host, int64_t bytes, Kind kind, const char* name, size_t offset = 0) {
    const size_t size = static_cast<size_t>(bytes);
    void* allocated = nullptr;
    if (posix_memalign(&allocated, 64, size + offset + (size + offset == 0)) != 0) std::abort();
    void* const device = static_cast<char*>(allocated) + offset;
    const bool given = kind != Kind::kOutput && kind != Kind::kScratch;
    if (given)
      std::memcpy(device, host, size);
    else
      std::memset(device, 0xff, size);
    add_region(device, size, kind, name);
    buffers_.push_back({const_cast<void*>(host), allocated, device, size, kind});
    return device;
  }
};

}  // namespace bnext::emulation
