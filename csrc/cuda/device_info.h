// What a GPU has, for the plan. Includes no CUDA: results are cudaError_t codes, 0 for success.
#pragma once

#include "plan.h"

namespace bnext {

int query_cuda_info(int device, CudaInfo& info);
const char* cuda_error_string(int error);

}  // namespace bnext
