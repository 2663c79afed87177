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
                           d.block_memory, d.tf32, Unit<Cell, T, E>::is_plain(p)});
}

// All schedules, by the plan.
template <typename Cell, typename T, typename E>
struct DeviceDriver : DeviceSequence<Cell, T, E> {
  using Base = DeviceSequence<Cell, T, E>;
  using Params = SequenceParams<T, E>;
  using U = typename Base::U;
  const DevicePlan plan;

  DeviceDriver(const Params& params, bool backward) : Base(params), plan(plan_of<Cell>(params, backward)) {}

  // Scratch: what the blocks of the resident schedule tell each other, then the arrays of State.
  int64_t take_meeting(T* base, Meeting<E>& meeting) const {
    if (!plan.resident) return 0;
    meeting.size = meeting_rows() * plan.k;
    DeviceArena<T> arena{base};
    arena.take(meeting.published, kPublications * meeting.size);
    arena.take(meeting.weights, plan.streamed ? int64_t{plan.blocks} * plan.rows * plan.k : 0);
    return arena.used;
  }
  int64_t meeting_rows() const { return int64_t{plan.groups} * plan.sequences; }
  int64_t meeting_scratch() const {
    Meeting<E> unused{};
    return take_meeting(nullptr, unused);
  }
  int64_t forward_scratch() { return meeting_scratch() + this->take_forward(nullptr, this->chunk_steps()); }
  int64_t backward_scratch() { return meeting_scratch() + this->take_backward(nullptr); }

  // Steps [step0, step1) of all sequences by the resident kernel.
  template <bool kBackward>
  void run_resident(int64_t step0, int64_t step1) const {
    if constexpr (sizeof(T) == 4 && Cell::kHasResident) {
      Meeting<E> meeting{};
      take_meeting(this->p.scratch, meeting);
      const EmptyParams<E> to_empty{meeting.published,
                                    kPublications * meeting.size,
                                    meeting_rows(),
                                    this->N,
                                    plan.k,
                                    (kBackward ? Cell::kGates : 1) * this->H};
      launch(Launch{ceil_div(to_empty.count, Base::kThreads), Base::kThreads, this->p.device.stream},
             empty_published<E>, to_empty);
      const ResidentMemory memory(plan, Cell::kSlots, sizeof(E));
      Launch how{int64_t{plan.groups} * plan.blocks, kResidentThreads, this->p.device.stream, plan.shared_bytes, true};
      how.cooperative = plan.blocks > 1;
      launch(how, resident_kernel_of<kBackward>(),
             ResidentParams<T, E>{this->p, this->s, plan, memory, step0, step1, meeting});
    }
  }
  template <bool kBackward>
  auto resident_kernel_of() const {
    void (*kernel)(ResidentParams<T, E>) = nullptr;
    const auto offer = [&](auto plain, auto tensor, auto tiles) {
      if constexpr (has_kernel(plain, tensor, tiles * kTileColumns))
        if (U::is_plain(this->p) == plain && plan.tensor_cores == tensor && plan.sequences == tiles * kTileColumns)
          kernel = resident_kernel<Cell, E, plain, tensor, tiles, kBackward>;
    };
    const auto offer_tiles = [&](auto plain, auto tensor) {
      offer(plain, tensor, std::integral_constant<int, 1>());
      offer(plain, tensor, std::integral_constant<int, 2>());
      offer(plain, tensor, std::integral_constant<int, 4>());
    };
    offer_tiles(std::true_type(), std::true_type()), offer_tiles(std::false_type(), std::true_type());
    if constexpr (sizeof(E) == 4)
      offer_tiles(std::true_type(), std::false_type()), offer_tiles(std::false_type(), std::false_type());
    return kernel;
  }

  void forward() {
    const int64_t chunk = this->chunk_steps();
    this->take_forward(this->p.scratch + meeting_scratch(), chunk);
    this->start_forward();
    for (int64_t s0 = 0; s0 < this->T_; s0 += chunk) {
      const int64_t s1 = s0 + chunk < this->T_ ? s0 + chunk : this->T_;
      this->input_product(s0, s1);
      plan.resident ? run_resident<false>(s0, s1) : this->forward_steps(s0, s1);
    }
  }
  void backward() {
    this->take_backward(this->p.scratch + meeting_scratch());
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
        nullptr,
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
