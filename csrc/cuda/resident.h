// The resident and the streamed schedule (plan.h): one kernel through all steps, recurrent weights in the shared memory
// of a group of blocks, or arranged for them in global memory.
//
// A step, forward: the block's rows of W_hh times the group's h of the step before go to `partial`, and each thread
// finishes its own (n, u) pairs, whose state it keeps in registers, and publishes their h. Backward is the same with
// the gates' gradients in the place of h and the columns of W_hh in the place of its rows. What a step reads beside
// that is loaded, and what it leaves is stored, while others finish.
//
// What is published lies in global memory, [sequences, k], and needs no flag: a place is empty until its number comes,
// and a warp loads what it needs until none of it is empty. (NCCL's low-latency protocols send flag and data together;
// here the data is its own flag.) There are four such arrays, used by turns. When a block has read the one of step s,
// all have written it, so all have read that of s - 1, which the block may empty where it wrote. The fence after that
// lets others see it before what the block publishes next, for s + 2, and so before they look there for s + 3.
#pragma once

#include "plan.h"
#include "unit.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

constexpr int kPublications = 4;

// Where the blocks of a group meet.
template <typename E>
struct Meeting {
  E* published;  // [kPublications][groups, sequences, k]
  int64_t size;  // elements of one of them
  E* weights;    // of the streamed schedule: [blocks][rows, k]
};

template <typename T, typename E>
struct ResidentParams {
  SequenceParams<T, E> p;
  State<T, E> s;
  DevicePlan plan;
  ResidentMemory memory;
  int64_t step0, step1;  // steps of this launch, in the order of work
  Meeting<E> meeting;
};

// The numbers of barriers, for tests that leave one out.
enum Barrier { kStaged = 1, kMultiplied = 2, kTaken = 3, kLoaded = 4 };

// A number as it is published: none has all bits ones, which some NaN have.
template <typename E>
struct Publication {
  using Bits = std::conditional_t<sizeof(E) == 2, uint16_t, uint32_t>;
  static constexpr Bits kEmpty = static_cast<Bits>(-1);

  RNNFAST_FUNCTION static Bits of(float x) {
    Bits bits;
    if constexpr (sizeof(E) == 2)
      bits = narrow<E>(x).bits;
    else
      bits = float_to_bits(x);
    return bits == kEmpty ? kEmpty >> 1 : bits;
  }
  // Whether none of the numbers in a register is missing: no half of 16 bits is all ones, or not all are.
  RNNFAST_FUNCTION static bool is_there(uint32_t x) {
    return sizeof(E) == 2 ? ((~x - 0x00010001u) & x & 0x80008000u) == 0 : x != kEmpty;
  }
  RNNFAST_FUNCTION static bool is_there(const Piece& x) {
    return is_there(x.x) && is_there(x.y) && is_there(x.z) && is_there(x.w);
  }
};

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
    const auto is_there = [&] {
      bool all = true;
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
#pragma unroll
        for (int j = 0; j < kTiles; ++j) all &= Publication<E>::is_there(next[i][j]);
      return all;
    };
    load(begin);
