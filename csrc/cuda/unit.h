// The work of one unit u of one sequence n at one step t, forward and backward, around the formula of cells.h: what
// every kernel here does after its products. Sequences are numbered by their position in the batch.
#pragma once

#include "../cells.h"
#include "../sequence.h"
#include "math.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

// Arrays of a call that its kernels share, in the caller's scratch. A row is a step of a sequence in the order of
// input.
template <typename T, typename E>
struct State {
  E* input;  // [rows, I] copy of an input whose rows lie apart; else null
  T* pre;    // [rows of the chunk, G*H] x W_ih^T, from row pre_first on
  int64_t pre_first;
  T* recurrent;  // [N, G*H] the product of W_hh with h; of the late gates apart, behind the others
  T *h, *c;      // [N, P], [N, H] the state before the step, zero where it is reset
  E* fed;        // [N, P] h as the recurrent product takes it: masked
  E* late;       // [N, H] what the late gates' product is taken of
  E* raw;        // [N, H] h before the projection
  T* projected;  // [N, P] its product with W_hr

  // backward
  T *dh, *dc;                // [N, P], [N, H] gradient of the state after the step, less dfed
  T* dfed;                   // [N, P] gradient of what the recurrent product took
  T* draw;                   // [N, H] gradient of h before the projection
  T* dlate;                  // [N, H]
  E *dgates_ih, *dgates_hh;  // [rows, G*H], in torch's order; one array where the cell has one slot for both
  E* h_prev;                 // [rows, P] what the recurrent product took
  E* late_rows;              // [rows, H] what the late gates' product took
  E *dprojected, *raw_rows;  // [rows, P], [rows, H]
  E* ones;                   // [rows]
  T* dw_tokens;              // [G*H, I] where tokens' gradient cannot be summed in its place
};

// kPlain: of a call without everything that is_plain asks for, which then costs nothing.
template <typename Cell, typename T, typename E, bool kPlain = false>
struct Unit {
  using Params = SequenceParams<T, E>;
  static constexpr int kGates = Cell::kGates, kSlots = Cell::kSlots, kLate = Cell::kLateGates, kEarly = kGates - kLate;
  static constexpr bool kOneProduct = Cell::kInput == Cell::kRecurrent;  // dgates_hh is dgates_ih

  const Params& p;
  const State<T, E>& s;

  static bool is_plain(const Params& p) {
    const void* rare[] = {p.device.lengths, p.resets, p.recurrent_mask, p.keep_h.data,    p.keep_c.data, p.all_c.data,
                          p.dall_c.data,    p.w_hr,   p.dgates_ih.data, p.dgates_hh.data, p.h_prev.data};
    for (const void* one : rare)
      if (one) return false;
    return !p.is_packed;
  }
  template <typename X>
  RNNFAST_FUNCTION static bool given(const X* rare) {
    return !kPlain && rare;
  }
  RNNFAST_FUNCTION bool is_packed() const { return !kPlain && p.is_packed; }
  RNNFAST_FUNCTION bool is_projected() const { return given(p.w_hr); }

  // A unit's state between two steps; in backward its gradient, less what comes through the recurrent product.
  struct Carried {
    T h, c;
  };
  // What a step needs that no step before gives: it can be loaded early.
  struct Ahead {
    bool has_step, is_reset_after;
    T slot[kSlots];  // the input's part of the pre-activations
  };
  struct AheadBackward {
    bool has_step, is_reset_after;
    T slot[kSlots];         // as kept
    T slot_before[kSlots];  // the step before's, where h_prev is yet to be made of them
    bool makes_h_prev;
    T h_prev, c, c_prev;
    T doutput, dall_c;
  };

  // ---- where things are ----

