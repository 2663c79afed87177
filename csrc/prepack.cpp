#include "prepack.h"

#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace rnnfast {
namespace {

using at::Tensor;

const std::shared_ptr<const Kept> nothing = std::make_shared<const Kept>();

// Of a weight_hh, by its address. No reference is held, for torch.utils.swap_tensors refuses tensors that others hold:
// should another tensor get the address of one that is gone, its weights are kept, which is as right as with any.
struct Entry {
  int handles;
  std::shared_ptr<const Kept> kept;
};

std::mutex mutex;
std::unordered_map<const c10::TensorImpl*, Entry> entries;
std::atomic<size_t> count{0};  // of entries: calls that have none need no lock

// What rnnfast.prepack gives: while it holds a layer's weight_hh, rearranged weights of that layer are kept.
class Prepacked {
 public:
  explicit Prepacked(const std::vector<Tensor>& weights) { hold(weights); }
  ~Prepacked() { remove(); }
  Prepacked(const Prepacked&) = delete;
  Prepacked& operator=(const Prepacked&) = delete;

  void hold(const std::vector<Tensor>& weights) {
    remove();
    const std::lock_guard<std::mutex> lock(mutex);
    for (const Tensor& t : weights) {
      const c10::TensorImpl* weight = t.unsafeGetTensorImpl();
      if (std::find(held_.begin(), held_.end(), weight) != held_.end()) continue;
      held_.push_back(weight);
      const auto found = entries.find(weight);
      if (found != entries.end()) {
        ++found->second.handles;
        found->second.kept = nothing;
      } else {
        entries.emplace(weight, Entry{1, nothing});
      }
    }
    count = entries.size();
  }
  void remove() {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const c10::TensorImpl* weight : held_) {
      const auto found = entries.find(weight);
      if (--found->second.handles == 0) entries.erase(found);
    }
    held_.clear();
    count = entries.size();
  }
  int64_t nbytes() const {
    const std::lock_guard<std::mutex> lock(mutex);
    int64_t sum = 0;
    for (const c10::TensorImpl* weight : held_)
      if (const auto& kept = entries.at(weight).kept; kept->from) sum += static_cast<int64_t>(kept->memory.nbytes());
    return sum;
  }

 private:
  std::vector<const c10::TensorImpl*> held_;
};

}  // namespace

WeightVersion::WeightVersion(const Tensor& t)
    : storage_(t.defined() ? t.storage().getWeakStorageImpl()
                           : c10::weak_intrusive_ptr<c10::StorageImpl>(c10::intrusive_ptr<c10::StorageImpl>())) {
  if (!t.defined()) return;
  data_ = t.const_data_ptr();
  is_tracked_ = !t.is_inference() && t.is_contiguous();
  if (is_tracked_) version_ = t._version();
}

bool WeightVersion::operator==(const WeightVersion& other) const {
  return storage_ == other.storage_ && data_ == other.data_ && version_ == other.version_ && is_tracked_ &&
         other.is_tracked_;
}

bool PackedFrom::operator==(const PackedFrom& other) const {
  return table == other.table && cell == other.cell && unit_threads == other.unit_threads && stored == other.stored &&
         weights == other.weights;
}

std::shared_ptr<const Kept> find_prepacked(const Tensor& weight_hh) {
  if (count == 0) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = entries.find(weight_hh.unsafeGetTensorImpl());
  return found == entries.end() ? nullptr : found->second.kept;
}

void keep_prepacked(const Tensor& weight_hh, PackedFrom from, Tensor memory) {
  for (const WeightVersion& weight : from.weights)
    if (!weight.is_tracked()) return;
  std::shared_ptr<const Kept> kept(new Kept{std::move(from), std::move(memory)});
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = entries.find(weight_hh.unsafeGetTensorImpl());
  if (found != entries.end()) found->second.kept.swap(kept);
}

void forget_prepacked(const std::vector<Tensor>& weights) {
  if (count == 0) return;
  std::unordered_set<const c10::StorageImpl*> changed;
  for (const Tensor& t : weights)
    if (t.has_storage()) changed.insert(t.storage().unsafeGetStorageImpl());
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto& [weight, entry] : entries)
    if (const auto& from = entry.kept->from;
        from && std::any_of(from->weights.begin(), from->weights.end(),
                            [&](const WeightVersion& w) { return changed.count(w.storage()) > 0; }))
      entry.kept = nothing;
}

// Declared in bindings.cpp: the header is for code without Python.
void bind_prepack(py::module& m) {
  py::class_<Prepacked>(m, "Prepacked")
      .def(py::init<const std::vector<Tensor>&>(), py::arg("weights"))
      .def("hold", &Prepacked::hold, py::arg("weights"))
      .def("remove", &Prepacked::remove)
      .def_property_readonly("nbytes", &Prepacked::nbytes);
  m.def(
      "is_prepacked", [](const Tensor& weight_hh) { return find_prepacked(weight_hh) != nullptr; },
      py::arg("weight_hh"));
  m.def("forget_prepacked", &forget_prepacked, py::arg("weights"));
}

}  // namespace rnnfast
