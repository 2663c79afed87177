// Backward of a cell over time: for a chunk of steps, last first, step by step the cell and dh_prev = dgates W_hh;
// then, for the chunk's rows at once, dx = dgates W_ih and the weight gradients, accumulated over chunks.
#pragma once

#include "layout.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename Cell, typename T>
struct SequenceBackward : SequenceLayout<Cell, T> {
  using Base = SequenceLayout<Cell, T>;
  using Base::apply_resets;
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
  using Base::kGates;
  using Base::kLanes;
  using Base::kLateGates;
  using Base::kPanelStride;
  using Base::kPanelVectors;
  using Base::kSlots;
  using Base::kUnits;
  using Base::ld_h;
  using Base::ld_p;
  using Base::load_peepholes;
  using Base::load_state;
  using Base::load_units;
  using Base::N;
  using Base::nothing;
  using Base::outside;
  using Base::p;
  using Base::P;
  using Base::pack_backward;
  using Base::pack_peepholes;
  using Base::pack_row;
  using Base::packed_product;
  using Base::panel_offset;
  using Base::panel_vectors;
  using Base::parallel;
  using Base::parallel_batch;
  using Base::projected;
  using Base::row;
  using Base::store_state;
  using Base::T_;
  using Base::time;
  using Base::unit_offset;
  using Base::unit_vectors;
  using Base::weight_lanes;
  using Base::weight_row;
  using typename Base::Params;
  using typename Base::V;

  static constexpr int64_t kPanelRows = 2 * kSumRows;  // of dgates, copied for the weight gradients of one panel
  static constexpr int64_t kPanelWidth = kPanelVectors * kLanes;

  struct Scratch {
    T *w_ih, *w_hh, *w_hr;        // panels for d = dgates W; w_hh of the early gates
    T *w_late, *dlate;            // panels of the late gates of W_hh; [N, ld_h] gradient of what they were fed
    T *h0, *c0;                   // [N, ld_p], [N, ld_h]
    T* zeros;                     // [max(ld_h, ld_p)]
    T *dh, *dc;                   // [N, ld_p], [N, ld_h]: gradient of the state, carried from step to step
    T* dh_raw;                    // [N, ld_h] of a projected cell
    T* dgates;                    // [chunk rows, gate_row]
    T* dprojected;                // [chunk rows, ld_p] gradient of the projected h
    T *input, *h_prev, *dproj_t;  // transposed chunk: [I, chunk rows], [P, chunk rows], [P, chunk rows]
    T* late;                      // [P, chunk rows] transposed, what the late gates were fed
    T* w_ch;                      // [kPeepholes, ld_h]
    T* dw_ch;                     // [kPeepholes, ld_h]
    T *mask, *dmasked;            // [N, ld_p] recurrent_mask, and the gradient of its product with h
    T* panels;                    // [threads][kPanelRows, kMaxPanel, kLanes]
    T* hidden;         // [threads][kUnits, ld_buffer], or [kInPlaceRows, ld_buffer]: what the products were taken of
    T *dw_ih, *dw_hh;  // [gate_panels, I, kPanelWidth], [gate_panels, P, kPanelWidth]
    T *db_ih, *db_hh;  // [gate_panels, kPanelWidth]
    T* dw_hr;          // [P, ld_h]
    int64_t rows;      // leading dimension of the transposed chunk
    int64_t size;
    Scratch(const SequenceBackward& d, T* base) {
      Arena<T> arena{base};
      // an odd number of lines: a power of two would send every row of the transposed chunk to the same cache sets
      rows = (ceil_div(d.p.plan.chunk_steps * d.N, kUnits) | 1) * kUnits;
      w_ih = arena.take(d.p.dinput.data ? d.backward_panels_size(d.I) : 0);
      w_hh = arena.take(d.backward_panels_size(d.P, kEarlyGates));
      w_late = arena.take(kLateGates ? d.backward_panels_size(d.P, kLateGates) : 0);
      dlate = arena.take(kLateGates ? d.N * d.ld_h : 0);
      w_hr = arena.take(d.projected ? d.column_panels(d.H) * column_panel_size(d.P) : 0);
      h0 = arena.take(d.N * d.ld_p);
      c0 = arena.take(Cell::kHasCell ? d.N * d.ld_h : 0);
      zeros = arena.take(max(d.ld_h, d.ld_p));
      dh = arena.take(d.N * d.ld_p);
      dc = arena.take(Cell::kHasCell ? d.N * d.ld_h : 0);
      dh_raw = arena.take(d.projected ? d.N * d.ld_h : 0);
      dgates = arena.take(rows * d.gate_row);
      dprojected = arena.take(d.projected ? rows * d.ld_p : 0);
      const bool packed = d.p.plan.packed;
      input = arena.take(packed && d.p.dw_ih && !d.p.tokens.data ? d.I * rows : 0);
      h_prev = arena.take(packed && d.p.dw_hh ? d.P * rows : 0);
      late = arena.take(kLateGates && packed && d.p.dw_hh ? d.P * rows : 0);
      dproj_t = arena.take(d.p.dw_hr ? d.P * rows : 0);
      w_ch = arena.take(Cell::kPeepholes * d.ld_h);
      dw_ch = arena.take(Cell::kPeepholes * d.ld_h);
      mask = arena.take(d.p.recurrent_mask ? d.N * d.ld_p : 0);
      dmasked = arena.take(d.p.recurrent_mask ? d.N * d.ld_p : 0);
      panels = arena.take(d.p.plan.threads * kPanelRows * kMaxPanel * kLanes);
      hidden = arena.take(max(d.p.plan.threads * kUnits, kInPlaceRows) * d.ld_buffer());
      const int64_t width = d.gate_panels * kPanelWidth;
      dw_ih = arena.take(packed && d.p.dw_ih ? d.I * width : 0);
      dw_hh = arena.take(packed && d.p.dw_hh ? d.P * width : 0);
      db_ih = arena.take(width);
      db_hh = arena.take(width);
      dw_hr = arena.take(d.p.dw_hr ? d.P * d.ld_h : 0);
      size = arena.used;
    }
  };

