// Products of the CPU driver: a register tile over packed panels, and dot products with weights read in place.
// Every product of the package, forward and backward, is one of these. Contract: `tile` is C = C_in + A B, both ends
// given row by row; nothing here allocates.
//
// A panel is a slice of B that is NR vectors wide: [K][NR][kLanes], zero-padded, so that the tile reads it in order.
#pragma once

#include "../math.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename T>
struct Unaligned {
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

template <typename T>
inline VectorOf<T> load(const T* p) {
  return *reinterpret_cast<const typename Unaligned<T>::Vector*>(p);
}

template <typename T>
inline void store(T* p, VectorOf<T> v) {
  *reinterpret_cast<typename Unaligned<T>::Vector*>(p) = v;
}

constexpr int kMaxPanel = 4;  // vectors

// Rows a tile of NR vectors may have: the accumulators, a row of B and one broadcast element must fit the registers.
constexpr int tile_rows(int nr) {
  constexpr int kLimit = 8;  // row pointers must fit the integer registers
  const int rows = (kVectorRegisters - 1 - nr) / nr;
  return rows < kLimit ? rows : kLimit;
}

// The K of a product. In a row of A: `count` runs of `length` consecutive elements, `stride` apart (a plain row is one
// run). In B: each k is `step` elements after the one before.
struct Inner {
  int64_t count, length, stride, step;
};

// The rows of A and C. Vector q of row m of C is read at c_in[m] + offset + q * stride (c_in null: zero) and written at
// c_out[m] + offset + q * stride; c_in may be c_out.
template <typename T>
struct RowOperands {
  const T* const* a;
  const T* const* c_in;
  T* const* c_out;
  int64_t offset, stride;
};

template <typename T, int M, int NR>
void tile(Inner inner, const T* b, const RowOperands<T>& io) {
  using V = VectorOf<T>;
  constexpr int kLanes = Lanes<T>::kCount;
  // Few accumulators: a second set hides the latency of the multiply-add.
  constexpr int kSets = M * NR <= 4 ? 2 : 1;
  V acc[kSets][M][NR] = {};
  const T* a[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) a[m] = io.a[m];
  for (int64_t run = 0; run < inner.count; ++run) {
    int64_t k = 0;
    for (; k + kSets <= inner.length; k += kSets) {
#pragma GCC unroll 2
      for (int s = 0; s < kSets; ++s) {
        V row[NR];
#pragma GCC unroll 4
        for (int q = 0; q < NR; ++q) row[q] = load(b + s * inner.step + q * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const V element = a[m][k + s] - V{};  // a broadcast: x - 0 is x, where 0 + x is not for -0
#pragma GCC unroll 4
          for (int q = 0; q < NR; ++q) acc[s][m][q] += element * row[q];
        }
      }
      b += kSets * inner.step;
    }
    if (kSets == 2 && k < inner.length) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int q = 0; q < NR; ++q) acc[0][m][q] += a[m][k] * load(b + q * kLanes);
      b += inner.step;
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) a[m] += inner.stride;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int q = 0; q < NR; ++q) {
      const int64_t at = io.offset + q * io.stride;
      V sum = kSets == 2 ? acc[0][m][q] + acc[kSets - 1][m][q] : acc[0][m][q];
      if (io.c_in) sum += load(io.c_in[m] + at);  // last: C may be a long running sum, whose rounding errors are larger
      store(io.c_out[m] + at, sum);
    }
}

template <typename T, int NR>
void tile_of_rows(int m, Inner inner, const T* b, const RowOperands<T>& io) {
  constexpr int kMost = tile_rows(NR);
  switch (m) {
    case 1:
      return tile<T, 1, NR>(inner, b, io);
    case 2:
      return tile<T, 2, NR>(inner, b, io);
    case 3:
      return tile<T, (kMost >= 3 ? 3 : 1), NR>(inner, b, io);
    case 4:
      return tile<T, (kMost >= 4 ? 4 : 1), NR>(inner, b, io);
    case 5:
      return tile<T, (kMost >= 5 ? 5 : 1), NR>(inner, b, io);
    case 6:
      return tile<T, (kMost >= 6 ? 6 : 1), NR>(inner, b, io);
    case 7:
      return tile<T, (kMost >= 7 ? 7 : 1), NR>(inner, b, io);
    case 8:
      return tile<T, (kMost >= 8 ? 8 : 1), NR>(inner, b, io);
  }
}

// C = C_in + A B for `rows` rows and one panel of nr vectors, then after(begin, end) on each block of rows just
// written. Row blocks are kept even: 8 rows are 4 + 4, not 6 + 2.
template <typename T, typename After>
inline void panel_product(int64_t rows, int nr, Inner inner, const T* b, const RowOperands<T>& io, After after) {
  if (rows == 0) return;
  const int64_t most = nr == 4 ? tile_rows(4) : nr == 3 ? tile_rows(3) : nr == 2 ? tile_rows(2) : tile_rows(1);
  const int64_t blocks = (rows + most - 1) / most;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = i * rows / blocks, end = (i + 1) * rows / blocks;
    const RowOperands<T> part{io.a + begin, io.c_in ? io.c_in + begin : nullptr, io.c_out + begin, io.offset,
                              io.stride};
    const int m = static_cast<int>(end - begin);
    switch (nr) {
      case 1:
        tile_of_rows<T, 1>(m, inner, b, part);
        break;
      case 2:
        tile_of_rows<T, 2>(m, inner, b, part);
        break;
      case 3:
        tile_of_rows<T, 3>(m, inner, b, part);
        break;
      case 4:
        tile_of_rows<T, 4>(m, inner, b, part);
        break;
    }
    after(begin, end);
  }
}

