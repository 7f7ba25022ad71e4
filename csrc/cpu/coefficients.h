// Per-channel memory of a call: parameters of any dtype, and scratch. Includes no torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "float16.h"
#include "kernels.h"

namespace bnext {

// A bfloat16 of a parameter; the kernels convert theirs as vectors.
struct HostBFloat16 {
  uint16_t bits;

  HostBFloat16() = default;
  explicit HostBFloat16(double value) {
    const float single = static_cast<float>(value);
    uint32_t word;
    std::memcpy(&word, &single, sizeof word);
    const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;  // to nearest even
    bits = static_cast<uint16_t>(std::isnan(single) ? 0x7fc0 : rounded);
  }
  operator double() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
};

// A parameter's values as doubles; `absent` where there is none. A switch per array, not per value,
// is what keeps small maps of many channels fast.
template <class Data>
inline void read(Vector<Data> v, int64_t count, double absent, double* values) {
  if (!v) return void(std::fill_n(values, count, absent));
  visit_dtype<HostBFloat16, HostFloat16>(v.dtype, [&](auto t) {
    const auto* p = static_cast<const decltype(t)*>(v.data);
    for (int64_t c = 0; c < count; ++c) values[c] = p[c * v.stride];
  });
}

inline void write(ParamOut v, int64_t c0, int64_t c1, const double* values) {
  if (!v) return;
  visit_dtype<HostBFloat16, HostFloat16>(v.dtype, [&](auto t) {
    auto* p = static_cast<decltype(t)*>(v.data);
    for (int64_t c = c0; c < c1; ++c) p[c * v.stride] = static_cast<decltype(t)>(values[c]);
  });
}

// Scratch of one call: `arrays` of `length` values, not set.
template <class T>
class Arrays {
 public:
  Arrays(int64_t arrays, int64_t length)
      : length_(length), data_(new (std::nothrow) T[arrays * length]) {
    if (!data_)
      throw std::runtime_error("bnext: not enough memory: you tried to allocate " +
                               std::to_string(arrays * length * sizeof(T)) + " bytes.");
  }
  T* operator[](int64_t i) { return data_.get() + i * length_; }

 private:
  int64_t length_;
  std::unique_ptr<T[]> data_;
};

// Coefficients as kernels read them: of channels, or spread to the slots of columns.
template <class T>
class Coefficients {
 public:
  Coefficients(const CpuPlan& plan, Spread spread, int64_t arrays)
      : plan_(plan),
        spread_(spread),
        values_(arrays, plan.channels),
        slots_(plan.map == IndexMap::kColumns ? arrays : 0, round_up(plan.columns(), kMaxUnit)) {
    std::fill_n(values_[0], arrays * plan.channels, T{});
  }

  T& at(int64_t array, int64_t c) { return values_[array][c]; }
  T* values(int64_t array) { return values_[array]; }
  const T* of(int64_t array) {
    return plan_.map == IndexMap::kColumns ? slots_[array] : values_[array];
  }
  // The values of channels [c0, c1) in arrays [first, last) are final.
  void publish(int64_t c0, int64_t c1, int64_t first, int64_t last) {
    for (int64_t i = first; i < last && plan_.map == IndexMap::kColumns; ++i)
      spread_(plan_, c0, c1, values_[i], slots_[i]);
  }

 private:
  static constexpr int64_t kMaxUnit = 32;

  const CpuPlan& plan_;
  const Spread spread_;
  Arrays<T> values_, slots_;
};

}  // namespace bnext
