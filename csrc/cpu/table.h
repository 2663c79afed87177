// The table of an instruction set: all that the CPU drivers compile for it but products of bfloat16.
#pragma once

#include "driver.h"
#include "loss.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename Cell>
CellInfo describe() {
  return {Cell::kName,       Cell::kSource,    Cell::kGates,
          Cell::kSlots,      Cell::kHasCell,   Cell::kHidden == Hidden::kSaved,
          Cell::kLateGates,  Cell::kPeepholes, Cell::kNorms ? 2 * (Cell::kGates + Cell::kHasCell) : 0,
          Cell::kHasResident};
}

inline DriverTable make_table(const char* isa) {
  DriverTable table{};
  table.isa = isa;
#define RNNFAST_DESCRIBE(Cell) table.cells[table.num_cells++] = describe<Cell>();
  RNNFAST_FOR_EACH_CELL(RNNFAST_DESCRIBE)
#undef RNNFAST_DESCRIBE
  make_drivers(table.f32);
  make_drivers(table.f64);
  table.softmax_f32 = softmax_loss<float>;
  table.softmax_f64 = softmax_loss<double>;
  table.loss_f32 = {pack_loss_weights<float>, loss_rows<float>, loss_weights<float>};
  table.loss_f64 = {pack_loss_weights<double>, loss_rows<double>, loss_weights<double>};
  return table;
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
