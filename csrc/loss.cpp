// The loss of the language model's head (lm.py): torch.ops.rnnfast._softmax_loss_, one pass over a piece of the scores.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "sequence.h"

namespace rnnfast {
namespace {

using at::Tensor;

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
  const Tensor wanted = targets.contiguous(), offset = bias ? bias->contiguous() : Tensor();
  const int64_t* target = wanted.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows; ++r)
    TORCH_CHECK_INDEX(target[r] >= 0 && target[r] < V, "targets: expected 0 to ", V - 1, ", got ", target[r]);

  Tensor total = at::empty({rows}, scores.options()), target_score = at::empty({rows}, scores.options());
  const auto run = [&](auto zero, auto driver) {
    using T = decltype(zero);
    SoftmaxParams<T> p{};
    p.rows = rows, p.V = V, p.ld = ld;
    p.scores = scores.mutable_data_ptr<T>();
    p.bias = bias ? offset.const_data_ptr<T>() : nullptr;
    p.targets = target;
    p.total = total.mutable_data_ptr<T>(), p.target_score = target_score.mutable_data_ptr<T>();
    p.grad = grad;
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def("_softmax_loss_(Tensor(a!) scores, Tensor? bias, Tensor targets, bool grad) -> Tensor");
}

TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("_softmax_loss_", [](Tensor scores, const std::optional<Tensor>& bias, const Tensor& targets, bool grad) {
    return softmax_loss_(std::move(scores), bias, targets, grad);
  });
}

}  // namespace rnnfast
