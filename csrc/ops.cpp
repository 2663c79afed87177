// The operators torch.ops.rnnfast.*: schemas, the one set of checks, allocation and autograd. at::Tensor ends here.
//
// For each cell four operators share one schema of inputs: `<cell>` (differentiable), `_<cell>_forward` (also returns
// what backward needs), `_<cell>_backward` and `_<cell>_backward_factors` (per-sample gradients are made from these;
// not for cells with late gates or peepholes, whose gradients are not such products).
// One call is one layer in one direction over all steps. A cell with c has the first two once more, `<cell>_all_c` and
// `_<cell>_all_c_forward`, which also return c of all steps. Fake kernels, the double backward and torch.func's
// transforms are registered from Python (ops.py).
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "sequence.h"
#include "step.h"

namespace rnnfast {
namespace {

using at::Tensor;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;

// The arguments every operator starts with; shapes as checked by Call.
#define RNNFAST_ARGUMENTS                                                                                              \
  const Tensor &input, const MaybeTensor &h0, const MaybeTensor &c0, const Tensor &weight_ih, const Tensor &weight_hh, \
      const MaybeTensor &bias_ih, const MaybeTensor &bias_hh, const MaybeTensor &weight_hr,                            \
      const MaybeTensor &batch_sizes, const MaybeTensor &lengths, const MaybeTensor &resets, bool reverse,             \
      const MaybeTensor &weight_ch, const MaybeTensor &recurrent_mask, const MaybeTensor &zoneout_h,                   \
      const MaybeTensor &zoneout_c
#define RNNFAST_PASS                                                                                                  \
  input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, lengths, resets, reverse, weight_ch, \
      recurrent_mask, zoneout_h, zoneout_c

constexpr const char* kSchemaArguments =
    "Tensor input, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    "Tensor? weight_hr, Tensor? batch_sizes=None, Tensor? lengths=None, Tensor? resets=None, bool reverse=False, "
    "Tensor? weight_ch=None, Tensor? recurrent_mask=None, Tensor? zoneout_h=None, Tensor? zoneout_c=None";
constexpr int kNumGradients = 9;  // input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch
constexpr int kFirstWeight = 3, kNumFactors = 5;

using Outputs = std::tuple<Tensor, Tensor, Tensor>;                                // output, h_n, c_n
using SavingOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // ... gates, cells, hidden
using OutputsAllC = std::tuple<Tensor, Tensor, Tensor, Tensor>;                    // ... all_c
using SavingOutputsAllC = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Factors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

bool has_factors(const CellInfo& cell) {
  return cell.late_gates == 0 && cell.peepholes == 0;
}

bool has(const MaybeTensor& t) {
  return t.has_value() && t->defined();
}

// Memory for many weights or steps. Large pieces ask for large pages: reading weights of more than a few megabytes
// panel by panel is a third slower with 4 KiB pages.
Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor t = at::empty(sizes, options);
#ifdef __linux__
  constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr()), end = begin + t.nbytes();
  const uintptr_t first = (begin + kLargePage - 1) & ~(kLargePage - 1), last = end & ~(kLargePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
#endif
  return t;
}

// Scratch of a call. Each thread that calls keeps its last one for the next call, up to kMostKept bytes: memory fresh
// from the system is zeroed page by page, which can take as long as the call.
class Scratch {
 public:
  Scratch(int64_t elements, const at::TensorOptions& options)
      : bytes_(elements * static_cast<int64_t>(options.dtype().itemsize())) {
    // Tests have uninitialized memory filled, and want this filled too.
    keeps_ =
        !(at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory());
    if (keeps_ && kept_.defined() && kept_.numel() >= bytes_)
      memory_ = std::move(kept_);
    else
      memory_ = empty({bytes_}, options.dtype(at::kByte));
    kept_ = Tensor();
  }
  ~Scratch() {
    if (keeps_ && memory_.numel() <= kMostKept) kept_ = std::move(memory_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(memory_.mutable_data_ptr<uint8_t>());
  }

 private:
  static constexpr int64_t kMostKept = int64_t{1} << 27;
  static thread_local Tensor kept_;
  int64_t bytes_;
  bool keeps_;
  Tensor memory_;
};
thread_local Tensor Scratch::kept_;

// ---- checks and layout ----

struct Dim {
  const char* letter;
  int64_t size;
};

// One call, checked: sizes, the rows of every step, and tensors ready for the driver. An int64 input holds tokens, [T,
// N] (packed [rows], one step [N]): each stands for the one-hot row of I numbers, which is never made.
class Call {
 public:
  Call(int index, RNNFAST_ARGUMENTS)
      : cell_(drivers().cells[index]), index_(index), reverse_(reverse), is_tokens_(input.scalar_type() == at::kLong) {
    check_dtype_and_device(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr);
    TORCH_CHECK_VALUE(weight_ih.dim() == 2, what("weight_ih"), "expected 2 dimensions [G*H, I], got ",
                      weight_ih.sizes());
    TORCH_CHECK_VALUE(weight_hh.dim() == 2, what("weight_hh"), "expected 2 dimensions [G*H, P], got ",
                      weight_hh.sizes());
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
    TORCH_CHECK_VALUE(has(bias_ih) == has(bias_hh), name(),
                      ": bias_ih and bias_hh: expected both or neither, got only ",
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

    check_extras(weight_ih, weight_ch, recurrent_mask, zoneout_h, zoneout_c, has(weight_hr));

    dtype_ = weight_ih.scalar_type();
    compute_ = dtype_ == at::kDouble ? at::kDouble : at::kFloat;
    input_ = is_tokens_ ? input.contiguous() : rows(input);
    h0_ = dense(h0), c0_ = dense(c0);
    weight_ih_ = dense(weight_ih), weight_hh_ = dense(weight_hh);
    bias_ih_ = dense(bias_ih), bias_hh_ = dense(bias_hh), weight_hr_ = dense(weight_hr);
    weight_ch_ = dense(weight_ch), recurrent_mask_ = dense(recurrent_mask);
    if (has(zoneout_h)) zoneout_h_ = rows(*zoneout_h);
    if (has(zoneout_c)) zoneout_c_ = rows(*zoneout_c);
  }

  // The last result, all_c, is there only where it is asked for.
  SavingOutputsAllC forward(bool save, bool with_all_c) {
    std::vector<int64_t> shape = outer_;
    shape.push_back(size_.P);
    const auto options = input_.options().dtype(compute_);
    const auto none = [&] { return at::empty({0}, options); };  // outputs may not alias: a new one each time
    const auto steps_of = [&] { return lengths_.defined() ? at::zeros(shape, options) : empty(shape, options); };
    Tensor output = steps_of();
    Tensor all_c;
    if (with_all_c) shape.back() = size_.H, all_c = steps_of();
    Tensor h_n = at::empty({size_.N, size_.P}, options);
    Tensor c_n = cell_.has_cell ? at::empty({size_.N, size_.H}, options) : none();
    Tensor gates = none(), cells = none(), hidden = none();
    if (save) {
      const int64_t block = 64 / c10::elementSize(compute_), steps = size_.T * size_.N;
      const auto saved = [&](int64_t units, int64_t slots) {
        return empty({is_packed_ ? size_.R : steps, (units + block - 1) / block * block * slots}, options);
      };
      gates = saved(size_.H, cell_.slots);
      if (cell_.has_cell) cells = saved(size_.H, 1);
      if (saves_hidden()) hidden = saved(size_.P, 1);
    }
    fill_rows();
    const auto run = [&](auto zero, const auto& driver) {
      using T = decltype(zero);
      SequenceParams<T> p = params<T>(false);
      p.training = save;
      p.output = {output.mutable_data_ptr<T>(), size_.N * size_.P, size_.P};
      p.h_n = h_n.mutable_data_ptr<T>();
      p.c_n = cell_.has_cell ? c_n.mutable_data_ptr<T>() : nullptr;
      if (with_all_c) p.all_c = {all_c.mutable_data_ptr<T>(), size_.N * size_.H, size_.H};
      set_saved(p, gates, cells, hidden);
      run_driver(p, driver.forward_scratch, driver.forward);
    };
    dispatch(run);
    if (with_all_c) all_c = all_c.to(dtype_);
    return {output.to(dtype_), h_n.to(dtype_), c_n.to(dtype_), gates, cells, hidden, all_c};
  }

  // The call once more, for a single step, from where it left the state: what Stepper promises. The first time it makes
  // the memory that all of them use.
  Tensor step(const Tensor& input) {
    if (!output_.defined()) {
      const auto options = input_.options().dtype(compute_);
      const auto own = [&](const Tensor& t, int64_t units) {
        return t.defined() ? t.clone() : at::zeros({size_.N, units}, options);
      };
      h0_ = own(h0_, size_.P);
      if (cell_.has_cell) c0_ = own(c0_, size_.H);
      output_ = at::empty({1, size_.N, size_.P}, options);
      fill_rows();
    }
    if (is_tokens_) check_tokens(input, false);
    TORCH_CHECK_VALUE(input.scalar_type() == (is_tokens_ ? at::kLong : dtype_) && input.dim() == (is_tokens_ ? 2 : 3) &&
                          input.size(0) == 1 && input.size(1) == size_.N && (is_tokens_ || input.size(2) == size_.I),
                      what("input"), "expected a step of the shape and dtype of the first, got ", input.scalar_type(),
                      " ", input.sizes());
    input_ = is_tokens_ ? input.contiguous() : rows(input);
    dispatch([&](auto zero, const auto& driver) {
      using T = decltype(zero);
      SequenceParams<T> p = params<T>(false);
      p.output = {output_.mutable_data_ptr<T>(), size_.N * size_.P, size_.P};
      p.h_n = h0_.mutable_data_ptr<T>();  // the driver reads the old state before it writes the new one
      p.c_n = cell_.has_cell ? c0_.mutable_data_ptr<T>() : nullptr;
      if (!scratch_.defined()) scratch_ = empty({driver.forward_scratch(p)}, output_.options());
      p.scratch = scratch_.mutable_data_ptr<T>();
      driver.forward(p);
    });
    if (dtype_ == compute_) return output_;
    h0_.copy_(h0_.to(dtype_));  // between steps the state has the precision of its dtype
    if (cell_.has_cell) c0_.copy_(c0_.to(dtype_));
    return output_.to(dtype_);
  }
  Tensor last_h() const { return h0_.to(dtype_); }
  Tensor last_c() const { return cell_.has_cell ? c0_.to(dtype_) : Tensor(); }

  // With `factors` the five weight gradients are replaced by dgates_ih, dgates_hh, h_prev, dprojected and h_raw of
  // SequenceParams, in the accumulating dtype, shaped as output but for the last dimension. Gradients go to `targets`
  // where there is one: contiguous, of the accumulating dtype.
  Gradients backward(const MaybeTensor& grad_output, const MaybeTensor& grad_h_n, const MaybeTensor& grad_c_n,
                     const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                     const std::array<bool, kNumGradients>& needs, const MaybeTensor& grad_all_c, bool factors,
                     const std::array<Tensor, kNumGradients>& targets = {}) {
    const Sizes& z = size_;
    const int64_t GH = cell_.gates * z.H;
    const auto check_gradient = [&](const char* argument, const MaybeTensor& t, std::vector<Dim> dims) {
      if (!has(t)) return;
      TORCH_CHECK_TYPE(t->scalar_type() == dtype_, what(argument), "expected ", dtype_, ", got ", t->scalar_type());
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
      const int64_t count = kept ? saved_rows * ((units + block - 1) / block * block) * slots : 0;
      TORCH_CHECK_VALUE(
          t.scalar_type() == compute_ && t.is_contiguous() && t.device() == input_.device() && t.numel() == count,
          what(argument), "expected what _", cell_.name, "_forward returned, ", count, " elements of ", compute_,
          ", got ", t.scalar_type(), " of shape ", t.sizes());
    };
    check_saved("gates", gates, true, z.H, cell_.slots);
    check_saved("cells", cells, cell_.has_cell, z.H, 1);
    check_saved("hidden", hidden, saves_hidden(), z.P, 1);

    const auto options = input_.options().dtype(compute_);
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
    };
    if (factors) {
      const bool is_projected = weight_hr_.defined();
      const std::array<int64_t, kNumFactors> units = {GH, GH, z.P, is_projected ? z.P : 0, is_projected ? z.H : 0};
      for (size_t i = 0; i < units.size(); ++i) {
        std::vector<int64_t> shape = outer_;
        shape.push_back(units[i]);
        grad[kFirstWeight + i] = lengths_.defined() ? at::zeros(shape, options) : empty(shape, options);
      }
    }
    fill_rows();
    const Tensor doutput = has(grad_output) ? rows(*grad_output) : Tensor();
    const Tensor dall_c = has(grad_all_c) ? rows(*grad_all_c) : Tensor();
    const Tensor dh_n = dense(grad_h_n), dc_n = cell_.has_cell ? dense(grad_c_n) : Tensor();
    const auto run = [&](auto zero, const auto& driver) {
      using T = decltype(zero);
      SequenceParams<T> p = params<T>(true);
      set_saved(p, gates, cells, hidden);
      p.doutput = view<T>(doutput);
      p.dall_c = view<T>(dall_c);
      p.dh_n = data<T>(dh_n), p.dc_n = data<T>(dc_n);
      const auto target = [&](int i, bool exists) {
        return needs[i] && exists ? grad[i].template mutable_data_ptr<T>() : nullptr;
      };
      p.dinput = {target(0, !is_tokens_), z.N * z.I, z.I};
      p.dh0 = target(1, true), p.dc0 = target(2, cell_.has_cell);
      if (factors) {
        Rows<T>* rows[] = {&p.dgates_ih, &p.dgates_hh, &p.h_prev, &p.dprojected, &p.h_raw};
        for (int i = 0; i < kNumFactors; ++i) {
          Tensor& t = grad[kFirstWeight + i];
          *rows[i] = {t.template mutable_data_ptr<T>(), z.N * t.size(-1), t.size(-1)};
        }
      } else {
        p.dw_ih = target(3, true), p.dw_hh = target(4, true);
        p.db_ih = target(5, bias_ih_.defined()), p.db_hh = target(6, bias_ih_.defined());
        p.dw_hr = target(7, weight_hr_.defined());
        p.dw_ch = target(8, weight_ch_.defined());
      }
      run_driver(p, driver.backward_scratch, driver.backward);
    };
    dispatch(run);
    for (int i = 0; i < (factors ? kFirstWeight : kNumGradients); ++i) grad[i] = grad[i].to(dtype_);
    return std::apply([&](auto&... g) { return Gradients(g...); }, grad);
  }

