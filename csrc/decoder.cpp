#include "decoder.h"

#include <ATen/EmptyTensor.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "step.h"

namespace py = pybind11;

namespace rnnfast {
namespace {

// A step may run without the interpreter's lock, so several threads may call at once: they take turns.
class Decoder {
 public:
  // batch: N, or null for one sequence without that dimension. weights: as Stack takes them.
  Decoder(const std::string& cell, const std::vector<MaybeTensor>& weights, std::optional<int64_t> batch)
      : has_batch_(batch), N_(batch.value_or(1)) {
    TORCH_CHECK_VALUE(N_ > 0, "Decoder: batch_size: expected None or at least 1, got ", N_);
    load(cell, weights);
  }

  // Other weights; the state stays.
  void load(const std::string& cell, const std::vector<MaybeTensor>& weights) {
    const std::lock_guard<std::mutex> turn(mutex_);
    const c10::InferenceMode normal(false);  // what is made here is written in any mode
    const at::NoGradGuard no_grad;
    Stack stack(cell, weights, std::nullopt, std::nullopt, true);
    const Tensor& weight_ih = *weights.at(0);
    TORCH_CHECK(weight_ih.device().is_cpu(), "Decoder: expected a layer on the CPU, got one on ", weight_ih.device());
    TORCH_CHECK_VALUE(weight_ih.dim() == 2, "Decoder: weight_ih: expected 2 dimensions, got ", weight_ih.sizes());
    const int64_t I = weight_ih.size(1);
    // The first step rearranges the weights and touches all memory; no later one has to.
    const Tensor output = stack.step(at::zeros({1, N_, I}, weight_ih.options()));
    stack.set_state(std::nullopt, std::nullopt);
    if (stack_) {
      TORCH_CHECK_VALUE(weight_ih.scalar_type() == dtype_ && I == I_ && output.size(-1) == P_,
                        "Decoder: expected weights of the dtype and sizes it was made with");
      auto [h, c] = stack_->state(output.options());
      stack.set_state(h, c.dim() == 3 ? MaybeTensor(c) : std::nullopt);
    }
    stack_ = std::make_unique<Stack>(std::move(stack));
    dtype_ = weight_ih.scalar_type(), I_ = I, P_ = output.size(-1);
  }

  // [N, I] to [N, P], or [I] to [P].
  Tensor step(const Tensor& input) {
    check(input);
    const std::lock_guard<std::mutex> turn(mutex_);
    const at::AutoDispatchBelowADInplaceOrView no_record;  // of gradients or views
    const Tensor output = stack_->step(has_batch_ ? input.unsqueeze(0) : input.view({1, 1, I_}));
    Tensor result = has_batch_ ? empty({N_, P_}, output.options()) : empty({P_}, output.options());
    std::memcpy(result.data_ptr(), output.const_data_ptr(), result.nbytes());
    return result;
  }

  // Zero state for all sequences, or for those where `where`, bool [N], says so.
  void reset(const MaybeTensor& where) {
    const std::lock_guard<std::mutex> turn(mutex_);
    if (!has(where)) return stack_->set_state(std::nullopt, std::nullopt);
    TORCH_CHECK_VALUE(has_batch_, "Decoder.reset: mask: expected None without a batch, got a tensor");
    TORCH_CHECK_TYPE(where->scalar_type() == at::kBool, "Decoder.reset: mask: expected bool, got ",
                     where->scalar_type());
    TORCH_CHECK(where->device().is_cpu(), "Decoder.reset: mask: expected a CPU tensor, got one on ", where->device());
    TORCH_CHECK_VALUE(where->dim() == 1 && where->size(0) == N_, "Decoder.reset: mask: expected [N] = [", N_, "], got ",
                      where->sizes());
    const Tensor dense = where->contiguous();
    stack_->reset(dense.const_data_ptr<bool>());
  }

