// What backward does for a chunk of steps at once, when all their gate gradients are known: dx = dgates W_ih and the
// weight gradients, sums over the chunk's rows that are added up over chunks. And its scratch, and what is found of the
// steps before.
#pragma once

#include "layout.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename Cell, typename T, typename E>
struct WeightGradients : SequenceLayout<Cell, T, E> {
  using Base = SequenceLayout<Cell, T, E>;
  using Base::backward_panels_size;
  using Base::Base;
  using Base::column_panel_size;
  using Base::column_panels;
  using Base::column_vectors;
  using Base::first_column;
  using Base::gate_panels;
  using Base::gate_row;
  using Base::gradient_product;
  using Base::H;
  using Base::I;
  using Base::is_reset;
  using Base::kEarlyGates;
  using Base::kFirstOwnSlot;
  using Base::kGates;
  using Base::kLanes;
  using Base::kLateGates;
  using Base::kNarrows;
  using Base::kPanelStride;
  using Base::kPanelVectors;
  using Base::kSlots;
  using Base::kUnits;
  using Base::kVectors;
  using Base::ld_h;
  using Base::ld_p;
  using Base::N;
  using Base::nothing;
  using Base::operand;
  using Base::outside;
  using Base::P;
  using Base::p;
  using Base::padded;
  using Base::panel_offset;
  using Base::panel_vectors;
  using Base::parallel;
  using Base::projected;
  using Base::put_words;
  using Base::row;
  using Base::store_units;
  using Base::T_;
  using Base::time;
  using Base::unit_offset;
  using Base::unit_vectors;
  using Base::weight_lanes;
  using Base::weight_row;
  using Base::words;
  using typename Base::V;
  using typename Base::W;

  static constexpr int64_t kPanelWords = 2 * kSumWords;  // of dgates, copied for the weight gradients of one panel
  static constexpr int64_t kPanelRows = kPanelWords * kPerWord<E>;
  static constexpr int64_t kPanelWidth = kPanelVectors * kLanes;

