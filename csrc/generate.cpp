// The loops of the heads (lm.py, forecast.py): torch.ops.rnnfast._generate and _forecast. Each step feeds the model's
// own last output back to it: input, the stack of layers, output layer, choice. The kernels are those of the operators,
// with the shapes a loop over the modules would use, so that both give the same numbers. No gradients here.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "step.h"

namespace rnnfast {
namespace {

using MaybeTensors = c10::List<std::optional<Tensor>>;

// What linear(x, weight, bias) gives of x [1, N, P], as [N, O], again and again into the same memory.
class Output {
 public:
  Output(const Tensor& weight, const MaybeTensor& bias) : weight_(weight.t()), bias_(bias.value_or(Tensor())) {}
  const Tensor& operator()(const Tensor& x) {
    const Tensor rows = x.squeeze(0);
    if (!out_.defined()) out_ = at::empty({rows.size(0), weight_.size(1)}, rows.options());
    return bias_.defined() ? at::addmm_out(out_, bias_, rows, weight_) : at::mm_out(out_, rows, weight_);
  }

 private:
  Tensor weight_, bias_, out_;
};

// ---- language model ----

// How the next token is chosen from scores: the likeliest, or drawn with probability proportional to p^alpha among the
// top_k likeliest (0: all) and, of these, the fewest that together have at least probability top_p.
class Choice {
 public:
  Choice(int64_t num_tokens, bool sample, double alpha, int64_t top_k, double top_p)
      : V_(num_tokens), sample_(sample), alpha_(alpha), top_k_(top_k == 0 ? num_tokens : top_k), top_p_(top_p) {}

  // score [V]; u uniform in [0, 1). Equal scores: the lower number counts as likelier.
  template <typename T>
  int64_t operator()(const T* score, double u) {
    int64_t best = 0;
    bool is_sound = true;
    for (int64_t v = 0; v < V_; ++v) {
      is_sound = is_sound && score[v] < INFINITY;  // minus infinity is a token that never comes; NaN compares false
      if (score[v] > score[best]) best = v;
    }
    TORCH_CHECK(is_sound && score[best] > -INFINITY, "the scores of the next token are not finite");
    if (!sample_) return best;

    weight_.resize(V_);
    for (int64_t v = 0; v < V_; ++v)
      weight_[v] = std::exp(alpha_ * (static_cast<double>(score[v]) - static_cast<double>(score[best])));
    if (top_k_ == V_ && top_p_ >= 1) {
      const double total = std::accumulate(weight_.begin(), weight_.end(), 0.0);
      double sum = 0;
      for (int64_t v = 0; v < V_; ++v)
        if ((sum += weight_[v]) > u * total) return v;
      return best;  // u * total rounded up to the total
    }
    order_.resize(V_);
    std::iota(order_.begin(), order_.end(), 0);
    const auto likelier = [&](int64_t a, int64_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; };
    std::partial_sort(order_.begin(), order_.begin() + top_k_, order_.end(), likelier);
    double total = 0;
    for (int64_t i = 0; i < top_k_; ++i) total += weight_[order_[i]];
    int64_t kept = 0;
    double nucleus = 0;
    while (kept < top_k_ && (kept == 0 || nucleus < top_p_ * total)) nucleus += weight_[order_[kept++]];
    double sum = 0;
    for (int64_t i = 0; i < kept; ++i)
      if ((sum += weight_[order_[i]]) > u * nucleus) return order_[i];
    return best;
  }

