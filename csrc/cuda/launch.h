// The launchers of the CUDA kernels. Includes no torch and no CUDA: results are cudaError_t codes
// (0 for success), streams are cudaStream_t, and pointers in arguments point to memory of the
// current device. Nothing here waits for the GPU or allocates.
#pragma once

#include "../moments.h"
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

// Whether a launch failed because its blocks cannot all run at once where they were to: fewer SMs
// than the device has (a green context), clusters that find no room. Another plan may run.
bool is_refused_launch(int error);

// run(plan): 0 or an error, by the plan for a problem. Where a launch of a resident one is refused,
// and nobody chose it, by a streaming one. Returns the last one's error; `plan` becomes that one.
template <class Run>
int run_planned(const Problem& problem, const CudaInfo& info, CudaChoice choice, CudaPlan& plan,
                const Run& run) {
  plan = plan_cuda(problem, info, choice);
  const int error = run(plan);
  const bool chosen = choice.family || choice.team;
  if (plan.family != Family::kResident || chosen || !is_refused_launch(error)) return error;
  choice.family = Family::kStreaming;
  plan = plan_cuda(problem, info, choice);
  return run(plan);
}

// The statistics of several processes. The batch has been counted.
int launch_join(const JoinArgs& args, void* stream);

// One more batch, where it is not for the kernels to count it.
int launch_count(int64_t* num_batches_tracked, void* stream);

}  // namespace bnext
