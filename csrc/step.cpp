#include "step.h"

#include <algorithm>
#include <utility>

namespace rnnfast {
namespace {

constexpr int64_t kWeightsPerLayer = 9;

int index_of(const std::string& cell) {
  const DriverTable& table = drivers();
  const auto* end = table.cells + table.num_cells;
  const auto* found = std::find_if(table.cells, end, [&](const CellInfo& info) { return cell == info.name; });
  TORCH_CHECK_VALUE(found != end, "cell: expected one of this build, got ", cell);
  return static_cast<int>(found - table.cells);
}

}  // namespace

Stack::Stack(const std::string& cell, const std::vector<MaybeTensor>& weights, const MaybeTensor& h,
             const MaybeTensor& c, bool packs)
    : index_(index_of(cell)),
      packs_(packs),
      op_(c10::Dispatcher::singleton().findSchemaOrThrow(("rnnfast::" + cell).c_str(), "").typed<Op>()) {
  TORCH_CHECK_VALUE(!weights.empty() && weights.size() % kWeightsPerLayer == 0, "weights: expected ", kWeightsPerLayer,
                    " for each layer, got ", weights.size());
  for (size_t i = 0; i < weights.size(); i += kWeightsPerLayer) {
    weights_.emplace_back(weights.begin() + i, weights.begin() + i + kWeightsPerLayer);
    TORCH_CHECK_VALUE(weights[i] && weights[i + 1], "weights: expected weight_ih and weight_hh of layer ",
                      weights_.size() - 1, ", got None");
  }
  h_.resize(weights_.size()), c_.resize(weights_.size());
  set_state(h, c);
}

void Stack::set_state(const MaybeTensor& h, const MaybeTensor& c) {
  const auto unbind = [&](const char* name, const MaybeTensor& state, std::vector<MaybeTensor>& to) {
    if (!state) {
      std::fill(to.begin(), to.end(), std::nullopt);
      return;
    }
    TORCH_CHECK_VALUE(state->dim() == 3 && state->size(0) == size(), name, ": expected [L, N, ...] with L = ", size(),
                      ", got ", state->sizes());
    for (size_t l = 0; l < to.size(); ++l) to[l] = state->select(0, static_cast<int64_t>(l));
  };
  unbind("h", h, h_);
  unbind("c", c, c_);
  for (size_t l = 0; l < steps_.size(); ++l) steps_[l].set_state(h_[l], c_[l]);
}

std::tuple<Tensor, Tensor> Stack::state(const at::TensorOptions& options) const {
  const auto stack = [&](const std::vector<MaybeTensor>& from, Tensor (Call::*now)() const) {
    std::vector<Tensor> all;
    for (size_t l = 0; l < from.size(); ++l) {
      const Tensor one = steps_.empty() ? from[l].value_or(Tensor()) : (steps_[l].*now)();
      if (!one.defined()) return at::empty({0}, options);
      all.push_back(one);
    }
    return at::stack(all);
  };
  return {stack(h_, &Call::last_h), stack(c_, &Call::last_c)};
}

void Stack::reset(const bool* where) {
  for (Call& layer : steps_) layer.reset(where);
}

Tensor Stack::run(Tensor x) {
  for (size_t l = 0; l < weights_.size(); ++l) {
    const auto w = weights_for(l, x);
    auto [output, h, c] = op_.call(x, h_[l], c_[l], *w[0], *w[1], w[2], w[3], w[4], std::nullopt, std::nullopt,
                                   std::nullopt, false, w[5], std::nullopt, w[6], w[7], w[8], false);
    x = std::move(output);
    h_[l] = std::move(h);
    c_[l] = c.dim() == 2 ? MaybeTensor(std::move(c)) : std::nullopt;
  }
  return x;
}

Tensor Stack::step(Tensor x) {
  for (size_t l = 0; l < weights_.size(); ++l) {
    if (l == steps_.size()) {
      const auto w = weights_for(l, x);
      steps_.emplace_back(index_, x, h_[l], c_[l], *w[0], *w[1], w[2], w[3], w[4], std::nullopt, std::nullopt,
                          std::nullopt, false, w[5], std::nullopt, w[6], w[7], w[8], false);
      if (packs_) weights_[l].clear();
    }
    x = steps_[l].step(x, packs_);
  }
  return x;
}

std::vector<MaybeTensor> Stack::weights_for(size_t l, const Tensor& x) const {
  std::vector<MaybeTensor> w = weights_[l];
  for (const size_t i : {6, 7})
    if (w[i]) w[i] = w[i]->expand({x.size(0), x.size(1), w[i]->size(-1)});
  return w;
}

}  // namespace rnnfast
