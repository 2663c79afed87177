// Types and functions that the cells and kernels of a GPU are written over: float and double, one unit at a time, and
// the conversion of what lies in memory. The twin of csrc/math.h.
#pragma once

#include <cstdint>

#include "../sequence.h"
#include "device.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

RNNFAST_FUNCTION float widen(float x) {
  return x;
}
RNNFAST_FUNCTION double widen(double x) {
  return x;
}
RNNFAST_FUNCTION float widen(Half x) {
  return half_to_float(x.bits);
}
RNNFAST_FUNCTION float widen(BFloat16 x) {
  return bits_to_float(uint32_t{x.bits} << 16);
}

// To the nearest, ties to even.
template <typename E>
struct Narrow {
  RNNFAST_FUNCTION static E of(E x) { return x; }
};
template <>
struct Narrow<Half> {
  RNNFAST_FUNCTION static Half of(float x) { return {float_to_half(x)}; }
};
template <>
struct Narrow<BFloat16> {
  RNNFAST_FUNCTION static BFloat16 of(float x) {
    const uint32_t bits = float_to_bits(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};  // a NaN stays one
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};
template <typename E, typename T>
RNNFAST_FUNCTION E narrow(T x) {
  return Narrow<E>::of(x);
}

// 1 / (1 + e^-x)
RNNFAST_FUNCTION float sigmoid(float x) {
  return reciprocal(1 + ::expf(-x));
}
RNNFAST_FUNCTION double sigmoid(double x) {
  return 1 / (1 + ::exp(-x));
}
RNNFAST_FUNCTION float tanh(float x) {
  return ::tanhf(x);
}
RNNFAST_FUNCTION double tanh(double x) {
  return ::tanh(x);
}

// Zero where x is negative; NaN passes.
template <typename V>
RNNFAST_FUNCTION V relu(V x) {
  return x < 0 ? V{} : x;
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