 private:
  bool saves_hidden() const {
    return cell_.saves_hidden || weight_hr_.defined() || zoneout_h_.defined() || zoneout_c_.defined();
  }
  std::string name() const { return std::string("rnnfast::") + cell_.name; }
  std::string what(const char* argument) const { return name() + ": " + argument + ": "; }

  template <typename Dims>
  void check_shape(const char* argument, const Tensor& t, const Dims& dims) const {
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
  void check_shape(const char* argument, const Tensor& t, std::initializer_list<Dim> dims) const {
    check_shape<std::initializer_list<Dim>>(argument, t, dims);
  }

  void check_dtype_and_device(const Tensor& input, const MaybeTensor& h0, const MaybeTensor& c0,
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
      TORCH_CHECK(t.device().is_cpu(), what(argument), "expected a CPU tensor, got one on ", t.device());
    };
    check("input", input);
    if (has(h0)) check("h0", *h0);
    if (has(c0)) check("c0", *c0);
    check("weight_ih", weight_ih);
    check("weight_hh", weight_hh);
    if (has(bias_ih)) check("bias_ih", *bias_ih);
    if (has(bias_hh)) check("bias_hh", *bias_hh);
    if (has(weight_hr)) check("weight_hr", *weight_hr);
  }

  // What plain calls do not have.
  void check_extras(const Tensor& like, const MaybeTensor& weight_ch, const MaybeTensor& recurrent_mask,
                    const MaybeTensor& zoneout_h, const MaybeTensor& zoneout_c, bool is_projected) const {
    if (cell_.peepholes == 0 && !has(weight_ch) && !has(recurrent_mask) && !has(zoneout_h) && !has(zoneout_c)) return;
    const auto check = [&](const char* argument, const MaybeTensor& t, const std::vector<Dim>& dims) {
      if (!has(t)) return;
      TORCH_CHECK_VALUE(t->layout() == at::kStrided, what(argument), "expected a dense tensor, got layout ",
                        t->layout());
      TORCH_CHECK_TYPE(t->scalar_type() == like.scalar_type(), what(argument), "expected the dtype of weight_ih, ",
                       like.scalar_type(), ", got ", t->scalar_type());
      TORCH_CHECK(t->device().is_cpu(), what(argument), "expected a CPU tensor, got one on ", t->device());
      check_shape(argument, *t, dims);
    };
    const int64_t V = cell_.peepholes;
    TORCH_CHECK_VALUE(
        has(weight_ch) == (V > 0), what("weight_ch"),
        V > 0 ? "expected the weights of the peepholes, [V*H], got None" : "this cell has no peepholes; expected None");
    check("weight_ch", weight_ch, {{"V*H", V * size_.H}});
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

  // Tokens index W_ih's columns: none may lie outside, or the driver would read and write foreign memory.
  void check_tokens(const Tensor& tokens, bool is_packed) const {
    TORCH_CHECK_VALUE(tokens.dim() == 1 || (tokens.dim() == 2 && !is_packed), what("input"),
                      is_packed ? "expected 1 dimension [rows] for tokens with batch_sizes, got "
                                : "expected 2 dimensions [T, N] for tokens, or 1 for one step [N], got ",
                      tokens.sizes());
    const Tensor dense = tokens.contiguous();
    const int64_t* token = dense.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < dense.numel(); ++i)
      TORCH_CHECK_INDEX(token[i] >= 0 && token[i] < size_.I, what("input"), "expected tokens from 0 to ", size_.I - 1,
                        ", the columns of weight_ih, got ", token[i]);
  }

