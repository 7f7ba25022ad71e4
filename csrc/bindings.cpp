// The pybind11 module bnext._C: what was built, what this machine has, and the plan, for
// introspection and tests. Loading it registers the ops. Includes no torch beyond its version.
#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/cpu_info.h"
#include "cuda/launch.h"
#include "plan.h"

namespace py = pybind11;

namespace bnext {
namespace {

template <class E>
E parse(const char* what, const std::string& name,
        std::initializer_list<std::pair<const char*, E>> values) {
  std::string expected;
  for (const auto& [text, value] : values) {
    if (name == text) return value;
    expected += std::string(expected.empty() ? "" : ", ") + text;
  }
  throw py::value_error(std::string(what) + ": expected one of " + expected + ", got " + name);
}

DType parse_dtype(const std::string& name) {
  return parse<DType>("dtype", name,
                      {{"float32", DType::kFloat32},
                       {"float64", DType::kFloat64},
                       {"bfloat16", DType::kBFloat16},
                       {"float16", DType::kFloat16}});
}

Stage parse_stage(const std::string& name) {
  return parse<Stage>("stage", name,
                      {{"train_forward", Stage::kTrainForward},
                       {"eval_forward", Stage::kEvalForward},
                       {"train_backward", Stage::kTrainBackward},
                       {"eval_backward", Stage::kEvalBackward}});
}

Isa parse_isa(const std::string& name) {
  return parse<Isa>("isa", name,
                    {{"default", Isa::kDefault}, {"avx2", Isa::kAvx2}, {"avx512", Isa::kAvx512}});
}

// `residual`: the forward adds one, and saves a mask unless no backward is to come.
Problem make_problem(int64_t n, int64_t c, int64_t hw, bool channels_last, const std::string& dtype,
                     const std::string& stage, bool relu, bool residual, bool need_input,
                     bool need_params, bool save_mask, bool need_residual) {
  if (n < 1 || c < 1 || hw < 1) throw py::value_error("n, c, hw: expected at least 1");
  const Stage parsed = parse_stage(stage);
  const bool backward = is_backward(parsed);
  return canonical({parsed, n, c, hw, channels_last, parse_dtype(dtype), relu,
                    residual && (need_residual || !backward),
                    relu && residual && (save_mask || backward), need_input || !backward,
                    need_params || !backward});
}

CpuPlan plan(int64_t n, int64_t c, int64_t hw, bool channels_last, const std::string& dtype,
             const std::string& stage, bool relu, bool residual, const CpuInfo& device,
             bool need_input, bool need_params, bool save_mask, bool need_residual) {
  return plan_cpu(make_problem(n, c, hw, channels_last, dtype, stage, relu, residual, need_input,
                               need_params, save_mask, need_residual),
                  device);
}

CudaPlan plan_on_cuda(int64_t n, int64_t c, int64_t hw, bool channels_last,
                      const std::string& dtype, const std::string& stage, bool relu, bool residual,
                      const CudaInfo& device, bool need_input, bool need_params, bool save_mask,
                      int alignment, bool need_residual) {
  Problem problem = make_problem(n, c, hw, channels_last, dtype, stage, relu, residual, need_input,
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
  m.def("build_info", &build_info);
  m.def("cpu_device_info", &cpu_info, py::arg("threads"));
  m.def("cuda_device_info", &cuda_device_info, py::arg("device"));
  m.def("plan", &plan, py::arg("n"), py::arg("c"), py::arg("hw"), py::arg("channels_last"),
        py::arg("dtype"), py::arg("stage"), py::arg("relu"), py::arg("residual"), py::arg("device"),
        py::arg("need_input") = true, py::arg("need_params") = true, py::arg("save_mask") = true,
        py::arg("need_residual") = true);

  py::class_<CpuInfo>(m, "DeviceInfo")
      .def(py::init([](const std::string& isa, int threads, int64_t l1, int64_t l2, int64_t l3) {
             return CpuInfo{parse_isa(isa), threads, l1, l2, l3};
           }),
           py::arg("isa"), py::arg("threads"), py::arg("l1_bytes"), py::arg("l2_bytes"),
           py::arg("l3_bytes"))
      .def_property_readonly("isa", [](const CpuInfo& i) { return to_string(i.isa); })
      .def_readonly("threads", &CpuInfo::threads)
      .def_readonly("l1_bytes", &CpuInfo::l1_bytes)
      .def_readonly("l2_bytes", &CpuInfo::l2_bytes)
      .def_readonly("l3_bytes", &CpuInfo::l3_bytes);

  py::class_<CpuPlan>(m, "Plan")
      .def_property_readonly("isa", [](const CpuPlan& p) { return to_string(p.isa); })
      .def_property_readonly("family", [](const CpuPlan& p) { return to_string(p.family); })
      .def_property_readonly("index_map", [](const CpuPlan& p) { return to_string(p.map); })
      .def_readonly("lanes", &CpuPlan::lanes)
      .def_readonly("lanes_per_channel", &CpuPlan::lanes_per_channel)
      .def_readonly("rows", &CpuPlan::rows)
      .def_readonly("row_stride", &CpuPlan::row_stride)
      .def_readonly("width", &CpuPlan::width)
      .def_readonly("segments", &CpuPlan::segments)
      .def_readonly("segment_width", &CpuPlan::segment_width)
      .def_readonly("chunk_rows", &CpuPlan::chunk_rows)
      .def_readonly("chunks", &CpuPlan::chunks)
      .def_readonly("slices", &CpuPlan::slices)
      .def_readonly("block", &CpuPlan::block)
      .def_readonly("tasks", &CpuPlan::tasks)
      .def_readonly("grain", &CpuPlan::grain)
      .def_readonly("nontemporal_stores", &CpuPlan::nontemporal_stores)
      .def_readonly("bytes_moved", &CpuPlan::bytes_moved)
      .def_readonly("bytes_floor", &CpuPlan::bytes_floor)
      .def(py::self == py::self)
      .def("__repr__", [](const CpuPlan& p) { return to_string(p); });

  m.def("plan_cuda", &plan_on_cuda, py::arg("n"), py::arg("c"), py::arg("hw"),
        py::arg("channels_last"), py::arg("dtype"), py::arg("stage"), py::arg("relu"),
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

  py::class_<CudaPlan>(m, "CudaPlan")
      .def_property_readonly("family", [](const CudaPlan& p) { return to_string(p.family); })
      .def_property_readonly("index_map", [](const CudaPlan& p) { return to_string(p.map); })
      .def_property_readonly("team", [](const CudaPlan& p) { return to_string(p.team); })
      .def_readonly("vector", &CudaPlan::vector)
      .def_readonly("threads", &CudaPlan::threads)
      .def_readonly("lanes_per_channel", &CudaPlan::lanes_per_channel)
      .def_readonly("rows", &CudaPlan::rows)
      .def_readonly("segments", &CudaPlan::segments)
      .def_readonly("segment_width", &CudaPlan::segment_width)
      .def_readonly("group", &CudaPlan::group)
      .def_readonly("groups", &CudaPlan::groups)
      .def_readonly("columns", &CudaPlan::columns)
      .def_readonly("team_blocks", &CudaPlan::team_blocks)
      .def_readonly("teams", &CudaPlan::teams)
      .def_readonly("rows_per_block", &CudaPlan::rows_per_block)
      .def_readonly("items_per_thread", &CudaPlan::items_per_thread)
      .def_readonly("groups_per_launch", &CudaPlan::groups_per_launch)
      .def_readonly("launches", &CudaPlan::launches)
      .def_readonly("shared_bytes", &CudaPlan::shared_bytes)
      .def_readonly("workspace_bytes", &CudaPlan::workspace_bytes)
      .def_readonly("bytes_moved", &CudaPlan::bytes_moved)
      .def_readonly("bytes_floor", &CudaPlan::bytes_floor)
      .def(py::self == py::self)
      .def("__repr__", [](const CudaPlan& p) { return to_string(p); });
}
