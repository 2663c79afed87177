// The operators torch.ops.rnnfast.*: schemas, autograd and the dispatcher.
//
// For each cell four operators share one schema of inputs: `<cell>` (differentiable), `_<cell>_forward` (also returns
// what backward needs), `_<cell>_backward` and `_<cell>_backward_factors` (per-sample gradients are made from these;
// not for cells with late gates, peepholes or norms, whose gradients are not such products).
// One call is one layer in one direction over all steps. A cell with c has the first two once more, `<cell>_all_c` and
// `_<cell>_all_c_forward`, which also return c of all steps. Checks are in checks.cpp, allocation in call.cpp, that of
// stacked weights in members.cpp. Fake kernels, the double backward and torch.func's transforms are registered from
// Python (registrations.py).
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"
#include "members.h"

namespace rnnfast {
namespace {

using torch::autograd::variable_list;

constexpr const char* kSchemaArguments =
    "Tensor input, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    "Tensor? weight_hr, Tensor? batch_sizes=None, Tensor? lengths=None, Tensor? resets=None, bool reverse=False, "
    "Tensor? weight_ch=None, Tensor? recurrent_mask=None, Tensor? zoneout_h=None, Tensor? zoneout_c=None, "
    "Tensor? weight_ln=None, bool recompute=False";

bool has_factors(const CellInfo& cell) {
  return cell.late_gates == 0 && cell.peepholes == 0 && cell.norm_vectors == 0;
}

// ---- dispatcher ----

using ForwardOp = SavingOutputs(RNNFAST_ARGUMENTS);
#define RNNFAST_BACKWARD_ARGUMENTS                                                                             \
  const MaybeTensor &grad_output, const MaybeTensor &grad_h_n, const MaybeTensor &grad_c_n, RNNFAST_ARGUMENTS, \
      const Tensor &gates, const Tensor &cells, const Tensor &hidden, std::array<bool, kNumGradients> needs,   \
      const MaybeTensor &grad_all_c
#define RNNFAST_BACKWARD_PASS grad_output, grad_h_n, grad_c_n, RNNFAST_PASS, gates, cells, hidden, needs, grad_all_c
using BackwardOp = Gradients(RNNFAST_BACKWARD_ARGUMENTS);
using CellOp = Outputs(RNNFAST_ARGUMENTS);
using ForwardAllCOp = SavingOutputsAllC(RNNFAST_ARGUMENTS);
using CellAllCOp = OutputsAllC(RNNFAST_ARGUMENTS);

// The operators of one cell, looked up once.
struct Operators {
  c10::TypedOperatorHandle<CellOp> cell;
  c10::TypedOperatorHandle<ForwardOp> forward;
  c10::TypedOperatorHandle<BackwardOp> backward;
  std::optional<c10::TypedOperatorHandle<CellAllCOp>> cell_all_c;  // these two: of a cell with c
  std::optional<c10::TypedOperatorHandle<ForwardAllCOp>> forward_all_c;

