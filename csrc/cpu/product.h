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
// run). In B they follow each other.
struct Inner {
  int64_t count, length, stride;
};

// Memory to bring into the second-level cache while a tile runs: with every second k, `lines` lines that begin at
// `next` and lie `apart`; then `step` further. Distances in bytes. Weights larger than that cache would else be waited
// for by the first row block of a panel. More lines than needed would cost the tile a tenth of its time.
struct Prefetch {
  const char* next;
  int64_t step, apart, lines;
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

// Of a panel of kPanel vectors, the NR that begin at b.
template <typename T, int M, int NR, int kPanel>
void tile(Inner inner, const T* b, const RowOperands<T>& io, Prefetch ahead) {
  using V = VectorOf<T>;
  constexpr int kLanes = Lanes<T>::kCount;
  // Few accumulators: a second set hides the latency of the multiply-add.
  constexpr int kSets = M * NR <= 4 ? 2 : 1;
  constexpr bool kPrefetch = M * NR >= 12;  // smaller tiles have no load slots to spare
  V acc[kSets][M][NR] = {};
  const T* a[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) a[m] = io.a[m];
  if (kPrefetch && io.c_in)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int q = 0; q < NR; ++q) __builtin_prefetch(io.c_in[m] + io.offset + q * io.stride);
  const auto add = [&](int set, int64_t k, const T* from) {
    V row[NR];
#pragma GCC unroll 4
    for (int q = 0; q < NR; ++q) row[q] = load(from + q * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V element = a[m][k] - V{};  // a broadcast: x - 0 is x, where 0 + x is not for -0
#pragma GCC unroll 4
      for (int q = 0; q < NR; ++q) acc[set][m][q] += element * row[q];
    }
  };
  for (int64_t run = 0; run < inner.count; ++run) {
    int64_t k = 0;
    for (; k + 2 <= inner.length; k += 2) {
      add(0, k, b);
      add(kSets - 1, k + 1, b + kPanel * kLanes);
      b += 2 * kPanel * kLanes;
      if (kPrefetch) {
        if (ahead.lines > 0) __builtin_prefetch(ahead.next, 0, 2);
        for (int64_t i = 1; i < ahead.lines; ++i) __builtin_prefetch(ahead.next + i * ahead.apart, 0, 2);
        ahead.next += ahead.step;
      }
    }
    if (k < inner.length) {
      add(0, k, b);
      b += kPanel * kLanes;
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

template <typename T, int NR, int kPanel = NR>
void tile_of_rows(int m, Inner inner, const T* b, const RowOperands<T>& io, Prefetch ahead) {
  constexpr int kMost = tile_rows(NR);
  switch (m) {
    case 1:
      return tile<T, 1, NR, kPanel>(inner, b, io, ahead);
    case 2:
      return tile<T, 2, NR, kPanel>(inner, b, io, ahead);
    case 3:
      return tile<T, (kMost >= 3 ? 3 : 1), NR, kPanel>(inner, b, io, ahead);
    case 4:
      return tile<T, (kMost >= 4 ? 4 : 1), NR, kPanel>(inner, b, io, ahead);
    case 5:
      return tile<T, (kMost >= 5 ? 5 : 1), NR, kPanel>(inner, b, io, ahead);
    case 6:
      return tile<T, (kMost >= 6 ? 6 : 1), NR, kPanel>(inner, b, io, ahead);
    case 7:
      return tile<T, (kMost >= 7 ? 7 : 1), NR, kPanel>(inner, b, io, ahead);
    case 8:
      return tile<T, (kMost >= 8 ? 8 : 1), NR, kPanel>(inner, b, io, ahead);
  }
}

// C = C_in + A B for `rows` rows and one panel of nr vectors, as panel_product below but for one stretch of K.
template <typename T, typename After>
inline void panel_stretch(int64_t rows, int nr, Inner inner, const T* b, const RowOperands<T>& io, After after,
                          const T* next) {
  // Few rows would read the panel again and again: then its halves are taken one after the other.
  constexpr bool kHalves = tile_rows(4) < 4;
  const int64_t most = nr == 4   ? tile_rows(kHalves ? 2 : 4)
                       : nr == 3 ? tile_rows(3)
                       : nr == 2 ? tile_rows(2)
                                 : tile_rows(1);
  const int64_t blocks = (rows + most - 1) / most;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = i * rows / blocks, end = (i + 1) * rows / blocks;
    const RowOperands<T> part{io.a + begin, io.c_in ? io.c_in + begin : nullptr, io.c_out + begin, io.offset,
                              io.stride};
    const int m = static_cast<int>(end - begin);
    // Of the lines of each pair of k, block i takes line i, line i + blocks and so on. The second-level cache fetches
    // lines in pairs.
    constexpr int64_t kLine = 128;
    const int64_t bytes = 2 * nr * kVectorBytes, lines = next ? (bytes / kLine - i + blocks - 1) / blocks : 0;
    const Prefetch ahead{reinterpret_cast<const char*>(next ? next : b) + i * kLine, bytes, blocks * kLine, lines};
    switch (nr) {
      case 1:
        tile_of_rows<T, 1>(m, inner, b, part, ahead);
        break;
      case 2:
        tile_of_rows<T, 2>(m, inner, b, part, ahead);
        break;
      case 3:
        tile_of_rows<T, 3>(m, inner, b, part, ahead);
        break;
      case 4:
        if (kHalves && m > tile_rows(4)) {
          const RowOperands<T> other{part.a, part.c_in, part.c_out, part.offset + 2 * part.stride, part.stride};
          tile_of_rows<T, 2, 4>(m, inner, b, part, ahead);
          tile_of_rows<T, 2, 4>(m, inner, b + 2 * Lanes<T>::kCount, other, Prefetch{ahead.next, 0, 0, 0});
        } else {
          tile_of_rows<T, 4>(m, inner, b, part, ahead);
        }
        break;
    }
    after(begin, end);
  }
}

// C = C_in + A B for `rows` rows and one panel of nr vectors, then after(begin, end) on each block of rows just
// written. Row blocks are kept even: 8 rows are 4 + 4, not 6 + 2. `next`, if given, is the panel of the same size that
// the caller will want next; the row blocks share the fetching of its lines. A long K is taken in stretches, so that a
// stretch of the panel and the one fetched ahead stay in the second-level cache for all rows; at most kMostRows rows.
template <typename T, typename After>
inline void panel_product(int64_t rows, int nr, Inner inner, const T* b, RowOperands<T> io, After after,
                          const T* next = nullptr) {
  constexpr int64_t kStretch = 1024, kMostRows = 256;
  // whole runs, or a part of the only one
  const int64_t runs = inner.count == 1 ? 1 : kStretch / inner.length;
  const int64_t length = inner.count == 1 ? kStretch : inner.length;
  const T* a[kMostRows];
  if (rows == 0) return;
  if (inner.count > runs || inner.length > length) {
    for (int64_t i = 0; i < rows; ++i) a[i] = io.a[i];
    io.a = a;
  }
  while (inner.count > runs || inner.length > length) {
    const T* rest = b + runs * length * nr * Lanes<T>::kCount;
    panel_stretch(rows, nr, Inner{runs, length, inner.stride}, b, io, [](int64_t, int64_t) {}, rest);
    for (int64_t i = 0; i < rows; ++i) a[i] += inner.count == 1 ? length : runs * inner.stride;
    (inner.count == 1 ? inner.length : inner.count) -= inner.count == 1 ? length : runs;
    io.c_in = io.c_out;
    b = rest;
  }
  panel_stretch(rows, nr, inner, b, io, after, next);
}

// Squares of vectors, as many as each has lanes. With 64-byte vectors and a compiler that shuffles two of them by an
// index, in registers; else through memory, lane by lane.
#if defined(__GNUC__) && !defined(__clang__)
constexpr bool kShuffles = kVectorBytes == 64;

// The lanes of a and b that a 2x2 block exchange of kWidth lanes puts first, and those it puts second.
template <typename T, int kWidth>
inline void exchange(VectorOf<T>& a, VectorOf<T>& b) {
  using Int = typename Format<VectorOf<T>>::Int;
  constexpr int kLanes = Lanes<T>::kCount;
  Int low{}, high{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool first = lane / kWidth % 2 == 0;
    low[lane] = first ? lane : kLanes + lane - kWidth;
    high[lane] = first ? lane + kWidth : kLanes + lane;
  }
  const VectorOf<T> x = a, y = b;
  a = __builtin_shuffle(x, y, low);
  b = __builtin_shuffle(x, y, high);
}
#else
constexpr bool kShuffles = false;
template <typename T, int kWidth>
inline void exchange(VectorOf<T>&, VectorOf<T>&) {}
#endif

template <typename T, int kWidth = Lanes<T>::kCount / 2>
inline void transpose(VectorOf<T> (&r)[Lanes<T>::kCount]) {
#pragma GCC unroll 16
  for (int i = 0; i < Lanes<T>::kCount; ++i)
    if (i / kWidth % 2 == 0) exchange<T, kWidth>(r[i], r[i + kWidth]);
  if constexpr (kWidth > 1) transpose<T, kWidth / 2>(r);
}

// The vector whose lane i is the sum of the lanes of r[i]: each exchange halves what is left to add.
template <typename T, int kWidth = Lanes<T>::kCount / 2>
inline VectorOf<T> sum_lanes(VectorOf<T> (&r)[Lanes<T>::kCount]) {
  if constexpr (!kShuffles) {
    VectorOf<T> sums{};
    for (int i = 0; i < Lanes<T>::kCount; ++i)
      for (int lane = 0; lane < Lanes<T>::kCount; ++lane) sums[i] += r[i][lane];
    return sums;
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      exchange<T, kWidth>(r[i], r[i + kWidth]);
      r[i] += r[i + kWidth];
    }
    if constexpr (kWidth > 1) return sum_lanes<T, kWidth / 2>(r);
    return r[0];
  }
}

// The product with weights read in place, for one vector of C: lane i of it is c_in + w[i] . a[m] for `lanes` rows of
// w, `ld` apart; the other lanes get c_in. c_in is not null.
template <typename T>
void dot_product(int64_t rows, int64_t K, const T* w, int64_t ld, int64_t lanes, const RowOperands<T>& io) {
  using V = VectorOf<T>;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const T* r[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) r[i] = w + (i < lanes ? i : 0) * ld;
  for (int64_t m = 0; m < rows; ++m) {
    const T* a = io.a[m];
    V acc[kLanes] = {};
    int64_t k = 0;
    for (; k + kLanes <= K && lanes > 0; k += kLanes) {
      const V element = load(a + k);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) acc[i] += element * load(r[i] + k);
    }
    T sum[kLanes];
    store(sum, sum_lanes<T>(acc));
    T* c = io.c_out[m] + io.offset;
    store(c, load(io.c_in[m] + io.offset));
    for (int64_t i = 0; i < lanes; ++i) {
      for (int64_t tail = k; tail < K; ++tail) sum[i] += a[tail] * r[i][tail];
      c[i] += sum[i];
    }
  }
}

// dst[k * stride + i] = rows[i][k] for i < n, k < K; n <= kLanes. Lanes past n get 0 where `pad`, else are left alone.
template <typename T>
void transpose_rows(const T* const* rows, int64_t n, int64_t K, T* dst, int64_t stride, bool pad) {
  constexpr int kLanes = Lanes<T>::kCount;
  int64_t k = 0;
  if (n == kLanes) {
    const T* r[kLanes];
    for (int i = 0; i < kLanes; ++i) r[i] = rows[i];
    if constexpr (kShuffles)
      while (k < K && K >= kLanes) {
        if (k > K - kLanes) k = K - kLanes;  // the last square overlaps the one before
        VectorOf<T> block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load(r[i] + k);
        transpose<T>(block);
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
