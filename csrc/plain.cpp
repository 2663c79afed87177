#include "plain.h"

#include <strings.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <optional>
#include <vector>

#include "call.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

// A call that turns out not to be plain.
struct NotPlain {};

void require(bool condition) {
  if (!condition) throw NotPlain();
}

// What the function gives, or None.
template <auto function, typename... Arguments>
py::object if_plain(Arguments... arguments) {
  try {
    return function(arguments...);
  } catch (const NotPlain&) {
    PyErr_Clear();
  } catch (const c10::Error&) {  // the long way says it better
  }
  return py::none();
}

// A tensor of torch's own classes: another class may have a say in what a function of it is.
Tensor tensor_of(PyObject* object) {
  require(object && THPVariable_CheckTypeExact(Py_TYPE(object)));
  return THPVariable_Unpack(object);
}

PyObject* interned(const char* text) {
  PyObject* name = PyUnicode_InternFromString(text);
  if (!name) throw py::error_already_set();
  return name;
}

struct Names {
  PyObject *parameters = interned("_parameters"), *all_weights = interned("_all_weights"),
           *input_size = interned("input_size"), *hidden_size = interned("hidden_size"),
           *proj_size = interned("proj_size"), *bias = interned("bias"), *batch_first = interned("batch_first"),
           *bidirectional = interned("bidirectional"), *dropout = interned("dropout"), *training = interned("training"),
           *mode = interned("mode"), *variant = interned("_variant"), *zoneout = interned("zoneout"),
           *recurrent_dropout = interned("recurrent_dropout"), *recompute = interned("recompute"),
           *weight_ih = interned("weight_ih"), *weight_hh = interned("weight_hh"), *bias_ih = interned("bias_ih"),
           *bias_hh = interned("bias_hh");
};
const Names& names() {
  static const Names all;
  return all;
}

// The attributes of a module that are set on the object. One that is of another type than usual, or set elsewhere, is
// not plain.
struct Attributes {
  const py::dict dict;

  PyObject* get(PyObject* name) const {
    PyObject* value = PyDict_GetItemWithError(dict.ptr(), name);
    require(value);
    return value;
  }
  bool is_true(PyObject* name) const {
    PyObject* value = get(name);
    require(PyBool_Check(value));
    return value == Py_True;
  }
  int64_t integer(PyObject* name) const {
    PyObject* value = get(name);
    require(PyLong_CheckExact(value));
    return PyLong_AsLongLong(value);
  }
  // Of the options that are set on the object only where they are not those of its class.
  py::object option(const py::handle& module, PyObject* name) const {
    if (PyObject* own = PyDict_GetItemWithError(dict.ptr(), name)) return py::reinterpret_borrow<py::object>(own);
    PyObject* of_class = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())), name);
    require(of_class);
    return py::reinterpret_steal<py::object>(of_class);
  }
  Tensor parameter(PyObject* name) const {
    PyObject* parameters = get(names().parameters);
    require(PyDict_CheckExact(parameters));
    return tensor_of(PyDict_GetItemWithError(parameters, name));
  }
};

// A parameter or a state has to be like the input; what is not is refused the long way.
Tensor like(const Tensor& x, Tensor t) {
  require(t.scalar_type() == x.scalar_type() && t.device() == x.device() && !t.is_meta());
  return t;
}

