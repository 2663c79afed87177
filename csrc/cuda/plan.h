// How a call will run on a GPU: decided here, reported by _C.explain. Plain C++ on both sides; no torch, no CUDA.
//
// per_step   for each step a product outside and a kernel; serves everything.
// resident   one kernel runs through all steps. A group of blocks takes some sequences; each of its blocks owns some
//            hidden units and holds their recurrent weights in shared memory, and the group meets after each step.
// streamed   the same where the weights do not fit: each step reads them once, from the cache of the whole chip.
#pragma once

#include <algorithm>

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
  bool plain;  // nothing of what Unit::is_plain asks for
};

struct DevicePlan {
  bool resident;  // or streamed
  const char* reason;
  // of both
  bool streamed;
  bool tensor_cores;     // products of 16-bit numbers or tf32; else plain multiply-adds of float32
  int blocks, groups;    // blocks of a group; all groups run at once
  int units, sequences;  // of a block; of a group
  int rows;              // of a block's weights
  int splits;            // parts of the product's sum, taken by different warps
  int64_t k;             // terms of the product, padded
  int64_t shared_bytes;
};

constexpr int kResidentThreads = 256, kResidentWarps = kResidentThreads / 32;
constexpr int kPairs = 2;  // (unit, sequence) of a thread, at most: their state lies in its registers
constexpr int kTileRows = 16, kTileColumns = 8;  // of one tensor-core product; the tile has units (and gates) as rows
constexpr int kPieces = 32;                      // terms of the product are padded to a multiple

// There are kernels for groups of 8, 16 and 32 sequences; fewer where a call is rare or slow in any case.
constexpr bool has_kernel(bool plain, bool tensor_cores, int sequences) {
  return plain ? tensor_cores || sequences <= 2 * kTileColumns : sequences == 2 * kTileColumns;
}

// Shared memory of a block, in bytes from its beginning: its part of the weights, the product, the bias by slot and
// unit, and of plain multiply-adds each warp's piece of the factor.
struct ResidentMemory {
  int64_t weights, partial, bias, piece, size;

  ResidentMemory(const DevicePlan& plan, int slots, int element_bytes) {
    weights = 0;
    partial = plan.streamed ? 0 : plan.rows * plan.k * element_bytes;
    bias = partial + int64_t{plan.splits} * plan.sequences * partial_ld(plan.rows) * 4;
    piece = bias + int64_t{slots} * plan.units * 4;
    size = piece + (plan.tensor_cores ? 0 : int64_t{kResidentWarps} * kPieces * plan.sequences * 4);
  }
  // Rows of the product, a sequence each, begin in banks that neither its writing by tiles nor its reading meets twice.
  static constexpr int64_t partial_ld(int64_t rows) { return rows + 4; }
};

inline DevicePlan make_device_plan(const DeviceRequest& r) {
  DevicePlan plan{};
  const auto per_step = [&](const char* reason) {
    plan.resident = false;
    plan.reason = reason;
    return plan;
  };
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  if (r.accumulate_bytes != 4) return per_step("float64 has no resident kernel");
  if (!r.has_resident) return per_step("only torch.nn's cells have a resident kernel");
  if (r.is_projected) return per_step("a projected cell has no resident kernel");
  if (r.capability < 80) return per_step("resident kernels need compute capability 8.0");
  constexpr int64_t kFewSteps = 4;
  if (r.size.T < kFewSteps) return per_step("too few steps to repay loading the weights");

  const int64_t H = r.size.H, N = r.size.N;
  const int rows_per_unit = r.backward ? 1 : r.gates;
  plan.tensor_cores = r.element_bytes == 2 || r.tf32;
  plan.k = ceil_div(r.backward ? r.gates * H : H, kPieces) * kPieces;

  // Makes the plan of so many units a block and sequences a group, if there is a kernel and room for it.
  const auto fits = [&](int64_t units, int64_t sequences, bool streamed) {
    if (units * sequences > kPairs * kResidentThreads) return false;
    if (!has_kernel(r.plain, plan.tensor_cores, static_cast<int>(sequences))) return false;
    plan.streamed = streamed;
    plan.units = static_cast<int>(units), plan.sequences = static_cast<int>(sequences);
    plan.rows = plan.units * rows_per_unit;
    const int64_t tasks = plan.tensor_cores ? units / kTileRows : ceil_div(plan.rows, 32);
    plan.splits = static_cast<int>(std::clamp<int64_t>(kResidentWarps / tasks, 1, plan.k / kPieces));
    plan.shared_bytes = ResidentMemory(plan, r.slots, r.element_bytes).size;
    const int64_t blocks = ceil_div(H, units), groups = ceil_div(N, sequences);
    if (plan.shared_bytes > r.block_memory || blocks * groups > r.multiprocessors) return false;
    plan.blocks = static_cast<int>(blocks), plan.groups = static_cast<int>(groups);
    plan.resident = true;
    plan.reason = streamed     ? "the weights stay in the cache of the chip"
                  : blocks > 1 ? "the weights fit the shared memory of blocks that all run at once"
                               : "the weights fit the shared memory of one block";
    return true;
  };

  // The best first: a block that meets no other, if its threads have little to do; then many blocks of few units and
  // sequences, whose steps are short; then more work for a block, so that all groups run at once.
  constexpr int64_t kTile = kTileRows, kColumns = kTileColumns;
  const int64_t all_units = ceil_div(H, kTile) * kTile;
  const bool alone = all_units * std::min(N, kColumns) <= kResidentThreads;
  const struct {
    int64_t units, sequences;
  } shapes[] = {{alone ? all_units : kTile, kColumns},
                {alone ? all_units : kTile, 2 * kColumns},
                {kTile, kColumns},
                {kTile, 2 * kColumns},
                {kTile, 4 * kColumns},
                {2 * kTile, 2 * kColumns},
                {all_units, kColumns}};
  for (const bool streamed : {false, true}) {
    if (streamed && !plan.tensor_cores) break;  // plain multiply-adds would wait for the weights
    for (const auto& shape : shapes)
      if (fits(shape.units, shape.sequences, streamed)) return plan;
  }
  plan = DevicePlan{};
  return per_step("with so many sequences or units products outside are as fast");
}

}  // namespace rnnfast
