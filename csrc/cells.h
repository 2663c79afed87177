// Every cell: its gates and their order, forward and backward, once, for every backend, dtype and instruction set.
//
// A cell sees one unit (or one vector of units) at a time, after the products. Its `slots` are what is kept of a unit
// at a step: on entry of forward the pre-activations, on exit what backward needs. The input product x W_ih^T + b_ih
// fills slots [kInput, kInput + kGates), the recurrent product h W_hh^T + b_hh is added to slots
// [kRecurrent, kRecurrent + kGates); where both meet a slot holds their sum. backward replaces the slots by their
// gradients, so that the same two ranges feed the products of backward. Products, projections, lengths and resets
// belong to the driver.
//
// A cell states:
//   kName                            its name at every level: op, reference, tests
//   kSource                          where the formula is from, and which variant it is
//   kGates                           G, row blocks of W_ih and W_hh
//   kSlots, kInput, kRecurrent       as above
//   kInputGates[q], kRecurrentGates[q]   the row block, in torch's order, that feeds slot kInput + q, kRecurrent + q
//   kHasCell                         a second state c beside h
//   kHidden                          where backward finds h of earlier steps (see Hidden)
//   kLateGates                       how many gates, the last of the recurrent ones, take their recurrent product not
//                                    of h but of late_input(slot 0, h), a gate of its own; backward_late then follows
//                                    backward, with the gradient of what late_input gave
//   kPeepholes                       vectors of H weights by which gates see c; forward and backward get them as w.
//                                    kPeepholeSlots[k] is the slot that vector k feeds: from c before the step, the
//                                    last from c after it. For a cell with c `next_cell` gives that from the slots once
//                                    more
//   kHasResident                     a GPU keeps its recurrent weights near the processors (cuda/resident.h), at the
//                                    price of many kernels to compile
//   kOutputSlots                     a bit for each slot that forward_output reads. If not 0, forward is also there in
//                                    two parts, forward_gates and then forward_output: the second takes an activation
//                                    of what the activations of the first gave, so that a processor gains by doing
//                                    the first of several units before the second
//   kNorms                           how many parts of the slots are normalized before the cell reads them (LayerNorm)
//   kGains                           vectors of H weights of a cell with norms: its w
#pragma once

#ifdef RNNFAST_DEVICE
#include "cuda/math.h"
#else
#include "math.h"
#endif

