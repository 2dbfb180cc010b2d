// Which kernels this processor can run.
#include <cstring>
#include <string>

#include "kernels.h"

namespace disa_fast::cpu {

#if defined(DISA_FAST_X86)
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_portable;

namespace {

struct Choice {
  const Kernels* kernels;
  bool here;
};

const auto& choices() {
  static const Choice best_first[] = {
#if defined(DISA_FAST_X86)
      {&kernels_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma")},
      {&kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&kernels_portable, true},
  };
  return best_first;
}

}  // namespace

const Kernels* kernels_for(const char* name) {
  for (const Choice& choice : choices())
    if (choice.here && (!name || !std::strcmp(name, choice.kernels->name))) return choice.kernels;
  return nullptr;
}

const char* kernel_names() {
  static const std::string names = [] {
    std::string all;
    for (const Choice& choice : choices())
      if (choice.here) all += (all.empty() ? "" : " ") + std::string(choice.kernels->name);
    return all;
  }();
  return names.c_str();
}

}  // namespace disa_fast::cpu
