// The ops of any backend: check, allocate, fill the kernels' arguments, run. Includes the LibTorch
// stable ABI. A backend has
//   allocate_output(input)             uninitialised memory for an output of the input's shape
//   run(args, input)                   runs the kernels on the input's device
//   count(num_batches_tracked, input)  adds 1 to the counter on the input's device
//   join(args, input)                  joins the moments of several processes
#pragma once

#include <tuple>

#include "check.h"

namespace bnext {

template <class Backend>
struct Ops {
  static std::tuple<Tensor, Tensor, Tensor> batch_norm_train(
      const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
      const OptionalTensor& running_mean, const OptionalTensor& running_var,
      const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
      const OptionalTensor& residual, int64_t act, double act_param, bool save_mask) {
    Input x = check_input(input, Stage::kTrainForward, check_act(act));
    ForwardArgs args{};
    check_statistic("running_mean", running_mean, x);
    check_statistic("running_var", running_var, x);
    args.weight = check_param("weight", weight, x);
    args.bias = check_param("bias", bias, x);
    check_counter(num_batches_tracked, x);
    const OptionalTensor z = check_like_input("residual", residual, x);
    set_activation(x.problem, z.has_value(), save_mask);

    Tensor output = Backend::allocate_output(x);
    Tensor save_stats = allocate_save_stats(x);
    Tensor mask = save_mask ? allocate_mask(x) : undefined();
    args.input = x.tensor.const_data_ptr();
    args.residual = data(z);
    args.output = output.mutable_data_ptr();
    args.mask = x.problem.has_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
    args.save_stats = static_cast<double*>(save_stats.mutable_data_ptr());
    args.momentum = momentum.value_or(0);
    args.cumulative = !momentum;
    args.eps = eps;
    args.act_param = act_param;
    args.num_batches_tracked = num_batches_tracked
                                   ? static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr())
                                   : nullptr;
    if (x.empty()) {  // as in torch: counted, but there is nothing to learn from
      torch::stable::zero_(save_stats);
      if (args.num_batches_tracked) Backend::count(args.num_batches_tracked, x);
      return {output, save_stats, mask};
    }
    args.running_mean = param_out(running_mean);
    args.running_var = param_out(running_var);
    Backend::run(args, x);
    return {output, save_stats, mask};
  }

