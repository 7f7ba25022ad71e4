// The CPU kernels, written once and compiled per instruction set (BNEXT_ISA_NAMESPACE, see setup.py).
// All work is on tiles: some rows of at most kTile vectors of lanes (columns), or of one lane's run (rows).
// Bytes per element: moments read x once (the second pass hits L1); apply reads and writes once.
#include <utility>

#include "../epilogue.h"
#include "../welford.h"
#include "kernels.h"
#include "vec.h"

namespace bnext::BNEXT_ISA_NAMESPACE {
namespace {

constexpr int kTile = 4;
constexpr int64_t kTileWidth = kTile * kLanes;

// Rows [0, rows) x elements [0, width) of memory at `offset`, `stride` apart, and where their mask bytes are.
struct Tile {
  int64_t lane = 0, offset = 0, rows = 0, stride = 0, width = 0, mask_offset = 0, mask_stride = 0;
};

template <int J>
using index_c = std::integral_constant<int, J>;

// f(row, element, J, n): n lanes (kLanes, but for the ends of rows) that belong to accumulator J.
template <class F>
inline void visit(const Tile& t, F f) {
  for (int64_t row = 0; row < t.rows; ++row) {
    int64_t i = 0;
    for (; i + kTileWidth <= t.width; i += kTileWidth)
      [&]<int... J>(std::integer_sequence<int, J...>) {
        (f(row, i + J * kLanes, index_c<J>{}, index_c<kLanes>{}), ...);
      }(std::make_integer_sequence<int, kTile>{});
    [&]<int... J>(std::integer_sequence<int, J...>) {
      const auto rest = [&](auto j) {
        const int64_t left = t.width - i - j * kLanes;
        if (left >= kLanes)
          f(row, i + j * kLanes, j, index_c<kLanes>{});
        else if (left > 0)
          f(row, i + j * kLanes, j, static_cast<int>(left));
      };
      (rest(index_c<J>{}), ...);
    }(std::make_integer_sequence<int, kTile>{});
  }
}

template <IndexMap kMap, class F>
inline void for_each_tile(const CpuPlan& p, int64_t chunk, int64_t lane0, int64_t lane1, F f) {
  const int64_t row0 = chunk / p.segments * p.chunk_rows;
  const int64_t rows = p.chunk_rows < p.rows - row0 ? p.chunk_rows : p.rows - row0;
  if constexpr (kMap == IndexMap::kColumns) {
    const int64_t mask_stride = (p.lanes + 7) / 8;
    for (int64_t lane = lane0; lane < lane1; lane += kTileWidth) {
      const int64_t width = kTileWidth < lane1 - lane ? kTileWidth : lane1 - lane;
      f(Tile{lane, row0 * p.row_stride + lane, rows, p.row_stride, width,
             row0 * mask_stride + lane / 8, mask_stride});
    }
  } else {
    const int64_t start = chunk % p.segments * p.segment_width;
    const int64_t width = p.segment_width < p.width - start ? p.segment_width : p.width - start;
    const int64_t mask_width = (p.width + 7) / 8;
    for (int64_t lane = lane0; lane < lane1; ++lane)
      f(Tile{lane, row0 * p.row_stride + lane * p.width + start, rows, p.row_stride, width,
             (row0 * p.lanes + lane) * mask_width + start / 8, p.lanes * mask_width});
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
inline void store_lanes(T* p, const Vec<compute_t<T>>& x, N n, bool nontemporal) {
  if constexpr (std::is_same_v<N, int>)
    store_first(p, x, n);
  else if (nontemporal)
    store_nontemporal(p, x);
  else
    store(p, x);
}

// A per-lane coefficient of a tile: one value for all of a row, or one per column.
template <IndexMap kMap, class C>
struct Lanes {
  static constexpr int kCount = kMap == IndexMap::kColumns ? kTile : 1;
  Vec<C> v[kCount];

  Lanes(const void* data, int64_t lane) {
    const C* p = static_cast<const C*>(data) + lane;
    for (int j = 0; j < kCount; ++j) v[j] = kMap == IndexMap::kColumns ? load(p + j * kLanes) : Vec<C>(*p);
  }
  const Vec<C>& operator[](int j) const { return v[j % kCount]; }
};

// Sums over a tile, in doubles: kTile accumulators while visiting; then one vector per kLanes columns, or
// the lane's total in every element of a single vector.
template <IndexMap kMap>
struct Sums {
  static constexpr int kCount = Lanes<kMap, double>::kCount;
  Vec<double> v[kTile];

  Sums() {
    for (auto& s : v) s = Vec<double>(0.0);
  }
  void fold() {
    if constexpr (kMap == IndexMap::kRows)
      v[0] = Vec<double>(horizontal_sum((v[0] + v[1]) + (v[2] + v[3])));
  }
};

// f(J, lane, n): the J-th vector of results of a tile stands for n lanes from `lane` on.
template <IndexMap kMap, class F>
inline void for_each_result(const Tile& t, F f) {
  if constexpr (kMap == IndexMap::kRows) {
    f(0, t.lane, 1);
  } else {
    for (int j = 0; j * kLanes < t.width; ++j) {
      const int64_t left = t.width - j * kLanes;
      f(j, t.lane + j * kLanes, left < kLanes ? static_cast<int>(left) : kLanes);
    }
  }
}

// Lanes past the end of a row hold no value of the channel; past the last column they are never stored.
template <IndexMap kMap, class N>
inline Vec<double> without_padding(const Vec<double>& x, N n) {
  if constexpr (std::is_same_v<N, int> && kMap == IndexMap::kRows)
    return keep(first_lanes<double>(n), x);
  else
    return x;
}

// Two passes over a chunk, the second from L1, with sums shifted by the chunk's first value: a constant
// channel has exactly its value as mean and no variance. Chunks join by Chan's formula.
template <class T, IndexMap kMap>
void moments(const CpuPlan& p, Span span, const void* input, Partial out) {
  const T* x = static_cast<const T*>(input);
  for (int64_t chunk = span.chunk0; chunk < span.chunk1; ++chunk) {
    const double count_before = static_cast<double>(chunk_values(p, span.chunk0, chunk));
    const double count = static_cast<double>(chunk_values(p, chunk, chunk + 1));
    for_each_tile<kMap>(p, chunk, span.lane0, span.lane1, [&](const Tile& t) {
      const T* tile = x + t.offset;
      constexpr int kCount = Sums<kMap>::kCount;
      Vec<double> mean[kCount];
      visit(Tile{.rows = 1, .width = kMap == IndexMap::kRows ? 1 : t.width},
            [&](int64_t, int64_t i, auto j, auto n) {
              const Vec<double> first = finite_or_zero(to_double(load_lanes(tile + i, n)));
              mean[j % kCount] = kMap == IndexMap::kRows ? Vec<double>(first.v[0][0]) : first;
            });
      Sums<kMap> sum, m2;
      visit(t, [&](int64_t row, int64_t i, auto j, auto n) {
        const auto v = to_double(load_lanes(tile + row * t.stride + i, n));
        sum.v[j] = sum.v[j] + without_padding<kMap>(v - mean[j % kCount], n);
      });
      sum.fold();
      for (int j = 0; j < kCount; ++j) mean[j] = mean[j] + sum.v[j] * (1 / count);
      visit(t, [&](int64_t row, int64_t i, auto j, auto n) {
        const auto v = to_double(load_lanes(tile + row * t.stride + i, n));
        const auto d = without_padding<kMap>(v - mean[j % kCount], n);
        m2.v[j] = fma(d, d, m2.v[j]);
      });
      m2.fold();
      for_each_result<kMap>(t, [&](int j, int64_t lane, int n) {
        Moments<Vec<double>> joint{count, mean[j], m2.v[j]};
        if (chunk != span.chunk0)
          joint = combine<Vec<double>>({count_before, load_first(out.first + lane, n),
                                        load_first(out.second + lane, n)},
                                       joint);
        store_first(out.first + lane, joint.mean, n);
        store_first(out.second + lane, joint.m2, n);
      });
    });
  }
}

template <class T, IndexMap kMap, bool kRelu, bool kResidual>
void apply_forward(const CpuPlan& p, Span span, const ForwardLanes& lanes, const ForwardArgs& args) {
  using C = compute_t<T>;
  const T* x = static_cast<const T*>(args.input);
  const T* residual = static_cast<const T*>(args.residual);
  T* y = static_cast<T*>(args.output);
  for (int64_t chunk = span.chunk0; chunk < span.chunk1; ++chunk)
    for_each_tile<kMap>(p, chunk, span.lane0, span.lane1, [&](const Tile& t) {
      const Lanes<kMap, C> mean(lanes.mean, t.lane), scale(lanes.scale, t.lane), shift(lanes.shift, t.lane);
      visit(t, [&](int64_t row, int64_t i, auto j, auto n) {
        const int64_t at = t.offset + row * t.stride + i;
        Vec<C> z = apply(Affine<Vec<C>>{mean[j], scale[j], shift[j]}, load_lanes(x + at, n));
        if constexpr (kResidual) z = z + load_lanes(residual + at, n);
        if constexpr (kRelu) {
          const Sign<C> sign = passes_relu(z);
          if (kResidual && args.relu_mask)
            args.relu_mask[t.mask_offset + row * t.mask_stride + i / 8] =
                to_bits(sign) & static_cast<uint8_t>((1 << n) - 1);
          z = keep(sign, z);
        }
        store_lanes(y + at, z, n, p.nontemporal_stores);
      });
    });
  if (p.nontemporal_stores) fence_nontemporal();
}

// How a backward knows where the ReLU passed.
enum class Relu { kNone, kRecompute, kMask };

// kSums: sum_dy and sum_dy_xmu; kApply: dx and the residual's gradient, where asked for.
template <class T, IndexMap kMap, Relu kRelu, bool kSums, bool kApply>
void backward(const CpuPlan& p, Span span, const BackwardLanes& lanes, const BackwardArgs& args,
              Partial out) {
  using C = compute_t<T>;
  const T* x = static_cast<const T*>(args.input);
  const T* dy = static_cast<const T*>(args.grad_out);
  T* dx = static_cast<T*>(args.grad_input);
  T* dresidual = static_cast<T*>(args.grad_residual);
  for (int64_t chunk = span.chunk0; chunk < span.chunk1; ++chunk)
    for_each_tile<kMap>(p, chunk, span.lane0, span.lane1, [&](const Tile& t) {
      const Lanes<kMap, C> mean(lanes.mean, t.lane);
      const auto pick = [&](const void* data, bool used) { return Lanes<kMap, C>(used ? data : lanes.mean, t.lane); };
      const auto scale = pick(lanes.scale, kRelu == Relu::kRecompute);
      const auto shift = pick(lanes.shift, kRelu == Relu::kRecompute);
      const auto invstd = pick(lanes.invstd, kApply), a = pick(lanes.a, kApply), b = pick(lanes.b, kApply),
                 c = pick(lanes.c, kApply);
      Sums<kMap> sum_dy, sum_dy_xmu;
      visit(t, [&](int64_t row, int64_t i, auto j, auto n) {
        const int64_t at = t.offset + row * t.stride + i;
        const Vec<C> xi = load_lanes(x + at, n);
        Vec<C> g = load_lanes(dy + at, n);
        if constexpr (kRelu == Relu::kRecompute)
          g = keep(passes_relu(apply(Affine<Vec<C>>{mean[j], scale[j], shift[j]}, xi)), g);
        if constexpr (kRelu == Relu::kMask)
          g = keep(from_bits<C>(args.relu_mask[t.mask_offset + row * t.mask_stride + i / 8]), g);
        if constexpr (kSums) {
          const Vec<double> gd = to_double(g);
          sum_dy.v[j] = sum_dy.v[j] + gd;
          sum_dy_xmu.v[j] =
              fma(gd, without_padding<kMap>(to_double(xi - mean[j]), n), sum_dy_xmu.v[j]);
        }
        if constexpr (kApply) {
          if (dx)
            store_lanes(dx + at, apply(InputGrad<Vec<C>>{mean[j], invstd[j], a[j], b[j], c[j]}, g, xi), n,
                        p.nontemporal_stores);
          if (dresidual) store_lanes(dresidual + at, g, n, p.nontemporal_stores);
        }
      });
      if constexpr (kSums) {
        sum_dy.fold();
        sum_dy_xmu.fold();
        for_each_result<kMap>(t, [&](int j, int64_t lane, int n) {
          Vec<double> first = sum_dy.v[j], second = sum_dy_xmu.v[j];
          if (chunk != span.chunk0) {
            first = load_first(out.first + lane, n) + first;
            second = load_first(out.second + lane, n) + second;
          }
          store_first(out.first + lane, first, n);
          store_first(out.second + lane, second, n);
        });
      }
    });
  if (kApply && p.nontemporal_stores) fence_nontemporal();
}

// From run-time switches to the instantiation: f gets an integral constant for each.
template <class F>
inline auto with_map(IndexMap map, F f) {
  if (map == IndexMap::kRows) return f(std::integral_constant<IndexMap, IndexMap::kRows>{});
  return f(std::integral_constant<IndexMap, IndexMap::kColumns>{});
}
template <class F>
inline auto with_bool(bool value, F f) {
  if (value) return f(std::true_type{});
  return f(std::false_type{});
}

template <class T>
struct Table {
  static void moments(const CpuPlan& p, Span span, const void* input, Partial out) {
    with_map(p.map, [&](auto map) {
      BNEXT_ISA_NAMESPACE::moments<T, map>(p, span, input, out);
    });
  }
  static void apply_forward(const CpuPlan& p, Span span, const ForwardLanes& lanes, const ForwardArgs& args,
                            bool relu) {
    with_map(p.map, [&](auto map) {
      with_bool(relu, [&](auto relu_c) {
        with_bool(args.residual != nullptr, [&](auto residual) {
          BNEXT_ISA_NAMESPACE::apply_forward<T, map, relu_c, residual>(p, span, lanes, args);
        });
      });
    });
  }
  template <bool kSums, bool kApply>
  static void backward(const CpuPlan& p, Span span, const BackwardLanes& lanes, const BackwardArgs& args,
                       bool relu, Partial out) {
    with_map(p.map, [&](auto map) {
      if (!relu)
        BNEXT_ISA_NAMESPACE::backward<T, map, Relu::kNone, kSums, kApply>(p, span, lanes, args, out);
      else if (args.relu_mask)
        BNEXT_ISA_NAMESPACE::backward<T, map, Relu::kMask, kSums, kApply>(p, span, lanes, args, out);
      else
        BNEXT_ISA_NAMESPACE::backward<T, map, Relu::kRecompute, kSums, kApply>(p, span, lanes, args, out);
    });
  }
  static constexpr Kernels value{moments, apply_forward, backward<true, false>, backward<false, true>,
                                 backward<true, true>};
};

}  // namespace

const Kernels& kernels(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return Table<double>::value;
    case DType::kBFloat16: return Table<bfloat16>::value;
    case DType::kFloat16: return Table<float16>::value;
    default: return Table<float>::value;
  }
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
