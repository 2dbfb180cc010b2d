// kernels/cuda/mlp_denoise.cu on the threads of this machine, as a library for tests.
#include <cstddef>

#include "host_cuda/ptx.h"
#include "mlp_denoise.cu"

using namespace disa_fast::cuda;

extern "C" {

// missing: so many of the grid's last blocks never run.
void host_cuda_launch(void (*entry)(MlpDenoise), const MlpDenoise* call, int grid, int shared_bytes, int missing) {
  host::run_grid(grid, missing, kThreads, shared_bytes, [=] { entry(*call); });
}

void host_cuda_slow_block(int block) { host::slow_block = block; }

void host_cuda_clock_goes_back(bool goes_back) { host::clock_goes_back = goes_back; }

// Where each field lies, for cuda.py's structure to be compared with; returns how many there are.
int host_cuda_offsets(size_t* offsets) {
  const size_t found[] = {
#define AT(field) offsetof(MlpDenoise, field)
      AT(units),    AT(bias),         AT(out_bias), AT(in_weight), AT(in_bias),   AT(modulation),     AT(table),
      AT(scalars),  AT(noise),        AT(philox),   AT(x),         AT(before),    AT(words),          AT(dump),
      AT(gave_up),  AT(patience),     AT(width),    AT(depth),     AT(channels),  AT(steps),          AT(trajectories),
      AT(guided),   AT(first_step),   AT(blocks),   AT(each),      AT(more),      AT(activations_at), AT(own_at),
      AT(units_at), AT(out_resident), AT(resident), AT(ring),      AT(dump_step), AT(dump_phase),     sizeof(MlpDenoise),
#undef AT
  };
  std::memcpy(offsets, found, sizeof found);
  return sizeof found / sizeof *found;
}
}
