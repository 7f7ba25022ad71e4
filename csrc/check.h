// Checks an op's arguments and turns them into a Problem. Nothing is written before the last check
// has passed. Where torch's batch norm refuses an argument too, the message contains torch's own
// words. bnext/_check.py is the twin of this file for tensors without memory.
#pragma once

#include "moments.h"
#include "tensor.h"

namespace bnext {

// The schema lets None through, even where it says Tensor.
inline void check_given(const char* name, const Tensor& t) {
  BNEXT_CHECK(t.defined(), name, ": expected a tensor, got None");
}

inline Act check_act(int64_t act) {
  if (act >= 0 && act < std::ssize(kActs)) return static_cast<Act>(act);
  std::string kinds;
  for (int64_t i = 0; i < std::ssize(kActs); ++i)
    kinds += (i ? ", " : "") + std::to_string(i) + " (" + kActs[i].name + ")";
  fail("bnext: act: expected a kind of activation, one of ", kinds, ", got ", act);
}

// A dense tensor, aligned where a GPU's kernels need that.
inline Tensor as_kernels_take_it(const Tensor& t, const Input& x) {
  const bool on_gpu = x.device.type == static_cast<int32_t>(torch::headeronly::DeviceType::CUDA);
  return on_gpu && x.problem.needs_aligned_slices() ? as_aligned(t) : t;
}

// As in torch, an empty tensor of one dimension passes: it has no channels.
inline Input check_input(const Tensor& input, Stage stage, Act act) {
  check_given("input", input);
  const auto sizes = input.sizes();
  const auto dim = static_cast<int64_t>(sizes.size());
  BNEXT_CHECK(dim >= 2 || (dim == 1 && sizes[0] == 0),
              "input: expected at least 2 dimensions [N, C, ...], got ", shape_string(input));
  const std::optional<DType> dtype = find_dtype(input);
  BNEXT_CHECK(dtype, "\"batch_norm\" not implemented for '", type_name(input),
              "' (input: expected float32, float64, bfloat16 or float16)");
  int64_t hw = 1;
  for (int64_t d = 2; d < dim; ++d) hw *= sizes[d];
  const bool contiguous = is_dense(input, false);
  const bool channels_last = !contiguous && is_channels_last(input);
  const Problem p{stage, sizes[0], dim > 1 ? sizes[1] : 0, hw, channels_last, *dtype, act,
                  false, false};
  Input x{contiguous ? input : as_dense(input, channels_last), device_of(input), canonical(p),
          channels_last};
  x.tensor = as_kernels_take_it(x.tensor, x);
  return x;
}

inline void check_device(const char* name, const Tensor& t, const Input& x) {
  const Device device = device_of(t);
  BNEXT_CHECK(device == x.device,
              "Expected all tensors to be on the same device, but found at least two devices, ",
              to_string(x.device), " and ", to_string(device), "! ", name, ": Tensor on device ",
              to_string(device), " is not on the expected device ", to_string(x.device), "!");
}

// A tensor that must have input's shape and dtype, made dense in input's memory format.
inline Tensor check_like_input(const char* name, const Tensor& t, const Input& x) {
  check_given(name, t);
  check_device(name, t, x);
  BNEXT_CHECK(dtype_code(t) == dtype_code(x.tensor), name, ": expected scalar type ",
              type_name(x.tensor), " but found ", type_name(t));
  const auto sizes = t.sizes(), expected = x.tensor.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t d = 0; same && d < sizes.size(); ++d) same = sizes[d] == expected[d];
  BNEXT_CHECK(same, name, ": expected input's shape ", shape_string(x.tensor), ", got ",
              shape_string(t));
  return as_kernels_take_it(as_dense(t, x.channels_last), x);
}

inline OptionalTensor check_like_input(const char* name, const OptionalTensor& t, const Input& x) {
  if (!t) return std::nullopt;
  return check_like_input(name, *t, x);
}

