// What the kernel of mlp_denoise.cuh is given. disa_fast/backends/cuda.py has the same structure, field by field.
#pragma once

namespace disa_fast::cuda {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int kColumns = 8;    // output columns of a tile: the N of the matrix instruction
constexpr int kRows = 16;      // rows that a group of blocks draws, at most: its M
constexpr int kChannels = 16;  // of a token, at most
constexpr int kOutTiles = 2 * kChannels / kColumns;
constexpr int kTableColumns = 8;  // a, b, c, l0, l1, noisy, and two unused

// Shapes in brackets, row-major, float32 where nothing else is said; tiles = width / 8. Rows are the conditional half and then,
// where guided, the unconditional half of the trajectories.
struct MlpDenoise {
  const uint2* units;      // [2*depth*tiles + kOutTiles][width/16][32] pieces of weights; see mlp_denoise.cuh
  const float* bias;       // [2*depth][width]
  const float* out_bias;   // [2*kChannels]: o, then v
  const float* in_weight;  // [width][kChannels]
  const float* in_bias;    // [width]
  const u16* modulation;   // [steps][rows][(3*depth + 2)*width] of 16 bits: shift, scale, gate a block; final shift, scale
  const float* table;      // [steps][kTableColumns], rows of a StepTable
  const float* scalars;    // guidance scale, temperature
  const float* noise;      // [steps][trajectories][channels], or null
  const u64* philox;       // seed, then a stream for each trajectory: noise is drawn here; or null
  u32* x;                  // [trajectories][channels], in and out, as the bits of float32
  u32* before;             // the same: the network's output of the step before
  u32* words;              // [groups][3][kRows][width], zero: what blocks tell each other: h (two buffers), u
  float* dump;             // [rows][width], for DISA_FAST_DUMP
  u32* gave_up;            // in the host's memory: becomes 1 where the launch gives up
  u64 patience;            // nanoseconds that the launch may take before it gives up, leaving NaN
  int width, depth, channels, steps, trajectories, guided;
  int first_step;                        // of this launch among the trajectory's, which philox counts
  int blocks;                            // of a group; each group draws its share of the trajectories:
  int each, more;                        // so many, and the first `more` groups one more
  int activations_at, own_at, units_at;  // bytes into shared memory; see mlp_denoise.cuh
  int out_resident;                      // whether the output layer's units stay in shared memory
  int resident;                          // units of the blocks that stay there, of 2*depth*(own tiles)
  int ring;  // units that the others stream through: 0, 1, 2 or 4; not 1 where a block has several tiles
  int dump_step, dump_phase;
};

}  // namespace disa_fast::cuda
