// Tensors through the LibTorch stable ABI: errors, dtypes, devices, memory formats, allocation.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace bnext {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// STD_TORCH_CHECK without the path of this file in the user's message.
#define BNEXT_CHECK(condition, ...)          \
  do {                                       \
    if (!(condition)) [[unlikely]]           \
      ::bnext::fail("bnext: ", __VA_ARGS__); \
  } while (0)

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The error message of the last shim call, so that a user can read that memory ran out. Torch's own
// macros drop it before 2.13.
inline const char* shim_error() {
  return torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace()
                                                    : "a call into torch failed (out of memory?)";
}

#define BNEXT_SHIM(call) BNEXT_CHECK((call) == AOTI_TORCH_SUCCESS, ::bnext::shim_error())

inline std::string shape_string(const Tensor& t) {
  std::string s = "[";
  for (int64_t size : t.sizes()) s += (s.size() > 1 ? ", " : "") + std::to_string(size);
  return s + "]";
}

inline int32_t dtype_code(const Tensor& t) {
  int32_t code;
  BNEXT_SHIM(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

// A dtype's name in torch's messages: Float, Long, ... (scalar_type() refuses the rare ones.)
inline const char* type_name(const Tensor& t) {
  return torch::headeronly::toString(static_cast<ScalarType>(dtype_code(t)));
}

inline std::optional<DType> find_dtype(const Tensor& t) {
  static const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64(),
                       bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
  const int32_t code = dtype_code(t);
  if (code == f32) return DType::kFloat32;
  if (code == bf16) return DType::kBFloat16;
  if (code == f16) return DType::kFloat16;
  if (code == f64) return DType::kFloat64;
  return std::nullopt;
}

struct Device {
  int32_t type, index;

  bool operator==(const Device&) const = default;
};

inline Device device_of(const Tensor& t) {
  Device device;
  BNEXT_SHIM(aoti_torch_get_device_type(t.get(), &device.type));
  BNEXT_SHIM(aoti_torch_get_device_index(t.get(), &device.index));
  return device;
}

inline std::string to_string(const Device& device) {
  using torch::headeronly::DeviceType;
  const auto type = static_cast<DeviceType>(device.type);
  const std::string name = type == DeviceType::CPU    ? "cpu"
                           : type == DeviceType::CUDA ? "cuda"
                           : type == DeviceType::Meta ? "meta"
                                                      : "device " + std::to_string(device.type);
  return device.index < 0 ? name : name + ":" + std::to_string(device.index);
}

// torch's suggest_memory_format for 4-d and 5-d tensors (c10/core/MemoryFormat.h): channels last
// iff strides ascend in the order C, W, H, (D,) N; ambiguous strides are contiguous.
inline bool suggests_channels_last(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  if (strides[1] == 0) return false;
  int64_t min = 0;
  const auto falls = [&](int64_t d) {
    if (sizes[d] == 0 || strides[d] < min || (d == 0 && min == strides[1])) return false;
    min = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
    return true;
  };
  if (!falls(1)) return false;
  for (int64_t d = t.dim() - 1; d >= 2; --d)
    if (!falls(d)) return false;
  return falls(0);
}

// Calls f(dimension, stride) with the strides that t would have if it were dense in the format.
template <class F>
inline void for_each_dense_stride(const Tensor& t, bool channels_last, const F& f) {
  const auto sizes = t.sizes();
  int64_t stride = 1;
  const auto place = [&](int64_t d) {
    f(d, stride);
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  };
  if (channels_last) place(1);
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d)
    if (!(channels_last && d == 1)) place(d);
}

inline bool is_dense(const Tensor& t, bool channels_last) {
  const auto sizes = t.sizes(), strides = t.strides();
  bool dense = true;
  for_each_dense_stride(t, channels_last, [&](int64_t d, int64_t stride) {
    dense &= sizes[d] == 1 || strides[d] == stride;
  });
  return dense;
}

// The outputs' format for an input that is not dense and contiguous, as in torch's batch norm: the
// one in which it is dense, else the one that its strides suggest.
inline bool is_channels_last(const Tensor& t) {
  const int64_t dim = t.dim();
  return (dim == 4 || dim == 5) && (is_dense(t, true) || suggests_channels_last(t));
}

// t itself if it is dense in the format already, else a copy.
inline Tensor as_dense(const Tensor& t, bool channels_last) {
  if (is_dense(t, channels_last)) return t;
  const auto format = !channels_last ? MemoryFormat::Contiguous
                      : t.dim() == 4 ? MemoryFormat::ChannelsLast
                                     : MemoryFormat::ChannelsLast3d;
  try {
    return torch::stable::contiguous(t, format);
  } catch (const std::exception&) {  // its message names a torch header
    fail("bnext: a dense copy of ", shape_string(t), ": ", shim_error());
  }
}

// t itself if its memory begins at a multiple of 16 bytes, else a copy.
inline Tensor as_aligned(const Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0) return t;
  try {
    return torch::stable::clone(t);
  } catch (const std::exception&) {
    fail("bnext: an aligned copy of ", shape_string(t), ": ", shim_error());
  }
}

// The input of an op and the problem it poses.
struct Input {
  Tensor tensor;  // dense
  Device device;
  Problem problem;
  // The tensors' memory format; the problem's may differ where both describe the same memory.
  bool channels_last;

  bool empty() const { return problem.numel() == 0; }
};

// What a call does not return. (Making one takes two allocations.)
inline const Tensor& undefined() {
  static const Tensor tensor;
  return tensor;
}

// Uninitialised memory; dtype is an aoti_torch_dtype_*() code.
inline Tensor allocate(const Device& device, Sizes sizes, Sizes strides, int32_t dtype) {
  AtenTensorHandle handle;
  BNEXT_SHIM(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                      strides.data(), dtype, device.type, device.index, &handle));
  return Tensor(handle);
}

inline Tensor allocate_like(const Tensor& t, const Device& device, bool channels_last) {
  int64_t few[8];  // on the stack: memory from the heap would be 2 % of a small tensor's call
  const size_t dim = t.sizes().size();
  std::vector<int64_t> many(dim > std::size(few) ? dim : 0);
  int64_t* const strides = many.empty() ? few : many.data();
  for_each_dense_stride(t, channels_last, [&](int64_t d, int64_t stride) { strides[d] = stride; });
  return allocate(device, t.sizes(), {strides, dim}, dtype_code(t));
}

inline Tensor allocate_like(const Input& x) {
  return allocate_like(x.tensor, x.device, x.channels_last);
}

inline Tensor allocate_matrix(const Input& x, int64_t rows, int64_t columns, int32_t dtype) {
  return allocate(x.device, {rows, columns}, {std::max<int64_t>(columns, 1), 1}, dtype);
}

inline Tensor allocate_save_stats(const Input& x) {
  return allocate_matrix(x, 3, x.problem.c, aoti_torch_dtype_float64());
}

// Empty where there is nothing to mask: an ahead-of-time compiled graph has no undefined tensors,
// so whoever asks for a mask gets one.
inline Tensor allocate_mask(const Input& x) {
  const Problem& p = x.problem;
  if (!p.has_mask) return allocate(x.device, {0}, {1}, aoti_torch_dtype_uint8());
  return allocate_matrix(x, p.mask_rows(), p.mask_row_bytes(), aoti_torch_dtype_uint8());
}

inline Tensor allocate_grad(const Tensor& param, const Input& x) {
  return allocate_like(param, x.device, false);
}

}  // namespace bnext
