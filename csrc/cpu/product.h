// Products of the CPU driver: a register tile over packed panels, and dot products with weights read in place.
// Every product of the package, forward and backward, is one of these. Contract: `tile` is C = C_in + A B, both ends
// given row by row; nothing here allocates.
//
// What is multiplied is of a type E, and K is counted in words: a word is one number of E, which then is the type of
// the sums too, or, of bfloat16, two neighbours in K, for processors that multiply such pairs and add them to a float.
//
// A panel is a slice of B that is NR vectors wide: [words of K][NR][kLanes], zero-padded, so that the tile reads it in
// order.
#pragma once

#include "../math.h"
#include "../sequence.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename T>
struct Unaligned {
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
};

template <typename T>
inline VectorOf<T> load(const T* p) {
  return *reinterpret_cast<const typename Unaligned<T>::Vector*>(p);
}

template <typename T>
inline void store(T* p, VectorOf<T> v) {
  *reinterpret_cast<typename Unaligned<T>::Vector*>(p) = v;
}

template <typename E>
struct Operand {
  using Word = E;
  using Sum = E;
};
template <>
struct Operand<BFloat16> {
  using Word = uint32_t;  // the first number in the lower half
  using Sum = float;
};
template <typename E>
using WordOf = typename Operand<E>::Word;
template <typename E>
using SumOf = typename Operand<E>::Sum;
template <typename E>
constexpr int64_t kPerWord = sizeof(WordOf<E>) / sizeof(E);

template <typename E>
inline const WordOf<E>* as_words(const E* row) {
  return reinterpret_cast<const WordOf<E>*>(row);
}
// One that need not be aligned: a row of bfloat16 begins anywhere.
template <typename W>
inline W load_word(const W* p) {
  W word;
  __builtin_memcpy(&word, p, sizeof(W));
  return word;
}

template <typename T>
inline T widen(T x) {
  return x;
}
template <typename E>
inline E narrow(SumOf<E> x) {
  return x;
}

#ifdef __AVX512BF16__
// In what these instructions read or round, subnormal numbers count as zero.
template <>
struct Lanes<BFloat16> : Lanes<float> {};

typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2)));

