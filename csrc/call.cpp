#include "call.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_native.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <type_traits>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef RNNFAST_CUDA
#include "cuda/binding.h"
#endif

namespace rnnfast {

Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty(sizes, options);
  // Without the dispatcher: its time counts in a call of a few microseconds.
  Tensor t = at::native::empty_cpu(sizes, options.dtype().toScalarType());
#ifdef __linux__
  constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr()), end = begin + t.nbytes();
  const uintptr_t first = (begin + kLargePage - 1) & ~(kLargePage - 1), last = end & ~(kLargePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
#endif
  return t;
}

Scratch::Scratch(int64_t elements, const at::TensorOptions& options)
    : bytes_(elements * static_cast<int64_t>(options.dtype().itemsize())) {
  // Tests have uninitialized memory filled, and want this filled too.
  keeps_ = options.device().is_cpu() && !(at::globalContext().deterministicAlgorithms() &&
                                          at::globalContext().deterministicFillUninitializedMemory());
  if (keeps_ && kept_.defined() && kept_.numel() >= bytes_) memory_ = std::move(kept_);
  if (keeps_) kept_ = Tensor();  // before there is more
  if (!memory_.defined()) memory_ = empty({bytes_}, options.dtype(at::kByte));
}
Scratch::~Scratch() {
  if (keeps_ && memory_.numel() <= kMostKept) kept_ = std::move(memory_);
}
thread_local Tensor Scratch::kept_;

namespace {

// The types of a driver.
template <typename Accumulating, typename Element>
struct Types {
  using T = Accumulating;
  using E = Element;
};

const DriverTable& drivers_of(const at::Device& device) {
#ifdef RNNFAST_CUDA
  if (device.is_cuda()) return cuda_drivers();
#endif
  return drivers();
}

#ifndef RNNFAST_CUDA
bool is_capturing() {
  return false;
}
#endif

// Memory of a tensor whose dtype is known to be that of E; Half and BFloat16 lie as torch's.
template <typename E>
const E* data(const Tensor& t) {
  return t.defined() ? static_cast<const E*>(t.const_data_ptr()) : nullptr;
}
template <typename E>
E* mutable_data(const Tensor& t) {
  return static_cast<E*>(t.mutable_data_ptr());
}
// Of tensors with unit stride in the last dimension.
template <typename E>
Rows<const E> view(const Tensor& t) {
  if (!t.defined()) return {nullptr, 0, 0};
  return {data<E>(t), t.dim() == 3 ? t.stride(0) : 0, t.stride(-2)};
}

}  // namespace

