// The pybind11 module bnext._C: what was built, what this machine has, and the plan, for
// introspection and tests. Loading it registers the ops. Includes no torch.
#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/cpu_info.h"
#include "cpu/probe.h"
#include "cuda/device_info.h"
#include "cuda/plan.h"

namespace py = pybind11;

namespace bnext {
namespace {

// `residual`: the forward adds one; `save_mask`: it also saves a mask, because a backward follows.
Problem make_problem(int64_t n, int64_t c, int64_t hw, bool channels_last, const std::string& dtype,
                     const std::string& stage, const std::string& act, bool residual,
                     bool need_input, bool need_params, bool save_mask, bool need_residual) {
  if (n < 1 || c < 1 || hw < 1) throw py::value_error("n, c, hw: expected at least 1");
  const Stage parsed = parse("stage", stage, Stage::kTrainForward, Stage::kDoubleBackward);
  const DType parsed_dtype = parse("dtype", dtype, DType::kFloat32, DType::kFloat16);
  const Act parsed_act = parse("act", act, Act::kNone, kLastAct);
  const Needs needs = traits(parsed_act).needs;
  const bool backward = is_backward(parsed);
  return canonical({parsed, n, c, hw, channels_last, parsed_dtype, parsed_act,
                    residual && (!backward || needs == Needs::kSum),
                    needs == Needs::kSign && residual && (save_mask || backward),
                    need_input || !backward, need_params || !backward,
                    residual && need_residual && backward});
}

CpuPlan plan(int64_t n, int64_t c, int64_t hw, bool channels_last, const std::string& dtype,
             const std::string& stage, const std::string& act, bool residual, const CpuInfo& device,
             bool need_input, bool need_params, bool save_mask, bool need_residual) {
  return plan_cpu(make_problem(n, c, hw, channels_last, dtype, stage, act, residual, need_input,
                               need_params, save_mask, need_residual),
                  device);
}

CudaPlan plan_on_cuda(int64_t n, int64_t c, int64_t hw, bool channels_last,
                      const std::string& dtype, const std::string& stage, const std::string& act,
                      bool residual, const CudaInfo& device, bool need_input, bool need_params,
                      bool save_mask, int alignment, bool need_residual) {
  Problem problem = make_problem(n, c, hw, channels_last, dtype, stage, act, residual, need_input,
                                 need_params, save_mask, need_residual);
  problem.alignment = alignment;
  return plan_cuda(problem, device, cuda_choice_of_environment());
}

CudaInfo make_cuda_info(int capability, int sms, int64_t shared_bytes_per_sm,
                        int64_t shared_bytes_per_block, int64_t l2_bytes, int max_cluster_blocks) {
  if (sms < 1 || shared_bytes_per_block < 48 * 1024 ||
      shared_bytes_per_sm < shared_bytes_per_block || l2_bytes < 0 || max_cluster_blocks < 1)
    throw py::value_error(
        "CudaInfo: expected at least 1 SM, 48 KiB of shared memory a block, no less an SM, and "
        "clusters of at least 1 block");
  return {capability,        sms, shared_bytes_per_sm, shared_bytes_per_block, l2_bytes,
          max_cluster_blocks};
}

CudaInfo cuda_device_info([[maybe_unused]] int device) {
#ifdef BNEXT_WITH_CUDA
  CudaInfo info;
  if (const int error = query_cuda_info(device, info))
    throw std::runtime_error("GPU " + std::to_string(device) +
                             " cannot be asked: " + cuda_error_string(error));
  return info;
#else
  throw std::runtime_error("bnext was built without CUDA: " BNEXT_CUDA_MISSING);
#endif
}

template <class Plan>
void def_plan(py::module_& m, const char* name) {
  py::class_<Plan> plan(m, name);
  Plan::fields([&](const char* field, auto member) {
    plan.def_property_readonly(field, [member](const Plan& p) {
      if constexpr (std::is_enum_v<std::decay_t<decltype(p.*member)>>)
        return to_string(p.*member);
      else
        return p.*member;
    });
  });
  plan.def(py::self == py::self).def("__repr__", [name](const Plan& p) {
    return to_string(name, p);
  });
}

// {name: (kind, what backward needs)}
py::dict activations() {
  py::dict all;
  for (int64_t kind = 0; kind < std::ssize(kActs); ++kind)
    all[kActs[kind].name] = py::make_tuple(kind, to_string(kActs[kind].needs));
  return all;
}

py::dict build_info() {
  py::dict info;
  info["version"] = BNEXT_VERSION;
  info["compiler"] = BNEXT_COMPILER;
  info["torch_build"] = BNEXT_TORCH_BUILD;
  info["cpu_isas"] = BNEXT_CPU_ISAS;
  info["cuda"] = BNEXT_NVCC[0] != '\0';
  info["nvcc"] = BNEXT_NVCC;
  info["cuda_archs"] = BNEXT_CUDA_ARCHS;
  info["cuda_missing"] = BNEXT_CUDA_MISSING;
  return info;
}

}  // namespace
}  // namespace bnext

