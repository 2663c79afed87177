// The Python module rnnfast._C: what the dispatcher cannot carry. Introspection and the instruction-set switch.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "decoder.h"
#include "plain.h"
#include "sequence.h"
#ifdef RNNFAST_CUDA
#include "cuda/binding.h"
#include "cuda/plan.h"
#endif

namespace py = pybind11;

namespace rnnfast {

void bind_prepack(py::module& m);  // prepack.cpp

namespace {

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const char* const* name = supported_isas(); *name; ++name) names.emplace_back(*name);
  return names;
}

void set_isa_or_raise(const std::string& name) {
  if (set_isa(name.c_str())) return;
  std::string all;
  for (const std::string& n : isa_names()) all += (all.empty() ? "" : ", ") + n;
  throw py::value_error("instruction set: expected one this machine has (" + all + "), got '" + name + "'");
}

const CellInfo& cell_named(const std::string& name) {
  const DriverTable& table = drivers();
  for (int i = 0; i < table.num_cells; ++i)
    if (name == table.cells[i].name) return table.cells[i];
  throw py::value_error("cell: unknown name '" + name + "'");
}

// Whether CUDA runs cell i in this build.
bool is_on_cuda([[maybe_unused]] int i) {
#ifdef RNNFAST_CUDA
  return cuda_drivers().f32[i].forward != nullptr;
#else
  return false;
#endif
}

py::list cells() {
  py::list list;
  const DriverTable& table = drivers();
  for (int i = 0; i < table.num_cells; ++i) {
    const CellInfo& cell = table.cells[i];
    py::dict entry;
    entry["name"] = cell.name;
    entry["num_gates"] = cell.gates;
    entry["num_states"] = cell.has_cell ? 2 : 1;
    entry["num_slots"] = cell.slots;
    entry["saves_hidden"] = cell.saves_hidden;
    entry["num_late_gates"] = cell.late_gates;
    entry["num_peepholes"] = cell.peepholes;
    entry["num_norm_vectors"] = cell.norm_vectors;
    entry["on_cuda"] = is_on_cuda(i);
    entry["source"] = cell.source;
    list.append(entry);
  }
  return list;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#else
  info["compiler"] = std::string("gcc ") + __VERSION__;
#endif
#ifdef RNNFAST_CUDA
  info["cuda"] = true;
  info["cuda_reason"] = "torch has CUDA and nvcc was found; for compute capabilities " RNNFAST_CUDA;
#else
  info["cuda"] = false;
  info["cuda_reason"] = RNNFAST_NO_CUDA;
#endif
  return info;
}

#ifdef RNNFAST_CUDA
// What make_device_plan decides for forward and, with `training`, backward.
void explain_cuda(py::dict d, const CellInfo& cell, const Sizes& size, at::ScalarType element, bool training,
                  int index) {
  if (!is_on_cuda(static_cast<int>(&cell - drivers().cells)))
    throw py::value_error(std::string("cell: expected one with kernels for CUDA, got '") + cell.name + "'");
  const Device device = describe_device(index, element);
  const auto add = [&](const std::string& prefix, bool backward) {
    const int bytes = static_cast<int>(c10::elementSize(element));
    const DevicePlan plan = make_device_plan({size, cell.gates, cell.slots, cell.has_resident, size.P != size.H,
                                              backward, bytes, std::max(bytes, 4), device.capability,
                                              device.multiprocessors, device.block_memory, device.tf32, true});
    const auto set = [&](const char* name, auto value) { d[py::str(prefix + name)] = value; };
    set("kernel", plan.streamed ? "streamed" : plan.resident ? "resident" : "per_step");
    set("reason", plan.reason);
    if (!plan.resident) return;
    set("tensor_cores", plan.tensor_cores);
    set("blocks", plan.blocks), set("groups", plan.groups);
    set("units", plan.units), set("sequences", plan.sequences), set("shared_bytes", plan.shared_bytes);
  };
  d["isa"] = cuda_drivers().isa;
  d["capability"] = device.capability;
  d["tf32"] = device.tf32;
  add("", false);
  if (training) add("backward_", true);
}
#endif

