// The CPU kernels as a program, for an emulated machine: reads one case's arguments from standard
// input, writes its results to standard output, in the order of test_native_aarch64.py.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cpu/schedule.h"

namespace bnext {
namespace {

struct Header {
  Problem problem;  // of the forward
  CpuInfo cpu;
  DType params;  // and running statistics
  bool training;
  double act_param;
};

using Bytes = std::vector<unsigned char>;

Bytes read_bytes(int64_t bytes) {
  Bytes data(bytes);
  if (std::fread(data.data(), 1, data.size(), stdin) != data.size()) std::abort();
  return data;
}

// What no kernel writes stays NaN.
Bytes unwritten(int64_t bytes) {
  return Bytes(bytes, 0xff);
}

// f(the schedule of a stage), whose threads run one after the other.
template <class F>
void with_schedule(const Header& h, Stage stage, const F& f) {
  Problem problem = canonical(h.problem);
  problem.stage = stage;
  problem.need_residual = problem.residual && is_backward(stage);
  problem.residual = problem.residual && !is_backward(stage);
  const auto parallel = [&](int64_t n, int64_t grain, const auto& task) {
    const int64_t part = std::max(grain, ceil_div(n, h.cpu.threads));
    for (int64_t i = 0; i < n; i += part) task(i, std::min(n, i + part));
  };
  const CpuPlan plan = plan_cpu(problem, h.cpu);
  if (problem.dtype == DType::kFloat64)
    f(Schedule<double, decltype(parallel)>(plan, problem, parallel));
  else
    f(Schedule<float, decltype(parallel)>(plan, problem, parallel));
}

void run(const Header& h) {
  const Problem& p = h.problem;
  const int64_t all = p.bytes(), if_residual = p.residual ? all : 0;
  const int64_t each = p.c * element_size(h.params);
  const auto in = [&](const Bytes& b) { return ParamIn{b.data(), 1, h.params}; };
  const auto out = [&](Bytes& b) { return ParamOut{b.data(), 1, h.params}; };
  const auto optional = [](auto& b) { return b.empty() ? nullptr : b.data(); };

  const Bytes x = read_bytes(all), weight = read_bytes(each), bias = read_bytes(each);
  const Bytes residual = read_bytes(if_residual);
  Bytes running_mean = read_bytes(each), running_var = read_bytes(each);
  const Bytes frozen_mean = running_mean, frozen_var = running_var;
  const Bytes dy = read_bytes(all), ggx = read_bytes(all), ggw = read_bytes(each);
  const Bytes ggb = read_bytes(each), ggr = read_bytes(if_residual);

  Bytes y = unwritten(all), dx = unwritten(all), dw = unwritten(each), db = unwritten(each);
  Bytes dr = unwritten(if_residual);
  Bytes second_dy = unwritten(all), second_dx = unwritten(all), second_dw = unwritten(each);
  const Problem canon = canonical(p);
  Bytes mask = unwritten(p.has_mask ? canon.mask_rows() * canon.mask_row_bytes() : 0);
  std::vector<double> stats(h.training ? 3 * p.c : 0);
  constexpr double kEps = 1e-5;

  ForwardArgs forward{};
  forward.input = x.data(), forward.residual = optional(residual), forward.output = y.data();
  forward.mask = optional(mask), forward.weight = in(weight), forward.bias = in(bias);
  forward.frozen_mean = in(frozen_mean), forward.frozen_var = in(frozen_var);
  forward.running_mean = out(running_mean), forward.running_var = out(running_var);
  forward.save_stats = optional(stats), forward.momentum = 0.1, forward.eps = kEps;
  forward.act_param = h.act_param;
  with_schedule(h, h.training ? Stage::kTrainForward : Stage::kEvalForward, [&](auto schedule) {
    h.training ? schedule.train_forward(forward) : schedule.eval_forward(forward);
  });

  BackwardArgs backward{};
  backward.grad_out = dy.data(), backward.input = x.data(), backward.mask = optional(mask);
  backward.weight = in(weight), backward.bias = in(bias), backward.save_stats = optional(stats);
  backward.running_mean = in(frozen_mean), backward.running_var = in(frozen_var);
  backward.grad_input = dx.data(), backward.grad_residual = optional(dr);
  backward.grad_weight = out(dw), backward.grad_bias = out(db), backward.eps = kEps;
  backward.act_param = h.act_param;
  with_schedule(h, h.training ? Stage::kTrainBackward : Stage::kEvalBackward,
                [&](auto schedule) { schedule.backward(backward); });

  DoubleBackwardArgs second{};
  second.grad_grad_input = ggx.data(), second.grad_grad_residual = optional(ggr);
  second.grad_out = dy.data(), second.input = x.data(), second.mask = optional(mask);
  second.weight = in(weight), second.bias = in(bias), second.save_stats = optional(stats);
  second.grad_grad_weight = in(ggw), second.grad_grad_bias = in(ggb);
  second.running_mean = in(frozen_mean), second.running_var = in(frozen_var);
  second.grad_grad_out = second_dy.data(), second.grad_input = second_dx.data();
  second.grad_weight = out(second_dw), second.eps = kEps, second.act_param = h.act_param;
  if (traits(p.act).needs != Needs::kSum)
    with_schedule(h, Stage::kDoubleBackward,
                  [&](auto schedule) { schedule.double_backward(second); });

  for (const Bytes* b :
       {&y, &running_mean, &running_var, &dx, &dw, &db, &dr, &second_dx, &second_dw, &second_dy})
    if (std::fwrite(b->data(), 1, b->size(), stdout) != b->size()) std::abort();
}

}  // namespace
}  // namespace bnext

int main() {
  bnext::Header header;
  if (std::fread(&header, sizeof header, 1, stdin) != 1) std::abort();
  bnext::run(header);
}
