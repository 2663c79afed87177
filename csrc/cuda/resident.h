// The resident schedule (plan.h): recurrent weights stay in the shared memory of a group of blocks through all steps.
//
// A step, forward: the group's h of the step before, [sequences, H], is staged to shared memory; the block's rows of
// W_hh times it go to `partial`; then each thread finishes its own (n, u) pairs and publishes their h. Backward is the
// same with the gates' gradients in the place of h and the columns of W_hh in the place of its rows. What is published
// lies in global memory, and the group's barrier makes it seen.
#pragma once

#include "plan.h"
#include "unit.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename T, typename E>
struct ResidentParams {
  SequenceParams<T, E> p;
  State<T, E> s;
  DevicePlan plan;
  ResidentMemory memory;
  int64_t step0, step1;    // steps of this launch, in the order of work
  int64_t first_sequence;  // of its first group
  unsigned* arrived;       // [groups], zero
};

// The numbers of barriers, for tests that leave one out.
enum Barrier { kStaged = 1, kMultiplied = 2, kPublished = 3 };

// D [rows, sequences] = A [rows, k] B [k, sequences] by the whole block, its sum over k in `splits` parts. A lies as
// the plan's product wants it (store_weights), B as rows of sequences.
template <typename E, bool kTensor, int kTiles>
struct BlockProduct {
  static constexpr int kSequences = kTiles * kTileColumns;
  static constexpr int kPer = 4 / static_cast<int>(sizeof(E));  // elements of a register
  static constexpr int kDepth = 8 * kPer;                       // k of one tile
  const DevicePlan& plan;
  const int rows;

  // Where element (row, k) of A lies. Tensor cores: as a lane's registers follow each other, [row tiles][k tiles][lane]
  // [4], so that one load of 16 bytes brings all. Else [k][row].
  RNNFAST_FUNCTION int64_t weight_place(int row, int64_t k) const {
    if constexpr (kTensor) {
      const int64_t tile = int64_t{row / kTileRows} * (plan.k / kDepth) + k / kDepth;
      const int lane = row % 8 * 4 + static_cast<int>(k % kDepth) / (2 * kPer);
      const int half = static_cast<int>(k % kDepth) / kPer % 2, upper = row % kTileRows / 8;
      return ((tile * 32 + lane) * 4 + half * 2 + upper) * kPer + k % kPer;
    } else {
      return k * rows + row;
    }
  }

  RNNFAST_FUNCTION void run(const E* weights, const E* staged, float* partial) const {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    if constexpr (kTensor) {
      const int row_tiles = rows / kTileRows, g = lane / 4, q = lane % 4;
      const int64_t k_tiles = plan.k / kDepth;
      for (int task = warp; task < row_tiles * plan.splits; task += kResidentWarps) {
        const int tile = task % row_tiles, split = task / row_tiles;
        const int64_t begin = k_tiles * split / plan.splits, end = k_tiles * (split + 1) / plan.splits;
        float d[kTiles][4] = {};
        const E* a = weights + (tile * k_tiles * 32 + lane) * 4 * kPer;
        const E* b = staged + g * plan.ld + q * 2 * kPer;
        for (int64_t k = begin; k < end; ++k) {
          uint32_t left[4], right[2];
          load_registers(a + k * 128 * kPer, left);
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            load_registers(b + j * kTileColumns * plan.ld + k * kDepth, right);
            tile_product<E>(d[j], left, right);
          }
        }
        float* out = partial + (split * rows + tile * kTileRows + g) * kSequences + q * 2;
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[i / 2 * 8 * kSequences + j * kTileColumns + i % 2] = d[j][i];
      }
    } else {
      const int row_parts = (rows + 31) / 32;
      for (int task = warp; task < row_parts * plan.splits; task += kResidentWarps) {
        const int row = task % row_parts * 32 + lane, split = task / row_parts;
        if (row >= rows) continue;
        const int64_t begin = plan.k / 4 * split / plan.splits * 4, end = plan.k / 4 * (split + 1) / plan.splits * 4;
        float sum[kSequences] = {};
        for (int64_t k = begin; k < end; k += 4) {
          float w[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) w[i] = widen(weights[(k + i) * rows + row]);
#pragma unroll
          for (int n = 0; n < kSequences; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[n] += w[i] * widen(staged[n * plan.ld + k + i]);
        }
#pragma unroll
        for (int n = 0; n < kSequences; ++n) partial[(split * rows + row) * kSequences + n] = sum[n];
      }
    }
  }

  template <int kCount>
  RNNFAST_FUNCTION static void load_registers(const E* from, uint32_t (&to)[kCount]) {
    struct alignas(kCount * 4) Registers {
      uint32_t one[kCount];
    };
    const Registers all = *reinterpret_cast<const Registers*>(from);
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = all.one[i];
  }

