// The per-step schedule: for each step a product outside (Device::gemm) and a kernel over all units. It serves every
// cell, option, size and dtype. What it shares with the resident schedule is here too: start and end, and the products
// over many steps, of the input and in backward of dx and the weight gradients.
#pragma once

#include <type_traits>

#include "unit.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// One kernel's parameters: the call, its arrays, and the step.
template <typename T, typename E>
struct StepParams {
  SequenceParams<T, E> p;
  State<T, E> s;
  int64_t t, sequences, units;  // threads are [sequences, units]
};

template <typename T, typename E>
struct FillParams {
  SequenceParams<T, E> p;
  State<T, E> s;
  int64_t first_row, count;  // threads are [count]
  int64_t width;             // of a row of gates
};

// A cell to stand for all with as many states, in kernels that apply no formula: fewer to compile.
template <typename Cell>
using AnyCell = std::conditional_t<Cell::kHasCell, PlainLSTM, RNN<true>>;

// What a kernel does with one (n, u), each a type of its own so that one kernel serves all.
struct Start {
  template <typename U>
  RNNFAST_FUNCTION static void run(const U& unit, int64_t, int64_t n, int64_t u) {
    unit.start(n, u);
  }
};
struct FeedLate {
  template <typename U>
  RNNFAST_FUNCTION static void run(const U& unit, int64_t t, int64_t n, int64_t u) {
    if (unit.has_step(t, n)) unit.feed_late(t, n, u);
  }
};
struct Forward {
  template <typename U>
  RNNFAST_FUNCTION static void run(const U& unit, int64_t t, int64_t n, int64_t u) {
    if (!unit.has_step(t, n)) return;
    decltype(unit.mask(0, 0)) slot[U::kSlots];
    unit.input_slots(t, n, u, slot);
    unit.add_bias(u, slot);
    unit.add_recurrent(n, u, slot, true);
    unit.forward(t, n, u, slot);
  }
};
struct Project {
  template <typename U>
  RNNFAST_FUNCTION static void run(const U& unit, int64_t t, int64_t n, int64_t u) {
    if (unit.has_step(t, n)) unit.project(t, n, u);
  }
};
struct StartBackward {
  template <typename U>
  RNNFAST_FUNCTION static void run(const U& unit, int64_t, int64_t n, int64_t u) {
    unit.start_backward(n, u);
  }
};
struct ProjectBackward {
  template <typename U>
  RNNFAST_FUNCTION static void run(const U& unit, int64_t t, int64_t n, int64_t u) {
    if (unit.has_step(t, n))
      unit.project_backward(t, n, u);
    else
      unit.skip_backward(n, u);
  }
};
struct Backward {
  template <typename U>
  RNNFAST_FUNCTION static void run(const U& unit, int64_t t, int64_t n, int64_t u) {
    if (unit.has_step(t, n))
      unit.backward(t, n, u);
    else if (!unit.p.w_hr)
      unit.skip_backward(n, u);
  }
};
struct BackwardLate {
  template <typename U>
  RNNFAST_FUNCTION static void run(const U& unit, int64_t t, int64_t n, int64_t u) {
    if (unit.has_step(t, n)) unit.backward_late(t, n, u);
  }
};
struct FinishBackward {
  template <typename U>
  RNNFAST_FUNCTION static void run(const U& unit, int64_t, int64_t n, int64_t u) {
    unit.finish_backward(n, u);
  }
};

template <typename Work, typename Cell, typename T, typename E>
RNNFAST_KERNEL void step_kernel(StepParams<T, E> k) {
  const int64_t i = global_thread();
  if (i >= k.sequences * k.units) return;
  const Unit<Cell, T, E> unit{k.p, k.s};
  Work::run(unit, k.t, i / k.units, i % k.units);
}

// The input with its rows one after the other, zero where a sequence has no step. Threads are elements.
template <typename T, typename E>
RNNFAST_KERNEL void gather_input(FillParams<T, E> k) {
  const int64_t i = global_thread();
  if (i >= k.count) return;
  const Unit<RNN<true>, T, E> unit{k.p, k.s};
  const int64_t row = i / k.p.size.I, u = i % k.p.size.I;
  if (k.p.is_packed) {
    k.s.input[i] = k.p.input.data[row * k.p.input.row + u];
    return;
  }
  const int64_t t = row / k.p.size.N, n = row % k.p.size.N;
  k.s.input[i] = unit.has_step(t, n) ? unit.at(k.p.input, t, n, u) : narrow<E>(T{});
}