  Tensor checked_integers(const char* argument, const Tensor& t) const {
    TORCH_CHECK_TYPE(t.scalar_type() == at::kLong, what(argument), "expected int64, got ", t.scalar_type());
    TORCH_CHECK(t.device().is_cpu(), what(argument), "expected a CPU tensor, got one on ", t.device());
    TORCH_CHECK_VALUE(t.dim() == 1, what(argument), "expected 1 dimension, got ", t.sizes());
    return t.contiguous();
  }

  // T, N, R and outer_, the leading dimensions of input and output.
  void check_layout(const Tensor& input, const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
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
      TORCH_CHECK_TYPE(resets->scalar_type() == at::kBool, what("resets"), "expected bool, got ",
                       resets->scalar_type());
      TORCH_CHECK(resets->device().is_cpu(), what("resets"), "expected a CPU tensor, got one on ", resets->device());
      TORCH_CHECK_VALUE(input.dim() == 3, what("resets"), "expected None for a single step");
      check_shape("resets", *resets, {{"T", size_.T}, {"N", size_.N}});
      resets_ = resets->contiguous();
    }
  }

  // active_, first_row_ and order_ of SequenceParams. After the large allocations, which refuse impossible sizes.
  void fill_rows() {
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
  }

  // ---- tensors for the driver ----