#pragma unroll 1
    for (int k = begin; k < end; k += kAhead) {
      while (!is_there()) look_again(), load(k);
      rejoin_warp();
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
    uint32_t next[kSequences];
    const auto load = [&](int piece) {
#pragma unroll
      for (int n = 0; n < kSequences; ++n)
        next[n] = load_published(reinterpret_cast<const uint32_t*>(factor + n * plan.k + piece * kPieces + lane));
    };
    const auto is_there = [&] {
      bool all = true;
#pragma unroll
      for (int n = 0; n < kSequences; ++n) all &= Publication<E>::is_there(next[n]);
      return all;
    };
    load(begin);
    for (int piece = begin; piece < end; ++piece) {
      while (!is_there()) look_again(), load(piece);
      rejoin_warp();
#pragma unroll
      for (int n = 0; n < kSequences; ++n) stage[n * kPieces + lane] = bits_to_float(next[n]);
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

template <typename E>
struct EmptyParams {
  E* published;
  int64_t count, rows, used_rows, k, terms;  // threads are [kPublications, rows, k]
};

// Before the first step: empty where a number will come, else zero.
template <typename E>
RNNFAST_KERNEL void empty_published(EmptyParams<E> p) {
  using Bits = typename Publication<E>::Bits;
  const int64_t i = global_thread();
  if (i >= p.count) return;
  const bool is_used = i % p.k < p.terms && i / p.k % p.rows < p.used_rows;
  reinterpret_cast<Bits*>(p.published)[i] = is_used ? Publication<E>::kEmpty : Bits{0};
}

template <typename Cell, typename E, bool kPlain, bool kTensor, int kTiles>
struct Resident {
  using T = float;
  using Params = ResidentParams<T, E>;
  using U = Unit<Cell, T, E, kPlain>;
  using Bits = typename Publication<E>::Bits;
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

  RNNFAST_FUNCTION explicit Resident(const Params& params)
      : k(params),
        unit{params.p, params.s},
        member(static_cast<int>(block_index() % params.plan.blocks)),
        group(static_cast<int>(block_index() / params.plan.blocks)),
        n0(int64_t{group} * kSequences),
        u0(int64_t{member} * params.plan.units),
        partial(reinterpret_cast<float*>(shared_memory() + params.memory.partial)),
        bias(reinterpret_cast<float*>(shared_memory() + params.memory.bias)),
        stage(reinterpret_cast<float*>(shared_memory() + params.memory.piece)) {}

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

  // Weights to their places: weight(row, term) is the address of one, valid for `real` numbers along a line and
  // `lines` lines; all past them are zero. Numbers that follow each other in memory are terms of a row, or with
  // kAlongRows rows of a term. Of the streamed schedule all groups write the same.
  template <bool kAlongRows, typename Product, typename F>
  RNNFAST_FUNCTION void store_weights(const Product& product, int real, int lines, F weight) const {
    constexpr int kLength = 16 / static_cast<int>(sizeof(E)), kAtOnce = 4;
    struct alignas(16) Stretch {
      E of[kLength];
    };
    const int length = (kAlongRows ? product.rows : static_cast<int>(k.plan.k)) / kLength;
    const int count = length * (kAlongRows ? static_cast<int>(k.plan.k) : product.rows);
    const bool is_aligned = k.p.size.H % kLength == 0 && reinterpret_cast<uintptr_t>(k.p.w_hh) % 16 == 0;
    E* to = weights();
    for (int first = thread_index(); first < count; first += kAtOnce * kResidentThreads) {
      Stretch loaded[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * kResidentThreads, line = i / length, begin = i % length * kLength;
        const auto address = [&](int place) { return kAlongRows ? weight(place, line) : weight(line, place); };
        loaded[j] = {};
        if (line >= lines || i >= count) continue;
        if (is_aligned && begin + kLength <= real)
          loaded[j] = *reinterpret_cast<const Stretch*>(address(begin));
        else
          for (int place = begin; place < real && place < begin + kLength; ++place)
            loaded[j].of[place - begin] = *address(place);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * kResidentThreads, line = i / length, begin = i % length * kLength;
        if (i >= count) continue;
#pragma unroll
        for (int e = 0; e < kLength; ++e)
          to[kAlongRows ? product.weight_place(begin + e, line) : product.weight_place(line, begin + e)] =
              as_factor<kTensor>(loaded[j].of[e]);
      }
    }
  }

  // Where the numbers of sequence n lie that the product of a step takes.
  RNNFAST_FUNCTION E* published(int64_t step, int64_t n) const {
    return k.meeting.published + (step + kPublications) % kPublications * k.meeting.size + n * k.plan.k;
  }
  RNNFAST_FUNCTION void publish(int64_t step, const Pair& pair, int64_t term, float x) const {
    store_published(reinterpret_cast<Bits*>(published(step, pair.n) + term), Publication<E>::of(x));
  }
  // Takes back what the thread published for a step that all have done with.
  template <int kCount, typename F>
  RNNFAST_FUNCTION void empty(int64_t step, const Pair (&pairs)[kPairs], F term) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      if (pairs[j].exists)
#pragma unroll
        for (int q = 0; q < kCount; ++q)
          store_published(reinterpret_cast<Bits*>(published(step, pairs[j].n) + term(pairs[j].u, q)),
                          Publication<E>::kEmpty);
    publication_fence();
  }

  RNNFAST_FUNCTION int64_t time(int64_t step) const { return k.p.reverse ? k.p.size.T - 1 - step : step; }

  RNNFAST_FUNCTION void forward() const {
    const int64_t H = k.p.size.H;
    const BlockProduct<E, kTensor, kTiles, kGates> product{k.plan, k.plan.rows};
    // Rows are [units / 16][gate][16 units]: all gates of a unit in tiles of one shape. Those past the end are never
    // looked at, so they may hold the last unit's.
    store_weights<false>(product, static_cast<int>(H), product.rows, [&](int row, int term) {
      const int64_t u = u0 + row / (kTileRows * kGates) * kTileRows + row % kTileRows;
      const int gate = row / kTileRows % kGates;
      return k.p.w_hh + (unit.recurrent_gate(gate) * H + (u < H ? u : H - 1)) * H + term;
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
    const auto publish_all = [&](int64_t step) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        if (pairs[j].exists) publish(step, pairs[j], pairs[j].u, pairs[j].mask * pairs[j].state.h);
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
    publish_all(k.step0);
    look_ahead(k.step0);
    block_barrier<kLoaded>();
    for (int64_t step = k.step0; step < k.step1; ++step) {
      const int64_t t = time(step);
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
      if (step + 1 < k.step1) {
        publish_all(step + 1);
        look_ahead(step + 1);
        empty<1>(step - 1, pairs, [](int64_t u, int) { return u; });
      }
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        if (has_step[j]) unit.store(t, pairs[j].n, pairs[j].u, slot[j], made[j]);
      block_barrier<kTaken>();  // the product, before the next is put there
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
    store_weights<true>(product, static_cast<int>(H - u0), static_cast<int>(kGates * H),
                        [&](int row, int term) { return k.p.w_hh + term * H + u0 + row; });

    Pair pairs[kPairs];
    typename U::AheadBackward ahead[kPairs] = {};
    find_pairs(pairs);
    const auto term_of = [&](int64_t u, int q) { return unit.recurrent_gate(q) * H + u; };
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
    const auto complete_all = [&] {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) U::complete(ahead[j]);
    };
    look_ahead(k.step1 - 1);
    complete_all();
    // The first product comes after a barrier in any case: the weights are there by then.
    for (int64_t step = k.step1 - 1;; --step) {
      if (step + 1 < k.step1) {  // what comes through the recurrent product of the step after
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
      const bool is_last = step == k.step0 && !k.p.dh0;
      T fed[kPairs];
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        Pair& pair = pairs[j];
        if (!pair.exists) continue;
        if (ahead[j].has_step) {
          fed[j] = pair.mask * ahead[j].h_prev;
          unit.differentiate(t, pair.n, pair.u, ahead[j], pair.state);
        }
        if (is_last) continue;
#pragma unroll
        for (int q = 0; q < kGates; ++q)
          publish(step, pair, term_of(pair.u, q), ahead[j].has_step ? ahead[j].slot[Cell::kRecurrent + q] : T{});
      }
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        if (pairs[j].exists && ahead[j].has_step) {
          unit.store_fed(t, pairs[j].n, pairs[j].u, fed[j]);
#pragma unroll
          for (int q = 0; q < kGates; ++q) unit.set_gate(t, pairs[j].n, pairs[j].u, q, ahead[j].slot);
        }
      if (is_last) break;
      if (step > k.step0) look_ahead(step - 1);
      empty<kGates>(step + 2, pairs, term_of);
      complete_all();
      block_barrier<kTaken>();
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
