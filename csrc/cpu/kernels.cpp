// The CPU kernels, written once and compiled per instruction set (BNEXT_ISA_NAMESPACE, see
// setup.py).
//
// A tile is a piece of a channel (rows), two passes over which stay in L1, or some rows of adjacent
// columns. Bytes per element: moments and sums read their operands once, apply reads and writes
// them once. Accumulators are of the compute type: the float sums of a tile are short enough to
// lose a few units in the last place, and half as costly as double ones. Tiles join in double.
// Where a result shows that floats over- or underflowed (as squares of 1e19 and 1e-19 do), the tile
// is summed again in double.
#include "kernels.h"
#include "../epilogue.h"
#include "../welford.h"
#include "tiles.h"
#include "vec.h"

namespace bnext::BNEXT_ISA_NAMESPACE {
namespace {

// Whether a sum of floats neither over- nor underflowed on the way.
template <class A>
inline bool fits_float(A value) {
  return (value > A(1e-25) || value < A(-1e-25)) && value - value == 0;
}

// Whether sums that were shifted by a value `distance` from their mean kept their digits: not where
// the shift was an outlier, many standard deviations away.
template <class A>
inline bool fits_shift(A distance, A m2, A count) {
  return distance * distance * count <= A(64) * m2;
}

// Per-lane results of a tile, and whether the accumulators were wide enough for them.
struct Results {
  alignas(64) double first[kTileColumns], second[kTileColumns];
  bool fits[kTileColumns];
};

// Replaces the results that do not fit by those of again(results), a sum in double; lane by lane,
// so that no lane depends on its neighbours.
template <class Again>
inline void settle(Results& r, int64_t lanes, Again again) {
  bool all = true;
  for (int64_t i = 0; i < lanes; ++i) all &= r.fits[i];
  if (all) return;
  Results exact;
  again(exact);
  for (int64_t i = 0; i < lanes; ++i)
    if (!r.fits[i]) r.first[i] = exact.first[i], r.second[i] = exact.second[i];
}

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
    for_each_tile<kMap>(p, chunk, span.lane0, span.lane1, [&](const Tile& t) {
      const T* x = static_cast<const T*>(input) + t.offset;
      const auto tile_moments = [&]<class A>(A, Results& r) {
        if constexpr (kMap == IndexMap::kRows)
          row_moments<A>(x, t, r);
        else
          column_moments<A>(x, t, r);
      };
      const int64_t tile_lanes = kMap == IndexMap::kRows ? 1 : t.width;
      Results r;
      tile_moments(compute_t<T>{}, r);
      settle(r, tile_lanes, [&](Results& exact) { tile_moments(double{}, exact); });
      for (int64_t i = 0; i < tile_lanes; ++i) {
        double &mean = partial.first[t.lane + i], &m2 = partial.second[t.lane + i];
        Moments<double> tile{count, r.first[i], r.second[i]};
        if (before > 0) tile = combine({before, mean, m2}, tile);
        mean = tile.mean;
        m2 = tile.m2;
      }
    });
  }
}

template <class T, IndexMap kMap, bool kRelu, bool kResidual>
void apply_forward(const CpuPlan& p, Span span, const ForwardLanes& lanes,
                   const ForwardArgs& args) {
  using C = compute_t<T>;
  for (int64_t chunk = span.chunk0; chunk < span.chunk1; ++chunk)
    for_each_tile<kMap>(p, chunk, span.lane0, span.lane1, [&](const Tile& t) {
      const T* x = static_cast<const T*>(args.input) + t.offset;
      const T* residual = static_cast<const T*>(args.residual) + t.offset;
      T* y = static_cast<T*>(args.output) + t.offset;
      const bool reads_ahead =
          t.ahead && p.family != Family::kResident;  // else it is cached already
      const bool writes_ahead = t.ahead && !p.nontemporal_stores;
      visit<kMap>(
          t,
          [&](int64_t i) {
            return Affine<Vec<C>>{lanes_from<kMap, C>(lanes.mean, t.lane + i),
                                  lanes_from<kMap, C>(lanes.scale, t.lane + i),
                                  lanes_from<kMap, C>(lanes.shift, t.lane + i)};
          },
          [&](const Affine<Vec<C>>& affine, int64_t row, int64_t i, auto, auto n) {
            const int64_t at = row * t.stride + i;
            if (reads_ahead) prefetch(x + at + t.ahead);
            if (writes_ahead) prefetch_for_store(y + at + t.ahead);
            Vec<C> z = apply(affine, load_lanes(x + at, n));
            if constexpr (kResidual) z = z + load_lanes(residual + at, n);
            if constexpr (kRelu) {
              const Sign<C> sign = passes_relu(z);
              if (kResidual && args.relu_mask)
                store_bits(args.relu_mask + t.mask_offset + row * t.mask_stride + i / 8,
                           to_bits(sign), n);
              z = keep(sign, z);
            }
            store_lanes(y + at, z, n, p.nontemporal_stores);
          },
          [](auto&, int64_t, int) {});
    });
  if (p.nontemporal_stores) fence_nontemporal();
}

