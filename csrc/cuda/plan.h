// How a call will run on a GPU: decided here, reported by _C.explain. Plain C++ on both sides; no torch, no CUDA.
//
// per_step   for each step a product outside and a kernel; serves everything.
// resident   the recurrent weights stay in shared memory through all steps. A group of blocks takes some sequences;
// each
//            of its blocks owns some hidden units and holds their weights, and the group meets after each step.
#pragma once

#include "../sequence.h"

namespace rnnfast {

// What the decision depends on, beside the sizes.
struct DeviceRequest {
  Sizes size;
  int gates, slots;
  bool has_resident, is_projected, backward;
  int element_bytes, accumulate_bytes;
  int capability, multiprocessors;
  int64_t block_memory;
  bool tf32;
};

struct DevicePlan {
  bool resident;
  const char* reason;
  // of the resident schedule
  bool tensor_cores;     // products of 16-bit numbers or tf32; else plain multiply-adds of float32
  bool cluster;          // groups are clusters, which meet in hardware; else they count arrivals in memory
  int blocks, groups;    // blocks of a group; groups that run at once
  int units, sequences;  // of a block; of a group
  int splits;            // parts of the product's sum, taken by different warps
  int64_t k, ld;         // terms of the product, padded; elements between rows of its staged factor
  int64_t shared_bytes;
};

constexpr int kResidentThreads = 256, kResidentWarps = kResidentThreads / 32;
constexpr int kTileRows = 16, kTileColumns = 8;  // of one tensor-core product; the tile has units (and gates) as rows

// Shared memory of a block, in bytes from its beginning: its part of the weights, the staged factor, the product, and
// of forward the slots of its threads' own units before the recurrent product.
struct ResidentMemory {
  int64_t weights, staged, partial, pre, size;

  ResidentMemory(const DevicePlan& plan, int64_t rows, int slots, int element_bytes, bool backward) {
    weights = 0;
    staged = weights + rows * plan.k * element_bytes;
    partial = staged + plan.sequences * plan.ld * element_bytes;
    pre = partial + int64_t{plan.splits} * rows * plan.sequences * 4;
    const int64_t pairs = (int64_t{plan.units} * plan.sequences + kResidentThreads - 1) / kResidentThreads;
    size = pre + (backward ? 0 : pairs * kResidentThreads * slots * 4);
  }
};

inline DevicePlan make_device_plan(const DeviceRequest& r) {
  DevicePlan plan{};
  const auto per_step = [&](const char* reason) {
    plan.resident = false;
    plan.reason = reason;
    return plan;
  };
  const auto round_up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  if (r.accumulate_bytes != 4) return per_step("float64 has no resident kernel");
  if (!r.has_resident) return per_step("only torch.nn's cells have a resident kernel");
  if (r.is_projected) return per_step("a projected cell has no resident kernel");
  if (r.capability < 80) return per_step("resident kernels need compute capability 8.0");
  constexpr int64_t kFewSteps = 4, kMostWaves = 2;
  if (r.size.T < kFewSteps) return per_step("too few steps to repay loading the weights");

  const int64_t H = r.size.H, N = r.size.N;
  plan.tensor_cores = r.element_bytes == 2 || r.tf32;
  // Elements of 32 bytes: the depth of a 16-bit product, twice that of a tf32 one.
  const int64_t all_terms = r.backward ? r.gates * H : H;
  plan.k = round_up(all_terms, 32 / r.element_bytes);
  // Rows 32 bytes past a multiple of 128 lie in different banks for the eight columns of a tile.
  plan.ld = (round_up(plan.k * r.element_bytes, 128) + 32) / r.element_bytes;
  plan.sequences = N > kTileColumns ? 2 * kTileColumns : kTileColumns;
  const int rows_per_unit = r.backward ? 1 : r.gates;

  // The fewest units a block that keep the group a cluster of at most eight, if they fit; else as many as fit.
  const auto fits = [&](int64_t units) {
    plan.units = static_cast<int>(units);
    const int64_t tiles = units / kTileRows * rows_per_unit;
    plan.splits = static_cast<int>(tiles >= kResidentWarps ? 1 : kResidentWarps / tiles);
    plan.shared_bytes = ResidentMemory(plan, units * rows_per_unit, r.slots, r.element_bytes, r.backward).size;
    return plan.shared_bytes <= r.block_memory;
  };
  constexpr int kCluster = 8;
  const int64_t all_units = round_up(H, kTileRows);
  int64_t units = round_up((all_units + kCluster - 1) / kCluster, kTileRows);
  if (!fits(units))
    for (; units > kTileRows && !fits(units); units -= kTileRows) {
    }
  if (!fits(units)) return per_step("the weights of 16 units do not fit a multiprocessor's shared memory");
  plan.blocks = static_cast<int>((all_units + units - 1) / units);
  plan.cluster = plan.blocks > 1 && plan.blocks <= kCluster && r.capability >= 90;
  const int64_t groups = (N + plan.sequences - 1) / plan.sequences;
  const int64_t at_once = r.multiprocessors / plan.blocks;
  if (at_once == 0) return per_step("the weights do not fit the shared memory of all multiprocessors");
  if (groups > kMostWaves * at_once) return per_step("with so many sequences products outside are as fast");
  plan.groups = static_cast<int>(groups < at_once || plan.cluster ? groups : at_once);
  plan.resident = true;
  plan.reason = plan.cluster       ? "the weights fit the shared memory of a cluster of blocks"
                : plan.blocks == 1 ? "the weights fit the shared memory of one block"
                                   : "the weights fit the shared memory of blocks that all run at once";
  return plan;
}

}  // namespace rnnfast
