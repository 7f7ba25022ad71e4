// The CPU ops: how a checked call runs. Includes the LibTorch stable ABI.
#include <torch/csrc/stable/library.h>

#include "../ops.h"
#include "cpu_info.h"
#include "hugepages.h"
#include "join.h"
#include "schedule.h"

namespace bnext {
namespace {

template <class F>
void with_schedule(const Problem& problem, F f) {
  const auto parallel = [](int64_t n, int64_t grain, const auto& task) {
    torch::stable::parallel_for(0, n, grain, task);
  };
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  const CpuPlan plan = plan_cpu(problem, cpu_info(threads));
  if (problem.dtype == DType::kFloat64)
    f(Schedule<double, decltype(parallel)>(plan, problem, parallel));
  else
    f(Schedule<float, decltype(parallel)>(plan, problem, parallel));
}

struct Cpu {
  // In huge pages where it is large: faulting in 4 KiB pages costs more than the kernel.
  static Tensor allocate_output(const Input& x) {
    Tensor output = allocate_like(x);
    advise_huge_pages(output.data_ptr(), x.problem.bytes());
    return output;
  }
  static void run(const ForwardArgs& args, const Input& x) {
    with_schedule(x.problem, [&](auto schedule) {
      is_training(x.problem.stage) ? schedule.train_forward(args) : schedule.eval_forward(args);
    });
  }
  static void run(const BackwardArgs& args, const Input& x) {
    with_schedule(x.problem, [&](auto schedule) { schedule.backward(args); });
  }
  static void run(const DoubleBackwardArgs& args, const Input& x) {
    with_schedule(x.problem, [&](auto schedule) { schedule.double_backward(args); });
  }
  static void count(int64_t* num_batches_tracked, const Input&) { ++*num_batches_tracked; }
  static void join(const JoinArgs& args, const Input&) { join_processes(args); }
};

}  // namespace
}  // namespace bnext

STABLE_TORCH_LIBRARY_IMPL(bnext, CPU, m) {
  m.impl("batch_norm_train", TORCH_BOX(&bnext::Ops<bnext::Cpu>::batch_norm_train));
  m.impl("batch_norm_inference", TORCH_BOX(&bnext::Ops<bnext::Cpu>::batch_norm_inference));
  m.impl("batch_norm_backward", TORCH_BOX(&bnext::Ops<bnext::Cpu>::batch_norm_backward));
  m.impl("batch_norm_double_backward",
         TORCH_BOX(&bnext::Ops<bnext::Cpu>::batch_norm_double_backward));
  m.impl("batch_norm_moments", TORCH_BOX(&bnext::Ops<bnext::Cpu>::batch_norm_moments));
  m.impl("batch_norm_join", TORCH_BOX(&bnext::Ops<bnext::Cpu>::batch_norm_join));
  m.impl("batch_norm_apply", TORCH_BOX(&bnext::Ops<bnext::Cpu>::batch_norm_apply));
  m.impl("batch_norm_backward_sums", TORCH_BOX(&bnext::Ops<bnext::Cpu>::batch_norm_backward_sums));
  m.impl("batch_norm_backward_apply",
         TORCH_BOX(&bnext::Ops<bnext::Cpu>::batch_norm_backward_apply));
}
