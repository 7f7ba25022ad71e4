// The walkers over columns: rows of memory in which every element has its own sums or coefficients.
//
// A slot is what a unit of columns has in an array of those, lane by lane. The last one belongs to
// the unit that ends where the columns end, and so may repeat some of the one before.
// Compiled per instruction set, as vec.h.
#pragma once

#include "body.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// Storage for the columns of a tile: their sums and coefficients share the L1.
inline constexpr int64_t kTileColumns = 2048, kMaxTileColumns = 4096;
// What does not fill a row; see fold in plan.cpp.
inline constexpr int64_t kMaxRest = 2048;

// Elements that a read is prefetched ahead, into the L2: where rows are visited together, lines of
// the L1 are soon gone (24x512x28x28, float32: sums of a backward 6.3 ms by prefetches into the L1,
// 4.7 so).
inline int64_t elements_ahead(const CpuPlan& p, int64_t element_bytes) {
  return std::max<int64_t>(16 * p.row_stride, 16384 / element_bytes);
}

// f(body, row): the body with the elements that do not fill a row staged, as its row 0.
template <class Body, class F>
[[gnu::noinline]] void with_rest(const Body& body, const CpuPlan& p, F f) {
  using T = typename Body::Element;
  const Place first = place<IndexMap::kColumns>(p, p.rows, 0);
  T in[Body::kInputs][kMaxRest], out[std::max(Body::kOutputs, 1)][kMaxRest];
  uint8_t mask[kMaxRest / 8] = {};
  Body staged = body;
  for (int i = 0; i < Body::kInputs; ++i) {
    if (!body.in[i]) continue;
    std::memcpy(in[i], body.in[i] + first.element, p.rest * sizeof(T));
    std::memset(in[i] + p.rest, 0, (p.row_stride - p.rest) * sizeof(T));
    staged.in[i] = in[i];
  }
  for (int o = 0; o < Body::kOutputs; ++o)
    if (body.out[o]) staged.out[o] = out[o];
  if (body.mask) {
    std::memcpy(mask, body.mask + first.mask_row, (p.rest + 7) / 8);
    staged.mask = mask;
  }
  f(staged);
  for (int o = 0; o < Body::kOutputs; ++o)
    if (body.out[o]) std::memcpy(body.out[o] + first.element, out[o], p.rest * sizeof(T));
  if (Body::kWritesMask && body.mask)
    std::memcpy(const_cast<uint8_t*>(body.mask) + first.mask_row, mask, (p.rest + 7) / 8);
}

// From values of channels [c0, c1) to slots.
template <class T, class A>
[[gnu::noinline]] void spread(const CpuPlan& p, int64_t c0, int64_t c1, const void* values,
                              void* slots) {
  const A* value = static_cast<const A*>(values);
  A *const begin = static_cast<A*>(slots) + c0 * p.width, *end = begin;
  for (int64_t f = 0; f < p.fold; ++f) {
    if (p.width == 1) std::memcpy(end, value + c0, (c1 - c0) * sizeof(A));
    for (int64_t c = c0; c < c1; ++c, end += p.width) {
      if (p.width >= kLanes)
        for (int64_t i = 0; i < p.width; i += kLanes)
          store(end + std::min<int64_t>(i, p.width - kLanes), Vec<A>(value[c]));
      else if (p.width > 1)
        std::fill_n(end, p.width, value[c]);
    }
  }
  A last[kUnit<T>];
  to_lanes<T>(end - kUnit<T>, last);
  A* slot = begin;
  for (; slot < end - kUnit<T>; slot += kUnit<T>) to_lanes<T>(slot, slot);
  std::memcpy(slot, last, sizeof last);
}

template <class A>
inline double sum_elements(const A* p, int64_t count) {
  Vec<double> sum(0.0);
  double rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum = sum + to_double(load(p + i));
  for (; i < count; ++i) rest += static_cast<double>(p[i]);
  return sum_lanes(sum) + rest;
}

