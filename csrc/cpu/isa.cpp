#include "isa.h"

namespace disa_fast::cpu {

#if defined(DISA_FAST_X86)
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_portable;

std::vector<const Kernels*> kernels_here() {
  std::vector<const Kernels*> here;
#if defined(DISA_FAST_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma")) here.push_back(&kernels_avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) here.push_back(&kernels_avx2);
#endif
  here.push_back(&kernels_portable);
  return here;
}

}  // namespace disa_fast::cpu