  struct Scratch {
    W *w_ih, *w_hh, *w_hr;        // panels for d = dgates W; w_hh of the early gates
    W* w_late;                    // panels of the late gates of W_hh
    T* dlate;                     // [N, ld_h] gradient of what the late gates were fed
    T *h0, *c0;                   // [N, ld_p], [N, ld_h]
    T* zeros;                     // [max(ld_h, ld_p)]
    T *dh, *dc;                   // [N, ld_p], [N, ld_h]: gradient of the state, carried from step to step
    T* dh_raw;                    // [N, ld_h] of a projected cell
    T* dgates;                    // [chunk rows, gate_row]
    T* dprojected;                // [chunk rows, ld_p] gradient of the projected h
    E *input, *h_prev, *dproj_t;  // transposed chunk: [I, chunk rows], [P, chunk rows], [P, chunk rows]
    E* late;                      // [P, chunk rows] transposed, what the late gates were fed
    E *narrow_gates, *narrow_dh;  // [chunk rows, gate_row] dgates, [N, ld_p] dh as products take them, or nothing
    T* dinput;                    // [threads][kRowBatch, padded(I)] before it is narrowed, or nothing
    T *vectors, *dvectors;        // [kVectors, ld_h]
    T* dc_made;                   // [N, ld_h] what reaches c' through its norm
    Moments<T>* moments;          // [chunk rows, kNorms]
    T *mask, *dmasked;            // [N, ld_p] recurrent_mask, and the gradient of its product with h
    W* panels;                    // [threads][kPanelWords, kMaxPanel, kLanes]
    T* hidden;         // [threads][kUnits, ld_buffer], or [kInPlaceRows, ld_buffer]: what the products were taken of
    T *dw_ih, *dw_hh;  // [gate_panels, I, kPanelWidth], [gate_panels, P, kPanelWidth]; of one chunk [threads, ...]
    T *db_ih, *db_hh;  // [gate_panels, kPanelWidth]
    T* dw_hr;          // [P, ld_h]
    int64_t rows;      // leading dimension of the transposed chunk
    int64_t size;
    Scratch(const WeightGradients& d, T* base) {
      Arena<T> arena{base};
      // an odd number of lines: a power of two would send every row of the transposed chunk to the same cache sets
      rows = (ceil_div(d.p.plan.chunk_steps * d.N, kUnits) | 1) * kUnits;
      w_ih = arena.template take<W>(d.p.dinput.data ? d.backward_panels_size(d.I) : 0);
      w_hh = arena.template take<W>(d.backward_panels_size(d.P, kEarlyGates));
      w_late = arena.template take<W>(kLateGates ? d.backward_panels_size(d.P, kLateGates) : 0);
      dlate = arena.take(kLateGates ? d.N * d.ld_h : 0);
      w_hr = arena.template take<W>(d.projected ? d.column_panels(d.H) * column_panel_size(d.P) : 0);
      h0 = arena.take(d.N * d.ld_p);
      c0 = arena.take(Cell::kHasCell ? d.N * d.ld_h : 0);
      zeros = arena.take(max(d.ld_h, d.ld_p));
      dh = arena.take(d.N * d.ld_p);
      dc = arena.take(Cell::kHasCell ? d.N * d.ld_h : 0);
      dh_raw = arena.take(d.projected ? d.N * d.ld_h : 0);
      dgates = arena.take(rows * d.gate_row);
      dprojected = arena.take(d.projected ? rows * d.ld_p : 0);
      const bool packed = d.p.plan.packed;
      input = arena.template take<E>(packed && d.p.dw_ih && !d.p.tokens.data ? d.I * rows : 0);
      h_prev = arena.template take<E>(packed && d.p.dw_hh ? d.P * rows : 0);
      late = arena.template take<E>(kLateGates && packed && d.p.dw_hh ? d.P * rows : 0);
      dproj_t = arena.template take<E>(d.p.dw_hr ? d.P * rows : 0);
      narrow_gates = arena.template take<E>(kNarrows ? rows * d.gate_row : 0);
      narrow_dh = arena.template take<E>(kNarrows && d.projected ? d.N * d.ld_p : 0);
      dinput = arena.take(kNarrows && d.p.dinput.data ? d.p.plan.threads * kRowBatch * padded(d.I) : 0);
      vectors = arena.take(kVectors * d.ld_h);
      dvectors = arena.take(kVectors * d.ld_h);
      dc_made = arena.take(Cell::kNorms == 3 ? d.N * d.ld_h : 0);
      static_assert(sizeof(Moments<T>) == 2 * sizeof(T), "no padding");
      moments = reinterpret_cast<Moments<T>*>(arena.take(rows * 2 * Cell::kNorms));
      mask = arena.take(d.p.recurrent_mask ? d.N * d.ld_p : 0);
      dmasked = arena.take(d.p.recurrent_mask ? d.N * d.ld_p : 0);
      panels = arena.template take<W>(d.p.plan.threads * kPanelWords * kMaxPanel * kLanes);
      hidden = arena.take(max(d.p.plan.threads * kUnits, kInPlaceRows) * d.ld_buffer());
      const int64_t width = d.gate_panels * kPanelWidth;
      const int64_t sums = d.is_one_chunk() ? d.p.plan.threads * kPanelWidth : width;
      dw_ih = arena.take(packed && d.p.dw_ih ? d.I * sums : 0);
      dw_hh = arena.take(packed && d.p.dw_hh ? d.P * sums : 0);
      db_ih = arena.take(width);
      db_hh = arena.take(width);
      dw_hr = arena.take(d.p.dw_hr ? d.P * d.ld_h : 0);
      size = arena.used;
    }
  };

  int64_t ld_buffer() const { return max(ld_h, ld_p); }
  // Then the weight gradients of a panel are ready as soon as they are summed.
  bool is_one_chunk() const { return T_ <= p.plan.chunk_steps && p.is_first_part && p.is_last_part; }