  int64_t ld_buffer() const { return max(ld_h, ld_p); }

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

  // For a projected cell: dh += doutput, kept for dW_hr; then dh_raw = dh W_hr, panels [panel0, panel1).
  void add_output(const Scratch& s, int64_t t0, int64_t t, int64_t j0, int64_t j1) const {
    for (int64_t j = j0; j < min(j1, p.active[t]); ++j) {
      T* dh = s.dh + j * ld_p;
      if (p.doutput.data) {
        const T* dy = outside(p.doutput, t, j);
        for (int64_t u = 0; u < P; ++u) dh[u] += dy[u];
      }
      copy(s.dprojected + (row(t, j) - row(t0, 0)) * ld_p, dh, ld_p);
    }
  }
  void backward_projection(const Scratch& s, int64_t t, int64_t j0, int64_t j1, int64_t panel0, int64_t panel1) const {
    const int64_t last = min(j1, p.active[t]);
    for (int64_t j = j0; j < last; j += kRowBatch) {
      const int64_t n = min(kRowBatch, last - j);
      const T* a[kRowBatch];
      T* c[kRowBatch];
      for (int64_t i = 0; i < n; ++i) a[i] = s.dh + (j + i) * ld_p, c[i] = s.dh_raw + (j + i) * ld_h;
      packed_product(n, P, s.w_hr, H, panel0, panel1, RowOperands<T>{a, nullptr, c, 0, 0});
    }
  }