// What a backward computes: sums (sum_dy, sum_dy_xmu), and dx from batch statistics or frozen ones.
// The residual's gradient goes with dx.
struct Outputs {
  bool sums, batch, frozen;
};

// Sums in accumulators of A.
template <class A, class T, IndexMap kMap, Relu kRelu, Outputs kOut>
[[gnu::noinline]] void tile_backward(const CpuPlan& p, const Tile& t, const BackwardLanes& lanes,
                                     const BackwardArgs& args, Results& out) {
  using C = compute_t<T>;
  constexpr bool kApplies = kOut.batch || kOut.frozen, kRecomputes = kRelu == Relu::kRecompute;
  constexpr bool kReadsInput = kOut.sums || kOut.batch || kRecomputes;
  const T* x = static_cast<const T*>(args.input) + t.offset;
  const T* dy = static_cast<const T*>(args.grad_out) + t.offset;
  T* dx = args.grad_input ? static_cast<T*>(args.grad_input) + t.offset : nullptr;
  T* dresidual = args.grad_residual ? static_cast<T*>(args.grad_residual) + t.offset : nullptr;
  const uint8_t* mask = args.relu_mask + t.mask_offset;
  const bool reads_ahead = t.ahead && (kOut.sums || p.family != Family::kResident);
  const bool writes_ahead = t.ahead && kApplies && dx && !p.nontemporal_stores;
  alignas(64) A sums_dy[kTileColumns], sums_dy_xmu[kTileColumns];
  if constexpr (kOut.sums && kMap == IndexMap::kColumns)
    for (int64_t i = 0; i < t.width; i += kLanes) {
      store(sums_dy + i, Vec<A>(A{0}));
      store(sums_dy_xmu + i, Vec<A>(A{0}));
    }

  struct State {
    Affine<Vec<C>> affine;
    InputGrad<Vec<C>> to_dx;
    Sum<kMap, A> dy, dy_xmu;
  };
  visit<kMap>(
      t,
      [&](int64_t i) {
        const auto from = [&](const void* data) { return lanes_from<kMap, C>(data, t.lane + i); };
        State s;
        if constexpr (kReadsInput) s.affine.mean = from(lanes.mean);
        if constexpr (kRecomputes)
          s.affine.scale = from(lanes.scale), s.affine.shift = from(lanes.shift);
        if constexpr (kApplies) s.to_dx.a = from(lanes.a);
        if constexpr (kOut.batch)
          s.to_dx.mean = s.affine.mean, s.to_dx.invstd = from(lanes.invstd),
          s.to_dx.b = from(lanes.b), s.to_dx.c = from(lanes.c);
        if constexpr (kOut.sums && kMap == IndexMap::kColumns) {
          s.dy.v[0] = load(sums_dy + i);
          s.dy_xmu.v[0] = load(sums_dy_xmu + i);
        }
        return s;
      },
      [&](State& s, int64_t row, int64_t i, auto j, auto n) {
        const int64_t at = row * t.stride + i;
        if (reads_ahead) {
          if constexpr (kReadsInput) prefetch(x + at + t.ahead);
          prefetch(dy + at + t.ahead);
        }
        if (writes_ahead) prefetch_for_store(dx + at + t.ahead);
        Vec<C> xi, g = load_lanes(dy + at, n);
        if constexpr (kReadsInput) xi = load_lanes(x + at, n);
        if constexpr (kRecomputes) g = keep(passes_relu(apply(s.affine, xi)), g);
        if constexpr (kRelu == Relu::kMask)
          g = keep(from_bits<C>(load_bits(mask + row * t.mask_stride + i / 8, n)), g);
        if constexpr (kOut.sums) {
          const auto dya = convert<A>(g);
          const auto xmu = convert<A>(without_padding<kMap>(xi - s.affine.mean, n));
          s.dy.v[j] = s.dy.v[j] + dya;
          s.dy_xmu.v[j] = fma(dya, xmu, s.dy_xmu.v[j]);
        }
        if constexpr (kApplies) {
          if (dx) {
            // With frozen statistics dx does not depend on x, not even where x is inf or nan.
            if constexpr (kOut.batch)
              store_lanes(dx + at, apply(s.to_dx, g, xi), n, p.nontemporal_stores);
            else
              store_lanes(dx + at, g * s.to_dx.a, n, p.nontemporal_stores);
          }
          if (dresidual) store_lanes(dresidual + at, g, n, p.nontemporal_stores);
        }
      },
      [&](State& s, int64_t i, int) {
        if constexpr (kOut.sums && kMap == IndexMap::kColumns) {
          store(sums_dy + i, s.dy.v[0]);
          store(sums_dy_xmu + i, s.dy_xmu.v[0]);
        } else if constexpr (kOut.sums) {
          out.first[0] = s.dy.total();
          out.second[0] = s.dy_xmu.total();
        }
      });
  if constexpr (kOut.sums) {
    if constexpr (kMap == IndexMap::kColumns)
      for (int64_t i = 0; i < t.width; ++i) {
        out.first[i] = static_cast<double>(sums_dy[i]);
        out.second[i] = static_cast<double>(sums_dy_xmu[i]);
      }
    for (int64_t i = 0; i < (kMap == IndexMap::kRows ? 1 : t.width); ++i)
      out.fits[i] = fits_float(out.second[i]);
  }
}

