// The device beneath csrc/cuda on the CPU (the interface is csrc/cuda/device.h): every thread of every block is a
// fiber, and a scheduler with a seed lets one run until it waits at a barrier, then picks another. Threads that rely on
// an order that no barrier gives will read what is not there yet: shared memory starts as NaN. A barrier can be left
// out by its number, to show that it would be missed. Not seen here: memory fences, real concurrency inside a phase,
// time.
#pragma once

#include <ucontext.h>

#include <algorithm>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#define RNNFAST_FUNCTION inline
#define RNNFAST_KERNEL static

namespace rnnfast {
inline namespace RNNFAST_ISA {
namespace emulation {

constexpr int kWarp = 32;

struct Tile {  // what the lanes of a warp bring to a product
  uint32_t a[kWarp][4], b[kWarp][2];
  float (*d[kWarp])[4];
};

struct Meeting {
  int64_t arrived = 0, round = 0;
};

struct Block {
  std::vector<char> shared;
  Meeting meeting;
  std::vector<Meeting> warp_meetings;
  std::vector<Tile> tiles;
};

struct Machine {
  uint64_t seed = 0;
  int left_out = -1;  // number of the barrier that does nothing
  int64_t launches = 0, barrier_launches = 0, switches = 0;

  int threads = 0, thread = 0;
  int64_t block = 0;
  std::vector<Block> blocks;

  ucontext_t scheduler;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
  };
  std::vector<Fiber> fibers;
  size_t running = 0;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline void yield() {
  Machine& m = machine();
  ++m.switches;
  const size_t self = m.running;
  const int thread = m.thread;
  const int64_t block = m.block;
  swapcontext(&m.fibers[self].context, &m.scheduler);
  m.thread = thread, m.block = block;
}

// Returns when `expected` fibers have come since the last time they all had.
inline void meet(Meeting& meeting, int64_t expected) {
  const int64_t round = meeting.round;
  if (++meeting.arrived == expected) meeting.arrived = 0, ++meeting.round;
  while (meeting.round == round) yield();
}

inline void start(unsigned low, unsigned high) {
  Machine& m = machine();
  const size_t self = low | static_cast<size_t>(high) << 32;
  m.thread = static_cast<int>(self % m.threads), m.block = static_cast<int64_t>(self) / m.threads;
  m.entry(m.argument);
  m.fibers[self].done = true;
}

template <typename F>
void run_fibers(int64_t blocks, F body) {
  constexpr size_t kStack = 64 * 1024;
  Machine& m = machine();
  m.entry = [](void* f) { (*static_cast<F*>(f))(); };
  m.argument = &body;
  m.fibers.clear();
  m.fibers.resize(static_cast<size_t>(blocks) * m.threads);
  std::vector<size_t> waiting(m.fibers.size());
  for (size_t i = 0; i < m.fibers.size(); ++i) {
    auto& fiber = m.fibers[i];
    fiber.stack.reset(new char[kStack]);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &m.scheduler;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(start), 2, static_cast<unsigned>(i),
                static_cast<unsigned>(i >> 32));
    waiting[i] = i;
  }
  std::mt19937_64 random(m.seed);
  const int64_t limit = int64_t{1} << 40;
  std::vector<bool> is_lazy((m.fibers.size() + kWarp - 1) / kWarp);  // warps that have a turn in few rounds
  for (size_t warp = 0; warp < is_lazy.size(); ++warp) is_lazy[warp] = random() % 4 == 0;
  while (!waiting.empty() && m.switches < limit) {
    // Rounds in an order of the seed: warps stay together in some, threads are mixed in others.
    if (random() % 2)
      std::shuffle(waiting.begin(), waiting.end(), random);
    else if (random() % 2)
      std::reverse(waiting.begin(), waiting.end());
    const bool lazy_too = random() % 8 == 0;
    for (const size_t i : waiting) {
      if (is_lazy[i / kWarp] && !lazy_too) continue;
      m.running = i;
      swapcontext(&m.scheduler, &m.fibers[i].context);
    }
    waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [&](size_t i) { return m.fibers[i].done; }),
                  waiting.end());
  }
}

}  // namespace emulation

