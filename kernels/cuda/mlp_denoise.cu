// Entry points, for nvcc and for NVRTC: the published widths, and any other multiple of 16; in bfloat16 and in float16.
#include "mlp_denoise.cuh"

using disa_fast::cuda::Bfloat16;
using disa_fast::cuda::Float16;
using disa_fast::cuda::Loop;
using disa_fast::cuda::MlpDenoise;

// Budget of an entry, which `make kernels` holds it to. One block owns a multiprocessor: all 65536 registers over 512 threads; all
// its shared memory, dynamic, as disa_fast/backends/cuda.py plans it; nothing spilled.
[[maybe_unused]] constexpr int kMaxRegisters = 128;
[[maybe_unused]] constexpr int kMaxStackBytes = 0;
[[maybe_unused]] constexpr int kMaxStaticSharedBytes = 0;

static_assert(kMaxRegisters * 32 * 16 <= 65536, "so many registers there are");

#define DISA_FAST_ENTRY(name, width, Number)                                                                                 \
  extern "C" __global__ void __launch_bounds__(disa_fast::cuda::kThreads, 1) name(const __grid_constant__ MlpDenoise call) { \
    Loop<width, Number>(call).run();                                                                                         \
  }

DISA_FAST_ENTRY(mlp_denoise_1024, 1024, Bfloat16)
DISA_FAST_ENTRY(mlp_denoise_1280, 1280, Bfloat16)
DISA_FAST_ENTRY(mlp_denoise_1536, 1536, Bfloat16)
DISA_FAST_ENTRY(mlp_denoise_any, 0, Bfloat16)
DISA_FAST_ENTRY(mlp_denoise_1024_float16, 1024, Float16)
DISA_FAST_ENTRY(mlp_denoise_1280_float16, 1280, Float16)
DISA_FAST_ENTRY(mlp_denoise_1536_float16, 1536, Float16)
DISA_FAST_ENTRY(mlp_denoise_any_float16, 0, Float16)
