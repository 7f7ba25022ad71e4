// The double backward's kernels, compiled per instruction set as kernels.cpp. Bytes per element:
// sums reads grad_grad_input, grad_out and input once; apply reads them (and grad_grad_residual)
// again and writes what is asked for. Sums are kept in double: three reads hide the conversions.
#include "../epilogue.h"
#include "double_backward.h"
#include "vec.h"
#include "vec_memory.h"

namespace bnext::BNEXT_ISA_NAMESPACE {
namespace {

enum class Relu { kNone, kRecompute, kMask };

// The per-channel coefficients that start at `channel`: of one channel for all lanes (rows), or of
// adjacent channels.
template <bool kColumns, class C>
Vec<C> coefficients(const void* data, int64_t channel) {
  const C* p = static_cast<const C*>(data) + channel;
  if constexpr (kColumns)
    return load(p);
  else
    return Vec<C>(*p);
}

// f(channel, at, mask_at, lanes) for every vector of a piece: `lanes` elements from `at` on, their
// bits from byte mask_at on, their coefficients from `channel` on.
template <bool kColumns, class F>
void visit_piece(const DoubleBackwardCut& cut, int64_t piece, int64_t channel0, int64_t channel1,
                 F f) {
  if constexpr (kColumns) {
    const int64_t mask_at = piece * ((cut.c + 7) / 8);
    for (int64_t c = channel0; c < channel1; c += kLanes)
      f(c, piece * cut.c + c, mask_at + c / 8,
        static_cast<int>(std::min<int64_t>(kLanes, channel1 - c)));
  } else {
    const int64_t row = piece / cut.pieces_per_row * cut.c + channel0;
    const int64_t start = piece % cut.pieces_per_row * cut.kPieceElements;
    const int64_t end = std::min(cut.hw, start + cut.kPieceElements);
    for (int64_t i = start; i < end; i += kLanes)
      f(channel0, row * cut.hw + i, row * ((cut.hw + 7) / 8) + i / 8,
        static_cast<int>(std::min<int64_t>(kLanes, end - i)));
  }
}

template <class T>
Vec<compute_t<T>> load_lanes(const void* data, int64_t at, int lanes) {
  const T* p = static_cast<const T*>(data) + at;
  return lanes == kLanes ? load(p) : load_first(p, lanes);
}

template <class T>
void store_lanes(void* data, int64_t at, const Vec<compute_t<T>>& x, int lanes) {
  T* p = static_cast<T*>(data) + at;
  if (lanes == kLanes)
    store(p, x);
  else
    store_first(p, x, lanes);
}

// What both kernels read of a vector: x - mean, u, and g with the sign by which the ReLU passed.
template <class T, bool kColumns, Relu kRelu>
struct Operands {
  using C = compute_t<T>;
  Vec<C> xmu, u, g;
  Sign<C> passed;

