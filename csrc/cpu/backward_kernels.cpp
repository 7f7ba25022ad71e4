// The backward kernels: sums read grad_out and the input once, apply reads them once more and
// writes the gradients. Compiled per instruction set, as forward_kernels.cpp.
#include "../activation.h"
#include "../formulas.h"
#include "sums.h"

namespace bnext::BNEXT_ISA_NAMESPACE {
namespace {

// What a backward computes: sums (sum_dy, sum_dy_xmu), and dx from batch statistics or frozen ones.
// The residual's gradient goes with dx.
struct Outputs {
  bool sums, batch, frozen;
};

// Sums in accumulators of A.
template <class A, class T, IndexMap kMap, Act kAct, Passed kPassed, Outputs kOut>
[[gnu::noinline]] void tile_backward(const CpuPlan& p, const Tile& t, const BackwardArrays& arrays,
                                     const BackwardArgs& args, Results& out) {
  using C = compute_t<T>;
  constexpr bool kApplies = kOut.batch || kOut.frozen, kRecomputes = kPassed == Passed::kInput;
  constexpr bool kReadsInput = kOut.sums || kOut.batch || kRecomputes;
  const T* x = static_cast<const T*>(args.input) + t.offset;
  const T* dy = static_cast<const T*>(args.grad_out) + t.offset;
  T* dx = args.grad_input ? static_cast<T*>(args.grad_input) + t.offset : nullptr;
  T* dresidual = args.grad_residual ? static_cast<T*>(args.grad_residual) + t.offset : nullptr;
  const uint8_t* mask = args.mask + t.mask_offset;
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
        const auto from = [&](const void* data) { return bin_values<kMap, C>(data, t.bin + i); };
        State s;
        if constexpr (kReadsInput) s.affine.mean = from(arrays.mean);
        if constexpr (kRecomputes)
          s.affine.scale = from(arrays.scale), s.affine.shift = from(arrays.shift);
        if constexpr (kApplies) s.to_dx.a = from(arrays.a);
        if constexpr (kOut.batch)
          s.to_dx.mean = s.affine.mean, s.to_dx.invstd = from(arrays.invstd),
          s.to_dx.b = from(arrays.b), s.to_dx.c = from(arrays.c);
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
        if constexpr (kRecomputes) g = activate_backward<kAct>(passes(apply(s.affine, xi)), g);
        if constexpr (kPassed == Passed::kMask)
          g = activate_backward<kAct>(
              from_bits<C>(load_bits(mask + row * t.mask_stride + i / 8, n)), g);
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

template <class T, IndexMap kMap, Act kAct, Passed kPassed, Outputs kOut>
void backward(const CpuPlan& p, Span span, const BackwardArrays& arrays, const BackwardArgs& args,
              Partial partial) {
  for (int64_t chunk = span.chunk0; chunk < span.chunk1; ++chunk)
    for_each_tile<kMap>(p, chunk, span.bin0, span.bin1, [&](const Tile& t) {
      Results r;
      tile_backward<compute_t<T>, T, kMap, kAct, kPassed, kOut>(p, t, arrays, args, r);
      if constexpr (kOut.sums) {
        const int64_t tile_bins = kMap == IndexMap::kRows ? 1 : t.width;
        settle(r, tile_bins, [&](Results& exact) {
          tile_backward<double, T, kMap, kAct, kPassed, Outputs{true, false, false}>(p, t, arrays,
                                                                                     args, exact);
        });
        const bool first = chunk == span.chunk0;
        for (int64_t i = 0; i < tile_bins; ++i) {
          double &dy = partial.first[t.bin + i], &dy_xmu = partial.second[t.bin + i];
          dy = (first ? 0 : dy) + r.first[i];
          dy_xmu = (first ? 0 : dy_xmu) + r.second[i];
        }
      }
    });
  if (p.nontemporal_stores) fence_nontemporal();
}

template <class T>
struct Table {
  template <Outputs kOut>
  static void backward(const CpuPlan& p, Span span, const BackwardArrays& arrays,
                       const BackwardArgs& args, Act act, Partial out) {
    with_map(p.map, [&](auto map) {
      with_activation(act, args.mask, [&](auto act_c, auto passed) {
        BNEXT_ISA_NAMESPACE::backward<T, map, act_c, passed, kOut>(p, span, arrays, args, out);
      });
    });
  }
  static constexpr BackwardKernels value{
      backward<Outputs{true, false, false}>, backward<Outputs{false, true, false}>,
      backward<Outputs{false, false, true}>, backward<Outputs{true, false, true}>};
};

}  // namespace

template <>
const BackwardKernels& kernels(DType dtype) {
  return table_of<Table>(dtype);
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