// Whether anything but the tensors decides what the call of a function is: a mode, autocast, or a transform of
// torch.func.
bool is_watched(const Tensor& x) {
  return at::autocast::is_autocast_enabled(x.device().type()) || at::impl::torch_function_mode_enabled() ||
         c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(at::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
using Weights = std::array<MaybeTensor, 5>;

Outputs call(int64_t cell, const Tensor& input, const MaybeTensor& h0, const MaybeTensor& c0, const Weights& w,
             bool reverse) {
  return call_cell(cell, input, h0, c0, *w[0], *w[1], w[2], w[3], w[4], std::nullopt, std::nullopt, std::nullopt,
                   reverse, std::nullopt, std::nullopt, std::nullopt, std::nullopt, std::nullopt, false);
}

struct LayerResult {
  Tensor output, h_n, c_n;
};

// The layers and directions of a module; of padded input [T, N, I]. Weights have G * H rows.
LayerResult run_directions(int64_t cell, Tensor steps, const MaybeTensor& h0, const MaybeTensor& c0,
                           const std::vector<Weights>& weights, size_t directions, bool has_cell) {
  std::vector<Tensor> h_n, c_n;
  const auto state = [](const MaybeTensor& states, size_t d) {
    return states ? MaybeTensor(states->select(0, static_cast<int64_t>(d))) : std::nullopt;
  };
  for (size_t first = 0; first < weights.size(); first += directions) {
    std::vector<Tensor> outputs;
    for (size_t d = first; d < first + directions; ++d) {
      auto [output, h, c] = call(cell, steps, state(h0, d), state(c0, d), weights[d], d > first);
      outputs.push_back(std::move(output));
      h_n.push_back(std::move(h));
      c_n.push_back(std::move(c));
    }
    steps = directions == 1 ? outputs[0] : at::cat(outputs, -1);
  }
  const auto all = [](const std::vector<Tensor>& states) {
    if (states.size() > 1) return at::stack(states);
    if (states[0].requires_grad()) return states[0].unsqueeze(0);
    at::AutoDispatchBelowADInplaceOrView below;  // a view of what nobody else has needs no record of it
    return states[0].unsqueeze(0);
  };
  return {steps, all(h_n), has_cell ? all(c_n) : Tensor()};
}

// The number of a layer's cell; of its kinds those that torch.nn's arguments are enough for.
int64_t plain_cell(const Attributes& attributes, const py::handle& layer) {
  const Names& name = names();
  for (PyObject* option : {name.zoneout, name.recurrent_dropout, name.recompute})
    require(PyObject_IsTrue(attributes.option(layer, option).ptr()) == 0);
  const py::object variant = attributes.option(layer, name.variant);
  PyObject* which = variant.is_none() ? attributes.get(name.mode) : variant.ptr();
  require(PyUnicode_Check(which));
  const char* text = PyUnicode_AsUTF8(which);
  require(text);
  const DriverTable& table = drivers();
  int64_t cell = 0;
  while (cell < table.num_cells && strcasecmp(text, table.cells[cell].name) != 0) ++cell;  // a mode is in capitals
  require(cell < table.num_cells && table.cells[cell].peepholes == 0 && table.cells[cell].norm_vectors == 0);
  return cell;
}

// A layer's forward from its attributes; None where the call is not plain or would fail, and nothing is done then.
py::object run_layer(const py::handle& module, const py::handle& input, const py::handle& hx) {
  const Names& name = names();
  const Tensor x = tensor_of(input.ptr());
  require(!is_watched(x));
  const Attributes layer{py::reinterpret_steal<py::dict>(PyObject_GenericGetDict(module.ptr(), nullptr))};
  require(layer.dict && PyDict_CheckExact(layer.dict.ptr()));
  const int64_t cell = plain_cell(layer, module);
  const CellInfo& info = drivers().cells[cell];
  const bool batch_first = layer.is_true(name.batch_first), has_bias = layer.is_true(name.bias);
  const int64_t hidden_size = layer.integer(name.hidden_size), proj_size = layer.integer(name.proj_size);
  const size_t directions = layer.is_true(name.bidirectional) ? 2 : 1;
  require(x.dim() == 3 && x.size(batch_first ? 1 : 0) > 0 && x.size(2) == layer.integer(name.input_size));

  const py::handle all_names = layer.get(name.all_weights);
  require(PyList_CheckExact(all_names.ptr()) && py::len(all_names) % directions == 0 && py::len(all_names) > 0);
  std::vector<Weights> weights;
  for (const py::handle of_direction : py::reinterpret_borrow<py::list>(all_names)) {
    const size_t count = (has_bias ? 4 : 2) + (proj_size > 0 ? 1 : 0);
    require(PyList_CheckExact(of_direction.ptr()) && py::len(of_direction) == count);
    Weights& five = weights.emplace_back();
    size_t at = 0;
    for (const py::handle weight : py::reinterpret_borrow<py::list>(of_direction)) {
      five[at == 2 && !has_bias ? 4 : at] = like(x, layer.parameter(weight.ptr()));
      ++at;
    }
    require(five[1]->dim() == 2 && five[1]->size(0) == info.gates * hidden_size);
  }
  if (weights.size() > directions && layer.is_true(name.training)) {
    PyObject* dropout = layer.get(name.dropout);
    require(PyFloat_CheckExact(dropout) && PyFloat_AS_DOUBLE(dropout) == 0);
  }

  MaybeTensor h0, c0;
  const auto state_of = [&](PyObject* object) {
    const Tensor state = like(x, tensor_of(object));
    require(state.dim() == 3 && state.size(0) == static_cast<int64_t>(weights.size()));
    return state;
  };
  if (info.has_cell && !hx.is_none()) {
    require(PyTuple_CheckExact(hx.ptr()) && PyTuple_GET_SIZE(hx.ptr()) == 2);
    h0 = state_of(PyTuple_GET_ITEM(hx.ptr(), 0)), c0 = state_of(PyTuple_GET_ITEM(hx.ptr(), 1));
  } else if (!hx.is_none()) {
    h0 = state_of(hx.ptr());
  }

  LayerResult result;
  {
    const py::gil_scoped_release unlocked;
    result = run_directions(cell, batch_first ? x.transpose(0, 1) : x, h0, c0, weights, directions, info.has_cell);
    if (batch_first) result.output = result.output.transpose(0, 1);
  }
  if (!info.has_cell) return py::make_tuple(result.output, result.h_n);
  return py::make_tuple(result.output, py::make_tuple(result.h_n, result.c_n));
}

// A cell's forward, the same way: its new states.
py::object run_cell(int64_t cell, const py::dict& attributes, const py::handle& input, const py::handle& h,
                    const py::handle& c) {
  const Names& name = names();
  const Attributes module{attributes};
  const Tensor x = tensor_of(input.ptr());
  require(!is_watched(x));
  require(x.dim() == 2 && x.size(1) == module.integer(name.input_size));
  const auto parameter = [&](PyObject* of) { return like(x, module.parameter(of)); };
  Weights weights{parameter(name.weight_ih), parameter(name.weight_hh)};
  if (module.is_true(name.bias)) {
    weights[2] = parameter(name.bias_ih);
    weights[3] = parameter(name.bias_hh);
  }
  require(weights[1]->dim() == 2 && weights[1]->size(1) == module.integer(name.hidden_size));
  const auto state_of = [&](const py::handle& state) {
    return state.is_none() ? std::nullopt : MaybeTensor(like(x, tensor_of(state.ptr())));
  };
  const MaybeTensor h0 = state_of(h), c0 = state_of(c);
  Outputs result;
  {
    const py::gil_scoped_release unlocked;
    result = call(cell, x, h0, c0, weights, false);
  }
  return py::make_tuple(std::get<1>(result), std::get<2>(result));
}

}  // namespace

void bind_plain_calls(py::module& m) {
  m.def("run_layer", &if_plain<run_layer, py::handle, py::handle, py::handle>, py::arg("layer"), py::arg("input"),
        py::arg("hx"));
  m.def("run_cell", &if_plain<run_cell, int64_t, py::dict, py::handle, py::handle, py::handle>, py::arg("cell"),
        py::arg("attributes"), py::arg("input"), py::arg("h"), py::arg("c"));
}

}  // namespace rnnfast
