// Rearranged weights that outlive a call, for layers that rnnfast.prepack names: by their weight_hh, until a weight
// changes in a way that torch counts (in-place versions) or lies elsewhere.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "sequence.h"

namespace rnnfast {

// A weight as it lies now and in the version that it has, or none. The weak reference keeps its address from being
// given anew, to other numbers.
class WeightVersion {
 public:
  explicit WeightVersion(const at::Tensor& t);
  bool operator==(const WeightVersion& other) const;
  // Whether a change would be seen.
  bool is_tracked() const { return is_tracked_; }
  const c10::StorageImpl* storage() const { return storage_._unsafe_get_target(); }

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const void* data_ = nullptr;
  uint32_t version_ = 0;
  bool is_tracked_ = true;
};

// What rearranged weights are made from, and all but their sizes that decides how.
struct PackedFrom {
  const DriverTable* table;
  int cell, unit_threads;  // threads that share the units, or 1
  at::ScalarType stored;
  std::array<WeightVersion, 5> weights;
  bool operator==(const PackedFrom& other) const;
};

// What an earlier call left; nothing before the first.
struct Kept {
  std::optional<PackedFrom> from;
  at::Tensor memory;
};

// Of the layer with this weight_hh; null where nothing is to be kept.
std::shared_ptr<const Kept> find_prepacked(const at::Tensor& weight_hh);
// In the place of what was there. `from` as it was before the weights were read; nobody writes to `memory` any more.
void keep_prepacked(const at::Tensor& weight_hh, PackedFrom from, at::Tensor memory);

// Lets go of what was made from any of these tensors.
void forget_prepacked(const std::vector<at::Tensor>& weights);

}  // namespace rnnfast
