// The GPU driver: a cell over time, forward and backward, for one layer and one direction. Written once, compiled for
// each dtype (driver_*.cu) and, for tests, for the CPU beneath an emulation of the device. Torch-free; allocates
// nothing.
#pragma once

#include "per_step.h"
#include "plan.h"
#include "resident.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

template <typename Cell, typename T, typename E>
DevicePlan plan_of(const SequenceParams<T, E>& p, bool backward) {
  const Device& d = p.device;
  return make_device_plan({p.size, Cell::kGates, Cell::kSlots, Cell::kHasResident, p.w_hr != nullptr, backward,
                           static_cast<int>(sizeof(E)), static_cast<int>(sizeof(T)), d.capability, d.multiprocessors,
                           d.block_memory, d.tf32});
}

// Both schedules, by the plan.
template <typename Cell, typename T, typename E>
struct DeviceDriver : DeviceSequence<Cell, T, E> {
  using Base = DeviceSequence<Cell, T, E>;
  using Params = SequenceParams<T, E>;
  const DevicePlan plan;

  DeviceDriver(const Params& params, bool backward) : Base(params), plan(plan_of<Cell>(params, backward)) {}

  // Scratch: the counters of arrivals, then the arrays of State.
  int64_t counters() const {
    return plan.resident ? ceil_div(ceil_div(this->N, plan.sequences) * 4, 256) * 256 / static_cast<int64_t>(sizeof(T))
                         : 0;
  }
  int64_t forward_scratch() { return counters() + this->take_forward(nullptr, this->chunk_steps()); }
  int64_t backward_scratch() { return counters() + this->take_backward(nullptr); }

  // Steps [step0, step1) of all sequences by the resident kernel, as many groups at once as the plan says.
  template <bool kBackward>
  void run_resident(int64_t step0, int64_t step1) const {
    if constexpr (sizeof(T) == 4 && Cell::kHasResident) {
      const int rows = (kBackward ? 1 : Cell::kGates) * plan.units;
      ResidentParams<T, E> params{
          this->p, this->s, plan, ResidentMemory(plan, rows, Cell::kSlots, sizeof(E), kBackward),
          step0,   step1,   0,    reinterpret_cast<unsigned*>(this->p.scratch)};
      const int64_t groups = ceil_div(this->N, plan.sequences);
      fill_zero(params.arrived, groups * 4, this->p.device.stream);
      for (int64_t group = 0; group < groups; group += plan.groups) {
        const int64_t now = groups - group < plan.groups ? groups - group : plan.groups;
        Launch how{now * plan.blocks, kResidentThreads, this->p.device.stream, plan.shared_bytes, true};
        how.cluster = plan.cluster ? plan.blocks : 0;
        how.cooperative = plan.blocks > 1 && !plan.cluster;
        params.first_sequence = group * plan.sequences;
        params.arrived = reinterpret_cast<unsigned*>(this->p.scratch) + group;
        launch(how, resident_kernel_of<kBackward>(), params);
      }
    }
  }
  template <bool kBackward>
  auto resident_kernel_of() const {
    const auto tiles = [&](auto tensor) {
      return plan.sequences > kTileColumns ? resident_kernel<Cell, E, tensor.value, 2, kBackward>
                                           : resident_kernel<Cell, E, tensor.value, 1, kBackward>;
    };
    if constexpr (sizeof(E) == 2)
      return tiles(std::true_type{});
    else
      return plan.tensor_cores ? tiles(std::true_type{}) : tiles(std::false_type{});
  }

  void forward() {
    const int64_t chunk = this->chunk_steps();
    this->take_forward(this->p.scratch + counters(), chunk);
    this->start_forward();
    for (int64_t s0 = 0; s0 < this->T_; s0 += chunk) {
      const int64_t s1 = s0 + chunk < this->T_ ? s0 + chunk : this->T_;
      this->input_product(s0, s1);
      plan.resident ? run_resident<false>(s0, s1) : this->forward_steps(s0, s1);
    }
  }
  void backward() {
    this->take_backward(this->p.scratch + counters());
    this->start_backward();
    plan.resident ? run_resident<true>(0, this->T_) : this->backward_steps();
    this->finish_backward();
  }
};

// Null functions for cells with norms, which have no kernels here.
template <typename Cell, typename T, typename E>
Driver<T, E> make_device_driver() {
  using Params = SequenceParams<T, E>;
  if constexpr (Cell::kNorms > 0) {
    return {};
  } else {
    using D = DeviceDriver<Cell, T, E>;
    return {
        [](const Params& p) { return D(p, false).forward_scratch(); },
        [](const Params& p) { return D(p, true).backward_scratch(); },
        [](const Params& p) { D(p, false).forward(); },
        [](const Params& p) { D(p, true).backward(); },
    };
  }
}

// One dtype's drivers of all cells, in the order of the list.
template <typename T, typename E>
void fill_device_drivers(Driver<T, E>* drivers) {
#define RNNFAST_ADD_CELL(Cell) *drivers++ = make_device_driver<Cell, T, E>();
  RNNFAST_FOR_EACH_CELL(RNNFAST_ADD_CELL)
#undef RNNFAST_ADD_CELL
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