// Sums of a tile of columns, on their way to its channels. Apart from ColumnSums, so that it is
// compiled once for all bodies.
template <class T, class A, int kSums>
class ColumnTotals {
 public:
  ColumnTotals(const CpuPlan& p, int64_t c0, int64_t c1, double* const* results)
      : p_(p),
        c0_(c0),
        count_(c1 - c0),
        first_(c0 * p.width),
        columns_(p.fold * count_ * p.width),
        slots_(round_up(columns_, kUnit<T>)),
        results_(results) {
    for (int s = 0; s < kSums; ++s) {
      std::fill_n(results[s] + c0, count_, 0.0);
      std::fill_n(error_[s], kCompensated ? count_ : 0, 0.0);
    }
    clear(level1_);
    clear(level2_);
  }

  // To double; `folds`: how many of a row's count.
  [[gnu::noinline]] void finish(int64_t folds) {
    if (groups_ > 0) join();
    if (joins_ > 0) to_channels(folds);
    for (int s = 0; s < kSums; ++s)
      for (int64_t c = 0; c < count_ && kCompensated; ++c) {
        results_[s][c0_ + c] += finite_or_zero(error_[s][c]);
        error_[s][c] = 0;
      }
  }

 protected:
  // Level 1 has the sums of one more group.
  void added() {
    if (++groups_ == 4) join();
  }

  const CpuPlan& p_;
  const int64_t c0_, count_, first_, columns_, slots_;
  alignas(64) A level1_[kSums][kMaxTileColumns];

 private:
  void clear(A (&level)[kSums][kMaxTileColumns]) {
    for (int s = 0; s < kSums; ++s) std::fill_n(level[s], slots_, A{0});
  }
  [[gnu::noinline]] void join() {
    for (int s = 0; s < kSums; ++s)
      for (int64_t i = 0; i < slots_; i += kLanes) {
        store(level2_[s] + i, load(level2_[s] + i) + load(level1_[s] + i));
        store(level1_[s] + i, Vec<A>(A{0}));
      }
    groups_ = 0;
    if (++joins_ == 4) to_channels(p_.fold);
  }
  [[gnu::noinline]] void to_channels(int64_t folds) {
    A buffer[kUnit<T> + kMaxTileColumns];
    A* const columns = buffer + kUnit<T>;
    for (int s = 0; s < kSums; ++s) {
      // The last unit first: what it shares with the one before is that one's.
      for (int64_t slot = (columns_ - 1) / kUnit<T> * kUnit<T>; slot >= 0; slot -= kUnit<T>)
        to_elements<T>(level2_[s] + slot, columns + std::min<int64_t>(slot, columns_ - kUnit<T>));
      double *const result = results_[s] + c0_, *const error = error_[s];
      const auto add = [&](int64_t c, double x) { add_in_double<A>(result[c], error[c], x); };
      for (int64_t f = 0; f < folds; ++f) {
        const A* run = columns + f * count_ * p_.width;
        if (p_.width == 1)
          for (int64_t c = 0; c < count_; ++c) add(c, static_cast<double>(run[c]));
        else
          for (int64_t c = 0; c < count_; ++c) add(c, sum_elements(run + c * p_.width, p_.width));
      }
    }
    clear(level2_);
    joins_ = 0;
  }

  double* const* results_;
  int groups_ = 0, joins_ = 0;
  static constexpr bool kCompensated = sizeof(A) == 8;
  double error_[kSums][kCompensated ? kTileColumns : 1];  // of each channel's sum
  alignas(64) A level2_[kSums][kMaxTileColumns];
};

template <class Body>
using TotalsOf = ColumnTotals<typename Body::Element, typename Body::Accumulator, Body::kSums>;

// And what adds to them.
template <class Body>
class ColumnSums : public TotalsOf<Body> {
  using T = typename Body::Element;
  using A = typename Body::Accumulator;
  static constexpr int kSums = Body::kSums;