  // Row of the step that came before t for sequence j, or -1: it started there.
  int64_t row_before(int64_t t, int64_t j) const {
    const int64_t before = p.reverse ? t + 1 : t - 1;
    return before < 0 || before >= T_ || j >= p.active[before] ? -1 : row(before, j);
  }
  const T* cell_before(const Scratch& s, int64_t t, int64_t j) const {
    if (is_reset(t, j)) return s.zeros;
    const int64_t before = row_before(t, j);
    return before < 0 ? s.c0 + j * ld_h : p.cells + before * ld_h;
  }
  // h before step t as a padded row; `buffer` [ld_h] is used where h must be recomputed.
  const T* hidden_before(const Scratch& s, int64_t t, int64_t j, T* buffer) const {
    if (is_reset(t, j)) return s.zeros;
    const int64_t before = row_before(t, j);
    if (before < 0) return s.h0 + j * ld_p;
    if (Cell::kHidden == Hidden::kSaved || projected || p.keep_h.data || p.keep_c.data) return p.hidden + before * ld_p;
    if (Cell::kHidden == Hidden::kSlot) return p.gates + before * gate_row;
    return recompute_hidden(before, 0, unit_vectors, buffer);
  }
  // h of the cell, before any projection, from its kept gates and c; vectors of units [v0, v1) of buffer [ld_h].
  const T* recompute_hidden(int64_t r, int64_t v0, int64_t v1, T* buffer) const {
    if constexpr (Cell::kHidden == Hidden::kOfCell)
      for (int64_t v = v0; v < v1; ++v) {
        V slot[kSlots];
#pragma GCC unroll 8
        for (int i = 0; i < kSlots; ++i) slot[i] = load(p.gates + r * gate_row + unit_offset(v, kSlots, i));
        store(buffer + v * kLanes, Cell::output(slot, load(p.cells + r * ld_h + v * kLanes)));
      }
    return buffer;
  }

  // What the recurrent product was taken of at step t: h before it, or h times its mask; `buffer` [ld_buffer].
  const T* recurrent_input(const Scratch& s, int64_t t, int64_t j, T* buffer) const {
    const T* h = hidden_before(s, t, j, buffer);
    if (!p.recurrent_mask) return h;
    for (int64_t i = 0; i < ld_p; ++i) buffer[i] = s.mask[j * ld_p + i] * h[i];
    return buffer;
  }
  // The same of the late gates.
  const T* late_input(const Scratch& s, int64_t t, int64_t j, T* buffer) const {
    if constexpr (kLateGates > 0) {
      const T *h = recurrent_input(s, t, j, buffer), *gates = p.gates + row(t, j) * gate_row;
      for (int64_t v = 0; v < unit_vectors; ++v)
        store(buffer + v * kLanes,
              Cell::recomputed_late_input(load(gates + unit_offset(v, kSlots, 0)), load(h + v * kLanes)));
    }
    return buffer;
  }

  T* chunk_gates(const Scratch& s, int64_t t0, int64_t t, int64_t j) const {
    return s.dgates + (row(t, j) - row(t0, 0)) * gate_row;
  }

  // The same as the products take it.
  const E* product_gates(const Scratch& s, int64_t t0, int64_t t, int64_t j) const {
    return operand(s.dgates, s.narrow_gates) + (row(t, j) - row(t0, 0)) * gate_row;
  }
  // Makes it so of slots [begin, end) of vectors of units [v0, v1).
  void narrow_gates([[maybe_unused]] const Scratch& s, [[maybe_unused]] const T* dgates, int64_t v0, int64_t v1,
                    int begin, int end) const {
    if constexpr (kNarrows)
      for (int64_t v = v0; v < v1; ++v)
        for (int i = begin; i < end; ++i) {
          const int64_t at = unit_offset(v, kSlots, i);
          store(s.narrow_gates + (dgates - s.dgates) + at, load(dgates + at));
        }
  }

  // body(r, n, t[], j[]) on batches of at most `most` rows of the chunk [t0, t1) inside [begin, end), r from its first.
  template <typename F>
  void each_row_batch(int64_t t0, int64_t begin, int64_t end, int64_t most, F body) const {
    int64_t t = t0;
    int64_t time_of[kRowBatch], j_of[kRowBatch];
    for (int64_t r = begin; r < end;) {
      int64_t n = 0;
      for (; n < most && r + n < end; ++n) {
        const int64_t global = p.first_row[t0] + r + n;
        while (global >= p.first_row[t] + p.active[t]) ++t;
        time_of[n] = t, j_of[n] = global - p.first_row[t];
      }
      body(r, n, time_of, j_of);
      r += n;
    }
  }