// The distance in elements from one value of t to the next, if it is the same throughout.
inline std::optional<int64_t> element_stride(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  if (sizes.size() == 1) return strides[0];
  int64_t count = 1, stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] == 1) continue;
    if (count == 1) stride = strides[d];
    if (strides[d] != stride * count) return std::nullopt;
    count *= sizes[d];
  }
  return stride;
}

// Checks for one value per channel and returns the dtype. With an empty input torch takes any t.
inline DType check_per_channel(const char* name, const Tensor& t, const Input& x, bool empty) {
  check_device(name, t, x);
  const DType input = x.problem.dtype;
  if (empty) return input;
  const int64_t c = x.problem.c, numel = t.numel();
  BNEXT_CHECK(numel == c, name, " should contain ", c, " elements not ", numel,
              " (one per channel of input ", shape_string(x.tensor), ", got ", shape_string(t),
              ")");
  const std::optional<DType> dtype = find_dtype(t);
  const bool half = element_size(input) == 2;
  BNEXT_CHECK(dtype == input || (half && dtype == DType::kFloat32), name, ": expected scalar type ",
              type_name(x.tensor), " but found ", type_name(t), " (",
              half ? "or Float; torch: "
                   : "torch: mixed dtype (CPU): all inputs must share same datatype. Or: ",
              "mixed dtype (CPU): expect parameter to have scalar type of Float)");
  return *dtype;
}

// Weight, bias or a gradient of one of them: any shape whose values are at one stride.
inline ParamIn check_param(const char* name, const OptionalTensor& t, const Input& x) {
  if (!t) return {};
  const DType dtype = check_per_channel(name, *t, x, x.empty());
  if (x.empty()) return {};
  const std::optional<int64_t> stride = element_stride(*t);
  BNEXT_CHECK(stride, name, ": expected values at one stride in memory, got shape ",
              shape_string(*t), " with other strides");
  return {t->const_data_ptr(), *stride, dtype};
}

// `empty`: whether no value meets it.
inline ParamIn check_statistic(const char* name, const Tensor& t, const Input& x, bool empty) {
  const DType dtype = check_per_channel(name, t, x, empty);
  if (empty) return {};
  const auto strides = t.strides();
  BNEXT_CHECK(strides.size() == 1, "TensorAccessor expected 1 dims but tensor has ", t.dim(), " (",
              name, ": expected shape [", x.problem.c, "], got ", shape_string(t), ")");
  return {t.const_data_ptr(), strides[0], dtype};
}

inline ParamIn check_statistic(const char* name, const OptionalTensor& t, const Input& x,
                               bool empty) {
  return t ? check_statistic(name, *t, x, empty) : ParamIn{};
}
inline ParamIn check_statistic(const char* name, const OptionalTensor& t, const Input& x) {
  return check_statistic(name, t, x, x.empty());
}

// For evaluation. The schema says Tensor because passing a Tensor? costs 20 ns more.
inline ParamIn check_eval_statistic(const char* name, const Tensor& t, const Input& x) {
  if (t.defined()) return check_statistic(name, t, x, x.empty());
  BNEXT_CHECK(x.empty(), name, " must be defined in evaluation mode");
  return {};
}

// Call it after all checks: asking for writable memory may copy a copy-on-write tensor.
inline ParamOut param_out(const OptionalTensor& t) {
  if (!t) return {};
  return {t->mutable_data_ptr(), element_stride(*t).value_or(0), *find_dtype(*t)};
}

inline void check_counter(const OptionalTensor& t, const Input& x) {
  if (!t) return;
  check_device("num_batches_tracked", *t, x);
  BNEXT_CHECK(dtype_code(*t) == aoti_torch_dtype_int64() && t->numel() == 1,
              "num_batches_tracked: expected one int64 value (Long), got ", type_name(*t), " ",
              shape_string(*t));
}

