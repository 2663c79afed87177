// Softmax and cross entropy of rows of scores that lie side by side, as columns: a vector holds one score each of
// several rows, so nothing is ever summed across its lanes, and V may be any number. And the linear layer that such
// scores are of, with its gradients. Contract: see SoftmaxParams and LossParams.
#pragma once

#include "layout.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

// Rows [begin, end); `end` may be rounded up within ld. Both are multiples of kSoftmaxRows.
template <typename T>
void softmax_loss(const SoftmaxParams<T>& p, int64_t begin, int64_t end) {
  using V = VectorOf<T>;
  constexpr int64_t kLanes = Lanes<T>::kCount, kTerms = 64;  // terms of a sum that are added before they join the total
  const auto e_to = [](V x) {
    const Exponential<V> e = exponential<1>(at_least(x, Format<V>::kMin));
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
    const V share = p.scale / total;
    for (int64_t v = 0; v < p.V; ++v) store(x + v * p.ld, load(x + v * p.ld) * share);
    for (int64_t i = 0; i < kLanes && row + i < p.rows; ++i) x[p.targets[row + i] * p.ld + i] -= p.scale;
  }
}

// Panels of matrices [K, P]: [panels][K][vectors][kLanes] of at most kMaxPanel vectors, zeros past P.
template <typename T>
struct LossPanels {
  static constexpr int64_t kLanes = Lanes<T>::kCount, kWidth = kMaxPanel * kLanes;
  int64_t K, P;
  int64_t count() const { return ceil_div(P, kWidth); }
  int vectors(int64_t panel) const { return static_cast<int>(min(kMaxPanel, ceil_div(P - panel * kWidth, kLanes))); }
  int64_t columns(int64_t panel) const { return min(kWidth, P - panel * kWidth); }
  int64_t at(int64_t panel, int64_t k) const { return panel * kWidth * K + k * vectors(panel) * kLanes; }
  // It is its only panel.
  bool is_panel() const { return P <= kWidth && P % kLanes == 0; }
  // Row k of the matrix.
  void pack(const T* row, int64_t k, T* panels) const {
    for (int64_t panel = 0; panel < count(); ++panel) {
      T* to = panels + at(panel, k);
      copy(to, row + panel * kWidth, columns(panel));
      zero(to + columns(panel), vectors(panel) * kLanes - columns(panel));
    }
  }
};

template <typename T>
void pack_loss_weights(const LossParams<T>& p, int64_t begin, int64_t end) {
  const LossPanels<T> panels{p.softmax.V, p.P};
  for (int64_t v = begin; v < end && !panels.is_panel(); ++v) panels.pack(p.weight + v * p.P, v, p.weight_rows);
}

// The scores of a block of rows, without the bias: W times the block as columns.
template <typename T>
void loss_scores(const LossParams<T>& p, int64_t row) {
  constexpr int64_t kLanes = Lanes<T>::kCount, kWidth = kMaxPanel * kLanes, kBatch = 256;
  static_assert(kLossRows % kWidth == 0, "a block is whole panels");
  for (int64_t first = row; first < row + kLossRows; first += kWidth) {
    T* panel = p.rows_t + first * p.P;
    for (int64_t q = 0; q < kMaxPanel; ++q) {
      const T* rows[kLanes] = {};
      const int64_t n = max(0, min(kLanes, p.softmax.rows - first - q * kLanes));
      for (int64_t i = 0; i < n; ++i) rows[i] = p.hidden + (first + q * kLanes + i) * p.P;
      transpose_rows(rows, n, p.P, panel + q * kLanes, kWidth, true);
    }
    for (int64_t v = 0; v < p.softmax.V; v += kBatch) {
      const int64_t n = min(kBatch, p.softmax.V - v);
      const T* a[kBatch];
      T* c[kBatch];
      for (int64_t i = 0; i < n; ++i) a[i] = p.weight + (v + i) * p.P, c[i] = p.softmax.scores + (v + i) * p.softmax.ld;
      panel_product<T>(n, kMaxPanel, Inner{1, p.P, 0}, panel, RowOperands<T>{a, nullptr, c, first, kLanes},
                       [](int64_t, int64_t) {});
    }
  }
}

