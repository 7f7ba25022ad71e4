// Per-channel memory of a call: parameters of any dtype, and scratch. Includes no torch.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

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

inline double read(ParamIn v, int64_t c, double absent) {
  if (!v) return absent;
  return visit_dtype<HostBFloat16, _Float16>(v.dtype, [&](auto t) -> double {
    return static_cast<const decltype(t)*>(v.data)[c * v.stride];
  });
}

inline double read(ParamOut v, int64_t c) {
  return read(ParamIn{v.data, v.stride, v.dtype}, c, 0);
}

inline void write(ParamOut v, int64_t c, double value) {
  if (!v) return;
  visit_dtype<HostBFloat16, _Float16>(v.dtype, [&](auto t) {
    static_cast<decltype(t)*>(v.data)[c * v.stride] = static_cast<decltype(t)>(value);
  });
}

// Scratch of one call: `arrays` of `length` values.
template <class T>
class Arrays {
 public:
  Arrays(int64_t arrays, int64_t length)
      : length_(length), data_(new (std::nothrow) T[arrays * length]()) {
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
        slots_(plan.map == IndexMap::kColumns ? arrays : 0, round_up(plan.columns(), kMaxUnit)) {}

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
