// The resident and the streamed schedule (plan.h): one kernel through all steps, recurrent weights in the shared memory
// of a group of blocks, or arranged for them in global memory.
//
// A step, forward: when all of the group have published their h of the step before, the block's rows of W_hh times it
// go to `partial`, and each thread finishes its own (n, u) pairs, whose state it keeps in registers, and publishes
// their h. Backward is the same with the gates' gradients in the place of h and the columns of W_hh in the place of its
// rows. Between two steps nothing is on the way but that: what a step reads beside it is loaded, and what it leaves is
// stored, while others finish.
//
// What is published lies in global memory, [sequences, k] twice, used by turns: a block writes the one only after all
// have published the other, and so have read the first.
#pragma once

#include "plan.h"
#include "unit.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

// Where the blocks of a group meet.
template <typename E>
struct Meeting {
  unsigned* arrived;  // [groups][blocks]
  E* published;       // [2][groups, sequences, k]
  int64_t size;       // elements of one of the two
  int64_t zeros;      // of T: both of these, zero at first
  E* weights;         // of the streamed schedule: [blocks][rows, k]
};

template <typename T, typename E>
struct ResidentParams {
  SequenceParams<T, E> p;
  State<T, E> s;
  DevicePlan plan;
  ResidentMemory memory;
  int64_t step0, step1;  // steps of this launch, in the order of work
  int64_t first_group;   // of this launch
  Meeting<E> meeting;
};

// The numbers of barriers, for tests that leave one out.
enum Barrier { kStaged = 1, kMultiplied = 2, kPublished = 3 };

// D [rows, sequences] = A [rows, k] B [k, sequences] by the whole block, its sum over k in `splits` parts. A lies in
// shared memory where weight_place says, B is [sequences, k] in global memory, of which each warp loads what it needs.
// Tensor cores take kRowTiles tiles of rows together, so that B is loaded once for all of them.
template <typename E, bool kTensor, int kTiles, int kRowTiles>
struct BlockProduct {
  static constexpr int kSequences = kTiles * kTileColumns;
  static constexpr int kPer = 4 / static_cast<int>(sizeof(E));   // elements of a register
  static constexpr int kDepth = kTensor ? 16 * kPer : kPieces;   // terms that are loaded together: two tiles' k
  static constexpr int kAhead = kTiles * kRowTiles > 2 ? 2 : 4;  // such pieces on the way at once
  const DevicePlan& plan;
  const int rows;

  // Where element (row, k) of A lies. Tensor cores: [row tiles][pieces][two tiles][lane][4 registers], so that one load
  // of 16 bytes brings a lane all of a tile, and one load of B its part of both. Else [k][row].
  RNNFAST_FUNCTION int64_t weight_place(int row, int k) const {
    if constexpr (kTensor) {
      const int64_t piece = int64_t{row / kTileRows} * (plan.k / kDepth) + k / kDepth;
      const int lane = row % 8 * 4 + k % kDepth / (4 * kPer), part = k % (4 * kPer) / kPer;
      return (((piece * 2 + part / 2) * 32 + lane) * 4 + part % 2 * 2 + row % kTileRows / 8) * kPer + k % kPer;
    } else {
      return int64_t{k} * rows + row;
    }
  }

  RNNFAST_FUNCTION void run(const E* weights, const E* factor, float* partial, float* stage) const {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const int pieces = static_cast<int>(plan.k) / kDepth;
    const int parts = kTensor ? rows / (kTileRows * kRowTiles) : (rows + 31) / 32;
    for (int task = warp; task < parts * plan.splits; task += kResidentWarps) {
      const int part = task % parts, split = task / parts;
      const int begin = pieces * split / plan.splits, end = pieces * (split + 1) / plan.splits;
      float* out = partial + split * kSequences * ld();
      if constexpr (kTensor)
        multiply_tiles(weights, factor, out, part, begin, end, lane);
      else
        multiply_rows(weights, factor, out, stage + warp * kPieces * kSequences, part, begin, end, lane);
    }
  }

  RNNFAST_FUNCTION int ld() const { return static_cast<int>(ResidentMemory::partial_ld(rows)); }