  RNNFAST_FUNCTION int64_t active(int64_t t) const { return is_packed() ? p.device.active[t] : p.size.N; }
  RNNFAST_FUNCTION bool has_step(int64_t t, int64_t n) const {
    if (t < 0 || t >= p.size.T) return false;
    return is_packed() ? n < p.device.active[t] : !given(p.device.lengths) || t < p.device.lengths[n];
  }
  RNNFAST_FUNCTION int64_t row(int64_t t, int64_t n) const {
    return is_packed() ? p.device.first_row[t] + n : t * p.size.N + n;
  }
  RNNFAST_FUNCTION int64_t before(int64_t t) const { return p.reverse ? t + 1 : t - 1; }
  RNNFAST_FUNCTION int64_t after(int64_t t) const { return p.reverse ? t - 1 : t + 1; }
  template <typename X>
  RNNFAST_FUNCTION X& at(const Rows<X>& rows, int64_t t, int64_t n, int64_t u) const {
    return rows.data[(is_packed() ? row(t, n) * rows.row : t * rows.step + n * rows.row) + u];
  }
  // The state before step t is zero by a reset.
  RNNFAST_FUNCTION bool is_reset(int64_t t, int64_t n) const {
    if (!given(p.resets)) return false;
    const int64_t boundary = p.reverse ? t + 1 : t;
    return has_step(boundary, n) && p.resets[boundary * p.size.N + n];
  }
  RNNFAST_FUNCTION static int64_t padded(int64_t units) { return (units + kBlock<T> - 1) / kBlock<T> * kBlock<T>; }
  RNNFAST_FUNCTION T* kept_slot(int64_t row, int64_t u, int slot) const {
    return p.gates + (row * padded(p.size.H) + u / kBlock<T> * kBlock<T>)*kSlots + slot * kBlock<T> + u % kBlock<T>;
  }
  RNNFAST_FUNCTION T load(const E* array, int64_t i) const { return array ? widen(array[i]) : T{}; }

  // The row block of the weights that feeds slot kInput + q, kRecurrent + q. (A GPU cannot read the cell's own arrays.)
  RNNFAST_FUNCTION static constexpr int input_gate(int q) {
    constexpr auto gates = GateList(Cell::kInputGates);
    return gates.of[q];
  }
  RNNFAST_FUNCTION static constexpr int recurrent_gate(int q) {
    constexpr auto gates = GateList(Cell::kRecurrentGates);
    return gates.of[q];
  }
  RNNFAST_FUNCTION static constexpr int peephole_gate(int k) {  // the row block of the slot that vector k feeds
    if constexpr (Cell::kPeepholes > 0) {
      constexpr auto slots = GateList(Cell::kPeepholeSlots);
      return input_gate(slots.of[k] - Cell::kInput);
    }
    return 0;
  }
  struct GateList {
    int of[kGates];
    template <int kCount>
    constexpr explicit GateList(const int (&from)[kCount]) : of{} {
      for (int i = 0; i < kGates && i < kCount; ++i) of[i] = from[i];
    }
  };

  RNNFAST_FUNCTION void load_peepholes(int64_t u, T* w) const {
    for (int k = 0; k < Cell::kPeepholes; ++k) w[k] = widen(p.w_ch[k * p.size.H + u]);
  }
  RNNFAST_FUNCTION T mask(int64_t n, int64_t u) const {
    return given(p.recurrent_mask) ? widen(p.recurrent_mask[n * p.size.P + u]) : T{1};
  }

  // ---- forward ----