  RNNFAST_FUNCTION float sum(const float* partial, int row, int n) const {
    float total = 0;
    for (int split = 0; split < plan.splits; ++split) total += partial[(split * rows + row) * kSequences + n];
    return total;
  }
};

// A factor as its product takes it.
template <bool kTensor>
RNNFAST_FUNCTION float as_factor(float x) {
  return kTensor ? bits_to_float(float_to_tf32(x)) : x;
}
template <bool kTensor, typename E>
RNNFAST_FUNCTION E as_factor(E x) {
  return x;
}

template <typename Cell, typename E, bool kTensor, int kTiles>
struct Resident {
  using T = float;
  using Params = ResidentParams<T, E>;
  static constexpr int kGates = Cell::kGates, kSlots = Cell::kSlots, kSequences = kTiles * kTileColumns;

  const Params& k;
  const Unit<Cell, T, E> unit;
  const int member, group;
  const int64_t n0, u0;
  E *weights, *staged;
  float *partial, *pre;
  unsigned* arrived;

  RNNFAST_FUNCTION explicit Resident(const Params& params)
      : k(params),
        unit{params.p, params.s},
        member(static_cast<int>(block_index() % params.plan.blocks)),
        group(static_cast<int>(block_index() / params.plan.blocks)),
        n0(params.first_sequence + int64_t{group} * kSequences),
        u0(int64_t{member} * params.plan.units),
        weights(reinterpret_cast<E*>(shared_memory() + params.memory.weights)),
        staged(reinterpret_cast<E*>(shared_memory() + params.memory.staged)),
        partial(reinterpret_cast<float*>(shared_memory() + params.memory.partial)),
        pre(reinterpret_cast<float*>(shared_memory() + params.memory.pre)),
        arrived(params.arrived + group) {}

  // body(n, u, i, v) for the thread's own pairs: unit v of the block, sequence i of the group.
  template <typename F>
  RNNFAST_FUNCTION void each_pair(F body) const {
    for (int pair = thread_index(); pair < kSequences * k.plan.units; pair += kResidentThreads) {
      const int i = pair / k.plan.units, v = pair % k.plan.units;
      if (n0 + i < k.p.size.N && u0 + v < k.p.size.H) body(n0 + i, u0 + v, i, v);
    }
  }

  // weight(row, k) of the block to its place; zero past the end of either. kAlongRows: neighbours in memory are rows.
  template <bool kAlongRows, typename Product, typename F>
  RNNFAST_FUNCTION void store_weights(const Product& product, int64_t terms, F weight) const {
    const int rows = product.rows, all = static_cast<int>(k.plan.k), count = rows * all;
    for (int i = thread_index(); i < count; i += kResidentThreads) {
      const int row = kAlongRows ? i % rows : i / all, term = kAlongRows ? i / rows : i % all;
      const E* w = term < terms ? weight(row, term) : nullptr;
      weights[product.weight_place(row, term)] = w ? as_factor<kTensor>(*w) : narrow<E>(0.0f);
    }
  }
  // factor(n) of each sequence, [terms], to shared memory; null and all past the end are zero. A warp takes whole rows.
  template <typename F>
  RNNFAST_FUNCTION void stage(int64_t terms, F factor) const {
    constexpr int kPiece = 16 / static_cast<int>(sizeof(E));
    const int count = static_cast<int>(terms), all = static_cast<int>(k.plan.k), lane = thread_index() % 32;
    for (int i = thread_index() / 32; i < kSequences; i += kResidentWarps) {
      const E* from = n0 + i < k.p.size.N ? factor(n0 + i) : nullptr;
      E* to = staged + i * k.plan.ld;
      if (count % kPiece == 0) {  // rows begin at multiples of 16 bytes, as plan.k and plan.ld do
        for (int term = lane * kPiece; term < all; term += 32 * kPiece) {
          Piece piece{};
          if (from && term < count) piece = load_shared_by_blocks(reinterpret_cast<const Piece*>(from + term));
          if constexpr (kTensor && sizeof(E) == 4)
            piece = {float_to_tf32(bits_to_float(piece.x)), float_to_tf32(bits_to_float(piece.y)),
                     float_to_tf32(bits_to_float(piece.z)), float_to_tf32(bits_to_float(piece.w))};
          *reinterpret_cast<Piece*>(to + term) = piece;
        }
      } else {
        for (int term = lane; term < all; term += 32)
          to[term] = from && term < count ? as_factor<kTensor>(load_published(from + term)) : narrow<E>(0.0f);
      }
    }
  }
  RNNFAST_FUNCTION static E load_published(const E* from) {
    if constexpr (sizeof(E) == 2)
      return E{load_shared_by_blocks(&from->bits)};
    else
      return load_shared_by_blocks(from);
  }