  Tensor dense(const Tensor& t) const { return t.to(compute_).contiguous(); }
  Tensor dense(const MaybeTensor& t) const { return has(t) ? dense(*t) : Tensor(); }
  // Any strides outside, unit stride in the last dimension.
  Tensor rows(const Tensor& t) const {
    const Tensor wide = t.to(compute_);
    return wide.size(-1) > 1 && wide.stride(-1) != 1 ? wide.contiguous() : wide;
  }
  template <typename T>
  static const T* data(const Tensor& t) {
    return t.defined() ? t.const_data_ptr<T>() : nullptr;
  }
  template <typename T>
  static Rows<const T> view(const Tensor& t) {
    if (!t.defined()) return {nullptr, 0, 0};
    return {t.const_data_ptr<T>(), t.dim() == 3 ? t.stride(0) : 0, t.stride(-2)};
  }

  template <typename T>
  SequenceParams<T> params(bool backward) const {
    SequenceParams<T> p{};
    p.size = size_;
    Sizes work = size_;
    if (is_tokens_) work.I = 1;  // a look-up, whatever the vocabulary
    p.plan = make_plan(work, cell_, at::in_parallel_region() ? 1 : at::get_num_threads(), backward);
    p.reverse = reverse_;
    p.is_packed = is_packed_;
    p.parallel_for = [](int64_t n, int threads, void* context, void (*body)(void*, int64_t, int64_t)) {
      at::parallel_for(0, n, (n + threads - 1) / threads,
                       [&](int64_t begin, int64_t end) { body(context, begin, end); });
    };
    p.active = active_.data();
    p.first_row = first_row_.data();
    p.order = order_.empty() ? nullptr : order_.data();
    p.resets = resets_.defined() ? resets_.const_data_ptr<bool>() : nullptr;
    if (is_tokens_)
      p.tokens = {input_.const_data_ptr<int64_t>(), size_.N, 1};
    else
      p.input = view<T>(input_);
    p.h0 = data<T>(h0_), p.c0 = data<T>(c0_);
    p.w_ih = data<T>(weight_ih_), p.w_hh = data<T>(weight_hh_);
    p.b_ih = data<T>(bias_ih_), p.b_hh = data<T>(bias_hh_), p.w_hr = data<T>(weight_hr_);
    p.w_ch = data<T>(weight_ch_), p.recurrent_mask = data<T>(recurrent_mask_);
    p.keep_h = view<T>(zoneout_h_), p.keep_c = view<T>(zoneout_c_);
    return p;
  }

