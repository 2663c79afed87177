// The loss of the language model's head (lm.py): torch.ops.rnnfast._softmax_loss_, one pass over a piece of the scores,
// and _linear_loss, which makes the scores and the gradients too, chunk by chunk.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>

#include "call.h"

namespace rnnfast {
namespace {

// targets as they lie in memory, each below V.
Tensor checked(const Tensor& targets, int64_t V) {
  const Tensor dense = targets.contiguous();
  const int64_t* target = dense.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < dense.numel(); ++r)
    TORCH_CHECK_INDEX(target[r] >= 0 && target[r] < V, "targets: expected 0 to ", V - 1, ", got ", target[r]);
  return dense;
}

// scores [V, ld], contiguous, ld a multiple of kSoftmaxRows: column r < R is a row's scores, the others are scratch.
// With `grad` each becomes its softmax less the one-hot row of its target, else anything. targets [R]; bias [V] is
// added to the scores. Returns the R losses in natural units.
Tensor softmax_loss_(Tensor scores, const std::optional<Tensor>& bias, const Tensor& targets, bool grad) {
  TORCH_CHECK_TYPE(scores.scalar_type() == at::kFloat || scores.scalar_type() == at::kDouble,
                   "scores: expected float32 or float64, got ", scores.scalar_type());
  TORCH_CHECK_VALUE(
      scores.dim() == 2 && scores.is_contiguous() && scores.size(0) > 0 && scores.size(1) % kSoftmaxRows == 0,
      "scores: expected contiguous [V, ld] with ld a multiple of ", kSoftmaxRows, ", got ", scores.sizes());
  const int64_t V = scores.size(0), ld = scores.size(1), rows = targets.numel();
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong, "targets: expected int64, got ", targets.scalar_type());
  TORCH_CHECK_VALUE(targets.dim() == 1 && rows <= ld, "targets: expected [R] with R at most ", ld, ", got ",
                    targets.sizes());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == V), "bias: expected [V] with V = ", V, ", got ",
                    bias->sizes());
  TORCH_CHECK_TYPE(!bias || bias->scalar_type() == scores.scalar_type(), "bias: expected ", scores.scalar_type(),
                   ", got ", bias->scalar_type());
  const Tensor wanted = checked(targets, V), offset = bias ? bias->contiguous() : Tensor();

  Tensor total = at::empty({rows}, scores.options()), target_score = at::empty({rows}, scores.options());
  const auto run = [&](auto zero, auto driver) {
    using T = decltype(zero);
    SoftmaxParams<T> p{};
    p.rows = rows, p.V = V, p.ld = ld;
    p.scores = scores.mutable_data_ptr<T>();
    p.bias = bias ? offset.const_data_ptr<T>() : nullptr;
    p.targets = wanted.const_data_ptr<int64_t>();
    p.total = total.mutable_data_ptr<T>(), p.target_score = target_score.mutable_data_ptr<T>();
    p.grad = grad, p.scale = 1;
    constexpr int64_t kWork = 1 << 15;  // scores that repay waking another thread
    const int64_t grain = std::max<int64_t>(kWork / (V * kSoftmaxRows), 1);
    at::parallel_for(0, (rows + kSoftmaxRows - 1) / kSoftmaxRows, grain,
                     [&](int64_t begin, int64_t end) { driver(p, begin * kSoftmaxRows, end * kSoftmaxRows); });
  };
  if (scores.scalar_type() == at::kDouble)
    run(double{}, drivers().softmax_f64);
  else
    run(float{}, drivers().softmax_f32);
  return total.log_().sub_(target_score);
}