  RNNFAST_FUNCTION void multiply_tiles(const E* weights, const E* factor, float* out, int part, int begin, int end,
                                       int lane) const {
    const int g = lane / 4, q = lane % 4, pieces = static_cast<int>(plan.k) / kDepth;
    const E* a = weights + (int64_t{part} * kRowTiles * pieces * 64 + lane) * 4 * kPer;
    const E* b = factor + g * plan.k + q * 4 * kPer;
    float d[kRowTiles][kTiles][4] = {};
    Piece next[kAhead][kTiles] = {};
    const auto load = [&](int k) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          if (k + i < end)
            next[i][j] =
                load_published(reinterpret_cast<const Piece*>(b + j * kTileColumns * plan.k + int64_t{k + i} * kDepth));
    };
    load(begin);
#pragma unroll 1
    for (int k = begin; k < end; k += kAhead) {
      Piece now[kAhead][kTiles];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
#pragma unroll
        for (int j = 0; j < kTiles; ++j) now[i][j] = next[i][j];
      if (k + kAhead < end) load(k + kAhead);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (k + i >= end) continue;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Piece left =
                *reinterpret_cast<const Piece*>(a + ((int64_t{r} * pieces + k + i) * 2 + half) * 128 * kPer);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
              const Piece& both = now[i][j];
              uint32_t right[2] = {half ? both.z : both.x, half ? both.w : both.y};
              if constexpr (sizeof(E) == 4)
                right[0] = float_to_tf32(bits_to_float(right[0])), right[1] = float_to_tf32(bits_to_float(right[1]));
              tile_product<E>(d[r][j], {left.x, left.y, left.z, left.w}, right);
            }
          }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          out[(j * kTileColumns + q * 2 + i % 2) * ld() + (part * kRowTiles + r) * kTileRows + g + i / 2 * 8] =
              d[r][j][i];
  }

  // A lane has a row; the factor's piece comes to all lanes by the warp's own shared memory, [sequences][kPieces].
  RNNFAST_FUNCTION void multiply_rows(const E* weights, const E* factor, float* out, float* stage, int part, int begin,
                                      int end, int lane) const {
    const int row = part * 32 + lane;
    float sum[kSequences] = {};
    E next[kSequences];
    const auto load = [&](int piece) {
#pragma unroll
      for (int n = 0; n < kSequences; ++n) next[n] = load_published(factor + n * plan.k + piece * kPieces + lane);
    };
    load(begin);
    for (int piece = begin; piece < end; ++piece) {
#pragma unroll
      for (int n = 0; n < kSequences; ++n) stage[n * kPieces + lane] = widen(next[n]);
      warp_barrier<kStaged>();
      if (piece + 1 < end) load(piece + 1);
      const E* w = weights + int64_t{piece} * kPieces * rows + row;
      for (int k = 0; row < rows && k < kPieces; k += 4) {
        float a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = widen(w[(k + i) * rows]);
#pragma unroll
        for (int n = 0; n < kSequences; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[n] += a[i] * stage[n * kPieces + k + i];
      }
      warp_barrier<kStaged>();
    }
    if (row >= rows) return;
#pragma unroll
    for (int n = 0; n < kSequences; ++n) out[n * ld() + row] = sum[n];
  }

  // Adds rows `row`, `row` + 16, ... of sequence n of the product.
  template <int kCount>
  RNNFAST_FUNCTION void add_to(float* to, const float* partial, int row, int n) const {
#pragma unroll
    for (int split = 0; split < kResidentWarps; ++split)
      if (split < plan.splits)
#pragma unroll
        for (int q = 0; q < kCount; ++q) to[q] += partial[(split * kSequences + n) * ld() + row + q * kTileRows];
  }
};

// A weight as its product takes it.
template <bool kTensor>
RNNFAST_FUNCTION float as_factor(float x) {
  return kTensor ? bits_to_float(float_to_tf32(x)) : x;
}
template <bool kTensor, typename E>
RNNFAST_FUNCTION E as_factor(E x) {
  return x;
}

template <typename Cell, typename E, bool kPlain, bool kTensor, int kTiles>
struct Resident {
  using T = float;
  using Params = ResidentParams<T, E>;
  using U = Unit<Cell, T, E, kPlain>;
  static constexpr int kGates = Cell::kGates, kSlots = Cell::kSlots, kSequences = kTiles * kTileColumns;

  // One of the thread's own: unit u, the block's v-th, of sequence n, the group's i-th.
  struct Pair {
    bool exists;
    int i, v;
    int64_t n, u;
    T mask;
    typename U::Carried state;
  };

  const Params& k;
  const U unit;
  const int member, group;
  const int64_t n0, u0;
  float *partial, *bias, *stage;
  unsigned* arrived;

  RNNFAST_FUNCTION explicit Resident(const Params& params)
      : k(params),
        unit{params.p, params.s},
        member(static_cast<int>(block_index() % params.plan.blocks)),
        group(static_cast<int>(params.first_group + block_index() / params.plan.blocks)),
        n0(int64_t{group} * kSequences),
        u0(int64_t{member} * params.plan.units),
        partial(reinterpret_cast<float*>(shared_memory() + params.memory.partial)),
        bias(reinterpret_cast<float*>(shared_memory() + params.memory.bias)),
        stage(reinterpret_cast<float*>(shared_memory() + params.memory.piece)),
        arrived(params.meeting.arrived + int64_t{group} * params.plan.blocks) {}

