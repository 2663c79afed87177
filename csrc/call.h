// One call of an operator, on the CPU or a CUDA device: the one set of checks, the layout of its rows, allocation and
// the struct for the driver. at::Tensor ends in call.cpp; the checks are in checks.cpp.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "prepack.h"
#include "sequence.h"

namespace rnnfast {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline bool has(const MaybeTensor& t) {
  return t.has_value() && t->defined();
}

// Memory for many weights or steps. On the CPU large pieces ask for large pages: reading weights of more than a few
// megabytes panel by panel is a third slower with 4 KiB pages.
Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// Scratch of a call. Each thread that calls on the CPU keeps its last one for the next call, up to kMostKept bytes:
// memory fresh from the system is zeroed page by page, which can take as long as the call.
class Scratch {
 public:
  Scratch(int64_t elements, const at::TensorOptions& options);
  ~Scratch();
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

// The arguments every operator starts with; shapes as checked by Call.
#define RNNFAST_ARGUMENTS                                                                                              \
  const Tensor &input, const MaybeTensor &h0, const MaybeTensor &c0, const Tensor &weight_ih, const Tensor &weight_hh, \
      const MaybeTensor &bias_ih, const MaybeTensor &bias_hh, const MaybeTensor &weight_hr,                            \
      const MaybeTensor &batch_sizes, const MaybeTensor &lengths, const MaybeTensor &resets, bool reverse,             \
      const MaybeTensor &weight_ch, const MaybeTensor &recurrent_mask, const MaybeTensor &zoneout_h,                   \
      const MaybeTensor &zoneout_c, const MaybeTensor &weight_ln, bool recompute
#define RNNFAST_PASS                                                                                                  \
  input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, lengths, resets, reverse, weight_ch, \
      recurrent_mask, zoneout_h, zoneout_c, weight_ln, recompute

// input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch, weight_ln
constexpr int kNumGradients = 10;
constexpr int kFirstWeight = 3, kNumFactors = 5;

using Outputs = std::tuple<Tensor, Tensor, Tensor>;                                // output, h_n, c_n
using SavingOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // ... gates, cells, hidden
using OutputsAllC = std::tuple<Tensor, Tensor, Tensor, Tensor>;                    // ... all_c
using SavingOutputsAllC = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Factors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Dim {
  const char* letter;
  int64_t size;
};

// One call, checked: sizes, the rows of every step, and tensors ready for the driver. An int64 input holds tokens, [T,
// N] (packed [rows], one step [N]): each stands for the one-hot row of I numbers, which is never made.
class Call {
 public:
  Call(int index, RNNFAST_ARGUMENTS);

  // What is not to be saved, or is not asked for (the last result, all_c), is undefined.
  SavingOutputsAllC forward(bool save, bool with_all_c);

  // The call once more, for a single step, from where it left the state: input [1, N, I] or tokens [1, N], of the sizes
  // and dtype it was made with, to output [1, N, P], memory that the next step writes again. The first time it makes
  // the memory that all of them use, and with `packs` rearranges the weights for all of them and lets go of its own.
  const Tensor& step(const Tensor& input, bool packs);
  // The state now, [N, P] and [N, H] (undefined for a cell without c): memory that the next step writes again.
  Tensor last_h() const { return as(h0_, dtype_); }
  Tensor last_c() const { return cell_.has_cell ? as(c0_, dtype_) : Tensor(); }
  // Between steps: a state in the place of the last, null for zeros; zeros where `where` [N] says so.
  void set_state(const MaybeTensor& h, const MaybeTensor& c);
  void reset(const bool* where);

  // With `factors` the five weight gradients are replaced by dgates_ih, dgates_hh, h_prev, dprojected and h_raw of
  // SequenceParams, in the accumulating dtype, shaped as output but for the last dimension. Gradients go to `targets`
  // where there is one: contiguous, of the accumulating dtype.
  Gradients backward(const MaybeTensor& grad_output, const MaybeTensor& grad_h_n, const MaybeTensor& grad_c_n,
                     const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                     const std::array<bool, kNumGradients>& needs, const MaybeTensor& grad_all_c, bool factors,
                     const std::array<Tensor, kNumGradients>& targets = {});

 private:
  bool saves_hidden() const;
  std::string name() const { return std::string("rnnfast::") + cell_.name; }
  std::string what(const char* argument) const { return name() + ": " + argument + ": "; }

  template <typename Dims>
  void check_shape(const char* argument, const Tensor& t, const Dims& dims) const;
  void check_shape(const char* argument, const Tensor& t, std::initializer_list<Dim> dims) const;

  void check_device(const char* argument, const Tensor& t) const;

