// How kernels walk over memory: tiles of a plan, and the vectors of a tile.
// Compiled per instruction set, as vec.h.
#pragma once

#include <utility>

#include "kernels.h"
#include "vec.h"
#include "vec_memory.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// This instruction set's table; see kernels.h.
template <class Table>
const Table& kernels(DType dtype);

// Accumulators that a row's vectors take in turn, to hide the latency of an addition.
inline constexpr int kAccumulators = 4;
// Rows of columns that share one load of their coefficients and sums.
inline constexpr int kGroupRows = 4;
// Columns of a tile: their coefficients and sums stay in L1, their rows are long enough to stream.
inline constexpr int64_t kTileColumns = 512;

// Elements that a prefetch runs ahead: rows of columns, or bins of short rows. Both are too
// scattered for the hardware's prefetchers: without, 32x1024x14x14 channels last took 1.2 to 1.9
// times as long. A long row asks for the next one, which lies in pages far away.
inline constexpr int64_t kPrefetchRows = 16, kPrefetchBins = 4, kLongRow = 1024;

// Rows [0, rows) x elements [0, width), `stride` apart, from `offset` on: a piece of one bin
// (rows), or `width` bins (columns). Likewise the bytes of a ReLU mask.
struct Tile {
  int64_t bin, offset, rows, stride, width, mask_offset, mask_stride;
  int64_t ahead;  // elements to prefetch ahead, 0: not
};

// f(tile) for the tiles of a chunk.
template <IndexMap kMap, class F>
inline void for_each_tile(const CpuPlan& p, int64_t chunk, int64_t bin0, int64_t bin1, F f) {
  const int64_t row0 = chunk / p.segments * p.chunk_rows;
  const int64_t rows = p.chunk_rows < p.rows - row0 ? p.chunk_rows : p.rows - row0;
  if constexpr (kMap == IndexMap::kColumns) {
    const int64_t mask_stride = (p.bins + 7) / 8;
    for (int64_t bin = bin0; bin < bin1; bin += kTileColumns) {
      const int64_t width = bin1 - bin < kTileColumns ? bin1 - bin : kTileColumns;
      f(Tile{bin, row0 * p.row_stride + bin, rows, p.row_stride, width,
             row0 * mask_stride + bin / 8, mask_stride, kPrefetchRows * p.row_stride});
    }
  } else {
    const int64_t start = chunk % p.segments * p.segment_width;
    const int64_t width = p.segment_width < p.width - start ? p.segment_width : p.width - start;
    const int64_t mask_width = (p.width + 7) / 8;
    const int64_t offset = row0 * p.row_stride + start;
    // The next chunk's memory, or after the last one the next bin's.
    const int64_t next = chunk + 1 < p.chunks
                             ? (chunk + 1) / p.segments * p.chunk_rows * p.row_stride +
                                   (chunk + 1) % p.segments * p.segment_width
                             : p.width;
    for (int64_t bin = bin0; bin < bin1; ++bin)
      f(Tile{bin, offset + bin * p.width, rows, p.row_stride, width,
             (row0 * p.bins + bin) * mask_width + start / 8, p.bins * mask_width,
             p.width < kLongRow ? kPrefetchBins * p.width : next - offset});
  }
}

template <int J>
using index_c = std::integral_constant<int, J>;

// f(i, n) for the vectors of a row: n lanes from element i on, kLanes as a constant but for the
// last.
template <class F>
inline void for_each_vector(int64_t width, F f) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) f(i, index_c<kLanes>{});
  if (i < width) f(i, static_cast<int>(width - i));
}

// Rows: state = begin(0); body(state, row, i, J, n) for all vectors, J < kUnroll the accumulator
// whose turn it is; end(state, 0, 1). Columns: the same per vector of columns and group of rows,
// always with J = 0, and end(state, i, n).
template <IndexMap kMap, int kGroup = kGroupRows, int kUnroll = kAccumulators, class Begin,
          class Body, class End>
