// The CPU ops: check, plan, allocate, run. Includes the LibTorch stable ABI.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "../check.h"
#include "cpu_info.h"
#include "hugepages.h"
#include "schedule.h"

namespace bnext {
namespace {

template <class F>
void with_schedule(const CpuPlan& plan, const Problem& problem, F f) {
  const auto parallel = [](int64_t n, int64_t grain, const auto& task) {
    torch::stable::parallel_for(0, n, grain, task);
  };
  const Kernels& table = kernels(plan.isa, problem.dtype);
  if (problem.dtype == DType::kFloat64)
    f(Schedule<double, decltype(parallel)>(plan, problem, table, parallel));
  else
    f(Schedule<float, decltype(parallel)>(plan, problem, table, parallel));
}

CpuPlan plan_here(const Problem& problem) {
  return plan_cpu(problem, cpu_info(static_cast<int>(torch::stable::get_num_threads())));
}

// An output of the op, in huge pages where it is large: faulting in 4 KiB pages costs more than the
// kernel.
Tensor allocate_output(const Tensor& input, bool channels_last) {
  Tensor output = allocate_like(input, channels_last);
  advise_huge_pages(output.data_ptr(),
                    output.numel() * static_cast<int64_t>(output.element_size()));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps, bool relu, bool save_mask) {
  const auto [x, channels_last, problem] =
      check_input(input, Stage::kTrainForward, relu, residual.has_value());
  ForwardArgs args{};
  args.weight = check_param_in("weight", weight, x);
  args.bias = check_param_in("bias", bias, x);
  if (running_mean) check_param("running_mean", *running_mean, x);
  if (running_var) check_param("running_var", *running_var, x);
  check_counter(num_batches_tracked, x);
  const OptionalTensor z =
      residual ? OptionalTensor(check_like_input("residual", *residual, x, channels_last))
               : std::nullopt;

  Tensor output = allocate_output(x, channels_last), save_stats = allocate_save_stats(x);
  const bool masked = relu && residual && save_mask;
  Tensor mask = save_mask ? allocate_mask(x, problem) : Tensor();
  args.input = x.const_data_ptr();
  args.residual = z ? z->const_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr();
  args.relu_mask = masked ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  args.save_stats = static_cast<double*>(save_stats.mutable_data_ptr());
  args.momentum = momentum.value_or(std::numeric_limits<double>::quiet_NaN());
  args.eps = eps;
  args.num_batches_tracked = num_batches_tracked
                                 ? static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr())
                                 : nullptr;
  if (problem.numel() == 0) {  // as torch: counted, but nothing to learn from
    if (args.num_batches_tracked) ++*args.num_batches_tracked;
    std::fill_n(args.save_stats, 2 * problem.c, 0.0);
    return {output, save_stats, mask};
  }
  args.running_mean = mutable_param(running_mean);
  args.running_var = mutable_param(running_var);
  with_schedule(plan_here(problem), problem, [&](auto schedule) { schedule.train_forward(args); });
  return {output, save_stats, mask};
}

std::tuple<Tensor, Tensor> batch_norm_inference(const Tensor& input, const OptionalTensor& weight,
                                                const OptionalTensor& bias,
                                                const OptionalTensor& residual,
                                                const Tensor& running_mean,
                                                const Tensor& running_var, double eps, bool relu,
                                                bool save_mask) {
  const auto [x, channels_last, problem] =
      check_input(input, Stage::kEvalForward, relu, residual.has_value());
  ForwardArgs args{};
  args.weight = check_param_in("weight", weight, x);
  args.bias = check_param_in("bias", bias, x);
  args.frozen_mean = check_param_in("running_mean", running_mean, x);
  args.frozen_var = check_param_in("running_var", running_var, x);
  const OptionalTensor z =
      residual ? OptionalTensor(check_like_input("residual", *residual, x, channels_last))
               : std::nullopt;

  Tensor output = allocate_output(x, channels_last);
  const bool masked = relu && residual && save_mask;
  Tensor mask = save_mask ? allocate_mask(x, problem) : Tensor();
  args.input = x.const_data_ptr();
  args.residual = z ? z->const_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr();
  args.relu_mask = masked ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  args.eps = eps;
  if (problem.numel() > 0)
    with_schedule(plan_here(problem), problem, [&](auto schedule) { schedule.eval_forward(args); });
  return {output, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad_out, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& relu_mask, const OptionalTensor& save_stats,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps, bool relu,
    bool need_input, bool need_weight, bool need_bias, bool need_residual) {
  const Stage stage = save_stats ? Stage::kTrainBackward : Stage::kEvalBackward;
  auto [x, channels_last, problem] = check_input(input, stage, relu, relu_mask.has_value());
  problem.need_input = need_input;
  problem.need_params = need_weight || need_bias;
  const Tensor dy = check_like_input("grad_out", grad_out, x, channels_last);
  BackwardArgs args{};
  args.weight = check_param_in("weight", weight, x);
  args.bias = check_param_in("bias", bias, x);
  args.relu_mask = check_mask(relu_mask, x, problem);
  args.save_stats = check_save_stats(save_stats, x);
  BNEXT_CHECK(save_stats || (running_mean && running_var),
              "save_stats: expected it, or both running_mean and running_var, got neither");
  args.running_mean = check_param_in("running_mean", running_mean, x);
  args.running_var = check_param_in("running_var", running_var, x);
  BNEXT_CHECK((weight || !need_weight) && (bias || weight || !need_bias),
              "weight, bias: expected where their gradients are asked for");
  BNEXT_CHECK(!need_residual || relu_mask,
              "relu_mask: expected where the residual's gradient is asked for");

  Tensor grad_input = need_input ? allocate_output(x, channels_last) : Tensor();
  Tensor grad_residual = need_residual ? allocate_output(x, channels_last) : Tensor();
  OptionalTensor grad_weight, grad_bias;
  if (need_weight) grad_weight = allocate_param(*weight);
  if (need_bias) grad_bias = allocate_param(bias ? *bias : *weight);  // the value is not needed
  args.grad_out = dy.const_data_ptr();
  args.input = x.const_data_ptr();
  args.grad_input = need_input ? grad_input.mutable_data_ptr() : nullptr;
  args.grad_residual = need_residual ? grad_residual.mutable_data_ptr() : nullptr;
  args.grad_weight = mutable_param(grad_weight);
  args.grad_bias = mutable_param(grad_bias);
  args.eps = eps;
  if (problem.numel() > 0)
    with_schedule(plan_here(problem), problem, [&](auto schedule) { schedule.backward(args); });
  else
    for (int64_t c = 0; c < problem.c; ++c)
      write(args.grad_weight, c, 0), write(args.grad_bias, c, 0);
  return {grad_input, grad_weight.value_or(Tensor()), grad_bias.value_or(Tensor()), grad_residual};
}

}  // namespace
}  // namespace bnext

STABLE_TORCH_LIBRARY_IMPL(bnext, CPU, m) {
  m.impl("batch_norm_train", TORCH_BOX(&bnext::batch_norm_train));
  m.impl("batch_norm_inference", TORCH_BOX(&bnext::batch_norm_inference));
  m.impl("batch_norm_backward", TORCH_BOX(&bnext::batch_norm_backward));
}