namespace rnnfast {
inline namespace RNNFAST_ISA {

enum class Hidden {
  kSlot,    // it is the only slot
  kSaved,   // a copy is kept
  kOfCell,  // recomputed: output(slots, c)
};

// What most cells have none of.
struct Common {
  static constexpr int kLateGates = 0, kPeepholes = 0, kNorms = 0, kGains = 0;
  static constexpr bool kHasResident = false;
  static constexpr unsigned kOutputSlots = 0;
};

// h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), f = tanh or relu. Elman 1990.
template <bool kTanh>
struct RNN : Common {
  static constexpr const char* kName = kTanh ? "rnn_tanh" : "rnn_relu";
  static constexpr const char* kSource = "Elman 1990, Finding structure in time";
  static constexpr int kGates = 1, kSlots = 1, kInput = 0, kRecurrent = 0;
  static constexpr int kInputGates[] = {0}, kRecurrentGates[] = {0};
  static constexpr bool kHasCell = false, kHasResident = true;
  static constexpr Hidden kHidden = Hidden::kSlot;

  template <typename V>
  RNNFAST_FUNCTION static void forward(V (&slot)[kSlots], V, V, V& h, V&, const V*) {
    h = slot[0] = kTanh ? tanh(slot[0]) : relu(slot[0]);
  }

  // f'(a) from h = f(a): 1 - h^2 for tanh, [h > 0] for relu (NaN passes, as in torch).
  template <typename V>
  RNNFAST_FUNCTION static void backward(V (&slot)[kSlots], V, V, V, V dh, V&, V& dh_prev, const V*) {
    const V h = slot[0];
    slot[0] = kTanh ? dh * (1 - h * h) : (h <= 0 ? V{} : dh);
    dh_prev = V{};
  }
};

// r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
// z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
// n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
// h' = (1 - z) * n + z * h
// Cho et al. 2014, with the reset gate applied after the recurrent product, as cuDNN and torch do; torch's order r, z,
// n. Without a reset gate r = 1, which is the update gate RNN of Collins et al. 2016; without an update gate z = 0.
// Slots: n before r is applied, later n | r | z | W_hn h + b_hn. Without a reset gate: n | z.
template <bool kReset, bool kUpdate>
struct GRU : Common {
  static constexpr const char* kName = !kUpdate ? "gru_reset" : !kReset ? "gru_update" : "gru";
  static constexpr const char* kSource =
      !kUpdate  ? "Cho et al. 2014, Learning phrase representations, without the update gate"
      : !kReset ? "Collins et al. 2016, Capacity and trainability in recurrent neural networks: the update gate RNN"
                : "Cho et al. 2014, Learning phrase representations; reset gate after the recurrent product, as cuDNN";
  static constexpr int kGates = 1 + kReset + kUpdate, kSlots = kGates + kReset, kInput = 0, kRecurrent = kReset;
  static constexpr int kInputGates[] = {kGates - 1, 0, 1};
  static constexpr int kRecurrentGates[] = {!kReset, kReset, 2};
  static constexpr bool kHasCell = false;
  static constexpr bool kHasResident = kReset && kUpdate;
  static constexpr Hidden kHidden = Hidden::kSaved;
  static constexpr int kR = 1, kZ = 1 + kReset, kRecurrentN = kSlots - 1;
  static constexpr unsigned kOutputSlots = !kReset ? 0 : kUpdate ? 1u | 1u << kZ : 1u;

  template <typename V>
  RNNFAST_FUNCTION static void forward(V (&slot)[kSlots], V h_prev, V c_prev, V& h, V& c, const V* w) {
    forward_gates(slot, h_prev, c_prev, c, w);
    h = forward_output(slot, h_prev, c, w);
  }
  template <typename V>
  RNNFAST_FUNCTION static void forward_gates(V (&slot)[kSlots], V, V, V&, const V*) {
    if constexpr (kReset) {
      slot[kR] = sigmoid(slot[kR]);
      slot[0] += slot[kR] * slot[kRecurrentN];
    }
    if constexpr (kUpdate) slot[kZ] = sigmoid(slot[kZ]);
  }
  template <typename V>
  RNNFAST_FUNCTION static V forward_output(V (&slot)[kSlots], V h_prev, V, const V*) {
    const V n = slot[0] = tanh(slot[0]);
    if constexpr (kUpdate) return n + slot[kZ] * (h_prev - n);
    return n;
  }

  template <typename V>
  RNNFAST_FUNCTION static void backward(V (&slot)[kSlots], V h_prev, V, V, V dh, V&, V& dh_prev, const V*) {
    const V n = slot[0];
    V dn = dh;
    dh_prev = V{};
    if constexpr (kUpdate) {
      const V z = slot[kZ];
      dn = dh * (1 - z);
      dh_prev = dh * z;
      slot[kZ] = dh * (h_prev - n) * (z * (1 - z));
    }
    slot[0] = dn * (1 - n * n);
    if constexpr (kReset) {
      const V r = slot[kR], recurrent = slot[kRecurrentN];
      slot[kR] = slot[0] * recurrent * (r * (1 - r));
      slot[kRecurrentN] = slot[0] * r;
    }
  }
};

// r and z as above
// n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)
// h' = (1 - z) * n + z * h
// Cho et al. 2014 as printed, with z and 1 - z in torch's places. Without an update gate z = 0. Slots: r | z | n.
template <bool kUpdate>
struct GRUBefore : Common {
  static constexpr const char* kName = kUpdate ? "gru_before" : "gru_reset_before";
  static constexpr const char* kSource =
      kUpdate ? "Cho et al. 2014, Learning phrase representations; reset gate before the recurrent product"
              : "Cho et al. 2014, Learning phrase representations, reset gate before the recurrent product; without "
                "the update gate";
  static constexpr int kGates = 2 + kUpdate, kSlots = kGates, kInput = 0, kRecurrent = 0, kLateGates = 1;
  static constexpr int kInputGates[] = {0, 1, 2}, kRecurrentGates[] = {0, 1, 2};
  static constexpr bool kHasCell = false;
  static constexpr Hidden kHidden = Hidden::kSaved;
  static constexpr int kN = kSlots - 1;

  // From the pre-activation of r, which is replaced by r.
  template <typename V>
  RNNFAST_FUNCTION static V late_input(V& slot, V h) {
    slot = sigmoid(slot);
    return recomputed_late_input(slot, h);
  }
  template <typename V>
  RNNFAST_FUNCTION static V recomputed_late_input(V r, V h) {
    return r * h;
  }

  template <typename V>
  RNNFAST_FUNCTION static void forward(V (&slot)[kSlots], V h_prev, V, V& h, V&, const V*) {
    h = slot[kN] = tanh(slot[kN]);
    if constexpr (kUpdate) {
      slot[1] = sigmoid(slot[1]);
      h += slot[1] * (h_prev - h);
    }
  }

  // All but r, which stays in slot 0.
  template <typename V>
  RNNFAST_FUNCTION static void backward(V (&slot)[kSlots], V h_prev, V, V, V dh, V&, V& dh_prev, const V*) {
    const V n = slot[kN];
    V dn = dh;
    dh_prev = V{};
    if constexpr (kUpdate) {
      const V z = slot[1];
      dn = dh * (1 - z);
      dh_prev = dh * z;
      slot[1] = dh * (h_prev - n) * (z * (1 - z));
    }
    slot[kN] = dn * (1 - n * n);
  }

  // r's part, from the gradient of r * h; returns what reaches h through it.
  template <typename V>
  RNNFAST_FUNCTION static V backward_late(V& slot, V h, V dlate) {
    const V r = slot;
    slot = dlate * h * (r * (1 - r));
    return dlate * r;
  }
};

// i, f, o = sigmoid(W_i* x + b_i* + W_h* h + b_h*), g = tanh(W_ig x + b_ig + W_hg h + b_hg)
// c' = f * c + i * g
// h' = o * tanh(c')
// Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; torch's order i, f, g, o. Coupled: f = 1 - i,
// gates i, g, o (Greff et al. 2017). With peepholes (Gers et al. 2002) w_i * c and w_f * c join the sums of i and f,
// and w_o * c' that of o.
template <bool kPeephole, bool kCoupled>
struct LSTM : Common {
  static constexpr const char* kName =
      kPeephole ? (kCoupled ? "lstm_coupled_peephole" : "lstm_peephole") : (kCoupled ? "lstm_coupled" : "lstm");
  static constexpr const char* kSource =
      kPeephole ? (kCoupled ? "Greff et al. 2017, LSTM: a search space odyssey: CIFG, with peepholes"
                            : "Gers et al. 2002, Learning precise timing with LSTM recurrent networks: peepholes")
      : kCoupled
          ? "Greff et al. 2017, LSTM: a search space odyssey: coupled input and forget gate; no peepholes"
          : "Hochreiter & Schmidhuber 1997, Long short-term memory; forget gate of Gers et al. 2000, no peepholes";
  static constexpr int kGates = 4 - kCoupled, kSlots = kGates, kInput = 0, kRecurrent = 0;
  static constexpr int kInputGates[] = {0, 1, 2, 3}, kRecurrentGates[] = {0, 1, 2, 3};
  static constexpr bool kHasCell = true, kHasResident = !kPeephole && !kCoupled;
  static constexpr Hidden kHidden = Hidden::kOfCell;
  static constexpr int kI = 0, kF = 1, kG = 2 - kCoupled, kO = 3 - kCoupled;
  static constexpr int kPeepholes = kPeephole ? 3 - kCoupled : 0;
  static constexpr int kPeepholeSlots[] = {kI, kCoupled ? kO : kF, kO};
  static constexpr unsigned kOutputSlots = 1u << kO;

  template <typename V>
  RNNFAST_FUNCTION static V next_cell(const V (&slot)[kSlots], V c_prev) {
    if constexpr (kCoupled)
      return c_prev + slot[kI] * (slot[kG] - c_prev);
    else
      return slot[kF] * c_prev + slot[kI] * slot[kG];
  }

  template <typename V>
  RNNFAST_FUNCTION static void forward(V (&slot)[kSlots], V h_prev, V c_prev, V& h, V& c, const V* w) {
    forward_gates(slot, h_prev, c_prev, c, w);
    h = output(slot, c);
  }
  template <typename V>
  RNNFAST_FUNCTION static void forward_gates(V (&slot)[kSlots], V, V c_prev, V& c, const V* w) {
    if constexpr (kPeephole) {
      slot[kI] += w[0] * c_prev;
      if constexpr (!kCoupled) slot[kF] += w[1] * c_prev;
    }
    slot[kI] = sigmoid(slot[kI]);
    if constexpr (!kCoupled) slot[kF] = sigmoid(slot[kF]);
    slot[kG] = tanh(slot[kG]);
    c = next_cell(slot, c_prev);
    if constexpr (kPeephole) slot[kO] += w[kPeepholes - 1] * c;
    slot[kO] = sigmoid(slot[kO]);
  }
  template <typename V>
  RNNFAST_FUNCTION static V forward_output(V (&slot)[kSlots], V, V c, const V*) {
    return output(slot, c);
  }

  template <typename V>
  RNNFAST_FUNCTION static V output(const V (&slot)[kSlots], V c) {
    return slot[kO] * tanh(c);
  }

  // dc: the gradient of c' from later steps on entry, that of c on exit.
  template <typename V>
  RNNFAST_FUNCTION static void backward(V (&slot)[kSlots], V, V c_prev, V c, V dh, V& dc, V& dh_prev, const V* w) {
    backward_output(slot, c, dh, dc);
    backward_cell(slot, c_prev, dc, w);
    dh_prev = V{};
  }

  // o's part, and what reaches c' through h'.
  template <typename V>
  RNNFAST_FUNCTION static void backward_output(V (&slot)[kSlots], V c, V dh, V& dc) {
    const V o = slot[kO], tanh_c = tanh(c);
    slot[kO] = dh * tanh_c * (o * (1 - o));
    dc += dh * o * (1 - tanh_c * tanh_c);
  }

  // The others' from the whole gradient of c', which becomes that of c.
  template <typename V>
  RNNFAST_FUNCTION static void backward_cell(V (&slot)[kSlots], V c_prev, V& dc, const V* w) {
    const V i = slot[kI], g = slot[kG];
    V dc_total = dc;
    if constexpr (kPeephole) dc_total += slot[kO] * w[kPeepholes - 1];
    if constexpr (kCoupled) {
      slot[kI] = dc_total * (g - c_prev) * (i * (1 - i));
      dc = dc_total * (1 - i);
    } else {
      const V f = slot[kF];
      slot[kI] = dc_total * g * (i * (1 - i));
      slot[kF] = dc_total * c_prev * (f * (1 - f));
      dc = dc_total * f;
      if constexpr (kPeephole) dc += slot[kF] * w[1];
    }
    if constexpr (kPeephole) dc += slot[kI] * w[0];
    slot[kG] = dc_total * i * (1 - g * g);
  }
};

// Plain with layer normalization, LN(a) = (a - mean(a)) / sqrt(var(a) + 1e-5): in the place of its products come
//   gain_ih * LN(W_ih x) + b_ih and gain_hh * LN(W_hh h) + b_hh, over the G*H numbers of each,
// and for an LSTM h' = o * tanh(gain_c * LN(c') + b_c), over its H numbers.
// Ba et al. 2016; the LSTM is theirs. Of the GRU they normalize the candidate apart from the gates; here each product
// is normalized whole, as in the LSTM and in Haste 2020.
// Slots: W_ih x | W_hh h | those of Plain | of an LSTM c'. The driver takes the statistics and gives the cell the
// normals of the products. What goes with slot i is w[i]: the gain of a product's number, the bias of one of Plain's;
// the last two of an LSTM are gain_c and b_c.
template <typename Plain>
struct LayerNorm : Common {
  static constexpr const char* kName = Plain::kHasCell ? "lstm_layer_norm" : "gru_layer_norm";
  static constexpr const char* kSource =
      Plain::kHasCell
          ? "Ba et al. 2016, Layer normalization: both products, each over all gates, and c before the output"
          : "Ba et al. 2016, Layer normalization, each product over all gates as in Haste 2020";
  static constexpr int kGates = Plain::kGates, kPlain = 2 * kGates, kC = kPlain + Plain::kSlots;
  static constexpr bool kHasCell = Plain::kHasCell;
  static constexpr int kSlots = kC + kHasCell, kInput = 0, kRecurrent = kGates;
  static constexpr const int *kInputGates = Plain::kInputGates, *kRecurrentGates = Plain::kRecurrentGates;
  static constexpr Hidden kHidden = Hidden::kSaved;
  static constexpr int kNorms = 2 + kHasCell, kGains = kC + 2 * kHasCell;
  static constexpr unsigned kOutputSlots = Plain::kOutputSlots << kPlain | unsigned{kHasCell} << kC;
  // Where the products meet Plain's slots.
  static constexpr int kMeetInput = kPlain + Plain::kInput, kMeetRecurrent = kPlain + Plain::kRecurrent;

  // Runs f on Plain's slots.
  template <typename V, typename F>
  RNNFAST_FUNCTION static void as_plain(V (&slot)[kSlots], F f) {
    V plain[Plain::kSlots];
    for (int s = 0; s < Plain::kSlots; ++s) plain[s] = slot[kPlain + s];
    f(plain);
    for (int s = 0; s < Plain::kSlots; ++s) slot[kPlain + s] = plain[s];
  }

  // From the normals of the products.
  template <typename V>
  RNNFAST_FUNCTION static void forward_gates(V (&slot)[kSlots], V h_prev, V c_prev, V& c, const V* w) {
    for (int s = kPlain; s < kC; ++s) slot[s] = w[s];
    for (int q = 0; q < kGates; ++q) {
      slot[kMeetInput + q] += w[q] * slot[q];
      slot[kMeetRecurrent + q] += w[kGates + q] * slot[kGates + q];
    }
    as_plain(slot, [&](auto& plain) { Plain::forward_gates(plain, h_prev, c_prev, c, w); });
    if constexpr (kHasCell) slot[kC] = c;
  }

  // Of an LSTM from the normal of c'.
  template <typename V>
  RNNFAST_FUNCTION static V forward_output(V (&slot)[kSlots], V h_prev, V normal, const V* w) {
    V h;
    if constexpr (kHasCell) normal = w[kC] * normal + w[kC + 1];
    as_plain(slot, [&](auto& plain) { h = Plain::forward_output(plain, h_prev, normal, w); });
    return h;
  }
  // The backward of that of an LSTM: o's part in Plain's slots, and in slot kC the gradient of gain_c * normal + b_c.
  // Returns the normal's.
  template <typename V>
  RNNFAST_FUNCTION static V backward_output(V (&slot)[kSlots], V normal, V dh, const V* w) {
    slot[kC] = V{};
    as_plain(slot, [&](auto& plain) { Plain::backward_output(plain, w[kC] * normal + w[kC + 1], dh, slot[kC]); });
    return w[kC] * slot[kC];
  }

  // The gradients of Plain's slots; of an LSTM after backward_output, with the whole gradient of c'.
  template <typename V>
  RNNFAST_FUNCTION static void backward(V (&slot)[kSlots], V h_prev, V c_prev, V c, V dh, V& dc, V& dh_prev,
                                        const V* w) {
    as_plain(slot, [&](auto& plain) {
      if constexpr (kHasCell)
        Plain::backward_cell(plain, c_prev, dc, w), dh_prev = V{};
      else
        Plain::backward(plain, h_prev, c_prev, c, dh, dc, dh_prev, w);
    });
  }
  // Then those of the normals of the products,
  template <typename V>
  RNNFAST_FUNCTION static void backward_normals(V (&slot)[kSlots], const V* w) {
    for (int q = 0; q < kGates; ++q) {
      slot[q] = w[q] * slot[kMeetInput + q];
      slot[kGates + q] = w[kGates + q] * slot[kMeetRecurrent + q];
    }
  }
  // and those of w, which are added to dw: from the normals (slot kC: of c') and the gradients of Plain's slots and kC.
  template <typename V>
  RNNFAST_FUNCTION static void backward_gains(const V (&normal)[kSlots], const V (&slot)[kSlots], V (&dw)[kGains]) {
    for (int q = 0; q < kGates; ++q) {
      dw[q] += slot[kMeetInput + q] * normal[q];
      dw[kGates + q] += slot[kMeetRecurrent + q] * normal[kGates + q];
    }
    for (int s = kPlain; s < kC; ++s) dw[s] += slot[s];
    if constexpr (kHasCell) dw[kC] += slot[kC] * normal[kC], dw[kC + 1] += slot[kC];
  }

  // c' once more.
  template <typename V>
  RNNFAST_FUNCTION static V next_cell(const V (&slot)[kSlots], V) {
    return slot[kC];
  }
};

// The list: `X(Cell)` for each. A new cell is a struct above and a word here.
#define RNNFAST_FOR_EACH_CELL(X) \
  X(RNN<true>)                   \
  X(RNN<false>)                  \
  X(PlainGRU)                    \
  X(PlainLSTM)                   \
  X(GRUBefore<true>)             \
  X(ResetGRU)                    \
  X(GRUBefore<false>)            \
  X(UpdateGRU)                   \
  X(PeepholeLSTM) X(CoupledLSTM) X(PeepholeCoupledLSTM) X(LayerNorm<PlainGRU>) X(LayerNorm<PlainLSTM>)
using PlainGRU = GRU<true, true>;
using ResetGRU = GRU<true, false>;
using UpdateGRU = GRU<false, true>;
using PlainLSTM = LSTM<false, false>;
using PeepholeLSTM = LSTM<true, false>;
using CoupledLSTM = LSTM<false, true>;
using PeepholeCoupledLSTM = LSTM<true, true>;

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
