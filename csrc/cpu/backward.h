// Backward of a cell over time: for a chunk of steps, last first, step by step the cell and dh_prev = dgates W_hh;
// then, for the chunk's rows at once, dx = dgates W_ih and the weight gradients (weight_gradients.h).
#pragma once

#include "weight_gradients.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename Cell, typename T, typename E>
struct SequenceBackward : WeightGradients<Cell, T, E> {
  using Base = WeightGradients<Cell, T, E>;
  using Base::apply_resets;
  using Base::Base;
  using Base::cell_before;
  using Base::chunk_dinput;
  using Base::chunk_gates;
  using Base::chunk_projection;
  using Base::chunk_rows;
  using Base::chunk_vectors;
  using Base::chunk_weights;
  using Base::column_panel_size;
  using Base::column_panels;
  using Base::column_vectors;
  using Base::direct_weights;
  using Base::each_vector;
  using Base::first_column;
  using Base::gate_panels;
  using Base::gate_row;
  using Base::gradient_product;
  using Base::H;
  using Base::hidden_before;
  using Base::I;
  using Base::kEarlyGates;
  using Base::kFirstOwnSlot;
  using Base::kGates;
  using Base::kLanes;
  using Base::kLateGates;
  using Base::kNarrows;
  using Base::kPanelWidth;
  using Base::kPanelWords;
  using Base::kSlots;
  using Base::kUnits;
  using Base::kVectors;
  using Base::ld_buffer;
  using Base::ld_h;
  using Base::ld_p;
  using Base::load_state;
  using Base::load_units;
  using Base::load_vectors;
  using Base::N;
  using Base::narrow_gates;
  using Base::operand;
  using Base::outside;
  using Base::P;
  using Base::p;
  using Base::pack_backward;
  using Base::pack_vectors;
  using Base::pack_words;
  using Base::packed_product;
  using Base::padded;
  using Base::parallel;
  using Base::parallel_batch;
  using Base::product_gates;
  using Base::projected;
  using Base::row;
  using Base::store_state;
  using Base::T_;
  using Base::time;
  using Base::unit_offset;
  using Base::unit_vectors;
  using Base::unpack_bias;
  using typename Base::Scratch;
  using typename Base::V;
  using typename Base::W;

  // For a projected cell: dh += doutput, kept for dW_hr; then dh_raw = dh W_hr, panels [panel0, panel1).
  void add_output(const Scratch& s, int64_t t0, int64_t t, int64_t j0, int64_t j1) const {
    for (int64_t j = j0; j < min(j1, p.active[t]); ++j) {
      T* dh = s.dh + j * ld_p;
      if (p.doutput.data) {
        const E* dy = outside(p.doutput, t, j);
        for (int64_t u = 0; u < P; ++u) dh[u] += widen(dy[u]);
      }
      copy(s.dprojected + (row(t, j) - row(t0, 0)) * ld_p, dh, ld_p);
      if constexpr (kNarrows) convert(s.narrow_dh + j * ld_p, dh, ld_p);
    }
  }
  void backward_projection(const Scratch& s, int64_t t, int64_t j0, int64_t j1, int64_t panel0, int64_t panel1) const {
    const int64_t last = min(j1, p.active[t]);
    for (int64_t j = j0; j < last; j += kRowBatch) {
      const int64_t n = min(kRowBatch, last - j);
      const E* a[kRowBatch];
      T* c[kRowBatch];
      for (int64_t i = 0; i < n; ++i)
        a[i] = operand(s.dh, s.narrow_dh) + (j + i) * ld_p, c[i] = s.dh_raw + (j + i) * ld_h;
      packed_product(n, P, s.w_hr, H, panel0, panel1, RowOperands<E>{a, nullptr, c, 0, 0});
    }
  }

