// The moments of a channel's values in several processes, and how they join. For host and device.
#pragma once

#include "formulas.h"

namespace bnext {

// What processes have told each other, in their order.
struct JoinArgs {
  const double* moments;  // [ranks, 3, C], as ForwardArgs::moments
  int64_t rank_stride, row_stride;
  const double* counts;  // [ranks]: values per channel
  int64_t count_stride, ranks, c;
  ParamOut running_mean, running_var;  // updated, where given
  int64_t* num_batches_tracked;        // null: none
  double* save_stats;                  // as ForwardArgs::save_stats
  double momentum;
  bool cumulative;
  double eps;
};

struct Joined {
  double count, mean, low, m2;  // the mean in two doubles; the sum of squares about it
};

// By the formula of Chan, Golub & LeVeque (1979), in one order: the same bits in all processes.
BNEXT_HD inline Joined join(const JoinArgs& a, int64_t c) {
  const auto of = [&](int64_t rank) { return a.moments + rank * a.rank_stride + c; };
  const auto count_of = [&](int64_t rank) { return a.counts[rank * a.count_stride]; };
  double count = 0, about = 0, offset = 0;
  for (int64_t rank = 0; rank < a.ranks; ++rank) {
    const double n = count_of(rank);
    if (n == 0) continue;
    if (count == 0) about = *of(rank);
    count += n;
    offset += n * (*of(rank) - about + of(rank)[2 * a.row_stride]);
  }
  if (count == 0) return {0, 0, 0, 0};
  offset /= count;
  double m2 = 0;
  for (int64_t rank = 0; rank < a.ranks; ++rank) {
    const double n = count_of(rank);
    if (n == 0) continue;
    const double d = *of(rank) - about + of(rank)[2 * a.row_stride] - offset;
    m2 += of(rank)[a.row_stride] + n * d * d;
  }
  const double mean = about + offset, rounded = mean - about;
  const double low = about - (mean - rounded) + (offset - rounded);
  return {count, mean, low - low == 0 ? low : 0, m2};
}

}  // namespace bnext