// The product of W_ih with one-hot rows: columns of W_ih. Threads are [rows, G*H].
template <typename T, typename E>
RNNFAST_FUNCTION int64_t token_of(const SequenceParams<T, E>& p, int64_t row) {
  const int64_t i = p.is_packed ? row * p.tokens.row : row / p.size.N * p.tokens.step + row % p.size.N * p.tokens.row;
  const int64_t token = p.tokens.data[i];
  return token < 0 ? 0 : token < p.size.I ? token : p.size.I - 1;  // ops refuse others; never outside memory
}
template <typename T, typename E>
RNNFAST_KERNEL void look_up(FillParams<T, E> k) {
  const int64_t i = global_thread(), width = k.width;
  if (i >= k.count) return;
  k.s.pre[i] = widen(k.p.w_ih[i % width * k.p.size.I + token_of(k.p, k.first_row + i / width)]);
}
// Its gradient: each thread owns a row of dW_ih, and adds in the order of steps.
template <typename T, typename E>
RNNFAST_KERNEL void scatter_tokens(FillParams<T, E> k) {
  const int64_t g = global_thread(), width = k.width, I = k.p.size.I;
  if (g >= k.count) return;
  T* dw = k.s.dw_tokens + g * I;
  for (int64_t i = 0; i < I; ++i) dw[i] = T{};
  const int64_t rows = k.p.is_packed ? k.p.size.R : k.p.size.T * k.p.size.N;
  for (int64_t r = 0; r < rows; ++r) dw[token_of(k.p, r)] += widen(k.s.dgates_ih[r * width + g]);
  for (int64_t i = 0; i < I; ++i) k.p.dw_ih[g * I + i] = narrow<E>(dw[i]);
}

template <typename T, typename E>
RNNFAST_KERNEL void fill_ones(FillParams<T, E> k) {
  const int64_t i = global_thread();
  if (i < k.count) k.s.ones[i] = narrow<E>(T{1});
}

// Gradient of the peepholes: threads are [peepholes, H], each sums over all steps in their order.
template <typename Cell, typename T, typename E>
RNNFAST_KERNEL void sum_peepholes(FillParams<T, E> k) {
  const int64_t i = global_thread(), H = k.p.size.H, width = Cell::kGates * H;
  if (i >= k.count) return;
  const Unit<Cell, T, E> unit{k.p, k.s};
  const int64_t u = i % H;
  const int which = static_cast<int>(i / H);
  int gate = 0;
#pragma unroll
  for (int q = 0; q < Cell::kPeepholes; ++q)
    if (q == which) gate = unit.peephole_gate(q);
  const bool of_new_c = which + 1 == Cell::kPeepholes;
  T sum{};
  for (int64_t t = 0; t < k.p.size.T; ++t)
    for (int64_t n = 0; n < unit.active(t); ++n) {
      if (!unit.has_step(t, n)) continue;
      const int64_t r = unit.row(t, n);
      T c = unit.cell_before(t, n, u);
      if (of_new_c) {
        if (k.p.keep_c.data) {
          T slot[Cell::kSlots];
          for (int q = 0; q < Cell::kSlots; ++q) slot[q] = *unit.kept_slot(r, u, q);
          c = Cell::next_cell(slot, c);
        } else {
          c = k.p.cells[r * unit.padded(H) + u];
        }
      }
      sum += widen(k.s.dgates_ih[r * width + gate * H + u]) * c;
    }
  k.p.dw_ch[i] = narrow<E>(sum);
}

// Hands out pieces of the caller's scratch; with a null base it only counts.
template <typename T>
struct DeviceArena {
  T* base;
  int64_t used = 0;
  template <typename X>
  void take(X*& piece, int64_t n) {
    piece = base && n ? reinterpret_cast<X*>(base + used) : nullptr;
    const int64_t bytes = n * static_cast<int64_t>(sizeof(X));
    used += ceil_div(bytes, 256) * 256 / static_cast<int64_t>(sizeof(T));
  }
};

// The ground that both schedules stand on.
template <typename Cell, typename T, typename E>
struct DeviceSequence {
  using Params = SequenceParams<T, E>;
  using U = Unit<Cell, T, E>;
  static constexpr int kGates = Cell::kGates, kEarly = U::kEarly, kLate = U::kLate;
  static constexpr int kThreads = 256;
  static constexpr int64_t kChunkRows = 4096;  // rows whose input product is made together where nothing is kept