  RNNFAST_FUNCTION void find_pairs(Pair (&pairs)[kPairs]) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int number = thread_index() + j * kResidentThreads;
      Pair& pair = pairs[j];
      pair.i = number / k.plan.units, pair.v = number % k.plan.units;
      pair.n = n0 + pair.i, pair.u = u0 + pair.v;
      pair.exists = pair.i < kSequences && pair.n < k.p.size.N && pair.u < k.p.size.H;
      pair.mask = pair.exists ? unit.mask(pair.n, pair.u) : T{};
      pair.state = {};
    }
  }

  RNNFAST_FUNCTION E* weights() const {
    if (k.plan.streamed) return k.meeting.weights + int64_t{member} * k.plan.rows * k.plan.k;
    return reinterpret_cast<E*>(shared_memory() + k.memory.weights);
  }
  template <typename Product>
  RNNFAST_FUNCTION void multiply(const Product& product, int64_t step) const {
    product.run(weights(), published(step, n0), partial, stage);
    block_barrier<kMultiplied>();
  }

  // weight(row, k) of the block to its place; zero past the end of either. kAlongRows: neighbours in memory are rows.
  // Several are on the way at once. Of the streamed schedule all groups write the same.
  template <bool kAlongRows, typename Product, typename F>
  RNNFAST_FUNCTION void store_weights(const Product& product, int terms, F weight) const {
    constexpr int kAtOnce = 8;
    E* to = weights();
    const int rows = product.rows, all = static_cast<int>(k.plan.k), count = rows * all;
    for (int first = thread_index(); first < count; first += kAtOnce * kResidentThreads) {
      E loaded[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * kResidentThreads;
        const int row = kAlongRows ? i % rows : i / all, term = kAlongRows ? i / rows : i % all;
        const E* w = i < count && term < terms ? weight(row, term) : nullptr;
        loaded[j] = w ? as_factor<kTensor>(*w) : narrow<E>(0.0f);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * kResidentThreads;
        if (i < count)
          to[kAlongRows ? product.weight_place(i % rows, i / rows) : product.weight_place(i / all, i % all)] =
              loaded[j];
      }
    }
  }

  // What is published after, or in backward before, so many steps.
  RNNFAST_FUNCTION E* published(int64_t steps, int64_t n) const {
    return k.meeting.published + steps % 2 * k.meeting.size + n * k.plan.k;
  }
  RNNFAST_FUNCTION void arrive(int64_t round) const {
    if (k.plan.blocks == 1)
      block_barrier<kPublished>();
    else
      group_arrive<kPublished>(k.plan.cluster, arrived + member, static_cast<unsigned>(round));
  }
  RNNFAST_FUNCTION void wait(int64_t round) const {
    if (k.plan.blocks > 1) group_wait<kPublished>(k.plan.cluster, arrived, k.plan.blocks, static_cast<unsigned>(round));
  }

  RNNFAST_FUNCTION int64_t time(int64_t step) const { return k.p.reverse ? k.p.size.T - 1 - step : step; }

  RNNFAST_FUNCTION void forward() const {
    const int64_t H = k.p.size.H;
    const BlockProduct<E, kTensor, kTiles, kGates> product{k.plan, k.plan.rows};
    // Rows are [units / 16][gate][16 units]: all gates of a unit in tiles of one shape.
    store_weights<false>(product, static_cast<int>(H), [&](int row, int term) -> const E* {
      const int64_t u = u0 + row / (kTileRows * kGates) * kTileRows + row % kTileRows;
      const int gate = row / kTileRows % kGates;
      return u < H ? k.p.w_hh + (unit.recurrent_gate(gate) * H + u) * H + term : nullptr;
    });
    for (int v = thread_index(); v < k.plan.units; v += kResidentThreads) {
      T slot[kSlots] = {};
      if (u0 + v < H) unit.add_bias(u0 + v, slot);
#pragma unroll
      for (int q = 0; q < kSlots; ++q) bias[q * k.plan.units + v] = slot[q];
    }

    Pair pairs[kPairs];
    typename U::Ahead ahead[kPairs];
    find_pairs(pairs);
    const auto publish = [&](int64_t steps) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        if (pairs[j].exists) published(steps, pairs[j].n)[pairs[j].u] = narrow<E>(pairs[j].mask * pairs[j].state.h);
    };
    const auto look_ahead = [&](int64_t step) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        if (pairs[j].exists) ahead[j] = unit.load_ahead(time(step), pairs[j].n, pairs[j].u);
    };
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      if (pairs[j].exists) {
        const int64_t i = pairs[j].n * H + pairs[j].u;
        pairs[j].state = {k.s.h[i], Cell::kHasCell ? k.s.c[i] : T{}};
      }
    publish(k.step0);
    arrive(1);
    look_ahead(k.step0);
    for (int64_t step = k.step0; step < k.step1; ++step) {
      const int64_t t = time(step), round = step - k.step0 + 1;
      wait(round);
      multiply(product, step);
      T slot[kPairs][kSlots];
      typename U::Carried made[kPairs];
      bool has_step[kPairs];
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        Pair& pair = pairs[j];
        has_step[j] = pair.exists && ahead[j].has_step;
        if (!has_step[j]) continue;
#pragma unroll
        for (int q = 0; q < kSlots; ++q) slot[j][q] = ahead[j].slot[q] + bias[q * k.plan.units + pair.v];
        product.template add_to<kGates>(slot[j] + Cell::kRecurrent, partial,
                                        pair.v / kTileRows * kGates * kTileRows + pair.v % kTileRows, pair.i);
        made[j] = unit.apply(t, pair.n, pair.u, slot[j], pair.state);
        pair.state = ahead[j].is_reset_after ? typename U::Carried{} : made[j];
      }
      publish(step + 1);
      if (step + 1 < k.step1) arrive(round + 1);
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        if (has_step[j]) unit.store(t, pairs[j].n, pairs[j].u, slot[j], made[j]);
      if (step + 1 < k.step1) look_ahead(step + 1);
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      if (pairs[j].exists) {  // for the next launch
        const int64_t i = pairs[j].n * H + pairs[j].u;
        k.s.h[i] = pairs[j].state.h;
        if (Cell::kHasCell) k.s.c[i] = pairs[j].state.c;
      }
  }

  RNNFAST_FUNCTION void backward() const {
    const int64_t H = k.p.size.H;
    const BlockProduct<E, kTensor, kTiles, 1> product{k.plan, k.plan.rows};
    store_weights<true>(product, static_cast<int>(kGates * H), [&](int row, int term) -> const E* {
      return u0 + row < H ? k.p.w_hh + term * H + u0 + row : nullptr;
    });

    Pair pairs[kPairs];
    typename U::AheadBackward ahead[kPairs];
    find_pairs(pairs);
    const auto look_ahead = [&](int64_t step) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        if (pairs[j].exists) ahead[j] = unit.load_ahead_backward(time(step), pairs[j].n, pairs[j].u);
    };
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      if (pairs[j].exists) {
        const int64_t i = pairs[j].n * H + pairs[j].u;
        pairs[j].state = {k.s.dh[i], Cell::kHasCell ? k.s.dc[i] : T{}};
      }
    look_ahead(k.step1 - 1);
    block_barrier<kPublished>();  // the weights
    for (int64_t step = k.step1 - 1;; --step) {
      if (step + 1 < k.step1) {  // what comes through the recurrent product of the step after
        wait(k.step1 - 1 - step);
        multiply(product, step + 1);
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
          if (pairs[j].exists) {
            T through[1] = {};
            product.template add_to<1>(through, partial, pairs[j].v, pairs[j].i);
            pairs[j].state.h += pairs[j].mask * through[0];
          }
      }
      if (step < k.step0) break;
      const int64_t t = time(step);
      T fed[kPairs];
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        Pair& pair = pairs[j];
        if (!pair.exists) continue;
        E* to = published(step, pair.n) + pair.u;
        if (ahead[j].has_step) {
          fed[j] = pair.mask * ahead[j].h_prev;
          unit.differentiate(t, pair.n, pair.u, ahead[j], pair.state);
        }
#pragma unroll
        for (int q = 0; q < kGates; ++q)
          to[unit.recurrent_gate(q) * H] = narrow<E>(ahead[j].has_step ? ahead[j].slot[Cell::kRecurrent + q] : T{});
      }
      if (step > k.step0 || k.p.dh0) arrive(k.step1 - step);
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        if (pairs[j].exists && ahead[j].has_step) {
          unit.store_fed(t, pairs[j].n, pairs[j].u, fed[j]);
#pragma unroll
          for (int q = 0; q < kGates; ++q) unit.set_gate(t, pairs[j].n, pairs[j].u, q, ahead[j].slot);
        }
      if (step > k.step0)
        look_ahead(step - 1);
      else if (!k.p.dh0)
        break;
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      if (pairs[j].exists) {  // for finish_backward
        const int64_t i = pairs[j].n * H + pairs[j].u;
        k.s.dh[i] = pairs[j].state.h;
        if (Cell::kHasCell) k.s.dc[i] = pairs[j].state.c;
      }
  }
};

template <typename Cell, typename E, bool kPlain, bool kTensor, int kTiles, bool kBackward>
#ifdef __CUDACC__
__launch_bounds__(kResidentThreads, 1)
#endif
    RNNFAST_KERNEL void resident_kernel(ResidentParams<float, E> k) {
  const Resident<Cell, E, kPlain, kTensor, kTiles> resident(k);
  if constexpr (kBackward)
    resident.backward();
  else
    resident.forward();
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
