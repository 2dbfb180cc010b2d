// The denoising loop of the MLP head on a CPU: all steps of a StepTable for all rows in one call.
#pragma once

#include <vector>

#include "kernels.h"

namespace disa_fast::cpu {

// A head's weights after the hoists, owned by the caller. Parts of the modulation that belong to one block lie side by side: shift,
// scale and gate of every block, then shift and scale of the final layer, each `padded` columns.
struct MlpWeights {
  int channels;  // of the state
  int width;
  float eps;  // of the layer norms
  Linear modulation;
  Linear input;
  std::vector<Linear> first, second;  // of every block
  Linear output;                      // eps in columns [0, channels), v in [channels, 2 * channels)

  int padded() const { return input.columns; }  // width, rounded up to a multiple of kPanel
};

// Step i, with (o, v) the network's output after guidance and o_before that of the step before:
//   x <- a[i] x + b[i] o + c[i] o_before + exp((l0[i] + l1[i] v) / 2) noise[i] temperature     (no noise unless noisy[i])
struct Steps {
  int count;
  const double *a, *b, *c, *l0, *l1;
  const bool* noisy;
};

struct MlpDenoise {
  const MlpWeights* weights;
  Steps steps;
  const float* times;  // [steps, padded], time_embed
  const float*
      conditions;  // [rows, padded], cond_embed(z); rows = trajectories, or 2 * trajectories under guidance, conditional half first
  const float* step_noise;  // [steps, trajectories, channels]; null where no step is noisy
  float* state;             // [trajectories, channels]: the start, and then the result
  int trajectories;
  bool guided;
  double cfg, temperature;
};

// Runs the loop on at most `threads` threads. A row's result does not depend on their number or on the other rows. Throws
// std::bad_alloc.
void mlp_denoise(const MlpDenoise& call, const Kernels& kernels, int threads);

// out = epilogue(in @ weight^T + bias), [rows, columns] contiguous; in: [rows, k]. The same promise about rows and threads.
void linear(const Linear& linear, const Kernels& kernels, Matrix in, int rows, Epilogue epilogue, float* out, int threads);

}  // namespace disa_fast::cpu
