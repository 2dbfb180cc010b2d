// Which kernels this processor can run.
#pragma once

#include <vector>

#include "kernels.h"

namespace disa_fast::cpu {

// Best first; the last run anywhere.
std::vector<const Kernels*> kernels_here();

}  // namespace disa_fast::cpu