  // The cell, for vectors of units [v0, v1): dgates, and dh and dc become what reaches the earlier state directly.
  void backward_cells(const Scratch& s, int64_t t0, int64_t t, int64_t j0, int64_t j1, int64_t v0, int64_t v1) const {
    for (int64_t j = j0; j < min(j1, p.active[t]); ++j) {
      const T* gates = p.gates + row(t, j) * gate_row;
      T* dgates = chunk_gates(s, t0, t, j);
      const T* h_prev = Cell::kHidden == Hidden::kSaved ? hidden_before(s, t, j, nullptr) : nullptr;
      const T* c_prev = Cell::kHasCell ? cell_before(s, t, j) : nullptr;
      const T* c = Cell::kHasCell ? p.cells + row(t, j) * ld_h : nullptr;
      T* carried = s.dh + j * ld_p;
      const T* dh = projected ? s.dh_raw + j * ld_h : carried;
      const T* dy = projected || !p.doutput.data ? nullptr : outside(p.doutput, t, j);
      T* dc = Cell::kHasCell ? s.dc + j * ld_h : nullptr;
      const T* dall_c = Cell::kHasCell && p.dall_c.data ? outside(p.dall_c, t, j) : nullptr;
      const T* keep_h = p.keep_h.data ? outside(p.keep_h, t, j) : nullptr;
      const T* keep_c = Cell::kHasCell && p.keep_c.data ? outside(p.keep_c, t, j) : nullptr;
      for (int64_t v = v0; v < v1; ++v) {
        const int64_t u = v * kLanes;
        V slot[kSlots];
#pragma GCC unroll 8
        for (int i = 0; i < kSlots; ++i) slot[i] = load(gates + unit_offset(v, kSlots, i));
        V dh_v = load(dh + u), dc_v = Cell::kHasCell ? load(dc + u) : V{}, dh_prev;
        if (dy) dh_v += load_units(dy, u, H);
        if (dall_c) dc_v += load_units(dall_c, u, H);
        V c_v = Cell::kHasCell ? load(c + u) : V{}, kept_dh{}, kept_dc{}, w[Cell::kPeepholes + 1];
        load_peepholes(s.w_ch, u, w);
        if (keep_h) kept_dh = load_units(keep_h, u, H) * dh_v, dh_v -= kept_dh;
        if constexpr (Cell::kHasCell)
          if (keep_c) {  // what was kept is c after the mixture
            kept_dc = load_units(keep_c, u, H) * dc_v, dc_v -= kept_dc;
            c_v = Cell::next_cell(slot, load(c_prev + u));
          }
        Cell::backward(slot, Cell::kHidden == Hidden::kSaved ? load(h_prev + u) : V{},
                       Cell::kHasCell ? load(c_prev + u) : V{}, c_v, dh_v, dc_v, dh_prev, w);
        if (keep_h) dh_prev += kept_dh;
        if (keep_c) dc_v += kept_dc;
#pragma GCC unroll 8
        for (int i = 0; i < kSlots; ++i) store(dgates + unit_offset(v, kSlots, i), slot[i]);
        if (Cell::kHasCell) store(dc + u, dc_v);
        if (!projected) store(carried + u, dh_prev);
      }
    }
  }

  // dlate = dgates W_hh over the late gates, for column panels [panel0, panel1).
  void backward_late_product(const Scratch& s, int64_t t0, int64_t t, int64_t j0, int64_t j1, int64_t panel0,
                             int64_t panel1) const {
    const int64_t last = min(j1, p.active[t]);
    for (int64_t j = j0; j < last; j += kRowBatch) {
      const int64_t n = min(kRowBatch, last - j);
      const T* a[kRowBatch];
      T* c[kRowBatch];
      for (int64_t i = 0; i < n; ++i)
        a[i] = chunk_gates(s, t0, t, j + i) + (Cell::kRecurrent + kEarlyGates) * kUnits,
        c[i] = s.dlate + (j + i) * ld_h;
      gradient_product(n, p.w_hh, s.w_late, Cell::kRecurrentGates + kEarlyGates, P, panel0, panel1, true,
                       RowOperands<T>{a, nullptr, c, 0, 0}, kLateGates);
    }
  }
  // The gate that made the late gates' input, and its share of dh, for vectors of units [v0, v1).
  void backward_late_cells(const Scratch& s, int64_t t0, int64_t t, int64_t j0, int64_t j1, int64_t v0,
                           int64_t v1) const {
    for (int64_t j = j0; j < min(j1, p.active[t]); ++j) {
      const T* h = hidden_before(s, t, j, nullptr);
      T* dgates = chunk_gates(s, t0, t, j);
      T* dh = s.dh + j * ld_p;
      for (int64_t v = v0; v < v1; ++v) {
        const int64_t u = v * kLanes;
        V slot = load(dgates + unit_offset(v, kSlots, 0));
        const V dlate = load_units(s.dlate + j * ld_h, u, H);
        V h_v = load(h + u), mask = V{} + 1;
        if (p.recurrent_mask) mask = load(s.mask + j * ld_p + u), h_v *= mask;
        store(dh + u, load(dh + u) + mask * Cell::backward_late(slot, h_v, dlate));
        store(dgates + unit_offset(v, kSlots, 0), slot);
      }
    }
  }

