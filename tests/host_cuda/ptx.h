// The names of kernels/cuda/ptx.cuh in plain C++, for a machine without a GPU: a thread of the system for each of CUDA's, barriers
// for __syncthreads and for what a warp does together, relaxed atomics for the words between blocks, a loop for the matrix
// instruction.
//
// A background copy spoils its target when it is asked for, and fills it only when it is waited for: real ones may do either at any
// time in between. So a copy that comes too early, and a wait that is missing, both show.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() ::disa_fast::cuda::host::sync_threads(__LINE__)
#define shared_memory (::disa_fast::cuda::host::here.block->shared.data())

struct uint2 {
  unsigned int x, y;
};
struct uint4 {
  unsigned int x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct Index {
  unsigned int x;
};

#include "mlp_denoise.h"

inline thread_local Index threadIdx, blockIdx, gridDim;

namespace disa_fast::cuda {
namespace host {

// What the lanes of a warp show each other. Two places in turns, since a lane may be one exchange ahead of another, never two.
struct Lanes {
  float values[32];
  const u16* rows[32];
  uint4 a[32];
  uint2 b[32];
};

// As std::barrier, which is slower here, and whose waiters of all barriers meet in counters that they share (libstdc++ 12): that
// orders blocks which nothing else orders, so that ThreadSanitizer misses races between them.
class Barrier {
 public:
  explicit Barrier(u32 threads) : threads_(threads) {}
  void arrive_and_wait() {
    const u32 round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    } else {
      for (int spins = 0; spins < 4 && round_.load(std::memory_order_relaxed) == round; ++spins) std::this_thread::yield();
      while (round_.load(std::memory_order_relaxed) == round)
        syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
      round_.load(std::memory_order_acquire);
    }
  }

