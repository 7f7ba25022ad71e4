// The CPU kernels as a table of function pointers, one per instruction set and dtype. A kernel
// works on a task of a CpuPlan; it starts no thread and allocates nothing.
#pragma once

#include "plan.h"

namespace bnext {

// What a kernel works on. `ahead`: elements from one that is read here to one that the thread's
// next task reads; 0: none.
struct Task {
  int64_t slice, c0, c1, ahead;
};

// Coefficients in the compute type C (double for float64, else float): see Affine and InputGrad in
// formulas.h for what they mean. One for each channel, or, where the plan takes columns, spread to
// slots, which `spread` does.
using Spread = void (*)(const CpuPlan&, int64_t c0, int64_t c1, const void* values, void* slots);

struct ForwardArrays {
  const void *mean, *scale, *shift;
};
struct BackwardArrays {
  const void *mean, *scale, *shift;  // the forward's, for the activation
  const void *invstd, *a, *b, *c;
};
struct DoubleBackwardArrays {
  const void *mean, *scale, *shift;  // the forward's, for the activation
  const void *invstd, *a_u, *a_h, *a_1, *b_g, *b_u, *b_h, *b_1;  // DoubleBackwardCoefficients
};

// Sums go to sums[k][c] for each channel of the task, over its slice.
using Sums = double* const*;

struct ForwardKernels {
  Spread spread;
  // A value near the mean of each channel, as C: that of some of its values.
  void (*pilots)(const CpuPlan&, int64_t c0, int64_t c1, const void* input, void* pilots);
  // Of x - centre and its square. Centres are of type C, or double where the sums are.
  void (*moments)(const CpuPlan&, const Task&, const void* input, const void* centre, Sums);
  Spread spread_double;
  void (*moments_in_double)(const CpuPlan&, const Task&, const void* input, const void* centre,
                            Sums);
  void (*apply)(const CpuPlan&, const Task&, const ForwardArrays&, const ForwardArgs&, Act);
};

struct BackwardKernels {
  Spread spread;
  using Kernel = void (*)(const CpuPlan&, const Task&, const BackwardArrays&, const BackwardArgs&,
                          Act, Sums);
  Kernel sums, sums_in_double;  // of dy and dy * (x - mean), the mean rounded to C
  Kernel apply;                 // batch statistics: after sums
  Kernel frozen;                // frozen statistics: dx is dy * a
  Kernel frozen_and_sums;       // the same with the sums in one pass
};

struct DoubleBackwardKernels {
  Spread spread;
  // DoubleBackwardSums, in double.
  void (*sums)(const CpuPlan&, const Task&, const DoubleBackwardArrays&, const DoubleBackwardArgs&,
               Act, Sums);
  void (*apply)(const CpuPlan&, const Task&, const DoubleBackwardArrays&, const DoubleBackwardArgs&,
                Act);
};

// The tables: ForwardKernels, BackwardKernels and DoubleBackwardKernels.
template <class Table>
const Table& kernels(Isa isa, DType dtype);

}  // namespace bnext
