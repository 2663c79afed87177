// Forward of a cell over time: for a chunk of steps the input product of all its rows, then step by step the recurrent
// product and the cell, a panel of units at a time while its pre-activations are in the first-level cache.
#pragma once

#include "layout.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename Cell, typename T, typename E>
struct SequenceForward : SequenceLayout<Cell, T, E> {
  using Base = SequenceLayout<Cell, T, E>;
  using Base::apply_resets;
  using Base::Base;
  using Base::column_panel_size;
  using Base::column_panels;
  using Base::first_column;
  using Base::first_unit;
  using Base::gate_panel_size;
  using Base::gate_panels;
  using Base::gate_product;
  using Base::gate_row;
  using Base::H;
  using Base::I;
  using Base::kEarlyGates;
  using Base::kFirstOwnSlot;
  using Base::kGates;
  using Base::kLanes;
  using Base::kLateGates;
  using Base::kNarrows;
  using Base::kPanelStride;
  using Base::kSlots;
  using Base::kVectors;
  using Base::ld_h;
  using Base::ld_p;
  using Base::load_state;
  using Base::load_units;
  using Base::load_vectors;
  using Base::N;
  using Base::operand;
  using Base::outside;
  using Base::p;
  using Base::P;
  using Base::pack_bias;
  using Base::pack_gates;
  using Base::pack_projection;
  using Base::pack_vectors;
  using Base::packed_product;
  using Base::panel_offset;
  using Base::panel_vectors;
  using Base::parallel;
  using Base::parallel_batch;
  using Base::projected;
  using Base::row;
  using Base::store_state;
  using Base::store_units;
  using Base::T_;
  using Base::time;
  using Base::to_and_fro;
  using Base::unit_offset;
  using Base::unit_vectors;
  using Base::weight_lanes;
  using Base::weight_row;
  using Base::words;
  using typename Base::Params;
  using typename Base::V;
  using typename Base::W;

  // Rearranged weights, which may outlive the call.
  struct Weights {
    W *w_ih, *w_hh, *w_hr;  // panels; w_hh of the early gates
    W* w_late;              // panels of the late gates of W_hh
    T* bias;                // [gate_row]
    int64_t size;
    Weights(const SequenceForward& d, T* base) {
      Arena<T> arena{base};
      const bool packed = d.p.plan.packed;
      w_ih = arena.template take<W>(d.packs_input() ? d.gate_panels * d.gate_panel_size(d.I) : 0);
      w_hh = arena.template take<W>(packed ? d.gate_panels * d.gate_panel_size(d.P, kEarlyGates) : 0);
      w_late = arena.template take<W>(packed && kLateGates ? d.gate_panels * d.gate_panel_size(d.P, kLateGates) : 0);
      w_hr = arena.template take<W>(d.projected ? d.column_panels(d.P) * column_panel_size(d.H) : 0);
      bias = arena.take(d.gate_row);
      size = arena.used;
    }
  };

  struct Scratch : Weights {
    T* h[2];                      // [N, ld_p]; step s reads h[s % 2] and writes the other
    T* c;                         // [N, ld_h]
    T* h_raw;                     // [N, ld_h] h before the projection
    T* late;                      // [N, ld_h] what the late gates' product is taken of, unless it is narrowed at once
    T* vectors;                   // [kVectors, ld_h]
    T *mask, *masked;             // [N, ld_p] recurrent_mask, and its product with h
    E* narrow_h[2];               // [N, ld_p] what the recurrent product is taken of, as h; or nothing, as the next two
    E *narrow_late, *narrow_raw;  // [N, ld_h] what those of the late gates and of the projection are taken of
    E* input;                     // [chunk_steps * N, words(I) words] where I is not whole words, or nothing
    T* gates;                     // [chunk_steps * N, gate_row] when they are not kept
    int64_t size;
    Scratch(const SequenceForward& d, T* base) : Weights(d, d.p.packed_weights ? d.p.packed_weights : base) {
      Arena<T> arena{base};
      arena.take(d.p.packed_weights ? 0 : Weights::size);
      for (T*& one : h) one = arena.take(d.N * d.ld_p);
      c = arena.take(Cell::kHasCell ? d.N * d.ld_h : 0);
      h_raw = arena.take(d.projected ? d.N * d.ld_h : 0);
      late = arena.take(kLateGates && !kNarrows ? d.N * d.ld_h : 0);
      vectors = arena.take(kVectors * d.ld_h);
      mask = arena.take(d.p.recurrent_mask ? d.N * d.ld_p : 0);
      masked = arena.take(d.p.recurrent_mask ? d.N * d.ld_p : 0);
      for (E*& one : narrow_h) one = arena.template take<E>(kNarrows ? d.N * d.ld_p : 0);
      narrow_late = arena.template take<E>(kNarrows && kLateGates ? d.N * d.ld_h : 0);
      narrow_raw = arena.template take<E>(kNarrows && d.projected ? d.N * d.ld_h : 0);
      input = arena.template take<E>(d.pads_input() ? d.p.plan.chunk_steps * d.N * d.padded_input() : 0);
      gates = arena.take(d.p.training ? 0 : d.p.plan.chunk_steps * d.N * d.gate_row);
      size = arena.used;
    }
  };

