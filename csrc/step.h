// The layers of a module, one direction, with the state between calls: taken one step at a time, each layer is checked,
// converted and allocated once, where the operators would do so at every step. The same kernels, so the same numbers.
// CPU, no gradients.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <tuple>
#include <vector>

#include "call.h"

namespace rnnfast {

class Stack {
 public:
  // h [L, N, P] and c [L, N, H] or null for zeros. Of each layer weight_ih, weight_hh, bias_ih, bias_hh, weight_hr,
  // weight_ch, zoneout of h and of c, each [H], and weight_ln; those not there null. With `packs` they are rearranged
  // at the first step and let go of: the numbers are then another rounding's, and later steps faster.
  Stack(const std::string& cell, const std::vector<MaybeTensor>& weights, const MaybeTensor& h, const MaybeTensor& c,
        bool packs);

  void set_state(const MaybeTensor& h, const MaybeTensor& c);
  // h [L, N, P] and c [L, N, H] ([0] for a cell without), in memory of their own.
  std::tuple<Tensor, Tensor> state(const at::TensorOptions& options) const;
  // After the first step: zero state for the sequences where `where` [N] says so.
  void reset(const bool* where);

  // [T, N, I] or tokens [T, N] to [T, N, P].
  Tensor run(Tensor x);
  // One step, [1, N, I] or tokens [1, N] to [1, N, P]; the result is written again by the next. After it, no `run`.
  Tensor step(Tensor x);
  int64_t size() const { return static_cast<int64_t>(weights_.size()); }

 private:
  using Op = std::tuple<Tensor, Tensor, Tensor>(RNNFAST_ARGUMENTS);
  // Those of layer l, zoneout expanded to the steps and sequences of x: [T, N, H].
  std::vector<MaybeTensor> weights_for(size_t l, const Tensor& x) const;

  int index_;
  bool packs_;
  c10::TypedOperatorHandle<Op> op_;
  std::vector<std::vector<MaybeTensor>> weights_;
  std::vector<MaybeTensor> h_, c_;  // before the first step
  std::vector<Call> steps_;         // from then on
};

}  // namespace rnnfast