Call::Call(int index, RNNFAST_ARGUMENTS)
    : device_(input.device()),
      table_(drivers_of(device_)),
      cell_(table_.cells[index]),
      index_(index),
      reverse_(reverse),
      recompute_(recompute),
      is_tokens_(input.scalar_type() == at::kLong) {
  check_dtype_and_device(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr);
  TORCH_CHECK_NOT_IMPLEMENTED(!recompute || device_.is_cpu(), what("recompute"), "only on the CPU, got ", device_);
  TORCH_CHECK_VALUE(weight_ih.dim() == 2, what("weight_ih"), "expected 2 dimensions [G*H, I], got ", weight_ih.sizes());
  TORCH_CHECK_VALUE(weight_hh.dim() == 2, what("weight_hh"), "expected 2 dimensions [G*H, P], got ", weight_hh.sizes());
  const int64_t G = cell_.gates;
  TORCH_CHECK_VALUE(weight_ih.size(0) > 0 && weight_ih.size(0) % G == 0, what("weight_ih"),
                    "expected [G*H, I] with G = ", G, " and H at least 1, got ", weight_ih.sizes());
  size_.I = weight_ih.size(1);
  size_.H = weight_ih.size(0) / G;
  size_.P = has(weight_hr) && weight_hr->dim() == 2 ? weight_hr->size(0) : size_.H;
  if (is_tokens_) {
    check_tokens(input, has(batch_sizes));
    std::vector<int64_t> shape = input.sizes().vec();
    shape.push_back(size_.I);
    check_layout(input.unsqueeze(-1).expand(shape), batch_sizes, lengths, resets);  // for its shape alone
  } else {
    check_layout(input, batch_sizes, lengths, resets);
  }
  check_shape("weight_hh", weight_hh, {{"G*H", G * size_.H}, {"P", size_.P}});
  TORCH_CHECK_VALUE(has(bias_ih) == has(bias_hh), name(), ": bias_ih and bias_hh: expected both or neither, got only ",
                    has(bias_ih) ? "bias_ih" : "bias_hh");
  if (has(bias_ih)) check_shape("bias_ih", *bias_ih, {{"G*H", G * size_.H}});
  if (has(bias_hh)) check_shape("bias_hh", *bias_hh, {{"G*H", G * size_.H}});
  if (has(weight_hr)) {
    TORCH_CHECK_VALUE(cell_.has_cell, what("weight_hr"), "this cell has no projection; expected None");
    TORCH_CHECK_VALUE(weight_hr->dim() == 2 && weight_hr->size(0) > 0, what("weight_hr"),
                      "expected [P, H] with P at least 1, got ", weight_hr->sizes());
    check_shape("weight_hr", *weight_hr, {{"P", size_.P}, {"H", size_.H}});
  }
  if (has(h0)) check_shape("h0", *h0, {{"N", size_.N}, {"P", size_.P}});
  if (has(c0)) {
    TORCH_CHECK_VALUE(cell_.has_cell, what("c0"), "this cell has no second state; expected None");
    check_shape("c0", *c0, {{"N", size_.N}, {"H", size_.H}});
  }

  check_extras(weight_ih, weight_ch, recurrent_mask, zoneout_h, zoneout_c, weight_ln, has(weight_hr));

  dtype_ = weight_ih.scalar_type();
  compute_ = dtype_ == at::kDouble ? at::kDouble : at::kFloat;
  const bool is_native =
      !recompute && ((dtype_ == at::kHalf && table_.f16[index].forward) ||  // the states between parts are of compute_
                     (dtype_ == at::kBFloat16 && table_.bf16[index].forward));
  storage_ = is_native ? dtype_ : compute_;
  const bool has_kernels =
      compute_ == at::kDouble ? table_.f64[index].forward != nullptr : table_.f32[index].forward != nullptr;
  TORCH_CHECK(has_kernels, what("input"), "expected a tensor on the CPU: this cell has no kernels for ", device_);
  input_ = is_tokens_ ? input.contiguous() : rows(input);
  h0_ = dense(h0), c0_ = dense(c0);
  weight_ih_ = weight_ih, weight_hh_ = weight_hh, weight_hr_ = weight_hr.value_or(Tensor());
  bias_ih_ = bias_ih.value_or(Tensor()), bias_hh_ = bias_hh.value_or(Tensor());
  weight_ch_ = dense(weight_ch), weight_ln_ = dense(weight_ln), recurrent_mask_ = dense(recurrent_mask);
  if (has(zoneout_h)) zoneout_h_ = rows(*zoneout_h);
  if (has(zoneout_c)) zoneout_c_ = rows(*zoneout_c);
}

