// The arithmetic of the CPU core, compiled once per instruction set (kernels.cpp) and chosen at run time (isa.h).
//
// Member functions are always inlined: an out-of-line copy made for one instruction set would be shared by all the program.
#pragma once

#include <cstddef>
#include <cstdint>

namespace disa_fast::cpu {

// Weights lie in panels of this many output columns, [panel][k][column]; bfloat16 in pairs of k, [panel][k/2][column][2].
constexpr int kPanel = 32;

// Products are summed over this many k on their own and then added to the total, whatever the number of rows: this keeps the
// rounding error of a long sum down, and it is what makes a row's bits independent of the rows beside it.
constexpr int kBlockK = 128;

// The most rows of one call of linear_panel: their blocks of input, and a block of the panel, stay in the level-2 cache.
constexpr int kTaskRows = 112;

enum class Storage { float32, bfloat16 };

// weight [columns, k] in panels, zeros up to whole panels and up to an even k; bias [columns], zeros likewise.
struct Linear {
  const void* panels;
  const float* bias;
  int k;        // even
  int columns;  // a multiple of kPanel
  Storage storage;

  [[gnu::always_inline]] size_t panel_bytes() const { return size_t(k) * kPanel * (storage == Storage::float32 ? 4 : 2); }
  [[gnu::always_inline]] int panel_count() const { return columns / kPanel; }
};

// A row-major matrix of which `rows` rows, `stride` floats apart, take part.
struct Matrix {
  float* data;
  size_t stride;

  [[gnu::always_inline]] float* row(size_t r) const { return data + r * stride; }
  [[gnu::always_inline]] Matrix from(size_t r) const { return {row(r), stride}; }
};

enum class Epilogue {
  store,           // out = x
  silu,            // out = x / (1 + exp(-x))
  gated_residual,  // out += gate * x
};

struct Kernels {
  const char* name;

  // The columns of one panel of epilogue(in @ weight^T + bias) for `rows` rows, at most kTaskRows. in: [rows, k], zeros beyond the
  // true k.
  void (*linear_panel)(const Linear& linear, int panel, Matrix in, int rows, Epilogue epilogue, Matrix out, Matrix gate);

  // out[j] = (in[j] - mean) / sqrt(variance + eps) * scale[j] + shift[j] for j < padded, a multiple of kPanel; the statistics are
  // those of the first `width`.
  void (*normalize)(const float* in, const float* shift, const float* scale, int width, int padded, float eps, float* out);

  // out = silu(a + b), `count` a multiple of kPanel.
  void (*silu_sum)(const float* a, const float* b, int count, float* out);

  // What the machine can do, for benchmarks: reads `bytes` once; multiply-adds in registers, returns how many were done.
  float (*read_memory)(const void* data, size_t bytes);
  int64_t (*multiply_add)(int64_t rounds, float* sink);
};

}  // namespace disa_fast::cpu
