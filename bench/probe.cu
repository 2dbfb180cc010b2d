// What limits mlp_denoise.cuh, for bench/probes.py: an empty launch, a barrier of the grid, an exchange of activations as that
// kernel does it and as one with barriers would, and reading from level 2. Every kernel is launched cooperatively, with kThreads.
#include "mlp_denoise.cuh"

namespace disa_fast::cuda {

// The barrier's instructions. tests/host_cuda/ptx.h has the same names.
#if defined(__CUDACC__)
__device__ __forceinline__ void add_release(u32* to, u32 value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ u32 load_acquire(const u32* from) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
#endif

// bench/probes.py has the same structure, field by field.
struct Probe {
  u32* words;    // of exchanges: [2][kRows][width], zero; for level 2: [quadruples][4]
  u32* counter;  // how often blocks have come to the barrier: zero
  u32* sums;     // [blocks][kThreads]: of all words that a thread has read
  u32* failed;   // becomes 1 where a barrier let blocks through too early, or somebody waited too long
  u64 patience;  // nanoseconds that the launch may take before whoever waits gives up
  int rows, rounds, quadruples;
};

// How long a thread has been waiting, which it asks rarely.
class Patience {
 public:
  __device__ __forceinline__ explicit Patience(const Probe& p) : p(p), begin(nanoseconds()) {}

  // Whether to read again. tries: how often has been read.
  __device__ __forceinline__ bool lasts(u32 tries) {
    if (tries % 64 == 0 && static_cast<long long>(nanoseconds() - begin) > static_cast<long long>(p.patience)) {
      over = true;
      store_word(p.failed, 1);
    }
    pause();
    return !over;
  }

  __device__ __forceinline__ bool is_over() const { return over; }

 private:
  const Probe& p;
  u64 begin;
  bool over = false;
};

// Waits until all blocks have come here for the `round`th time.
__device__ __forceinline__ void wait_for_blocks(const Probe& p, u32 round, Patience& patience) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const u32 expected = round * gridDim.x;
    add_release(p.counter, 1);
    u32 seen = load_acquire(p.counter);
    for (u32 tries = 1; int(seen - expected) < 0 && !patience.is_over() && patience.lasts(tries); ++tries)
      seen = load_acquire(p.counter);
    if (seen - expected >= gridDim.x) store_word(p.failed, 1);  // nobody can be two barriers ahead
  }
  __syncthreads();
}

// The word of a place in a round, with the round in its lowest bits.
__device__ __forceinline__ u32 told(u32 round, u32 place) {
  return ((round * 0x9E3779B9u ^ place * 0x85EBCA6Bu) & ~3u) | (round & 3u);
}

__device__ __forceinline__ u32 sum_of(uint4 w) { return (w.x + w.y) + (w.z + w.w); }

// Every block tells its columns of all rows, and a warp reads whole rows: with a barrier in between, or until all words of a row
// are those of the round. Then, as in mlp_denoise.cuh, the block waits for itself. Two buffers in turns, for the same reason as
// there.
template <int kWidth, bool kBarrier>
__device__ __forceinline__ void exchange(const Probe& p) {
  constexpr int kEach = kWidth / 128;
  static_assert(kWidth % 128 == 0, "a warp reads whole rows");
  const int thread = threadIdx.x, lane = thread % 32, own_row = thread / kColumns;
  const auto column = [lane](int i) { return (i * 32 + lane) * 4; };
  Patience patience(p);
  u32 sum = 0;
#pragma unroll 1
  for (int round = 1; round <= p.rounds; ++round) {
    u32* words = p.words + round % 2 * kRows * kWidth;
    if (own_row < p.rows) {
      for (int tile = blockIdx.x; tile < kWidth / kColumns; tile += gridDim.x) {
        const int place = own_row * kWidth + tile * kColumns + thread % kColumns;
        store_word(words + place, told(round, place));
      }
    }
    if constexpr (kBarrier) wait_for_blocks(p, round, patience);
#pragma unroll 1
    for (int row = thread / 32; row < p.rows; row += kWarps) {
      const u32* from = words + row * kWidth;
      uint4 found[kEach];
      if constexpr (!kBarrier) {
        for (u32 tries = 1; !patience.is_over() && !all_of(load_words(from + column(kEach - 1)), round) && patience.lasts(tries);)
          ++tries;
      }
      const auto load = [&] {
#pragma unroll
        for (int i = 0; i < kEach; ++i) found[i] = load_words(from + column(i));
      };
      const auto is_there = [&] {
        bool there = true;
#pragma unroll
        for (int i = 0; i < kEach; ++i) there &= all_of(found[i], round);
        return there;
      };
      load();
      if constexpr (!kBarrier) {
        for (u32 tries = 1; !is_there() && !patience.is_over() && patience.lasts(tries); ++tries) load();
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum += sum_of(found[i]);
    }
    __syncthreads();
  }
  p.sums[blockIdx.x * kThreads + thread] = sum;
}

// Each block reads its own part of a buffer again and again, as it does with weights that stream.
__device__ __forceinline__ void read_again(const Probe& p) {
  constexpr int kAtOnce = 8;
  const int blocks = gridDim.x, block = blockIdx.x, each = (p.quadruples + blocks - 1) / blocks;
  const int begin = block * each, end = begin + each < p.quadruples ? begin + each : p.quadruples;
  u32 sum = 0;
#pragma unroll 1
  for (int round = 0; round < p.rounds; ++round) {
#pragma unroll 1
    for (int at = begin + int(threadIdx.x); at < end; at += kAtOnce * kThreads) {
      uint4 found[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        found[i] = at + i * kThreads < end ? load_words(p.words + 4 * size_t(at + i * kThreads)) : uint4{0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += sum_of(found[i]);
    }
  }
  p.sums[block * kThreads + int(threadIdx.x)] = sum;
}

}  // namespace disa_fast::cuda

#define DISA_FAST_PROBE(name, ...)                                              \
  extern "C" __global__ void __launch_bounds__(disa_fast::cuda::kThreads, 1)    \
      name([[maybe_unused]] const __grid_constant__ disa_fast::cuda::Probe p) { \
    using namespace disa_fast::cuda;                                            \
    __VA_ARGS__;                                                                \
  }

DISA_FAST_PROBE(probe_nothing, )
DISA_FAST_PROBE(probe_barrier, Patience patience(p);
                for (int round = 1; round <= p.rounds; ++round) wait_for_blocks(p, round, patience))
DISA_FAST_PROBE(probe_exchange_1024, exchange<1024, false>(p))
DISA_FAST_PROBE(probe_exchange_1280, exchange<1280, false>(p))
DISA_FAST_PROBE(probe_exchange_1536, exchange<1536, false>(p))
DISA_FAST_PROBE(probe_barrier_exchange_1024, exchange<1024, true>(p))
DISA_FAST_PROBE(probe_barrier_exchange_1280, exchange<1280, true>(p))
DISA_FAST_PROBE(probe_barrier_exchange_1536, exchange<1536, true>(p))
DISA_FAST_PROBE(probe_level2, read_again(p))