  // The state before the first step.
  RNNFAST_FUNCTION void start(int64_t n, int64_t u) const {
    if (u < p.size.P) {
      const T h = load(p.h0, n * p.size.P + u);
      p.h_n[n * p.size.P + u] = narrow<E>(h);
      set_hidden(p.reverse ? p.size.T : -1, n, u, h);
    }
    if (Cell::kHasCell && u < p.size.H) {
      const T c = load(p.c0, n * p.size.H + u);
      p.c_n[n * p.size.H + u] = narrow<E>(c);
      s.c[n * p.size.H + u] = !p.reverse && is_reset(0, n) ? T{} : c;
    }
  }
  // The state after step t is zero for the next one.
  RNNFAST_FUNCTION bool is_reset_after(int64_t t, int64_t n) const {
    const int64_t next = after(t);
    return given(p.resets) && next >= 0 && next < p.size.T && is_reset(next, n);
  }
  // h after step t for the next one: as state and as the recurrent product takes it.
  RNNFAST_FUNCTION void set_hidden(int64_t t, int64_t n, int64_t u, T h) const {
    const int64_t i = n * p.size.P + u;
    if (is_reset_after(t, n)) h = T{};
    s.h[i] = h;
    s.fed[i] = narrow<E>(mask(n, u) * h);
  }
  RNNFAST_FUNCTION void set_last_hidden(int64_t t, int64_t n, int64_t u, T h) const {
    if (!has_step(after(t), n)) p.h_n[n * p.size.P + u] = narrow<E>(h);
  }