  template <typename T>
  static void set_saved(SequenceParams<T>& p, const Tensor& gates, const Tensor& cells, const Tensor& hidden) {
    const auto saved = [](const Tensor& t) { return t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr; };
    p.gates = saved(gates), p.cells = saved(cells), p.hidden = saved(hidden);
  }

  template <typename T, typename Size, typename Run>
  void run_driver(SequenceParams<T>& p, Size scratch_size, Run run) const {
    const Scratch scratch(scratch_size(p), input_.options().dtype(compute_));
    p.scratch = scratch.data<T>();
    run(p);
  }

  template <typename Run>
  void dispatch(const Run& run) const {
    if (compute_ == at::kDouble)
      run(double{}, drivers().f64[index_]);
    else
      run(float{}, drivers().f32[index_]);
  }

  const CellInfo& cell_;
  const int index_;
  const bool reverse_, is_tokens_;
  bool is_packed_ = false;
  Sizes size_{};
  at::ScalarType dtype_, compute_;
  std::vector<int64_t> outer_;
  std::vector<Dim> outer_dims_;
  Tensor batch_sizes_, lengths_, resets_;
  Tensor input_, h0_, c0_, weight_ih_, weight_hh_, bias_ih_, bias_hh_, weight_hr_, weight_ch_;
  Tensor recurrent_mask_, zoneout_h_, zoneout_c_;
  Tensor output_, scratch_;  // of step()
  std::vector<int64_t> active_, first_row_, order_;
};

class CallStepper : public Stepper {
 public:
  explicit CallStepper(Call call) : call_(std::move(call)) {}
  Tensor step(const Tensor& input) override { return call_.step(input); }
  Tensor h() const override { return call_.last_h(); }
  Tensor c() const override { return call_.last_c(); }

