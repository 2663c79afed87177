// The GPU drivers compiled for the CPU over emulation.h, as a DriverTable that stands beside those of the instruction
// sets: forced like one of them, it runs through the same operators and the same tests.
#define RNNFAST_DEVICE
#define RNNFAST_ISA emulated
#include "../../csrc/cuda/driver.h"

namespace rnnfast {
namespace {

template <typename T, typename E>
void plain_gemm(void*, const Product& g) {
  const E *a = static_cast<const E*>(g.a), *b = static_cast<const E*>(g.b);
  const auto run = [&](auto* c) {
    using C = std::remove_pointer_t<decltype(c)>;
    for (int64_t i = 0; i < g.m; ++i)
      for (int64_t j = 0; j < g.n; ++j) {
        T sum{};
        for (int64_t k = 0; k < g.k; ++k)
          sum += widen(a[g.transpose_a ? k * g.lda + i : i * g.lda + k]) *
                 widen(b[g.transpose_b ? j * g.ldb + k : k * g.ldb + j]);
        c[i * g.ldc + j] = narrow<C>(g.accumulate ? sum + widen(c[i * g.ldc + j]) : sum);
      }
  };
  g.wide ? run(static_cast<T*>(g.c)) : run(static_cast<E*>(g.c));
}

Device device{90, 132, 227 * 1024, false, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};

template <typename Cell, typename T, typename E>
Driver<T, E> emulated_driver() {
  using Params = SequenceParams<T, E>;
  static const Driver<T, E> driver = make_device_driver<Cell, T, E>();
  if (!driver.forward) return driver;
  static const auto on_device = [](const Params& given) {
    Params p = given;
    p.device.capability = device.capability, p.device.multiprocessors = device.multiprocessors;
    p.device.block_memory = device.block_memory, p.device.tf32 = device.tf32;
    p.device.gemm = plain_gemm<T, E>;
    return p;
  };
  return {
      [](const Params& p) { return driver.forward_scratch(on_device(p)); },
      [](const Params& p) { return driver.backward_scratch(on_device(p)); },
      [](const Params& p) { driver.forward(on_device(p)); },
      [](const Params& p) { driver.backward(on_device(p)); },
      nullptr,
  };
}

template <typename Cell>
void add_cell(DriverTable& table) {
  const int i = table.num_cells++;
  table.cells[i] = {Cell::kName,       Cell::kSource,    Cell::kGates,
                    Cell::kSlots,      Cell::kHasCell,   Cell::kHidden == Hidden::kSaved,
                    Cell::kLateGates,  Cell::kPeepholes, Cell::kNorms ? 2 * (Cell::kGates + Cell::kHasCell) : 0,
                    Cell::kHasResident};
  table.f32[i] = emulated_driver<Cell, float, float>();
  table.f64[i] = emulated_driver<Cell, double, double>();
  table.f16[i] = emulated_driver<Cell, float, Half>();
  table.bf16[i] = emulated_driver<Cell, float, BFloat16>();
}

DriverTable make_table() {
  DriverTable table{};
  table.isa = "cuda_emulation";
#define RNNFAST_ADD_CELL(Cell) add_cell<Cell>(table);
  RNNFAST_FOR_EACH_CELL(RNNFAST_ADD_CELL)
#undef RNNFAST_ADD_CELL
  return table;
}

}  // namespace
}  // namespace rnnfast

using rnnfast::emulated::emulation::machine;

extern "C" {
const rnnfast::DriverTable* emulated_table() {
  static const rnnfast::DriverTable table = rnnfast::make_table();
  return &table;
}
// The device that is played, the order of threads, and the number of a barrier to leave out (-1: none).
void emulated_device(int capability, int multiprocessors, int64_t block_memory, int tf32) {
  rnnfast::device.capability = capability, rnnfast::device.multiprocessors = multiprocessors;
  rnnfast::device.block_memory = block_memory, rnnfast::device.tf32 = tf32 != 0;
}
void emulated_order(uint64_t seed, int left_out) {
  machine().seed = seed, machine().left_out = left_out;
}
// Launches since the last call, and of those the ones with barriers: resident kernels.
void emulated_launches(int64_t* all, int64_t* with_barriers) {
  *all = machine().launches, *with_barriers = machine().barrier_launches;
  machine().launches = machine().barrier_launches = 0;
}
}
