// How the statistics of several processes join on the CPU. Includes no torch.
#pragma once

#include "../moments.h"
#include "coefficients.h"

namespace bnext {

// The statistics of several processes, and the running ones.
inline void join_processes(const JoinArgs& args) {
  Arrays<double> running(2, args.c);
  double *const mean = running[0], *const var = running[1];
  read(args.running_mean, args.c, 0, mean);
  read(args.running_var, args.c, 1, var);
  double factor = args.momentum;
  if (args.num_batches_tracked) ++*args.num_batches_tracked;
  if (args.cumulative)
    factor = args.num_batches_tracked ? 1 / static_cast<double>(*args.num_batches_tracked) : 0;
  bool any = false;
  for (int64_t c = 0; c < args.c; ++c) {
    const Joined j = join(args, c);
    any = j.count > 0;
    args.save_stats[c] = j.mean;
    args.save_stats[args.c + c] = any ? inverse_std(j.m2 / j.count, args.eps) : 0;
    args.save_stats[2 * args.c + c] = j.low;
    mean[c] = (1 - factor) * mean[c] + factor * j.mean;
    var[c] = (1 - factor) * var[c] + factor * (j.m2 / (j.count - 1));
  }
  if (!any) return;  // counted, but there is nothing to learn from
  write(args.running_mean, 0, args.c, mean);
  write(args.running_var, 0, args.c, var);
}

}  // namespace bnext