// C [n, P], the columns of one panel: += where `adds`, else =. product(rows) works on a copy of whole vectors.
template <typename T, int64_t kMost, typename Product>
void through_buffer(const LossPanels<T>& panels, int64_t panel, int64_t n, T* C, bool adds, Product product) {
  T buffer[kMost][LossPanels<T>::kWidth];
  T* rows[kMost];
  const int64_t columns = panels.columns(panel), first = panel * LossPanels<T>::kWidth;
  for (int64_t i = 0; i < kMost; ++i) rows[i] = buffer[i];
  for (int64_t i = 0; i < n && adds; ++i) {
    copy(buffer[i], C + i * panels.P + first, columns);
    zero(buffer[i] + columns, LossPanels<T>::kWidth - columns);
  }
  product(rows);
  for (int64_t i = 0; i < n; ++i) copy(C + i * panels.P + first, buffer[i], columns);
}

template <typename T>
void loss_rows(const LossParams<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const LossPanels<T> panels{p.softmax.ld, p.P}, weight{p.softmax.V, p.P};
  const T* weight_rows = weight.is_panel() ? p.weight : p.weight_rows;
  for (int64_t row = begin * kLossRows; row < end * kLossRows; row += kLossRows) {
    const int64_t n = min(kLossRows, p.softmax.rows - row);
    loss_scores(p, row);
    softmax_loss(p.softmax, row, row + kLossRows);
    for (int64_t i = 0; i < n && p.grad_weight && !panels.is_panel(); ++i)
      panels.pack(p.hidden + (row + i) * p.P, row + i, p.rows);
    const T* a[kLossRows];
    for (int64_t i = 0; i < n; ++i) a[i] = p.softmax.scores + row + i;
    for (int64_t panel = 0; panel < weight.count() && p.grad_hidden; ++panel)
      through_buffer<T, kLossRows>(weight, panel, n, p.grad_hidden + row * p.P, false, [&](T* const* c) {
        panel_product<T>(n, weight.vectors(panel), Inner{p.softmax.V, 1, p.softmax.ld},
                         weight_rows + weight.at(panel, 0), RowOperands<T>{a, nullptr, c, 0, kLanes},
                         [](int64_t, int64_t) {});
      });
  }
}

template <typename T>
void loss_weights(const LossParams<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Lanes<T>::kCount, kGroup = 48;  // a multiple of the rows of a tile
  const int64_t rows = p.softmax.rows, ld = p.softmax.ld;
  const LossPanels<T> panels{ld, p.P};
  const T* hidden = panels.is_panel() ? p.hidden : p.rows;
  for (int64_t v = begin; v < end; v += kGroup) {
    const int64_t n = min(kGroup, end - v);
    for (int64_t panel = 0; panel < panels.count() && p.grad_weight; ++panel)
      through_buffer<T, kGroup>(panels, panel, n, p.grad_weight + v * p.P, true, [&](T* const* c) {
        for (int64_t r = 0; r < rows; r += kSumWords) {  // in such stretches for the accuracy of the sums
          const T* a[kGroup];
          for (int64_t i = 0; i < n; ++i) a[i] = p.softmax.scores + (v + i) * ld + r;
          panel_product<T>(n, panels.vectors(panel), Inner{1, min(kSumWords, rows - r), 0},
                           hidden + panels.at(panel, r), RowOperands<T>{a, c, c, 0, kLanes}, [](int64_t, int64_t) {});
        }
      });
    for (int64_t i = v; i < v + n && p.grad_bias; ++i) {
      VectorOf<T> sum{};
      T rest = 0, lane[kLanes];
      int64_t r = 0;
      for (; r + kLanes <= rows; r += kLanes) sum += load(p.softmax.scores + i * ld + r);
      for (; r < rows; ++r) rest += p.softmax.scores[i * ld + r];
      store(lane, sum);
      for (const T x : lane) rest += x;
      p.grad_bias[i] += rest;
    }
  }
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
