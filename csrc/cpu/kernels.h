// The CPU kernels as a table of function pointers, one per instruction set and dtype. A kernel
// works on a range of chunks and a range of bins of a CpuPlan; it starts no thread and allocates
// nothing.
#pragma once

#include "plan.h"

namespace bnext {

// What a task works on.
struct Span {
  int64_t chunk0, chunk1, bin0, bin1;
};

// Per-bin coefficients in the compute type (double for float64, else float), [bins] each and
// readable kBinPadding past the end: see Affine and InputGrad in formulas.h for what they mean.
inline constexpr int64_t kBinPadding = 64;

struct ForwardArrays {
  const void *mean, *scale, *shift;
};
struct BackwardArrays {
  const void *mean, *scale, *shift;  // the forward's, for the sign of a ReLU
  const void *invstd, *a, *b, *c;
};

struct DoubleBackwardArrays {
  const void *mean, *scale, *shift;  // the forward's, for the sign of a ReLU
  const void *invstd, *a_u, *a_h, *a_1, *b_g, *b_u, *b_h, *b_1;  // DoubleBackwardCoefficients
};

// Per-bin results of a span, [bins] each: mean and m2, or sum_dy and sum_dy_xmu, where xmu is x
// less the mean rounded to the compute type.
struct Partial {
  double *first, *second;
};

struct ForwardKernels {
  void (*moments)(const CpuPlan&, Span, const void* input, Partial);
  void (*apply)(const CpuPlan&, Span, const ForwardArrays&, const ForwardArgs&, Act);
};

struct BackwardKernels {
  using Kernel = void (*)(const CpuPlan&, Span, const BackwardArrays&, const BackwardArgs&, Act,
                          Partial);
  Kernel sums;
  Kernel apply;            // batch statistics: after sums
  Kernel frozen;           // frozen statistics: dx is dy * a
  Kernel frozen_and_sums;  // the same with the sums in one pass
};

struct DoubleBackwardKernels {
  // Adds to sums, which are DoubleBackwardSums of each bin.
  void (*sums)(const CpuPlan&, Span, const DoubleBackwardArrays&, const DoubleBackwardArgs&, Act,
               double* const sums[5]);
  void (*apply)(const CpuPlan&, Span, const DoubleBackwardArrays&, const DoubleBackwardArgs&, Act);
};

// The number of values per bin in chunks [chunk0, chunk1).
static inline int64_t chunk_values(const CpuPlan& p, int64_t chunk0, int64_t chunk1) {
  // Chunks before `chunk`: whole row groups, then pieces of the group it is in.
  const auto before = [&p](int64_t chunk) {
    const int64_t row = chunk / p.segments * p.chunk_rows;
    const int64_t piece = chunk % p.segments * p.segment_width;
    return row >= p.rows
               ? p.rows * p.width
               : row * p.width + (piece < p.width ? piece : p.width) * (piece ? p.chunk_rows : 0);
  };
  return before(chunk1) - before(chunk0);
}

// The tables: ForwardKernels, BackwardKernels and DoubleBackwardKernels.
template <class Table>
const Table& kernels(Isa isa, DType dtype);

}  // namespace bnext
