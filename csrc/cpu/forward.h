// Forward of a cell over time: for a chunk of steps the input product of all its rows, then step by step the recurrent
// product and the cell, a panel of units at a time while its pre-activations are in the first-level cache.
#pragma once

#include "layout.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename Cell, typename T>
struct SequenceForward : SequenceLayout<Cell, T> {
  using Base = SequenceLayout<Cell, T>;
  using Base::apply_resets;
  using Base::Base;
  using Base::column_panel_size;
  using Base::column_panels;
  using Base::gate_panel_size;
  using Base::gate_panels;
  using Base::gate_product;
  using Base::gate_row;
  using Base::H;
  using Base::I;
  using Base::kGates;
  using Base::kLanes;
  using Base::kPanelUnits;
  using Base::kSlots;
  using Base::ld_h;
  using Base::ld_p;
  using Base::load_state;
  using Base::N;
  using Base::outside;
  using Base::p;
  using Base::P;
  using Base::pack_bias;
  using Base::pack_gates;
  using Base::pack_projection;
  using Base::packed_product;
  using Base::panel_offset;
  using Base::parallel;
  using Base::parallel_batch;
  using Base::projected;
  using Base::row;
  using Base::store_state;
  using Base::T_;
  using Base::time;
  using Base::unit_offset;
  using Base::unit_vectors;
  using typename Base::Params;
  using typename Base::V;

  struct Scratch {
    T *w_ih, *w_hh, *w_hr;  // panels
    T* bias;                // [gate_row]
    T *h, *h_raw, *c;       // [N, ld_p], [N, ld_h], [N, ld_h]: state, and h of the step before projection and commit
    T* gates;               // [chunk_steps * N, gate_row] when they are not kept
    int64_t size;
    Scratch(const SequenceForward& d, T* base) {
      Arena<T> arena{base};
      const bool packed = d.p.plan.packed;
      w_ih = arena.take(packed ? d.gate_panels * d.gate_panel_size(d.I) : 0);
      w_hh = arena.take(packed ? d.gate_panels * d.gate_panel_size(d.P) : 0);
      w_hr = arena.take(d.projected ? column_panels(d.P) * column_panel_size(d.H) : 0);
      bias = arena.take(d.gate_row);
      h = arena.take(d.N * d.ld_p);
      h_raw = arena.take(d.N * d.ld_h);
      c = arena.take(Cell::kHasCell ? d.N * d.ld_h : 0);
      gates = arena.take(d.p.training ? 0 : d.p.plan.chunk_steps * d.N * d.gate_row);
      size = arena.used;
    }
  };

  // The gates of (t, j) while the chunk that starts at time `chunk` is in work.
  T* gates_of(const Scratch& s, int64_t chunk, int64_t t, int64_t j) const {
    return p.training ? p.gates + row(t, j) * gate_row : s.gates + ((t - chunk) * N + j) * gate_row;
  }

  // Pre-activations of panels [panel0, panel1) from the input and the biases, for steps [t0, t1), sequences [j0, j1).
  void input_product(const Scratch& s, int64_t t0, int64_t t1, int64_t j0, int64_t j1, int64_t panel0,
                     int64_t panel1) const {
    const T *a[kRowBatch], *bias[kRowBatch];
    T* c[kRowBatch];
    for (int64_t i = 0; i < kRowBatch; ++i) bias[i] = s.bias;
    int64_t n = 0;
    const auto flush = [&] {
      for (int64_t panel = panel0; panel < panel1; ++panel)
        gate_product(n, I, p.w_ih, s.w_ih, Cell::kInputGates, Cell::kInput, panel, RowOperands<T>{a, bias, c, 0, 0},
                     [&](int64_t begin, int64_t end) {
                       // slots that only the recurrent product feeds start from its bias
                       for (int slot = Cell::kInput + kGates; slot < Cell::kRecurrent + kGates; ++slot) {
                         const int64_t at = panel_offset(panel, kSlots, slot);
                         for (int64_t i = begin; i < end; ++i) store(c[i] + at, load(s.bias + at));
                       }
                     });
      n = 0;
    };
    for (int64_t t = t0; t < t1; ++t)
      for (int64_t j = j0; j < min(j1, p.active[t]); ++j) {
        a[n] = outside(p.input, t, j);
        c[n] = gates_of(s, t0, t, j);
        if (++n == kRowBatch) flush();
      }
    flush();
  }

  // One step of the panels [panel0, panel1): recurrent product and cell. Leaves the new h in h_raw, the new c in c.
  void step_units(const Scratch& s, int64_t chunk, int64_t t, int64_t j0, int64_t j1, int64_t panel0,
                  int64_t panel1) const {
    const int64_t last = min(j1, p.active[t]);
    for (int64_t j = j0; j < last; j += kRowBatch) {
      const int64_t n = min(kRowBatch, last - j);
      const T* a[kRowBatch];
      T* c[kRowBatch];
      for (int64_t i = 0; i < n; ++i) a[i] = s.h + (j + i) * ld_p, c[i] = gates_of(s, chunk, t, j + i);
      for (int64_t panel = panel0; panel < panel1; ++panel)
        gate_product(n, P, p.w_hh, s.w_hh, Cell::kRecurrentGates, Cell::kRecurrent, panel,
                     RowOperands<T>{a, c, c, 0, 0}, [&](int64_t begin, int64_t end) {
                       const int64_t v0 = panel * kPanelUnits;
                       const int64_t v1 = min(v0 + kPanelUnits, unit_vectors);
                       for (int64_t i = begin; i < end; ++i)
                         for (int64_t v = v0; v < v1; ++v) step_cell(s, t, j + i, v, c[i]);
                     });
    }
  }