  // Parts of the pre-activations: the product of the input, and the bias.
  RNNFAST_FUNCTION void input_slots(int64_t t, int64_t n, int64_t u, T (&slot)[kSlots]) const {
    const T* pre = s.pre + (row(t, n) - s.pre_first) * kGates * p.size.H;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) slot[i] = T{};
#pragma unroll
    for (int q = 0; q < kGates; ++q) slot[Cell::kInput + q] = pre[input_gate(q) * p.size.H + u];
  }
  RNNFAST_FUNCTION void add_bias(int64_t u, T (&slot)[kSlots]) const {
#pragma unroll
    for (int q = 0; q < kGates; ++q) {
      slot[Cell::kInput + q] += load(p.b_ih, input_gate(q) * p.size.H + u);
      slot[Cell::kRecurrent + q] += load(p.b_hh, recurrent_gate(q) * p.size.H + u);
    }
  }
  RNNFAST_FUNCTION void add_recurrent(int64_t n, int64_t u, T (&slot)[kSlots], bool late) const {
    const int64_t H = p.size.H;
#pragma unroll
    for (int q = 0; q < kEarly; ++q)
      slot[Cell::kRecurrent + q] += s.recurrent[n * kEarly * H + recurrent_gate(q) * H + u];
#pragma unroll
    for (int q = kEarly; q < kGates; ++q)
      if (late)
        slot[Cell::kRecurrent + q] +=
            s.recurrent[p.size.N * kEarly * H + n * kLate * H + (recurrent_gate(q) - kEarly) * H + u];
  }

  // What the late gates' product is taken of.
  RNNFAST_FUNCTION void feed_late(int64_t t, int64_t n, int64_t u) const {
    if constexpr (kLate > 0) {
      T slot[kSlots];
      input_slots(t, n, u, slot);
      add_bias(u, slot);
      add_recurrent(n, u, slot, false);
      s.late[n * p.size.H + u] = narrow<E>(Cell::late_input(slot[0], widen(s.fed[n * p.size.H + u])));
    }
  }

  RNNFAST_FUNCTION Ahead load_ahead(int64_t t, int64_t n, int64_t u) const {
    Ahead ahead{};
    ahead.has_step = has_step(t, n);
    if (!ahead.has_step) return ahead;
    ahead.is_reset_after = is_reset_after(t, n);
    input_slots(t, n, u, ahead.slot);
    return ahead;
  }
  // The state after the step, from the complete pre-activations, mixed with the one before as zoneout says.
  RNNFAST_FUNCTION Carried apply(int64_t t, int64_t n, int64_t u, T (&slot)[kSlots], const Carried& before) const {
    if constexpr (kLate > 0) Cell::late_input(slot[0], T{});
    Carried made{};
    T w[Cell::kPeepholes + 1]{};
    load_peepholes(u, w);
    Cell::forward(slot, before.h, before.c, made.h, made.c, w);
    if (given(p.keep_h.data)) {
      const T keep = widen(at(p.keep_h, t, n, u));
      made.h = keep * before.h + (1 - keep) * made.h;
    }
    if (Cell::kHasCell && given(p.keep_c.data)) {
      const T keep = widen(at(p.keep_c, t, n, u));
      made.c = keep * before.c + (1 - keep) * made.c;
    }
    return made;
  }
  // What a step gives and what backward will need of it, but for a projected h.
  RNNFAST_FUNCTION void store(int64_t t, int64_t n, int64_t u, const T (&slot)[kSlots], const Carried& made) const {
    const int64_t H = p.size.H, r = row(t, n);
    if (p.training) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) *kept_slot(r, u, i) = slot[i];
      if (Cell::kHasCell) p.cells[r * padded(H) + u] = made.c;
      if (p.hidden && !is_projected()) p.hidden[r * padded(p.size.P) + u] = made.h;
    }
    if (Cell::kHasCell) {
      if (given(p.all_c.data)) at(p.all_c, t, n, u) = narrow<E>(made.c);
      if (!has_step(after(t), n)) p.c_n[n * H + u] = narrow<E>(made.c);
    }
    if (is_projected()) return;
    at(p.output, t, n, u) = narrow<E>(made.h);
    set_last_hidden(t, n, u, made.h);
  }
  // Everything from the complete pre-activations on.
  RNNFAST_FUNCTION void forward(int64_t t, int64_t n, int64_t u, T (&slot)[kSlots]) const {
    const int64_t i = n * p.size.H + u;
    const Carried made = apply(t, n, u, slot, {is_projected() ? T{} : s.h[i], Cell::kHasCell ? s.c[i] : T{}});
    store(t, n, u, slot, made);
    if (Cell::kHasCell) s.c[i] = is_reset_after(t, n) ? T{} : made.c;
    if (is_projected())
      s.raw[i] = narrow<E>(made.h);
    else
      set_hidden(t, n, u, made.h);
  }
  // The projection's part, u a unit of P.
  RNNFAST_FUNCTION void project(int64_t t, int64_t n, int64_t u) const {
    const T h = s.projected[n * p.size.P + u];
    if (p.training) p.hidden[row(t, n) * padded(p.size.P) + u] = h;
    at(p.output, t, n, u) = narrow<E>(h);
    set_last_hidden(t, n, u, h);
    set_hidden(t, n, u, h);
  }

  // ---- backward ----

  RNNFAST_FUNCTION void start_backward(int64_t n, int64_t u) const {
    if (u < p.size.P) s.dh[n * p.size.P + u] = load(p.dh_n, n * p.size.P + u), s.dfed[n * p.size.P + u] = T{};
    if (Cell::kHasCell && u < p.size.H) s.dc[n * p.size.H + u] = load(p.dc_n, n * p.size.H + u);
  }
  RNNFAST_FUNCTION void finish_backward(int64_t n, int64_t u) const {
    const int64_t first = p.reverse ? p.size.T - 1 : 0;
    const bool zero = is_reset(first, n);
    if (p.dh0 && u < p.size.P) p.dh0[n * p.size.P + u] = narrow<E>(zero ? T{} : hidden_gradient(n, u));
    if (p.dc0 && u < p.size.H) p.dc0[n * p.size.H + u] = narrow<E>(zero ? T{} : s.dc[n * p.size.H + u]);
  }
  // Of h as it left the last step, from the two ways it was used.
  RNNFAST_FUNCTION T hidden_gradient(int64_t n, int64_t u) const {
    const int64_t i = n * p.size.P + u;
    return s.dh[i] + mask(n, u) * s.dfed[i];
  }
  // The same at a step that the sequence has not: put together, so that the next product may overwrite its part.
  RNNFAST_FUNCTION void skip_backward(int64_t n, int64_t u) const {
    const int64_t i = n * p.size.P + u;
    s.dh[i] = hidden_gradient(n, u);
    s.dfed[i] = T{};
  }

  RNNFAST_FUNCTION T cell_before(int64_t t, int64_t n, int64_t u) const {
    if (is_reset(t, n)) return T{};
    const int64_t b = before(t);
    return has_step(b, n) ? p.cells[row(b, n) * padded(p.size.H) + u] : load(p.c0, n * p.size.H + u);
  }
  RNNFAST_FUNCTION T hidden_before(int64_t t, int64_t n, int64_t u) const {
    if (is_reset(t, n)) return T{};
    const int64_t b = before(t);
    if (!has_step(b, n)) return load(p.h0, n * p.size.P + u);
    const int64_t r = row(b, n);
    if (p.hidden) return p.hidden[r * padded(p.size.P) + u];
    return hidden_of(r, u);
  }
  // h of the cell from what is kept of its row.
  RNNFAST_FUNCTION T hidden_of(int64_t r, int64_t u) const {
    T slot[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) slot[i] = *kept_slot(r, u, i);
    if constexpr (Cell::kHidden == Hidden::kOfCell)
      return Cell::output(slot, p.cells[r * padded(p.size.H) + u]);
    else
      return slot[0];
  }

  // For a projected cell, u a unit of P: the whole gradient of the projected h.
  RNNFAST_FUNCTION void project_backward(int64_t t, int64_t n, int64_t u) const {
    T dh = is_reset_after(t, n) ? T{} : hidden_gradient(n, u);
    if (p.doutput.data) dh += widen(at(p.doutput, t, n, u));
    const int64_t r = row(t, n);
    s.dprojected[r * p.size.P + u] = narrow<E>(dh);
    if (p.dprojected.data) at(p.dprojected, t, n, u) = dh;
    s.dh[n * p.size.P + u] = T{};  // all of it goes through W_hr
    store_fed(t, n, u, mask(n, u) * hidden_before(t, n, u));
  }
  // What the recurrent product took at step t.
  RNNFAST_FUNCTION void store_fed(int64_t t, int64_t n, int64_t u, T fed) const {
    s.h_prev[row(t, n) * p.size.P + u] = narrow<E>(fed);
    if (given(p.h_prev.data)) at(p.h_prev, t, n, u) = fed;
  }

  RNNFAST_FUNCTION AheadBackward load_ahead_backward(int64_t t, int64_t n, int64_t u) const {
    AheadBackward ahead{};
    ahead.has_step = has_step(t, n);
    if (!ahead.has_step) return ahead;
    ahead.is_reset_after = is_reset_after(t, n);
    const int64_t r = row(t, n);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) ahead.slot[k] = *kept_slot(r, u, k);
    if (Cell::kHasCell) {
      ahead.c = p.cells[r * padded(p.size.H) + u];
      ahead.c_prev = cell_before(t, n, u);
      if (given(p.dall_c.data)) ahead.dall_c = widen(at(p.dall_c, t, n, u));
    }
    if (is_projected()) return ahead;
    const int64_t b = before(t);
    if (!is_reset(t, n)) {
      if (!has_step(b, n)) {
        ahead.h_prev = load(p.h0, n * p.size.H + u);
      } else if (p.hidden) {
        ahead.h_prev = p.hidden[row(b, n) * padded(p.size.H) + u];
      } else {
        ahead.makes_h_prev = true;
#pragma unroll
        for (int k = 0; k < kSlots; ++k) ahead.slot_before[k] = *kept_slot(row(b, n), u, k);
      }
    }
    if (p.doutput.data) ahead.doutput = widen(at(p.doutput, t, n, u));
    return ahead;
  }
  // What is left to do when all has come.
  RNNFAST_FUNCTION static void complete(AheadBackward& ahead) {
    if (!ahead.makes_h_prev) return;
    if constexpr (Cell::kHidden == Hidden::kOfCell)
      ahead.h_prev = Cell::output(ahead.slot_before, ahead.c_prev);
    else
      ahead.h_prev = ahead.slot_before[0];
  }
  // From the gradient of the state after the step, dh and dc, to that of the state before it past the recurrent
  // product, and of the slots in their place.
  RNNFAST_FUNCTION void differentiate(int64_t t, int64_t n, int64_t u, AheadBackward& ahead, Carried& d) const {
    T dh = ahead.is_reset_after && !is_projected() ? T{} : d.h,  // a projected one is complete
        dc = ahead.is_reset_after ? T{} : d.c;
    dh += ahead.doutput;
    dc += ahead.dall_c;
    T c = ahead.c, kept_dh{}, kept_dc{}, dh_prev, w[Cell::kPeepholes + 1]{};
    load_peepholes(u, w);
    if constexpr (Cell::kHasCell) {
      if (given(p.keep_c.data)) {  // what was kept is c after the mixture
        kept_dc = widen(at(p.keep_c, t, n, u)) * dc;
        dc -= kept_dc;
        c = Cell::next_cell(ahead.slot, ahead.c_prev);
      }
    }
    if (given(p.keep_h.data)) {
      kept_dh = widen(at(p.keep_h, t, n, u)) * dh;
      dh -= kept_dh;
    }
    Cell::backward(ahead.slot, ahead.h_prev, ahead.c_prev, c, dh, dc, dh_prev, w);
    d = {dh_prev + kept_dh, dc + kept_dc};
  }
  // dgates, and dh, dc become what reaches the state before the step past the recurrent product.
  RNNFAST_FUNCTION void backward(int64_t t, int64_t n, int64_t u) const {
    const int64_t H = p.size.H, r = row(t, n), i = n * H + u;
    AheadBackward ahead = load_ahead_backward(t, n, u);
    complete(ahead);
    Carried d{is_projected() ? s.draw[i] : hidden_gradient(n, u), Cell::kHasCell ? s.dc[i] : T{}};
    const T fed = is_projected() ? T{} : mask(n, u) * ahead.h_prev;
    if (is_projected()) {
      const T raw = hidden_of(r, u);
      s.raw_rows[r * H + u] = narrow<E>(raw);
      if (p.h_raw.data) at(p.h_raw, t, n, u) = raw;
    } else {
      store_fed(t, n, u, fed);
    }
    differentiate(t, n, u, ahead, d);
    if (Cell::kHasCell) s.dc[i] = d.c;
    if (!is_projected()) s.dh[i] = d.h;
#pragma unroll
    for (int q = kLate > 0; q < kGates; ++q) set_gate(t, n, u, q, ahead.slot);  // gate 0 is then backward_late's
    if constexpr (kLate > 0) s.late_rows[r * H + u] = narrow<E>(Cell::recomputed_late_input(ahead.slot[0], fed));
  }
  // The gradient of slot kInput + q and of slot kRecurrent + q to where the products find them.
  RNNFAST_FUNCTION void set_gate(int64_t t, int64_t n, int64_t u, int q, const T (&slot)[kSlots]) const {
    const int64_t H = p.size.H, width = kGates * H, r = row(t, n);
    const int64_t ih = input_gate(q) * H + u, hh = recurrent_gate(q) * H + u;
    const T d_ih = slot[Cell::kInput + q], d_hh = slot[Cell::kRecurrent + q];
    s.dgates_ih[r * width + ih] = narrow<E>(d_ih);
    if (!kOneProduct) s.dgates_hh[r * width + hh] = narrow<E>(d_hh);
    if (given(p.dgates_ih.data)) at(p.dgates_ih, t, n, ih) = d_ih, at(p.dgates_hh, t, n, hh) = d_hh;
  }
  // The gate that made the late gates' input, and its share of dh.
  RNNFAST_FUNCTION void backward_late(int64_t t, int64_t n, int64_t u) const {
    if constexpr (kLate > 0) {
      const int64_t i = n * p.size.H + u;
      T slot[kSlots]{};
      slot[0] = *kept_slot(row(t, n), u, 0);
      const T h = mask(n, u) * hidden_before(t, n, u);
      s.dh[i] += mask(n, u) * Cell::backward_late(slot[0], h, s.dlate[i]);
      set_gate(t, n, u, 0, slot);
    }
  }
};

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