inline void visit(const Tile& t, Begin begin, Body body, End end) {
  if constexpr (kMap == IndexMap::kRows) {
    auto state = begin(0);
    for (int64_t row = 0; row < t.rows; ++row) {
      int64_t i = 0;
      const auto unrolled = [&]<int... J>(std::integer_sequence<int, J...>) {
        (body(state, row, i + J * kLanes, index_c<J>{}, index_c<kLanes>{}), ...);
        i += sizeof...(J) * kLanes;
      };
      while (i + kUnroll * kLanes <= t.width) unrolled(std::make_integer_sequence<int, kUnroll>{});
      if constexpr (kUnroll > 1) {
        if (i + 2 * kLanes <= t.width) unrolled(std::make_integer_sequence<int, 2>{});
        if (i + kLanes <= t.width) {
          body(state, row, i, index_c<2>{}, index_c<kLanes>{});
          i += kLanes;
        }
      }
      if (i < t.width) body(state, row, i, index_c<kUnroll - 1>{}, static_cast<int>(t.width - i));
    }
    end(state, 0, 1);
  } else {
    int64_t row = 0;
    const auto group = [&]<int... R>(std::integer_sequence<int, R...>) {
      for_each_vector(t.width, [&](int64_t i, auto n) {
        auto state = begin(i);
        (body(state, row + R, i, index_c<0>{}, n), ...);
        end(state, i, n);
      });
      row += sizeof...(R);
    };
    while (row + kGroup <= t.rows) group(std::make_integer_sequence<int, kGroup>{});
    while (row < t.rows) group(std::make_integer_sequence<int, 1>{});
  }
}

template <class T, class N>
inline Vec<compute_t<T>> load_lanes(const T* p, N n) {
  if constexpr (std::is_same_v<N, int>)
    return load_first(p, n);
  else
    return load(p);
}

template <class T, class N>
inline void store_lanes(T* p, const Vec<compute_t<T>>& x, N n, bool nontemporal = false) {
  if constexpr (std::is_same_v<N, int>)
    store_first(p, x, n);
  else if (nontemporal)
    store_nontemporal(p, x);
  else
    store(p, x);
}

// Coefficients of a bin for all elements of a row, or of kLanes columns.
template <IndexMap kMap, class C>
inline Vec<C> bin_values(const void* data, int64_t bin) {
  const C* p = static_cast<const C*>(data) + bin;
  if constexpr (kMap == IndexMap::kColumns)
    return load(p);
  else
    return Vec<C>(*p);
}

// Lanes past the end of a row hold no value of the channel; those past the last column are never
// stored.
template <IndexMap kMap, class N, class A>
inline Vec<A> without_padding(const Vec<A>& x, N n) {
  if constexpr (std::is_same_v<N, int> && kMap == IndexMap::kRows)
    return keep(from_bits<A>(first_bits(n)), x);
  else
    return x;
}

// From run-time switches to an instantiation: f gets an integral constant for each.
template <class F>
inline void with_map(IndexMap map, F f) {
  if (map == IndexMap::kRows)
    f(std::integral_constant<IndexMap, IndexMap::kRows>{});
  else
    f(std::integral_constant<IndexMap, IndexMap::kColumns>{});
}
template <class F>
inline void with_bool(bool value, F f) {
  if (value)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// From what a backward knows where the activation passed.
enum class Passed { kEverywhere, kInput, kMask };

// f(the activation, from what) of a backward.
template <class F>
inline void with_activation(Act act, const uint8_t* mask, F f) {
  using None = std::integral_constant<Act, Act::kNone>;
  using Relu = std::integral_constant<Act, Act::kRelu>;
  if (act == Act::kNone)
    f(None{}, std::integral_constant<Passed, Passed::kEverywhere>{});
  else if (mask)
    f(Relu{}, std::integral_constant<Passed, Passed::kMask>{});
  else
    f(Relu{}, std::integral_constant<Passed, Passed::kInput>{});
}

// Table<T>::value for the dtype's storage type T.
template <template <class> class Table>
inline const auto& table_of(DType dtype) {
  return visit_dtype<bfloat16, float16>(
      dtype, [](auto t) -> const auto& { return Table<decltype(t)>::value; });
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