// hidden [R, P], weight [V, P], bias [V], targets [R]. Returns the R losses in natural units, and the gradients of
// their mean that `needs` asks for (of hidden, weight, bias), the others with no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_loss(const Tensor& hidden, const Tensor& weight,
                                                       const std::optional<Tensor>& bias, const Tensor& targets,
                                                       int64_t chunk_rows, std::array<bool, 3> needs) {
  const auto dtype = hidden.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "hidden: expected float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden: expected [R, P], got ", hidden.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == hidden.size(1),
                    "weight: expected [V, P] with P = ", hidden.size(1), ", got ", weight.sizes());
  const int64_t R = hidden.size(0), P = hidden.size(1), V = weight.size(0);
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == V), "bias: expected [V] with V = ", V, ", got ",
                    bias->sizes());
  TORCH_CHECK_TYPE(weight.scalar_type() == dtype && (!bias || bias->scalar_type() == dtype),
                   "weight and bias: expected ", dtype, " as hidden, got ", weight.scalar_type(), " and ",
                   bias ? bias->scalar_type() : dtype);
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong, "targets: expected int64, got ", targets.scalar_type());
  TORCH_CHECK_VALUE(targets.dim() == 1 && targets.size(0) == R && R > 0, "targets: expected [R] with R = ", R,
                    ", at least 1, got ", targets.sizes());
  TORCH_CHECK_VALUE(chunk_rows > 0, "chunk_rows: expected at least 1, got ", chunk_rows);
  const Tensor h = hidden.contiguous(), w = weight.contiguous(), wanted = checked(targets, V),
               offset = bias ? bias->contiguous() : Tensor();

  const auto options = hidden.options();
  const auto up = [](int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; };
  const auto gradient = [&](bool needed, const Tensor& like, bool sums) {
    return !needed ? at::empty({0}, options) : sums ? at::zeros_like(like) : empty(like.sizes(), options);
  };
  const bool needs_bias = needs[2] && bias;
  Tensor grad_hidden = gradient(needs[0], h, false), grad_weight = gradient(needs[1], w, true),
         grad_bias = gradient(needs_bias, offset, true);
  Tensor total = at::empty({R}, options), target_score = at::empty({R}, options);
  const int64_t most = std::min(R, chunk_rows);
  int64_t ld = up(most, kLossRows);
  if (ld % 1024 == 0) ld += kLossRows;  // whole pages would send the columns to one set of the caches
  const int64_t sizes[] = {V * ld, ld * P, needs[1] ? ld * up(P, 16) : 0, needs[0] ? V * up(P, 16) : 0};
  const Scratch scratch(std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0}), options);
  const auto run = [&](auto zero, const auto& driver) {
    using T = decltype(zero);
    LossParams<T> p{};
    const auto at_row = [](const Tensor& t, int64_t element) { return t.mutable_data_ptr<T>() + element; };
    p.softmax.V = V, p.softmax.ld = ld, p.P = P;
    p.softmax.scores = scratch.data<T>();
    p.rows_t = p.softmax.scores + sizes[0], p.rows = p.rows_t + sizes[1], p.weight_rows = p.rows + sizes[2];
    p.softmax.bias = bias ? offset.const_data_ptr<T>() : nullptr;
    p.softmax.grad = needs[0] || needs[1] || needs_bias;
    p.softmax.scale = static_cast<T>(1.0 / static_cast<double>(R));
    p.weight = w.const_data_ptr<T>();
    p.grad_weight = needs[1] ? at_row(grad_weight, 0) : nullptr;
    p.grad_bias = needs_bias ? at_row(grad_bias, 0) : nullptr;
    // Work that repays waking another thread, in numbers moved or multiplied.
    constexpr int64_t kWork = 1 << 15;
    const auto parallel = [&](int64_t n, int64_t work, auto part) {
      at::parallel_for(0, n, std::max<int64_t>(kWork / std::max<int64_t>(work, 1), 1),
                       [&](int64_t begin, int64_t end) { part(p, begin, end); });
    };
    if (needs[0]) parallel(V, P, driver.pack);
    for (int64_t first = 0; first < R; first += chunk_rows) {
      p.softmax.rows = std::min(chunk_rows, R - first);
      p.softmax.targets = wanted.const_data_ptr<int64_t>() + first;
      p.softmax.total = at_row(total, first), p.softmax.target_score = at_row(target_score, first);
      p.hidden = h.const_data_ptr<T>() + first * P;
      p.grad_hidden = needs[0] ? at_row(grad_hidden, first * P) : nullptr;
      parallel((p.softmax.rows + kLossRows - 1) / kLossRows, kLossRows * V * P, driver.rows);
      if (needs[1] || needs_bias) parallel(V, p.softmax.rows * P, driver.weights);
    }
  };
  if (dtype == at::kDouble)
    run(double{}, drivers().loss_f64);
  else
    run(float{}, drivers().loss_f32);
  return {total.log_().sub_(target_score), grad_hidden, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def("_softmax_loss_(Tensor(a!) scores, Tensor? bias, Tensor targets, bool grad) -> Tensor");
  m.def(
      "_linear_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int chunk_rows, bool[3] needs) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("_softmax_loss_", [](Tensor scores, const std::optional<Tensor>& bias, const Tensor& targets, bool grad) {
    return softmax_loss_(std::move(scores), bias, targets, grad);
  });
  m.impl("_linear_loss", linear_loss);
}

}  // namespace rnnfast
