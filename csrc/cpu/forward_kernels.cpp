// The forward kernels: moments reads its input once, apply_forward reads it (and the residual) and
// writes the output. Compiled per instruction set (BNEXT_ISA_NAMESPACE, see setup.py).
#include "../activation.h"
#include "../formulas.h"
#include "../moments.h"
#include "sums.h"

namespace bnext::BNEXT_ISA_NAMESPACE {
namespace {

// Two passes, the second from L1. Sums are shifted by the tile's first value: a constant channel
// has exactly that mean, and no variance.
template <class A, class T>
[[gnu::noinline]] void row_moments(const T* x, const Tile& t, Results& out) {
  const auto none = [](auto&, int64_t, int) {};
  const Vec<A> shift = finite_or_zero(Vec<A>(static_cast<A>(lane(load_first(x, 1), 0))));
  const double count = static_cast<double>(t.rows * t.width);
  Sum<IndexMap::kRows, A> sum, squares;
  visit<IndexMap::kRows>(
      t, [](int64_t) { return 0; },
      [&](auto&, int64_t row, int64_t i, auto j, auto n) {
        const auto value = convert<A>(load_lanes(x + row * t.stride + i, n));
        sum.v[j] = sum.v[j] + without_padding<IndexMap::kRows>(value - shift, n);
      },
      none);
  const double mean = static_cast<double>(lane(shift, 0)) + sum.total() / count;
  const Vec<A> center(static_cast<A>(mean));
  visit<IndexMap::kRows>(
      t, [](int64_t) { return 0; },
      [&](auto&, int64_t row, int64_t i, auto j, auto n) {
        if (t.ahead) prefetch(x + row * t.stride + i + t.ahead);
        const auto value = convert<A>(load_lanes(x + row * t.stride + i, n));
        const auto d = without_padding<IndexMap::kRows>(value - center, n);
        squares.v[j] = fma(d, d, squares.v[j]);
      },
      none);
  const double about_center = squares.total(), error = mean - static_cast<double>(lane(center, 0));
  out.first[0] = mean;
  out.second[0] = about_center - error * error * count;
  out.fits[0] = fits_float(about_center) &&
                fits_shift(mean - static_cast<double>(lane(shift, 0)), out.second[0], count);
}

// Two passes over each group of rows, in registers, joined by Chan's formula; values are shifted by
// the tile's first row.
template <class A, class T>
[[gnu::noinline]] void column_moments(const T* x, const Tile& t, Results& out) {
  alignas(64) A shift[kTileColumns], mean[kTileColumns], m2[kTileColumns];
  for_each_vector(t.width, [&](int64_t i, auto n) {
    store(shift + i, finite_or_zero(convert<A>(load_lanes(x + i, n))));
    store(mean + i, Vec<A>(A{0}));
    store(m2 + i, Vec<A>(A{0}));
  });
  int64_t row = 0;
  const auto group = [&]<int... R>(std::integer_sequence<int, R...>) {
    constexpr A kRows = sizeof...(R);
    const A before = static_cast<A>(row), share = kRows / (before + kRows);
    for_each_vector(t.width, [&](int64_t i, auto n) {
      const Vec<A> s = load(shift + i);
      const Vec<A> d[] = {convert<A>(load_lanes(x + (row + R) * t.stride + i, n)) - s...};
      Vec<A> sum = d[0], squares(A{0});
      for (size_t r = 1; r < sizeof...(R); ++r) sum = sum + d[r];
      const Vec<A> group_mean = sum * (1 / kRows);
      for (const Vec<A>& value : d) squares = fma(value - group_mean, value - group_mean, squares);
      const Vec<A> delta = group_mean - load(mean + i);
      store(mean + i, fma(delta, Vec<A>(share), load(mean + i)));
      store(m2 + i, fma(delta * delta, Vec<A>(before * share), load(m2 + i) + squares));
    });
    row += sizeof...(R);
  };
  while (row + 2 * kGroupRows <= t.rows) group(std::make_integer_sequence<int, 2 * kGroupRows>{});
  while (row < t.rows) group(std::make_integer_sequence<int, 1>{});
  for (int64_t i = 0; i < t.width; ++i) {
    out.first[i] = static_cast<double>(shift[i]) + static_cast<double>(mean[i]);
    out.second[i] = static_cast<double>(m2[i]);
    out.fits[i] = fits_float(m2[i]) && fits_shift(mean[i], m2[i], static_cast<A>(t.rows));
  }
}

template <class T, IndexMap kMap>
void moments(const CpuPlan& p, Span span, const void* input, Partial partial) {
  for (int64_t chunk = span.chunk0; chunk < span.chunk1; ++chunk) {
    const double before = static_cast<double>(chunk_values(p, span.chunk0, chunk));
    const double count = static_cast<double>(chunk_values(p, chunk, chunk + 1));
    for_each_tile<kMap>(p, chunk, span.bin0, span.bin1, [&](const Tile& t) {
      const T* x = static_cast<const T*>(input) + t.offset;
      const auto tile_moments = [&]<class A>(A, Results& r) {
        if constexpr (kMap == IndexMap::kRows)
          row_moments<A>(x, t, r);
        else
          column_moments<A>(x, t, r);
      };
      const int64_t tile_bins = kMap == IndexMap::kRows ? 1 : t.width;
      Results r;
      tile_moments(compute_t<T>{}, r);
      settle(r, tile_bins, [&](Results& exact) { tile_moments(double{}, exact); });
      for (int64_t i = 0; i < tile_bins; ++i) {
        double &mean = partial.first[t.bin + i], &m2 = partial.second[t.bin + i];
        Moments<double> tile{count, r.first[i], r.second[i]};
        if (before > 0) tile = combine({before, mean, m2}, tile);
        mean = tile.mean;
        m2 = tile.m2;
      }
    });
  }
}

template <class T, IndexMap kMap, Act kAct, bool kResidual>
void apply_forward(const CpuPlan& p, Span span, const ForwardArrays& arrays,
                   const ForwardArgs& args) {
  using C = compute_t<T>;
  for (int64_t chunk = span.chunk0; chunk < span.chunk1; ++chunk)
    for_each_tile<kMap>(p, chunk, span.bin0, span.bin1, [&](const Tile& t) {
      const T* x = static_cast<const T*>(args.input) + t.offset;
      const T* residual = static_cast<const T*>(args.residual) + t.offset;
      T* y = static_cast<T*>(args.output) + t.offset;
      const bool reads_ahead =
          t.ahead && p.family != Family::kResident;  // else it is cached already
      const bool writes_ahead = t.ahead && !p.nontemporal_stores;
      visit<kMap>(
          t,
          [&](int64_t i) {
            return Affine<Vec<C>>{bin_values<kMap, C>(arrays.mean, t.bin + i),
                                  bin_values<kMap, C>(arrays.scale, t.bin + i),
                                  bin_values<kMap, C>(arrays.shift, t.bin + i)};
          },
          [&](const Affine<Vec<C>>& affine, int64_t row, int64_t i, auto, auto n) {
            const int64_t at = row * t.stride + i;
            if (reads_ahead) prefetch(x + at + t.ahead);
            if (writes_ahead) prefetch_for_store(y + at + t.ahead);
            Vec<C> z = apply(affine, load_lanes(x + at, n));
            if constexpr (kResidual) z = z + load_lanes(residual + at, n);
            if constexpr (kAct != Act::kNone) {
              const Condition<C> passed = passes(z);
              if (kResidual && args.mask)
                store_bits(args.mask + t.mask_offset + row * t.mask_stride + i / 8, to_bits(passed),
                           n);
              z = activate<kAct>(passed, z);
            }
            store_lanes(y + at, z, n, p.nontemporal_stores);
          },
          [](auto&, int64_t, int) {});
    });
  if (p.nontemporal_stores) fence_nontemporal();
}

template <class T>
struct Table {
  static void moments(const CpuPlan& p, Span span, const void* input, Partial out) {
    with_map(p.map, [&](auto map) { BNEXT_ISA_NAMESPACE::moments<T, map>(p, span, input, out); });
  }
  static void apply_forward(const CpuPlan& p, Span span, const ForwardArrays& arrays,
                            const ForwardArgs& args, Act act) {
    with_map(p.map, [&](auto map) {
      with_bool(act == Act::kRelu, [&](auto relu) {
        with_bool(args.residual != nullptr, [&](auto residual) {
          BNEXT_ISA_NAMESPACE::apply_forward<T, map, relu ? Act::kRelu : Act::kNone, residual>(
              p, span, arrays, args);
        });
      });
    });
  }
  static constexpr ForwardKernels value{moments, apply_forward};
};

}  // namespace

template <>
const ForwardKernels& kernels(DType dtype) {
  return table_of<Table>(dtype);
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
