// What a call is refused for, and the layout that its checked arguments have.
#include <initializer_list>
#include <string>
#include <vector>

#include "call.h"

namespace rnnfast {

template <typename Dims>
void Call::check_shape(const char* argument, const Tensor& t, const Dims& dims) const {
  bool same = t.dim() == static_cast<int64_t>(dims.size());
  int64_t i = 0;
  for (const Dim& d : dims) same = same && t.size(i++) == d.size;
  if (same) return;
  std::string letters, sizes;
  for (const Dim& d : dims) {
    letters += (letters.empty() ? "" : ", ") + std::string(d.letter);
    sizes += (sizes.empty() ? "" : ", ") + std::to_string(d.size);
  }
  TORCH_CHECK_VALUE(false, what(argument), "expected [", letters, "] = [", sizes, "], got ", t.sizes());
}

template void Call::check_shape(const char*, const Tensor&, const std::vector<Dim>&) const;

void Call::check_shape(const char* argument, const Tensor& t, std::initializer_list<Dim> dims) const {
  check_shape<std::initializer_list<Dim>>(argument, t, dims);
}

void Call::check_device(const char* argument, const Tensor& t) const {
  TORCH_CHECK(t.device() == device_, what(argument), "expected a tensor on ", device_, ", where input is, got one on ",
              t.device());
}

void Call::check_dtype_and_device(const Tensor& input, const MaybeTensor& h0, const MaybeTensor& c0,
                                  const Tensor& weight_ih, const Tensor& weight_hh, const MaybeTensor& bias_ih,
                                  const MaybeTensor& bias_hh, const MaybeTensor& weight_hr) const {
  const auto dtype = is_tokens_ ? weight_ih.scalar_type() : input.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                   what(is_tokens_ ? "weight_ih" : "input"), "expected float32, float64, bfloat16 or float16",
                   is_tokens_ ? "" : ", or int64 for tokens", ", got ", dtype);
  const auto check = [&](const char* argument, const Tensor& t) {
    TORCH_CHECK_VALUE(t.layout() == at::kStrided, what(argument), "expected a dense tensor, got layout ", t.layout());
    TORCH_CHECK_TYPE(t.scalar_type() == dtype || (is_tokens_ && t.is_same(input)), what(argument),
                     "expected the dtype of ", is_tokens_ ? "weight_ih" : "input", ", ", dtype, ", got ",
                     t.scalar_type());
    check_device(argument, t);
  };
#ifndef RNNFAST_CUDA
  TORCH_CHECK(device_.is_cpu(), what("input"), "expected a tensor on the CPU, got one on ", device_,
              ": this build has no CUDA kernels (python -m rnnfast says why)");
#endif
  check("input", input);
  if (has(h0)) check("h0", *h0);
  if (has(c0)) check("c0", *c0);
  check("weight_ih", weight_ih);
  check("weight_hh", weight_hh);
  if (has(bias_ih)) check("bias_ih", *bias_ih);
  if (has(bias_hh)) check("bias_hh", *bias_hh);
  if (has(weight_hr)) check("weight_hr", *weight_hr);
}

void Call::check_extras(const Tensor& like, const MaybeTensor& weight_ch, const MaybeTensor& recurrent_mask,
                        const MaybeTensor& zoneout_h, const MaybeTensor& zoneout_c, const MaybeTensor& weight_ln,
                        bool is_projected) const {
  if (cell_.peepholes + cell_.norm_vectors == 0 && !has(weight_ch) && !has(recurrent_mask) && !has(zoneout_h) &&
      !has(zoneout_c) && !has(weight_ln))
    return;
  const auto check = [&](const char* argument, const MaybeTensor& t, const std::vector<Dim>& dims) {
    if (!has(t)) return;
    TORCH_CHECK_VALUE(t->layout() == at::kStrided, what(argument), "expected a dense tensor, got layout ", t->layout());
    TORCH_CHECK_TYPE(t->scalar_type() == like.scalar_type(), what(argument), "expected the dtype of weight_ih, ",
                     like.scalar_type(), ", got ", t->scalar_type());
    check_device(argument, *t);
    check_shape(argument, *t, dims);
  };
  const int64_t V = cell_.peepholes;
  TORCH_CHECK_VALUE(
      has(weight_ch) == (V > 0), what("weight_ch"),
      V > 0 ? "expected the weights of the peepholes, [V*H], got None" : "this cell has no peepholes; expected None");
  check("weight_ch", weight_ch, {{"V*H", V * size_.H}});
  const int64_t L = cell_.norm_vectors;
  TORCH_CHECK_VALUE(has(weight_ln) == (L > 0), what("weight_ln"),
                    L > 0 ? "expected the weights of layer normalization, [V*H], got None"
                          : "this cell has no layer normalization; expected None");
  check("weight_ln", weight_ln, {{"V*H", L * size_.H}});
  TORCH_CHECK_VALUE(L == 0 || !is_projected, what("weight_hr"), "not with layer normalization; expected None");
  check("recurrent_mask", recurrent_mask, {{"N", size_.N}, {"P", size_.P}});
  std::vector<Dim> steps = outer_dims_;
  steps.push_back({"H", size_.H});
  check("zoneout_h", zoneout_h, steps);
  check("zoneout_c", zoneout_c, steps);
  TORCH_CHECK_VALUE(cell_.has_cell || !has(zoneout_c), what("zoneout_c"),
                    "this cell has no second state; expected None");
  TORCH_CHECK_VALUE(!is_projected || !(has(zoneout_h) || has(zoneout_c)),
                    what(has(zoneout_h) ? "zoneout_h" : "zoneout_c"), "not with weight_hr; expected None");
}