PYBIND11_MODULE(_C, m) {
  using namespace bnext;
  m.doc() = "bnext's compiled part; its ops are torch.ops.bnext";
  m.def("activations", &activations);
  m.def("build_info", &build_info);
  m.def("cpu_device_info", &cpu_info, py::arg("threads"));
  m.def("cuda_device_info", &cuda_device_info, py::arg("device"));
  m.def("plan", &plan, py::arg("n"), py::arg("c"), py::arg("hw"), py::arg("channels_last"),
        py::arg("dtype"), py::arg("stage"), py::arg("act"), py::arg("residual"), py::arg("device"),
        py::arg("need_input") = true, py::arg("need_params") = true, py::arg("save_mask") = true,
        py::arg("need_residual") = true);

  // For tests of the CPU's sums.
  m.def("slow_channels", [] { return sums_probe.slow_channels.load(); });
  m.def(
      "set_pilots", [](std::vector<double> pilots) { sums_probe.pilots = std::move(pilots); },
      py::arg("pilots"));

  py::class_<CpuInfo>(m, "DeviceInfo")
      .def(py::init([](const std::string& isa, int threads, int64_t l1, int64_t l2, int64_t l3) {
             return CpuInfo{parse("isa", isa, Isa::kDefault, Isa::kAvx512), threads, l1, l2, l3};
           }),
           py::arg("isa"), py::arg("threads"), py::arg("l1_bytes"), py::arg("l2_bytes"),
           py::arg("l3_bytes"))
      .def_property_readonly("isa", [](const CpuInfo& i) { return to_string(i.isa); })
      .def_readonly("threads", &CpuInfo::threads)
      .def_readonly("l1_bytes", &CpuInfo::l1_bytes)
      .def_readonly("l2_bytes", &CpuInfo::l2_bytes)
      .def_readonly("l3_bytes", &CpuInfo::l3_bytes);

  def_plan<CpuPlan>(m, "Plan");

  m.def("plan_cuda", &plan_on_cuda, py::arg("n"), py::arg("c"), py::arg("hw"),
        py::arg("channels_last"), py::arg("dtype"), py::arg("stage"), py::arg("act"),
        py::arg("residual"), py::arg("device"), py::arg("need_input") = true,
        py::arg("need_params") = true, py::arg("save_mask") = true, py::arg("alignment") = 16,
        py::arg("need_residual") = true);

  py::class_<CudaInfo>(m, "CudaInfo")
      .def(py::init(&make_cuda_info), py::arg("capability"), py::arg("sms"),
           py::arg("shared_bytes_per_sm"), py::arg("shared_bytes_per_block"), py::arg("l2_bytes"),
           py::arg("max_cluster_blocks"))
      .def_readonly("capability", &CudaInfo::capability)
      .def_readonly("sms", &CudaInfo::sms)
      .def_readonly("shared_bytes_per_sm", &CudaInfo::shared_bytes_per_sm)
      .def_readonly("shared_bytes_per_block", &CudaInfo::shared_bytes_per_block)
      .def_readonly("l2_bytes", &CudaInfo::l2_bytes)
      .def_readonly("max_cluster_blocks", &CudaInfo::max_cluster_blocks)
      .def(py::self == py::self);

  def_plan<CudaPlan>(m, "CudaPlan");
}