// Sum of the lanes, by halves.
template <typename T>
inline T horizontal_sum(VectorOf<T> v) {
  constexpr int kLanes = Lanes<T>::kCount;
  T lane[kLanes];
  store(lane, v);
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// The product with weights read in place: c_out[m][offset + i] = c_in[m][offset + i] + w[i] . a[m] for `lanes` rows of
// w, `ld` apart; the other lanes of the vector get c_in. Four rows of w stay in the cache while all rows of A pass.
template <typename T>
void dot_product(int64_t rows, int64_t K, const T* w, int64_t ld, int64_t lanes, const RowOperands<T>& io) {
  using V = VectorOf<T>;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  if (io.c_in != io.c_out)
    for (int64_t m = 0; m < rows; ++m) store(io.c_out[m] + io.offset, load(io.c_in[m] + io.offset));
  for (int64_t first = 0; first < lanes; first += 4) {
    const int64_t count = lanes - first < 4 ? lanes - first : 4;
    const T* r[4];
    for (int64_t i = 0; i < 4; ++i) r[i] = w + (first + (i < count ? i : 0)) * ld;
    for (int64_t m = 0; m < rows; ++m) {
      const T* a = io.a[m];
      V acc[2][4] = {};
      int64_t k = 0;
      for (; k + 2 * kLanes <= K; k += 2 * kLanes) {
#pragma GCC unroll 2
        for (int s = 0; s < 2; ++s) {
          const V element = load(a + k + s * kLanes);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) acc[s][i] += element * load(r[i] + k + s * kLanes);
        }
      }
      if (k + kLanes <= K) {
        const V element = load(a + k);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[0][i] += element * load(r[i] + k);
        k += kLanes;
      }
      for (int64_t i = 0; i < count; ++i) {
        T sum = horizontal_sum<T>(acc[0][i] + acc[1][i]);
        for (int64_t tail = k; tail < K; ++tail) sum += a[tail] * r[i][tail];
        io.c_out[m][io.offset + first + i] += sum;
      }
    }
  }
}

// Transposes a square of vectors: at each width, 2x2 blocks of that many lanes swap their off-diagonal.
#if defined(__GNUC__) && !defined(__clang__)
#define RNNFAST_SHUFFLED_TRANSPOSE (kVectorBytes == 64)
template <typename T, int kWidth>
inline void transpose_stage(VectorOf<T> (&r)[Lanes<T>::kCount]) {
  using Int = typename Format<VectorOf<T>>::Int;
  constexpr int kLanes = Lanes<T>::kCount;
  Int low{}, high{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool first = lane / kWidth % 2 == 0;
    low[lane] = first ? lane : kLanes + lane - kWidth;
    high[lane] = first ? lane + kWidth : kLanes + lane;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (i / kWidth % 2 == 0) {
      const VectorOf<T> a = r[i], b = r[i + kWidth];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + kWidth] = __builtin_shuffle(a, b, high);
    }
  if constexpr (kWidth > 1) transpose_stage<T, kWidth / 2>(r);
}
#else
#define RNNFAST_SHUFFLED_TRANSPOSE false
template <typename T, int kWidth>
inline void transpose_stage(VectorOf<T> (&)[Lanes<T>::kCount]) {}
#endif

// dst[k * stride + i] = rows[i][k] for i < n, k < K; n <= kLanes. Lanes past n get 0 where `pad`, else are left alone.
template <typename T>
void transpose_rows(const T* const* rows, int64_t n, int64_t K, T* dst, int64_t stride, bool pad) {
  constexpr int kLanes = Lanes<T>::kCount;
  int64_t k = 0;
  if (n == kLanes) {
    const T* r[kLanes];
    for (int i = 0; i < kLanes; ++i) r[i] = rows[i];
    if constexpr (RNNFAST_SHUFFLED_TRANSPOSE)
      while (k < K && K >= kLanes) {
        if (k > K - kLanes) k = K - kLanes;  // the last square overlaps the one before
        VectorOf<T> block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load(r[i] + k);
        transpose_stage<T, kLanes / 2>(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(dst + (k + i) * stride, block[i]);
        k += kLanes;
      }
    for (; k < K; ++k)
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) dst[k * stride + i] = r[i][k];
    return;
  }
  for (; k < K; ++k) {
    for (int64_t i = 0; i < n; ++i) dst[k * stride + i] = rows[i][k];
    if (pad)
      for (int64_t i = n; i < kLanes; ++i) dst[k * stride + i] = 0;
  }
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
