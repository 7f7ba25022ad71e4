// The schemas of torch.ops.bnext, nothing else. Backends register their kernels in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bnext, m) {
  m.def(
      "batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
      "float? momentum, float eps, bool relu, bool save_mask) "
      "-> (Tensor output, Tensor save_stats, Tensor relu_mask)");
  m.def(
      "batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor running_mean, Tensor running_var, float eps, bool relu, bool save_mask) "
      "-> (Tensor output, Tensor relu_mask)");
  m.def(
      "batch_norm_backward(Tensor grad_out, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor? relu_mask, Tensor? save_stats, Tensor? running_mean, Tensor? running_var, float "
      "eps, "
      "bool relu, bool need_input, bool need_weight, bool need_bias, bool need_residual) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");
  m.def(
      "batch_norm_double_backward(Tensor grad_grad_input, Tensor? grad_grad_weight, "
      "Tensor? grad_grad_bias, Tensor? grad_grad_residual, Tensor grad_out, Tensor input, "
      "Tensor? weight, Tensor? bias, Tensor? relu_mask, Tensor? save_stats, "
      "Tensor? running_mean, Tensor? running_var, float eps, bool relu, "
      "bool need_grad_out, bool need_input, bool need_weight) "
      "-> (Tensor grad_grad_out, Tensor grad_input, Tensor grad_weight)");
}