inline VectorOf<uint32_t> rounded_bits(VectorOf<float> x) {
  return __builtin_convertvector(reinterpret_cast<HalfVector>(_mm512_cvtneps_pbh(x)), VectorOf<uint32_t>);
}
inline VectorOf<uint32_t> pairs(VectorOf<float> first, VectorOf<float> second) {
  return rounded_bits(first) | rounded_bits(second) << 16;
}
inline void multiply_add_pairs(VectorOf<float>& sum, VectorOf<uint32_t> a, VectorOf<uint32_t> b) {
  sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
template <>
inline VectorOf<float> load(const BFloat16* p) {
  HalfVector bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return reinterpret_cast<VectorOf<float>>(__builtin_convertvector(bits, VectorOf<uint32_t>) << 16);
}
template <>
inline void store(BFloat16* p, VectorOf<float> x) {
  const __m256bh bits = _mm512_cvtneps_pbh(x);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  return {static_cast<uint16_t>(rounded_bits(x - VectorOf<float>{})[0])};
}
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
#endif

template <typename E>
inline void multiply_add(VectorOf<SumOf<E>>& sum, VectorOf<WordOf<E>> a, VectorOf<WordOf<E>> b) {
  if constexpr (kPerWord<E> == 1)
    sum += a * b;
  else
    multiply_add_pairs(sum, a, b);
}

// The words of numbers that are neighbours in K: value(i) is the vector of those that come i-th.
template <typename E, typename F>
inline VectorOf<WordOf<E>> join(F value) {
  if constexpr (kPerWord<E> == 1)
    return value(0);
  else
    return pairs(value(0), value(1));
}
// The other way.
template <typename E>
inline VectorOf<SumOf<E>> split(VectorOf<WordOf<E>> words, [[maybe_unused]] int64_t i) {
  if constexpr (kPerWord<E> == 1)
    return words;
  else
    return reinterpret_cast<VectorOf<float>>(i == 0 ? words << 16 : words & 0xffff0000u);
}

constexpr int kMaxPanel = 4;  // vectors

// Rows a tile of NR vectors may have: the accumulators, a row of B and one broadcast element must fit the registers.
constexpr int tile_rows(int nr) {
  constexpr int kLimit = 8;  // row pointers must fit the integer registers
  const int rows = (kVectorRegisters - 1 - nr) / nr;
  return rows < kLimit ? rows : kLimit;
}

// The K of a product, in words. In a row of A: `count` runs of `length` consecutive elements, `stride` apart (a plain
// row is one run). In B they follow each other.
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
template <typename E>
struct RowOperands {
  const E* const* a;
  const SumOf<E>* const* c_in;
  SumOf<E>* const* c_out;
  int64_t offset, stride;
};

// Of a panel of kPanel vectors, the NR that begin at b. The structs are given by reference: copied to the stack, by
// vectors, what was written there number by number a moment before is waited for until all earlier stores are done.
template <typename E, int M, int NR, int kPanel>
void tile(const Inner& inner, const WordOf<E>* b, const RowOperands<E>& io, const Prefetch& ahead) {
  using W = WordOf<E>;
  using V = VectorOf<SumOf<E>>;
  constexpr int kLanes = Lanes<W>::kCount;
  // Few accumulators: a second set hides the latency of the multiply-add.
  constexpr int kSets = M * NR <= 4 ? 2 : 1;
  constexpr bool kPrefetch = M * NR >= 12;  // smaller tiles have no load slots to spare
  V acc[kSets][M][NR] = {};
  const W* a[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) a[m] = as_words(io.a[m]);
  const char* next = ahead.next;
  const int64_t step = ahead.step, apart = ahead.apart, lines = ahead.lines, length = inner.length;
  if (kPrefetch && io.c_in)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int q = 0; q < NR; ++q) __builtin_prefetch(io.c_in[m] + io.offset + q * io.stride);
  const auto add = [&](int set, int64_t k, const W* from) {
    VectorOf<W> row[NR];
#pragma GCC unroll 4
    for (int q = 0; q < NR; ++q) row[q] = load(from + q * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      // a broadcast: x - 0 is x, where 0 + x is not for -0
      const VectorOf<W> element = load_word(a[m] + k) - VectorOf<W>{};
#pragma GCC unroll 4
      for (int q = 0; q < NR; ++q) multiply_add<E>(acc[set][m][q], element, row[q]);
    }
  };
  for (int64_t run = 0; run < inner.count; ++run) {
    int64_t k = 0;
    for (; k + 2 <= length; k += 2) {
      add(0, k, b);
      add(kSets - 1, k + 1, b + kPanel * kLanes);
      b += 2 * kPanel * kLanes;
      if (kPrefetch) {
        if (lines > 0) __builtin_prefetch(next, 0, 2);
        for (int64_t i = 1; i < lines; ++i) __builtin_prefetch(next + i * apart, 0, 2);
        next += step;
      }
    }
    if (k < length) {
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

template <typename E, int NR, int kPanel = NR>
void tile_of_rows(int m, const Inner& inner, const WordOf<E>* b, const RowOperands<E>& io, const Prefetch& ahead) {
  constexpr int kMost = tile_rows(NR);
  switch (m) {
    case 1:
      return tile<E, 1, NR, kPanel>(inner, b, io, ahead);
    case 2:
      return tile<E, 2, NR, kPanel>(inner, b, io, ahead);
    case 3:
      return tile<E, (kMost >= 3 ? 3 : 1), NR, kPanel>(inner, b, io, ahead);
    case 4:
      return tile<E, (kMost >= 4 ? 4 : 1), NR, kPanel>(inner, b, io, ahead);
    case 5:
      return tile<E, (kMost >= 5 ? 5 : 1), NR, kPanel>(inner, b, io, ahead);
    case 6:
      return tile<E, (kMost >= 6 ? 6 : 1), NR, kPanel>(inner, b, io, ahead);
    case 7:
      return tile<E, (kMost >= 7 ? 7 : 1), NR, kPanel>(inner, b, io, ahead);
    case 8:
      return tile<E, (kMost >= 8 ? 8 : 1), NR, kPanel>(inner, b, io, ahead);
  }
}

// C = C_in + A B for `rows` rows and one panel of nr vectors, as panel_product below but for one stretch of K.
template <typename E, typename After>
inline void panel_stretch(int64_t rows, int nr, const Inner& inner, const WordOf<E>* b, const RowOperands<E>& io,
                          After after, const WordOf<E>* next) {
  // Few rows would read the panel again and again: then its halves are taken one after the other.
  constexpr bool kHalves = tile_rows(4) < 4;
  const int64_t most = nr == 4   ? tile_rows(kHalves ? 2 : 4)
                       : nr == 3 ? tile_rows(3)
                       : nr == 2 ? tile_rows(2)
                                 : tile_rows(1);
  const int64_t blocks = (rows + most - 1) / most;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = i * rows / blocks, end = (i + 1) * rows / blocks;
    const RowOperands<E> part{io.a + begin, io.c_in ? io.c_in + begin : nullptr, io.c_out + begin, io.offset,
                              io.stride};
    const int m = static_cast<int>(end - begin);
    // Of the lines of each pair of k, block i takes line i, line i + blocks and so on. The second-level cache fetches
    // lines in pairs.
    constexpr int64_t kLine = 128;
    const int64_t bytes = 2 * nr * kVectorBytes, lines = next ? (bytes / kLine - i + blocks - 1) / blocks : 0;
    const Prefetch ahead{reinterpret_cast<const char*>(next ? next : b) + i * kLine, bytes, blocks * kLine, lines};
    switch (nr) {
      case 1:
        tile_of_rows<E, 1>(m, inner, b, part, ahead);
        break;
      case 2:
        tile_of_rows<E, 2>(m, inner, b, part, ahead);
        break;
      case 3:
        tile_of_rows<E, 3>(m, inner, b, part, ahead);
        break;
      case 4:
        if (kHalves && m > tile_rows(4)) {
          const RowOperands<E> other{part.a, part.c_in, part.c_out, part.offset + 2 * part.stride, part.stride};
          tile_of_rows<E, 2, 4>(m, inner, b, part, ahead);
          tile_of_rows<E, 2, 4>(m, inner, b + 2 * Lanes<WordOf<E>>::kCount, other, Prefetch{ahead.next, 0, 0, 0});
        } else {
          tile_of_rows<E, 4>(m, inner, b, part, ahead);
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
template <typename E, typename After>
inline void panel_product(int64_t rows, int nr, Inner inner, const WordOf<E>* b, RowOperands<E> io, After after,
                          const WordOf<E>* next = nullptr) {
  constexpr int64_t kStretch = 1024, kMostRows = 256;
  // whole runs, or a part of the only one
  const int64_t runs = inner.count == 1 ? 1 : kStretch / inner.length;
  const int64_t length = inner.count == 1 ? kStretch : inner.length;
  const E* a[kMostRows];
  if (rows == 0) return;
  if (inner.count > runs || inner.length > length) {
    for (int64_t i = 0; i < rows; ++i) a[i] = io.a[i];
    io.a = a;
  }
  while (inner.count > runs || inner.length > length) {
    const WordOf<E>* rest = b + runs * length * nr * Lanes<WordOf<E>>::kCount;
    panel_stretch<E>(rows, nr, Inner{runs, length, inner.stride}, b, io, [](int64_t, int64_t) {}, rest);
    for (int64_t i = 0; i < rows; ++i) a[i] += (inner.count == 1 ? length : runs * inner.stride) * kPerWord<E>;
    (inner.count == 1 ? inner.length : inner.count) -= inner.count == 1 ? length : runs;
    io.c_in = io.c_out;
    b = rest;
  }
  panel_stretch<E>(rows, nr, inner, b, io, after, next);
}

// Squares of vectors, as many as each has lanes. With 64-byte vectors and a compiler that shuffles two of them by an
// index, in registers; else through memory, lane by lane.
#if defined(__GNUC__) && !defined(__clang__)
constexpr bool kShuffles = kVectorBytes == 64;

// The lanes of a and b that a 2x2 block exchange of kWidth lanes puts first, and those it puts second.
template <typename T, int kWidth>
inline void exchange(VectorOf<T>& a, VectorOf<T>& b) {
  using Int = decltype(VectorOf<T>{} < VectorOf<T>{});
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
// w, `ld` apart; the other lanes get c_in. Without lanes w may be past the end of its array. c_in is not null. K is
// counted in numbers.
template <typename E>
void dot_product(int64_t rows, int64_t K, const E* w, int64_t ld, int64_t lanes, const RowOperands<E>& io) {
  using T = SumOf<E>;
  constexpr int64_t kLanes = Lanes<T>::kCount, kNumbers = kLanes * kPerWord<E>;
  const E* r[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) r[i] = w + (i < lanes ? i : 0) * ld;
  for (int64_t m = 0; m < rows; ++m) {
    const E* a = io.a[m];
    VectorOf<T> acc[kLanes] = {};
    int64_t k = 0;
    for (; k + kNumbers <= K && lanes > 0; k += kNumbers) {
      const VectorOf<WordOf<E>> element = load(as_words(a + k));
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) multiply_add<E>(acc[i], element, load(as_words(r[i] + k)));
    }
    VectorOf<T> sums = sum_lanes<T>(acc);
    if (k < K || lanes < kLanes) {
      T sum[kLanes];
      store(sum, sums);
      for (int64_t i = 0; i < lanes; ++i)
        for (int64_t tail = k; tail < K; ++tail) sum[i] += widen(a[tail]) * widen(r[i][tail]);
      for (int64_t i = lanes; i < kLanes; ++i) sum[i] = 0;
      sums = load(sum);
    }
    store(io.c_out[m] + io.offset, load(io.c_in[m] + io.offset) + sums);
  }
}

// dst[k * stride + i] = rows[i][k] for i < n, k < K; n <= kLanes. Lanes past n get 0 where `pad`, else are left alone.
// Numbers change from type From to type To on the way.
template <typename From, typename To>
void transpose_rows(const From* const* rows, int64_t n, int64_t K, To* dst, int64_t stride, bool pad) {
  using T = SumOf<From>;
  constexpr int kLanes = Lanes<T>::kCount;
  const auto one = [](const From* p) { return narrow<To>(widen(load_word(p))); };
  int64_t k = 0;
  if (n == kLanes) {
    const From* r[kLanes];
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
      for (int i = 0; i < kLanes; ++i) dst[k * stride + i] = one(r[i] + k);
    return;
  }
  for (; k < K; ++k) {
    for (int64_t i = 0; i < n; ++i) dst[k * stride + i] = one(rows[i] + k);
    if (pad)
      for (int64_t i = n; i < kLanes; ++i) dst[k * stride + i] = narrow<To>(0);
  }
}

// A vector of columns of a panel, from n <= kLanes rows of W: word k of row i to dst[k * stride + i]; zeros past n, and
// past K in its last word.
template <typename E>
void pack_columns(const E* const* rows, int64_t n, int64_t K, WordOf<E>* dst, int64_t stride) {
  constexpr int64_t kLanes = Lanes<WordOf<E>>::kCount;
  const WordOf<E>* words[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) words[i] = as_words(rows[i]);
  transpose_rows(words, n, K / kPerWord<E>, dst, stride, true);
  if constexpr (kPerWord<E> > 1)
    for (int64_t i = 0; i < kLanes && K % kPerWord<E> > 0; ++i)
      dst[K / kPerWord<E> * stride + i] = i < n ? rows[i][K - 1].bits : 0;
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