  const Params& p;
  const int64_t T_, N, I, H, P;
  const int64_t rows;   // of the input
  const int64_t width;  // of a row of gates
  State<T, E> s{};

  explicit DeviceSequence(const Params& params)
      : p(params),
        T_(p.size.T),
        N(p.size.N),
        I(p.size.I),
        H(p.size.H),
        P(p.size.P),
        rows(p.is_packed ? p.size.R : p.size.T * p.size.N),
        width(kGates * p.size.H) {}

  bool is_projected() const { return p.w_hr != nullptr; }
  int64_t active(int64_t t) const { return p.is_packed ? p.active[t] : N; }
  int64_t first_row(int64_t t) const { return p.is_packed ? p.first_row[t] : t * N; }
  int64_t time(int64_t step) const { return p.reverse ? T_ - 1 - step : step; }
  bool gathers() const {
    if (p.tokens.data) return false;
    return p.device.lengths || p.input.row != I || (!p.is_packed && T_ > 1 && p.input.step != N * p.input.row);
  }
  const E* input() const { return gathers() ? s.input : p.input.data; }

  template <typename Work, typename WorkCell = Cell>
  void step(int64_t t, int64_t sequences, int64_t units) const {
    launch(Launch{ceil_div(sequences * units, kThreads), kThreads, p.device.stream}, step_kernel<Work, WorkCell, T, E>,
           StepParams<T, E>{p, s, t, sequences, units});
  }
  void fill(void (*kernel)(FillParams<T, E>), int64_t first, int64_t count) const {
    launch(Launch{ceil_div(count, kThreads), kThreads, p.device.stream}, kernel,
           FillParams<T, E>{p, s, first, count, width});
  }
  void gemm(const Product& product) const {
    if (product.m > 0 && product.n > 0) p.device.gemm(p.device.gemm_context, product);
  }
  // C [m, n] (+)= A [m, k] W^T, W [n, k]: of T.
  void product(int64_t m, int64_t n, int64_t k, const E* a, const E* w, T* c) const {
    gemm({false, true, m, n, k, a, w, c, k, k, n, false, true});
  }

  void gather() const {
    if (gathers()) fill(gather_input<T, E>, 0, rows * I);
  }

  // s.pre for the steps [s0, s1), in the order of work.
  void input_product(int64_t s0, int64_t s1) {
    const int64_t t0 = p.reverse ? T_ - s1 : s0, t1 = p.reverse ? T_ - s0 : s1;
    s.pre_first = first_row(t0);
    const int64_t count = first_row(t1 - 1) + active(t1 - 1) - s.pre_first;
    if (p.tokens.data)
      fill(look_up<T, E>, s.pre_first, count * width);
    else
      product(count, width, I, input() + s.pre_first * I, p.w_ih, s.pre);
  }
  // How many steps' input products are made together.
  int64_t chunk_steps() const { return T_ < 1 + kChunkRows / (N > 0 ? N : 1) ? T_ : 1 + kChunkRows / (N > 0 ? N : 1); }

  int64_t take_forward(T* base, int64_t chunk) {
    DeviceArena<T> arena{base};
    arena.take(s.input, gathers() ? rows * I : 0);
    arena.take(s.pre, chunk * N * width);
    arena.take(s.recurrent, N * width);
    arena.take(s.h, N * P);
    arena.take(s.c, Cell::kHasCell ? N * H : 0);
    arena.take(s.fed, N * P);
    arena.take(s.late, kLate > 0 ? N * H : 0);
    arena.take(s.raw, is_projected() ? N * H : 0);
    arena.take(s.projected, is_projected() ? N * P : 0);
    return arena.used;
  }
  int64_t take_backward(T* base) {
    DeviceArena<T> arena{base};
    arena.take(s.input, p.dw_ih && gathers() ? rows * I : 0);
    arena.take(s.dh, N * P);
    arena.take(s.dc, Cell::kHasCell ? N * H : 0);
    arena.take(s.dfed, N * P);
    arena.take(s.draw, is_projected() ? N * H : 0);
    arena.take(s.dlate, kLate > 0 ? N * H : 0);
    arena.take(s.dgates_ih, rows * width);
    if (U::kOneProduct)
      s.dgates_hh = s.dgates_ih;
    else
      arena.take(s.dgates_hh, rows * width);
    arena.take(s.h_prev, rows * P);
    arena.take(s.late_rows, kLate > 0 ? rows * H : 0);
    arena.take(s.dprojected, is_projected() ? rows * P : 0);
    arena.take(s.raw_rows, is_projected() ? rows * H : 0);
    arena.take(s.ones, p.db_ih || p.db_hh ? rows : 0);
    arena.take(s.dw_tokens, p.tokens.data && p.dw_ih ? width * I : 0);
    return arena.used;
  }

