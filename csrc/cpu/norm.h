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

// x with zeros past its first `lanes`.
template <typename V>
inline V first_lanes(V x, int64_t lanes) {
  constexpr int64_t kAll = sizeof(V) / sizeof(x[0]);
  for (int64_t lane = lanes; lane < kAll; ++lane) x[lane] = 0;
  return x;
}

// The mean of value(v, q) over H units of kCount slots.
template <typename T, int kCount, typename F>
inline T mean(int64_t H, F value) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  VectorOf<T> sum[kCount] = {};
  for (int64_t v = 0; v * kLanes < H; ++v)
    for (int q = 0; q < kCount; ++q) sum[q] += first_lanes(value(v, q), H - v * kLanes);
  T total = 0;
  for (int q = 0; q < kCount; ++q)
    for (int64_t lane = 0; lane < kLanes; ++lane) total += sum[q][lane];
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
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const T center = mean<T, kCount>(H, [&](int64_t v, int q) { return load(d.at(v, q)); });
  const T slope = mean<T, kCount>(H, [&](int64_t v, int q) { return m.normal(load(x.at(v, q))) * load(d.at(v, q)); });
  for (int64_t v = 0; v * kLanes < H; ++v)
    for (int q = 0; q < kCount; ++q)
      store(d.at(v, q),
            first_lanes(m.rstd * (load(d.at(v, q)) - center - m.normal(load(x.at(v, q))) * slope), H - v * kLanes));
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