SavingOutputsAllC Call::forward(bool save, bool with_all_c) {
  if (is_tokens_ && !input_.is_cpu()) check_token_range(input_);
  std::vector<int64_t> shape = outer_;
  shape.push_back(size_.P);
  const auto options = input_.options().dtype(storage_), saved_options = options.dtype(compute_);
  const auto none = [](const at::TensorOptions& o) { return empty({0}, o); };  // outputs may not alias
  const auto steps_of = [&] { return lengths_.defined() ? at::zeros(shape, options) : empty(shape, options); };
  Tensor output = steps_of();
  Tensor all_c;
  if (with_all_c) shape.back() = size_.H, all_c = steps_of();
  Tensor h_n = empty({size_.N, size_.P}, options);
  Tensor c_n = cell_.has_cell ? empty({size_.N, size_.H}, options) : none(options);
  Tensor gates, cells, hidden;
  if (save) gates = none(saved_options), cells = none(saved_options), hidden = none(saved_options);
  if (save && recompute_) {
    const int64_t rows = (num_parts() - 1) * size_.N;
    if (cell_.has_cell) cells = empty({rows, size_.H}, saved_options);
    hidden = empty({rows, size_.P}, saved_options);
  } else if (save) {
    const int64_t block = 64 / c10::elementSize(compute_), steps = size_.T * size_.N;
    const auto saved = [&](int64_t units, int64_t slots) {
      return empty({is_packed_ ? size_.R : steps, (units + block - 1) / block * block * slots}, saved_options);
    };
    gates = saved(size_.H, cell_.slots);
    if (cell_.has_cell) cells = saved(size_.H, 1);
    if (saves_hidden()) hidden = saved(size_.P, 1);
  }
  fill_rows();
  const auto run = [&](auto types, const auto& driver) {
    using T = typename decltype(types)::T;
    using E = typename decltype(types)::E;
    const Tensor weight_hh = weight_hh_;
    const auto kept = driver.packed_weights ? find_prepacked(weight_hh) : nullptr;
    const Plan how = plan<E>(false, kept != nullptr);
    std::optional<PackedFrom> from;
    if (kept) from = packed_from(how);
    const bool has_packed = kept && kept->from && *kept->from == *from;
    take_weights(!has_packed);
    auto p = params<T, E>(how);
    Tensor packed;
    if (kept) packed = has_packed ? kept->memory : empty({driver.packed_weights(p)}, saved_options);
    if (kept) p.packed_weights = mutable_data<T>(packed), p.has_packed = has_packed;
    p.training = save && !recompute_;
    p.output = {mutable_data<E>(output), size_.N * size_.P, size_.P};
    p.h_n = mutable_data<E>(h_n);
    p.c_n = cell_.has_cell ? mutable_data<E>(c_n) : nullptr;
    if (with_all_c) p.all_c = {mutable_data<E>(all_c), size_.N * size_.H, size_.H};
    set_saved(p, gates, cells, hidden);
    run_driver(p, driver.forward_scratch, [&](const SequenceParams<T, E>& all) {
      if constexpr (std::is_same_v<T, E>)
        if (save && recompute_) return forward_in_parts(all, driver, cells, hidden);
      driver.forward(all);
    });
    if (kept && !has_packed) keep_prepacked(weight_hh, std::move(*from), std::move(packed));
  };
  dispatch(run);
  if (with_all_c) all_c = as(all_c, dtype_);
  return {as(output, dtype_), as(h_n, dtype_), as(c_n, dtype_), gates, cells, hidden, all_c};
}

const Tensor& Call::step(const Tensor& input, bool packs) {
  const bool is_first = !output_.defined();
  if (is_first) {
    const auto options = input_.options().dtype(storage_);
    const auto own = [&](const Tensor& t, int64_t units) {
      return t.defined() ? t.clone() : at::zeros({size_.N, units}, options);
    };
    h0_ = own(h0_, size_.P);
    if (cell_.has_cell) c0_ = own(c0_, size_.H);
    output_ = at::empty({1, size_.N, size_.P}, options);
    fill_rows();
    take_weights(true);
  }
  if (is_tokens_) check_tokens(input, false);
  TORCH_CHECK_VALUE(input.scalar_type() == (is_tokens_ ? at::kLong : dtype_) && input.dim() == (is_tokens_ ? 2 : 3) &&
                        input.size(0) == 1 && input.size(1) == size_.N && (is_tokens_ || input.size(2) == size_.I),
                    what("input"), "expected a step of the shape and dtype of the first, got ", input.scalar_type(),
                    " ", input.sizes());
  input_ = is_tokens_ ? input.contiguous() : rows(input);
  dispatch([&](auto types, const auto& driver) {
    using T = typename decltype(types)::T;
    using E = typename decltype(types)::E;
    if (is_first) step_plan_ = plan<E>(false, packs), step_plan_.packed = packs, step_plan_.packs_columns = is_tokens_;
    auto p = params<T, E>(step_plan_);  // what the scratch holds was made for it
    p.turned = step_is_turned_ = !step_is_turned_;
    p.is_first_part = is_first;
    p.output = {mutable_data<E>(output_), size_.N * size_.P, size_.P};
    p.h_n = mutable_data<E>(h0_);  // the driver reads the old state before it writes the new one
    p.c_n = cell_.has_cell ? mutable_data<E>(c0_) : nullptr;
    if (is_first) scratch_ = empty({driver.forward_scratch(p)}, output_.options().dtype(compute_));
    p.scratch = mutable_data<T>(scratch_);
    driver.forward(p);
  });
  if (packs) weight_ih_ = weight_hh_ = Tensor();
  if (dtype_ == storage_) return output_;
  h0_.copy_(h0_.to(dtype_));  // between steps the state has the precision of its dtype
  if (cell_.has_cell) c0_.copy_(c0_.to(dtype_));
  return result_ = output_.to(dtype_);
}

