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
  E* fed[2];     // [N, P] h as the recurrent product takes it: masked. The resident kernels alternate the two
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

template <typename Cell, typename T, typename E>
struct Unit {
  using Params = SequenceParams<T, E>;
  static constexpr int kGates = Cell::kGates, kSlots = Cell::kSlots, kLate = Cell::kLateGates, kEarly = kGates - kLate;
  static constexpr bool kOneProduct = Cell::kInput == Cell::kRecurrent;  // dgates_hh is dgates_ih

  const Params& p;
  const State<T, E>& s;

  // ---- where things are ----

  RNNFAST_FUNCTION int64_t active(int64_t t) const { return p.is_packed ? p.device.active[t] : p.size.N; }
  RNNFAST_FUNCTION bool has_step(int64_t t, int64_t n) const {
    if (t < 0 || t >= p.size.T) return false;
    return p.is_packed ? n < p.device.active[t] : !p.device.lengths || t < p.device.lengths[n];
  }
  RNNFAST_FUNCTION int64_t row(int64_t t, int64_t n) const {
    return p.is_packed ? p.device.first_row[t] + n : t * p.size.N + n;
  }
  RNNFAST_FUNCTION int64_t before(int64_t t) const { return p.reverse ? t + 1 : t - 1; }
  RNNFAST_FUNCTION int64_t after(int64_t t) const { return p.reverse ? t - 1 : t + 1; }
  template <typename X>
  RNNFAST_FUNCTION X& at(const Rows<X>& rows, int64_t t, int64_t n, int64_t u) const {
    return rows.data[(p.is_packed ? row(t, n) * rows.row : t * rows.step + n * rows.row) + u];
  }
  // The state before step t is zero by a reset.
  RNNFAST_FUNCTION bool is_reset(int64_t t, int64_t n) const {
    if (!p.resets) return false;
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
    return p.recurrent_mask ? widen(p.recurrent_mask[n * p.size.P + u]) : T{1};
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
  // h after step t for the next one: as state and as the recurrent product takes it.
  RNNFAST_FUNCTION void set_hidden(int64_t t, int64_t n, int64_t u, T h, int buffer = 0) const {
    const int64_t i = n * p.size.P + u, next = after(t);
    if (next >= 0 && next < p.size.T && is_reset(next, n)) h = T{};
    s.h[i] = h;
    s.fed[buffer][i] = narrow<E>(mask(n, u) * h);
  }
  RNNFAST_FUNCTION void set_last_hidden(int64_t t, int64_t n, int64_t u, T h) const {
    if (!has_step(after(t), n)) p.h_n[n * p.size.P + u] = narrow<E>(h);
  }

  // Pre-activations but for the recurrent product.
  RNNFAST_FUNCTION void input_slots(int64_t t, int64_t n, int64_t u, T (&slot)[kSlots]) const {
    const int64_t H = p.size.H;
    const T* pre = s.pre + (row(t, n) - s.pre_first) * kGates * H;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) slot[i] = T{};
#pragma unroll
    for (int q = 0; q < kGates; ++q) {
      const int64_t i = input_gate(q) * H + u;
      slot[Cell::kInput + q] += pre[i] + load(p.b_ih, i);
    }
#pragma unroll
    for (int q = 0; q < kGates; ++q) slot[Cell::kRecurrent + q] += load(p.b_hh, recurrent_gate(q) * H + u);
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
      add_recurrent(n, u, slot, false);
      s.late[n * p.size.H + u] = narrow<E>(Cell::late_input(slot[0], widen(s.fed[0][n * p.size.H + u])));
    }
  }

  // Everything from the complete pre-activations on.
  RNNFAST_FUNCTION void forward(int64_t t, int64_t n, int64_t u, T (&slot)[kSlots], int buffer = 0) const {
    const int64_t H = p.size.H, r = row(t, n);
    const bool is_projected = p.w_hr != nullptr;
    if constexpr (kLate > 0) Cell::late_input(slot[0], T{});
    const T h_prev = is_projected ? T{} : s.h[n * p.size.P + u];
    const T c_prev = Cell::kHasCell ? s.c[n * H + u] : T{};
    T h, c{}, w[Cell::kPeepholes + 1];
    load_peepholes(u, w);
    Cell::forward(slot, h_prev, c_prev, h, c, w);
    if (p.keep_h.data) {
      const T keep = widen(at(p.keep_h, t, n, u));
      h = keep * h_prev + (1 - keep) * h;
    }
    if (Cell::kHasCell && p.keep_c.data) {
      const T keep = widen(at(p.keep_c, t, n, u));
      c = keep * c_prev + (1 - keep) * c;
    }
    if (p.training) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) *kept_slot(r, u, i) = slot[i];
      if (Cell::kHasCell) p.cells[r * padded(H) + u] = c;
      if (p.hidden && !is_projected) p.hidden[r * padded(p.size.P) + u] = h;
    }
    if (Cell::kHasCell) {
      if (p.all_c.data) at(p.all_c, t, n, u) = narrow<E>(c);
      const int64_t next = after(t);
      if (!has_step(next, n)) p.c_n[n * H + u] = narrow<E>(c);
      s.c[n * H + u] = next >= 0 && is_reset(next, n) ? T{} : c;
    }
    if (is_projected) {
      s.raw[n * H + u] = narrow<E>(h);
      return;
    }
    at(p.output, t, n, u) = narrow<E>(h);
    set_last_hidden(t, n, u, h);
    set_hidden(t, n, u, h, buffer);
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
    const int64_t next = after(t);
    T dh = next >= 0 && next < p.size.T && is_reset(next, n) ? T{} : hidden_gradient(n, u);
    if (p.doutput.data) dh += widen(at(p.doutput, t, n, u));
    const int64_t r = row(t, n);
    s.dprojected[r * p.size.P + u] = narrow<E>(dh);
    if (p.dprojected.data) at(p.dprojected, t, n, u) = dh;
    s.dh[n * p.size.P + u] = T{};  // all of it goes through W_hr
    s.h_prev[r * p.size.P + u] = narrow<E>(fed_before(t, n, u));
  }
  // What the recurrent product took at step t.
  RNNFAST_FUNCTION T fed_before(int64_t t, int64_t n, int64_t u) const {
    const T h = mask(n, u) * hidden_before(t, n, u);
    if (p.h_prev.data) at(p.h_prev, t, n, u) = h;
    return h;
  }

  // dgates, and dh, dc become what reaches the state before the step past the recurrent product.
  RNNFAST_FUNCTION void backward(int64_t t, int64_t n, int64_t u) const {
    const int64_t H = p.size.H, r = row(t, n), next = after(t), i = n * H + u;
    const bool is_projected = p.w_hr != nullptr;
    const bool cut = next >= 0 && next < p.size.T && is_reset(next, n);
    T dh, h_prev{};
    if (is_projected) {
      dh = s.draw[i];
      const T raw = hidden_of(r, u);
      s.raw_rows[r * H + u] = narrow<E>(raw);
      if (p.h_raw.data) at(p.h_raw, t, n, u) = raw;
    } else {
      dh = cut ? T{} : hidden_gradient(n, u);
      if (p.doutput.data) dh += widen(at(p.doutput, t, n, u));
      h_prev = hidden_before(t, n, u);
      const T fed = mask(n, u) * h_prev;
      s.h_prev[r * H + u] = narrow<E>(fed);
      if (p.h_prev.data) at(p.h_prev, t, n, u) = fed;
    }
    T slot[kSlots];
#pragma unroll
    for (int k = 0; k < kSlots; ++k) slot[k] = *kept_slot(r, u, k);
    T c{}, c_prev{}, dc{}, kept_dh{}, kept_dc{}, dh_prev, w[Cell::kPeepholes + 1];
    load_peepholes(u, w);
    if constexpr (Cell::kHasCell) {
      c = p.cells[r * padded(H) + u];
      c_prev = cell_before(t, n, u);
      dc = cut ? T{} : s.dc[i];
      if (p.dall_c.data) dc += widen(at(p.dall_c, t, n, u));
      if (p.keep_c.data) {  // what was kept is c after the mixture
        kept_dc = widen(at(p.keep_c, t, n, u)) * dc;
        dc -= kept_dc;
        c = Cell::next_cell(slot, c_prev);
      }
    }
    if (p.keep_h.data) {
      kept_dh = widen(at(p.keep_h, t, n, u)) * dh;
      dh -= kept_dh;
    }
    Cell::backward(slot, h_prev, c_prev, c, dh, dc, dh_prev, w);
    if (Cell::kHasCell) s.dc[i] = dc + kept_dc;
    if (!is_projected) s.dh[i] = dh_prev + kept_dh;
#pragma unroll
    for (int q = 0; q < kGates; ++q) {
      if (kLate > 0 && q == 0) continue;  // backward_late's
      set_gate(t, n, u, q, slot);
    }
    if constexpr (kLate > 0)
      s.late_rows[r * H + u] = narrow<E>(Cell::recomputed_late_input(slot[0], mask(n, u) * h_prev));
  }
  // The gradient of slot kInput + q and of slot kRecurrent + q to where the products find them.
  RNNFAST_FUNCTION void set_gate(int64_t t, int64_t n, int64_t u, int q, const T (&slot)[kSlots]) const {
    const int64_t H = p.size.H, width = kGates * H, r = row(t, n);
    const int64_t ih = input_gate(q) * H + u, hh = recurrent_gate(q) * H + u;
    const T d_ih = slot[Cell::kInput + q], d_hh = slot[Cell::kRecurrent + q];
    s.dgates_ih[r * width + ih] = narrow<E>(d_ih);
    if (!kOneProduct) s.dgates_hh[r * width + hh] = narrow<E>(d_hh);
    if (p.dgates_ih.data) at(p.dgates_ih, t, n, ih) = d_ih, at(p.dgates_hh, t, n, hh) = d_hh;
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