 private:
  const int64_t V_;
  const bool sample_;
  const double alpha_;
  const int64_t top_k_;
  const double top_p_;
  std::vector<double> weight_;
  std::vector<int64_t> order_;
};

// Writes num_tokens tokens after the state. `scores` [N, V] are those of the first token to choose; they come back as
// those of the token after the last, so that a call can go on where another ended. `finished` [N] (bool) are sequences
// that met the stop token (-1: there is none): they repeat it, and the loop ends early when all have.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> generate(
    std::string cell, const Tensor& scores, const MaybeTensor& h, const MaybeTensor& c, const MaybeTensors& weights,
    const MaybeTensor& embedding, const Tensor& output_weight, const MaybeTensor& output_bias, const Tensor& finished,
    int64_t num_tokens, bool sample, double alpha, int64_t top_k, double top_p, int64_t stop_token,
    const std::optional<at::Generator>& generator) {
  TORCH_CHECK_VALUE(scores.dim() == 2 && scores.size(1) > 0, "scores: expected [N, V], got ", scores.sizes());
  const int64_t N = scores.size(0), V = scores.size(1);
  TORCH_CHECK_VALUE(finished.scalar_type() == at::kBool && finished.dim() == 1 && finished.size(0) == N,
                    "finished: expected bool [N] with N = ", N, ", got ", finished.scalar_type(), " ",
                    finished.sizes());
  TORCH_CHECK_VALUE(output_weight.dim() == 2 && output_weight.size(0) == V,
                    "output_weight: expected [V, P] with V = ", V, ", got ", output_weight.sizes());
  TORCH_CHECK_VALUE(num_tokens >= 0, "num_tokens: expected at least 0, got ", num_tokens);
  TORCH_CHECK_VALUE(std::isfinite(alpha) && alpha > 0, "alpha: expected a finite number above 0, got ", alpha);
  TORCH_CHECK_VALUE(top_k >= 0 && top_k <= V, "top_k: expected 0 (all) to V = ", V, ", got ", top_k);
  TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, "top_p: expected a number above 0, at most 1, got ", top_p);
  TORCH_CHECK_VALUE(stop_token >= -1 && stop_token < V, "stop_token: expected -1 (none) or a token below V = ", V,
                    ", got ", stop_token);

  const at::NoGradGuard no_grad;
  Stack stack(cell, weights.vec(), h, c, false);
  Output output(output_weight, output_bias);
  Choice choose(V, sample, alpha, top_k, top_p);
  Tensor tokens = at::empty({num_tokens, N}, at::kLong), done = finished.clone(), next = scores.clone();
  int64_t* token = tokens.mutable_data_ptr<int64_t>();
  bool* is_done = done.mutable_data_ptr<bool>();
  int64_t written = 0;
  for (; written < num_tokens && !(N > 0 && std::all_of(is_done, is_done + N, [](bool b) { return b; })); ++written) {
    // Drawn step by step, so that a loop cut in two draws the same numbers.
    const Tensor uniform = sample ? at::rand({N}, generator, at::TensorOptions().dtype(at::kDouble)) : Tensor();
    const double* u = sample ? uniform.const_data_ptr<double>() : nullptr;
    const Tensor dense = (next.scalar_type() == at::kDouble ? next : next.to(at::kFloat)).contiguous();
    int64_t* now = token + written * N;
    for (int64_t n = 0; n < N; ++n) {
      if (is_done[n])
        now[n] = stop_token;
      else if (dense.scalar_type() == at::kDouble)
        now[n] = choose(dense.const_data_ptr<double>() + n * V, sample ? u[n] : 0);
      else
        now[n] = choose(dense.const_data_ptr<float>() + n * V, sample ? u[n] : 0);
      is_done[n] = is_done[n] || now[n] == stop_token;
    }
    const Tensor row = tokens.narrow(0, written, 1);
    next = output(stack.step(embedding ? at::embedding(*embedding, row) : row));
  }
  auto [h_n, c_n] = stack.state(scores.options());
  return {written == num_tokens ? tokens : tokens.narrow(0, 0, written).clone(), next, h_n, c_n, done};
}

// ---- autoregression ----