  static std::tuple<Tensor, Tensor> batch_norm_inference(
      const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
      const Tensor& running_mean, const Tensor& running_var, double eps,
      const OptionalTensor& residual, int64_t act, double act_param, bool save_mask) {
    Input x = check_input(input, Stage::kEvalForward, check_act(act));
    ForwardArgs args{};
    args.frozen_mean = check_eval_statistic("running_mean", running_mean, x);
    args.frozen_var = check_eval_statistic("running_var", running_var, x);
    args.weight = check_param("weight", weight, x);
    args.bias = check_param("bias", bias, x);
    args.eps = eps;
    return apply(args, x, residual, act_param, save_mask);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
      const Tensor& grad_out, const Tensor& input, const OptionalTensor& weight,
      const OptionalTensor& save_stats, double eps, const OptionalTensor& running_mean,
      const OptionalTensor& running_var, const OptionalTensor& bias, const OptionalTensor& residual,
      const OptionalTensor& mask, int64_t act, double act_param, bool need_input, bool need_weight,
      bool need_bias, bool need_residual) {
    Input x = check_input(input, save_stats ? Stage::kTrainBackward : Stage::kEvalBackward,
                          check_act(act));
    const Tensor dy = check_like_input("grad_out", grad_out, x);
    BackwardArgs args{};
    args.weight = check_param("weight", weight, x);
    args.bias = check_param("bias", bias, x);
    const OptionalTensor z = check_like_input("residual", residual, x);
    args.mask = check_mask(mask, x);
    args.save_stats = check_save_stats(save_stats, x);
    check_any_statistics(save_stats.has_value(), running_mean && running_var, x);
    args.running_mean = check_statistic("running_mean", running_mean, x);
    args.running_var = check_statistic("running_var", running_var, x);
    BNEXT_CHECK((weight || !need_weight) && (bias || weight || !need_bias),
                "weight, bias: expected where their gradients are asked for");
    check_act_operands(z.has_value(), mask.has_value(), need_residual, x);
    x.problem.need_input = need_input;
    x.problem.need_params = need_weight || need_bias;
    x.problem.need_residual = need_residual;
    set_activation(x.problem, z.has_value(), mask.has_value());

    const auto output = [&](bool needed) {
      return needed ? Backend::allocate_output(x) : undefined();
    };
    Tensor grad_input = output(need_input), grad_residual = output(need_residual);
    OptionalTensor grad_weight, grad_bias;
    if (need_weight) grad_weight = allocate_grad(*weight, x);
    if (need_bias) grad_bias = allocate_grad(bias ? *bias : *weight, x);  // for its shape
    if (x.empty()) {
      for (OptionalTensor* grad : {&grad_weight, &grad_bias})
        if (*grad) torch::stable::zero_(**grad);
    } else {
      args.grad_out = dy.const_data_ptr();
      args.input = x.tensor.const_data_ptr();
      args.residual = data(z);
      args.grad_input = need_input ? grad_input.mutable_data_ptr() : nullptr;
      args.grad_residual = need_residual ? grad_residual.mutable_data_ptr() : nullptr;
      args.grad_weight = param_out(grad_weight);
      args.grad_bias = param_out(grad_bias);
      args.eps = eps;
      args.act_param = act_param;
      Backend::run(args, x);
    }
    return {grad_input, grad_weight ? *grad_weight : undefined(),
            grad_bias ? *grad_bias : undefined(), grad_residual};
  }

  static std::tuple<Tensor, Tensor, Tensor> batch_norm_double_backward(
      const Tensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
      const OptionalTensor& grad_grad_bias, const OptionalTensor& grad_grad_residual,
      const Tensor& grad_out, const Tensor& input, const OptionalTensor& weight,
      const OptionalTensor& save_stats, double eps, const OptionalTensor& running_mean,
      const OptionalTensor& running_var, const OptionalTensor& bias, const OptionalTensor& residual,
      const OptionalTensor& mask, int64_t act, double act_param, bool need_grad_out,
      bool need_input, bool need_weight) {
    Input x = check_input(input, Stage::kDoubleBackward, check_act(act));
    const Tensor u = check_like_input("grad_grad_input", grad_grad_input, x);
    const Tensor dy = check_like_input("grad_out", grad_out, x);
    const OptionalTensor v = check_like_input("grad_grad_residual", grad_grad_residual, x);
    DoubleBackwardArgs args{};
    args.save_stats = check_save_stats(save_stats, x);
    args.running_mean = check_statistic("running_mean", running_mean, x);
    args.running_var = check_statistic("running_var", running_var, x);
    args.weight = check_param("weight", weight, x);
    args.bias = check_param("bias", bias, x);
    args.grad_grad_weight = check_param("grad_grad_weight", grad_grad_weight, x);
    args.grad_grad_bias = check_param("grad_grad_bias", grad_grad_bias, x);
    check_any_statistics(save_stats.has_value(), running_mean && running_var, x);
    BNEXT_CHECK(weight || !need_weight, "weight: expected where its gradient is asked for");
    const OptionalTensor z = check_like_input("residual", residual, x);
    args.mask = check_mask(mask, x);
    check_act_operands(z.has_value(), mask.has_value(), v.has_value(), x);
    check_act_is_linear(x);
    x.problem.need_input = need_grad_out || need_input;
    set_activation(x.problem, z.has_value(), mask.has_value());

    Tensor grad_grad_out = need_grad_out ? Backend::allocate_output(x) : undefined();
    Tensor grad_input = need_input ? Backend::allocate_output(x) : undefined();
    OptionalTensor grad_weight;
    if (need_weight) grad_weight = allocate_grad(*weight, x);
    if (x.empty()) {
      if (grad_weight) torch::stable::zero_(*grad_weight);
    } else {
      args.grad_grad_input = u.const_data_ptr();
      args.grad_grad_residual = data(v);
      args.grad_out = dy.const_data_ptr();
      args.input = x.tensor.const_data_ptr();
      args.residual = data(z);
      args.grad_grad_out = need_grad_out ? grad_grad_out.mutable_data_ptr() : nullptr;
      args.grad_input = need_input ? grad_input.mutable_data_ptr() : nullptr;
      args.grad_weight = param_out(grad_weight);
      args.eps = eps;
      args.act_param = act_param;
      Backend::run(args, x);
    }
    return {grad_grad_out, grad_input, grad_weight ? *grad_weight : undefined()};
  }