  // A chunk of steps in the order of work, [s0, s1), and the times they cover, [t0, t1).
  struct Chunk {
    int64_t s0, s1, t0, t1;
  };

  // The gates of (t, j) while the chunk is in work.
  T* gates_of(const Scratch& s, const Chunk& chunk, int64_t t, int64_t j) const {
    return p.training ? p.gates + row(t, j) * gate_row : s.gates + ((t - chunk.t0) * N + j) * gate_row;
  }

  bool packs_input() const { return p.plan.packed || p.plan.packs_columns; }
  // Rows of the input are read by whole words: where they do not end with one the chunk's are copied.
  int64_t padded_input() const { return words(I) * kPerWord<E>; }
  bool pads_input() const { return p.plan.packed && !p.tokens.data && padded_input() != I; }
  E* padded_row(const Scratch& s, const Chunk& chunk, int64_t t, int64_t j) const {
    return s.input + ((t - chunk.t0) * N + j) * padded_input();
  }
  void pad_input(const Scratch& s, const Chunk& chunk, int64_t j0, int64_t j1) const {
    if (!pads_input()) return;
    for (int64_t t = chunk.t0; t < chunk.t1; ++t)
      for (int64_t j = j0; j < min(j1, p.active[t]); ++j) {
        E* to = padded_row(s, chunk, t, j);
        copy(to, outside(p.input, t, j), I);
        zero(to + I, padded_input() - I);
      }
  }

  // Pre-activations of panels [panel0, panel1) from the input and the biases, for the chunk's sequences [j0, j1).
  void input_product(const Scratch& s, const Chunk& chunk, int64_t j0, int64_t j1, int64_t panel0,
                     int64_t panel1) const {
    const E* a[kRowBatch];
    const T* bias[kRowBatch];
    int64_t token[kRowBatch];
    T* c[kRowBatch];
    for (int64_t i = 0; i < kRowBatch; ++i) bias[i] = s.bias;
    int64_t n = 0;
    const auto flush = [&] {
      for (int64_t panel = panel0; panel < panel1; ++panel) {
        // slots that only the recurrent product feeds start from its bias
        const auto other_slots = [&](int64_t begin, int64_t end) {
          for (int slot = Cell::kInput + kGates; slot < Cell::kRecurrent + kGates; ++slot) {
            const int64_t at = panel_offset(panel, kSlots, slot);
            for (int64_t i = begin; i < end; ++i) store(c[i] + at, load(s.bias + at));
          }
        };
        if (p.tokens.data) {
          look_up(s, n, token, panel, c);
          other_slots(0, n);
        } else {
          gate_product(n, I, p.w_ih, s.w_ih, Cell::kInputGates, Cell::kInput, panel,
                       panel + 1 < panel1 ? panel + 1 : panel0, RowOperands<E>{a, bias, c, 0, 0}, other_slots);
        }
      }
      n = 0;
    };
    for (int64_t t = chunk.t0; t < chunk.t1; ++t)
      for (int64_t j = j0; j < min(j1, p.active[t]); ++j) {
        if (p.tokens.data)
          token[n] = *outside(p.tokens, t, j);
        else
          a[n] = pads_input() ? padded_row(s, chunk, t, j) : outside(p.input, t, j);
        c[n] = gates_of(s, chunk, t, j);
        if (++n == kRowBatch) flush();
      }
    flush();
  }

