// The compiler's float16. Includes nothing.
#pragma once

namespace bnext {

#if defined(__aarch64__) && !defined(__clang__) && __GNUC__ < 13
using HostFloat16 = __fp16;  // _Float16 is not in C++ yet there
#else
using HostFloat16 = _Float16;
#endif

}  // namespace bnext