// What make_plan decides for such a call, as data; for a CUDA device, by its number, what make_device_plan does.
py::dict explain(const std::string& name, int64_t T, int64_t N, int64_t I, int64_t H, int64_t P,
                 const std::string& dtype, bool training, int threads, std::optional<int> device, bool recompute,
                 bool prepacked) {
  const CellInfo& cell = cell_named(name);
  const auto check = [](const char* argument, int64_t value, int64_t least) {
    if (value < least)
      throw py::value_error(std::string(argument) + ": expected at least " + std::to_string(least) + ", got " +
                            std::to_string(value));
  };
  check("T", T, 1), check("N", N, 0), check("I", I, 0), check("H", H, 1), check("P", P, 1),
      check("threads", threads, 1);
  if (dtype != "float32" && dtype != "float64" && dtype != "bfloat16" && dtype != "float16")
    throw py::value_error("dtype: expected float32, float64, bfloat16 or float16, got '" + dtype + "'");
  const Sizes size{T, N, I, H, P, T * N};
  const bool is_double = dtype == "float64";
  const int64_t saved = !training ? 0 : cell.slots + cell.has_cell + cell.saves_hidden;
  py::dict d;
  d["cell"] = cell.name;
  d["dtype"] = dtype;
  d["accumulate_dtype"] = is_double ? "float64" : "float32";
  d["saved_bytes_per_step_unit"] = saved * (is_double ? 8 : 4);
  if (device) {
#ifdef RNNFAST_CUDA
    const at::ScalarType element = is_double             ? at::kDouble
                                   : dtype == "bfloat16" ? at::kBFloat16
                                   : dtype == "float16"  ? at::kHalf
                                                         : at::kFloat;
    explain_cuda(d, cell, size, element, training, *device);
    return d;
#else
    throw py::value_error("device: expected None, for this build has no CUDA kernels: " RNNFAST_NO_CUDA);
#endif
  }
  const DriverTable& table = drivers();
  const bool narrows = dtype == "bfloat16" && !recompute && table.bf16[&cell - table.cells].forward;
  const Plan plan = make_plan(size, cell, narrows ? 2 : is_double ? 8 : 4, threads, false, prepacked);
  d["isa"] = table.isa;
  d["product_dtype"] = narrows ? d["dtype"] : d["accumulate_dtype"];
  d["packed_weights"] = plan.packed;
  d["prepacked"] = prepacked;
  d["chunk_steps"] = plan.chunk_steps;
  switch (plan.schedule) {
    case Schedule::kOneThread:
      d["kernel"] = "one_thread";
      d["threads"] = 1;
      d["reason"] = threads == 1        ? "torch is set to one thread"
                    : plan.threads == 1 ? "the call is too short to repay waking other threads"
                                        : "one sequence, and its steps are too short for threads to meet after each";
      break;
    case Schedule::kBatch:
      d["kernel"] = "batch_split";
      d["threads"] = static_cast<int64_t>(plan.threads) < N ? static_cast<int64_t>(plan.threads) : N;
      d["reason"] = "each thread takes a part of the batch through all steps, with no meeting between steps";
      break;
    case Schedule::kUnits:
      d["kernel"] = "unit_split";
      d["threads"] = plan.threads;
      d["reason"] = "few sequences and long steps: each thread takes a part of the hidden units, meeting each step";
      break;
  }
  return d;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  if (const char* name = std::getenv("RNNFAST_ISA")) {
    try {
      set_isa_or_raise(name);
    } catch (const py::value_error& error) {
      throw py::value_error(std::string("RNNFAST_ISA: ") + error.what());
    }
  }
  m.def("cells", &cells);
  m.def("build_info", &build_info);
  m.def("supported_isas", &isa_names);
  m.def("get_isa", [] { return drivers().isa; });
  m.def("set_isa", &set_isa_or_raise, py::arg("name"));
  m.def(
      "_add_drivers", [](uintptr_t table) { add_drivers(reinterpret_cast<const DriverTable*>(table)); },
      py::arg("table"));
  m.def("explain", &explain, py::arg("cell"), py::arg("T"), py::arg("N"), py::arg("I"), py::arg("H"), py::arg("P"),
        py::arg("dtype"), py::arg("training"), py::arg("threads"), py::arg("device") = py::none(),
        py::arg("recompute") = false, py::arg("prepacked") = false);
  bind_decoder(m);
  bind_plain_calls(m);
  bind_prepack(m);
}

}  // namespace rnnfast