  // dh += dgates W_hh over the early gates, for column panels [panel0, panel1).
  void backward_hidden(const Scratch& s, int64_t t0, int64_t t, int64_t j0, int64_t j1, int64_t panel0,
                       int64_t panel1) const {
    const int64_t last = min(j1, p.active[t]);
    for (int64_t j = j0; j < last; j += kRowBatch) {
      const int64_t n = min(kRowBatch, last - j);
      const T* a[kRowBatch];
      T* c[kRowBatch];
      for (int64_t i = 0; i < n; ++i)
        a[i] = chunk_gates(s, t0, t, j + i) + Cell::kRecurrent * kUnits,
        c[i] = (p.recurrent_mask ? s.dmasked : s.dh) + (j + i) * ld_p;
      gradient_product(n, p.w_hh, s.w_hh, Cell::kRecurrentGates, P, panel0, panel1, true,
                       RowOperands<T>{a, projected || p.recurrent_mask ? nullptr : c, c, 0, 0}, kEarlyGates);
      if (!p.recurrent_mask) continue;
      const int64_t first = first_column(P, panel0), end = min(first_column(P, panel1), P);
      for (int64_t i = j * ld_p; i < (j + n) * ld_p; i += ld_p)
        for (int64_t u = i + first; u < i + end; ++u) s.dh[u] = (projected ? T{} : s.dh[u]) + s.mask[u] * s.dmasked[u];
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

  // dx of rows [begin, end) of the chunk at t0, panels [panel0, panel1) of its columns.
  void chunk_dinput(const Scratch& s, int64_t t0, int64_t begin, int64_t end, int64_t panel0, int64_t panel1) const {
    each_row_batch(t0, begin, end, kRowBatch, [&](int64_t r, int64_t n, const int64_t* t, const int64_t* j) {
      const T* a[kRowBatch];
      T* c[kRowBatch];
      for (int64_t i = 0; i < n; ++i)
        a[i] = s.dgates + (r + i) * gate_row + Cell::kInput * kUnits, c[i] = outside(p.dinput, t[i], j[i]);
      gradient_product(n, p.w_ih, s.w_ih, Cell::kInputGates, I, panel0, panel1, false,
                       RowOperands<T>{a, nullptr, c, 0, 0});
    });
  }

  // Rows [begin, end) of the chunk at t0: dx, and the transposed left operands of the weight gradients.
  void chunk_rows(const Scratch& s, int64_t t0, int64_t begin, int64_t end, T* buffer) const {
    if (p.dinput.data && p.plan.packed) chunk_dinput(s, t0, begin, end, 0, column_panels(I));
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

  void chunk_transposes(const Scratch& s, int64_t t0, int64_t begin, int64_t end, T* buffer) const {
    each_row_batch(t0, begin, end, kLanes, [&](int64_t r, int64_t n, const int64_t* t, const int64_t* j) {
      const T* rows[kLanes] = {};
      if (p.plan.packed && p.dw_ih && !p.tokens.data) {
        for (int64_t i = 0; i < n; ++i) rows[i] = outside(p.input, t[i], j[i]);
        transpose_rows(rows, n, I, s.input + r, s.rows, false);
      }
      if (p.plan.packed && p.dw_hh) {
        for (int64_t i = 0; i < n; ++i) rows[i] = recurrent_input(s, t[i], j[i], buffer + i * ld_buffer());
        transpose_rows(rows, n, P, s.h_prev + r, s.rows, false);
        if (kLateGates > 0) {
          for (int64_t i = 0; i < n; ++i) rows[i] = late_input(s, t[i], j[i], buffer + i * ld_buffer());
          transpose_rows(rows, n, P, s.late + r, s.rows, false);
        }
      }
      if (p.dw_hr) {
        for (int64_t i = 0; i < n; ++i) rows[i] = s.dprojected + (r + i) * ld_p;
        transpose_rows(rows, n, P, s.dproj_t + r, s.rows, false);
      }
    });
  }

  // C[m] += A[m] B over `rows` <= kPanelRows rows of the chunk, for m in [begin, end); A [.., s.rows] transposed,
  // C [.., ld], B a panel. A few rows of C at a time take all sums while they are in the first-level cache.
  void accumulate(const Scratch& s, int64_t begin, int64_t end, const T* A, int64_t rows, int nr, const T* B, T* C,
                  int64_t ld) const {
    constexpr int64_t kGroup = 48;  // a multiple of the rows of the tiles of 2, 3 and 4 vectors
    for (int64_t m = begin; m < end; m += kGroup) {
      const int64_t n = min(kGroup, end - m);
      const T* a[kGroup];
      T* c[kGroup];
      for (int64_t i = 0; i < n; ++i) a[i] = A + (m + i) * s.rows, c[i] = C + (m + i) * ld;
      for (int64_t r = 0; r < rows; r += kSumRows) {
        panel_product(n, nr, Inner{1, min(kSumRows, rows - r), 0}, B + r * nr * kLanes,
                      RowOperands<T>{a, c, c, 0, kLanes}, nothing);
        for (int64_t i = 0; i < n; ++i) a[i] += kSumRows;
      }
    }
  }

  // The same for dW_ih where the input is one-hot: each row of the panel joins the column of its token.
  void accumulate_tokens(int64_t t0, int64_t first, int64_t rows, int nr, const T* panel, T* dw) const {
    each_row_batch(t0, first, first + rows, kRowBatch, [&](int64_t, int64_t n, const int64_t* t, const int64_t* j) {
      for (int64_t i = 0; i < n; ++i, panel += nr * kLanes) {
        T* out = dw + *outside(p.tokens, t[i], j[i]) * kPanelWidth;
        for (int q = 0; q < nr; ++q) store(out + q * kLanes, load(out + q * kLanes) + load(panel + q * kLanes));
      }
    });
  }

  // Copies `gates` gates of a panel of the chunk's dgates, rows [first, first + rows), and adds the column sums to the
  // bias gradient unless that is null.
  void gate_gradient_panel(const Scratch& s, int64_t first, int64_t rows, int64_t panel, int first_slot, T* dst, T* db,
                           int gates = kGates) const {
    const int nr = panel_vectors(panel, gates);
    const T* src = s.dgates + first * gate_row + panel_offset(panel, kSlots, first_slot);
    V sum[kPanelVectors] = {};
    for (int64_t r = 0; r < rows; ++r, src += gate_row)
      for (int q = 0; q < nr; ++q) {
        const V d = load(src + q * kPanelStride);
        sum[q] += d;
        store(dst + (r * nr + q) * kLanes, d);
      }
    for (int q = 0; q < nr && db; ++q) {
      T* out = db + panel * kPanelWidth + q * kLanes;
      store(out, load(out) + sum[q]);
    }
  }

  // The chunk's part of the weight gradients: of each panel of gates, part `part` of `parts` of the rows of dW_ih^T and
  // dW_hh^T, one after the other.
  void chunk_weights(const Scratch& s, int64_t t0, int64_t rows, int64_t panel, int64_t part, int64_t parts,
                     T* buffer) const {
    constexpr bool same = Cell::kInput == Cell::kRecurrent;  // then one copy serves both products and both biases
    const int nr = panel_vectors(panel);
    const int64_t inputs = p.dw_ih && !p.tokens.data ? I : 0, total = inputs + (p.dw_hh ? P : 0);
    const int64_t begin = total * part / parts, end = total * (part + 1) / parts;
    const bool first = part == 0;
    T* dw_ih = s.dw_ih + panel * I * kPanelWidth;
    T* dw_hh = s.dw_hh + panel * P * kPanelWidth;
    for (int64_t r = 0; r < rows; r += kPanelRows) {
      const int64_t n = min(kPanelRows, rows - r);
      if (first || begin < inputs || same)
        gate_gradient_panel(s, r, n, panel, Cell::kInput, buffer, first ? s.db_ih : nullptr);
      if (first && p.dw_ih && p.tokens.data) accumulate_tokens(t0, r, n, nr, buffer, dw_ih);
      accumulate(s, begin, min(end, inputs), s.input + r, n, nr, buffer, dw_ih, kPanelWidth);
      if (!same && (first || end > inputs))
        gate_gradient_panel(s, r, n, panel, Cell::kRecurrent, buffer, first ? s.db_hh : nullptr);
      const int64_t h_begin = max(begin, inputs) - inputs, h_end = end - inputs;
      if constexpr (kLateGates == 0) {
        accumulate(s, h_begin, h_end, s.h_prev + r, n, nr, buffer, dw_hh, kPanelWidth);
      } else if (h_begin < h_end) {  // each product needs its gates side by side
        static_assert(same, "the bias gradients are those of the copy above");
        gate_gradient_panel(s, r, n, panel, Cell::kRecurrent, buffer, nullptr, kEarlyGates);
        accumulate(s, h_begin, h_end, s.h_prev + r, n, kEarlyGates, buffer, dw_hh, kPanelWidth);
        gate_gradient_panel(s, r, n, panel, Cell::kRecurrent + kEarlyGates, buffer, nullptr, kLateGates);
        accumulate(s, h_begin, h_end, s.late + r, n, kLateGates, buffer, dw_hh + kEarlyGates * kLanes, kPanelWidth);
      }
    }
  }

  // The chunk's part of dW_hr = dh^T h_raw, panels [begin, end) of its columns.
  void chunk_projection(const Scratch& s, int64_t t0, int64_t rows, int64_t begin, int64_t end, T* buffer,
                        T* hidden) const {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int nr = column_vectors(H, panel);
      const int64_t v0 = first_column(H, panel) / kLanes;
      for (int64_t r = 0; r < rows; r += kPanelRows) {
        const int64_t n = min(kPanelRows, rows - r);
        for (int64_t i = 0; i < n; ++i)
          copy(buffer + i * nr * kLanes, recompute_hidden(row(t0, r + i), v0, v0 + nr, hidden) + v0 * kLanes,
               nr * kLanes);
        accumulate(s, 0, P, s.dproj_t + r, n, nr, buffer, s.dw_hr + v0 * kLanes, ld_h);
      }
    }
  }

  // The chunk's part of the gradients of the peepholes' weights, vectors of units [v0, v1): the sum over its rows of
  // what each slot got times the c that it saw.
  void chunk_peepholes(const Scratch& s, int64_t t0, int64_t rows, int64_t v0, int64_t v1) const {
    if constexpr (Cell::kPeepholes > 0)
      each_row_batch(t0, 0, rows, kRowBatch, [&](int64_t r, int64_t n, const int64_t* t, const int64_t* j) {
        const T* c_prev[kRowBatch];
        for (int64_t i = 0; i < n; ++i) c_prev[i] = cell_before(s, t[i], j[i]);
        for (int64_t v = v0; v < v1; ++v) {
          V sum[Cell::kPeepholes] = {};
          for (int64_t i = 0; i < n; ++i) {
            const T* dgates = s.dgates + (r + i) * gate_row;
            const int64_t global = row(t0, r + i);
            const V before = load(c_prev[i] + v * kLanes);
            V after;
            if (p.keep_c.data) {
              V slot[kSlots];
              for (int q = 0; q < kSlots; ++q) slot[q] = load(p.gates + global * gate_row + unit_offset(v, kSlots, q));
              after = Cell::next_cell(slot, before);
            } else {
              after = load(p.cells + global * ld_h + v * kLanes);
            }
            for (int k = 0; k < Cell::kPeepholes; ++k)
              sum[k] += load(dgates + unit_offset(v, kSlots, Cell::kPeepholeSlots[k])) *
                        (k + 1 < Cell::kPeepholes ? before : after);
          }
          for (int k = 0; k < Cell::kPeepholes; ++k) {
            T* out = s.dw_ch + k * ld_h + v * kLanes;
            store(out, load(out) + sum[k]);
          }
        }
      });
  }

  // The weight gradients of a call with few rows, straight to their place: row g*H + u of dW_ih is the sum over the
  // rows r of dgates[r, u, g] * x_r, of dW_hh the same with h_prev. Tokens, or null, stand for one-hot rows `left`.
  // Gates' units [begin, end).
  void direct_weights(int64_t rows, const T* dgates, const T* const* left, const int64_t* tokens, int64_t K,
                      const int* gate_of, int first_slot, T* dw, T* db, int64_t begin, int64_t end,
                      int gates = kGates) const {
    for (int q = 0; q < gates; ++q)
      for (int64_t u = begin; u < end; ++u) {
        const T* d = dgates + u / kUnits * kSlots * kUnits + (first_slot + q) * kUnits + u % kUnits;
        if (db) {
          T sum = 0;
          for (int64_t r = 0; r < rows; ++r) sum += d[r * gate_row];
          db[gate_of[q] * H + u] = sum;
        }
        if (!dw) continue;
        T* out = dw + (gate_of[q] * H + u) * K;
        if (tokens) {
          zero(out, K);
          for (int64_t r = 0; r < rows; ++r) out[tokens[r]] += d[r * gate_row];
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
          for (int64_t r = 0; r < rows; ++r) sum += d[r * gate_row] * left[r][k];
          out[k] = sum;
        }
      }
  }
  void direct_weights(const Scratch& s, int64_t rows) const {
    const T *x[kInPlaceRows], *h[kInPlaceRows];
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

  // [gate_panels, K, kPanelWidth] transposed and unpadded to torch's [G*H, K]; with K = 1 a bias.
  void unpack_gates(const T* from, int64_t K, const int* gate_of, T* to) const {
    if (!to) return;
    parallel(gate_panels, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel)
        for (int q = 0; q < panel_vectors(panel); ++q) {
          for (int64_t k = 0; k < K; k += kLanes) {
            const T* rows[kLanes] = {};
            const int64_t n = min(kLanes, K - k);
            for (int64_t i = 0; i < n; ++i) rows[i] = from + (panel * K + k + i) * kPanelWidth + q * kLanes;
            transpose_rows(rows, n, weight_lanes(panel, q), to + weight_row(gate_of, panel, q) * K + k, K, false);
          }
        }
    });
  }

  // Steps [s0, s1) of sequences [j0, j1), last first. `divide` as in forward, over units or panels.
  template <typename Divide>
  void chunk_steps(const Scratch& s, int64_t s0, int64_t s1, int64_t j0, int64_t j1, Divide divide) const {
    const int64_t t0 = p.reverse ? T_ - s1 : s0;
    for (int64_t step = s1 - 1; step >= s0; --step) {
      const int64_t t = time(step);
      if (projected) {
        add_output(s, t0, t, j0, j1);
        divide(column_panels(H), [&](int64_t a, int64_t b) { backward_projection(s, t, j0, j1, a, b); });
      }
      divide(unit_vectors, [&](int64_t a, int64_t b) { backward_cells(s, t0, t, j0, j1, a, b); });
      if constexpr (kLateGates > 0) {
        divide(column_panels(P), [&](int64_t a, int64_t b) { backward_late_product(s, t0, t, j0, j1, a, b); });
        divide(unit_vectors, [&](int64_t a, int64_t b) { backward_late_cells(s, t0, t, j0, j1, a, b); });
      }
      if (step > 0 || p.dh0)
        divide(column_panels(P), [&](int64_t a, int64_t b) { backward_hidden(s, t0, t, j0, j1, a, b); });
      apply_resets(s.dh, s.dc, t, j0, j1);
    }
  }

  // What stays in the scratch from part to part: rearranged weights, and the sums of their gradients.
  void start(const Scratch& s) const {
    if (p.dinput.data) pack_backward(p.w_ih, I, Cell::kInputGates, s.w_ih);
    pack_backward(p.w_hh, P, Cell::kRecurrentGates, s.w_hh, kEarlyGates);
    if constexpr (kLateGates > 0) pack_backward(p.w_hh, P, Cell::kRecurrentGates + kEarlyGates, s.w_late, kLateGates);
    if (projected)
      for (int64_t panel = 0; panel < column_panels(H); ++panel)
        for (int64_t k = 0, nr = column_vectors(H, panel); k < P; ++k)
          pack_row(p.w_hr + k * H, H, first_column(H, panel), static_cast<int>(nr),
                   s.w_hr + panel * column_panel_size(P) + k * nr * kLanes);
    pack_peepholes(s.w_ch);
    zero(s.zeros, max(ld_h, ld_p));
    if (p.plan.packed) {
      const int64_t width = gate_panels * kPanelWidth;
      if (p.dw_ih) zero(s.dw_ih, I * width);
      if (p.dw_hh) zero(s.dw_hh, P * width);
      zero(s.db_ih, width);
      zero(s.db_hh, width);
    }
    if (p.dw_hr) zero(s.dw_hr, P * ld_h);
    zero(s.dw_ch, Cell::kPeepholes * ld_h);
  }
  void store_sums(const Scratch& s) const {
    if (p.plan.packed) {
      unpack_gates(s.dw_ih, I, Cell::kInputGates, p.dw_ih);
      unpack_gates(s.dw_hh, P, Cell::kRecurrentGates, p.dw_hh);
      unpack_gates(s.db_ih, 1, Cell::kInputGates, p.db_ih);
      unpack_gates(Cell::kInput == Cell::kRecurrent ? s.db_ih : s.db_hh, 1, Cell::kRecurrentGates, p.db_hh);
    }
    if (p.dw_ch)
      for (int64_t k = 0; k < Cell::kPeepholes; ++k) copy(p.dw_ch + k * H, s.dw_ch + k * ld_h, H);
    if (p.dw_hr)
      for (int64_t i = 0; i < P; ++i) copy(p.dw_hr + i * H, s.dw_hr + i * ld_h, H);
  }

  void run() const {
    const Scratch s(*this, p.scratch);
    const int threads = p.plan.threads;
    if (p.is_first_part) start(s);
    if (projected) zero(s.dh_raw, N * ld_h);  // the padding past the last vector is read, never written
    load_state(p.h0, P, s.h0, 0, N);
    load_state(p.dh_n, P, s.dh, 0, N);
    if (Cell::kHasCell) load_state(p.c0, H, s.c0, 0, N), load_state(p.dc_n, H, s.dc, 0, N);
    const bool weights = p.dw_ih || p.dw_hh || p.db_ih || p.db_hh;
    if (p.recurrent_mask) load_state(p.recurrent_mask, P, s.mask, 0, N);

    for (int64_t s1 = T_; s1 > 0;) {
      const int64_t s0 = max(0, s1 - p.plan.chunk_steps);
      const int64_t t0 = p.reverse ? T_ - s1 : s0, t1 = p.reverse ? T_ - s0 : s1;
      if (p.plan.schedule == Schedule::kUnits)
        chunk_steps(s, s0, s1, 0, N, [this](int64_t n, auto body) { this->parallel(n, body); });
      else
        parallel_batch(
            [&](int64_t j0, int64_t j1) { chunk_steps(s, s0, s1, j0, j1, [](int64_t n, auto body) { body(0, n); }); });
      const int64_t rows = p.first_row[t1 - 1] + p.active[t1 - 1] - p.first_row[t0];
      const auto each_worker = [&](int64_t n, auto body) {
        parallel(min(threads, n), [&](int64_t begin, int64_t end) {
          const int64_t parts = min(threads, n);
          for (int64_t i = begin; i < end; ++i)
            body(n * i / parts, n * (i + 1) / parts, s.panels + i * kPanelRows * kMaxPanel * kLanes,
                 s.hidden + i * kUnits * ld_buffer());
        });
      };
      if (p.dinput.data && !p.plan.packed)  // few rows: each thread takes columns, and reads only those of W_ih
        parallel(column_panels(I), [&](int64_t begin, int64_t end) { chunk_dinput(s, t0, 0, rows, begin, end); });
      if (p.dinput.data || p.dw_ih || p.dw_hh || p.dw_hr || p.dgates_ih.data)
        each_worker(rows, [&](int64_t begin, int64_t end, T*, T* hidden) { chunk_rows(s, t0, begin, end, hidden); });
      if (p.dw_ch)
        parallel(unit_vectors, [&](int64_t begin, int64_t end) { chunk_peepholes(s, t0, rows, begin, end); });
      if (weights && !p.plan.packed) direct_weights(s, rows);
      if (weights && p.plan.packed) {
        // Few panels do not share out evenly; their rows do.
        const int64_t parts = gate_panels % threads == 0 || gate_panels >= 8 * threads ? 1 : threads;
        each_worker(gate_panels * parts, [&](int64_t begin, int64_t end, T* buffer, T*) {
          for (int64_t i = begin; i < end; ++i) chunk_weights(s, t0, rows, i / parts, i % parts, parts, buffer);
        });
      }
      if (p.dw_hr)
        each_worker(column_panels(H), [&](int64_t begin, int64_t end, T* buffer, T* hidden) {
          chunk_projection(s, t0, rows, begin, end, buffer, hidden);
        });
      s1 = s0;
    }

    store_state(s.dh, P, p.dh0, 0, N);
    if (Cell::kHasCell) store_state(s.dc, H, p.dc0, 0, N);
    if (p.is_last_part) store_sums(s);
  }
};

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
