// The double backward's kernels, compiled per instruction set as forward_kernels.cpp. Bytes per
// element: sums reads grad_grad_input, grad_out and input once; apply reads them (and
// grad_grad_residual) again and writes what is asked for. Sums are kept in double: three reads hide
// the conversions.
#include "../activation.h"
#include "../formulas.h"
#include "tiles.h"

namespace bnext::BNEXT_ISA_NAMESPACE {
namespace {

constexpr int kSums = 5;

// What both kernels read: pointers to a tile, and the coefficients of its vectors.
template <class T, IndexMap kMap, Act kAct, Passed kPassed>
struct Operands {
  using C = compute_t<T>;
  struct Values {
    Vec<C> xmu, u, g;  // g where the activation passed
    Condition<C> passed;
  };

  const Tile& t;
  const DoubleBackwardArrays& arrays;
  const T *x, *u, *g;
  const uint8_t* mask;
  bool reads_ahead;

  Operands(const Tile& tile, const DoubleBackwardArrays& all_arrays, const DoubleBackwardArgs& args,
           bool prefetches)
      : t(tile),
        arrays(all_arrays),
        x(static_cast<const T*>(args.input) + t.offset),
        u(static_cast<const T*>(args.grad_grad_input) + t.offset),
        g(static_cast<const T*>(args.grad_out) + t.offset),
        mask(args.mask + t.mask_offset),
        reads_ahead(prefetches && t.ahead) {}