  // dx of rows [begin, end) of the chunk at t0, panels [panel0, panel1) of its columns. A narrower dx is made in
  // `buffer` [kRowBatch, padded(I)] first.
  void chunk_dinput(const Scratch& s, int64_t t0, int64_t begin, int64_t end, int64_t panel0, int64_t panel1,
                    [[maybe_unused]] T* buffer) const {
    each_row_batch(t0, begin, end, kRowBatch, [&](int64_t r, int64_t n, const int64_t* t, const int64_t* j) {
      const E* a[kRowBatch];
      T* c[kRowBatch];
      for (int64_t i = 0; i < n; ++i) {
        a[i] = product_gates(s, t0, t[i], j[i]) + Cell::kInput * kUnits;
        if constexpr (kNarrows)
          c[i] = buffer + i * padded(I);
        else
          c[i] = outside(p.dinput, t[i], j[i]);
      }
      gradient_product(r / kRowBatch, n, p.w_ih, s.w_ih, Cell::kInputGates, I, panel0, panel1, kNarrows,
                       RowOperands<E>{a, nullptr, c, 0, 0});
      if constexpr (kNarrows)
        for (int64_t i = 0; i < n; ++i)
          for (int64_t u = first_column(I, panel0); u < min(first_column(I, panel1), I); u += kLanes)
            store_units(outside(p.dinput, t[i], j[i]), u, I, load(c[i] + u));
    });
  }

  // Rows [begin, end) of the chunk at t0: dx, and the transposed left operands of the weight gradients.
  void chunk_rows(const Scratch& s, int64_t t0, int64_t begin, int64_t end, T* buffer, T* dinput) const {
    if (p.dinput.data && p.plan.packed) chunk_dinput(s, t0, begin, end, 0, column_panels(I), dinput);
    if (p.plan.packed || p.dw_hr) chunk_transposes(s, t0, begin, end, buffer);
    if (p.dgates_ih.data) chunk_factors(s, t0, begin, end, buffer);
  }

  // A row of the chunk's dgates, unpadded to torch's [G*H].
  void unpack_row(const T* dgates, const int* gate_of, int first_slot, T* to) const {
    for (int64_t u = 0; u < H; u += kUnits)
      for (int q = 0; q < kGates; ++q)
        copy(to + gate_of[q] * H + u, dgates + u * kSlots + (first_slot + q) * kUnits, min(kUnits, H - u));
  }
  void chunk_factors(const Scratch& s, int64_t t0, int64_t begin, int64_t end, T* buffer) const {
    each_row_batch(t0, begin, end, kRowBatch, [&](int64_t r, int64_t n, const int64_t* t, const int64_t* j) {
      for (int64_t i = 0; i < n; ++i) {
        const T* dgates = s.dgates + (r + i) * gate_row;
        unpack_row(dgates, Cell::kInputGates, Cell::kInput, outside(p.dgates_ih, t[i], j[i]));
        unpack_row(dgates, Cell::kRecurrentGates, Cell::kRecurrent, outside(p.dgates_hh, t[i], j[i]));
        copy(outside(p.h_prev, t[i], j[i]), recurrent_input(s, t[i], j[i], buffer), P);
        if (!projected) continue;
        copy(outside(p.dprojected, t[i], j[i]), s.dprojected + (r + i) * ld_p, P);
        copy(outside(p.h_raw, t[i], j[i]), recompute_hidden(row(t0, r + i), 0, unit_vectors, buffer), H);
      }
    });
  }

