#include "members.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <utility>

namespace rnnfast {

Members::Members(int index, RNNFAST_ARGUMENTS)
    : index_(index),
      count_(weight_ih.size(0)),
      is_tokens_(input.scalar_type() == at::kLong),
      reverse_(reverse),
      recompute_(recompute) {
  const std::string name = std::string("rnnfast::") + drivers().cells[index].name;
  const auto check = [&](const char* argument, const MaybeTensor& t, int64_t dims) {
    if (!has(t)) return;
    TORCH_CHECK_VALUE(t->dim() == dims && t->size(0) == count_, name, ": ", argument, ": expected ", dims,
                      " dimensions, the first of E = ", count_, " members as in weight_ih, got ", t->sizes());
  };
  TORCH_CHECK_VALUE(count_ > 0, name, ": weight_ih: expected at least one member, got ", weight_ih.sizes());
  check("weight_hh", weight_hh, 3), check("weight_hr", weight_hr, 3);
  check("bias_ih", bias_ih, 2), check("bias_hh", bias_hh, 2), check("weight_ch", weight_ch, 2),
      check("weight_ln", weight_ln, 2);
  const int64_t dim = is_tokens_ ? -1 : -2;
  TORCH_CHECK_VALUE(input.dim() >= -dim && input.size(dim) % count_ == 0, name,
                    ": input: expected a number of sequences that E = ", count_, " members divide, got ",
                    input.sizes());
  const auto check_sequences = [&](const char* argument, const MaybeTensor& t, bool is_state) {
    if (!has(t)) return;
    TORCH_CHECK_VALUE((is_state ? t->dim() == 2 : t->dim() >= 2) && t->size(-2) % count_ == 0, name, ": ", argument,
                      ": expected ", is_state ? "2 dimensions, the first" : "2 or 3 dimensions, the last but one",
                      " a multiple of E = ", count_, ", got ", t->sizes());
  };
  check_sequences("h0", h0, true), check_sequences("c0", c0, true);
  check_sequences("recurrent_mask", recurrent_mask, true);
  check_sequences("zoneout_h", zoneout_h, false), check_sequences("zoneout_c", zoneout_c, false);
  if (has(lengths))
    TORCH_CHECK_VALUE(lengths->dim() == 1 && lengths->size(0) % count_ == 0, name,
                      ": lengths: expected 1 dimension, a multiple of E = ", count_, ", got ", lengths->sizes());
  if (has(resets))
    TORCH_CHECK_VALUE(resets->dim() == 2 && resets->size(1) % count_ == 0, name,
                      ": resets: expected 2 dimensions, the last a multiple of E = ", count_, ", got ",
                      resets->sizes());
  if (has(batch_sizes)) {
    TORCH_CHECK_TYPE(batch_sizes->scalar_type() == at::kLong, name, ": batch_sizes: expected int64, got ",
                     batch_sizes->scalar_type());
    TORCH_CHECK(batch_sizes->device().is_cpu(), name, ": batch_sizes: expected a CPU tensor, got one on ",
                batch_sizes->device());
    TORCH_CHECK_VALUE(batch_sizes->remainder(count_).eq(0).all().item<bool>(), name,
                      ": batch_sizes: expected multiples of E = ", count_);
    batch_sizes_ = batch_sizes->floor_divide(count_);
  }
  tensors_ = {input,     h0,        c0,      weight_ih, weight_hh,      bias_ih,   bias_hh,  weight_hr,
              weight_ch, weight_ln, lengths, resets,    recurrent_mask, zoneout_h, zoneout_c};
}

SavingOutputsAllC Members::forward(bool save, bool with_all_c) const {
  std::vector<SavingOutputsAllC> parts(count_);
  each(false, [&](int64_t e, Call call) { parts[e] = call.forward(save, with_all_c); });
  const auto join = [&](auto which, bool is_saved) {
    std::vector<Tensor> of_all;
    for (const SavingOutputsAllC& part : parts) of_all.push_back(std::get<which>(part));
    return !of_all[0].defined() ? Tensor() : is_saved ? at::cat(of_all) : interleave(of_all);
  };
  using std::integral_constant;
  return {join(integral_constant<size_t, 0>{}, false), join(integral_constant<size_t, 1>{}, false),
          join(integral_constant<size_t, 2>{}, false), join(integral_constant<size_t, 3>{}, true),
          join(integral_constant<size_t, 4>{}, true),  join(integral_constant<size_t, 5>{}, true),
          join(integral_constant<size_t, 6>{}, false)};
}

Gradients Members::backward(const MaybeTensor& grad_output, const MaybeTensor& grad_h_n, const MaybeTensor& grad_c_n,
                            const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                            const std::array<bool, kNumGradients>& needs, const MaybeTensor& grad_all_c) const {
  const auto check = [&](const char* argument, const MaybeTensor& t) {
    TORCH_CHECK_VALUE(!has(t) || t->dim() > 1, "rnnfast::", drivers().cells[index_].name, ": ", argument,
                      ": expected at least 2 dimensions, got ", t->sizes());
  };
  check("grad_output", grad_output), check("grad_h_n", grad_h_n);
  check("grad_c_n", grad_c_n), check("grad_all_c", grad_all_c);
  std::array<std::vector<Tensor>, kNumGradients> parts;
  for (auto& part : parts) part.resize(count_);
  // Where nothing is converted afterwards, members write the gradients of their weights to where they belong.
  std::array<Tensor, kNumGradients> joined;
  for (int i = kFirstWeight; i < kNumGradients; ++i) {
    const MaybeTensor& weight = tensors_[i];
    if (needs[i] && has(weight) && weight->scalar_type() == gates.scalar_type())
      joined[i] = empty(weight->sizes(), gates.options());
  }
  each(true, [&](int64_t e, Call call) {
    const auto saved = [&](const Tensor& t) {
      const int64_t rows = t.size(0) / count_;
      return t.narrow(0, e * rows, rows);
    };
    std::array<Tensor, kNumGradients> own;
    for (int i = kFirstWeight; i < kNumGradients; ++i)
      if (joined[i].defined()) own[i] = joined[i].select(0, e);
    const Gradients g =
        call.backward(every(grad_output, -2, e), every(grad_h_n, -2, e), every(grad_c_n, -2, e), saved(gates),
                      saved(cells), saved(hidden), needs, every(grad_all_c, -2, e), false, own);
    int i = 0;
    std::apply([&](const auto&... one) { ((parts[i++][e] = one), ...); }, g);
  });
  for (int i = 0; i < kNumGradients; ++i) {
    if (joined[i].defined()) continue;
    const bool exists = parts[i][0].dim() > 1 || parts[i][0].numel() > 0;
    joined[i] = !exists ? parts[i][0] : i < kFirstWeight ? interleave(parts[i]) : at::stack(parts[i]);
  }
  return std::apply([](const auto&... one) { return Gradients(one...); }, joined);
}

MaybeTensor Members::every(const MaybeTensor& t, int64_t dim, int64_t e) const {
  return has(t) ? MaybeTensor(t->slice(dim, e, std::nullopt, count_)) : std::nullopt;
}

Tensor Members::interleave(const std::vector<Tensor>& parts) {
  return parts[0].dim() > 1 ? at::stack(parts, -2).flatten(-3, -2) : parts[0];
}

template <typename F>
void Members::each(bool backward, const F& run) const {
  const auto& [input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch, weight_ln, lengths, resets,
               recurrent_mask, zoneout_h, zoneout_c] = tensors_;
  const auto member = [&](int64_t e) {
    const auto own = [e](const MaybeTensor& t) { return has(t) ? MaybeTensor(t->select(0, e)) : std::nullopt; };
    return Call(index_, *every(input, is_tokens_ ? -1 : -2, e), every(h0, 0, e), every(c0, 0, e),
                weight_ih->select(0, e), weight_hh->select(0, e), own(bias_ih), own(bias_hh), own(weight_hr),
                batch_sizes_, every(lengths, 0, e), every(resets, 1, e), reverse_, own(weight_ch),
                every(recurrent_mask, -2, e), every(zoneout_h, -2, e), every(zoneout_c, -2, e), own(weight_ln),
                recompute_);
  };
  const auto range = [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below;  // other threads do not know where this one stands
    for (int64_t e = begin; e < end; ++e) run(e, member(e));
  };
  if (!input->is_cpu()) {
    range(0, count_);
    return;
  }
  // Whether threads pay: as if the rows of all members were those of one.
  const CellInfo& cell = drivers().cells[index_];
  const int threads = at::get_num_threads();
  const int64_t features = is_tokens_ ? 1 : input->size(-1);
  Sizes size{};
  size.N = input->size(is_tokens_ ? -1 : -2);
  size.I = features, size.H = weight_ih->size(1) / cell.gates, size.P = weight_hh->size(2);
  size.R = input->numel() / std::max<int64_t>(features, 1);
  size.T = size.R / std::max<int64_t>(size.N, 1);
  const auto threads_of = [&] {
    return make_plan(size, cell, weight_ih->element_size(), threads, backward, false).threads;
  };
  const bool pays = threads_of() > 1;
  size.R /= count_, size.N /= count_;
  const bool one_suffices = count_ >= threads || threads_of() == 1;
  if (pays && one_suffices)
    at::parallel_for(0, count_, 1, range);
  else
    range(0, count_);
}

}  // namespace rnnfast