  std::tuple<Tensor, MaybeTensor> state() {
    const std::lock_guard<std::mutex> turn(mutex_);
    const at::NoGradGuard no_grad;
    auto [h, c] = stack_->state(at::TensorOptions().dtype(dtype_));
    const auto given = [&](const Tensor& state) { return has_batch_ ? state : state.squeeze(1); };
    return {given(h), c.dim() == 3 ? MaybeTensor(given(c)) : std::nullopt};
  }

  void set_state(const Tensor& h, const MaybeTensor& c) {
    const std::lock_guard<std::mutex> turn(mutex_);
    const at::NoGradGuard no_grad;
    const auto [old_h, old_c] = stack_->state(at::TensorOptions().dtype(dtype_));
    const auto taken = [&](const char* name, const Tensor& state, const Tensor& old) {
      TORCH_CHECK_TYPE(state.scalar_type() == dtype_, "Decoder.state: ", name, ": expected ", dtype_, ", got ",
                       state.scalar_type());
      TORCH_CHECK(state.device().is_cpu(), "Decoder.state: ", name, ": expected a CPU tensor, got one on ",
                  state.device());
      const Tensor expected = has_batch_ ? old : old.squeeze(1);
      TORCH_CHECK_VALUE(state.sizes() == expected.sizes(), "Decoder.state: ", name, ": expected ",
                        has_batch_ ? "[L, N, units] = " : "[L, units] = ", expected.sizes(), ", got ", state.sizes());
      return has_batch_ ? state : state.unsqueeze(1);
    };
    TORCH_CHECK_VALUE(has(c) == (old_c.dim() == 3), "Decoder.state: expected ",
                      old_c.dim() == 3 ? "a pair (h, c)" : "h alone: this cell has no second state");
    const Tensor new_h = taken("h", h, old_h);
    stack_->set_state(new_h, has(c) ? MaybeTensor(taken("c", *c, old_c)) : std::nullopt);
  }

 private:
  void check(const Tensor& input) const {
    TORCH_CHECK_TYPE(input.scalar_type() == dtype_, "Decoder.step: input: expected ", dtype_, ", the dtype of the ",
                     "weights, got ", input.scalar_type());
    TORCH_CHECK(input.device().is_cpu(), "Decoder.step: input: expected a CPU tensor, got one on ", input.device());
    const bool fits = has_batch_ ? input.dim() == 2 && input.size(0) == N_ && input.size(1) == I_
                                 : input.dim() == 1 && input.size(0) == I_;
    if (!fits && has_batch_)
      TORCH_CHECK_VALUE(false, "Decoder.step: input: expected [N, I] = [", N_, ", ", I_, "], got ", input.sizes());
    TORCH_CHECK_VALUE(fits, "Decoder.step: input: expected [I] = [", I_, "], got ", input.sizes());
    TORCH_CHECK(!(input.requires_grad() && at::GradMode::is_enabled()),
                "Decoder.step: input requires a gradient, and a Decoder gives none: detach it, or call under no_grad");
  }

  std::mutex mutex_;
  const bool has_batch_;
  const int64_t N_;
  int64_t I_ = 0, P_ = 0;
  at::ScalarType dtype_ = at::kFloat;
  std::unique_ptr<Stack> stack_;
};

}  // namespace

void bind_decoder(py::module& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Decoder>(m, "Decoder")
      .def(py::init<const std::string&, const std::vector<MaybeTensor>&, std::optional<int64_t>>(), py::arg("cell"),
           py::arg("weights"), py::arg("batch_size"), Unlocked())
      .def("load", &Decoder::load, py::arg("cell"), py::arg("weights"), Unlocked())
      .def("step", &Decoder::step, py::arg("input"), Unlocked())
      .def("reset", &Decoder::reset, py::arg("mask") = py::none(), Unlocked())
      .def("get_state", &Decoder::state, Unlocked())
      .def("set_state", &Decoder::set_state, py::arg("h"), py::arg("c"), Unlocked());
}

}  // namespace rnnfast
