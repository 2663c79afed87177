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
#pragma once

#include "math.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

enum class Hidden {
  kSlot,    // it is slot 0
  kSaved,   // a copy is kept
  kOfCell,  // recomputed: output(slots, c)
};

// h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), f = tanh or relu. Elman 1990.
template <bool kTanh>
struct RNN {
  static constexpr const char* kName = kTanh ? "rnn_tanh" : "rnn_relu";
  static constexpr const char* kSource = "Elman 1990, Finding structure in time";
  static constexpr int kGates = 1, kSlots = 1, kInput = 0, kRecurrent = 0;
  static constexpr int kInputGates[] = {0}, kRecurrentGates[] = {0};
  static constexpr bool kHasCell = false;
  static constexpr Hidden kHidden = Hidden::kSlot;

  template <typename V>
  static void forward(V (&slot)[kSlots], V, V, V& h, V&) {
    h = slot[0] = kTanh ? tanh(slot[0]) : relu(slot[0]);
  }

  // f'(a) from h = f(a): 1 - h^2 for tanh, [h > 0] for relu (NaN passes, as in torch).
  template <typename V>
  static void backward(V (&slot)[kSlots], V, V, V, V dh, V&, V& dh_prev) {
    const V h = slot[0];
    slot[0] = kTanh ? dh * (1 - h * h) : (h <= 0 ? V{} : dh);
    dh_prev = V{};
  }
};

// r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
// z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
// n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
// h' = (1 - z) * n + z * h
// Cho et al. 2014, with the reset gate applied after the recurrent product, as cuDNN and torch do.
// torch's order r, z, n. Slots: W_in x + b_in, later n | r | z | W_hn h + b_hn.
struct GRU {
  static constexpr const char* kName = "gru";
  static constexpr const char* kSource =
      "Cho et al. 2014, Learning phrase representations; reset gate after the recurrent product, as cuDNN";
  static constexpr int kGates = 3, kSlots = 4, kInput = 0, kRecurrent = 1;
  static constexpr int kInputGates[] = {2, 0, 1}, kRecurrentGates[] = {0, 1, 2};
  static constexpr bool kHasCell = false;
  static constexpr Hidden kHidden = Hidden::kSaved;

  template <typename V>
  static void forward(V (&slot)[kSlots], V h_prev, V, V& h, V&) {
    const V r = sigmoid(slot[1]), z = sigmoid(slot[2]);
    const V n = tanh(slot[0] + r * slot[3]);
    h = n + z * (h_prev - n);
    slot[0] = n, slot[1] = r, slot[2] = z;
  }

  template <typename V>
  static void backward(V (&slot)[kSlots], V h_prev, V, V, V dh, V&, V& dh_prev) {
    const V n = slot[0], r = slot[1], z = slot[2], recurrent = slot[3];
    const V da_n = dh * (1 - z) * (1 - n * n);
    slot[0] = da_n;
    slot[1] = da_n * recurrent * (r * (1 - r));
    slot[2] = dh * (h_prev - n) * (z * (1 - z));
    slot[3] = da_n * r;
    dh_prev = dh * z;
  }
};

// i, f, o = sigmoid(W_i* x + b_i* + W_h* h + b_h*), g = tanh(W_ig x + b_ig + W_hg h + b_hg)
// c' = f * c + i * g
// h' = o * tanh(c')
// Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, no peepholes. torch's order i, f, g, o.
struct LSTM {
  static constexpr const char* kName = "lstm";
  static constexpr const char* kSource =
      "Hochreiter & Schmidhuber 1997, Long short-term memory; forget gate of Gers et al. 2000, no peepholes";
  static constexpr int kGates = 4, kSlots = 4, kInput = 0, kRecurrent = 0;
  static constexpr int kInputGates[] = {0, 1, 2, 3}, kRecurrentGates[] = {0, 1, 2, 3};
  static constexpr bool kHasCell = true;
  static constexpr Hidden kHidden = Hidden::kOfCell;

  template <typename V>
  static void forward(V (&slot)[kSlots], V, V c_prev, V& h, V& c) {
    const V i = sigmoid(slot[0]), f = sigmoid(slot[1]), g = tanh(slot[2]), o = sigmoid(slot[3]);
    c = f * c_prev + i * g;
    h = o * tanh(c);
    slot[0] = i, slot[1] = f, slot[2] = g, slot[3] = o;
  }

  template <typename V>
  static V output(const V (&slot)[kSlots], V c) {
    return slot[3] * tanh(c);
  }

  // dc: the gradient of c' from later steps on entry, that of c on exit.
  template <typename V>
  static void backward(V (&slot)[kSlots], V, V c_prev, V c, V dh, V& dc, V& dh_prev) {
    const V i = slot[0], f = slot[1], g = slot[2], o = slot[3];
    const V tanh_c = tanh(c);
    const V dc_total = dc + dh * o * (1 - tanh_c * tanh_c);
    slot[0] = dc_total * g * (i * (1 - i));
    slot[1] = dc_total * c_prev * (f * (1 - f));
    slot[2] = dc_total * i * (1 - g * g);
    slot[3] = dh * tanh_c * (o * (1 - o));
    dc = dc_total * f;
    dh_prev = V{};
  }
};

// The list: `X(Cell)` for each. A new cell is a struct above and a word here.
#define RNNFAST_FOR_EACH_CELL(X) X(RNN<true>) X(RNN<false>) X(GRU) X(LSTM)

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
