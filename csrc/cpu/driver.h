// The CPU driver: a cell over time, forward and backward, for one layer and one direction.
//
// Written once, compiled once per instruction set (driver_*.cpp set RNNFAST_ISA, kVectorBytes, kVectorRegisters).
// Torch-free; allocates nothing: scratch is the caller's.
#pragma once

#include "backward.h"
#include "forward.h"
#include "softmax.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename Cell, typename T>
Driver<T> make_driver() {
  using Params = SequenceParams<T>;
  using Forward = SequenceForward<Cell, T>;
  using Backward = SequenceBackward<Cell, T>;
  return {
      [](const Params& p) { return typename Forward::Scratch(Forward(p), nullptr).size; },
      [](const Params& p) { return typename Backward::Scratch(Backward(p), nullptr).size; },
      [](const Params& p) { Forward(p).run(); },
      [](const Params& p) { Backward(p).run(); },
  };
}

template <typename Cell>
inline void add_cell(DriverTable& table) {
  const int i = table.num_cells++;
  table.cells[i] = {Cell::kName,       Cell::kSource,    Cell::kGates,
                    Cell::kSlots,      Cell::kHasCell,   Cell::kHidden == Hidden::kSaved,
                    Cell::kLateGates,  Cell::kPeepholes, Cell::kNorms ? 2 * (Cell::kGates + Cell::kHasCell) : 0,
                    Cell::kHasResident};
  table.f32[i] = make_driver<Cell, float>();
  table.f64[i] = make_driver<Cell, double>();
}

inline DriverTable make_table(const char* isa) {
  DriverTable table{};
  table.isa = isa;
#define RNNFAST_ADD_CELL(Cell) add_cell<Cell>(table);
  RNNFAST_FOR_EACH_CELL(RNNFAST_ADD_CELL)
#undef RNNFAST_ADD_CELL
  table.softmax_f32 = softmax_loss<float>;
  table.softmax_f64 = softmax_loss<double>;
  return table;
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
