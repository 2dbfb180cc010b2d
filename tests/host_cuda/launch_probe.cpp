// bench/probe.cu on the threads of this machine, as a library for tests.
#include <cstddef>
#include <map>
#include <memory>
#include <string>

#include "host_cuda/ptx.h"
#include "probe.cu"

namespace {

using namespace disa_fast::cuda;

const std::map<std::string, void (*)(Probe)> kEntries = {
#define ENTRY(name) {#name, name}
    ENTRY(probe_nothing),
    ENTRY(probe_barrier),
    ENTRY(probe_exchange_1024),
    ENTRY(probe_exchange_1280),
    ENTRY(probe_exchange_1536),
    ENTRY(probe_barrier_exchange_1024),
    ENTRY(probe_barrier_exchange_1280),
    ENTRY(probe_barrier_exchange_1536),
    ENTRY(probe_level2),
#undef ENTRY
};

}  // namespace

extern "C" {

// missing: so many of the grid's last blocks never run. slow: a block that takes its time to read, or -1.
void host_probe_launch(const char* name, const Probe* probe, int grid, int missing, int slow) {
  const auto entry = kEntries.at(name);
  host::slow_block = slow;
  std::vector<std::unique_ptr<host::Block>> blocks;
  std::vector<std::thread> threads;
  for (int i = 0; i < grid; ++i) blocks.push_back(std::make_unique<host::Block>(kThreads, 0));
  for (int block = 0; block < grid - missing; ++block)
    for (int thread = 0; thread < kThreads; ++thread)
      threads.emplace_back([&, block, thread] {
        threadIdx.x = thread;
        blockIdx.x = block;
        gridDim.x = grid;
        host::here.block = blocks[block].get();
        host::here.warp = &blocks[block]->warps[thread / 32];
        host::here.lane = thread % 32;
        entry(*probe);
      });
  for (std::thread& thread : threads) thread.join();
}

// Where each field lies, for probes.py's structure to be compared with; returns how many there are.
int host_probe_offsets(size_t* offsets) {
  const size_t found[] = {offsetof(Probe, words),  offsetof(Probe, counter),    offsetof(Probe, sums),
                          offsetof(Probe, failed), offsetof(Probe, patience),   offsetof(Probe, rows),
                          offsetof(Probe, rounds), offsetof(Probe, quadruples), sizeof(Probe)};
  std::memcpy(offsets, found, sizeof found);
  return sizeof found / sizeof *found;
}
}