 public:
  using TotalsOf<Body>::ColumnTotals;

  template <int kRows>
  [[gnu::noinline]] void add(const Body body, int64_t row) {
    const CpuPlan& p = this->p_;
    const Place at = place<IndexMap::kColumns>(p, row, this->first_);
    const int64_t columns = this->columns_, stride = p.row_stride, mask_stride = (stride + 7) / 8;
    const int64_t ahead = p.family == Family::kResident ? 0 : elements_ahead(p, sizeof(T));
    for (int64_t slot = 0; slot < columns; slot += kUnit<T>) {
      const auto k = body.at(at.bit + slot);
      const Place here = at + std::min<int64_t>(slot, columns - kUnit<T>);
      const auto below = [&](auto, Place& p) { p.element += stride, p.mask_row += mask_stride; };
      Vec<A> chain[kVecs<T>][kSums];
      BNEXT_ISA_NAMESPACE::clear(chain);
      for_units<kRows>(
          body, here, below,
          [&](auto, const Place& here) {
            if (ahead && slot * sizeof(T) % 64 == 0)
              body.template prefetch<2>(here.element + ahead);
            return body.load(k, here);
          },
          [&](auto, const Place& here, const auto& values) {
            body.add(k, here, values, All{}, chain);
          });
      unrolled<kVecs<T> * kSums>([&](auto n) {
        constexpr int j = n / kSums, s = n % kSums;
        A* const level1 = this->level1_[s] + slot + j * kLanes;
        store(level1, load(level1) + chain[j][s]);
      });
    }
    this->added();
  }
};

template <class Body>
[[gnu::noinline]] void sum_columns(const Body& body, const CpuPlan& p, const Task& task,
                                   double* const* results) {
  using T = typename Body::Element;
  const int64_t row0 = p.first_chunk(task.slice), row1 = p.first_chunk(task.slice + 1);
  int64_t step = std::max<int64_t>(kUnit<T>, kTileColumns / p.width / kUnit<T> * kUnit<T>);
  if (p.fold > 1) step = p.channels;
  for (int64_t c = task.c0; c < task.c1; c += step) {
    ColumnSums<Body> sums(p, c, std::min(task.c1, c + step), results);
    int64_t row = row0;
    for (; row + 4 <= row1; row += 4) sums.template add<4>(body, row);
    for (; row < row1; ++row) sums.template add<1>(body, row);
    sums.finish(p.fold);
    if (p.rest > 0 && task.slice + 1 == p.slices)
      with_rest(body, p, [&](const Body& staged) {
        sums.template add<1>(staged, 0);
        sums.finish(p.rest / (p.channels * p.width));
      });
  }
}