  Operands(const DoubleBackwardLanes& l, const DoubleBackwardArgs& args, int64_t channel,
           int64_t at, int64_t mask_at, int lanes) {
    const Vec<C> x = load_lanes<T>(args.input, at, lanes);
    const Vec<C> mean = coefficients<kColumns, C>(l.mean, channel);
    xmu = x - mean;
    u = load_lanes<T>(args.grad_grad_input, at, lanes);
    g = load_lanes<T>(args.grad_out, at, lanes);
    if constexpr (kRelu == Relu::kRecompute)
      passed =
          passes_relu(bnext::apply(Affine<Vec<C>>{mean, coefficients<kColumns, C>(l.scale, channel),
                                                  coefficients<kColumns, C>(l.shift, channel)},
                                   x));
    if constexpr (kRelu == Relu::kMask)
      passed = from_bits<C>(load_bits(args.relu_mask + mask_at, lanes));
    if constexpr (kRelu != Relu::kNone) g = keep(passed, g);
  }
};

template <class T, bool kColumns, Relu kRelu>
void sums(const DoubleBackwardCut& cut, DoubleBackwardTask task, const DoubleBackwardLanes& l,
          const DoubleBackwardArgs& args, DoubleBackwardSums out) {
  using Total = Vec<double>;
  double* const results[] = {out.u, out.g, out.u_xmu, out.g_xmu, out.u_g};
  Total total[5];
  for (auto& t : total) t = Total(0.0);
  for (int64_t piece = task.piece0; piece < task.piece1; ++piece)
    visit_piece<kColumns>(
        cut, piece, task.channel0, task.channel1,
        [&](int64_t channel, int64_t at, int64_t mask_at, int lanes) {
          const Operands<T, kColumns, kRelu> o(l, args, channel, at, mask_at, lanes);
          // Lanes past the end are zero in u and g.
          const Total u = to_double(o.u), g = to_double(o.g), xmu = to_double(o.xmu);
          if constexpr (kColumns)
            for (int s = 0; s < 5; ++s) total[s] = load(results[s] + channel);
          total[0] = total[0] + u;
          total[1] = total[1] + g;
          total[2] = fma(u, xmu, total[2]);
          total[3] = fma(g, xmu, total[3]);
          total[4] = fma(u, g, total[4]);
          if constexpr (kColumns)
            for (int s = 0; s < 5; ++s) store_lanes<double>(results[s], channel, total[s], lanes);
        });
  if constexpr (!kColumns)
    for (int s = 0; s < 5; ++s) results[s][task.channel0] = sum_lanes(total[s]);
}

template <class T, bool kColumns, Relu kRelu>
void apply(const DoubleBackwardCut& cut, DoubleBackwardTask task, const DoubleBackwardLanes& l,
           const DoubleBackwardArgs& args) {
  using C = compute_t<T>;
  for (int64_t piece = task.piece0; piece < task.piece1; ++piece)
    visit_piece<kColumns>(
        cut, piece, task.channel0, task.channel1,
        [&](int64_t channel, int64_t at, int64_t mask_at, int lanes) {
          const auto of = [&](const void* data) {
            return coefficients<kColumns, C>(data, channel);
          };
          const Operands<T, kColumns, kRelu> o(l, args, channel, at, mask_at, lanes);
          const Vec<C> h = o.xmu * of(l.invstd);
          if (args.grad_grad_out) {
            Vec<C> z = fma(o.u, of(l.a_u), fma(h, of(l.a_h), of(l.a_1)));
            if (args.grad_grad_residual) z = z + load_lanes<T>(args.grad_grad_residual, at, lanes);
            if constexpr (kRelu != Relu::kNone) z = keep(o.passed, z);
            store_lanes<T>(args.grad_grad_out, at, z, lanes);
          }
          if (args.grad_input)
            store_lanes<T>(args.grad_input, at,
                           fma(o.g, of(l.b_g), fma(o.u, of(l.b_u), fma(h, of(l.b_h), of(l.b_1)))),
                           lanes);
        });
}

// From run-time switches to an instantiation: f gets an integral constant for each.
template <class F>
void with_switches(const DoubleBackwardCut& cut, const DoubleBackwardArgs& args, bool relu, F f) {
  const auto with_relu = [&](auto columns) {
    if (!relu)
      f(columns, std::integral_constant<Relu, Relu::kNone>{});
    else if (args.relu_mask)
      f(columns, std::integral_constant<Relu, Relu::kMask>{});
    else
      f(columns, std::integral_constant<Relu, Relu::kRecompute>{});
  };
  if (cut.columns)
    with_relu(std::true_type{});
  else
    with_relu(std::false_type{});
}

template <class T>
struct Table {
  static void sums(const DoubleBackwardCut& cut, DoubleBackwardTask task,
                   const DoubleBackwardLanes& lanes, const DoubleBackwardArgs& args, bool relu,
                   DoubleBackwardSums out) {
    with_switches(cut, args, relu, [&](auto columns, auto mode) {
      BNEXT_ISA_NAMESPACE::sums<T, columns, mode>(cut, task, lanes, args, out);
    });
  }
  static void apply(const DoubleBackwardCut& cut, DoubleBackwardTask task,
                    const DoubleBackwardLanes& lanes, const DoubleBackwardArgs& args, bool relu) {
    with_switches(cut, args, relu, [&](auto columns, auto mode) {
      BNEXT_ISA_NAMESPACE::apply<T, columns, mode>(cut, task, lanes, args);
    });
  }
  static constexpr DoubleBackwardKernels value{sums, apply};
};

}  // namespace

const DoubleBackwardKernels& double_backward_kernels(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return Table<double>::value;
    case DType::kBFloat16:
      return Table<bfloat16>::value;
    case DType::kFloat16:
      return Table<float16>::value;
    default:
      return Table<float>::value;
  }
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
