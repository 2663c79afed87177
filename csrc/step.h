// A layer and direction taken one step at a time by a loop in C++ (generate.cpp): checked, converted and allocated
// once, where the operators would do so at every step. The same kernels and plan, so the same numbers. CPU, no
// gradients.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace rnnfast {

class Stepper {
 public:
  virtual ~Stepper() = default;
  // Input [1, N, I] or tokens [1, N], of the sizes and dtype it was made with, to output [1, N, P]: memory that the
  // next step writes again.
  virtual at::Tensor step(const at::Tensor& input) = 0;
  // The state now, [N, P] and [N, H] (undefined for a cell without c): memory that the next step writes again.
  virtual at::Tensor h() const = 0;
  virtual at::Tensor c() const = 0;
};

// input: an example of what it will read. h0 [N, P] and c0 [N, H] or null for zeros, copied. weights: weight_ih,
// weight_hh, bias_ih, bias_hh, weight_hr, weight_ch, zoneout_h, zoneout_c, weight_ln.
std::unique_ptr<Stepper> make_stepper(const std::string& cell, const at::Tensor& input,
                                      const std::optional<at::Tensor>& h0, const std::optional<at::Tensor>& c0,
                                      const std::vector<std::optional<at::Tensor>>& weights);

}  // namespace rnnfast
