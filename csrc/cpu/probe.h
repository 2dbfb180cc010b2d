// What this machine can do, for benchmarks to hold results against.
#pragma once

#include "kernels.h"

namespace disa_fast::cpu {

// Reads `bytes` once with `threads` threads.
void read_memory(const Kernels& kernels, const void* data, size_t bytes, int threads);

// Multiply-adds of float32 in registers, `rounds` of them after one another in every thread. Returns how many were done by all.
double multiply_add(const Kernels& kernels, int64_t rounds, int threads);

}  // namespace disa_fast::cpu
