// The pybind11 module bnext._C: what was built, what this machine has, and the plan, for
// introspection and tests. Loading it registers the ops. Includes no torch beyond its version.
#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/cpu_info.h"
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

CpuPlan plan(int64_t n, int64_t c, int64_t hw, bool channels_last, const std::string& dtype,
             const std::string& stage, bool relu, bool residual, const CpuInfo& device) {
  if (n < 1 || c < 1 || hw < 1) throw py::value_error("n, c, hw: expected at least 1");
  return plan_cpu(
      canonical({parse_stage(stage), n, c, hw, channels_last, parse_dtype(dtype), relu, residual}),
      device);
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
  m.def("plan", &plan, py::arg("n"), py::arg("c"), py::arg("hw"), py::arg("channels_last"),
        py::arg("dtype"), py::arg("stage"), py::arg("relu"), py::arg("residual"),
        py::arg("device"));

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
}