  // The cell, for vectors of units [v0, v1): dgates, and dh and dc become what reaches the earlier state directly. Of a
  // cell with norms dgates of the products are left to backward_rows, which also prepares it.
  void backward_cells(const Scratch& s, int64_t t0, int64_t t, int64_t j0, int64_t j1, int64_t v0, int64_t v1) const {
    for (int64_t j = j0; j < min(j1, p.active[t]); ++j) {
      T* dgates = chunk_gates(s, t0, t, j);
      const T* gates = Cell::kNorms == 3 ? dgates : p.gates + row(t, j) * gate_row;
      const T* h_prev = Cell::kHidden == Hidden::kSaved ? hidden_before(s, t, j, nullptr) : nullptr;
      const T* c_prev = Cell::kHasCell ? cell_before(s, t, j) : nullptr;
      const T* c = Cell::kHasCell ? p.cells + row(t, j) * ld_h : nullptr;
      T* carried = s.dh + j * ld_p;
      const T* dh = projected ? s.dh_raw + j * ld_h : carried;
      const E* dy = projected || !p.doutput.data ? nullptr : outside(p.doutput, t, j);
      T* dc = Cell::kHasCell ? s.dc + j * ld_h : nullptr;
      const E* dall_c = Cell::kHasCell && p.dall_c.data ? outside(p.dall_c, t, j) : nullptr;
      const E* keep_h = p.keep_h.data ? outside(p.keep_h, t, j) : nullptr;
      const E* keep_c = Cell::kHasCell && p.keep_c.data ? outside(p.keep_c, t, j) : nullptr;
      for (int64_t v = v0; v < v1; ++v) {
        const int64_t u = v * kLanes;
        V slot[kSlots];
#pragma GCC unroll 16
        for (int i = kFirstOwnSlot; i < kSlots; ++i) slot[i] = load(gates + unit_offset(v, kSlots, i));
        V dh_v = load(dh + u), dc_v = Cell::kHasCell ? load(dc + u) : V{}, dh_prev;
        if (dy) dh_v += load_units(dy, u, H);
        if (dall_c) dc_v += load_units(dall_c, u, H);
        V c_v = Cell::kHasCell ? load(c + u) : V{}, kept_dh{}, kept_dc{}, w[kVectors + 1];
        load_vectors(s.vectors, u, w);
        if (keep_h) kept_dh = load_units(keep_h, u, H) * dh_v, dh_v -= kept_dh;
        if constexpr (Cell::kHasCell)
          if (keep_c) {  // what was kept is c after the mixture
            kept_dc = load_units(keep_c, u, H) * dc_v, dc_v -= kept_dc;
            c_v = Cell::next_cell(slot, load(c_prev + u));
          }
        if constexpr (Cell::kNorms == 3) dc_v += load(s.dc_made + j * ld_h + u);
        Cell::backward(slot, Cell::kHidden == Hidden::kSaved ? load(h_prev + u) : V{},
                       Cell::kHasCell ? load(c_prev + u) : V{}, c_v, dh_v, dc_v, dh_prev, w);
        if (keep_h) dh_prev += kept_dh;
        if (keep_c) dc_v += kept_dc;
#pragma GCC unroll 16
        for (int i = kFirstOwnSlot; i < kSlots; ++i) store(dgates + unit_offset(v, kSlots, i), slot[i]);
        if (Cell::kHasCell) store(dc + u, dc_v);
        if (!projected) store(carried + u, dh_prev);
      }
      if (Cell::kNorms == 0) narrow_gates(s, dgates, v0, v1, 0, kSlots);
    }
  }

  // The cell of sequences [j0, j1), where it needs whole rows.
  void backward_rows(const Scratch& s, int64_t t0, int64_t t, int64_t j0, int64_t j1) const {
    if constexpr (Cell::kNorms > 0)
      for (int64_t j = j0; j < min(j1, p.active[t]); ++j) {
        T *gates = p.gates + row(t, j) * gate_row, *dgates = chunk_gates(s, t0, t, j);
        Moments<T>* of = s.moments + (row(t, j) - row(t0, 0)) * Cell::kNorms;
        if constexpr (Cell::kNorms == 3) {
          const Slots<T> c{gates, kSlots, Cell::kC};
          of[2] = moments<1>(c, H);
          backward_output(s, t, j, of[2], gates, dgates);
          backward_moments<1>(c, of[2], Slots<T>{s.dc_made + j * ld_h, 1, 0}, H);
        }
        backward_cells(s, t0, t, j, j + 1, 0, unit_vectors);
        for (int64_t v = 0; v < unit_vectors; ++v) {
          V slot[kSlots], w[kVectors + 1];
#pragma GCC unroll 16
          for (int i = kFirstOwnSlot; i < kSlots; ++i) slot[i] = load(dgates + unit_offset(v, kSlots, i));
          load_vectors(s.vectors, v * kLanes, w);
          Cell::backward_normals(slot, w);
#pragma GCC unroll 16
          for (int i = 0; i < kFirstOwnSlot; ++i) store(dgates + unit_offset(v, kSlots, i), slot[i]);
        }
        for (int product = 0; product < 2; ++product) {
          const Slots<T> x{gates, kSlots, product * kGates};
          of[product] = moments<kGates>(x, H);
          backward_moments<kGates>(x, of[product], Slots<T>{dgates, kSlots, product * kGates}, H);
        }
        narrow_gates(s, dgates, 0, unit_vectors, 0, kFirstOwnSlot);
      }
  }
  // For a cell that normalizes c' where it makes h' of it: the gradients of o and of the normal, the last to dc_made.
  void backward_output(const Scratch& s, int64_t t, int64_t j, Moments<T> of_c, const T* gates, T* dgates) const {
    const E* dy = p.doutput.data ? outside(p.doutput, t, j) : nullptr;
    const E* keep_h = p.keep_h.data ? outside(p.keep_h, t, j) : nullptr;
    for (int64_t v = 0; v < unit_vectors; ++v) {
      const int64_t u = v * kLanes;
      V slot[kSlots], w[kVectors + 1], dh = load(s.dh + j * ld_p + u);
#pragma GCC unroll 16
      for (int i = kFirstOwnSlot; i < kSlots; ++i) slot[i] = load(gates + unit_offset(v, kSlots, i));
      load_vectors(s.vectors, u, w);
      if (dy) dh += load_units(dy, u, H);
      if (keep_h) dh -= load_units(keep_h, u, H) * dh;
      store(s.dc_made + j * ld_h + u, Cell::backward_output(slot, of_c.normal(slot[Cell::kC]), dh, w));
#pragma GCC unroll 16
      for (int i = kFirstOwnSlot; i < kSlots; ++i) store(dgates + unit_offset(v, kSlots, i), slot[i]);
    }
  }

