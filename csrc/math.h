// The value types a cell can be written over, and sigmoid and tanh for them.
//
// A cell's formula is a template over V. On a GPU V is float or double (cuda/math.h). On the CPU V is a compiler vector
// of float or double (GCC / Clang vector extension, so arithmetic operators and `mask ? a : b` work lane by lane); its
// width belongs to the instruction set that includes this file. Nothing here touches memory. Derivatives are written
// from the function's value, in cells.h.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>

// What the functions of a cell need in front, and those below. As calls, the activations of a unit would not overlap,
// and each would load its constants again.
#define RNNFAST_FUNCTION inline __attribute__((always_inline))

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename T>
struct Lanes {
  static constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(T));
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using VectorOf = typename Lanes<T>::Vector;

// What differs between float and double in `exponential`: the integer of the same width, the format's constants, and
// the series (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2, first the coefficient of its highest power.
template <typename V>
struct Format;

template <>
struct Format<VectorOf<float>> {
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kSignBit = INT32_MIN;
  // Adding it rounds to an integer n; the low mantissa bits then are n + 127, the exponent field of 2^n.
  static constexpr float kRound = 0x1.8p23f + 127;
#ifdef __FMA__
  static constexpr float kLn2High = 0x1.62e43p-1f, kLn2Low = 0;  // off by 2^-29; a fused n * high is not rounded
#else
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // ln 2 = high + low; n * high is exact
#endif
  static constexpr float kMin = -87.0f, kMax = 89.0f;  // 2^n stays a normal number below, becomes inf above
  // Minimax: e^r - 1 comes out with a relative error below 2^-26.
  static constexpr float kSeries[] = {0x1.6be908p-10f, 0x1.122862p-7f, 0x1.555678p-5f, 0x1.5554aep-3f, 0.5f};
};

template <>
struct Format<VectorOf<double>> {
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kSignBit = INT64_MIN;
  static constexpr double kRound = 0x1.8p52 + 1023;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kMin = -708.0, kMax = 710.0;
  // Taylor's, 1/k! for k = 13 .. 2; the first term left out is r^14/14! < 2^-57.
  static constexpr double kSeries[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                       1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                       1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2};
};

// e^x = scale * (1 + fraction) with scale = 2^n and |fraction| < 0.42. Kept apart so that e^x - 1 loses no digits.
template <typename V>
struct Exponential {
  V scale, fraction;
};

// Bounds that let NaN pass.
template <typename V, typename T>
RNNFAST_FUNCTION V at_least(V x, T low) {
  return x < low ? V{} + low : x;
}
template <typename V, typename T>
RNNFAST_FUNCTION V at_most(V x, T high) {
  return x > high ? V{} + high : x;
}
#ifdef __AVX512F__
// One instruction each, which the compiler does not find. Masked by all ones: gcc 12 warns of the plain form.
RNNFAST_FUNCTION VectorOf<float> at_least(VectorOf<float> x, float low) {
  return _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), x);
}
RNNFAST_FUNCTION VectorOf<float> at_most(VectorOf<float> x, float high) {
  return _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), x);
}
#endif

// e^(kFactor x) = 2^n e^r, for kFactor x from kMin to kMax. NaN stays NaN.
template <int kFactor, typename V>
RNNFAST_FUNCTION Exponential<V> exponential(V x) {
  using F = Format<V>;
  using T = decltype(F::kMin + F::kMin);
  constexpr double kLog2E = 1.4426950408889634074;
  const V shifted = x * static_cast<T>(kFactor * kLog2E) + F::kRound;
  const V n = shifted - F::kRound;
  V r = x * static_cast<T>(kFactor) - n * F::kLn2High;
  if constexpr (F::kLn2Low != 0) r -= n * F::kLn2Low;
  V q = V{} + F::kSeries[0];
#pragma GCC unroll 16
  for (size_t k = 1; k < sizeof(F::kSeries) / sizeof(T); ++k) q = q * r + F::kSeries[k];
  return {reinterpret_cast<V>(reinterpret_cast<typename F::Int>(shifted) << F::kMantissaBits), r * r * q + r};
}

// 1 / (1 + e^-x)
template <typename V>
RNNFAST_FUNCTION V sigmoid(V x) {
  const Exponential<V> e = exponential<-1>(at_most(at_least(x, -Format<V>::kMax), -Format<V>::kMin));
  return 1 / (1 + e.scale * (1 + e.fraction));  // this order keeps inf * (1 + fraction) = inf, never inf - inf
}

// tanh |x| = -d / (2 + d) with d = e^(-2|x|) - 1, which keeps full relative precision near 0.
template <typename V>
RNNFAST_FUNCTION V tanh(V x) {
  using Int = typename Format<V>::Int;
  constexpr auto kSign = Format<V>::kSignBit;
  const Exponential<V> e =
      exponential<2>(at_least(reinterpret_cast<V>(reinterpret_cast<Int>(x) | kSign), Format<V>::kMin / 2));
  const V d = (e.scale - 1) + e.scale * e.fraction;
  return reinterpret_cast<V>((reinterpret_cast<Int>(d / (2 + d)) & ~kSign) | (reinterpret_cast<Int>(x) & kSign));
}

// Zero where x is negative; NaN passes.
template <typename V>
inline V relu(V x) {
  return x < 0 ? V{} : x;
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
