// What forward and backward share: where things lie, how the work is divided, how weights are rearranged, and the
// products over rows scattered in memory.
//
// Standard library functions are avoided here and in all that the instruction sets compile: an inline one could be
// shared by the linker between them.
#pragma once

#include "../cells.h"
#include "../sequence.h"
#include "norm.h"
#include "product.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

constexpr int64_t kRowBatch = 256;  // rows whose pointers are gathered on the stack at a time
constexpr int64_t kSumWords = 256;  // words of a weight gradient summed before they join the total, for its accuracy

inline int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t max(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename T>
inline void copy(T* dst, const T* src, int64_t n) {
  if (n > 0) __builtin_memcpy(dst, src, static_cast<size_t>(n) * sizeof(T));
}

template <typename T>
inline void zero(T* dst, int64_t n) {
  if (n > 0) __builtin_memset(dst, 0, static_cast<size_t>(n) * sizeof(T));
}

// copy where one side may be the narrower type.
template <typename From, typename To>
inline void convert(To* dst, const From* src, int64_t n) {
  if constexpr (sizeof(From) == sizeof(To)) {
    copy(dst, src, n);
  } else {
    constexpr int64_t kLanes = Lanes<From>::kCount;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
    for (; i < n; ++i) dst[i] = narrow<To>(widen(src[i]));
  }
}

// Hands out pieces of the caller's scratch. With a null base it only counts, so one function both sizes and lays out.
template <typename T>
struct Arena {
  T* base;
  int64_t used = 0;
  T* take(int64_t n) { return take<T>(n); }
  template <typename U>
  U* take(int64_t n) {
    T* piece = base ? base + used : nullptr;
    used += ceil_div(n, kBlock<U>) * kBlock<T>;
    return reinterpret_cast<U*>(piece);
  }
};

// The ground that SequenceForward and SequenceBackward stand on. `T` is the accumulation type, `T_` the steps. Where E
// is another type, what products are taken of is narrowed to it (product.h).
template <typename Cell, typename T, typename E>
struct SequenceLayout {
  using Params = SequenceParams<T, E>;
  using V = VectorOf<T>;
  using W = WordOf<E>;
  static constexpr bool kNarrows = sizeof(E) < sizeof(T);
  static constexpr int64_t kLanes = Lanes<T>::kCount;
  static constexpr int64_t kUnits = kBlock<T>;  // units in a block of the padded layout
  static constexpr int kGates = Cell::kGates, kSlots = Cell::kSlots;
  // A panel of gate rows holds all gates of one vector of units; with a single gate, several vectors of units.
  static constexpr int kPanelUnits = kGates == 1 ? kMaxPanel : 1;
  static constexpr int kPanelVectors = kGates * kPanelUnits;
  // The recurrent gates that take their product of h, and those that take it later (see cells.h): [begin, count).
  static constexpr int kLateGates = Cell::kLateGates, kEarlyGates = kGates - kLateGates;
  static constexpr int kVectors = Cell::kPeepholes + Cell::kGains;  // of weights by unit: w of the cell
  // The first slot that the cell writes: with norms the products before it stay as they are, and it reads their
  // normals.
  static constexpr int kFirstOwnSlot = Cell::kNorms > 0 ? 2 * kGates : 0;
  // Between the panel's vectors in a row of gates.
  static constexpr int64_t kPanelStride = kGates == 1 ? kLanes : kUnits;
  static_assert(kPanelVectors <= kMaxPanel && kSlots >= kGates, "a panel of gates must fit a tile");

  static int64_t padded(int64_t units) { return ceil_div(units, kUnits) * kUnits; }

  const Params& p;
  const int64_t T_, N, I, H, P;
  const bool projected;
  const int64_t ld_h, ld_p;    // padded rows of H and P units
  const int64_t gate_row;      // elements of a row of gates
  const int64_t unit_vectors;  // of H
  const int64_t gate_panels;   // panels over the units of H
  const int64_t gate_columns;  // ld_h * kGates, K of the products with dgates

  explicit SequenceLayout(const Params& params)
      : p(params),
        T_(p.size.T),
        N(p.size.N),
        I(p.size.I),
        H(p.size.H),
        P(p.size.P),
        projected(p.w_hr != nullptr),
        ld_h(padded(H)),
        ld_p(padded(P)),
        gate_row(ld_h * kSlots),
        unit_vectors(ld_h / kLanes),
        gate_panels(panels_of(unit_vectors, kPanelUnits)),
        gate_columns(ld_h * kGates) {}

  // ---- where things are ----

  // Offset of vector v of units inside a row of `slots` slots, at slot s.
  static int64_t unit_offset(int64_t v, int slots, int s) {
    const int64_t unit = v * kLanes;
    return unit / kUnits * slots * kUnits + s * kUnits + unit % kUnits;
  }
  // Into how many panels of at most `most` vectors so many are split: as few as can be, but where threads share the
  // panels as many for each. The split is even, because narrow panels make slow tiles.
  int64_t panels_of(int64_t vectors, int64_t most) const {
    const int64_t least = ceil_div(vectors, most), threads = p.plan.threads;
    return p.plan.schedule == Schedule::kUnits ? min(vectors, ceil_div(least, threads) * threads) : least;
  }
  // First vector of units of a panel of gates; that of panel gate_panels is the end.
  int64_t first_unit(int64_t panel) const { return unit_vectors * panel / gate_panels; }
  int panel_vectors(int64_t panel, int gates = kGates) const {
    return kGates == 1 ? static_cast<int>(first_unit(panel + 1) - first_unit(panel)) : gates;
  }
  int64_t panel_offset(int64_t panel, int slots, int s) const { return unit_offset(first_unit(panel), slots, s); }
  // Row of W_ih or W_hh that lane 0 of vector q of a panel comes from, and how many lanes have one.
  int64_t weight_row(const int* gate_of, int64_t panel, int q) const {
    return kGates == 1 ? (first_unit(panel) + q) * kLanes : gate_of[q] * H + panel * kLanes;
  }
  int64_t weight_lanes(int64_t panel, int q) const {
    const int64_t unit = (first_unit(panel) + (kGates == 1 ? q : 0)) * kLanes;
    return max(0, min(kLanes, H - unit));
  }

  int64_t position(int64_t j) const { return p.order ? p.order[j] : j; }
  template <typename U>
  U* outside(const Rows<U>& rows, int64_t t, int64_t j) const {
    if (p.is_packed) return rows.data + (p.first_row[t] + j) * rows.row;
    return rows.data + t * rows.step + position(j) * rows.row;
  }
  int64_t row(int64_t t, int64_t j) const { return p.first_row[t] - p.first_row[0] + j; }
  int64_t time(int64_t s) const { return p.reverse ? T_ - 1 - s : s; }
  // The state before step t is zero by a reset: a boundary between two steps of the sequence, or before its first.
  bool is_reset(int64_t t, int64_t j) const {
    if (!p.resets) return false;
    const int64_t boundary = p.reverse ? t + 1 : t;
    return boundary < T_ + p.has_step_after && j < p.active[boundary] && p.resets[boundary * N + position(j)];
  }

  // body(panel, next) for panels [begin, end), up in one step and down in the next: of weights that are larger than a
  // cache it has those that were read last.
  template <typename F>
  void to_and_fro(int64_t step, int64_t begin, int64_t end, F body) const {
    const bool down = p.turned != (step % 2 == 1);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = down ? begin + end - 1 - i : i;
      body(panel, i + 1 == end ? panel : down ? panel - 1 : panel + 1);
    }
  }

  template <typename F>
  void parallel(int64_t n, F body) const {
    if (p.plan.threads == 1 || n <= 1) {
      if (n > 0) body(0, n);
      return;
    }
    p.parallel_for(n, p.plan.threads, &body,
                   [](void* f, int64_t begin, int64_t end) { (*static_cast<F*>(f))(begin, end); });
  }

  // The batch split so that each thread has about the same number of rows: body(j0, j1) on each.
  template <typename F>
  void parallel_batch(F body) const {
    const int64_t parts = p.plan.schedule == Schedule::kBatch ? min(p.plan.threads, N) : 1;
    int64_t bound[kMaxParts + 1];
    bound[0] = 0;
    int64_t length = T_, rows = 0, part = 1;
    for (int64_t j = 0; j < N && part < parts; ++j) {
      while (length > 0 && p.active[length - 1] <= j) --length;
      rows += length;
      while (part < parts && rows * parts >= p.size.R * part) bound[part++] = j + 1;
    }
    while (part <= parts) bound[part++] = N;
    parallel(parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (bound[i] < bound[i + 1]) body(bound[i], bound[i + 1]);
    });
  }
  static constexpr int kMaxParts = 256;

  // ---- weights ----

  static int64_t words(int64_t K) { return ceil_div(K, kPerWord<E>); }

  // Panels of W^T for products whose columns are gates, `gates` of them from gate_of's first on: [gate_panels][words of
  // K][panel vectors][kLanes].
  int64_t gate_panel_size(int64_t K, int gates = kGates) const { return words(K) * gates * kPanelUnits * kLanes; }
  void pack_gates(const E* w, int64_t K, const int* gate_of, W* panels, int gates = kGates) const {
    parallel(gate_panels, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int nr = panel_vectors(panel, gates);
        for (int q = 0; q < nr; ++q) {
          const E* rows[kLanes] = {};
          const int64_t lanes = weight_lanes(panel, q);
          for (int64_t i = 0; i < lanes; ++i) rows[i] = w + (weight_row(gate_of, panel, q) + i) * K;
          pack_columns(rows, lanes, K, panels + panel * gate_panel_size(K, gates) + q * kLanes, nr * kLanes);
        }
      }
    });
  }

  // Panels for products with `columns` plain columns: [panels][words of K][vectors][kLanes], at most kMaxPanel vectors.
  int64_t column_panels(int64_t columns) const { return panels_of(ceil_div(columns, kLanes), kMaxPanel); }
  // First column of a panel; that of panel column_panels is the padded end.
  int64_t first_column(int64_t columns, int64_t panel) const {
    const int64_t vectors = ceil_div(columns, kLanes), panels = column_panels(columns);
    return panels == 0 ? 0 : vectors * panel / panels * kLanes;
  }
  int column_vectors(int64_t columns, int64_t panel) const {
    return static_cast<int>((first_column(columns, panel + 1) - first_column(columns, panel)) / kLanes);
  }
  static int64_t column_panel_size(int64_t K) { return words(K) * kMaxPanel * kLanes; }

  // W [P, H] of the projection for h = W h_raw: columns are the rows of W.
  void pack_projection(const E* w, W* panels) const {
    for (int64_t panel = 0; panel < column_panels(P); ++panel) {
      const int nr = column_vectors(P, panel);
      for (int q = 0; q < nr; ++q) {
        const int64_t first = first_column(P, panel) + q * kLanes;
        const E* rows[kLanes] = {};
        const int64_t lanes = min(kLanes, P - first);
        for (int64_t i = 0; i < lanes; ++i) rows[i] = w + (first + i) * H;
        pack_columns(rows, lanes, H, panels + panel * column_panel_size(H) + q * kLanes, nr * kLanes);
      }
    }
  }

  // Words of K of a panel: value(i, q) is vector q of the i-th row of B that they hold.
  template <typename F>
  static void put_words(int nr, W* dst, F value) {
    for (int q = 0; q < nr; ++q) store(dst + q * kLanes, join<E>([&](int i) { return value(i, q); }));
  }
  // Those of a column panel that begins at column `first`, from rows k, k + 1 and so on of a matrix of `count` rows and
  // `columns` columns; zeros past both.
  static void pack_words(const E* matrix, int64_t k, int64_t count, int64_t columns, int64_t first, int nr, W* dst) {
    put_words(nr, dst, [&](int i, int q) {
      const int64_t column = first + q * kLanes;
      return k + i < count && column < columns ? load_units(matrix + (k + i) * columns, column, columns) : V{};
    });
  }

  // Panels of W [G*H, columns] for d = dgates W: K runs over the padded units of each block, gate by gate.
  int64_t backward_panels_size(int64_t columns, int gates = kGates) const {
    return p.plan.packed ? column_panels(columns) * column_panel_size(ld_h * gates) : 0;
  }
  void pack_backward(const E* w, int64_t columns, const int* gate_of, W* panels, int gates = kGates) const {
    if (!p.plan.packed) return;
    parallel(column_panels(columns), [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int nr = column_vectors(columns, panel);
        const int64_t first = first_column(columns, panel);
        W* dst = panels + panel * column_panel_size(ld_h * gates);
        for (int64_t block = 0; block < ld_h; block += kUnits)
          for (int q = 0; q < gates; ++q)
            for (int64_t unit = block; unit < block + kUnits; unit += kPerWord<E>, dst += nr * kLanes)
              pack_words(w + gate_of[q] * H * columns, unit, H, columns, first, nr, dst);
      }
    });
  }

  // Both biases in the layout of a row of gates; where a slot meets both products it gets their sum. A cell with norms
  // adds them later.
  void pack_bias(T* bias) const {
    zero(bias, gate_row);
    if (!p.b_ih || Cell::kNorms > 0) return;
    for (int q = 0; q < kGates; ++q)
      for (int64_t u = 0; u < H; ++u) {
        const int64_t at = u / kUnits * kSlots * kUnits + u % kUnits;
        bias[at + (Cell::kInput + q) * kUnits] += widen(p.b_ih[Cell::kInputGates[q] * H + u]);
        bias[at + (Cell::kRecurrent + q) * kUnits] += widen(p.b_hh[Cell::kRecurrentGates[q] * H + u]);
      }
  }

  // ---- products over gathered rows ----

  // gates += A W^T for one panel of gates, from packed panels or from W itself. `next` is the panel that comes next.
  // `gates` gates from gate_of's first on.
  template <typename After>
  void gate_product(int64_t rows, int64_t K, const E* w, const W* panels, const int* gate_of, int first_slot,
                    int64_t panel, int64_t next, RowOperands<E> io, After after, int gates = kGates) const {
    const int nr = panel_vectors(panel, gates);
    io.offset = panel_offset(panel, kSlots, first_slot);
    io.stride = kPanelStride;
    if (p.plan.packed) {
      const int64_t size = gate_panel_size(K, gates);
      panel_product<E>(rows, nr, Inner{1, words(K), 0}, panels + panel * size, io, after, panels + next * size);
      return;
    }
    for (int q = 0; q < nr; ++q) {
      dot_product(rows, K, w + weight_row(gate_of, panel, q) * K, K, weight_lanes(panel, q), io);
      io.offset += io.stride;
    }
    after(0, rows);
  }

  // C = C_in + A B for one column panel; product(rows, io) computes whole vectors. `columns` of C exist, its rows are
  // padded where `is_padded`; else the last, partial panel (never with C_in) goes through the stack.
  template <typename Product>
  void column_panel(int64_t rows, int64_t columns, int64_t panel, bool is_padded, RowOperands<E> io,
                    Product product) const {
    const int64_t first = first_column(columns, panel);
    io.stride = kLanes;
    io.offset = first;
    if (is_padded || first + column_vectors(columns, panel) * kLanes <= columns) {
      product(rows, io);
      return;
    }
    constexpr int64_t kMost = 8;
    T buffer[kMost][kMaxPanel * kLanes];
    T* out[kMost];
    for (int64_t i = 0; i < kMost; ++i) out[i] = buffer[i];
    for (int64_t r = 0; r < rows; r += kMost) {
      const int64_t n = min(kMost, rows - r);
      product(n, RowOperands<E>{io.a + r, nullptr, out, 0, kLanes});
      for (int64_t i = 0; i < n; ++i) copy(io.c_out[r + i] + first, buffer[i], columns - first);
    }
  }
  static void nothing(int64_t, int64_t) {}

  // C = A B over panels [panel0, panel1) of packed plain columns, rows of C padded.
  void packed_product(int64_t rows, int64_t K, const W* panels, int64_t columns, int64_t panel0, int64_t panel1,
                      const RowOperands<E>& io) const {
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      const int nr = column_vectors(columns, panel);
      column_panel(rows, columns, panel, true, io, [&](int64_t n, const RowOperands<E>& part) {
        panel_product<E>(n, nr, Inner{1, words(K), 0}, panels + panel * column_panel_size(K), part, nothing);
      });
    }
  }

  // C = C_in + dgates W over panels [panel0, panel1) of W's columns, in the order of a step, and `gates` gates from
  // gate_of's first on; rows of A start at their first slot. Without packing c_in must be c_out or null.
  void gradient_product(int64_t step, int64_t rows, const E* w, const W* panels, const int* gate_of, int64_t columns,
                        int64_t panel0, int64_t panel1, bool is_padded, const RowOperands<E>& io,
                        int gates = kGates) const {
    if (!p.plan.packed) {
      gradient_in_place(rows, w, gate_of, columns, first_column(columns, panel0),
                        min(first_column(columns, panel1), columns), io, gates);
      return;
    }
    to_and_fro(step, panel0, panel1, [&](int64_t panel, int64_t next) {
      const int nr = column_vectors(columns, panel);
      const Inner inner = gates == kSlots ? Inner{1, words(ld_h * gates), 0}
                                          : Inner{ld_h / kUnits, words(gates * kUnits), words(kSlots * kUnits)};
      column_panel(rows, columns, panel, is_padded, io, [&](int64_t n, const RowOperands<E>& part) {
        const int64_t size = column_panel_size(ld_h * gates);
        panel_product<E>(n, nr, inner, panels + panel * size, part, nothing, panels + next * size);
      });
    });
  }

  // The same for columns [first, end), W read once and in order: four of its rows at a time are added to each row of C.
  void gradient_in_place(int64_t rows, const E* w, const int* gate_of, int64_t columns, int64_t first, int64_t end,
                         const RowOperands<E>& io, int gates) const {
    for (int64_t m = 0; m < rows && !io.c_in; ++m) zero(io.c_out[m] + first, end - first);
    for (int q = 0; q < gates; ++q)
      for (int64_t u = 0; u < H; u += 4) {
        const E* b = w + (gate_of[q] * H + u) * columns;
        const int64_t n = min(4, H - u);
        for (int64_t m = 0; m < rows; ++m) {
          T a[4] = {};
          for (int64_t k = 0; k < n; ++k)
            a[k] = widen(io.a[m][u / kUnits * kSlots * kUnits + q * kUnits + u % kUnits + k]);
          T* c = io.c_out[m];
          int64_t i = first;
          for (; n == 4 && i + kLanes <= end; i += kLanes)
            store(c + i, load(c + i) + ((a[0] * load(b + i) + a[1] * load(b + columns + i)) +
                                        (a[2] * load(b + 2 * columns + i) + a[3] * load(b + 3 * columns + i))));
          for (; i < end; ++i) {
            T sum = 0;
            for (int64_t k = 0; k < n; ++k) sum += a[k] * widen(b[k * columns + i]);
            c[i] += sum;
          }
        }
      }
  }

  // ---- state ----

  // Where the vectors of weights by unit come from: f(k, from) for vector k and each [H] that adds to it, of w_ch,
  // w_ln, b_ih and b_hh or what lies as they do. Both biases feed the slot where the products meet.
  template <typename U, typename F>
  void each_vector(U* w_ch, U* w_ln, U* b_ih, U* b_hh, F f) const {
    for (int k = 0; k < Cell::kPeepholes && w_ch; ++k) f(k, w_ch + k * H);
    if constexpr (Cell::kNorms > 0) {
      for (int q = 0; q < kGates; ++q) {
        if (w_ln) f(q, w_ln + Cell::kInputGates[q] * H), f(kGates + q, w_ln + (kGates + Cell::kRecurrentGates[q]) * H);
        if (b_ih) f(Cell::kMeetInput + q, b_ih + Cell::kInputGates[q] * H);
        if (b_hh) f(Cell::kMeetRecurrent + q, b_hh + Cell::kRecurrentGates[q] * H);
      }
      for (int k = Cell::kC; k < Cell::kGains && w_ln; ++k) f(k, w_ln + (2 * kGates + k - Cell::kC) * H);
    }
  }
  // Padded: [kVectors, ld_h].
  void pack_vectors(T* to) const {
    zero(to, kVectors * ld_h);
    each_vector(p.w_ch, p.w_ln, p.b_ih, p.b_hh, [&](int k, const E* from) {
      for (int64_t u = 0; u < H; ++u) to[k * ld_h + u] += widen(from[u]);
    });
  }
  // Those of the vector of units at u.
  void load_vectors(const T* vectors, int64_t u, V (&w)[kVectors + 1]) const {
    for (int k = 0; k < kVectors; ++k) w[k] = load(vectors + k * ld_h + u);
  }

  // A vector of units at u of a row that ends after `units`.
  template <typename U>
  static V load_units(const U* row, int64_t u, int64_t units) {
    if (u + kLanes <= units) return load(row + u);
    U lane[kLanes] = {};
    for (int64_t i = 0; i < units - u; ++i) lane[i] = row[u + i];
    return load(lane);
  }
  template <typename U>
  static void store_units(U* row, int64_t u, int64_t units, V x) {
    if (u + kLanes <= units) return store(row + u, x);
    U lane[kLanes];
    store(lane, x);
    for (int64_t i = 0; i < units - u; ++i) row[u + i] = lane[i];
  }

  // What a product is taken of: the narrow copy where there is one.
  static const E* operand([[maybe_unused]] const T* wide, [[maybe_unused]] const E* narrow) {
    if constexpr (kNarrows)
      return narrow;
    else
      return wide;
  }

  // narrow_h: the copy of h where kNarrows, or null.
  void apply_resets(T* h, T* c, [[maybe_unused]] E* narrow_h, int64_t t, int64_t j0, int64_t j1) const {
    if (!p.resets) return;
    for (int64_t j = j0; j < min(j1, p.active[t]); ++j)
      if (is_reset(t, j)) {
        zero(h + j * ld_p, ld_p);
        if (kNarrows && narrow_h) zero(narrow_h + j * ld_p, ld_p);
        if (Cell::kHasCell) zero(c + j * ld_h, ld_h);
      }
  }

  // [N, units] outside to padded rows in the driver's order; null is zero.
  void load_state(const E* from, int64_t units, T* to, int64_t j0, int64_t j1) const {
    const int64_t ld = padded(units);
    for (int64_t j = j0; j < j1; ++j) {
      if (from) convert(to + j * ld, from + position(j) * units, units);
      zero(to + j * ld + (from ? units : 0), ld - (from ? units : 0));
    }
  }
  void store_state(const T* from, int64_t units, E* to, int64_t j0, int64_t j1) const {
    if (to)
      for (int64_t j = j0; j < j1; ++j) convert(to + position(j) * units, from + j * padded(units), units);
  }
};

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