  // dlate = dgates W_hh over the late gates, for column panels [panel0, panel1).
  void backward_late_product(const Scratch& s, int64_t t0, int64_t t, int64_t j0, int64_t j1, int64_t panel0,
                             int64_t panel1) const {
    const int64_t last = min(j1, p.active[t]);
    for (int64_t j = j0; j < last; j += kRowBatch) {
      const int64_t n = min(kRowBatch, last - j);
      const E* a[kRowBatch];
      T* c[kRowBatch];
      for (int64_t i = 0; i < n; ++i)
        a[i] = product_gates(s, t0, t, j + i) + (Cell::kRecurrent + kEarlyGates) * kUnits,
        c[i] = s.dlate + (j + i) * ld_h;
      gradient_product(t, n, p.w_hh, s.w_late, Cell::kRecurrentGates + kEarlyGates, P, panel0, panel1, true,
                       RowOperands<E>{a, nullptr, c, 0, 0}, kLateGates);
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
      narrow_gates(s, dgates, v0, v1, 0, 1);
    }
  }

  // dh += dgates W_hh over the early gates, for column panels [panel0, panel1).
  void backward_hidden(const Scratch& s, int64_t t0, int64_t t, int64_t j0, int64_t j1, int64_t panel0,
                       int64_t panel1) const {
    const int64_t last = min(j1, p.active[t]);
    for (int64_t j = j0; j < last; j += kRowBatch) {
      const int64_t n = min(kRowBatch, last - j);
      const E* a[kRowBatch];
      T* c[kRowBatch];
      for (int64_t i = 0; i < n; ++i)
        a[i] = product_gates(s, t0, t, j + i) + Cell::kRecurrent * kUnits,
        c[i] = (p.recurrent_mask ? s.dmasked : s.dh) + (j + i) * ld_p;
      gradient_product(t, n, p.w_hh, s.w_hh, Cell::kRecurrentGates, P, panel0, panel1, true,
                       RowOperands<E>{a, projected || p.recurrent_mask ? nullptr : c, c, 0, 0}, kEarlyGates);
      if (!p.recurrent_mask) continue;
      const int64_t first = first_column(P, panel0), end = min(first_column(P, panel1), P);
      for (int64_t i = j * ld_p; i < (j + n) * ld_p; i += ld_p)
        for (int64_t u = i + first; u < i + end; ++u) s.dh[u] = (projected ? T{} : s.dh[u]) + s.mask[u] * s.dmasked[u];
    }
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
      if constexpr (Cell::kNorms > 0)
        divide(j1 - j0, [&](int64_t a, int64_t b) { backward_rows(s, t0, t, j0 + a, j0 + b); });
      else
        divide(unit_vectors, [&](int64_t a, int64_t b) { backward_cells(s, t0, t, j0, j1, a, b); });
      if constexpr (kLateGates > 0) {
        divide(column_panels(P), [&](int64_t a, int64_t b) { backward_late_product(s, t0, t, j0, j1, a, b); });
        divide(unit_vectors, [&](int64_t a, int64_t b) { backward_late_cells(s, t0, t, j0, j1, a, b); });
      }
      if (step > 0 || p.dh0)
        divide(column_panels(P), [&](int64_t a, int64_t b) { backward_hidden(s, t0, t, j0, j1, a, b); });
      apply_resets(s.dh, s.dc, nullptr, t, j0, j1);
    }
  }

  // What stays in the scratch from part to part: rearranged weights, and the sums of their gradients.
  void start(const Scratch& s) const {
    if (p.dinput.data) pack_backward(p.w_ih, I, Cell::kInputGates, s.w_ih);
    pack_backward(p.w_hh, P, Cell::kRecurrentGates, s.w_hh, kEarlyGates);
    if constexpr (kLateGates > 0) pack_backward(p.w_hh, P, Cell::kRecurrentGates + kEarlyGates, s.w_late, kLateGates);
    if (projected)
      for (int64_t panel = 0; panel < column_panels(H); ++panel)
        for (int64_t k = 0, nr = column_vectors(H, panel); k < P; k += kPerWord<E>)
          pack_words(p.w_hr, k, P, H, first_column(H, panel), static_cast<int>(nr),
                     s.w_hr + panel * column_panel_size(P) + k / kPerWord<E> * nr * kLanes);
    zero(s.zeros, max(ld_h, ld_p));
    zero(s.db_ih, gate_panels * kPanelWidth);
    zero(s.db_hh, gate_panels * kPanelWidth);
    if (p.dw_hr) zero(s.dw_hr, P * ld_h);
    pack_vectors(s.vectors);
    zero(s.dvectors, kVectors * ld_h);
  }
  void store_sums(const Scratch& s) const {
    if (p.plan.packed && Cell::kNorms == 0) {
      unpack_bias(s.db_ih, Cell::kInputGates, p.db_ih);
      unpack_bias(Cell::kInput == Cell::kRecurrent ? s.db_ih : s.db_hh, Cell::kRecurrentGates, p.db_hh);
    }
    each_vector(p.dw_ch, p.dw_ln, p.db_ih, p.db_hh, [&](int k, E* to) { convert(to, s.dvectors + k * ld_h, H); });
    if (p.dw_hr)
      for (int64_t i = 0; i < P; ++i) convert(p.dw_hr + i * H, s.dw_hr + i * ld_h, H);
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
            body(n * i / parts, n * (i + 1) / parts, s.panels + i * kPanelWords * kMaxPanel * kLanes,
                 s.hidden + i * kUnits * ld_buffer(), i);
        });
      };
      if (p.dinput.data && !p.plan.packed)  // few rows: each thread takes columns, and reads only those of W_ih
        parallel(column_panels(I),
                 [&](int64_t begin, int64_t end) { chunk_dinput(s, t0, 0, rows, begin, end, s.dinput); });
      if (p.dinput.data || p.dw_ih || p.dw_hh || p.dw_hr || p.dgates_ih.data)
        each_worker(ceil_div(rows, kLanes), [&](int64_t begin, int64_t end, W*, T* hidden, int64_t worker) {
          chunk_rows(s, t0, begin * kLanes, min(end * kLanes, rows), hidden,
                     kNarrows ? s.dinput + worker * kRowBatch * padded(I) : nullptr);
        });
      if constexpr (kVectors > 0)
        if (p.dw_ch || p.dw_ln || p.db_ih || p.db_hh)
          parallel(unit_vectors, [&](int64_t begin, int64_t end) { chunk_vectors(s, t0, rows, begin, end); });
      if (weights && !p.plan.packed) direct_weights(s, rows);
      if (weights && p.plan.packed) {
        // Few panels do not share out evenly; their rows do.
        const int64_t parts = gate_panels % threads == 0 || gate_panels >= 8 * threads ? 1 : threads;
        const bool is_first_chunk = p.is_first_part && s1 == T_, is_last_chunk = p.is_last_part && s0 == 0;
        each_worker(gate_panels * parts, [&](int64_t begin, int64_t end, W* buffer, T*, int64_t worker) {
          for (int64_t i = begin; i < end; ++i)
            chunk_weights(s, t0, rows, i / parts, i % parts, parts, buffer, worker, is_first_chunk, is_last_chunk);
        });
      }
      if (p.dw_hr)
        each_worker(column_panels(H), [&](int64_t begin, int64_t end, W* buffer, T* hidden, int64_t) {
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