  RNNFAST_FUNCTION void arrive() const {
    if (k.plan.blocks == 1)
      block_barrier<kPublished>();
    else
      group_arrive<kPublished>(k.plan.cluster, arrived);
  }
  RNNFAST_FUNCTION void wait(int64_t rounds) const {
    if (k.plan.blocks > 1)
      group_wait<kPublished>(k.plan.cluster, arrived, static_cast<unsigned>(rounds * k.plan.blocks));
  }

  RNNFAST_FUNCTION int64_t time(int64_t step) const { return k.p.reverse ? k.p.size.T - 1 - step : step; }

  RNNFAST_FUNCTION void forward() const {
    const int64_t H = k.p.size.H;
    const BlockProduct<E, kTensor, kTiles> product{k.plan, kGates * k.plan.units};
    // Rows are [units / 16][gate][16 units]: all gates of a unit in tiles of one shape.
    store_weights<false>(product, H, [&](int row, int64_t term) -> const E* {
      const int64_t u = u0 + row / (kTileRows * kGates) * kTileRows + row % kTileRows;
      const int gate = row / kTileRows % kGates;
      return u < H ? k.p.w_hh + (unit.recurrent_gate(gate) * H + u) * H + term : nullptr;
    });
    for (int64_t step = k.step0; step < k.step1; ++step) {
      const int64_t t = time(step);
      // While others finish: what does not depend on them.
      int own = 0;
      each_pair([&](int64_t n, int64_t u, int, int) {
        T slot[kSlots];
        if (unit.has_step(t, n)) {
          unit.input_slots(t, n, u, slot);
#pragma unroll
          for (int q = 0; q < kSlots; ++q) pre[(own * kSlots + q) * kResidentThreads + thread_index()] = slot[q];
        }
        ++own;
      });
      if (step > k.step0) wait(step - k.step0);
      const int buffer = static_cast<int>(step % 2);
      stage(H, [&](int64_t n) { return k.s.fed[buffer] + n * H; });
      block_barrier<kStaged>();
      product.run(weights, staged, partial);
      block_barrier<kMultiplied>();
      own = 0;
      each_pair([&](int64_t n, int64_t u, int i, int v) {
        if (unit.has_step(t, n)) {
          T slot[kSlots];
#pragma unroll
          for (int q = 0; q < kSlots; ++q) slot[q] = pre[(own * kSlots + q) * kResidentThreads + thread_index()];
#pragma unroll
          for (int q = 0; q < kGates; ++q)
            slot[Cell::kRecurrent + q] +=
                product.sum(partial, (v / kTileRows * kGates + q) * kTileRows + v % kTileRows, i);
          unit.forward(t, n, u, slot, 1 - buffer);
        } else {
          k.s.fed[1 - buffer][n * H + u] = k.s.fed[buffer][n * H + u];
        }
        ++own;
      });
      if (step + 1 < k.step1) arrive();
    }
  }

  RNNFAST_FUNCTION void backward() const {
    const int64_t H = k.p.size.H, width = kGates * H;
    const BlockProduct<E, kTensor, kTiles> product{k.plan, k.plan.units};
    store_weights<true>(product, width, [&](int row, int64_t term) -> const E* {
      return u0 + row < H ? k.p.w_hh + term * H + u0 + row : nullptr;
    });
    // dfed of the thread's own pairs from the gates' gradients at step t.
    const auto multiply = [&](int64_t t) {
      stage(width, [&](int64_t n) { return unit.has_step(t, n) ? k.s.dgates_hh + unit.row(t, n) * width : nullptr; });
      block_barrier<kStaged>();
      product.run(weights, staged, partial);
      block_barrier<kMultiplied>();
      each_pair([&](int64_t n, int64_t u, int i, int v) { k.s.dfed[n * H + u] = product.sum(partial, v, i); });
    };
    for (int64_t step = k.step1 - 1; step >= k.step0; --step) {
      if (step + 1 < k.step1) {
        wait(k.step1 - 1 - step);
        multiply(time(step + 1));
      }
      const int64_t t = time(step);
      each_pair([&](int64_t n, int64_t u, int, int) {
        if (unit.has_step(t, n))
          unit.backward(t, n, u);
        else
          unit.skip_backward(n, u);
      });
      if (step > k.step0 || k.p.dh0) arrive();
    }
    if (k.p.dh0) {
      wait(k.step1 - k.step0);
      multiply(time(k.step0));
    }
  }
};

template <typename Cell, typename E, bool kTensor, int kTiles, bool kBackward>
#ifdef __CUDACC__
__launch_bounds__(kResidentThreads, 1)
#endif
    RNNFAST_KERNEL void resident_kernel(ResidentParams<float, E> k) {
  const Resident<Cell, E, kTensor, kTiles> resident(k);
  if constexpr (kBackward)
    resident.backward();
  else
    resident.forward();
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