void Call::set_state(const MaybeTensor& h, const MaybeTensor& c) {
  const auto set = [](Tensor& to, const MaybeTensor& from) { has(from) ? to.copy_(*from) : to.zero_(); };
  set(h0_, h);
  if (cell_.has_cell) set(c0_, c);
}

void Call::reset(const bool* where) {
  for (int64_t n = 0; n < size_.N; ++n) {
    if (!where[n]) continue;
    h0_.select(0, n).zero_();
    if (cell_.has_cell) c0_.select(0, n).zero_();
  }
}

Gradients Call::backward(const MaybeTensor& grad_output, const MaybeTensor& grad_h_n, const MaybeTensor& grad_c_n,
                         const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                         const std::array<bool, kNumGradients>& needs, const MaybeTensor& grad_all_c, bool factors,
                         const std::array<Tensor, kNumGradients>& targets) {
  const Sizes& z = size_;
  const int64_t GH = cell_.gates * z.H;
  const auto check_gradient = [&](const char* argument, const MaybeTensor& t, std::vector<Dim> dims) {
    if (!has(t)) return;
    TORCH_CHECK_TYPE(t->scalar_type() == dtype_, what(argument), "expected ", dtype_, ", got ", t->scalar_type());
    check_device(argument, *t);
    check_shape(argument, *t, dims);
  };
  std::vector<Dim> output_dims = outer_dims_;
  output_dims.push_back({"P", z.P});
  check_gradient("grad_output", grad_output, output_dims);
  check_gradient("grad_h_n", grad_h_n, {{"N", z.N}, {"P", z.P}});
  if (cell_.has_cell) check_gradient("grad_c_n", grad_c_n, {{"N", z.N}, {"H", z.H}});
  TORCH_CHECK_VALUE(cell_.has_cell || !has(grad_all_c), what("grad_all_c"),
                    "this cell has no second state; expected None");
  output_dims.back() = {"H", z.H};
  check_gradient("grad_all_c", grad_all_c, output_dims);
  const int64_t block = 64 / c10::elementSize(compute_), saved_rows = is_packed_ ? z.R : z.T * z.N;
  const auto check_saved = [&](const char* argument, const Tensor& t, bool kept, int64_t units, int64_t slots) {
    const int64_t count = !kept        ? 0
                          : recompute_ ? (num_parts() - 1) * z.N * units
                                       : saved_rows * ((units + block - 1) / block * block) * slots;
    TORCH_CHECK_VALUE(
        t.scalar_type() == compute_ && t.is_contiguous() && t.device() == input_.device() && t.numel() == count,
        what(argument), "expected what _", cell_.name, "_forward returned, ", count, " elements of ", compute_,
        ", got ", t.scalar_type(), " of shape ", t.sizes());
  };
  check_saved("gates", gates, !recompute_, z.H, cell_.slots);
  check_saved("cells", cells, cell_.has_cell, z.H, 1);
  check_saved("hidden", hidden, recompute_ || saves_hidden(), z.P, 1);

  const auto options = input_.options().dtype(storage_);
  std::vector<int64_t> input_shape = outer_;
  input_shape.push_back(z.I);
  const auto wanted = [&](int i, bool exists, at::IntArrayRef shape) {
    if (targets[i].defined()) return targets[i];
    return empty(needs[i] && exists && !(factors && i >= kFirstWeight) ? shape : at::IntArrayRef{0}, options);
  };
  std::array<Tensor, kNumGradients> grad = {
      needs[0] && !is_tokens_ && lengths_.defined() ? at::zeros(input_shape, options)
                                                    : wanted(0, !is_tokens_, input_shape),
      wanted(1, true, {z.N, z.P}),
      wanted(2, cell_.has_cell, {z.N, z.H}),
      wanted(3, true, {GH, z.I}),
      wanted(4, true, {GH, z.P}),
      wanted(5, bias_ih_.defined(), {GH}),
      wanted(6, bias_ih_.defined(), {GH}),
      wanted(7, weight_hr_.defined(), {z.P, z.H}),
      wanted(8, weight_ch_.defined(), {cell_.peepholes * z.H}),
      wanted(9, weight_ln_.defined(), {cell_.norm_vectors * z.H}),
  };
  if (factors) {
    const bool is_projected = weight_hr_.defined();
    const std::array<int64_t, kNumFactors> units = {GH, GH, z.P, is_projected ? z.P : 0, is_projected ? z.H : 0};
    for (size_t i = 0; i < units.size(); ++i) {
      std::vector<int64_t> shape = outer_;
      shape.push_back(units[i]);
      const auto wide = options.dtype(compute_);
      grad[kFirstWeight + i] = lengths_.defined() ? at::zeros(shape, wide) : empty(shape, wide);
    }
  }
  fill_rows();
  take_weights(true);
  const Tensor doutput = has(grad_output) ? rows(*grad_output) : Tensor();
  const Tensor dall_c = has(grad_all_c) ? rows(*grad_all_c) : Tensor();
  const Tensor dh_n = dense(grad_h_n), dc_n = cell_.has_cell ? dense(grad_c_n) : Tensor();
  const auto run = [&](auto types, const auto& driver) {
    using T = typename decltype(types)::T;
    using E = typename decltype(types)::E;
    auto p = params<T, E>(plan<E>(true, false));
    if (!recompute_) set_saved(p, gates, cells, hidden);
    p.doutput = view<E>(doutput);
    p.dall_c = view<E>(dall_c);
    p.dh_n = data<E>(dh_n), p.dc_n = data<E>(dc_n);
    const auto target = [&](int i, bool exists) { return needs[i] && exists ? mutable_data<E>(grad[i]) : nullptr; };
    p.dinput = {target(0, !is_tokens_), z.N * z.I, z.I};
    p.dh0 = target(1, true), p.dc0 = target(2, cell_.has_cell);
    if (factors) {
      Rows<T>* rows[] = {&p.dgates_ih, &p.dgates_hh, &p.h_prev, &p.dprojected, &p.h_raw};
      for (int i = 0; i < kNumFactors; ++i) {
        Tensor& t = grad[kFirstWeight + i];
        *rows[i] = {mutable_data<T>(t), z.N * t.size(-1), t.size(-1)};
      }
    } else {
      p.dw_ih = target(3, true), p.dw_hh = target(4, true);
      p.db_ih = target(5, bias_ih_.defined()), p.db_hh = target(6, bias_ih_.defined());
      p.dw_hr = target(7, weight_hr_.defined());
      p.dw_ch = target(8, weight_ch_.defined()), p.dw_ln = target(9, weight_ln_.defined());
    }
    if constexpr (std::is_same_v<T, E>)
      if (recompute_) return backward_in_parts(p, driver, cells, hidden);
    run_driver(p, driver.backward_scratch, driver.backward);
  };
  dispatch(run);
  for (int i = 0; i < (factors ? kFirstWeight : kNumGradients); ++i) grad[i] = as(grad[i], dtype_);
  return std::apply([&](auto&... g) { return Gradients(g...); }, grad);
}

