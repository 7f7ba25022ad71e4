// The mask between its rows as the op has them, each padded to bytes, one after the other, and the
// plan's longer rows of columns, which kernels read and write without gaps. Includes no torch.
#pragma once

#include <algorithm>
#include <cstring>

#include "coefficients.h"

namespace bnext {

class RowMask {
 public:
  // Replaces `mask` by scratch where the two differ.
  template <class Byte>
  RowMask(const CpuPlan& plan, const Problem& problem, Byte*& mask)
      : bits_(problem.channels_last ? problem.c : problem.hw),
        per_row_(plan.map == IndexMap::kColumns ? plan.row_stride / bits_ : 1),
        all_(problem.mask_rows()),
        row_bytes_((plan.row_stride + 7) / 8),
        unused_(mask ? problem.mask_rows() * (problem.mask_row_bytes() - ceil_div(bits_, 8)) : 0),
        mask_(const_cast<uint8_t*>(mask)),
        differs_(mask && per_row_ > 1 && bits_ % 8 != 0),
        rows_(1, differs_ ? ceil_div(all_, per_row_) * row_bytes_ + 8 : 0) {
    if (differs_) mask = rows_[0];
  }

  // From the op's mask, before a backward, and to it, after a forward.
  template <class Parallel>
  void load(const Parallel& parallel) {
    for_each_row(parallel, [&](const uint8_t* from, uint8_t* to, int64_t count) {
      uint64_t waiting = 0;
      int filled = 0;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t bit = 0; bit < bits_; bit += 8) {
          const int n = static_cast<int>(std::min<int64_t>(8, bits_ - bit));
          waiting |= static_cast<uint64_t>(*from++ & ((1u << n) - 1)) << filled;
          filled += n;
          if (filled < 32) continue;
          std::memcpy(to, &waiting, 4);
          to += 4, waiting >>= 32, filled -= 32;
        }
      std::memcpy(to, &waiting, ceil_div(filled, 8));
    });
  }
  template <class Parallel>
  void store(const Parallel& parallel) {
    if (unused_ > 0) std::fill_n(mask_ + all_ * ceil_div(bits_, 8), unused_, uint8_t{0});
    for_each_row(parallel, [&](uint8_t* to, const uint8_t* from, int64_t count) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t bit = 0; bit < bits_; bit += 8) {
          const int64_t at = i * bits_ + bit;
          uint16_t two;
          std::memcpy(&two, from + at / 8, sizeof two);
          const unsigned kept = bits_ - bit < 8 ? (1u << (bits_ - bit)) - 1 : 0xff;
          *to++ = static_cast<uint8_t>(two >> at % 8 & kept);
        }
    });
  }

 private:
  // f(the op's rows, the plan's row, how many of the op's).
  template <class Parallel, class F>
  void for_each_row(const Parallel& parallel, const F& f) {
    if (!differs_) return;
    parallel(ceil_div(all_, per_row_), std::max<int64_t>(1, 32768 / (per_row_ * bits_)),
             [&](int64_t begin, int64_t end) {
               for (int64_t row = begin; row < end; ++row)
                 f(mask_ + row * per_row_ * ((bits_ + 7) / 8), rows_[0] + row * row_bytes_,
                   std::min(per_row_, all_ - row * per_row_));
             });
  }

  // per_row_: of the op's rows in one of the plan's; unused_: bytes after the last row
  const int64_t bits_, per_row_, all_, row_bytes_, unused_;
  uint8_t* const mask_;
  const bool differs_;
  Arrays<uint8_t> rows_;
};

}  // namespace bnext