// Writes num_steps values after a series. With `window` [T, N, F] each comes from the last T values, the state being
// zero before them. Else `head` [N, O] is what the output layer said of the first, h and c the state after the last
// known value. O is F, or 2 F with a distribution: means, then scales before their softplus; then `sample` draws each
// value from the normal distribution, and otherwise takes the mean.
std::tuple<Tensor, Tensor> forecast(std::string cell, const MaybeTensor& window, const MaybeTensor& head,
                                    const MaybeTensor& h, const MaybeTensor& c, const MaybeTensors& weights,
                                    const Tensor& output_weight, const MaybeTensor& output_bias, int64_t num_steps,
                                    bool distribution, bool sample, double least_scale,
                                    const std::optional<at::Generator>& generator) {
  TORCH_CHECK_VALUE(window.has_value() != head.has_value(), "window, head: expected one of them");
  TORCH_CHECK_VALUE(!window || (window->dim() == 3 && window->size(0) > 0),
                    "window: expected [T, N, F] with at least one step, got ", window->sizes());
  TORCH_CHECK_VALUE(!head || head->dim() == 2, "head: expected [N, O], got ", head->sizes());
  TORCH_CHECK_VALUE(output_weight.dim() == 2, "output_weight: expected [O, P], got ", output_weight.sizes());
  TORCH_CHECK_VALUE(num_steps >= 1, "num_steps: expected at least 1, got ", num_steps);
  TORCH_CHECK_VALUE(!sample || distribution, "sample: expected false without a distribution");
  const int64_t F = output_weight.size(0) / (distribution ? 2 : 1);
  const at::NoGradGuard no_grad;
  Stack stack(cell, weights.vec(), h, c, false);
  Output output(output_weight, output_bias);
  std::vector<Tensor> means, scales, recent;
  if (window) recent = window->unbind(0);
  Tensor said = head ? *head : Tensor(), value;
  for (int64_t step = 0; step < num_steps; ++step) {
    if (window) {
      if (step > 0) recent.erase(recent.begin()), recent.push_back(value);
      stack.set_state(std::nullopt, std::nullopt);
      said = at::linear(stack.run(at::stack(recent)).select(0, -1), output_weight, output_bias);
    } else if (step > 0) {
      said = output(stack.step(value.unsqueeze(0))).clone();
    }
    value = said.narrow(-1, 0, F);
    if (distribution) {
      const Tensor scale = at::softplus(said.narrow(-1, F, F)) + least_scale;
      if (sample) value = value + scale * at::randn(value.sizes(), generator, value.options());
      scales.push_back(scale);
    }
    means.push_back(value);
  }
  return {at::stack(means), distribution ? at::stack(scales) : at::empty({0}, output_weight.options())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def(
      "_generate(str cell, Tensor scores, Tensor? h, Tensor? c, Tensor?[] weights, Tensor? embedding, "
      "Tensor output_weight, Tensor? output_bias, Tensor finished, int num_tokens, bool sample, float alpha, "
      "int top_k, float top_p, int stop_token, Generator? generator) -> (Tensor tokens, Tensor scores, Tensor h, "
      "Tensor c, Tensor finished)");
  m.def(
      "_forecast(str cell, Tensor? window, Tensor? head, Tensor? h, Tensor? c, Tensor?[] weights, "
      "Tensor output_weight, Tensor? output_bias, int num_steps, bool distribution, bool sample, float least_scale, "
      "Generator? generator) -> (Tensor values, Tensor scales)");
}

TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("_generate",
         [](std::string cell, const Tensor& scores, const MaybeTensor& h, const MaybeTensor& c,
            const MaybeTensors& weights, const MaybeTensor& embedding, const Tensor& output_weight,
            const MaybeTensor& output_bias, const Tensor& finished, int64_t num_tokens, bool sample, double alpha,
            int64_t top_k, double top_p, int64_t stop_token, std::optional<at::Generator> generator) {
           return generate(cell, scores, h, c, weights, embedding, output_weight, output_bias, finished, num_tokens,
                           sample, alpha, top_k, top_p, stop_token, generator);
         });
  m.impl("_forecast", [](std::string cell, const MaybeTensor& window, const MaybeTensor& head, const MaybeTensor& h,
                         const MaybeTensor& c, const MaybeTensors& weights, const Tensor& output_weight,
                         const MaybeTensor& output_bias, int64_t num_steps, bool distribution, bool sample,
                         double least_scale, std::optional<at::Generator> generator) {
    return forecast(cell, window, head, h, c, weights, output_weight, output_bias, num_steps, distribution, sample,
                    least_scale, generator);
  });
}

}  // namespace rnnfast