bool Call::saves_hidden() const {
  return cell_.saves_hidden || weight_hr_.defined() || zoneout_h_.defined() || zoneout_c_.defined();
}

void Call::check_token_range(const Tensor& tokens) const {
  const auto check = [&](int64_t token) {
    TORCH_CHECK_INDEX(token >= 0 && token < size_.I, what("input"), "expected tokens from 0 to ", size_.I - 1,
                      ", the columns of weight_ih, got ", token);
  };
  if (device_.is_cpu()) {
    const int64_t* token = tokens.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < tokens.numel(); ++i) check(token[i]);
  } else if (tokens.numel() > 0 && !is_capturing()) {
    const auto [least, most] = at::aminmax(tokens);
    const Tensor both = at::stack({least, most}).cpu();
    check(both[0].item<int64_t>()), check(both[1].item<int64_t>());
  }
}

void Call::fill_rows() {
  active_.assign(size_.T, size_.N);
  if (is_packed_) std::copy_n(batch_sizes_.const_data_ptr<int64_t>(), size_.T, active_.begin());
  if (lengths_.defined()) {
    const int64_t* l = lengths_.const_data_ptr<int64_t>();
    order_.resize(size_.N);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [l](int64_t a, int64_t b) { return l[a] > l[b]; });
    int64_t n = size_.N;
    for (int64_t t = 0; t < size_.T; ++t) {
      while (n > 0 && l[order_[n - 1]] <= t) --n;
      active_[t] = n;
    }
  }
  first_row_.resize(size_.T);
  size_.R = 0;
  for (int64_t t = 0; t < size_.T; ++t) first_row_[t] = size_.R, size_.R += active_[t];

  if (device_.is_cpu() || !(is_packed_ || lengths_.defined())) return;
  // A captured graph would copy again and again from memory that is ours for this call only.
  TORCH_CHECK(!is_capturing(), what(is_packed_ ? "batch_sizes" : "lengths"),
              "expected None while a CUDA graph is captured: their values are read on the host");
  // The copy is in the order of the stream: torch keeps the pinned memory until it is done, and ours on the device is
  // used again by later work only.
  const Tensor pinned =
      at::empty({is_packed_ ? 2 * size_.T : size_.N}, at::TensorOptions(at::kLong).pinned_memory(true));
  int64_t* numbers = pinned.mutable_data_ptr<int64_t>();
  if (is_packed_)
    std::copy(first_row_.begin(), first_row_.end(), std::copy(active_.begin(), active_.end(), numbers));
  else
    std::copy_n(lengths_.const_data_ptr<int64_t>(), size_.N, numbers);
  on_device_ = pinned.to(device_, at::kLong, /*non_blocking=*/true);
}

