// Entry points, for nvcc and for NVRTC: the published widths, and any other multiple of 16.
#include "mlp_denoise.cuh"

using disa_fast::cuda::Loop;
using disa_fast::cuda::MlpDenoise;

// Budget of an entry, which `make kernels` holds it to. One block owns a multiprocessor: all 65536 registers over 512 threads; all
// its shared memory, dynamic, as disa_fast/backends/cuda.py plans it; nothing spilled.
[[maybe_unused]] constexpr int kMaxRegisters = 128;
[[maybe_unused]] constexpr int kMaxStackBytes = 0;
[[maybe_unused]] constexpr int kMaxStaticSharedBytes = 0;

static_assert(kMaxRegisters * 32 * 16 <= 65536, "so many registers there are");

#define DISA_FAST_ENTRY(name, width)                                                                                         \
  extern "C" __global__ void __launch_bounds__(disa_fast::cuda::kThreads, 1) name(const __grid_constant__ MlpDenoise call) { \
    Loop<width>(call).run();                                                                                                 \
  }

DISA_FAST_ENTRY(mlp_denoise_1024, 1024)
DISA_FAST_ENTRY(mlp_denoise_1280, 1280)
DISA_FAST_ENTRY(mlp_denoise_1536, 1536)
DISA_FAST_ENTRY(mlp_denoise_any, 0)