inline const uint8_t* check_mask(const OptionalTensor& t, const Input& x) {
  if (!t) return nullptr;
  check_device("mask", *t, x);
  const Problem& p = x.problem;
  BNEXT_CHECK(dtype_code(*t) == aoti_torch_dtype_uint8() && is_dense(*t, false) &&
                  t->numel() == p.mask_rows() * p.mask_row_bytes(),
              "mask: expected contiguous Byte [", p.mask_rows(), ", ", p.mask_row_bytes(),
              "], got ", is_dense(*t, false) ? "" : "strided ", type_name(*t), " ",
              shape_string(*t));
  return static_cast<const uint8_t*>(t->const_data_ptr());
}

// Doubles, `rows` for each channel.
inline const double* check_matrix(const char* name, const Tensor& t, int64_t rows, const Input& x) {
  check_given(name, t);
  check_device(name, t, x);
  const int64_t c = x.problem.c;
  BNEXT_CHECK(dtype_code(t) == aoti_torch_dtype_float64() && is_dense(t, false) && t.dim() == 2 &&
                  t.sizes()[0] == rows && t.sizes()[1] == c,
              name, ": expected contiguous Double [", rows, ", ", c, "], got ",
              is_dense(t, false) ? "" : "strided ", type_name(t), " ", shape_string(t));
  return static_cast<const double*>(t.const_data_ptr());
}

inline const double* check_save_stats(const OptionalTensor& t, const Input& x) {
  return t ? check_matrix("save_stats", *t, 3, x) : nullptr;
}

// Moments [ranks, 3, C] and counts [ranks] of several processes.
inline void check_joined(JoinArgs& args, const Tensor& moments, const Tensor& counts,
                         const Input& x) {
  check_given("moments", moments);
  check_given("counts", counts);
  check_device("moments", moments, x);
  check_device("counts", counts, x);
  const int64_t c = x.problem.c;
  const auto sizes = moments.sizes(), strides = moments.strides();
  BNEXT_CHECK(dtype_code(moments) == aoti_torch_dtype_float64() && moments.dim() == 3 &&
                  sizes[0] > 0 && sizes[1] == 3 && sizes[2] == c && (c <= 1 || strides[2] == 1),
              "moments: expected Double [ranks, 3, ", c, "] with adjacent channels, got ",
              type_name(moments), " ", shape_string(moments));
  BNEXT_CHECK(dtype_code(counts) == aoti_torch_dtype_float64() && counts.dim() == 1 &&
                  counts.sizes()[0] == sizes[0],
              "counts: expected Double [", sizes[0], "], got ", type_name(counts), " ",
              shape_string(counts));
  args.moments = static_cast<const double*>(moments.const_data_ptr());
  args.rank_stride = strides[0];
  args.row_stride = strides[1];
  args.counts = static_cast<const double*>(counts.const_data_ptr());
  args.count_stride = counts.strides()[0];
  args.ranks = sizes[0];
  args.c = c;
}

// What both derivatives need to find f'(z) where a residual was added.
inline void check_act_operands(bool residual, bool mask, bool had_residual, const Input& x) {
  const Act act = x.problem.act;
  BNEXT_CHECK(act != Act::kNone || !had_residual,
              "act: expected one with a residual's gradient; without, that is grad_out");
  BNEXT_CHECK(mask || !(residual || had_residual) || traits(act).needs != Needs::kSign,
              "mask: expected where a residual was added before ", to_string(act));
  BNEXT_CHECK(residual || !had_residual || traits(act).needs != Needs::kSum,
              "residual: expected where one was added before ", to_string(act));
}

// The double backward takes no activation with a second derivative.
inline void check_act_is_linear(const Input& x) {
  const Act act = x.problem.act;
  BNEXT_CHECK(traits(act).needs != Needs::kSum, "act: expected none that is curved, got ",
              to_string(act));
}

// Both derivatives need the batch's statistics or else the running ones.
inline void check_any_statistics(bool save_stats, bool running, const Input& x) {
  BNEXT_CHECK(save_stats || running || x.empty(),
              "save_stats: expected it, or both running_mean and running_var, got neither");
}

}  // namespace bnext
