// The launchers of the CUDA kernels. Includes no torch and no CUDA: results are cudaError_t codes
// (0 for success), streams are cudaStream_t, and pointers in arguments point to memory of the
// current device. Nothing here waits for the GPU or allocates.
#pragma once

#include "plan.h"

namespace bnext {

// `workspace`: plan.workspace_bytes of device memory, uninitialised. A cumulative average needs the
// new count on every block: launch_count() comes before.
int launch(const CudaPlan& plan, const Problem& problem, const ForwardArgs& args, void* workspace,
           void* stream);
int launch(const CudaPlan& plan, const Problem& problem, const BackwardArgs& args, void* workspace,
           void* stream);
int launch(const CudaPlan& plan, const Problem& problem, const DoubleBackwardArgs& args,
           void* workspace, void* stream);

// One more batch, where it is not for the kernels to count it.
int launch_count(int64_t* num_batches_tracked, void* stream);

}  // namespace bnext