  // The product of W_ih with one-hot rows, for one panel of gates: the tokens' columns of W_ih, and the biases.
  void look_up(const Scratch& s, int64_t rows, const int64_t* token, int64_t panel, T* const* c) const {
    const int nr = panel_vectors(panel);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t word = token[r] / kPerWord<E>;
      const W* column = packs_input() ? s.w_ih + panel * gate_panel_size(I) + word * nr * kLanes : nullptr;
      for (int q = 0; q < nr; ++q) {
        const int64_t at = panel_offset(panel, kSlots, Cell::kInput) + q * kPanelStride;
        if (column) {
          store(c[r] + at, load(s.bias + at) + split<E>(load(column + q * kLanes), token[r] % kPerWord<E>));
          continue;
        }
        T lane[kLanes] = {};
        for (int64_t i = 0; i < weight_lanes(panel, q); ++i)
          lane[i] = widen(p.w_ih[(weight_row(Cell::kInputGates, panel, q) + i) * I + token[r]]);
        store(c[r] + at, load(s.bias + at) + load(lane));
      }
    }
  }

  // As many rows or fewer keep the pre-activations of all panels in the first-level cache.
  static constexpr int64_t kFewRows = 8;

  // One step of panels [panel0, panel1) of the units: recurrent product, cell, and the new state to all its places. A
  // cell with late gates takes two passes: that of the other gates ends with what the late gates' product is taken of.
  // The cell follows the product block of rows by block of rows; with few rows it waits for all panels, so that the
  // activations of many units overlap. Of a cell with norms this is the product alone: its cell waits for the whole row
  // (step_rows).
  template <bool kLatePass>
  void step_units(const Scratch& s, const Chunk& chunk, int64_t step, int64_t j0, int64_t j1, int64_t panel0,
                  int64_t panel1) const {
    constexpr int kFirst = kLatePass ? kEarlyGates : 0;
    const int64_t t = time(step), last = min(j1, p.active[t]);
    const E* h = kLatePass ? operand(s.late, s.narrow_late) : operand(recurrent_input(s, step), s.narrow_h[step % 2]);
    for (int64_t j = j0; j < last; j += kRowBatch) {
      const int64_t n = min(kRowBatch, last - j);
      const E* a[kRowBatch];
      T* c[kRowBatch];
      for (int64_t i = 0; i < n; ++i) a[i] = h + (j + i) * ld_p, c[i] = gates_of(s, chunk, t, j + i);
      const bool cells_last = n <= kFewRows;
      to_and_fro(step, panel0, panel1, [&](int64_t panel, int64_t next) {
        gate_product(
            n, P, p.w_hh, kLatePass ? s.w_late : s.w_hh, Cell::kRecurrentGates + kFirst, Cell::kRecurrent + kFirst,
            panel, next, RowOperands<E>{a, c, c, 0, 0},
            [&](int64_t begin, int64_t end) {
              const int64_t v0 = first_unit(panel), v1 = first_unit(panel + 1);
              if constexpr (kLateGates > 0 && !kLatePass)
                for (int64_t i = begin; i < end; ++i) step_late_input(s, step, j + i, v0, v1, c[i]);
              else if constexpr (Cell::kNorms == 0)
                if (!cells_last) step_cells(s, step, j + begin, end - begin, v0, v1, c + begin);
            },
            kLatePass ? kLateGates : kEarlyGates);
      });
      if constexpr (Cell::kNorms == 0 && (kLatePass || kLateGates == 0))
        if (cells_last) step_cells(s, step, j, n, first_unit(panel0), first_unit(panel1), c);
    }
  }

  // What the recurrent product is taken of, [N, ld_p], before it is narrowed: h, or h times its mask.
  const T* recurrent_input(const Scratch& s, int64_t step) const { return p.recurrent_mask ? s.masked : s.h[step % 2]; }
  void mask_hidden(const Scratch& s, int64_t step, int64_t j0, int64_t j1) const {
    if (!p.recurrent_mask) return;
    const int64_t last = min(j1, p.active[time(step)]);
    for (int64_t i = j0 * ld_p; i < last * ld_p; ++i) s.masked[i] = s.mask[i] * s.h[step % 2][i];
    narrow_hidden(s.masked, s.narrow_h[step % 2], j0, last);
  }
  void narrow_hidden([[maybe_unused]] const T* h, [[maybe_unused]] E* to, [[maybe_unused]] int64_t j0,
                     [[maybe_unused]] int64_t j1) const {
    if constexpr (kNarrows) convert(to + j0 * ld_p, h + j0 * ld_p, (j1 - j0) * ld_p);
  }

  void step_late_input(const Scratch& s, int64_t step, int64_t j, int64_t v0, int64_t v1, T* gates) const {
    const T* h = recurrent_input(s, step) + j * ld_p;
    for (int64_t v = v0; v < v1; ++v) {
      V slot = load(gates + unit_offset(v, kSlots, 0));
      const V late = Cell::late_input(slot, load(h + v * kLanes));
      if constexpr (kNarrows)
        store(s.narrow_late + j * ld_h + v * kLanes, late);
      else
        store(s.late + j * ld_h + v * kLanes, late);
      store(gates + unit_offset(v, kSlots, 0), slot);
    }
  }

  // The cell of sequences [j0, j1), where it needs whole rows.
  void step_rows(const Scratch& s, const Chunk& chunk, int64_t step, int64_t j0, int64_t j1) const {
    const int64_t t = time(step);
    for (int64_t j = j0; j < min(j1, p.active[t]); ++j) {
      T* const gates = gates_of(s, chunk, t, j);
      step_cells(s, step, j, 1, 0, unit_vectors, &gates);
    }
  }

  // Exactly one of the two where the share is 0 or 1.
  static V mixture(V share, V kept, V made) { return share * kept + (1 - share) * made; }

  // The places of one sequence at a step.
  struct Row {
    T* gates;
    const T* h_prev;
    T* h_next;
    E *narrow_next, *output;
    T* hidden;
    const E* keep_h;
  };

  // The cell of sequences [j0, j0 + rows), whose gates are given, for vectors of units [v0, v1); the new state goes to
  // all its places. Where the cell has two parts each is done for all of them.
  void step_cells(const Scratch& s, int64_t step, int64_t j0, int64_t rows, int64_t v0, int64_t v1,
                  T* const* gates_of_row) const {
    constexpr bool kTwoParts = Cell::kOutputSlots != 0;
    const auto in_output = [](int slot) { return (Cell::kOutputSlots >> slot & 1) != 0; };
    // In locals: what is stored could else be what is read of *this.
    const int64_t t = time(step), units = H, ld = ld_h, first_row = row(t, 0);
    const bool training = p.training;
    const T* const h_old = s.h[step % 2];
    T* const h_new = projected ? s.h_raw : s.h[(step + 1) % 2];
    E* const narrow_new = projected ? s.narrow_raw : s.narrow_h[(step + 1) % 2];
    T* const all_hidden = projected || !training ? nullptr : p.hidden;
    const auto row_of = [&](int64_t j) {
      return Row{gates_of_row[j - j0],
                 h_old + j * ld_p,
                 h_new + j * ld,
                 narrow_new + j * ld,
                 projected || !p.output.data ? nullptr : outside(p.output, t, j),
                 all_hidden ? all_hidden + (first_row + j) * ld : nullptr,
                 p.keep_h.data ? outside(p.keep_h, t, j) : nullptr};
    };
    const auto put = [units](const Row& at, int64_t u, V h) {
      if (at.keep_h) h = mixture(load_units(at.keep_h, u, units), load(at.h_prev + u), h);
      store(at.h_next + u, h);
      if constexpr (kNarrows) store(at.narrow_next + u, h);
      if (at.output) store_units(at.output, u, units, h);
      if (at.hidden) store(at.hidden + u, h);
    };
    const auto h_before = [](const Row& at, int64_t u) {
      return Cell::kHidden == Hidden::kSaved ? load(at.h_prev + u) : V{};
    };
    for (int64_t j = j0; j < j0 + rows; ++j) {
      const Row at = row_of(j);
      T* const cell = Cell::kHasCell ? s.c + j * ld : nullptr;
      T* const kept_cell = Cell::kHasCell && training ? p.cells + (first_row + j) * ld : nullptr;
      E* const all_c = Cell::kHasCell && p.all_c.data ? outside(p.all_c, t, j) : nullptr;
      const E* const keep_c = Cell::kHasCell && p.keep_c.data ? outside(p.keep_c, t, j) : nullptr;
      Moments<T> of[2] = {};
      if constexpr (Cell::kNorms > 0)
        of[0] = moments<kGates>(Slots<T>{at.gates, kSlots, Cell::kInput}, units),
        of[1] = moments<kGates>(Slots<T>{at.gates, kSlots, Cell::kRecurrent}, units);
      for (int64_t v = v0; v < v1; ++v) {
        const int64_t u = v * kLanes;
        V slot[kSlots];
#pragma GCC unroll 16
        for (int i = 0; i < kSlots; ++i) slot[i] = load(at.gates + unit_offset(v, kSlots, i));
#pragma GCC unroll 16
        for (int i = 0; i < kFirstOwnSlot; ++i) slot[i] = of[i / kGates].normal(slot[i]);
        V c{}, w[kVectors + 1];
        load_vectors(s.vectors, u, w);
        const V c_prev = Cell::kHasCell ? load(cell + u) : V{};
        if constexpr (kTwoParts) {
          Cell::forward_gates(slot, h_before(at, u), c_prev, c, w);
          if constexpr (Cell::kHasCell && Cell::kNorms == 0) store(at.h_next + u, c);  // for the second part
        } else {
          V h;
          Cell::forward(slot, h_before(at, u), c_prev, h, c, w);
          put(at, u, h);
        }
        if (keep_c) c = mixture(load_units(keep_c, u, units), c_prev, c);
        if (Cell::kHasCell) store(cell + u, c);
        if (all_c) store_units(all_c, u, units, c);
        if (kept_cell) store(kept_cell + u, c);
#pragma GCC unroll 16
        for (int i = kFirstOwnSlot; i < kSlots; ++i)
          if (training || in_output(i)) store(at.gates + unit_offset(v, kSlots, i), slot[i]);
      }
    }
    if constexpr (kTwoParts)
      for (int64_t j = j0; j < j0 + rows; ++j) {
        const Row at = row_of(j);
        Moments<T> of_c{};
        if constexpr (Cell::kNorms == 3) of_c = moments<1>(Slots<T>{at.gates, kSlots, Cell::kC}, units);
        for (int64_t v = v0; v < v1; ++v) {
          const int64_t u = v * kLanes;
          V slot[kSlots] = {}, c{}, w[kVectors + 1];
#pragma GCC unroll 16
          for (int i = 0; i < kSlots; ++i)
            if (in_output(i)) slot[i] = load(at.gates + unit_offset(v, kSlots, i));
          load_vectors(s.vectors, u, w);
          if constexpr (Cell::kNorms == 3)
            c = of_c.normal(slot[Cell::kC]);
          else if constexpr (Cell::kHasCell)
            c = load(at.h_next + u);
          const V h = Cell::forward_output(slot, h_before(at, u), c, w);
#pragma GCC unroll 16
          for (int i = 0; i < kSlots; ++i)
            if (training && in_output(i)) store(at.gates + unit_offset(v, kSlots, i), slot[i]);
          put(at, u, h);
        }
      }
  }

  // The projection's part of a step, panels [panel0, panel1) of its columns.
  void step_projection(const Scratch& s, int64_t step, int64_t j0, int64_t j1, int64_t panel0, int64_t panel1) const {
    const int64_t t = time(step), last = min(j1, p.active[t]);
    for (int64_t j = j0; j < last; j += kRowBatch) {
      const int64_t n = min(kRowBatch, last - j);
      const E* a[kRowBatch];
      T* c[kRowBatch];
      for (int64_t i = 0; i < n; ++i)
        a[i] = operand(s.h_raw, s.narrow_raw) + (j + i) * ld_h, c[i] = s.h[(step + 1) % 2] + (j + i) * ld_p;
      packed_product(n, H, s.w_hr, P, panel0, panel1, RowOperands<E>{a, nullptr, c, 0, 0});
    }
    const int64_t first = first_column(P, panel0), end = min(first_column(P, panel1), ld_p);
    for (int64_t j = j0; j < last; ++j) {
      const T* h = s.h[(step + 1) % 2] + j * ld_p;
      if (p.output.data) convert(outside(p.output, t, j) + first, h + first, min(end, P) - first);
      if (p.training) copy(p.hidden + row(t, j) * ld_p + first, h + first, end - first);
      if constexpr (kNarrows) convert(s.narrow_h[(step + 1) % 2] + j * ld_p + first, h + first, end - first);
    }
  }

  // The last state of each sequence: in the buffer that its last step wrote.
  void store_last_state(const Scratch& s, int64_t j0, int64_t j1) const {
    int64_t length = T_;
    for (int64_t j = j0; j < j1; ++j) {
      while (!p.reverse && length > 0 && p.active[length - 1] <= j) --length;
      store_state(s.h[length % 2], P, p.h_n, j, j + 1);
    }
    if (Cell::kHasCell) store_state(s.c, H, p.c_n, j0, j1);
  }

  // All steps of sequences [j0, j1). `divide(n, body)` runs body(begin, end) over n panels, here or on several threads.
  template <typename Divide>
  void all_steps(const Scratch& s, int64_t j0, int64_t j1, Divide divide) const {
    for (int i = 0; i < 2; ++i) {
      load_state(p.h0, P, s.h[i], j0, j1);
      narrow_hidden(s.h[i], s.narrow_h[i], j0, j1);
    }
    if (Cell::kHasCell) load_state(p.c0, H, s.c, j0, j1);
    if (p.recurrent_mask) load_state(p.recurrent_mask, P, s.mask, j0, j1);
    for (int64_t s0 = 0; s0 < T_; s0 += p.plan.chunk_steps) {
      const int64_t s1 = min(s0 + p.plan.chunk_steps, T_);
      const Chunk chunk = p.reverse ? Chunk{s0, s1, T_ - s1, T_ - s0} : Chunk{s0, s1, s0, s1};
      pad_input(s, chunk, j0, j1);
      const bool is_only_step = T_ == 1 && kLateGates == 0;  // then threads need not meet between its two products
      if (!is_only_step) divide(gate_panels, [&](int64_t a, int64_t b) { input_product(s, chunk, j0, j1, a, b); });
      for (int64_t step = s0; step < s1; ++step) {
        apply_resets(s.h[step % 2], s.c, s.narrow_h[step % 2], time(step), j0, j1);
        mask_hidden(s, step, j0, j1);
        divide(gate_panels, [&](int64_t a, int64_t b) {
          if (is_only_step)
            to_and_fro(step, a, b, [&](int64_t panel, int64_t) {
              input_product(s, chunk, j0, j1, panel, panel + 1);
              this->template step_units<false>(s, chunk, step, j0, j1, panel, panel + 1);
            });
          else
            this->template step_units<false>(s, chunk, step, j0, j1, a, b);
        });
        if constexpr (kLateGates > 0)
          divide(gate_panels,
                 [&](int64_t a, int64_t b) { this->template step_units<true>(s, chunk, step, j0, j1, a, b); });
        if constexpr (Cell::kNorms > 0)
          divide(j1 - j0, [&](int64_t a, int64_t b) { step_rows(s, chunk, step, j0 + a, j0 + b); });
        if (projected) divide(column_panels(P), [&](int64_t a, int64_t b) { step_projection(s, step, j0, j1, a, b); });
      }
    }
    store_last_state(s, j0, j1);
  }

  void pack_weights(const Weights& s) const {
    if (packs_input()) pack_gates(p.w_ih, I, Cell::kInputGates, s.w_ih);
    if (p.plan.packed) {
      pack_gates(p.w_hh, P, Cell::kRecurrentGates, s.w_hh, kEarlyGates);
      if constexpr (kLateGates > 0) pack_gates(p.w_hh, P, Cell::kRecurrentGates + kEarlyGates, s.w_late, kLateGates);
    }
    if (projected) pack_projection(p.w_hr, s.w_hr);
    pack_bias(s.bias);
  }

  void run() const {
    const Scratch s(*this, p.scratch);
    if (p.is_first_part && !p.has_packed) pack_weights(s);
    if (p.is_first_part) pack_vectors(s.vectors);
    if (p.plan.schedule == Schedule::kUnits)
      all_steps(s, 0, N, [this](int64_t n, auto body) { this->parallel(n, body); });
    else
      parallel_batch([&](int64_t j0, int64_t j1) { all_steps(s, j0, j1, [](int64_t n, auto body) { body(0, n); }); });
  }
};

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