template <class T, IndexMap kMap, Relu kRelu, Outputs kOut>
void backward(const CpuPlan& p, Span span, const BackwardLanes& lanes, const BackwardArgs& args,
              Partial partial) {
  for (int64_t chunk = span.chunk0; chunk < span.chunk1; ++chunk)
    for_each_tile<kMap>(p, chunk, span.lane0, span.lane1, [&](const Tile& t) {
      Results r;
      tile_backward<compute_t<T>, T, kMap, kRelu, kOut>(p, t, lanes, args, r);
      if constexpr (kOut.sums) {
        const int64_t tile_lanes = kMap == IndexMap::kRows ? 1 : t.width;
        settle(r, tile_lanes, [&](Results& exact) {
          tile_backward<double, T, kMap, kRelu, Outputs{true, false, false}>(p, t, lanes, args,
                                                                             exact);
        });
        const bool first = chunk == span.chunk0;
        for (int64_t i = 0; i < tile_lanes; ++i) {
          double &dy = partial.first[t.lane + i], &dy_xmu = partial.second[t.lane + i];
          dy = (first ? 0 : dy) + r.first[i];
          dy_xmu = (first ? 0 : dy_xmu) + r.second[i];
        }
      }
    });
  if (p.nontemporal_stores) fence_nontemporal();
}

template <class T>
struct Table {
  static void moments(const CpuPlan& p, Span span, const void* input, Partial out) {
    with_map(p.map, [&](auto map) { BNEXT_ISA_NAMESPACE::moments<T, map>(p, span, input, out); });
  }
  static void apply_forward(const CpuPlan& p, Span span, const ForwardLanes& lanes,
                            const ForwardArgs& args, bool relu) {
    with_map(p.map, [&](auto map) {
      with_bool(relu, [&](auto relu_c) {
        with_bool(args.residual != nullptr, [&](auto residual) {
          BNEXT_ISA_NAMESPACE::apply_forward<T, map, relu_c, residual>(p, span, lanes, args);
        });
      });
    });
  }
  template <Outputs kOut>
  static void backward(const CpuPlan& p, Span span, const BackwardLanes& lanes,
                       const BackwardArgs& args, bool relu, Partial out) {
    with_map(p.map, [&](auto map) {
      with_relu(relu, args.relu_mask, [&](auto mode) {
        BNEXT_ISA_NAMESPACE::backward<T, map, mode, kOut>(p, span, lanes, args, out);
      });
    });
  }
  static constexpr Kernels value{moments,
                                 apply_forward,
                                 backward<Outputs{true, false, false}>,
                                 backward<Outputs{false, true, false}>,
                                 backward<Outputs{false, false, true}>,
                                 backward<Outputs{true, false, true}>};
};

}  // namespace

template <>
const Kernels& kernels(DType dtype) {
  return table_of<Table>(dtype);
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
