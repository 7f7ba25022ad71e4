// The schemas of torch.ops.bnext. The backends register their kernels in cpu/ and cuda/. Arguments
// that a plain batch norm does not need come last and have defaults, because passing one costs
// 0.1 us (a tensor) to 0.2 us (a number). `act` is an Act of activation.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bnext, m) {
  m.def(
      "batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
      "Tensor? residual=None, int act=0, float act_param=0.0, bool save_mask=False) "
      "-> (Tensor output, Tensor save_stats, Tensor mask)");
  m.def(
      "batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, "
      "Tensor running_var, float eps, "
      "Tensor? residual=None, int act=0, float act_param=0.0, bool save_mask=False) "
      "-> (Tensor output, Tensor mask)");
  m.def(
      "batch_norm_backward(Tensor grad_out, Tensor input, Tensor? weight, Tensor? save_stats, "
      "float eps, Tensor? running_mean=None, Tensor? running_var=None, Tensor? bias=None, "
      "Tensor? residual=None, Tensor? mask=None, int act=0, float act_param=0.0, "
      "bool need_input=True, bool need_weight=True, bool need_bias=True, bool need_residual=False) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");
  m.def(
      "batch_norm_double_backward(Tensor grad_grad_input, Tensor? grad_grad_weight, "
      "Tensor? grad_grad_bias, Tensor? grad_grad_residual, Tensor grad_out, Tensor input, "
      "Tensor? weight, Tensor? save_stats, float eps, Tensor? running_mean=None, "
      "Tensor? running_var=None, Tensor? bias=None, Tensor? residual=None, Tensor? mask=None, "
      "int act=0, float act_param=0.0, "
      "bool need_grad_out=True, bool need_input=True, bool need_weight=True) "
      "-> (Tensor grad_grad_out, Tensor grad_input, Tensor grad_weight)");

  // Sums and application apart, for several processes: what they exchange comes between.
  m.def("batch_norm_moments(Tensor input, float eps) -> Tensor moments");
  m.def(
      "batch_norm_join(Tensor input, Tensor moments, Tensor counts, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) "
      "-> Tensor save_stats");
  m.def(
      "batch_norm_apply(Tensor input, Tensor? weight, Tensor? bias, Tensor save_stats, "
      "Tensor? residual=None, int act=0, float act_param=0.0, bool save_mask=False) "
      "-> (Tensor output, Tensor mask)");
  m.def(
      "batch_norm_backward_sums(Tensor grad_out, Tensor input, Tensor? weight, Tensor save_stats, "
      "Tensor? bias=None, Tensor? residual=None, Tensor? mask=None, int act=0, "
      "float act_param=0.0) -> Tensor sums");
  m.def(
      "batch_norm_backward_apply(Tensor grad_out, Tensor input, Tensor? weight, Tensor save_stats, "
      "Tensor grad_means, Tensor? bias=None, Tensor? residual=None, Tensor? mask=None, int act=0, "
      "float act_param=0.0, bool need_input=True, bool need_residual=False) "
      "-> (Tensor grad_input, Tensor grad_residual)");
}
