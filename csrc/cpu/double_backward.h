// The double backward's kernels as a table of function pointers, one per instruction set and dtype,
// as kernels.h; and how its work is cut. Includes no torch.
#pragma once

#include <algorithm>

#include "../batch_norm.h"
#include "../plan.h"
#include "kernels.h"

namespace bnext {

// Memory as pieces of channels (rows: up to kPieceElements adjacent elements of one channel), or as
// rows of adjacent channels (columns: a piece is one element of every channel). Slices of pieces
// are reduced separately and joined in order; they depend on the problem alone, so that the result
// is the same for any number of threads.
struct DoubleBackwardCut {
  static constexpr int64_t kPieceElements = 16384;  // a multiple of whole mask bytes and vectors
  static constexpr int64_t kBlockColumns = 512;     // their sums stay in L1 and L2
  static constexpr int64_t kTasks = 64;             // more than cores that memory can feed

  int64_t n, c, hw;
  bool columns;
  int64_t pieces_per_row, pieces;  // rows: of [N, C, HW]; pieces: of a channel
  int64_t block, blocks;           // channels of a task
  int64_t slices;

  explicit DoubleBackwardCut(const Problem& p)
      : n(p.n), c(p.c), hw(p.hw), columns(p.channels_last) {
    pieces_per_row = (hw + kPieceElements - 1) / kPieceElements;
    pieces = columns ? n * hw : n * pieces_per_row;
    block = columns ? std::min(c, kBlockColumns) : 1;
    blocks = (c + block - 1) / block;
    slices = std::clamp<int64_t>(kTasks / blocks, 1, pieces);
  }
  int64_t piece_of(int64_t slice) const { return pieces * slice / slices; }
};

// Channels [channel0, channel1) of a slice.
struct DoubleBackwardTask {
  int64_t piece0, piece1, channel0, channel1;
};

struct DoubleBackwardArgs {
  const void *grad_grad_input, *grad_grad_residual;  // the second null: none
  const void *grad_out, *input;
  const uint8_t* relu_mask;          // null: the sign is recomputed from input
  void *grad_grad_out, *grad_input;  // null: not asked for
};

// Per-channel coefficients in the compute type, [C] each and readable kLanePadding past the end;
// with g = grad_out where the ReLU passed, u = grad_grad_input, v = grad_grad_residual and
// h = (x - mean) * invstd:
//   grad_grad_out = (a_u * u + a_h * h + a_1 + v) where the ReLU passed, else 0
//   grad_input    =  b_g * g + b_u * u + b_h * h + b_1
struct DoubleBackwardLanes {
  const void *mean, *scale, *shift;  // the forward's, for the sign of a ReLU
  const void *invstd, *a_u, *a_h, *a_1, *b_g, *b_u, *b_h, *b_1;
};

// What a task adds up per channel, [C] each; xmu is x less the mean rounded to the compute type.
struct DoubleBackwardSums {
  double *u, *g, *u_xmu, *g_xmu, *u_g;
};

struct DoubleBackwardKernels {
  void (*sums)(const DoubleBackwardCut&, DoubleBackwardTask, const DoubleBackwardLanes&,
               const DoubleBackwardArgs&, bool relu, DoubleBackwardSums);
  void (*apply)(const DoubleBackwardCut&, DoubleBackwardTask, const DoubleBackwardLanes&,
                const DoubleBackwardArgs&, bool relu);
};

const DoubleBackwardKernels& double_backward_kernels(Isa isa, DType dtype);

}  // namespace bnext
