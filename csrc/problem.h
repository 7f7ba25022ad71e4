// What a batch norm is, without torch: the problem, the pointers it works on, and its enumerations.
// Includes only the standard library; shared by the plans, the bindings and all kernels.
#pragma once

#include <cstdint>

#include "activation.h"

namespace bnext {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Calls f with a value of the dtype's type; the caller names its 16-bit types.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class BFloat16, class Float16, class F>
BNEXT_HD constexpr decltype(auto) visit_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

constexpr int64_t element_size(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
}

constexpr const char* to_string(DType t) {
  return t == DType::kFloat32    ? "float32"
         : t == DType::kFloat64  ? "float64"
         : t == DType::kBFloat16 ? "bfloat16"
                                 : "float16";
}

enum class Stage : uint8_t {
  kTrainForward,
  kEvalForward,
  kTrainBackward,
  kEvalBackward,
  kDoubleBackward,  // with the batch's statistics or frozen ones; both sum first
  kApplyBackward,   // dx from sums that are given
};

constexpr const char* to_string(Stage s) {
  return s == Stage::kTrainForward    ? "train_forward"
         : s == Stage::kEvalForward   ? "eval_forward"
         : s == Stage::kTrainBackward ? "train_backward"
         : s == Stage::kEvalBackward  ? "eval_backward"
         : s == Stage::kApplyBackward ? "apply_backward"
                                      : "double_backward";
}
// Whether sums over all values come before the first result.
constexpr bool is_training(Stage s) {
  return s == Stage::kTrainForward || s == Stage::kTrainBackward || s == Stage::kDoubleBackward;
}
constexpr bool is_backward(Stage s) {
  return s != Stage::kTrainForward && s != Stage::kEvalForward;
}
// Tensors that are read once to sum and once more to apply.
constexpr int64_t operands(Stage s) {
  return !is_backward(s) ? 1 : s == Stage::kDoubleBackward ? 3 : 2;
}

// One call. Memory is dense: [n, c, hw], or [n * hw, c] where channels_last.
struct Problem {
  Stage stage;
  int64_t n, c, hw;
  bool channels_last;
  DType dtype;    // input, output, residual and their gradients
  Act act;        // y = act(bn(x) + residual)
  bool residual;  // a residual is read
  bool has_mask;  // a mask of where the activation passes is written (forward) or read (backward)
  // Which are asked for: dx (forward: the output), dweight or dbias, and the residual's gradient.
  bool need_input = true, need_params = true, need_residual = false;
  int alignment = 16;  // common to all tensors, in bytes

  constexpr int64_t numel() const { return n * c * hw; }
  constexpr int64_t count() const { return n * hw; }  // values per channel
  constexpr int64_t bytes() const { return numel() * element_size(dtype); }
  // Rows of channels that accesses of four do not divide are cut into slices of at most so many, as
  // few as can be: eight bytes of a mask take them, wherever they begin in the first one.
  static constexpr int64_t kMaxSlice = 7 * 8 + 1;
  constexpr bool is_sliced() const { return channels_last && c % 4 != 0; }
  constexpr int64_t slice() const { return ceil_div(c, ceil_div(c, kMaxSlice)); }
  constexpr int64_t slice_bytes() const { return ceil_div(slice() + 7, 8); }
  // Whether a mask of slices is by aligned items, wherever the tensors begin.
  constexpr bool needs_aligned_slices() const {
    return is_sliced() && numel() % 8 == 0 && dtype != DType::kFloat64;
  }
  // The 1-bit mask: rows of memory in whole bytes, slices and those of [n, c, hw] of as many as
  // they touch if bits lie in bytes as elements in aligned items. How they lie is the backend's.
  constexpr int64_t mask_rows() const { return channels_last ? n * hw : n * c; }
  constexpr int64_t mask_row_bytes() const {
    return is_sliced()     ? mask_bytes_of_slices()
           : channels_last ? ceil_div(c, 8)
                           : mask_bytes_of_hw();
  }
  constexpr int64_t mask_bytes_of_slices() const { return ceil_div(c, slice()) * slice_bytes(); }
  constexpr int64_t mask_bytes_of_hw() const { return ceil_div(hw, 8) + (hw % 8 + 6) / 8; }
  // Whether elements are written, and not only sums.
  constexpr bool applies() const { return need_input || need_residual; }

  // The least any kernel must read.
  constexpr int64_t bytes_read() const {
    const bool reads_input = need_params || act != Act::kNone || stage != Stage::kEvalBackward;
    return reads_input ? operands(stage) * bytes() : bytes();
  }
  // The least any kernel must read and write.
  constexpr int64_t bytes_floor() const {
    return bytes_read() + (need_input ? bytes() : 0) + (residual ? bytes() : 0) +
           (need_residual ? bytes() : 0) + (has_mask ? mask_rows() * mask_row_bytes() : 0);
  }

  bool operator==(const Problem&) const = default;
};

// The same memory, described so that kernels see long runs: a single channel becomes one row, and
// rows of one element become columns.
constexpr Problem canonical(Problem p) {
  if (p.c == 1) {
    p.hw *= p.n;
    p.n = 1;
    p.channels_last = false;
  } else if (p.hw == 1) {
    p.channels_last = true;
  }
  return p;
}

// A per-channel vector whose dtype is known only at run time; data is null if it is absent.
template <class Void>
struct Vector {
  Void* data = nullptr;
  int64_t stride = 1;  // elements
  DType dtype = DType::kFloat32;

  constexpr explicit operator bool() const { return data != nullptr; }
};
using ParamIn = Vector<const void>;
using ParamOut = Vector<void>;

struct ForwardArgs {
  const void* input;
  const void* residual;  // null: none
  void* output;
  uint8_t* mask;  // null: not saved
  ParamIn weight, bias;
  ParamIn frozen_mean, frozen_var;     // eval: the running statistics
  ParamOut running_mean, running_var;  // training: updated, where given
  int64_t* num_batches_tracked;        // null: none
  double* moments;                     // [3, C]: mean, sum of squares about it, and what a double
                                       // cannot hold of the mean; null: not asked for
  double* save_stats;                  // [3, C]: mean, 1 / sqrt(var + eps), and the third as above;
                                       // eval: read, null: the statistics are frozen
  double momentum;
  bool cumulative;  // average all batches counted and ignore the momentum
  double eps, act_param;
};

struct BackwardArgs {
  const void* grad_out;
  const void* input;
  const void* residual;  // null: none, or the mask is enough
  const uint8_t* mask;   // null: what the activation needs is recomputed from input and residual
  ParamIn weight, bias;
  const double* save_stats;           // null: the statistics are frozen
  const double* grad_means;           // kApplyBackward, [2, C]: of dy and dy (x - mean) / std
  ParamIn running_mean, running_var;  // the frozen statistics
  void* grad_input;                   // null: not asked for; likewise below
  void* grad_residual;
  ParamOut grad_weight, grad_bias;
  double eps, act_param;
};

struct DoubleBackwardArgs {
  const void *grad_grad_input, *grad_grad_residual;  // the second null: none
  const void *grad_out, *input;
  const void* residual;  // this and the mask as in BackwardArgs
  const uint8_t* mask;
  ParamIn weight, bias, grad_grad_weight, grad_grad_bias;
  const double* save_stats;  // as in BackwardArgs
  ParamIn running_mean, running_var;
  void *grad_grad_out, *grad_input;  // null: not asked for
  ParamOut grad_weight;
  double eps, act_param;
};

}  // namespace bnext