// Rows that share one load of their coefficients.
template <bool kNontemporal, int kRows, class Body>
[[gnu::noinline]] void apply_group(const Body body, const CpuPlan& p, int64_t row, int64_t first,
                                   int64_t columns, int64_t ahead) {
  using T = typename Body::Element;
  const Place at = place<IndexMap::kColumns>(p, row, first);
  const int64_t stride = p.row_stride, mask_stride = (stride + 7) / 8;
  // Inline, because gcc 12 drops calls of a function that only prefetches.
  const auto prefetch = [&](const Place& here, int64_t slot) __attribute__((always_inline)) {
    if (slot * sizeof(T) % 64 != 0) return;
    body.template prefetch<2>(here.element + ahead);
    if constexpr (!kNontemporal) body.prefetch_stores(here.element);
  };
  if constexpr (Body::kTogether > 1) {
    const int64_t last = (columns - 1) / kUnit<T> * kUnit<T>;
    const auto place_of = [&](int64_t slot) {
      return at + std::min<int64_t>(slot, columns - kUnit<T>);
    };
    // After the last unit that one again.
    for (int64_t slot = 0; slot < columns; slot += Body::kTogether * kUnit<T>)
      for_units<Body::kTogether>(
          body, slot, [&](auto, int64_t& slot) { slot = std::min<int64_t>(slot + kUnit<T>, last); },
          [&](auto, int64_t slot) {
            prefetch(place_of(slot), slot);
            return body.load(body.at(first + slot), place_of(slot));
          },
          [&](auto, int64_t slot, const auto& values) {
            body.template apply<kNontemporal>(body.at(first + slot), place_of(slot), values);
          });
    return;
  }
  // In place, rows that end in a part of a unit come one by one.
  constexpr bool kTail = Body::kInPlace && kRows == 1;
  [[maybe_unused]] decltype(body.load(body.at(0), at)) tail;
  if constexpr (kTail) {
    const int64_t last = (columns - 1) / kUnit<T> * kUnit<T>;
    tail = body.load(body.at(first + last), at + (columns - kUnit<T>));
  }
  for (int64_t slot = 0; slot < columns; slot += kUnit<T>) {
    const auto k = body.at(first + slot);
    for_units<kRows>(
        body, at + std::min<int64_t>(slot, columns - kUnit<T>),
        [&](auto, Place& here) { here.element += stride, here.mask_row += mask_stride; },
        [&](auto, const Place& here) {
          prefetch(here, slot);
          if constexpr (kTail)
            if (slot + kUnit<T> > columns) return tail;
          return body.load(k, here);
        },
        [&](auto, const Place& here, const auto& values) {
          body.template apply<kNontemporal>(k, here, values);
        });
  }
}

// In blocks, the last first, so that what was summed last is read first; within one the rows run
// forwards, as prefetchers like it (C = 256, float32: 15.0 ms row by row in reverse, 5.4 so).
template <class Body>
[[gnu::noinline]] void apply_columns(const Body& body, const CpuPlan& p, const Task& task) {
  using T = typename Body::Element;
  constexpr int64_t kBlockBytes = 256 << 10;
  const int64_t row0 = p.first_chunk(task.slice), row1 = p.first_chunk(task.slice + 1);
  const int64_t first = task.c0 * p.width, columns = p.fold * (task.c1 - task.c0) * p.width;
  const int64_t row_bytes = columns * sizeof(T);
  const int64_t block = std::max<int64_t>(4, kBlockBytes / row_bytes / 4 * 4);
  const int64_t ahead = task.ahead ? task.ahead : elements_ahead(p, sizeof(T));
  if (p.rest > 0 && task.slice + 1 == p.slices)
    with_rest(body, p,
              [&](const Body& staged) { apply_group<false, 1>(staged, p, 0, first, columns, 0); });
  // Non-temporal stores must finish their lines before the buffers for them run out (24x1024x14x14,
  // float32: 13.8 ms by 4 rows, 5.3 by 1; two outputs, 32x64x56x56: 12.6 ms by 4). A body that
  // takes units together takes them side by side.
  constexpr int kRows = Body::kTogether == 1 ? 4 : 1;
  const auto outputs = std::count_if(body.out, body.out + Body::kOutputs, [](T* o) { return o; });
  const bool by_four = (!p.nontemporal_stores || (row_bytes <= 1024 && outputs == 1)) &&
                       (!Body::kInPlace || columns % kUnit<T> == 0);
  with_bool(p.nontemporal_stores, [&](auto nontemporal) {
    for (int64_t begin, end = row1; end > row0; end = begin) {
      int64_t row = begin = row0 + (end - row0 - 1) / block * block;
      for (; by_four && row + kRows <= end; row += kRows)
        apply_group<nontemporal, kRows>(body, p, row, first, columns, ahead);
      for (; row < end; ++row) apply_group<nontemporal, 1>(body, p, row, first, columns, ahead);
    }
  });
  if (p.nontemporal_stores) fence_nontemporal();
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
