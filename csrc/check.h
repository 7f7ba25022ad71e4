// From tensors to a Problem: every validation of an op's arguments and its message, the recognition
// of memory formats, and allocation. Nothing is written before the last check has passed. Includes
// the LibTorch stable ABI; used by the op files of every backend.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "batch_norm.h"

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace bnext {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// As STD_TORCH_CHECK, without the path of this file in the user's message.
#define BNEXT_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]    \
  ::bnext::fail("bnext: ", __VA_ARGS__)

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Calls a shim function and keeps the text of its error, which torch's own macro drops below 2.13:
// a user must be able to read that memory ran out.
#define BNEXT_SHIM(call)                                                                       \
  BNEXT_CHECK((call) == AOTI_TORCH_SUCCESS, torch_exception_get_what_without_backtrace         \
                                                ? torch_exception_get_what_without_backtrace() \
                                                : #call " failed (out of memory?)")

inline std::string shape_string(const Tensor& t) {
  std::string s = "[";
  for (int64_t size : t.sizes()) s += (s.size() > 1 ? ", " : "") + std::to_string(size);
  return s + "]";
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another dtype";
  }
}

inline DType check_dtype(const char* name, const Tensor& t) {
  static const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64(),
                       bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
  int32_t code;
  BNEXT_SHIM(aoti_torch_get_dtype(t.get(), &code));
  if (code == f32) return DType::kFloat32;
  if (code == bf16) return DType::kBFloat16;
  if (code == f16) return DType::kFloat16;
  if (code == f64) return DType::kFloat64;
  BNEXT_CHECK(false, name, ": expected float32, float64, bfloat16 or float16, got ",
              dtype_name(t.scalar_type()));
}

inline void check_device(const char* name, const Tensor& t, const Tensor& input) {
  int32_t type, input_type;
  BNEXT_SHIM(aoti_torch_get_device_type(t.get(), &type));
  BNEXT_SHIM(aoti_torch_get_device_type(input.get(), &input_type));
  BNEXT_CHECK(type == input_type && t.get_device_index() == input.get_device_index(), name,
              ": expected to be on the same device as input, but it is on another");
}

// torch's suggest_memory_format for 4-d and 5-d tensors: channels last iff strides fall in the
// order C, W, H, (D,) N; ambiguous strides are contiguous. (c10/core/MemoryFormat.h)
inline bool suggests_channels_last(const Tensor& t) {
  const int64_t dim = t.dim();
  if (dim != 4 && dim != 5) return false;
  const auto sizes = t.sizes(), strides = t.strides();
  if (strides[1] == 0) return false;
  int64_t min = 0;
  const auto falls = [&](int64_t d) {
    if (sizes[d] == 0 || strides[d] < min || (d == 0 && min == strides[1])) return false;
    min = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
    return true;
  };
  if (!falls(1)) return false;
  for (int64_t d = dim - 1; d >= 2; --d)
    if (!falls(d)) return false;
  return falls(0);
}

// Calls f(dimension, stride) for each dimension of t, of t made dense in the format.
template <class F>
inline void for_each_dense_stride(const Tensor& t, bool channels_last, const F& f) {
  const auto sizes = t.sizes();
  int64_t stride = 1;
  const auto place = [&](int64_t d) {
    f(d, stride);
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  };
  if (channels_last) place(1);
  for (int64_t d = t.dim() - 1; d >= 0; --d)
    if (!(channels_last && d == 1)) place(d);
}

// t itself where it is dense in the format already, else a copy.
inline Tensor as_dense(const Tensor& t, bool channels_last) {
  const auto sizes = t.sizes(), strides = t.strides();
  bool is_dense = true;
  for_each_dense_stride(t, channels_last, [&](int64_t d, int64_t stride) {
    is_dense &= sizes[d] == 1 || strides[d] == stride;
  });
  if (is_dense) return t;
  const auto format = !channels_last ? MemoryFormat::Contiguous
                      : t.dim() == 4 ? MemoryFormat::ChannelsLast
                                     : MemoryFormat::ChannelsLast3d;
  return torch::stable::contiguous(t, format);
}

// Uninitialised memory on t's device; dtype is an aoti_torch_dtype_*() code.
inline Tensor allocate(const Tensor& t, Sizes sizes, Sizes strides, int32_t dtype) {
  int32_t device_type, device_index;
  AtenTensorHandle handle;
  BNEXT_SHIM(aoti_torch_get_device_type(t.get(), &device_type));
  BNEXT_SHIM(aoti_torch_get_device_index(t.get(), &device_index));
  BNEXT_SHIM(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                      strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

inline int32_t dtype_code(const Tensor& t) {
  int32_t code;
  BNEXT_SHIM(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

inline Tensor allocate_like(const Tensor& t, bool channels_last) {
  std::vector<int64_t> strides(static_cast<size_t>(t.dim()));
  for_each_dense_stride(t, channels_last, [&](int64_t d, int64_t stride) { strides[d] = stride; });
  return allocate(t, t.sizes(), strides, dtype_code(t));
}

// One value per channel, in param's dtype.
inline Tensor allocate_param(const Tensor& param) {
  return allocate(param, {param.sizes()[0]}, {1}, dtype_code(param));
}

inline Tensor allocate_save_stats(const Tensor& input) {
  const int64_t c = input.sizes()[1];
  return allocate(input, {2, c}, {c, 1}, aoti_torch_dtype_float64());
}

// Without rows where there is nothing to mask: an ahead-of-time compiled graph has no undefined
// tensors, so whoever asks for a mask gets one.
inline Tensor allocate_mask(const Tensor& input, const Problem& p) {
  if (!p.relu || !p.residual) return allocate(input, {0}, {1}, aoti_torch_dtype_uint8());
  return allocate(input, {p.mask_rows(), p.mask_row_bytes()}, {p.mask_row_bytes(), 1},
                  aoti_torch_dtype_uint8());
}

// The input of an op and the problem it poses. `channels_last` is the tensors' memory format; the
// problem's may differ where both describe the same memory.
struct Input {
  Tensor tensor;  // dense
  bool channels_last;
  Problem problem;
};

inline Input check_input(const Tensor& input, Stage stage, bool relu, bool residual) {
  BNEXT_CHECK(input.dim() >= 2, "input: expected at least 2 dimensions [N, C, ...], got ",
              shape_string(input));
  const DType dtype = check_dtype("input", input);
  const bool channels_last = suggests_channels_last(input);
  const auto sizes = input.sizes();
  int64_t hw = 1;
  for (int64_t d = 2; d < input.dim(); ++d) hw *= sizes[d];
  const Problem p{stage, sizes[0], sizes[1], hw, channels_last, dtype, relu, residual};
  return {as_dense(input, channels_last), channels_last, canonical(p)};
}

// A tensor with input's shape and dtype, made dense in input's memory format.
inline Tensor check_like_input(const char* name, const Tensor& t, const Tensor& input,
                               bool channels_last) {
  check_device(name, t, input);
  BNEXT_CHECK(t.scalar_type() == input.scalar_type(), name, ": expected input's dtype ",
              dtype_name(input.scalar_type()), ", got ", dtype_name(t.scalar_type()));
  bool same = t.dim() == input.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.sizes()[d] == input.sizes()[d];
  BNEXT_CHECK(same, name, ": expected input's shape ", shape_string(input), ", got ",
              shape_string(t));
  return as_dense(t, channels_last);
}

inline DType check_param(const char* name, const Tensor& t, const Tensor& input) {
  check_device(name, t, input);
  const int64_t c = input.sizes()[1];
  BNEXT_CHECK(t.dim() == 1 && t.sizes()[0] == c, name, ": expected shape [", c,
              "], one value per channel of input, got ", shape_string(t));
  const DType dtype = check_dtype(name, t), input_dtype = check_dtype("input", input);
  const bool half = element_size(input_dtype) == 2;
  BNEXT_CHECK(dtype == input_dtype || (half && dtype == DType::kFloat32), name, ": expected dtype ",
              dtype_name(input.scalar_type()), half ? " or float32" : "", " for ",
              dtype_name(input.scalar_type()), " input, got ", dtype_name(t.scalar_type()));
  return dtype;
}

inline ParamIn check_param_in(const char* name, const OptionalTensor& t, const Tensor& input) {
  if (!t) return {};
  const DType dtype = check_param(name, *t, input);
  return {t->const_data_ptr(), t->strides()[0], dtype};
}

// Checked now; its memory is only asked for (which may copy a copy-on-write tensor) once all checks
// passed.
inline ParamOut mutable_param(const OptionalTensor& t) {
  if (!t) return {};
  return {t->mutable_data_ptr(), t->strides()[0], check_dtype("", *t)};
}

inline void check_counter(const OptionalTensor& t, const Tensor& input) {
  if (!t) return;
  check_device("num_batches_tracked", *t, input);
  BNEXT_CHECK(t->scalar_type() == ScalarType::Long && t->numel() == 1,
              "num_batches_tracked: expected one int64 value, got ", dtype_name(t->scalar_type()),
              " ", shape_string(*t));
}

inline const uint8_t* check_mask(const OptionalTensor& t, const Tensor& input, const Problem& p) {
  if (!t) return nullptr;
  check_device("relu_mask", *t, input);
  BNEXT_CHECK(t->scalar_type() == ScalarType::Byte && t->is_contiguous() &&
                  t->numel() == p.mask_rows() * p.mask_row_bytes(),
              "relu_mask: expected contiguous uint8 [", p.mask_rows(), ", ", p.mask_row_bytes(),
              "], got ", dtype_name(t->scalar_type()), " ", shape_string(*t));
  return static_cast<const uint8_t*>(t->const_data_ptr());
}

inline const double* check_save_stats(const OptionalTensor& t, const Tensor& input) {
  if (!t) return nullptr;
  check_device("save_stats", *t, input);
  const int64_t c = input.sizes()[1];
  BNEXT_CHECK(t->scalar_type() == ScalarType::Double && t->is_contiguous() && t->dim() == 2 &&
                  t->sizes()[0] == 2 && t->sizes()[1] == c,
              "save_stats: expected contiguous float64 [2, ", c, "], got ",
              dtype_name(t->scalar_type()), " ", shape_string(*t));
  return static_cast<const double*>(t->const_data_ptr());
}

}  // namespace bnext