  static const Operators& of(int64_t index) {
    static const std::vector<Operators> all = [] {
      std::vector<Operators> list;
      const DriverTable& table = drivers();
      for (int i = 0; i < table.num_cells; ++i) {
        const std::string name = table.cells[i].name;
        const auto find = [](const std::string& op) {
          return c10::Dispatcher::singleton().findSchemaOrThrow(("rnnfast::" + op).c_str(), "");
        };
        list.push_back({find(name).typed<CellOp>(), find("_" + name + "_forward").typed<ForwardOp>(),
                        find("_" + name + "_backward").typed<BackwardOp>(), std::nullopt, std::nullopt});
        if (!table.cells[i].has_cell) continue;
        list.back().cell_all_c = find(name + "_all_c").typed<CellAllCOp>();
        list.back().forward_all_c = find("_" + name + "_all_c_forward").typed<ForwardAllCOp>();
      }
      return list;
    }();
    return all[index];
  }
};

class Autograd : public torch::autograd::Function<Autograd> {
 public:
  static variable_list forward(torch::autograd::AutogradContext* ctx, int64_t index, bool with_all_c,
                               RNNFAST_ARGUMENTS) {
    const auto [output, h_n, c_n, gates, cells, hidden, all_c] = [&]() -> SavingOutputsAllC {
      at::AutoDispatchBelowADInplaceOrView below;
      const Operators& operators = Operators::of(index);
      if (with_all_c) return operators.forward_all_c->call(RNNFAST_PASS);
      return std::tuple_cat(operators.forward.call(RNNFAST_PASS), std::tuple<Tensor>());
    }();
    const auto maybe = [](const MaybeTensor& t) { return has(t) ? *t : Tensor(); };
    ctx->save_for_backward({input, maybe(h0), maybe(c0), weight_ih, weight_hh, maybe(bias_ih), maybe(bias_hh),
                            maybe(weight_hr), maybe(batch_sizes), maybe(lengths), maybe(resets), gates, cells, hidden,
                            maybe(weight_ch), maybe(recurrent_mask), maybe(zoneout_h), maybe(zoneout_c),
                            maybe(weight_ln)});
    ctx->saved_data["index"] = index;
    ctx->saved_data["reverse"] = reverse;
    ctx->saved_data["recompute"] = recompute;
    ctx->set_materialize_grads(false);
    if (!drivers().cells[index].has_cell) ctx->mark_non_differentiable({c_n});
    if (with_all_c) return {output, h_n, c_n, all_c};
    return {output, h_n, c_n};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grad) {
    const variable_list saved = ctx->get_saved_variables();
    const auto maybe = [](const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; };
    // Only tensors that were given have an edge; edges are numbered in argument order.
    std::array<bool, kNumGradients> needs{};
    constexpr int kPlain = 8;        // gradients, of the first arguments; then weight_ch and weight_ln
    constexpr int kSavedExtra = 14;  // weight_ch, which is saved after hidden with all that follows it
    size_t edge = 0;
    const auto next = [&](int i) { return saved[i].defined() && ctx->needs_input_grad(edge++); };
    for (int i = 0; i < kPlain; ++i) needs[i] = next(i);
    for (int i = kPlain; i < kPlain + 3; ++i) next(i);  // batch_sizes, lengths, resets
    needs[kPlain] = next(kSavedExtra);
    for (int i = 1; i < 4; ++i) next(kSavedExtra + i);  // the masks
    needs[kPlain + 1] = next(kSavedExtra + 4);
    constexpr int kFirst = 2;  // index, with_all_c, then the arguments
    variable_list result(kFirst + 18);
    if (std::none_of(grad.begin(), grad.end(), [](const Tensor& g) { return g.defined(); })) return result;
    const auto call = [&] {
      return Operators::of(ctx->saved_data["index"].toInt())
          .backward.call(maybe(grad[0]), maybe(grad[1]), maybe(grad[2]), saved[0], maybe(saved[1]), maybe(saved[2]),
                         saved[3], saved[4], maybe(saved[5]), maybe(saved[6]), maybe(saved[7]), maybe(saved[8]),
                         maybe(saved[9]), maybe(saved[10]), ctx->saved_data["reverse"].toBool(), maybe(saved[14]),
                         maybe(saved[15]), maybe(saved[16]), maybe(saved[17]), maybe(saved[18]),
                         ctx->saved_data["recompute"].toBool(), saved[11], saved[12], saved[13], needs,
                         grad.size() > 3 ? maybe(grad[3]) : std::nullopt);
    };
    // With create_graph the call is itself differentiable (registrations.py); else autograd is skipped.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    const Gradients gradients = call();
    std::apply(
        [&](const auto&... g) {
          constexpr int kPosition[kNumGradients] = {0, 1, 2, 3, 4, 5, 6, 7, 12, 16};
          int i = 0;
          ((result[kFirst + kPosition[i]] = needs[i] ? g : Tensor(), ++i), ...);
        },
        gradients);
    return result;
  }
};

bool requires_grad(const MaybeTensor& t) {
  return has(t) && t->requires_grad();
}

bool any_requires_grad(RNNFAST_ARGUMENTS) {
  return at::GradMode::is_enabled() &&
         (input.requires_grad() || requires_grad(h0) || requires_grad(c0) || weight_ih.requires_grad() ||
          weight_hh.requires_grad() || requires_grad(bias_ih) || requires_grad(bias_hh) || requires_grad(weight_hr) ||
          requires_grad(weight_ch) || requires_grad(weight_ln));
}

Outputs autograd_cell(int64_t index, RNNFAST_ARGUMENTS) {
  if (any_requires_grad(RNNFAST_PASS)) {
    const variable_list out = Autograd::apply(index, false, RNNFAST_PASS);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return Operators::of(index).cell.call(RNNFAST_PASS);
}

OutputsAllC autograd_cell_all_c(int64_t index, RNNFAST_ARGUMENTS) {
  if (any_requires_grad(RNNFAST_PASS)) {
    const variable_list out = Autograd::apply(index, true, RNNFAST_PASS);
    return {out[0], out[1], out[2], out[3]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return Operators::of(index).cell_all_c->call(RNNFAST_PASS);
}

SavingOutputsAllC run_forward(int index, bool save, bool with_all_c, RNNFAST_ARGUMENTS) {
  const c10::DeviceGuard guard(input.device());
  if (weight_ih.dim() == 3) return Members(index, RNNFAST_PASS).forward(save, with_all_c);
  return Call(index, RNNFAST_PASS).forward(save, with_all_c);
}

// With `factors` as Call::backward.
Gradients run_backward(int index, bool factors, RNNFAST_BACKWARD_ARGUMENTS) {
  const c10::DeviceGuard guard(input.device());
  if (weight_ih.dim() == 3 && !factors)
    return Members(index, RNNFAST_PASS)
        .backward(grad_output, grad_h_n, grad_c_n, gates, cells, hidden, needs, grad_all_c);
  return Call(index, RNNFAST_PASS)
      .backward(grad_output, grad_h_n, grad_c_n, gates, cells, hidden, needs, grad_all_c, factors);
}

// For each of `size` examples the product left^T right over its rows: [..., N*B, J] and [..., N*B, K] to [B, J, K].
// at::bmm, into memory of large pages: per-sample gradients are many megabytes, touched once.
Tensor sample_products(const Tensor& left, const Tensor& right, int64_t size) {
  const auto rows = [size](const Tensor& t) {
    const Tensor flat = t.flatten(0, -2);
    return flat.view({flat.size(0) / size, size, flat.size(1)});
  };
  TORCH_CHECK_VALUE(size > 0 && left.dim() > 1 && left.dim() == right.dim() && left.size(-2) % size == 0,
                    "rnnfast::_sample_products: expected left [..., N*B, J] and right [..., N*B, K] with B = ", size,
                    ", got ", left.sizes(), " and ", right.sizes());
  Tensor products = empty({size, left.size(-1), right.size(-1)}, left.options());
  return at::bmm_out(products, rows(left).permute({1, 2, 0}), rows(right).transpose(0, 1));
}

}  // namespace

Outputs call_cell(int64_t index, RNNFAST_ARGUMENTS) {
  return Operators::of(index).cell.call(RNNFAST_PASS);
}

TORCH_LIBRARY(rnnfast, m) {
  m.def("_sample_products(Tensor left, Tensor right, int size) -> Tensor", {at::Tag::pt2_compliant_tag});
  const DriverTable& table = drivers();
  for (int i = 0; i < table.num_cells; ++i) {
    const std::string name = table.cells[i].name, arguments = kSchemaArguments;
    const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
    m.def((name + "(" + arguments + ") -> (Tensor output, Tensor h_n, Tensor c_n)").c_str(), tags);
    m.def(("_" + name + "_forward(" + arguments +
           ") -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells, Tensor hidden)")
              .c_str(),
          tags);
    if (table.cells[i].has_cell) {
      m.def((name + "_all_c(" + arguments + ") -> (Tensor output, Tensor h_n, Tensor c_n, Tensor all_c)").c_str(),
            tags);
      m.def(("_" + name + "_all_c_forward(" + arguments +
             ") -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells, Tensor hidden, Tensor all_c)")
                .c_str(),
            tags);
    }
    std::string required = arguments;  // in front of the last arguments none may have a default
    for (const char* value : {"=None", "=False"})
      for (size_t at; (at = required.find(value)) != std::string::npos;) required.erase(at, std::string(value).size());
    const std::string backward_arguments =
                          "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, " + required +
                          ", Tensor gates, Tensor cells, Tensor hidden, bool[10] needs, Tensor? grad_all_c=None)",
                      states = " -> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, ";
    m.def(("_" + name + "_backward" + backward_arguments + states +
           "Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, Tensor grad_bias_hh, "
           "Tensor grad_weight_hr, Tensor grad_weight_ch, Tensor grad_weight_ln)")
              .c_str(),
          tags);
    if (!has_factors(table.cells[i])) continue;
    m.def(("_" + name + "_backward_factors" + backward_arguments + states +
           "Tensor grad_gates_ih, Tensor grad_gates_hh, Tensor h_prev, Tensor grad_projected, Tensor h_raw)")
              .c_str(),
          tags);
  }
}

namespace {

// The operators of a kind of device.
void register_kernels(torch::Library& m) {
  m.impl("_sample_products", &sample_products);
  const DriverTable& table = drivers();
  for (int i = 0; i < table.num_cells; ++i) {
    const std::string name = table.cells[i].name;
    m.impl(name.c_str(), [i](RNNFAST_ARGUMENTS) {
      const auto out = run_forward(i, false, false, RNNFAST_PASS);
      return Outputs(std::get<0>(out), std::get<1>(out), std::get<2>(out));
    });
    m.impl(("_" + name + "_forward").c_str(), [i](RNNFAST_ARGUMENTS) {
      auto [output, h_n, c_n, gates, cells, hidden, all_c] = run_forward(i, true, false, RNNFAST_PASS);
      return SavingOutputs(output, h_n, c_n, gates, cells, hidden);
    });
    if (table.cells[i].has_cell) {
      m.impl((name + "_all_c").c_str(), [i](RNNFAST_ARGUMENTS) {
        const auto out = run_forward(i, false, true, RNNFAST_PASS);
        return OutputsAllC(std::get<0>(out), std::get<1>(out), std::get<2>(out), std::get<6>(out));
      });
      m.impl(("_" + name + "_all_c_forward").c_str(),
             [i](RNNFAST_ARGUMENTS) { return run_forward(i, true, true, RNNFAST_PASS); });
    }
    m.impl(("_" + name + "_backward").c_str(),
           [i](RNNFAST_BACKWARD_ARGUMENTS) { return run_backward(i, false, RNNFAST_BACKWARD_PASS); });
    if (!has_factors(table.cells[i])) continue;
    m.impl(("_" + name + "_backward_factors").c_str(), [i](RNNFAST_BACKWARD_ARGUMENTS) {
      auto [dinput, dh0, dc0, gates_ih, gates_hh, h_prev, projected, h_raw, none, nothing] =
          run_backward(i, true, RNNFAST_BACKWARD_PASS);
      return Factors(dinput, dh0, dc0, gates_ih, gates_hh, h_prev, projected, h_raw);
    });
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  register_kernels(m);
}

// In a build without CUDA kernels too: Call says then that there are none.
TORCH_LIBRARY_IMPL(rnnfast, CUDA, m) {
  register_kernels(m);
}

TORCH_LIBRARY_IMPL(rnnfast, Autograd, m) {
  const DriverTable& table = drivers();
  for (int64_t i = 0; i < table.num_cells; ++i) {
    const std::string name = table.cells[i].name;
    m.impl(name.c_str(), [i](RNNFAST_ARGUMENTS) { return autograd_cell(i, RNNFAST_PASS); });
    if (table.cells[i].has_cell)
      m.impl((name + "_all_c").c_str(), [i](RNNFAST_ARGUMENTS) { return autograd_cell_all_c(i, RNNFAST_PASS); });
  }
}

}  // namespace rnnfast