  void step_cell(const Scratch& s, int64_t t, int64_t j, int64_t v, T* gates) const {
    V slot[kSlots];
#pragma GCC unroll 8
    for (int i = 0; i < kSlots; ++i) slot[i] = load(gates + unit_offset(v, kSlots, i));
    const V h_prev = Cell::kHidden == Hidden::kSaved ? load(s.h + j * ld_p + v * kLanes) : V{};
    V h, c{};
    Cell::forward(slot, h_prev, Cell::kHasCell ? load(s.c + j * ld_h + v * kLanes) : V{}, h, c);
    store(s.h_raw + j * ld_h + v * kLanes, h);
    if (Cell::kHasCell) store(s.c + j * ld_h + v * kLanes, c);
    if (p.training) {
#pragma GCC unroll 8
      for (int i = 0; i < kSlots; ++i) store(gates + unit_offset(v, kSlots, i), slot[i]);
      if (Cell::kHasCell) store(p.cells + row(t, j) * ld_h + v * kLanes, c);
    }
  }

  // Makes the step's h the state: projection, output, copy for backward.
  void commit(const Scratch& s, int64_t t, int64_t j0, int64_t j1) const {
    const int64_t last = min(j1, p.active[t]);
    if (projected) {
      for (int64_t j = j0; j < last; j += kRowBatch) {
        const int64_t n = min(kRowBatch, last - j);
        const T* a[kRowBatch];
        T* c[kRowBatch];
        for (int64_t i = 0; i < n; ++i) a[i] = s.h_raw + (j + i) * ld_h, c[i] = s.h + (j + i) * ld_p;
        packed_product(n, H, s.w_hr, P, RowOperands<T>{a, nullptr, c, 0, 0});
      }
    } else if (j0 < last) {
      copy(s.h + j0 * ld_p, s.h_raw + j0 * ld_h, (last - j0) * ld_h);
    }
    for (int64_t j = j0; j < last; ++j) copy(outside(p.output, t, j), s.h + j * ld_p, P);
    if (p.training && p.hidden && j0 < last) copy(p.hidden + row(t, j0) * ld_p, s.h + j0 * ld_p, (last - j0) * ld_p);
  }

  void run() const {
    const Scratch s(*this, p.scratch);
    if (p.plan.packed) {
      pack_gates(p.w_ih, I, Cell::kInputGates, s.w_ih);
      pack_gates(p.w_hh, P, Cell::kRecurrentGates, s.w_hh);
    }
    if (projected) pack_projection(p.w_hr, s.w_hr);
    pack_bias(s.bias);

    const auto each_chunk = [&](auto body) {
      for (int64_t s0 = 0; s0 < T_; s0 += p.plan.chunk_steps) {
        const int64_t s1 = min(s0 + p.plan.chunk_steps, T_);
        body(s0, s1, p.reverse ? T_ - s1 : s0, p.reverse ? T_ - s0 : s1);
      }
    };
    const auto begin = [&](int64_t j0, int64_t j1) {
      load_state(p.h0, P, s.h, j0, j1);
      if (Cell::kHasCell) load_state(p.c0, H, s.c, j0, j1);
    };
    const auto end = [&](int64_t j0, int64_t j1) {
      store_state(s.h, P, p.h_n, j0, j1);
      if (Cell::kHasCell) store_state(s.c, H, p.c_n, j0, j1);
    };

    if (p.plan.schedule == Schedule::kUnits) {
      begin(0, N);
      each_chunk([&](int64_t s0, int64_t s1, int64_t t0, int64_t t1) {
        parallel(gate_panels, [&](int64_t a, int64_t b) { input_product(s, t0, t1, 0, N, a, b); });
        for (int64_t step = s0; step < s1; ++step) {
          const int64_t t = time(step);
          apply_resets(s.h, s.c, t, 0, N);
          parallel(gate_panels, [&](int64_t a, int64_t b) { step_units(s, t0, t, 0, N, a, b); });
          commit(s, t, 0, N);
        }
      });
      end(0, N);
      return;
    }
    parallel_batch([&](int64_t j0, int64_t j1) {
      begin(j0, j1);
      each_chunk([&](int64_t s0, int64_t s1, int64_t t0, int64_t t1) {
        input_product(s, t0, t1, j0, j1, 0, gate_panels);
        for (int64_t step = s0; step < s1; ++step) {
          const int64_t t = time(step);
          apply_resets(s.h, s.c, t, j0, j1);
          step_units(s, t0, t, j0, j1, 0, gate_panels);
          commit(s, t, j0, j1);
        }
      });
      end(j0, j1);
    });
  }
};

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