  // What the steps' kernels leave out where sequences are of different length.
  void clear_rows() const {
    if (!p.device.lengths) return;
    const auto clear = [&](E* array, int64_t units) {
      if (array) fill_zero(array, rows * units * static_cast<int64_t>(sizeof(E)), p.device.stream);
    };
    clear(s.dgates_ih, width), clear(s.h_prev, P), clear(s.late_rows, H), clear(s.dprojected, P), clear(s.raw_rows, H);
    if (!U::kOneProduct) clear(s.dgates_hh, width);
  }

  // After all steps: the products over many of them.
  void sum_gradients() {
    if (p.dinput.data)
      gemm({false, false, rows, I, width, s.dgates_ih, p.w_ih, p.dinput.data, width, I, I, false, false});
    // dW [m, k] = dgates[:, first...]^T other
    const auto weight = [&](E* dw, int64_t m, const E* d, int64_t ld, const E* other, int64_t k) {
      if (dw) gemm({true, false, m, k, rows, d, other, dw, ld, k, k, false, false});
    };
    if (p.dw_ih && p.tokens.data) {
      fill(scatter_tokens<T, E>, 0, width);
    } else if (p.dw_ih) {
      gather();
      weight(p.dw_ih, width, s.dgates_ih, width, input(), I);
    }
    weight(p.dw_hh, kEarly * H, s.dgates_hh, width, s.h_prev, P);
    if (kLate > 0 && p.dw_hh)
      weight(p.dw_hh + kEarly * H * P, kLate * H, s.dgates_hh + kEarly * H, width, s.late_rows, H);
    weight(p.dw_hr, P, s.dprojected, P, s.raw_rows, H);
    if (p.db_ih || p.db_hh) fill(fill_ones<T, E>, 0, rows);
    const auto bias = [&](E* db, const E* d) {
      if (db) gemm({false, false, 1, width, rows, s.ones, d, db, rows, width, width, false, false});
    };
    bias(p.db_ih, s.dgates_ih), bias(p.db_hh, s.dgates_hh);
    if constexpr (Cell::kPeepholes > 0)
      if (p.dw_ch) fill(sum_peepholes<Cell, T, E>, 0, Cell::kPeepholes * H);
  }

  void start_forward() const {
    gather();
    step<Start, AnyCell<Cell>>(0, N, H > P ? H : P);
  }
  void forward_steps(int64_t s0, int64_t s1) const {
    for (int64_t i = s0; i < s1; ++i) {
      const int64_t t = time(i), n = active(t);
      product(n, kEarly * H, P, s.fed, p.w_hh, s.recurrent);
      if constexpr (kLate > 0) {
        step<FeedLate>(t, n, H);
        product(n, kLate * H, P, s.late, p.w_hh + kEarly * H * P, s.recurrent + N * kEarly * H);
      }
      step<Forward>(t, n, H);
      if (!is_projected()) continue;
      product(n, P, H, s.raw, p.w_hr, s.projected);
      step<Project, AnyCell<Cell>>(t, n, P);
    }
  }

  void start_backward() const {
    clear_rows();
    step<StartBackward, AnyCell<Cell>>(0, N, H > P ? H : P);
  }
  void backward_steps() const {
    for (int64_t i = T_ - 1; i >= 0; --i) {
      const int64_t t = time(i), n = active(t), r = first_row(t);
      if (is_projected()) {
        step<ProjectBackward>(t, N, P);
        gemm({false, false, n, H, P, s.dprojected + r * P, p.w_hr, s.draw, P, H, H, false, true});
      }
      step<Backward>(t, N, H);
      const E* d = s.dgates_hh + r * width;
      if constexpr (kLate > 0) {
        gemm({false, false, n, H, kLate * H, d + kEarly * H, p.w_hh + kEarly * H * P, s.dlate, width, P, H, false,
              true});
        step<BackwardLate>(t, n, H);
      }
      gemm({false, false, n, P, kEarly * H, d, p.w_hh, s.dfed, width, P, P, false, true});
    }
  }
  void finish_backward() {
    if (p.dh0 || p.dc0) step<FinishBackward, AnyCell<Cell>>(0, N, H > P ? H : P);
    sum_gradients();
  }
};

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
