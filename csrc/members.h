// Stacked weights: several members in one call.
#pragma once

#include "call.h"

namespace rnnfast {

// Weights with a dimension E in front are those of E members; sequence n of the batch runs with weights n % E, and
// every member has as many sequences. A member is one Call on its slices. On the CPU members run on threads of their
// own, unless one alone can use more threads than there are members; on CUDA one after the other.
class Members {
 public:
  Members(int index, RNNFAST_ARGUMENTS);

  SavingOutputsAllC forward(bool save, bool with_all_c) const;

  Gradients backward(const MaybeTensor& grad_output, const MaybeTensor& grad_h_n, const MaybeTensor& grad_c_n,
                     const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                     const std::array<bool, kNumGradients>& needs, const MaybeTensor& grad_all_c) const;

 private:
  MaybeTensor every(const MaybeTensor& t, int64_t dim, int64_t e) const;
  // [..., N/E, K] of each member to [..., N, K].
  static Tensor interleave(const std::vector<Tensor>& parts);

  template <typename F>
  void each(bool backward, const F& run) const;

  const int index_;
  const int64_t count_;
  const bool is_tokens_, reverse_, recompute_;
  MaybeTensor batch_sizes_;
  std::array<MaybeTensor, 15> tensors_;  // those with a gradient first
};

}  // namespace rnnfast
