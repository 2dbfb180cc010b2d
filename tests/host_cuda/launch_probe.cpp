// bench/probe.cu on the threads of this machine, as a library for tests.
#include <cstddef>
#include <map>
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
  host::run_grid(grid, missing, kThreads, 0, [=] { entry(*probe); });
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
