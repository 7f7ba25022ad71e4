// The launchers of the CUDA kernels, and what they tell of a GPU. Includes no torch and no CUDA:
// results are cudaError_t codes, 0 for success; streams are cudaStream_t. Pointers in arguments are
// device memory of the current device. Nothing here waits for the GPU or allocates.
#pragma once

#include "../batch_norm.h"
#include "../plan.h"

namespace bnext {

// `workspace`: plan.workspace_bytes of device memory, uninitialised.
int launch_forward(const CudaPlan& plan, const Problem& problem, const ForwardArgs& args,
                   void* workspace, void* stream);
int launch_backward(const CudaPlan& plan, const Problem& problem, const BackwardArgs& args,
                    void* workspace, void* stream);

// One more batch, where there is nothing to normalise.
int launch_count(int64_t* num_batches_tracked, void* stream);

int query_cuda_info(int device, CudaInfo& info);
const char* cuda_error_string(int error);

}  // namespace bnext
