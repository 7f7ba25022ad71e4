// Stacks to switch between.
#pragma once

#include <cstddef>

namespace bnext::emulation {

inline constexpr size_t kStackBytes = 128 * 1024;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
};

// A fiber that will run `entry`, which never returns.
void start(Fiber& fiber, void (*entry)());
// Leaves the running fiber for another. The host's stack is a fiber without `stack`.
void switch_fiber(Fiber& from, const Fiber& to);
// The fiber's stack may serve another one; whatever it was doing is abandoned.
void release(Fiber& fiber);

}  // namespace bnext::emulation