 private:
  const u32 threads_;
  std::atomic<u32> arrived_{0}, round_{0};
};

struct Warp {
  Barrier barrier{32};
  Lanes lanes[2];
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Copies {
  std::deque<Copy> asked;
  u32 ended = 0;
};

struct Block {
  Block(int threads, size_t shared_bytes) : barrier(threads), warps(threads / 32), shared(shared_bytes, char(0xff)) {}
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<char> shared;
  std::mutex copying;
  std::map<u64*, Copies> copies;  // of units, by barrier
};

struct Here {
  Block* block;
  Warp* warp;
  int lane, exchanges = 0;
  std::deque<std::vector<Copy>> groups{1};  // of copies; the last is not complete
};
inline thread_local Here here;

// For tests of the tests: a line of __syncthreads that does nothing; a block that takes its time to read what others tell it.
inline int skipped_line = 0, slow_block = -1;
inline bool clock_goes_back = false;

inline void sync_threads(int line) {
  if (line != skipped_line) here.block->barrier.arrive_and_wait();
}

// These blocks of a grid, all at once, until they are done.
template <class Kernel>
void run_blocks(const std::vector<int>& numbers, int grid, int threads, size_t shared_bytes, Kernel kernel) {
  std::deque<Block> blocks;
  std::vector<std::thread> running;
  for (size_t i = 0; i < numbers.size(); ++i) blocks.emplace_back(threads, shared_bytes);
  for (size_t i = 0; i < numbers.size(); ++i)
    for (int thread = 0; thread < threads; ++thread)
      running.emplace_back([&, i, thread] {
        threadIdx.x = thread;
        blockIdx.x = numbers[i];
        gridDim.x = grid;
        here.block = &blocks[i];
        here.warp = &blocks[i].warps[thread / 32];
        here.lane = thread % 32;
        kernel();
      });
  for (std::thread& thread : running) thread.join();
}

// All but the last `missing` of them.
template <class Kernel>
void run_grid(int grid, int missing, int threads, size_t shared_bytes, Kernel kernel) {
  std::vector<int> numbers(grid - missing);
  std::iota(numbers.begin(), numbers.end(), 0);
  run_blocks(numbers, grid, threads, shared_bytes, kernel);
}

// `show` puts this lane's part into the place of this exchange, where all lanes' are once it returns.
template <class Show>
const Lanes& exchanged(Show show) {
  Lanes& lanes = here.warp->lanes[here.exchanges++ % 2];
  show(lanes);
  here.warp->barrier.arrive_and_wait();
  return lanes;
}

}  // namespace host

// Words that blocks tell each other -------------------------------------------------------------------------------------

inline uint4 load_words(const u32* from) {
  if (int(blockIdx.x) == host::slow_block) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  const auto load = [from](int i) { return std::atomic_ref<u32>(const_cast<u32*>(from)[i]).load(std::memory_order_relaxed); };
  return {load(0), load(1), load(2), load(3)};
}

inline u32 load_word(const u32* from) { return std::atomic_ref<u32>(*const_cast<u32*>(from)).load(std::memory_order_relaxed); }

inline void store_word(u32* to, u32 word) { std::atomic_ref<u32>(*to).store(word, std::memory_order_relaxed); }

inline void tell_host(u32* flag) { std::atomic_ref<u32>(*flag).store(1, std::memory_order_relaxed); }

inline void pause() { std::this_thread::yield(); }

inline u64 nanoseconds() {
  const u64 now = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
  return host::clock_goes_back ? ~now : now;
}

inline void raise(u32* flag) { std::atomic_ref<u32>(*flag).store(1, std::memory_order_relaxed); }
inline bool raised(const u32* flag) { return std::atomic_ref<u32>(*const_cast<u32*>(flag)).load(std::memory_order_relaxed) != 0; }

// Those of bench/probe.cu
inline void add_release(u32* to, u32 value) { std::atomic_ref<u32>(*to).fetch_add(value, std::memory_order_release); }
inline u32 load_acquire(const u32* from) { return std::atomic_ref<u32>(*const_cast<u32*>(from)).load(std::memory_order_acquire); }

// What nobody writes during the launch ----------------------------------------------------------------------------------

inline float load_ahead(const float* from) { return *from; }
inline uint2 load_ahead(const uint2* from) { return *from; }
inline u16 load_ahead(const u16* from) { return *from; }

template <int kBytes>
void copy_async(void* to, const void* from) {
  std::memset(to, 0xff, kBytes);
  host::here.groups.back().push_back({to, from, kBytes});
}

inline void end_group_of_copies() { host::here.groups.emplace_back(); }

template <int kGroups>
void wait_for_copies() {
  auto& groups = host::here.groups;
  while (groups.size() > kGroups + 1) {
    for (const host::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.pop_front();
  }
}

// As single copies are spoiled when asked for, and filled by whoever waits for them first.
inline void init_barrier(u64* barrier, int) {
  const std::lock_guard lock(host::here.block->copying);
  host::here.block->copies[barrier] = {};
}

inline void copy_unit(char* to, const char* from, int bytes, int thread, int threads, u64* barrier) {
  if (thread != threads - 1) return;
  std::memset(to, 0xff, bytes);
  const std::lock_guard lock(host::here.block->copying);
  host::here.block->copies.at(barrier).asked.push_back({to, from, bytes});
}

inline void wait_for_copy(u64* barrier, u32 parity) {
  for (;; std::this_thread::yield()) {
    const std::lock_guard lock(host::here.block->copying);
    auto& [asked, ended] = host::here.block->copies.at(barrier);
    if (ended % 2 == parity && !asked.empty()) {
      std::memcpy(asked.front().to, asked.front().from, asked.front().bytes);
      asked.pop_front();
      ++ended;
    }
    if (ended % 2 != parity) return;
  }
}

inline int opaque(int value) { return value; }

// Arithmetic ------------------------------------------------------------------------------------------------------------

inline float as_float(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline u32 as_bits(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline u32 multiply_high(u32 a, u32 b) { return u32(u64(a) * b >> 32); }

inline float silu(float value) { return value / (1 + std::exp(-value)); }
inline float reciprocal_root(float value) { return 1 / std::sqrt(value); }
inline float sinpif(float value) { return float(std::sin(3.14159265358979323846 * value)); }
inline float cospif(float value) { return float(std::cos(3.14159265358979323846 * value)); }

inline float sum_of_warp(float value) {
  const int lane = host::here.lane;
  const host::Lanes& shown = host::exchanged([=](host::Lanes& lanes) { lanes.values[lane] = value; });
  float sums[32];
  std::copy(shown.values, shown.values + 32, sums);
  for (int lanes = 16; lanes > 0; lanes /= 2)
    for (int i = 0; i < lanes; ++i) sums[i] += sums[i + lanes];  // what every lane of a butterfly gets, bit for bit
  return sums[0];
}

inline uint4 load_matrix(const void* row) {
  const int lane = host::here.lane;
  const host::Lanes& shown = host::exchanged([=](host::Lanes& lanes) { lanes.rows[lane] = static_cast<const u16*>(row); });
  const auto pair = [&](int matrix) {
    const u16* from = shown.rows[8 * matrix + lane / 4] + 2 * (lane % 4);
    return u32(from[0]) | u32(from[1]) << 16;
  };
  return {pair(0), pair(1), pair(2), pair(3)};
}

namespace host {

// element(pair, i): of a pair in a word, the one that i's last bit says
template <class Element>
void multiply_add(float4& c, uint4 a, uint2 b, Element element) {
  const int lane = host::here.lane;
  const host::Lanes& shown = host::exchanged([=](host::Lanes& lanes) {
    lanes.a[lane] = a;
    lanes.b[lane] = b;
  });
  const auto sum = [&](int row, int column, float value) {
    for (int k = 0; k < 16; ++k) {
      const uint4& rows = shown.a[row % 8 * 4 + k % 8 / 2];
      const uint2& columns = shown.b[column * 4 + k % 8 / 2];
      const u32 left = k < 8 ? (row < 8 ? rows.x : rows.y) : (row < 8 ? rows.z : rows.w);
      value += element(left, k) * element(k < 8 ? columns.x : columns.y, k);
    }
    return value;
  };
  const int row = lane / 4, column = 2 * (lane % 4);
  c = {sum(row, column, c.x), sum(row, column + 1, c.y), sum(row + 8, column, c.z), sum(row + 8, column + 1, c.w)};
}

}  // namespace host

struct Bfloat16 {
  static float low(u32 pair) { return as_float(pair << 16); }
  static float high(u32 pair) { return as_float(pair & 0xffff0000u); }
  static u32 pack(float low, float high) {
    const auto round = [](float value) -> u32 {
      const u32 bits = as_bits(value);
      return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    };
    return round(low) | round(high) << 16;
  }
  static u32 held(u32 pair) { return pair; }
  static void multiply_add(float4& c, uint4 a, uint2 b) {
    host::multiply_add(c, a, b, [](u32 pair, int i) { return i % 2 ? high(pair) : low(pair); });
  }
};

struct Float16 {
  static float low(u32 pair) {
    const u16 bits = u16(pair);
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return float(value);
  }
  static float high(u32 pair) { return low(pair >> 16); }
  static u32 pack(float low, float high) {
    const _Float16 values[2] = {_Float16(low), _Float16(high)};
    u32 pair;
    std::memcpy(&pair, values, 4);
    return pair;
  }
  static u32 held(u32 pair) {
    const auto hold = [](float value) { return value > 65504 ? 65504.f : value < -65504 ? -65504.f : value; };
    return pack(hold(low(pair)), hold(high(pair)));
  }
  static void multiply_add(float4& c, uint4 a, uint2 b) {
    host::multiply_add(c, a, b, [](u32 pair, int i) { return i % 2 ? high(pair) : low(pair); });
  }
};

}  // namespace disa_fast::cuda
