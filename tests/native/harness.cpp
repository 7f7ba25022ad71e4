// The real kernels and their plan under the emulator, for ctypes.
#include <exception>

#include "../../csrc/cuda/launch.h"
#include "buffers.h"

namespace bnext {
namespace {

using emulation::Buffers;
using emulation::Kind;

// Arguments in the emulated GPU's memory.
struct OnDevice {
  const Problem& problem;
  Buffers memory;

  // Tensors lie as the problem says, and no better.
  template <class T>
  T* tensor(T* host, Kind kind, const char* name) {
    const size_t offset = problem.alignment < 16 ? static_cast<size_t>(problem.alignment) : 0;
    return memory.add(host, problem.bytes(), kind, name, offset);
  }
  template <class T>
  T* mask(T* host, Kind kind) {
    return memory.add(host, problem.mask_rows() * problem.mask_row_bytes(), kind, "the mask");
  }
  template <class V>
  V vector(V v, Kind kind, const char* name) {
    const int64_t elements = problem.c == 0 ? 0 : (problem.c - 1) * v.stride + 1;
    v.data = memory.add(v.data, elements * element_size(v.dtype), kind, name);
    return v;
  }
  template <class T>
  T* statistics(T* host, Kind kind) {
    return memory.add(host, 3 * problem.c * int64_t{sizeof(double)}, kind, "statistics");
  }
};

int finish(Buffers& memory, int error) {
  const bool complete = memory.copy_back();
  if (error == 0 && !complete) emulation::set_error("an output was not written to the end");
  return error != 0 || !complete;
}

}  // namespace
}  // namespace bnext

using namespace bnext;

