// What a GPU has, for the plan. Includes no CUDA: results are cudaError_t codes, 0 for success.
#pragma once

#include "plan.h"

namespace bnext {

int query_cuda_info(int device, CudaInfo& info);
const char* cuda_error_string(int error);

// Whether a launch failed because its blocks cannot all run at once where they were to: fewer SMs
// than the device has (a green context), clusters that find no room. Another plan may run.
bool is_refused_launch(int error);

}  // namespace bnext