  Vec<C> coefficients(const void* data, int64_t i) const {
    return bin_values<kMap, C>(data, t.bin + i);
  }
  Affine<Vec<C>> affine(int64_t i) const {
    Affine<Vec<C>> a;
    a.mean = coefficients(arrays.mean, i);
    if constexpr (kPassed == Passed::kInput)
      a.scale = coefficients(arrays.scale, i), a.shift = coefficients(arrays.shift, i);
    return a;
  }
  template <class N>
  Values load(const Affine<Vec<C>>& a, int64_t row, int64_t i, N n) const {
    const int64_t at = row * t.stride + i;
    if (reads_ahead)
      for (const T* p : {x, u, g}) prefetch(p + at + t.ahead);
    const Vec<C> xi = load_lanes(x + at, n);
    Values v{xi - a.mean, load_lanes(u + at, n), load_lanes(g + at, n), {}};
    if constexpr (kPassed == Passed::kInput) v.passed = passes(bnext::apply(a, xi));
    if constexpr (kPassed == Passed::kMask)
      v.passed = from_bits<C>(load_bits(mask + row * t.mask_stride + i / 8, n));
    if constexpr (kAct != Act::kNone) v.g = activate_backward<kAct>(v.passed, v.g);
    return v;
  }
};

template <class T, IndexMap kMap, Act kAct, Passed kPassed>
void sums(const CpuPlan& p, Span span, const DoubleBackwardArrays& arrays,
          const DoubleBackwardArgs& args, double* const results[kSums]) {
  struct State {
    Affine<Vec<compute_t<T>>> affine;
    Vec<double> total[kSums];
  };
  for (int64_t chunk = span.chunk0; chunk < span.chunk1; ++chunk)
    for_each_tile<kMap>(p, chunk, span.bin0, span.bin1, [&](const Tile& t) {
      const Operands<T, kMap, kAct, kPassed> operands(t, arrays, args, true);
      visit<kMap, kGroupRows, 1>(
          t,
          [&](int64_t i) {
            State s{operands.affine(i), {}};
            for (int k = 0; k < kSums; ++k)
              s.total[k] =
                  kMap == IndexMap::kColumns ? load(results[k] + t.bin + i) : Vec<double>(0.0);
            return s;
          },
          [&](State& s, int64_t row, int64_t i, auto, auto n) {
            const auto v = operands.load(s.affine, row, i, n);
            // Lanes past the end are zero in u and g.
            const Vec<double> u = to_double(v.u), g = to_double(v.g), xmu = to_double(v.xmu);
            s.total[0] = s.total[0] + u;
            s.total[1] = s.total[1] + g;
            s.total[2] = fma(u, xmu, s.total[2]);
            s.total[3] = fma(g, xmu, s.total[3]);
            s.total[4] = fma(u, g, s.total[4]);
          },
          [&](State& s, int64_t i, auto n) {
            for (int k = 0; k < kSums; ++k)
              if constexpr (kMap == IndexMap::kColumns)
                store_lanes(results[k] + t.bin + i, s.total[k], n);
              else
                results[k][t.bin] += sum_lanes(s.total[k]);
          });
    });
}

template <class T, IndexMap kMap, Act kAct, Passed kPassed>
void apply(const CpuPlan& p, Span span, const DoubleBackwardArrays& arrays,
           const DoubleBackwardArgs& args) {
  using C = compute_t<T>;
  struct State {
    Affine<Vec<C>> affine;
    Vec<C> invstd, a_u, a_h, a_1, b_g, b_u, b_h, b_1;
  };
  for (int64_t chunk = span.chunk0; chunk < span.chunk1; ++chunk)
    for_each_tile<kMap>(p, chunk, span.bin0, span.bin1, [&](const Tile& t) {
      const Operands<T, kMap, kAct, kPassed> operands(t, arrays, args,
                                                      p.family != Family::kResident);
      const T* residual = static_cast<const T*>(args.grad_grad_residual) + t.offset;
      T* grad_grad_out = static_cast<T*>(args.grad_grad_out) + t.offset;
      T* grad_input = static_cast<T*>(args.grad_input) + t.offset;
      visit<kMap, kGroupRows, 1>(
          t,
          [&](int64_t i) {
            const auto from = [&](const void* data) { return operands.coefficients(data, i); };
            return State{operands.affine(i), from(arrays.invstd), from(arrays.a_u),
                         from(arrays.a_h),   from(arrays.a_1),    from(arrays.b_g),
                         from(arrays.b_u),   from(arrays.b_h),    from(arrays.b_1)};
          },
          [&](const State& s, int64_t row, int64_t i, auto, auto n) {
            const int64_t at = row * t.stride + i;
            const auto v = operands.load(s.affine, row, i, n);
            const Vec<C> h = v.xmu * s.invstd;
            if (args.grad_grad_out) {
              Vec<C> z = fma(v.u, s.a_u, fma(h, s.a_h, s.a_1));
              if (args.grad_grad_residual) z = z + load_lanes(residual + at, n);
              if constexpr (kAct != Act::kNone) z = activate_backward<kAct>(v.passed, z);
              store_lanes(grad_grad_out + at, z, n, p.nontemporal_stores);
            }
            if (args.grad_input)
              store_lanes(grad_input + at, fma(v.g, s.b_g, fma(v.u, s.b_u, fma(h, s.b_h, s.b_1))),
                          n, p.nontemporal_stores);
          },
          [](const State&, int64_t, auto) {});
    });
  if (p.nontemporal_stores) fence_nontemporal();
}

template <class T>
struct Table {
  static void sums(const CpuPlan& p, Span span, const DoubleBackwardArrays& arrays,
                   const DoubleBackwardArgs& args, Act act, double* const results[kSums]) {
    with_map(p.map, [&](auto map) {
      with_activation(act, args.mask, [&](auto act_c, auto passed) {
        BNEXT_ISA_NAMESPACE::sums<T, map, act_c, passed>(p, span, arrays, args, results);
      });
    });
  }
  static void apply(const CpuPlan& p, Span span, const DoubleBackwardArrays& arrays,
                    const DoubleBackwardArgs& args, Act act) {
    with_map(p.map, [&](auto map) {
      with_activation(act, args.mask, [&](auto act_c, auto passed) {
        BNEXT_ISA_NAMESPACE::apply<T, map, act_c, passed>(p, span, arrays, args);
      });
    });
  }
  static constexpr DoubleBackwardKernels value{sums, apply};
};

}  // namespace

template <>
const DoubleBackwardKernels& kernels(DType dtype) {
  return table_of<Table>(dtype);
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