 private:
  Call call_;
};

// ---- stacked weights: several members in one call ----

// Weights with a dimension E in front are those of E members; sequence n of the batch runs with weights n % E, and
// every member has as many sequences. A member is one Call on its slices. Members run on threads of their own, unless
// one alone can use more threads than there are members.
class Members {
 public:
  Members(int index, RNNFAST_ARGUMENTS)
      : index_(index), count_(weight_ih.size(0)), is_tokens_(input.scalar_type() == at::kLong), reverse_(reverse) {
    const std::string name = std::string("rnnfast::") + drivers().cells[index].name;
    const auto check = [&](const char* argument, const MaybeTensor& t, int64_t dims) {
      if (!has(t)) return;
      TORCH_CHECK_VALUE(t->dim() == dims && t->size(0) == count_, name, ": ", argument, ": expected ", dims,
                        " dimensions, the first of E = ", count_, " members as in weight_ih, got ", t->sizes());
    };
    TORCH_CHECK_VALUE(count_ > 0, name, ": weight_ih: expected at least one member, got ", weight_ih.sizes());
    check("weight_hh", weight_hh, 3), check("weight_hr", weight_hr, 3);
    check("bias_ih", bias_ih, 2), check("bias_hh", bias_hh, 2), check("weight_ch", weight_ch, 2);
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
    tensors_ = {input,     h0,        c0,      weight_ih, weight_hh,      bias_ih,   bias_hh,
                weight_hr, weight_ch, lengths, resets,    recurrent_mask, zoneout_h, zoneout_c};
  }