  void check_dtype_and_device(const Tensor& input, const MaybeTensor& h0, const MaybeTensor& c0,
                              const Tensor& weight_ih, const Tensor& weight_hh, const MaybeTensor& bias_ih,
                              const MaybeTensor& bias_hh, const MaybeTensor& weight_hr) const;

  // What plain calls do not have.
  void check_extras(const Tensor& like, const MaybeTensor& weight_ch, const MaybeTensor& recurrent_mask,
                    const MaybeTensor& zoneout_h, const MaybeTensor& zoneout_c, const MaybeTensor& weight_ln,
                    bool is_projected) const;

  void check_tokens(const Tensor& tokens, bool is_packed) const;

  // Tokens index W_ih's columns: none may lie outside, or a driver of the CPU would read and write foreign memory.
  // Those of CUDA never do, so that the check, for which the host must wait, is left to the forward call, and left out
  // while a graph is captured.
  void check_token_range(const Tensor& tokens) const;

  Tensor checked_integers(const char* argument, const Tensor& t) const;

  // T, N, R and outer_, the leading dimensions of input and output.
  void check_layout(const Tensor& input, const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
                    const MaybeTensor& resets);

  // active_, first_row_ and order_ of SequenceParams, and on_device_. After the large allocations, which refuse
  // impossible sizes.
  void fill_rows();

  // ---- tensors for the driver ----

  // at::Tensor::to takes its time even where there is nothing to do.
  static Tensor as(const Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }
  Tensor dense(const Tensor& t) const { return as(t, storage_).contiguous(); }
  Tensor dense(const MaybeTensor& t) const { return has(t) ? dense(*t) : Tensor(); }
  // Any strides outside, unit stride in the last dimension.
  Tensor rows(const Tensor& t) const;
  // Weights are left as they were given until it is known which of them will be read: all, or those that are not
  // matrices.
  void take_weights(bool with_matrices);
  // How the call is to run; for number type E of the driver.
  template <typename E>
  Plan plan(bool backward, bool keeps_weights) const;
  PackedFrom packed_from(const Plan& plan) const;
  template <typename T, typename E>
  SequenceParams<T, E> params(const Plan& plan) const;

  template <typename T, typename E>
  static void set_saved(SequenceParams<T, E>& p, const Tensor& gates, const Tensor& cells, const Tensor& hidden);

  template <typename T, typename E, typename Size, typename Run>
  void run_driver(SequenceParams<T, E>& p, Size scratch_size, Run run) const;

  // run(types, driver) for the types T and E of the driver that takes the call.
  template <typename Run>
  void dispatch(const Run& run) const;

  // ---- recompute: forward keeps the state between parts of the sequence, backward runs each part again ----

  int64_t part_steps() const;
  int64_t num_parts() const { return (size_.T + part_steps() - 1) / part_steps(); }
  // p for the steps of a part, the i-th in the order in which time is walked.
  template <typename T>
  SequenceParams<T> part(SequenceParams<T> p, int64_t i) const;
  // [N, units] of the states kept between parts: that after the i-th.
  template <typename T>
  T* after_part(const Tensor& states, int64_t i) const;
  template <typename T>
  void forward_in_parts(const SequenceParams<T>& p, const Driver<T>& driver, const Tensor& cells,
                        const Tensor& hidden) const;
  template <typename T>
  void backward_in_parts(const SequenceParams<T>& p, const Driver<T>& driver, const Tensor& cells,
                         const Tensor& hidden) const;

  const at::Device device_;
  const DriverTable& table_;
  const CellInfo& cell_;
  const int index_;
  const bool reverse_, recompute_, is_tokens_;
  bool is_packed_ = false;
  Sizes size_{};
  at::ScalarType dtype_, storage_, compute_;  // of the arguments; E and T of the driver
  std::vector<int64_t> outer_;
  std::vector<Dim> outer_dims_;
  Tensor batch_sizes_, lengths_, resets_;
  Tensor input_, h0_, c0_, weight_ih_, weight_hh_, bias_ih_, bias_hh_, weight_hr_, weight_ch_, weight_ln_;
  Tensor recurrent_mask_, zoneout_h_, zoneout_c_;
  Tensor output_, result_, scratch_;  // of step(): in the stored dtype, in the caller's; the driver's
  Plan step_plan_{};
  bool step_is_turned_ = false;
  std::vector<int64_t> active_, first_row_, order_;
  Tensor on_device_;  // CUDA: lengths; packed: active_, then first_row_
};

// The operator of cell `index`, through the dispatcher. In ops.cpp.
Outputs call_cell(int64_t index, RNNFAST_ARGUMENTS);

}  // namespace rnnfast
