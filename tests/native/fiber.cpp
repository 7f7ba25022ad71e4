#include "fiber.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define BNEXT_UNPOISON(address, bytes) __asan_unpoison_memory_region(address, bytes)
#else
#define BNEXT_UNPOISON(address, bytes)
#endif

// Saves the registers a function must keep and the stack pointer, and goes on with another stack.
extern "C" void bnext_switch_stack(void** save, void* load);
#if defined(__x86_64__)
asm(R"(.text
.globl bnext_switch_stack
.type bnext_switch_stack,@function
bnext_switch_stack:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.size bnext_switch_stack,.-bnext_switch_stack
)");
constexpr size_t kSavedWords = 6, kReturnWord = 6;
#elif defined(__aarch64__)
asm(R"(.text
.globl bnext_switch_stack
.type bnext_switch_stack,%function
bnext_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]; stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]; ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size bnext_switch_stack,.-bnext_switch_stack
)");
constexpr size_t kSavedWords = 20, kReturnWord = 11;
#else
#error "a switch of stacks for this CPU is missing"
#endif

namespace bnext::emulation {
namespace {

constexpr size_t kStacksPerMapping = 256;  // the kernel limits the number of mappings
std::vector<char*> free_stacks;

char* take_stack() {
  if (free_stacks.empty()) {
    void* const memory = mmap(nullptr, kStacksPerMapping * kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    for (size_t i = 0; i < kStacksPerMapping; ++i)
      free_stacks.push_back(static_cast<char*>(memory) + i * kStackBytes);
  }
  char* const stack = free_stacks.back();
  free_stacks.pop_back();
  BNEXT_UNPOISON(stack, kStackBytes);  // of frames that were abandoned
  return stack;
}

}  // namespace

void start(Fiber& fiber, void (*entry)()) {
  fiber.stack = take_stack();
  void** const top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 4;
  void** const saved = top - kSavedWords;
  std::fill(saved, top + 4, nullptr);
  saved[kReturnWord] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = saved;
}

void switch_fiber(Fiber& from, const Fiber& to) {
  bnext_switch_stack(&from.stack_pointer, to.stack_pointer);
}

void release(Fiber& fiber) {
  free_stacks.push_back(fiber.stack);
  fiber = {};
}

}  // namespace bnext::emulation