extern "C" {

// sizeof what ctypes mirrors.
void bnext_sizes(int64_t* sizes) {
  const int64_t all[] = {sizeof(Problem),     sizeof(CudaInfo),     sizeof(CudaPlan),
                         sizeof(ForwardArgs), sizeof(BackwardArgs), sizeof(DoubleBackwardArgs),
                         sizeof(JoinArgs)};
  std::memcpy(sizes, all, sizeof all);
}

// family, team: -1 for no choice. 0: ok.
int bnext_plan(const Problem* problem, const CudaInfo* info, int family, int team, CudaPlan* plan) {
  emulation::clear_error();
  try {
    CudaChoice choice;
    if (family >= 0) choice.family = static_cast<Family>(family);
    if (team >= 0) choice.team = static_cast<Team>(team);
    *plan = plan_cuda(*problem, *info, choice);
  } catch (const std::exception& e) {
    emulation::set_error(e.what());
    return 1;
  }
  return 0;
}

// `info`: the GPU to plan for, and then `plan` is the last one tried; null: as planned.
int bnext_forward(CudaPlan* plan, const Problem* problem, const ForwardArgs* host,
                  const CudaInfo* info) {
  emulation::clear_error();
  OnDevice on{*problem, {}};
  ForwardArgs a = *host;
  a.input = on.tensor(a.input, Kind::kInput, "the input");
  a.residual = on.tensor(a.residual, Kind::kInput, "the residual");
  a.output = on.tensor(a.output, Kind::kOutput, "the output");
  a.mask = on.mask(a.mask, Kind::kOutput);
  a.weight = on.vector(a.weight, Kind::kConstant, "the weight");
  a.bias = on.vector(a.bias, Kind::kConstant, "the bias");
  a.frozen_mean = on.vector(a.frozen_mean, Kind::kConstant, "the frozen mean");
  a.frozen_var = on.vector(a.frozen_var, Kind::kConstant, "the frozen variance");
  a.running_mean = on.vector(a.running_mean, Kind::kState, "the running mean");
  a.running_var = on.vector(a.running_var, Kind::kState, "the running variance");
  a.num_batches_tracked = on.memory.add(a.num_batches_tracked, int64_t{sizeof(int64_t)},
                                        Kind::kState, "num_batches_tracked");
  a.moments = on.statistics(a.moments, Kind::kOutput);
  a.save_stats =
      on.statistics(a.save_stats, is_training(problem->stage) ? Kind::kOutput : Kind::kConstant);
  const auto run = [&](const CudaPlan& planned) {
    emulation::clear_error();
    void* const workspace = on.memory.scratch(planned.workspace_bytes);
    return launch(planned, *problem, a, workspace, nullptr);
  };
  int error = 0;
  if (a.num_batches_tracked && a.cumulative) error = launch_count(a.num_batches_tracked, nullptr);
  if (error == 0) error = info ? run_planned(*problem, *info, {}, *plan, run) : run(*plan);
  return finish(on.memory, error);
}

int bnext_count(int64_t* num_batches_tracked) {
  emulation::clear_error();
  Buffers memory;
  int64_t* const count =
      memory.add(num_batches_tracked, int64_t{sizeof(int64_t)}, Kind::kState, "the count");
  return finish(memory, launch_count(count, nullptr));
}

int bnext_join(const JoinArgs* host) {
  emulation::clear_error();
  Buffers memory;
  JoinArgs a = *host;
  constexpr int64_t kBytes = sizeof(double);
  const auto vector = [&](ParamOut v, const char* name) {
    v.data =
        memory.add(v.data, ((a.c - 1) * v.stride + 1) * element_size(v.dtype), Kind::kState, name);
    return v;
  };
  a.moments = memory.add(a.moments, a.ranks * a.rank_stride * kBytes, Kind::kConstant, "moments");
  a.counts = memory.add(a.counts, ((a.ranks - 1) * a.count_stride + 1) * kBytes, Kind::kConstant,
                        "counts");
  a.running_mean = vector(a.running_mean, "the running mean");
  a.running_var = vector(a.running_var, "the running variance");
  a.num_batches_tracked = memory.add(a.num_batches_tracked, int64_t{sizeof(int64_t)}, Kind::kState,
                                     "num_batches_tracked");
  a.save_stats = memory.add(a.save_stats, 3 * a.c * kBytes, Kind::kOutput, "save_stats");
  return finish(memory, launch_join(a, nullptr));
}

int bnext_backward(const CudaPlan* plan, const Problem* problem, const BackwardArgs* host) {
  emulation::clear_error();
  OnDevice on{*problem, {}};
  BackwardArgs a = *host;
  a.grad_out = on.tensor(a.grad_out, Kind::kInput, "grad_out");
  a.input = on.tensor(a.input, Kind::kInput, "the input");
  a.residual = on.tensor(a.residual, Kind::kInput, "the residual");
  a.mask = on.mask(a.mask, Kind::kInput);
  a.weight = on.vector(a.weight, Kind::kConstant, "the weight");
  a.bias = on.vector(a.bias, Kind::kConstant, "the bias");
  a.save_stats = on.statistics(a.save_stats, Kind::kConstant);
  a.grad_means = on.memory.add(a.grad_means, 2 * problem->c * int64_t{sizeof(double)},
                               Kind::kConstant, "grad_means");
  a.running_mean = on.vector(a.running_mean, Kind::kConstant, "the running mean");
  a.running_var = on.vector(a.running_var, Kind::kConstant, "the running variance");
  a.grad_input = on.tensor(a.grad_input, Kind::kOutput, "grad_input");
  a.grad_residual = on.tensor(a.grad_residual, Kind::kOutput, "grad_residual");
  a.grad_weight = on.vector(a.grad_weight, Kind::kOutput, "grad_weight");
  a.grad_bias = on.vector(a.grad_bias, Kind::kOutput, "grad_bias");
  void* const workspace = on.memory.scratch(plan->workspace_bytes);
  return finish(on.memory, launch(*plan, *problem, a, workspace, nullptr));
}

int bnext_double_backward(const CudaPlan* plan, const Problem* problem,
                          const DoubleBackwardArgs* host) {
  emulation::clear_error();
  OnDevice on{*problem, {}};
  DoubleBackwardArgs a = *host;
  a.grad_grad_input = on.tensor(a.grad_grad_input, Kind::kInput, "grad_grad_input");
  a.grad_grad_residual = on.tensor(a.grad_grad_residual, Kind::kInput, "grad_grad_residual");
  a.grad_out = on.tensor(a.grad_out, Kind::kInput, "grad_out");
  a.input = on.tensor(a.input, Kind::kInput, "the input");
  a.mask = on.mask(a.mask, Kind::kInput);
  a.weight = on.vector(a.weight, Kind::kConstant, "the weight");
  a.bias = on.vector(a.bias, Kind::kConstant, "the bias");
  a.grad_grad_weight = on.vector(a.grad_grad_weight, Kind::kConstant, "grad_grad_weight");
  a.grad_grad_bias = on.vector(a.grad_grad_bias, Kind::kConstant, "grad_grad_bias");
  a.save_stats = on.statistics(a.save_stats, Kind::kConstant);
  a.running_mean = on.vector(a.running_mean, Kind::kConstant, "the running mean");
  a.running_var = on.vector(a.running_var, Kind::kConstant, "the running variance");
  a.grad_grad_out = on.tensor(a.grad_grad_out, Kind::kOutput, "grad_grad_out");
  a.grad_input = on.tensor(a.grad_input, Kind::kOutput, "grad_input");
  a.grad_weight = on.vector(a.grad_weight, Kind::kOutput, "grad_weight");
  void* const workspace = on.memory.scratch(plan->workspace_bytes);
  return finish(on.memory, launch(*plan, *problem, a, workspace, nullptr));
}
}