Tensor Call::rows(const Tensor& t) const {
  const Tensor stored = as(t, storage_);
  return stored.size(-1) > 1 && stored.stride(-1) != 1 ? stored.contiguous() : stored;
}

void Call::take_weights(bool with_matrices) {
  const auto take = [&](Tensor& t) { t = t.defined() ? dense(t) : t; };
  take(bias_ih_), take(bias_hh_);
  if (!with_matrices) {
    weight_ih_ = weight_hh_ = Tensor();  // of weight_hr_ drivers ask whether there is one
    return;
  }
  take(weight_ih_), take(weight_hh_), take(weight_hr_);
}

template <typename E>
Plan Call::plan(bool backward, bool keeps_weights) const {
  Sizes work = size_;
  if (is_tokens_) work.I = 1;  // a look-up, whatever the vocabulary
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  return make_plan(work, cell_, sizeof(E), threads, backward, keeps_weights);
}

PackedFrom Call::packed_from(const Plan& plan) const {
  const auto now = [](const Tensor& t) { return WeightVersion(t); };
  const int unit_threads = plan.schedule == Schedule::kUnits ? plan.threads : 1;
  return {&table_,
          index_,
          unit_threads,
          storage_,
          {now(weight_ih_), now(weight_hh_), now(weight_hr_), now(bias_ih_), now(bias_hh_)}};
}

