// The CPU driver: a cell over time, forward and backward, for one layer and one direction.
//
// Written once, compiled once per instruction set (driver_*.cpp set RNNFAST_ISA, kVectorBytes, kVectorRegisters).
// Torch-free; allocates nothing: scratch is the caller's.
#pragma once

#include "backward.h"
#include "forward.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename Cell, typename T, typename E = T>
Driver<T, E> make_driver() {
  using Params = SequenceParams<T, E>;
  using Forward = SequenceForward<Cell, T, E>;
  using Backward = SequenceBackward<Cell, T, E>;
  return {
      [](const Params& p) { return typename Forward::Scratch(Forward(p), nullptr).size; },
      [](const Params& p) { return typename Backward::Scratch(Backward(p), nullptr).size; },
      [](const Params& p) { Forward(p).run(); },
      [](const Params& p) { Backward(p).run(); },
      [](const Params& p) { return typename Forward::Weights(Forward(p), nullptr).size; },
  };
}

// Of all cells.
template <typename T, typename E = T>
void make_drivers(Driver<T, E>* next) {
#define RNNFAST_MAKE_DRIVER(Cell) *next++ = make_driver<Cell, T, E>();
  RNNFAST_FOR_EACH_CELL(RNNFAST_MAKE_DRIVER)
#undef RNNFAST_MAKE_DRIVER
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