  // `begin` is a multiple of kLanes. Of a last word that is not full the rest is zero.
  void chunk_transposes(const Scratch& s, int64_t t0, int64_t begin, int64_t end, T* buffer) const {
    each_row_batch(t0, begin, end, kLanes, [&](int64_t r, int64_t n, const int64_t* t, const int64_t* j) {
      const T* rows[kLanes] = {};
      const auto put = [&](const auto* const* from, int64_t K, E* to) {
        transpose_rows(from, n, K, to + r, s.rows, false);
        if constexpr (kNarrows)
          for (int64_t k = 0; k < K && n % kPerWord<E> > 0; ++k) to[k * s.rows + r + n] = {};
      };
      if (p.plan.packed && p.dw_ih && !p.tokens.data) {
        const E* inputs[kLanes] = {};
        for (int64_t i = 0; i < n; ++i) inputs[i] = outside(p.input, t[i], j[i]);
        put(inputs, I, s.input);
      }
      if (p.plan.packed && p.dw_hh) {
        for (int64_t i = 0; i < n; ++i) rows[i] = recurrent_input(s, t[i], j[i], buffer + i * ld_buffer());
        put(rows, P, s.h_prev);
        if (kLateGates > 0) {
          for (int64_t i = 0; i < n; ++i) rows[i] = late_input(s, t[i], j[i], buffer + i * ld_buffer());
          put(rows, P, s.late);
        }
      }
      if (p.dw_hr) {
        for (int64_t i = 0; i < n; ++i) rows[i] = s.dprojected + (r + i) * ld_p;
        put(rows, P, s.dproj_t);
      }
    });
  }

  // C[m] += A[m] B, or = where it is `fresh`, over `rows` <= kPanelRows rows of the chunk, for m in [begin, end);
  // A [.., s.rows] transposed, C [.., ld], B a panel. A few rows of C at a time take all sums while they are in the
  // first-level cache.
  void accumulate(const Scratch& s, int64_t begin, int64_t end, const E* A, int64_t rows, int nr, const W* B, T* C,
                  int64_t ld, bool fresh) const {
    constexpr int64_t kGroup = 48;  // a multiple of the rows of the tiles of 2, 3 and 4 vectors
    for (int64_t m = begin; m < end; m += kGroup) {
      const int64_t n = min(kGroup, end - m);
      const E* a[kGroup];
      T* c[kGroup];
      for (int64_t i = 0; i < n; ++i) a[i] = A + (m + i) * s.rows, c[i] = C + (m + i) * ld;
      for (int64_t k = 0; k < words(rows); k += kSumWords) {
        panel_product<E>(n, nr, Inner{1, min(kSumWords, words(rows) - k), 0}, B + k * nr * kLanes,
                         RowOperands<E>{a, fresh && k == 0 ? nullptr : c, c, 0, kLanes}, nothing);
        for (int64_t i = 0; i < n; ++i) a[i] += kSumWords * kPerWord<E>;
      }
    }
  }

  // The same for dW_ih where the input is one-hot: each row of the panel joins the column of its token.
  void accumulate_tokens(int64_t t0, int64_t first, int64_t rows, int nr, const W* panel, T* dw) const {
    each_row_batch(t0, first, first + rows, kRowBatch, [&](int64_t r, int64_t n, const int64_t* t, const int64_t* j) {
      for (int64_t i = 0; i < n; ++i) {
        T* out = dw + *outside(p.tokens, t[i], j[i]) * kPanelWidth;
        const int64_t at = r - first + i;
        const W* words = panel + at / kPerWord<E> * nr * kLanes;
        for (int q = 0; q < nr; ++q)
          store(out + q * kLanes, load(out + q * kLanes) + split<E>(load(words + q * kLanes), at % kPerWord<E>));
      }
    });
  }

  // Copies `gates` gates of a panel of the chunk's dgates, rows [first, first + rows), and adds the column sums to the
  // bias gradient unless that is null.
  void gate_gradient_panel(const Scratch& s, int64_t first, int64_t rows, int64_t panel, int first_slot, W* dst, T* db,
                           int gates = kGates) const {
    const int nr = panel_vectors(panel, gates);
    const T* src = s.dgates + first * gate_row + panel_offset(panel, kSlots, first_slot);
    V sum[kPanelVectors] = {};
    for (int64_t r = 0; r < rows; r += kPerWord<E>, src += kPerWord<E> * gate_row, dst += nr * kLanes)
      put_words(nr, dst, [&](int i, int q) {
        const V d = r + i < rows ? load(src + i * gate_row + q * kPanelStride) : V{};
        sum[q] += d;
        return d;
      });
    for (int q = 0; q < nr && db; ++q) {
      T* out = db + panel * kPanelWidth + q * kLanes;
      store(out, load(out) + sum[q]);
    }
  }

