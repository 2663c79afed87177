// Softmax and cross entropy of rows of scores that lie side by side, as columns: a vector holds one score each of
// several rows, so nothing is ever summed across its lanes, and V may be any number. Contract: see SoftmaxParams.
#pragma once

#include "../sequence.h"
#include "product.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

// Rows [begin, end); `end` may be rounded up within ld. Both are multiples of kSoftmaxRows.
template <typename T>
void softmax_loss(const SoftmaxParams<T>& p, int64_t begin, int64_t end) {
  using V = VectorOf<T>;
  constexpr int64_t kLanes = Lanes<T>::kCount, kTerms = 64;  // terms of a sum that are added before they join the total
  const auto e_to = [](V x) {
    const Exponential<V> e = exponential(x);
    return e.scale + e.scale * e.fraction;
  };
  for (int64_t row = begin; row < end; row += kLanes) {
    T* x = p.scores + row;
    V most = load(x) + (p.bias ? p.bias[0] : T(0));
    for (int64_t v = 0; v < p.V; ++v) {
      const V score = load(x + v * p.ld) + (p.bias ? p.bias[v] : T(0));
      store(x + v * p.ld, score);
      most = score > most ? score : most;
    }
    T top[kLanes];
    store(top, most);
    for (int64_t i = 0; i < kLanes && row + i < p.rows; ++i)
      p.target_score[row + i] = x[p.targets[row + i] * p.ld + i] - top[i];
    V total{};
    for (int64_t first = 0; first < p.V; first += kTerms) {
      V sum{};
      for (int64_t v = first; v < p.V && v < first + kTerms; ++v) {
        const V e = e_to(load(x + v * p.ld) - most);
        if (p.grad) store(x + v * p.ld, e);
        sum += e;
      }
      total += sum;
    }
    T totals[kLanes];
    store(totals, total);
    for (int64_t i = 0; i < kLanes && row + i < p.rows; ++i) p.total[row + i] = totals[i];
    if (!p.grad) continue;
    const V share = 1 / total;
    for (int64_t v = 0; v < p.V; ++v) store(x + v * p.ld, load(x + v * p.ld) * share);
    for (int64_t i = 0; i < kLanes && row + i < p.rows; ++i) x[p.targets[row + i] * p.ld + i] -= 1;
  }
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
