// Layer normalization on the CPU: the statistics of numbers that lie in slots of a row, and the way back through them.
// Padding past the last unit does not count. Gains and biases are the cell's (LayerNorm in cells.h).
#pragma once

#include "../sequence.h"
#include "product.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

// Slots from `first` on of a row in the unit layout, [blocks][slots][kBlock].
template <typename T>
struct Slots {
  T* row;
  int slots, first;
  // Vector v of the units of slot first + q.
  T* at(int64_t v, int q) const {
    const int64_t unit = v * Lanes<T>::kCount;
    return row + (unit / kBlock<T> * slots + first + q) * kBlock<T> + unit % kBlock<T>;
  }
};

// f(v, whole) for the vectors of H units; `whole` is the function that a vector's values go through: zeros past the
// last unit in the last vector, where there are any, and nothing in the others.
template <typename T, typename F>
inline void each_vector_of_units(int64_t H, F f) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const int64_t full = H / kLanes, rest = H % kLanes;
  for (int64_t v = 0; v < full; ++v) f(v, [](VectorOf<T> x) { return x; });
  if (rest == 0) return;
  f(full, [rest](VectorOf<T> x) {
    for (int64_t lane = rest; lane < kLanes; ++lane) x[lane] = 0;
    return x;
  });
}

// The mean of value(v, q) over H units of kCount slots.
template <typename T, int kCount, typename F>
inline T mean(int64_t H, F value) {
  VectorOf<T> sum[kCount] = {};
  each_vector_of_units<T>(H, [&](int64_t v, auto whole) {
#pragma GCC unroll 4
    for (int q = 0; q < kCount; ++q) sum[q] += whole(value(v, q));
  });
  T total = 0;
  for (int q = 0; q < kCount; ++q)
    for (int64_t lane = 0; lane < Lanes<T>::kCount; ++lane) total += sum[q][lane];
  return total / static_cast<T>(kCount * H);
}

template <typename T>
struct Moments {
  T mean, rstd;  // rstd = 1 / sqrt(variance + 1e-5)
  VectorOf<T> normal(VectorOf<T> x) const { return (x - mean) * rstd; }
};

template <int kCount, typename T>
inline Moments<T> moments(Slots<T> x, int64_t H) {
  constexpr T kEpsilon = static_cast<T>(1e-5);
  const T center = mean<T, kCount>(H, [&](int64_t v, int q) { return load(x.at(v, q)); });
  const T variance = mean<T, kCount>(H, [&](int64_t v, int q) {
    const VectorOf<T> deviation = load(x.at(v, q)) - center;
    return deviation * deviation;
  });
  return {center, 1 / static_cast<T>(__builtin_sqrt(variance + kEpsilon))};
}

// The gradient of x from that of its normals, in place: rstd * (d - mean(d) - normal * mean(normal * d)).
template <int kCount, typename T>
inline void backward_moments(Slots<T> x, Moments<T> m, Slots<T> d, int64_t H) {
  const T center = mean<T, kCount>(H, [&](int64_t v, int q) { return load(d.at(v, q)); });
  const T slope = mean<T, kCount>(H, [&](int64_t v, int q) { return m.normal(load(x.at(v, q))) * load(d.at(v, q)); });
  each_vector_of_units<T>(H, [&](int64_t v, auto whole) {
#pragma GCC unroll 4
    for (int q = 0; q < kCount; ++q)
      store(d.at(v, q), whole(m.rstd * (load(d.at(v, q)) - center - m.normal(load(x.at(v, q))) * slope)));
  });
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