template <typename T, typename E>
SequenceParams<T, E> Call::params(const Plan& plan) const {
  SequenceParams<T, E> p{};
  p.size = size_;
  p.plan = plan;
  p.reverse = reverse_;
  p.is_first_part = p.is_last_part = true;
  static thread_local bool turned = false;  // a loop over a layer calls it step by step; it changes no number
  p.turned = turned = !turned;
  p.is_packed = is_packed_;
  p.parallel_for = [](int64_t n, int threads, void* context, void (*body)(void*, int64_t, int64_t)) {
    at::parallel_for(0, n, (n + threads - 1) / threads, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  p.active = active_.data();
  p.first_row = first_row_.data();
  p.order = order_.empty() ? nullptr : order_.data();
  p.resets = resets_.defined() ? resets_.const_data_ptr<bool>() : nullptr;
  if (is_tokens_)
    p.tokens = {input_.const_data_ptr<int64_t>(), size_.N, 1};
  else
    p.input = view<E>(input_);
  p.h0 = data<E>(h0_), p.c0 = data<E>(c0_);
  p.w_ih = data<E>(weight_ih_), p.w_hh = data<E>(weight_hh_);
  p.b_ih = data<E>(bias_ih_), p.b_hh = data<E>(bias_hh_), p.w_hr = data<E>(weight_hr_);
  p.w_ch = data<E>(weight_ch_), p.w_ln = data<E>(weight_ln_), p.recurrent_mask = data<E>(recurrent_mask_);
  p.keep_h = view<E>(zoneout_h_), p.keep_c = view<E>(zoneout_c_);

  const int64_t* on_device = data<int64_t>(on_device_);
  if (is_packed_) {
    p.device.active = on_device ? on_device : active_.data();
    p.device.first_row = on_device ? on_device + size_.T : first_row_.data();
  } else if (lengths_.defined()) {
    p.device.lengths = on_device ? on_device : lengths_.const_data_ptr<int64_t>();
  }
  return p;
}

template <typename T, typename E>
void Call::set_saved(SequenceParams<T, E>& p, const Tensor& gates, const Tensor& cells, const Tensor& hidden) {
  const auto saved = [](const Tensor& t) { return t.defined() && t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr; };
  p.gates = saved(gates), p.cells = saved(cells), p.hidden = saved(hidden);
}

template <typename T, typename E, typename Size, typename Run>
void Call::run_driver(SequenceParams<T, E>& p, Size scratch_size, Run run) const {
#ifdef RNNFAST_CUDA
  std::optional<CudaDevice> device;
  if (device_.is_cuda()) device.emplace(storage_, p.device);
#endif
  const Scratch scratch(scratch_size(p), input_.options().dtype(compute_));
  p.scratch = scratch.data<T>();
  run(p);
}

template <typename Run>
void Call::dispatch(const Run& run) const {
  if (storage_ == at::kDouble)
    run(Types<double, double>{}, table_.f64[index_]);
  else if (storage_ == at::kFloat)
    run(Types<float, float>{}, table_.f32[index_]);
  else if (storage_ == at::kHalf)
    run(Types<float, Half>{}, table_.f16[index_]);
  else
    run(Types<float, BFloat16>{}, table_.bf16[index_]);
}

int64_t Call::part_steps() const {
  // Few steps keep little, but each part must have rows for its products. registrations.py computes it too.
  constexpr int64_t kSteps = 8, kRows = 512;
  return std::max(kSteps, kRows / std::max<int64_t>(size_.N, 1));
}

template <typename T>
SequenceParams<T> Call::part(SequenceParams<T> p, int64_t i) const {
  const int64_t at = reverse_ ? num_parts() - 1 - i : i;
  const int64_t t0 = at * part_steps(), t1 = std::min(t0 + part_steps(), size_.T);
  p.size.T = t1 - t0;
  p.size.R = first_row_[t1 - 1] + active_[t1 - 1] - first_row_[t0];
  p.has_step_after = t1 < size_.T;
  p.active += t0, p.first_row += t0;
  if (p.resets) p.resets += t0 * size_.N;
  const auto begin_at = [&](auto&... rows) { ((rows.data = rows.data ? rows.data + t0 * rows.step : nullptr), ...); };
  if (!is_packed_)  // else first_row says it
    begin_at(p.input, p.tokens, p.keep_h, p.keep_c, p.output, p.all_c, p.doutput, p.dall_c, p.dinput, p.dgates_ih,
             p.dgates_hh, p.h_prev, p.dprojected, p.h_raw);
  return p;
}

template <typename T>
T* Call::after_part(const Tensor& states, int64_t i) const {
  return states.numel() ? static_cast<T*>(states.data_ptr()) + i * size_.N * states.size(-1) : nullptr;
}

template <typename T>
void Call::forward_in_parts(const SequenceParams<T>& p, const Driver<T>& driver, const Tensor& cells,
                            const Tensor& hidden) const {
  for (int64_t i = 0, count = num_parts(); i < count; ++i) {
    SequenceParams<T> one = part(p, i);
    if (i > 0) one.h0 = after_part<T>(hidden, i - 1), one.c0 = after_part<T>(cells, i - 1);
    if (i + 1 < count) one.h_n = after_part<T>(hidden, i), one.c_n = after_part<T>(cells, i);
    one.is_first_part = i == 0;
    driver.forward(one);
  }
}

template <typename T>
void Call::backward_in_parts(const SequenceParams<T>& p, const Driver<T>& driver, const Tensor& cells,
                             const Tensor& hidden) const {
  const auto options = input_.options().dtype(compute_);
  const int64_t count = num_parts();
  SequenceParams<T> backward = p, forward = params<T, T>(plan<T>(false, false));
  backward.is_first_part = backward.is_last_part = count == 1;  // of every part, as far as the scratch depends on it
  backward.plan.chunk_steps = std::min(backward.plan.chunk_steps, part_steps());
  forward.training = true;
  const auto pad = [](int64_t units) { return (units + kBlock<T> - 1) / kBlock<T> * kBlock<T>; };
  const int64_t rows = std::min(part_steps(), size_.T) * size_.N;
  // Of several parts both hold rearranged weights from part to part.
  const int64_t own[] = {driver.backward_scratch(backward), driver.forward_scratch(forward)};
  const int64_t sizes[] = {count == 1 ? std::max(own[0], own[1]) : own[0] + own[1], rows * pad(size_.H) * cell_.slots,
                           cell_.has_cell ? rows * pad(size_.H) : 0, saves_hidden() ? rows * pad(size_.P) : 0};
  const Scratch scratch(std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0}), options);
  backward.scratch = scratch.data<T>();
  forward.scratch = backward.scratch + (count == 1 ? 0 : own[0]);
  forward.gates = backward.scratch + sizes[0];
  forward.cells = forward.gates + sizes[1];
  forward.hidden = saves_hidden() ? forward.cells + sizes[2] : nullptr;
  backward.gates = forward.gates, backward.cells = forward.cells, backward.hidden = forward.hidden;

  // The gradient of the state, from part to part.
  const Tensor dh = count > 1 ? at::empty({size_.N, size_.P}, options) : Tensor();
  const Tensor dc = count > 1 && cell_.has_cell ? at::empty({size_.N, size_.H}, options) : Tensor();
  const auto memory = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
  for (int64_t i = count - 1; i >= 0; --i) {
    SequenceParams<T> again = part(forward, i), one = part(backward, i);
    if (i > 0) again.h0 = after_part<T>(hidden, i - 1), again.c0 = after_part<T>(cells, i - 1);
    one.h0 = again.h0, one.c0 = again.c0;
    if (i + 1 < count) one.dh_n = memory(dh), one.dc_n = memory(dc);
    if (i > 0) one.dh0 = memory(dh), one.dc0 = memory(dc);
    again.is_first_part = one.is_first_part = i + 1 == count;
    one.is_last_part = i == 0;
    driver.forward(again);
    driver.backward(one);
  }
}

}  // namespace rnnfast