inline float half_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}
inline uint16_t float_to_half(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &y, 2);
  return bits;
}
inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline uint32_t float_to_tf32(float x) {
  return (float_to_bits(x) + 0x1000) & ~0x1fffu;  // 13 bits fewer, ties away from zero
}

inline float reciprocal(float x) {
  return 1 / x;
}

inline char* shared_memory() {
  return emulation::machine().blocks[emulation::machine().block].shared.data();
}
inline int thread_index() {
  return emulation::machine().thread;
}
inline int block_threads() {
  return emulation::machine().threads;
}
inline int64_t block_index() {
  return emulation::machine().block;
}
inline int64_t global_thread() {
  return emulation::machine().block * emulation::machine().threads + emulation::machine().thread;
}
struct alignas(16) Piece {
  uint32_t x, y, z, w;
};
template <typename V>
V load_published(const V* p) {
  return *p;
}
template <typename V>
void store_published(V* p, V x) {
  *p = x;
}
inline void publication_fence() {}
inline void rejoin_warp() {}
inline void look_again() {
  emulation::yield();
}

template <int kNumber>
void block_barrier() {
  auto& m = emulation::machine();
  if (m.left_out != kNumber) emulation::meet(m.blocks[m.block].meeting, m.threads);
}
template <int kNumber>
void warp_barrier() {
  auto& m = emulation::machine();
  if (m.left_out != kNumber)
    emulation::meet(m.blocks[m.block].warp_meetings[m.thread / emulation::kWarp], emulation::kWarp);
}

// The registers of a warp are laid together, multiplied as the hardware does, and handed back.
template <typename E>
void tile_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  auto& m = emulation::machine();
  auto& block = m.blocks[m.block];
  const int warp = m.thread / emulation::kWarp, lane = m.thread % emulation::kWarp;
  auto& tile = block.tiles[warp];
  std::memcpy(tile.a[lane], a, sizeof(a));
  std::memcpy(tile.b[lane], b, sizeof(b));
  tile.d[lane] = &d;
  auto& meeting = block.warp_meetings[warp];
  if (meeting.arrived + 1 == emulation::kWarp) {  // the last lane multiplies for all
    constexpr int kPer = 4 / static_cast<int>(sizeof(E));
    const auto number = [](uint32_t bits, int i) {
      E x;
      std::memcpy(&x, reinterpret_cast<const char*>(&bits) + i * sizeof(E), sizeof(E));
      if constexpr (sizeof(E) == 4)
        return x;
      else
        return widen(x);
    };
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        float sum = 0;
        for (int q = 0; q < 4; ++q)
          for (int r = 0; r < 2; ++r)
            for (int i = 0; i < kPer; ++i)
              sum += number(tile.a[row % 8 * 4 + q][r * 2 + row / 8], i) * number(tile.b[column * 4 + q][r], i);
        (*tile.d[row % 8 * 4 + column / 2])[row / 8 * 2 + column % 2] += sum;
      }
  }
  emulation::meet(meeting, emulation::kWarp);
}

template <typename Params>
void launch(const Launch& how, void (*kernel)(Params), const Params& params) {
  auto& m = emulation::machine();
  ++m.launches;
  m.threads = how.threads;
  if (!how.barriers) {
    for (m.block = 0; m.block < how.blocks; ++m.block)
      for (m.thread = 0; m.thread < how.threads; ++m.thread) kernel(params);
    return;
  }
  ++m.barrier_launches;
  // Blocks that need not run at once run one after the other.
  const int64_t warps = (how.threads + emulation::kWarp - 1) / emulation::kWarp;
  m.blocks.assign(how.blocks, {});
  for (auto& block : m.blocks) {
    block.shared.assign(how.shared_bytes, '\xff');  // every float and half a NaN
    block.warp_meetings.resize(warps);
    block.tiles.resize(warps);
  }
  emulation::run_fibers(how.blocks, [&] { kernel(params); });
}

inline void fill_zero(void* memory, int64_t bytes, void*) {
  if (bytes > 0) std::memset(memory, 0, bytes);
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast
