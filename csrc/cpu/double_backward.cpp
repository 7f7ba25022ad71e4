// The op that differentiates batch_norm_backward: what makes a gradient penalty one pass over the
// activation more, where a composition of elementwise operations takes dozens. Includes the
// LibTorch stable ABI.
#include "double_backward.h"

#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../epilogue.h"
#include "cpu_info.h"
#include "hugepages.h"
#include "schedule.h"

namespace bnext {
namespace {

constexpr int kArrays = 11;  // of DoubleBackwardLanes

// The per-channel scalars. Upper case: of a single channel, in double.
struct Channel {
  double count, mean, mean_rounded, invstd, weight, ggw, ggb;
};
struct Coefficients {
  double a_u, a_h, a_1, b_g, b_u, b_h, b_1, grad_weight;
};

// With h = (x - mean) / std, u = grad_grad_input, g = grad_out (where the ReLU passed) and
// P z = z - mean(z) - h mean(z h), the first backward is
//   dx = weight / std P g,   dweight = sum g h,   dbias = sum g,   dresidual = g
// and what is differentiated here is L = <u, dx> + <ggw, dweight> + <ggb, dbias> + <v, dresidual>:
//   dL/dg      = weight / std P u + ggw h + ggb + v
//   dL/dweight = q / std,   q = <u, P g> = sum u g - sum u mean g - sum u h mean g h
//   dL/dx      = (P z - weight / std q / M h) / std,
//                z = (ggw - weight / std mean(u h)) g - weight / std mean(g h) u
// where q / M h / std comes from 1 / std, and P from h's own mean and 1 / std. Frozen statistics:
// P is the identity in dx, and dL/dx = ggw g / std.
Coefficients differentiate(const Channel& c, bool frozen, double sum_u, double sum_g,
                           double sum_u_xmu, double sum_g_xmu, double sum_u_g) {
  const double a = c.weight * c.invstd, error = c.mean - c.mean_rounded;
  Coefficients k{};
  k.a_u = a;
  k.a_h = c.ggw;
  k.a_1 = c.ggb;
  double q = sum_u_g;
  if (frozen) {
    k.b_g = c.ggw * c.invstd;
  } else {
    const double mean_u = sum_u / c.count, mean_g = sum_g / c.count;
    // The kernels subtract the rounded mean.
    const double mean_uh = (sum_u_xmu - error * sum_u) / c.count * c.invstd;
    const double mean_gh = (sum_g_xmu - error * sum_g) / c.count * c.invstd;
    q -= c.count * (mean_u * mean_g + mean_uh * mean_gh);
    k.a_h -= a * mean_uh;
    k.a_1 -= a * mean_u;
    const double z_g = c.ggw - a * mean_uh, z_u = -a * mean_gh;
    k.b_g = c.invstd * z_g;
    k.b_u = c.invstd * z_u;
    k.b_h = -c.invstd * (z_g * mean_gh + z_u * mean_uh + a * q / c.count);
    k.b_1 = -c.invstd * (z_g * mean_g + z_u * mean_u);
  }
  k.a_1 -= k.a_h * error * c.invstd;
  k.b_1 -= k.b_h * error * c.invstd;
  k.grad_weight = q * c.invstd;
  return k;
}

struct Statistics {
  const double* save_stats;  // null: frozen, from
  ParamIn running_mean, running_var;
  ParamIn weight, bias, ggw, ggb;
  double eps;
};

template <class C>
void run(const DoubleBackwardCut& cut, const DoubleBackwardKernels& kernels, bool relu,
         const Statistics& s, const DoubleBackwardArgs& args, ParamOut grad_weight) {
  Arrays<C> lanes(kArrays, cut.c);
  Arrays<double> partials(5 * cut.slices, cut.c);
  const DoubleBackwardLanes l{lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5],
                              lanes[6], lanes[7], lanes[8], lanes[9], lanes[10]};
  const bool frozen = !s.save_stats;
  const auto mean = [&](int64_t c) {
    return frozen ? read(s.running_mean, c, 0) : s.save_stats[c];
  };
  const auto invstd = [&](int64_t c) {
    return frozen ? inverse_std(read(s.running_var, c, 1), s.eps) : s.save_stats[cut.c + c];
  };
  for (int64_t c = 0; c < cut.c; ++c) {
    const auto a = make_affine<C>(mean(c), invstd(c), read(s.weight, c, 1), read(s.bias, c, 0));
    lanes[0][c] = a.mean, lanes[1][c] = a.scale, lanes[2][c] = a.shift;
    lanes[3][c] = static_cast<C>(invstd(c));
  }
  const auto task = [&](int64_t slice, int64_t block) {
    return DoubleBackwardTask{cut.piece_of(slice), cut.piece_of(slice + 1), block * cut.block,
                              std::min(cut.c, (block + 1) * cut.block)};
  };
  const auto sums = [&](int64_t slice, int64_t block) {
    const int64_t first = 5 * slice;
    kernels.sums(cut, task(slice, block), l, args, relu,
                 {partials[first], partials[first + 1], partials[first + 2], partials[first + 3],
                  partials[first + 4]});
  };
  const auto finish = [&](int64_t block) {
    for (int64_t c = block * cut.block; c < std::min(cut.c, (block + 1) * cut.block); ++c) {
      double total[5] = {};
      for (int64_t slice = 0; slice < cut.slices; ++slice)
        for (int i = 0; i < 5; ++i) total[i] += partials[5 * slice + i][c];
      const Channel channel{static_cast<double>(cut.n * cut.hw),
                            mean(c),
                            static_cast<double>(lanes[0][c]),
                            invstd(c),
                            read(s.weight, c, 1),
                            read(s.ggw, c, 0),
                            read(s.ggb, c, 0)};
      const Coefficients k =
          differentiate(channel, frozen, total[0], total[1], total[2], total[3], total[4]);
      int array = 4;
      for (const double value : {k.a_u, k.a_h, k.a_1, k.b_g, k.b_u, k.b_h, k.b_1})
        lanes[array++][c] = static_cast<C>(value);
      write(grad_weight, c, k.grad_weight);
    }
  };
  const auto apply = [&](int64_t slice, int64_t block) {
    kernels.apply(cut, task(slice, block), l, args, relu);
  };
  const auto parallel = [&](int64_t tasks, const auto& f) {
    // ATen's grain: fewer elements are not worth waking a thread for.
    const int64_t elements = std::max<int64_t>(1, cut.n * cut.c * cut.hw / tasks);
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, 32768 / elements),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) f(i);
                                });
  };
  // A channel after the other, so that the second pass finds it in the cache; where there are too
  // few for the threads, or rows of all channels, one pass over everything after the other.
  if (!cut.columns && cut.c >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel(cut.blocks, [&](int64_t block) {
      for (int64_t slice = 0; slice < cut.slices; ++slice) sums(slice, block);
      finish(block);
      for (int64_t slice = cut.slices; slice-- > 0;) apply(slice, block);
    });
  } else {
    const int64_t tasks = cut.slices * cut.blocks;
    parallel(tasks, [&](int64_t i) { sums(i / cut.blocks, i % cut.blocks); });
    for (int64_t block = 0; block < cut.blocks; ++block) finish(block);
    parallel(tasks, [&](int64_t i) { apply(i / cut.blocks, i % cut.blocks); });
  }
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_double_backward(
    const Tensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
    const OptionalTensor& grad_grad_bias, const OptionalTensor& grad_grad_residual,
    const Tensor& grad_out, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& relu_mask, const OptionalTensor& save_stats,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps, bool relu,
    bool need_grad_out, bool need_input, bool need_weight) {
  const Input x =
      check_input(input, save_stats ? Stage::kTrainBackward : Stage::kEvalBackward, relu);
  const Problem& problem = x.problem;
  const Tensor u = check_like_input("grad_grad_input", grad_grad_input, x);
  const Tensor dy = check_like_input("grad_out", grad_out, x);
  OptionalTensor v;
  if (grad_grad_residual) v = check_like_input("grad_grad_residual", *grad_grad_residual, x);
  Statistics s{check_save_stats(save_stats, x),
               check_statistic("running_mean", running_mean, x),
               check_statistic("running_var", running_var, x),
               check_param("weight", weight, x),
               check_param("bias", bias, x),
               check_param("grad_grad_weight", grad_grad_weight, x),
               check_param("grad_grad_bias", grad_grad_bias, x),
               eps};
  check_any_statistics(save_stats.has_value(), running_mean && running_var, x);
  BNEXT_CHECK(weight || !need_weight, "weight: expected where its gradient is asked for");
  DoubleBackwardArgs args{};
  args.relu_mask = check_mask(relu_mask, x);

  const auto allocate_output = [&](bool needed) {
    if (!needed) return Tensor();
    Tensor output = allocate_like(x);
    advise_huge_pages(output.data_ptr(), problem.bytes());
    return output;
  };
  Tensor grad_grad_out = allocate_output(need_grad_out), grad_input = allocate_output(need_input);
  OptionalTensor grad_weight;
  if (need_weight) grad_weight = allocate_grad(*weight, x);
  args.grad_grad_input = u.const_data_ptr();
  args.grad_grad_residual = v ? v->const_data_ptr() : nullptr;
  args.grad_out = dy.const_data_ptr();
  args.input = x.tensor.const_data_ptr();
  args.grad_grad_out = need_grad_out ? grad_grad_out.mutable_data_ptr() : nullptr;
  args.grad_input = need_input ? grad_input.mutable_data_ptr() : nullptr;
  if (!x.empty()) {
    const DoubleBackwardCut cut(problem);
    const CpuInfo cpu = cpu_info(1);
    const auto& kernels = double_backward_kernels(cpu.isa, problem.dtype);
    const auto run_in = problem.dtype == DType::kFloat64 ? run<double> : run<float>;
    run_in(cut, kernels, relu, s, args, param_out(grad_weight));
  } else if (grad_weight) {
    torch::stable::zero_(*grad_weight);
  }
  return {grad_grad_out, grad_input, grad_weight.value_or(Tensor())};
}

}  // namespace
}  // namespace bnext

STABLE_TORCH_LIBRARY_IMPL(bnext, CPU, m) {
  m.impl("batch_norm_double_backward", TORCH_BOX(&bnext::batch_norm_double_backward));
}