  // The chunk's part of the weight gradients: of a panel of gates, part `part` of `parts` of the rows of dW_ih^T and
  // dW_hh^T, one after the other. After the last chunk they go to their place while they are in the cache.
  void chunk_weights(const Scratch& s, int64_t t0, int64_t rows, int64_t panel, int64_t part, int64_t parts, W* buffer,
                     int64_t worker, bool is_first_chunk, bool is_last_chunk) const {
    constexpr bool same = Cell::kInput == Cell::kRecurrent;  // then one copy serves both products and both biases
    const int nr = panel_vectors(panel);
    const int64_t inputs = p.dw_ih && !p.tokens.data ? I : 0, total = inputs + (p.dw_hh ? P : 0);
    const int64_t begin = total * part / parts, end = total * (part + 1) / parts;
    const bool first = part == 0, sums = first && Cell::kNorms == 0;  // else see chunk_vectors
    const int64_t x_end = min(end, inputs), h_begin = max(begin, inputs) - inputs, h_end = end - inputs;
    const bool takes_tokens = first && p.dw_ih && p.tokens.data;
    T* dw_ih = s.dw_ih + (is_one_chunk() ? worker : panel) * I * kPanelWidth;
    T* dw_hh = s.dw_hh + (is_one_chunk() ? worker : panel) * P * kPanelWidth;
    if (is_first_chunk && takes_tokens) zero(dw_ih, I * kPanelWidth);
    if (is_first_chunk && rows == 0) {
      zero(dw_ih + begin * kPanelWidth, (x_end - begin) * kPanelWidth);
      zero(dw_hh + h_begin * kPanelWidth, (h_end - h_begin) * kPanelWidth);
    }
    for (int64_t r = 0; r < rows; r += kPanelRows) {
      const int64_t n = min(kPanelRows, rows - r);
      const bool fresh = is_first_chunk && r == 0;
      if (first || begin < inputs || same)
        gate_gradient_panel(s, r, n, panel, Cell::kInput, buffer, sums ? s.db_ih : nullptr);
      if (takes_tokens) accumulate_tokens(t0, r, n, nr, buffer, dw_ih);
      accumulate(s, begin, x_end, s.input + r, n, nr, buffer, dw_ih, kPanelWidth, fresh);
      if (!same && (first || end > inputs))
        gate_gradient_panel(s, r, n, panel, Cell::kRecurrent, buffer, sums ? s.db_hh : nullptr);
      if constexpr (kLateGates == 0) {
        accumulate(s, h_begin, h_end, s.h_prev + r, n, nr, buffer, dw_hh, kPanelWidth, fresh);
      } else if (h_begin < h_end) {  // each product needs its gates side by side
        static_assert(same, "the bias gradients are those of the copy above");
        gate_gradient_panel(s, r, n, panel, Cell::kRecurrent, buffer, nullptr, kEarlyGates);
        accumulate(s, h_begin, h_end, s.h_prev + r, n, kEarlyGates, buffer, dw_hh, kPanelWidth, fresh);
        gate_gradient_panel(s, r, n, panel, Cell::kRecurrent + kEarlyGates, buffer, nullptr, kLateGates);
        accumulate(s, h_begin, h_end, s.late + r, n, kLateGates, buffer, dw_hh + kEarlyGates * kLanes, kPanelWidth,
                   fresh);
      }
    }
    if (!is_last_chunk) return;
    if (p.dw_ih)
      unpack_panel(dw_ih, panel, takes_tokens ? 0 : begin, takes_tokens ? I : x_end, I, Cell::kInputGates, p.dw_ih);
    if (p.dw_hh) unpack_panel(dw_hh, panel, h_begin, h_end, P, Cell::kRecurrentGates, p.dw_hh);
  }