  // [3, C]: mean, sum of squares about it, and what a double cannot hold of the mean. Below eps
  // times the number of values a sum of squares may lose digits.
  static Tensor batch_norm_moments(const Tensor& input, double eps) {
    Input x = check_input(input, Stage::kTrainForward, Act::kNone);
    x.problem.need_input = false;
    Tensor moments = allocate_save_stats(x);
    ForwardArgs args{};
    args.input = x.tensor.const_data_ptr();
    args.moments = static_cast<double*>(moments.mutable_data_ptr());
    args.eps = eps;
    if (x.empty())
      torch::stable::zero_(moments);
    else
      Backend::run(args, x);
    return moments;
  }

  // The statistics of all processes from the moments [ranks, 3, C] and counts [ranks] of each.
  // The input is one process's: what it is, not its values, is read.
  static Tensor batch_norm_join(const Tensor& input, const Tensor& moments, const Tensor& counts,
                                const OptionalTensor& running_mean,
                                const OptionalTensor& running_var,
                                const OptionalTensor& num_batches_tracked,
                                std::optional<double> momentum, double eps) {
    Input x = check_input(input, Stage::kTrainForward, Act::kNone);
    check_statistic("running_mean", running_mean, x, x.problem.c == 0);
    check_statistic("running_var", running_var, x, x.problem.c == 0);
    check_counter(num_batches_tracked, x);
    JoinArgs args{};
    check_joined(args, moments, counts, x);
    Tensor save_stats = allocate_save_stats(x);
    args.save_stats = static_cast<double*>(save_stats.mutable_data_ptr());
    args.num_batches_tracked = num_batches_tracked
                                   ? static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr())
                                   : nullptr;
    args.running_mean = param_out(running_mean);
    args.running_var = param_out(running_var);
    args.momentum = momentum.value_or(0);
    args.cumulative = !momentum;
    args.eps = eps;
    Backend::join(args, x);
    return save_stats;
  }

  static std::tuple<Tensor, Tensor> batch_norm_apply(const Tensor& input,
                                                     const OptionalTensor& weight,
                                                     const OptionalTensor& bias,
                                                     const Tensor& save_stats,
                                                     const OptionalTensor& residual, int64_t act,
                                                     double act_param, bool save_mask) {
    Input x = check_input(input, Stage::kEvalForward, check_act(act));
    ForwardArgs args{};
    args.weight = check_param("weight", weight, x);
    args.bias = check_param("bias", bias, x);
    // Read, and never written: see ForwardArgs.
    args.save_stats = const_cast<double*>(check_matrix("save_stats", save_stats, 3, x));
    return apply(args, x, residual, act_param, save_mask);
  }

  // [2, C]: of dy and dy (x - mean) / std, where dy has come through the activation.
  static Tensor batch_norm_backward_sums(const Tensor& grad_out, const Tensor& input,
                                         const OptionalTensor& weight, const Tensor& save_stats,
                                         const OptionalTensor& bias, const OptionalTensor& residual,
                                         const OptionalTensor& mask, int64_t act,
                                         double act_param) {
    Input x = check_input(input, Stage::kTrainBackward, check_act(act));
    x.problem.need_input = false;
    BackwardArgs args{};
    const Given given(args, x, grad_out, weight, save_stats, bias, residual, mask, act_param);

    Tensor sums = allocate_matrix(x, 2, x.problem.c, aoti_torch_dtype_float64());
    auto* const to = static_cast<double*>(sums.mutable_data_ptr());
    args.grad_bias = {to, 1, DType::kFloat64};
    args.grad_weight = {to + x.problem.c, 1, DType::kFloat64};
    if (x.empty())
      torch::stable::zero_(sums);
    else
      Backend::run(args, x);
    return sums;
  }

  static std::tuple<Tensor, Tensor> batch_norm_backward_apply(
      const Tensor& grad_out, const Tensor& input, const OptionalTensor& weight,
      const Tensor& save_stats, const Tensor& grad_means, const OptionalTensor& bias,
      const OptionalTensor& residual, const OptionalTensor& mask, int64_t act, double act_param,
      bool need_input, bool need_residual) {
    Input x = check_input(input, Stage::kApplyBackward, check_act(act));
    x.problem.need_input = need_input;
    x.problem.need_residual = need_residual;
    x.problem.need_params = false;
    BackwardArgs args{};
    const Given given(args, x, grad_out, weight, save_stats, bias, residual, mask, act_param);
    args.grad_means = check_matrix("grad_means", grad_means, 2, x);

    Tensor grad_input = need_input ? Backend::allocate_output(x) : undefined();
    Tensor grad_residual = need_residual ? Backend::allocate_output(x) : undefined();
    args.grad_input = need_input ? grad_input.mutable_data_ptr() : nullptr;
    args.grad_residual = need_residual ? grad_residual.mutable_data_ptr() : nullptr;
    if (!x.empty() && x.problem.applies()) Backend::run(args, x);
    return {grad_input, grad_residual};
  }

 private:
  // The output and the mask of a forward whose statistics are given.
  static std::tuple<Tensor, Tensor> apply(ForwardArgs& args, Input& x,
                                          const OptionalTensor& residual, double act_param,
                                          bool save_mask) {
    const OptionalTensor z = check_like_input("residual", residual, x);
    set_activation(x.problem, z.has_value(), save_mask);
    Tensor output = Backend::allocate_output(x);
    Tensor mask = save_mask ? allocate_mask(x) : undefined();
    args.input = x.tensor.const_data_ptr();
    args.residual = data(z);
    args.output = output.mutable_data_ptr();
    args.mask = x.problem.has_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
    args.act_param = act_param;
    if (!x.empty()) Backend::run(args, x);
    return {output, mask};
  }

  // What a backward with given statistics reads, checked; holds copies that had to be made.
  struct Given {
    Tensor dy;
    OptionalTensor z;

    Given(BackwardArgs& args, Input& x, const Tensor& grad_out, const OptionalTensor& weight,
          const Tensor& save_stats, const OptionalTensor& bias, const OptionalTensor& residual,
          const OptionalTensor& mask, double act_param)
        : dy(check_like_input("grad_out", grad_out, x)),
          z(check_like_input("residual", residual, x)) {
      args.weight = check_param("weight", weight, x);
      args.bias = check_param("bias", bias, x);
      args.mask = check_mask(mask, x);
      args.save_stats = check_matrix("save_stats", save_stats, 3, x);
      check_act_operands(z.has_value(), mask.has_value(), x.problem.need_residual, x);
      set_activation(x.problem, z.has_value(), mask.has_value());
      args.grad_out = dy.const_data_ptr();
      args.input = x.tensor.const_data_ptr();
      args.residual = data(z);
      args.act_param = act_param;
    }
  };

  static const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

  // `mask`: whether there is one or one is to be saved.
  static void set_activation(Problem& p, bool residual, bool mask) {
    const Needs needs = traits(p.act).needs;
    p.residual = residual && (!is_backward(p.stage) || needs == Needs::kSum);
    p.has_mask = mask && needs == Needs::kSign && (residual || is_backward(p.stage));
  }
};

}  // namespace bnext
