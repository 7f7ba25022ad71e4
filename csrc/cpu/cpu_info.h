// What the plan needs to know of this machine.
#pragma once

#include "plan.h"

namespace bnext {

// The instruction set is the best supported, or BNEXT_CPU_CAPABILITY; read once. Throws
// std::runtime_error where that names one this machine lacks.
CpuInfo cpu_info(int threads);

}  // namespace bnext
