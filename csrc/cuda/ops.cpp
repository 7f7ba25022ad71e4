// The CUDA ops: how a checked call runs. Includes the LibTorch stable ABI but no CUDA header.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>

#include "../ops.h"
#include "device_info.h"
#include "launch.h"

// Weak: it is in libtorch_cuda, and this extension must load under a torch without that library.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace bnext {
namespace {

void check_launch(int error, const std::string& what) {
  BNEXT_CHECK(error == 0, "launching ", what, ": ", cuda_error_string(error));
}

const CudaInfo& cuda_info(int device) {
  static std::mutex mutex;
  static std::map<int, CudaInfo> known;
  const std::lock_guard lock(mutex);
  const auto [entry, is_new] = known.try_emplace(device);
  if (is_new) {
    const int error = query_cuda_info(device, entry->second);
    if (error != 0) known.erase(entry);
    BNEXT_CHECK(error == 0, "asking GPU ", device, " what it has: ", cuda_error_string(error));
  }
  return entry->second;
}

void* current_stream(int device) {
  BNEXT_CHECK(aoti_torch_get_current_cuda_stream, "a CUDA tensor, but this torch has no CUDA");
  void* stream;
  BNEXT_SHIM(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// The alignment common to all pointers but null ones, in bytes; it bounds the width of an access.
int common_alignment(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 16;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return 1 << std::countr_zero(bits);
}

int alignment_of(const ForwardArgs& args) {
  return common_alignment({args.input, args.residual, args.output});
}
int alignment_of(const BackwardArgs& args) {
  return common_alignment(
      {args.grad_out, args.input, args.residual, args.grad_input, args.grad_residual});
}

int alignment_of(const DoubleBackwardArgs& args) {
  return common_alignment({args.grad_grad_input, args.grad_grad_residual, args.grad_out, args.input,
                           args.residual, args.grad_grad_out, args.grad_input});
}

struct Cuda {
  static Tensor allocate_output(const Input& x) { return allocate_like(x); }

  template <class Args>
  static void run(const Args& args, const Input& x) {
    const int device = x.device.index;
    Problem problem = x.problem;
    const torch::stable::accelerator::DeviceGuard guard(device);
    problem.alignment = alignment_of(args);
    count_first(args, device);
    CudaPlan plan;
    const int error =
        run_planned(problem, cuda_info(device), cuda_choice_of_environment(), plan,
                    [&](const CudaPlan& tried) { return launch_plan(tried, problem, args, x); });
    if (error != 0) check_launch(error, to_string("CudaPlan", plan));
  }

  static void join(const JoinArgs& args, const Input& x) {
    const int device = x.device.index;
    const torch::stable::accelerator::DeviceGuard guard(device);
    if (args.num_batches_tracked) count_on(args.num_batches_tracked, device);
    check_launch(launch_join(args, current_stream(device)), "the join of several processes");
  }

  static void count(int64_t* num_batches_tracked, const Input& x) {
    const int device = x.device.index;
    const torch::stable::accelerator::DeviceGuard guard(device);
    count_on(num_batches_tracked, device);
  }

 private:
  static void count_on(int64_t* num_batches_tracked, int device) {
    check_launch(launch_count(num_batches_tracked, current_stream(device)), "the batch counter");
  }
  static void count_first(const ForwardArgs& args, int device) {
    if (args.num_batches_tracked && args.cumulative) count_on(args.num_batches_tracked, device);
  }
  static void count_first(const BackwardArgs&, int) {}
  static void count_first(const DoubleBackwardArgs&, int) {}

  template <class Args>
  static int launch_plan(const CudaPlan& plan, const Problem& problem, const Args& args,
                         const Input& x) {
    // Freed on return: torch's allocator hands it to later work of the same stream only.
    const Tensor workspace = plan.workspace_bytes ? allocate(x.device, {plan.workspace_bytes}, {1},
                                                             aoti_torch_dtype_uint8())
                                                  : Tensor();
    void* const memory = plan.workspace_bytes ? workspace.mutable_data_ptr() : nullptr;
    return launch(plan, problem, args, memory, current_stream(x.device.index));
  }
};

}  // namespace
}  // namespace bnext

STABLE_TORCH_LIBRARY_IMPL(bnext, CUDA, m) {
  m.impl("batch_norm_train", TORCH_BOX(&bnext::Ops<bnext::Cuda>::batch_norm_train));
  m.impl("batch_norm_inference", TORCH_BOX(&bnext::Ops<bnext::Cuda>::batch_norm_inference));
  m.impl("batch_norm_backward", TORCH_BOX(&bnext::Ops<bnext::Cuda>::batch_norm_backward));
  m.impl("batch_norm_double_backward",
         TORCH_BOX(&bnext::Ops<bnext::Cuda>::batch_norm_double_backward));
  m.impl("batch_norm_moments", TORCH_BOX(&bnext::Ops<bnext::Cuda>::batch_norm_moments));
  m.impl("batch_norm_join", TORCH_BOX(&bnext::Ops<bnext::Cuda>::batch_norm_join));
  m.impl("batch_norm_apply", TORCH_BOX(&bnext::Ops<bnext::Cuda>::batch_norm_apply));
  m.impl("batch_norm_backward_sums", TORCH_BOX(&bnext::Ops<bnext::Cuda>::batch_norm_backward_sums));
  m.impl("batch_norm_backward_apply",
         TORCH_BOX(&bnext::Ops<bnext::Cuda>::batch_norm_backward_apply));
}