void Call::check_tokens(const Tensor& tokens, bool is_packed) const {
  TORCH_CHECK_VALUE(tokens.dim() == 1 || (tokens.dim() == 2 && !is_packed), what("input"),
                    is_packed ? "expected 1 dimension [rows] for tokens with batch_sizes, got "
                              : "expected 2 dimensions [T, N] for tokens, or 1 for one step [N], got ",
                    tokens.sizes());
  if (device_.is_cpu()) check_token_range(tokens.contiguous());
}

Tensor Call::checked_integers(const char* argument, const Tensor& t) const {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kLong, what(argument), "expected int64, got ", t.scalar_type());
  TORCH_CHECK(t.device().is_cpu(), what(argument), "expected a CPU tensor, got one on ", t.device());
  TORCH_CHECK_VALUE(t.dim() == 1, what(argument), "expected 1 dimension, got ", t.sizes());
  return t.contiguous();
}

void Call::check_layout(const Tensor& input, const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
                        const MaybeTensor& resets) {
  is_packed_ = has(batch_sizes);
  if (is_packed_) {
    TORCH_CHECK_VALUE(!has(lengths), what("lengths"), "not with batch_sizes, which already say them; expected None");
    TORCH_CHECK_VALUE(!has(resets), what("resets"), "not with batch_sizes; expected None");
    batch_sizes_ = checked_integers("batch_sizes", *batch_sizes);
    size_.T = batch_sizes_.numel();
    TORCH_CHECK_VALUE(size_.T > 0, what("batch_sizes"), "expected at least one step, got none");
    TORCH_CHECK_VALUE(input.dim() == 2, what("input"), "expected 2 dimensions [rows, I] with batch_sizes, got ",
                      input.sizes());
    const int64_t* sizes = batch_sizes_.const_data_ptr<int64_t>();
    size_.N = sizes[0];
    size_.R = 0;
    for (int64_t t = 0; t < size_.T; ++t) {
      TORCH_CHECK_VALUE(sizes[t] >= 1 && sizes[t] <= (t ? sizes[t - 1] : input.size(0)), what("batch_sizes"),
                        "expected values from ", t ? sizes[t - 1] : input.size(0),
                        " (never rising, at most the rows of input) down to 1, got ", sizes[t], " at step ", t);
      size_.R += sizes[t];
      TORCH_CHECK_VALUE(size_.R <= input.size(0), what("batch_sizes"), "expected a sum of ", input.size(0),
                        ", the rows of input, got more by step ", t);
    }
    outer_ = {size_.R};
    outer_dims_ = {{"rows", size_.R}};
  } else {
    TORCH_CHECK_VALUE(input.dim() == 3 || input.dim() == 2, what("input"),
                      "expected 3 dimensions [T, N, I], or 2 for one step [N, I], got ", input.sizes());
    size_.T = input.dim() == 3 ? input.size(0) : 1;
    size_.N = input.size(-2);
    TORCH_CHECK_VALUE(size_.T > 0, what("input"), "expected at least one step, got ", input.sizes());
    size_.R = size_.T * size_.N;
    outer_ = input.sizes().slice(0, input.dim() - 1).vec();
    outer_dims_ =
        input.dim() == 3 ? std::vector<Dim>{{"T", size_.T}, {"N", size_.N}} : std::vector<Dim>{{"N", size_.N}};
  }
  std::vector<Dim> dims = outer_dims_;
  dims.push_back({"I", size_.I});
  check_shape("input", input, dims);
  // Elements of the largest thing allocated per row must be countable; a generous bound suffices.
  int64_t elements;
  const bool overflow =
      __builtin_mul_overflow(size_.T, size_.N, &elements) ||
      __builtin_mul_overflow(elements, 64 * (cell_.slots * size_.H + size_.I + size_.P + 64), &elements);
  TORCH_CHECK_VALUE(!overflow, what("input"), "T * N * H is too large, got ", input.sizes(), " with H = ", size_.H);
  if (has(lengths)) {
    TORCH_CHECK_VALUE(input.dim() == 3, what("lengths"), "expected None for a single step");
    lengths_ = checked_integers("lengths", *lengths);
    check_shape("lengths", lengths_, {{"N", size_.N}});
    const int64_t* l = lengths_.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < size_.N; ++n)
      TORCH_CHECK_VALUE(l[n] >= 0 && l[n] <= size_.T, what("lengths"), "expected values from 0 to T = ", size_.T,
                        ", got ", l[n], " for sequence ", n);
  }
  if (has(resets)) {
    TORCH_CHECK_TYPE(resets->scalar_type() == at::kBool, what("resets"), "expected bool, got ", resets->scalar_type());
    check_device("resets", *resets);
    TORCH_CHECK_VALUE(input.dim() == 3, what("resets"), "expected None for a single step");
    check_shape("resets", *resets, {{"T", size_.T}, {"N", size_.N}});
    resets_ = resets->contiguous();
  }
}

}  // namespace rnnfast