  // The chunk's part of dW_hr = dh^T h_raw, panels [begin, end) of its columns.
  void chunk_projection(const Scratch& s, int64_t t0, int64_t rows, int64_t begin, int64_t end, W* buffer,
                        T* hidden) const {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int nr = column_vectors(H, panel);
      const int64_t v0 = first_column(H, panel) / kLanes;
      for (int64_t r = 0; r < rows; r += kPanelRows) {
        const int64_t n = min(kPanelRows, rows - r);
        for (int64_t i = 0; i < n; i += kPerWord<E>) {
          const T* of[kPerWord<E>] = {};  // rows in pieces of `hidden`, which has room for kUnits
          for (int64_t k = 0; k < min(kPerWord<E>, n - i); ++k)
            of[k] = recompute_hidden(row(t0, r + i + k), v0, v0 + nr, hidden + k * ld_buffer()) + v0 * kLanes;
          put_words(nr, buffer + i / kPerWord<E> * nr * kLanes,
                    [&](int k, int q) { return of[k] ? load(of[k] + q * kLanes) : V{}; });
        }
        accumulate(s, 0, P, s.dproj_t + r, n, nr, buffer, s.dw_hr + v0 * kLanes, ld_h, false);
      }
    }
  }

  // The chunk's part of the gradients of the weights by unit, vectors of units [v0, v1): of a peephole the sum over the
  // chunk's rows of what its slot got times the c that it saw, of a cell with norms what it makes of normals and
  // dgates.
  void chunk_vectors(const Scratch& s, int64_t t0, int64_t rows, int64_t v0, int64_t v1) const {
    each_row_batch(t0, 0, rows, kRowBatch, [&](int64_t r, int64_t n, const int64_t* t, const int64_t* j) {
      for (int64_t v = v0; v < v1; ++v) {
        V sum[kVectors] = {};
        for (int64_t i = 0; i < n; ++i) {
          const T* gates = p.gates + row(t0, r + i) * gate_row;
          V slot[kSlots], dslot[kSlots];
#pragma GCC unroll 16
          for (int q = 0; q < kSlots; ++q) {
            slot[q] = load(gates + unit_offset(v, kSlots, q));
            dslot[q] = load(s.dgates + (r + i) * gate_row + unit_offset(v, kSlots, q));
          }
          if constexpr (Cell::kPeepholes > 0) {
            const V before = load(cell_before(s, t[i], j[i]) + v * kLanes);
            const V after =
                p.keep_c.data ? Cell::next_cell(slot, before) : load(p.cells + row(t[i], j[i]) * ld_h + v * kLanes);
            for (int k = 0; k < Cell::kPeepholes; ++k)
              sum[k] += dslot[Cell::kPeepholeSlots[k]] * (k + 1 < Cell::kPeepholes ? before : after);
          }
          if constexpr (Cell::kNorms > 0) {
            const Moments<T>* of = s.moments + (r + i) * Cell::kNorms;
            for (int q = 0; q < kFirstOwnSlot; ++q) slot[q] = of[q / kGates].normal(slot[q]);
            if constexpr (Cell::kNorms == 3) slot[Cell::kC] = of[2].normal(slot[Cell::kC]);
            Cell::backward_gains(slot, dslot, sum);
          }
        }
        for (int k = 0; k < kVectors; ++k) {
          T* out = s.dvectors + k * ld_h + v * kLanes;
          store(out, load(out) + sum[k]);
        }
      }
    });
  }

  // The weight gradients of a call with few rows, straight to their place: row g*H + u of dW_ih is the sum over the
  // rows r of dgates[r, u, g] * x_r, of dW_hh the same with h_prev. Tokens, or null, stand for one-hot rows `left`.
  // Gates' units [begin, end).
  template <typename Left>
  void direct_weights(int64_t rows, const T* dgates, const Left* const* left, const int64_t* tokens, int64_t K,
                      const int* gate_of, int first_slot, E* dw, E* db, int64_t begin, int64_t end,
                      int gates = kGates) const {
    for (int q = 0; q < gates; ++q)
      for (int64_t u = begin; u < end; ++u) {
        const T* d = dgates + u / kUnits * kSlots * kUnits + (first_slot + q) * kUnits + u % kUnits;
        if (db) {
          T sum = 0;
          for (int64_t r = 0; r < rows; ++r) sum += d[r * gate_row];
          db[gate_of[q] * H + u] = narrow<E>(sum);
        }
        if (!dw) continue;
        E* out = dw + (gate_of[q] * H + u) * K;
        if (tokens) {
          zero(out, K);
          for (int64_t r = 0; r < rows; ++r) {
            T sum = 0;  // of all rows with this token, each time again
            for (int64_t i = 0; i < rows; ++i) sum += tokens[i] == tokens[r] ? d[i * gate_row] : 0;
            out[tokens[r]] = narrow<E>(sum);
          }
          continue;
        }
        int64_t k = 0;
        for (; k + kLanes <= K; k += kLanes) {
          V sum{};
          for (int64_t r = 0; r < rows; ++r) sum += d[r * gate_row] * load(left[r] + k);
          store(out + k, sum);
        }
        for (; k < K; ++k) {
          T sum = 0;
          for (int64_t r = 0; r < rows; ++r) sum += d[r * gate_row] * widen(left[r][k]);
          out[k] = narrow<E>(sum);
        }
      }
  }
  void direct_weights(const Scratch& s, int64_t rows) const {
    const E* x[kInPlaceRows];
    const T* h[kInPlaceRows];
    int64_t tokens[kInPlaceRows];
    each_row_batch(0, 0, rows, kInPlaceRows, [&](int64_t, int64_t n, const int64_t* t, const int64_t* j) {
      for (int64_t i = 0; i < n; ++i) {
        if (p.tokens.data)
          tokens[i] = *outside(p.tokens, t[i], j[i]);
        else
          x[i] = outside(p.input, t[i], j[i]);
        if (p.dw_hh) h[i] = recurrent_input(s, t[i], j[i], s.hidden + i * ld_buffer());
      }
    });
    parallel(H, [&](int64_t begin, int64_t end) {
      direct_weights(rows, s.dgates, x, p.tokens.data ? tokens : nullptr, I, Cell::kInputGates, Cell::kInput, p.dw_ih,
                     p.db_ih, begin, end);
      direct_weights(rows, s.dgates, h, nullptr, P, Cell::kRecurrentGates, Cell::kRecurrent, p.dw_hh, p.db_hh, begin,
                     end, kEarlyGates);
    });
    if constexpr (kLateGates > 0) {
      each_row_batch(0, 0, rows, kInPlaceRows, [&](int64_t, int64_t n, const int64_t* t, const int64_t* j) {
        for (int64_t i = 0; i < n && p.dw_hh; ++i) h[i] = late_input(s, t[i], j[i], s.hidden + i * ld_buffer());
      });
      parallel(H, [&](int64_t begin, int64_t end) {
        direct_weights(rows, s.dgates, h, nullptr, P, Cell::kRecurrentGates + kEarlyGates,
                       Cell::kRecurrent + kEarlyGates, p.dw_hh, p.db_hh, begin, end, kLateGates);
      });
    }
  }

  // Columns [begin, end) of torch's [G*H, K], of one panel, from [K, kPanelWidth], transposed and unpadded.
  void unpack_panel(const T* from, int64_t panel, int64_t begin, int64_t end, int64_t K, const int* gate_of,
                    E* to) const {
    for (int q = 0; q < panel_vectors(panel); ++q)
      for (int64_t k = begin; k < end; k += kLanes) {
        const T* rows[kLanes] = {};
        const int64_t n = min(kLanes, end - k);
        for (int64_t i = 0; i < n; ++i) rows[i] = from + (k + i) * kPanelWidth + q * kLanes;
        transpose_rows(rows, n, weight_lanes(panel, q), to + weight_row(gate_of, panel, q) * K + k, K, false);
      }
  }
  // Of all panels, with K = 1: a bias.
  void unpack_bias(const T* from, const int* gate_of, E* to) const {
    for (int64_t panel = 0; panel < gate_panels && to; ++panel)
      unpack_panel(from + panel * kPanelWidth, panel, 0, 1, 1, gate_of, to);
  }
};

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