  SavingOutputsAllC forward(bool save, bool with_all_c) const {
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

  Gradients backward(const MaybeTensor& grad_output, const MaybeTensor& grad_h_n, const MaybeTensor& grad_c_n,
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

 private:
  MaybeTensor every(const MaybeTensor& t, int64_t dim, int64_t e) const {
    return has(t) ? MaybeTensor(t->slice(dim, e, std::nullopt, count_)) : std::nullopt;
  }
  // [..., N/E, K] of each member to [..., N, K].
  static Tensor interleave(const std::vector<Tensor>& parts) {
    return parts[0].dim() > 1 ? at::stack(parts, -2).flatten(-3, -2) : parts[0];
  }

  template <typename F>
  void each(bool backward, const F& run) const {
    const auto& [input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch, lengths, resets,
                 recurrent_mask, zoneout_h, zoneout_c] = tensors_;
    const auto member = [&](int64_t e) {
      const auto own = [e](const MaybeTensor& t) { return has(t) ? MaybeTensor(t->select(0, e)) : std::nullopt; };
      return Call(index_, *every(input, is_tokens_ ? -1 : -2, e), every(h0, 0, e), every(c0, 0, e),
                  weight_ih->select(0, e), weight_hh->select(0, e), own(bias_ih), own(bias_hh), own(weight_hr),
                  batch_sizes_, every(lengths, 0, e), every(resets, 1, e), reverse_, own(weight_ch),
                  every(recurrent_mask, -2, e), every(zoneout_h, -2, e), every(zoneout_c, -2, e));
    };
    const auto range = [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView below;  // other threads do not know where this one stands
      for (int64_t e = begin; e < end; ++e) run(e, member(e));
    };
    // Whether threads pay: as if the rows of all members were those of one.
    const CellInfo& cell = drivers().cells[index_];
    const int threads = at::get_num_threads();
    const int64_t features = is_tokens_ ? 1 : input->size(-1);
    Sizes size{};
    size.N = input->size(is_tokens_ ? -1 : -2);
    size.I = features, size.H = weight_ih->size(1) / cell.gates, size.P = weight_hh->size(2);
    size.R = input->numel() / std::max<int64_t>(features, 1);
    size.T = size.R / std::max<int64_t>(size.N, 1);
    const bool pays = make_plan(size, cell, threads, backward).threads > 1;
    size.R /= count_, size.N /= count_;
    const bool one_suffices = count_ >= threads || make_plan(size, cell, threads, backward).threads == 1;
    if (pays && one_suffices)
      at::parallel_for(0, count_, 1, range);
    else
      range(0, count_);
  }

  const int index_;
  const int64_t count_;
  const bool is_tokens_, reverse_;
  MaybeTensor batch_sizes_;
  std::array<MaybeTensor, 14> tensors_;  // those with a gradient first
};

// ---- dispatcher ----

using ForwardOp = SavingOutputs(RNNFAST_ARGUMENTS);
#define RNNFAST_BACKWARD_ARGUMENTS                                                                             \
  const MaybeTensor &grad_output, const MaybeTensor &grad_h_n, const MaybeTensor &grad_c_n, RNNFAST_ARGUMENTS, \
      const Tensor &gates, const Tensor &cells, const Tensor &hidden, std::array<bool, kNumGradients> needs,   \
      const MaybeTensor &grad_all_c
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
                            maybe(weight_ch), maybe(recurrent_mask), maybe(zoneout_h), maybe(zoneout_c)});
    ctx->saved_data["index"] = index;
    ctx->saved_data["reverse"] = reverse;
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
    constexpr int kLast = kNumGradients - 1, kSavedLast = 14;  // weight_ch, saved after hidden
    size_t edge = 0;
    for (int i = 0; i < kLast; ++i)
      if (saved[i].defined()) needs[i] = ctx->needs_input_grad(edge++);
    for (int i = kLast; i < kLast + 3; ++i) edge += saved[i].defined();  // batch_sizes, lengths, resets
    if (saved[kSavedLast].defined()) needs[kLast] = ctx->needs_input_grad(edge);
    constexpr int kFirst = 2;               // index, with_all_c, then the arguments
    constexpr int kPosition = kFirst + 12;  // of weight_ch
    variable_list result(kFirst + 16);
    if (std::none_of(grad.begin(), grad.end(), [](const Tensor& g) { return g.defined(); })) return result;
    const auto call = [&] {
      return Operators::of(ctx->saved_data["index"].toInt())
          .backward.call(maybe(grad[0]), maybe(grad[1]), maybe(grad[2]), saved[0], maybe(saved[1]), maybe(saved[2]),
                         saved[3], saved[4], maybe(saved[5]), maybe(saved[6]), maybe(saved[7]), maybe(saved[8]),
                         maybe(saved[9]), maybe(saved[10]), ctx->saved_data["reverse"].toBool(), maybe(saved[14]),
                         maybe(saved[15]), maybe(saved[16]), maybe(saved[17]), saved[11], saved[12], saved[13], needs,
                         grad.size() > 3 ? maybe(grad[3]) : std::nullopt);
    };
    // With create_graph the call is itself differentiable (ops.py); else autograd is skipped.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    const Gradients gradients = call();
    std::apply(
        [&](const auto&... g) {
          int i = 0;
          ((result[i < kLast ? kFirst + i : kPosition] = needs[i] ? g : Tensor(), ++i), ...);
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
          requires_grad(weight_ch));
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
  if (weight_ih.dim() == 3) return Members(index, RNNFAST_PASS).forward(save, with_all_c);
  return Call(index, RNNFAST_PASS).forward(save, with_all_c);
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

std::unique_ptr<Stepper> make_stepper(const std::string& cell, const Tensor& input, const MaybeTensor& h0,
                                      const MaybeTensor& c0, const std::vector<MaybeTensor>& weights) {
  const DriverTable& table = drivers();
  const auto* end = table.cells + table.num_cells;
  const auto* found = std::find_if(table.cells, end, [&](const CellInfo& info) { return cell == info.name; });
  TORCH_CHECK_VALUE(found != end, "cell: expected one of this build, got ", cell);
  return std::make_unique<CallStepper>(Call(static_cast<int>(found - table.cells), input, h0, c0, *weights.at(0),
                                            *weights.at(1), weights.at(2), weights.at(3), weights.at(4), std::nullopt,
                                            std::nullopt, std::nullopt, false, weights.at(5), std::nullopt,
                                            weights.at(6), weights.at(7)));
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
                          ", Tensor gates, Tensor cells, Tensor hidden, bool[9] needs, Tensor? grad_all_c=None)",
                      states = " -> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, ";
    m.def(("_" + name + "_backward" + backward_arguments + states +
           "Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, Tensor grad_bias_hh, "
           "Tensor grad_weight_hr, Tensor grad_weight_ch)")
              .c_str(),
          tags);
    if (!has_factors(table.cells[i])) continue;
    m.def(("_" + name + "_backward_factors" + backward_arguments + states +
           "Tensor grad_gates_ih, Tensor grad_gates_hh, Tensor h_prev, Tensor grad_projected, Tensor h_raw)")
              .c_str(),
          tags);
  }
}

TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
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
    m.impl(("_" + name + "_backward").c_str(), [i](RNNFAST_BACKWARD_ARGUMENTS) {
      if (weight_ih.dim() == 3)
        return Members(i, RNNFAST_PASS)
            .backward(grad_output, grad_h_n, grad_c_n, gates, cells, hidden, needs, grad_all_c);
      return Call(i, RNNFAST_PASS)
          .backward(grad_output, grad_h_n, grad_c_n, gates, cells, hidden, needs, grad_all_c, false);
    });
    if (!has_factors(table.cells[i])) continue;
    m.impl(("_" + name + "_backward_factors").c_str(), [i](RNNFAST_BACKWARD_ARGUMENTS) {
      auto [dinput, dh0, dc0, gates_ih, gates_hh, h_prev, projected, h_raw, none] =
          Call(i, RNNFAST_PASS)
              .backward(grad_output, grad_h_n, grad_c_n, gates, cells, hidden, needs, grad_all_c, true);
      return Factors(dinput, dh0, dc0, gates_ih, gates_hh, h_prev, projected, h_raw);
    });
  }
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
