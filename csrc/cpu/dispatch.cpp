// Which instruction set runs (once, at load, or by set_isa), and how a call is scheduled (make_plan).
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../sequence.h"

namespace rnnfast {

#ifdef RNNFAST_X86
const DriverTable& avx512_drivers();
void add_bf16_drivers(DriverTable&);  // to those of avx512
const DriverTable& avx2_drivers();
#endif
const DriverTable& baseline_drivers();

namespace {

struct Target {
  const DriverTable& (*table)();
  bool runs_here;
};

#ifdef RNNFAST_X86
const DriverTable& avx512_table() {
  static const DriverTable table = [] {
    DriverTable all = avx512_drivers();
    if (__builtin_cpu_supports("avx512bf16")) add_bf16_drivers(all);
    return all;
  }();
  return table;
}
#endif

// Best first.
const Target* targets(int* count) {
#ifdef RNNFAST_X86
  __builtin_cpu_init();
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  static const Target all[] = {{avx512_table, avx512}, {avx2_drivers, avx2}, {baseline_drivers, true}};
#else
  static const Target all[] = {{baseline_drivers, true}};
#endif
  *count = static_cast<int>(sizeof(all) / sizeof(all[0]));
  return all;
}

const DriverTable* best() {
  int count;
  const Target* all = targets(&count);
  return &std::find_if(all, all + count, [](const Target& t) { return t.runs_here; })->table();
}

std::atomic<const DriverTable*> current{nullptr};
const DriverTable* added = nullptr;

}  // namespace

const DriverTable& drivers() {
  const DriverTable* table = current.load(std::memory_order_acquire);
  if (!table) {
    table = best();
    current.store(table, std::memory_order_release);
  }
  return *table;
}

const char* const* supported_isas() {
  static const char* names[4] = {};
  int count, n = 0;
  const Target* all = targets(&count);
  for (int i = 0; i < count; ++i)
    if (all[i].runs_here) names[n++] = all[i].table().isa;
  return names;
}

bool set_isa(const char* name) {
  int count;
  const Target* all = targets(&count);
  for (int i = 0; i < count; ++i)
    if (all[i].runs_here && !std::strcmp(all[i].table().isa, name)) {
      current.store(&all[i].table(), std::memory_order_release);
      return true;
    }
  if (added && !std::strcmp(added->isa, name)) {
    current.store(added, std::memory_order_release);
    return true;
  }
  return false;
}

void add_drivers(const DriverTable* table) {
  added = table;
}

Plan make_plan(const Sizes& size, const CellInfo& cell, int64_t number_bytes, int threads, bool backward,
               bool keeps_weights) {
  // Nanoseconds of one core below which waking other threads costs more than it saves, and what a call is guessed to
  // take: multiply-adds at the rate of full or of nearly empty register tiles, and moving every weight once.
  constexpr double kParallelTime = 60e3;
  constexpr double kFullRate = 70, kSingleRate = 25, kPackTime = 0.3, kReadTime = 0.13;
  // Multiply-adds of one thread in one step that repay meeting after it.
  constexpr double kParallelStep = 1 << 16;
  // Bytes of recurrent weights that do not stay in the second-level cache of one core.
  constexpr double kOwnCache = 1 << 20;
  // Rows per chunk: the chunk's gates should stay in the second-level cache; backward wants long sums instead.
  constexpr int64_t kForwardRows = 256, kBackwardRows = 512;

  const double gate_rows = static_cast<double>(cell.gates) * static_cast<double>(size.H);
  const double step_work = gate_rows * static_cast<double>(size.P) * static_cast<double>(size.N);
  const double weights = gate_rows * static_cast<double>(size.I + size.P);
  const int64_t rows = backward ? kBackwardRows : kForwardRows;
  Plan plan{};
  plan.chunk_steps = std::clamp<int64_t>(rows / std::max<int64_t>(size.N, 1), 1, std::max<int64_t>(size.T, 1));
  // All steps in one, where what that takes is less than the sums of weight gradients that chunks would hand on.
  const double more_rows = static_cast<double>(size.T) * static_cast<double>(size.N) - static_cast<double>(rows);
  if (backward && more_rows * (gate_rows + static_cast<double>(size.I + size.P)) <= weights)
    plan.chunk_steps = std::max<int64_t>(size.T, 1);
  plan.packed = keeps_weights || size.R > kInPlaceRows || plan.chunk_steps < size.T;  // few rows in place: one chunk
  plan.schedule = Schedule::kOneThread;
  plan.threads = std::clamp(threads, 1, 256);
  const double products = static_cast<double>(size.R) * weights / (size.N < 4 ? kSingleRate : kFullRate);
  const bool packs = plan.packed && !keeps_weights;
  const double time = (products + weights * (packs ? kPackTime : kReadTime)) * (backward ? 2 : 1);
  if (time < kParallelTime) plan.threads = 1;
  if (plan.threads > 1) {
    // Splitting the batch needs no meeting of threads, but every thread reads all weights. Where those come from beyond
    // the thread's own cache, or with few sequences to share them, it is faster to read only a part of the weights.
    const double recurrent_bytes = gate_rows * static_cast<double>(size.P * number_bytes);
    const bool reading_dominates = size.N < 4 * plan.threads || recurrent_bytes >= kOwnCache;
    if (reading_dominates && step_work >= kParallelStep * plan.threads)
      plan.schedule = Schedule::kUnits;
    else if (size.N > 1)
      plan.schedule = Schedule::kBatch;
  }
  return plan;
}

}  // namespace rnnfast
