// The denoising loop of an MLP head in one launch: all steps, for up to kRows rows a group of blocks.
//
// For every step, and every block of the network
//     u = silu(W1 (norm(h) * scale + shift) + b1)
//     h = h + gate * (W2 u + b2)
// then the final layer, guidance, a row of the solver's table, and h of the next step from x: the formulas of
// disa_fast/heads/mlp.py and disa_fast/solvers/table.py, with hoists H1 to H6.
//
// Every thread block owns tiles of 8 columns of every layer: those weights, which stay in its shared memory as far as they fit
// and else stream through a ring there, and those columns of h, in float32. Of several tiles it computes two at a time, so that it
// reads activations and waits for its threads once for both. Activations go from each to all through level 2.
// There is no grid barrier. A word says by its two lowest bits which exchange it belongs to, so whoever needs it reads until it is
// there: one way to level 2 and one back, where data, fence, counter and data again are four. No word is overwritten too early: who
// has all of an exchange knows that all others have had all of the exchange before it; u has one buffer, with h between two of its
// exchanges, h has two, since h of the next step follows h of the last block.
//
// A row's bits depend on nothing but the row: the order of every sum is fixed by the width alone.
#pragma once

#if defined(__CUDACC__)
#include "ptx.cuh"
#else
#include "host_cuda/ptx.h"
#endif

#ifndef DISA_FAST_WARPS
#define DISA_FAST_WARPS 16
#endif

namespace disa_fast::cuda {

constexpr int kWarps = DISA_FAST_WARPS;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = kRows * kColumns;
constexpr int kPad = 8;  // elements behind a row of activations, so that a matrix is read without bank conflicts
constexpr int kTokenValues = kRows * kChannels;
constexpr int kTokenValuesEach = (kTokenValues + kThreads - 1) / kThreads;
constexpr int kPass = 2;  // tiles of a layer that a block computes at once
constexpr int kTilesAtOnce = kThreads / kTile;
constexpr int kOutputsEach = (kPass + kTilesAtOnce - 1) / kTilesAtOnce;
constexpr int kMaxRing = 2 * kPass;
constexpr float kEps = 1e-6f;
static_assert(kWarps % kOutTiles == 0 && kThreads % kTile == 0,
              "whole tiles are summed up at once, the output layer in whole parts");

// Shared memory of a block: bytes from its start
constexpr int kStateAt = 0;                             // x [kRows][kChannels]
constexpr int kBeforeAt = kStateAt + 4 * kTokenValues;  // the same
constexpr int kClockAt = kBeforeAt + 4 * kTokenValues;  // when the launch began, u64; whether it has given up, u32
constexpr int kBarriersAt = kClockAt + 16;              // of copies into the ring, [kMaxRing]
constexpr int kOutBiasAt = kBarriersAt + 8 * kMaxRing;  // [2 * kChannels]
constexpr int kPartialAt = kOutBiasAt + 8 * kChannels;
// of sums, [kPass, or 1 where a block owns one tile][kWarps][kRows][kColumns]. Then, where the caller says:
// - p.activations_at: [rows][width + kPad] of 16 bits
// - p.own_at, kOwn for each of the block's tiles: h [kRows][kColumns], and of the input layer [kColumns][kChannels + 1], [kColumns]
// - p.units_at: units of weights that stay, first the output layer's; then p.ring for those that stream
constexpr int kOwn = kTile + kColumns * (kChannels + 1) + kColumns;

// The words of an exchange: a float32 whose two lowest bits count exchanges.
__device__ __forceinline__ float value_of(u32 word) { return as_float(word & ~3u); }
__device__ __forceinline__ u32 word_of(float value, u32 exchange) { return (as_bits(value) & ~3u) | (exchange & 3u); }
__device__ __forceinline__ bool all_of(uint4 words, u32 exchange) {
  const u32 other = ((words.x ^ exchange) | (words.y ^ exchange) | (words.z ^ exchange) | (words.w ^ exchange)) & 3u;
  return other == 0;
}

// What a lane needs of a row, asked for once and kept in registers; for a width that is not known, asked for again each time.
template <class T, int kCount>
struct Kept {
  T values[kCount];
  template <class Load>
  __device__ __forceinline__ void fill(Load load) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = load(i);
  }
  template <class Load>
  __device__ __forceinline__ T at(int i, Load) const {
    return values[i];
  }
};

template <class T>
struct Kept<T, 0> {
  template <class Load>
  __device__ __forceinline__ void fill(Load) {}
  template <class Load>
  __device__ __forceinline__ T at(int i, Load load) const {
    return load(i);
  }
};

// kWidth: of the head, or 0 for any multiple of 16. Number: of weights, modulation and operands; see ptx.cuh.
template <int kWidth, class Number>
class Loop {
 public:
  __device__ explicit Loop(const MlpDenoise& call) : p(call), thread(threadIdx.x) {
    group = blockIdx.x / p.blocks;
    block = blockIdx.x % p.blocks;
    tiles = (width() / kColumns - block + p.blocks - 1) / p.blocks;
  }

  __device__ void run() {
    load_state();
    load_weights();
    __syncthreads();
    start_ring();
    project_input(0);
    wait_for_copies<0>();
    for (step = 0; step < p.steps; ++step) {
      for (int i = 0; i < p.depth; ++i) {
        first_half(i);
        second_half(i);
      }
      finish_step();
    }
    store_state();
    if (thread == 0 && raised(gave_up())) tell_host(p.gave_up);
  }

 private:
  // Phases --------------------------------------------------------------------------------------------------------------

  // u = silu(W1 (norm(h) * scale + shift) + b1)
  __device__ void first_half(int i) {
    thread = opaque(thread);
    float bias[kOutputsEach];
    const auto ahead = [&](int j, int tile) { bias[j] = load_ahead(p.bias + 2 * i * width() + column_of(tile)); };
    for_outputs(0, ahead);
    gather_normalized(h_exchange(i), 3 * i * width());
    layer(2 * i, ahead,
          [&](int j, int tile, float sum) { publish(u_words(), u_exchange(i), tile, silu(sum + bias[j]), 2 * i + 1); });
  }

  // h = h + gate * (W2 u + b2)
  __device__ void second_half(int i) {
    thread = opaque(thread);
    float bias[kOutputsEach], gate[kOutputsEach];
    const auto ahead = [&](int j, int tile) {
      bias[j] = load_ahead(p.bias + (2 * i + 1) * width() + column_of(tile));
      gate[j] = Number::low(load_ahead(modulation_of(output_row()) + (3 * i + 2) * width() + column_of(tile)));
    };
    for_outputs(0, ahead);
    gather_hidden(u_exchange(i));
    layer(2 * i + 1, ahead, [&](int j, int tile, float sum) {
      float& h = residual(tile)[thread % kTile];
      h += gate[j] * (sum + bias[j]);
      publish(h_words(h_exchange(i + 1)), h_exchange(i + 1), tile, h, 2 * i + 2);
    });
  }

  // Final layer, guidance, the solver's update, and h of the next step; all blocks of a group do the same for all its tokens.
  __device__ void finish_step() {
    thread = opaque(thread);
    float noise[kTokenValuesEach];
#pragma unroll
    for (int j = 0; j < kTokenValuesEach; ++j) noise[j] = noise_of(thread + j * kThreads);

    gather_normalized(h_exchange(p.depth), 3 * p.depth * width());
    __syncthreads();
    const float* row = p.table + step * kTableColumns;
    const float a = load_ahead(row), b = load_ahead(row + 1), c = load_ahead(row + 2), l0 = load_ahead(row + 3),
                l1 = load_ahead(row + 4), noisy = load_ahead(row + 5), cfg = load_ahead(p.scalars),
                temperature = load_ahead(p.scalars + 1);
    const int tile = warp() % kOutTiles;
    const uint2* unit = reinterpret_cast<const uint2*>(p.out_resident ? out_unit(tile) : global_unit(out_place(tile)));
    products<kWarps / kOutTiles, 1>(&unit, warp() / kOutTiles, partial(warp()));
    __syncthreads();

#pragma unroll
    for (int j = 0; j < kTokenValuesEach; ++j) {
      const int t = (thread + j * kThreads) / kChannels, channel = (thread + j * kThreads) % kChannels;
      if (t >= n() || channel >= p.channels) continue;
      float o = network_output(t, channel);
      if (p.guided) {
        const float unconditional = network_output(n() + t, channel);
        o = unconditional + cfg * (o - unconditional);
      }
      float& state = x()[t * kChannels + channel];
      float& last = before()[t * kChannels + channel];
      float next = a * state + b * o + c * last;
      if (noisy != 0) next += expf((l0 + l1 * network_output(t, kChannels + channel)) / 2) * noise[j] * temperature;
      state = next;
      last = o;
    }
    __syncthreads();
    if (step + 1 < p.steps) project_input(step + 1);
  }

  // h of step `of` from x
  __device__ void project_input(int of) {
    const u32 exchange = of * (p.depth + 1) + 1;
#pragma unroll 1
    for (int o = thread; o < tiles * kTile; o += kThreads) {
      const int tile = o / kTile, row = o % kTile / kColumns, column = o % kColumns;
      if (row >= rows()) continue;
      const float *token = x() + (row < n() ? row : row - n()) * kChannels, *weight = in_weight(tile) + column * (kChannels + 1);
      float sum = in_bias(tile)[column];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum += token[c] * weight[c];
      residual(tile)[o % kTile] = sum;
      const int own = (block + tile * p.blocks) * kColumns + column;
      store_word(h_words(exchange) + row * width() + own, word_of(sum, exchange));
      dump(of, 0, row, own, sum);
    }
  }

  // Activations, from all blocks to this one's shared memory ------------------------------------------------------------------

  // norm(h) * scale + shift; shift begins at `column` of the modulation, scale a width behind. A warp takes a row.
  __device__ void gather_normalized(u32 exchange, int column) {
    for_rows([&](int row) {
      thread = opaque(thread);
      const u32* words = h_words(exchange) + row * width() + lane_column();
      const u16* modulation = modulation_of(row) + column + lane_column();
      u16* into = activations(row) + lane_column();
      const auto load_scale = [&](int i) { return load_ahead(reinterpret_cast<const uint2*>(modulation + width() + i * kApart)); };
      const auto load_h = [&](int i) { return load_or_lose(words, exchange, i); };
      // Ahead, since they do not depend on h: scale to registers, shift to where the result will be.
      Kept<uint2, kEach> scales;
      Kept<uint4, kEach> h;
      for_each([&](int i) { copy_async<8>(into + i * kApart, modulation + i * kApart); });
      end_group_of_copies();
      scales.fill(load_scale);
      wait_for(words, exchange, h);

      float sum = 0;
      for_each([&](int i) {
        const uint4 w = h.at(i, load_h);
        sum += (value_of(w.x) + value_of(w.y)) + (value_of(w.z) + value_of(w.w));
      });
      thread = opaque(thread);
      const float mean = sum_of_warp(sum) * (1.f / width());
      float squares = 0;
      for_each([&](int i) {
        const uint4 w = h.at(i, load_h);
        const float d[4] = {value_of(w.x) - mean, value_of(w.y) - mean, value_of(w.z) - mean, value_of(w.w) - mean};
        squares += (d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3]);
      });
      wait_for_copies<0>();
      const float inverse = reciprocal_root(sum_of_warp(squares) * (1.f / width()) + kEps);
      for_each([&](int i) {
        const uint4 w = h.at(i, load_h);
        uint2& m = *reinterpret_cast<uint2*>(into + i * kApart);
        const uint2 shift = m, scale = scales.at(i, load_scale);
        const auto modulated = [&](u32 low, u32 high, u32 scale, u32 shift) {
          return operands((value_of(low) - mean) * inverse * Number::low(scale) + Number::low(shift),
                          (value_of(high) - mean) * inverse * Number::high(scale) + Number::high(shift));
        };
        m = {modulated(w.x, w.y, scale.x, shift.x), modulated(w.z, w.w, scale.y, shift.y)};
      });
    });
  }

  // u, rounded
  __device__ void gather_hidden(u32 exchange) {
    for_rows([&](int row) {
      const u32* words = u_words() + row * width() + lane_column();
      const auto load_u = [&](int i) { return load_or_lose(words, exchange, i); };
      u16* into = activations(row) + lane_column();
      Kept<uint4, kEach> u;
      wait_for(words, exchange, u);
      for_each([&](int i) {
        const uint4 w = u.at(i, load_u);
        const uint2 m = {operands(value_of(w.x), value_of(w.y)), operands(value_of(w.z), value_of(w.w))};
        *reinterpret_cast<uint2*>(into + i * kApart) = m;
      });
    });
  }

  // f(row) for the rows of a warp: one, where there are warps for all.
  template <class F>
  __device__ __forceinline__ void for_rows(F f) {
    if constexpr (kWarps >= kRows) {
      if (warp() < rows()) f(warp());
    } else {
      for (int row = warp(); row < rows(); row += kWarps) f(row);
    }
  }

  // Two operands of a product. Beyond the range of float16 they are its largest number: an infinity would turn into NaN further on.
  __device__ __forceinline__ static u32 operands(float low, float high) { return Number::held(Number::pack(low, high)); }

  // Until all words of a row belong to `exchange`; those that did not are read again. Where the launch gives up one of them becomes
  // NaN, which spreads from here over the row, and to all blocks.
  template <int kCount>
  __device__ __forceinline__ void wait_for(const u32* words, u32 exchange, Kept<uint4, kCount>& kept) {
    if constexpr (kCount > 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) kept.values[i] = load_words(words + i * kApart);
      for (u32 tries = 1;; ++tries) {
        bool there = true;
#pragma unroll
        for (int i = 0; i < kCount; ++i) there &= all_of(kept.values[i], exchange);
        if (there) return;
        if (tries % 64 == 0 && has_given_up()) {
          kept.values[0].x = ~0u;
          return;
        }
        pause();
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          if (!all_of(kept.values[i], exchange)) kept.values[i] = load_words(words + i * kApart);
      }
    } else {
      for_each([&](int i) {
        for (u32 tries = 1; !all_of(load_words(words + i * kApart), exchange); ++tries) {
          if (tries % 64 == 0 && has_given_up()) return;
          pause();
        }
      });
    }
  }

  // Again, after waiting
  __device__ __forceinline__ uint4 load_or_lose(const u32* words, u32 exchange, int i) const {
    uint4 w = load_words(words + i * kApart);
    if (!all_of(w, exchange)) w.x = ~0u;
    return w;
  }

  // The clock may be set back meanwhile.
  __device__ bool has_given_up() {
    if (!raised(gave_up()) && i64(nanoseconds() - *shared<u64>(kClockAt)) > i64(p.patience)) raise(gave_up());
    return raised(gave_up());
  }

  // Products ------------------------------------------------------------------------------------------------------------------

  // store(j, tile, sum) for each output of the block's tiles of a layer, by the thread whose j-th of a pass it is. ahead(j, tile):
  // what `store` needs, asked for before; the caller does so for the first pass. The activations' writers need not have waited for
  // each other.
  template <class Ahead, class Store>
  __device__ __forceinline__ void layer(int number, Ahead ahead, Store store) {
    thread = opaque(thread);
#pragma unroll 1
    for (int first = 0; first < tiles; first += kPass) {
      const int index = number * tiles + first, count = tiles - first < kPass ? tiles - first : kPass;
      const uint2* units[kPass];
      units[0] = weights(index);
      if (count > 1) units[1] = weights(index + 1);
      __syncthreads();  // activations are written; sums of the pass before are read
      if (count > 1)
        products<kWarps, 2>(units, warp(), partial(warp()));
      else
        products<kWarps, 1>(units, warp(), partial(warp()));
      __syncthreads();
      for_outputs(first, [&](int j, int tile) {
        const float* sums = partial((tile - first) * kWarps) + thread % kTile;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += sums[w * kTile];
        store(j, tile, sum);
      });
#pragma unroll 1
      for (int i = index < p.resident ? p.resident : index; i < index + count; ++i) stream(i + p.ring);
      if (first + kPass < tiles) for_outputs(first + kPass, ahead);
    }
  }

  // f(j, tile) for the outputs of the pass from `first` on that are this thread's.
  template <class F>
  __device__ __forceinline__ void for_outputs(int first, F f) const {
#pragma unroll
    for (int j = 0; j < kOutputsEach; ++j) {
      const int tile = first + thread / kTile + j * kTilesAtOnce;
      if (tile < tiles && tile < first + kPass && output_row() < rows()) f(j, tile);
    }
  }

  // Part `part` of kParts of the sums of activations [rows, width] times each unit, by a warp; sums: [kRows][kColumns], of the
  // second unit kWarps behind. Rows beyond the group's are the last row again.
  template <int kParts, int kUnits>
  __device__ __forceinline__ void products(const uint2* const* units, int part, float* sums) {
    const int pieces = width() / 16, begin = pieces * part / kParts;
    const int count = pieces % kParts == 0 ? pieces / kParts : pieces * (part + 1) / kParts - begin;
    const int row = lane() % 16 < rows() ? lane() % 16 : rows() - 1;
    const u16* from = activations(row) + lane() / 16 * 8 + begin * 16;
    const int at = begin * 32 + lane();
    float4 even[kUnits] = {}, odd[kUnits] = {};  // two sums, so that an instruction need not wait for the one before
    const auto add = [&](int k, float4(&to)[kUnits]) {
      const uint4 matrix = load_matrix(from + k * 16);
#pragma unroll
      for (int i = 0; i < kUnits; ++i) Number::multiply_add(to[i], matrix, units[i][at + k * 32]);
    };
#pragma unroll 4
    for (int k = 0; k + 1 < count; k += 2) {
      add(k, even);
      add(k + 1, odd);
    }
    if (count % 2) add(count - 1, even);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      float* to = sums + i * kWarps * kTile + lane() / 4 * kColumns + lane() % 4 * 2;
      *reinterpret_cast<float2*>(to) = {even[i].x + odd[i].x, even[i].y + odd[i].y};
      *reinterpret_cast<float2*>(to + 8 * kColumns) = {even[i].z + odd[i].z, even[i].w + odd[i].w};
    }
  }

  // (o, v) of the final layer: one value of a row, all parts of the sum.
  __device__ float network_output(int row, int output) {
    float sum = shared<float>(kOutBiasAt)[output];
    const int tile = output / kColumns;
    for (int w = tile; w < kWarps; w += kOutTiles) sum += partial(w)[row * kColumns + output % kColumns];
    return sum;
  }

  // Tells all blocks an output of this one.
  __device__ __forceinline__ void publish(u32* words, u32 exchange, int tile, float value, int phase) {
    store_word(words + output_row() * width() + column_of(tile), word_of(value, exchange));
    dump(step, phase, output_row(), column_of(tile), value);
  }

  // Weights -------------------------------------------------------------------------------------------------------------------

  // Those that stay; begins to.
  __device__ void load_weights() {
    if (p.out_resident)
      for (int tile = 0; tile < kOutTiles; ++tile) load_unit(out_unit(tile), out_place(tile));
    for (int index = 0; index < p.resident && index < own(); ++index) load_unit(unit(index), place_of(index));
    end_group_of_copies();
  }

  __device__ void load_unit(char* to, int place) {
    const char* from = global_unit(place);
    for (int at = 16 * thread; at < unit_bytes(); at += 16 * kThreads) copy_async<16>(to + at, from + at);
  }

  // Of the block's unit `index`, which is there once this returns
  __device__ const uint2* weights(int index) {
    if (index < p.resident) return reinterpret_cast<const uint2*>(unit(index));
    const int use = use_of(index);
    wait_for_copy(barrier(use), use & p.ring ? 1 : 0);
    return reinterpret_cast<const uint2*>(slot(use));
  }

  // How many have been in the ring before unit `index` of this step
  __device__ int use_of(int index) const { return step * (own() - p.resident) + index - p.resident; }

  __device__ void start_ring() {
    if (p.resident >= own()) return;
#pragma unroll 1
    for (int i = 0; i < p.ring; ++i) stream(p.resident + i);
  }

  // Asks for unit `index`; those beyond the last are of the next steps, if there are so many.
  __device__ void stream(int index) {
    const int use = use_of(index);
    int of = step;
    for (; index >= own(); index -= own() - p.resident) ++of;
    if (of < p.steps) copy_unit(slot(use), global_unit(place_of(index)), unit_bytes(), thread, kThreads, barrier(use));
  }

  __device__ int own() const { return 2 * p.depth * tiles; }

  // Of a unit of this block (layer * tiles + tile) among all blocks'.
  __device__ int place_of(int index) const { return index / tiles * (width() / kColumns) + block + index % tiles * p.blocks; }
  __device__ int out_place(int tile) const { return 2 * p.depth * (width() / kColumns) + tile; }
  __device__ const char* global_unit(int place) const {
    return reinterpret_cast<const char*>(p.units) + size_t(place) * unit_bytes();
  }

  // State ---------------------------------------------------------------------------------------------------------------------

  __device__ void load_state() {
    if (thread == 0) {
      *gave_up() = 0;
      *shared<u64>(kClockAt) = nanoseconds();
#pragma unroll 1
      for (int i = 0; i < p.ring; ++i) init_barrier(barrier(i), kThreads);
    }
    if (thread < 2 * kChannels) shared<float>(kOutBiasAt)[thread] = load_ahead(p.out_bias + thread);
    for (int o = thread; o < kTokenValues; o += kThreads) {
      const int t = o / kChannels, channel = o % kChannels;
      const bool live = t < n() && channel < p.channels;
      const int at = (first() + t) * p.channels + channel;
      x()[o] = live ? as_float(load_word(p.x + at)) : 0;
      before()[o] = live ? as_float(load_word(p.before + at)) : 0;
    }
    for (int o = thread; o < tiles * kColumns; o += kThreads) {
      const int column = (block + o / kColumns * p.blocks) * kColumns + o % kColumns;
      in_bias(o / kColumns)[o % kColumns] = load_ahead(p.in_bias + column);
      float* weight = in_weight(o / kColumns) + o % kColumns * (kChannels + 1);
      for (int c = 0; c < kChannels; ++c) weight[c] = load_ahead(p.in_weight + column * kChannels + c);
    }
  }

  // The group's blocks all have the same, and all have read p.x before they told anything; between which there is no fence, so both
  // are words too.
  __device__ void store_state() {
    if (block != 0) return;
    for (int o = thread; o < n() * kChannels; o += kThreads) {
      const int t = o / kChannels, channel = o % kChannels;
      if (channel >= p.channels) continue;
      const int at = (first() + t) * p.channels + channel;
      store_word(p.x + at, as_bits(x()[o]));
      store_word(p.before + at, as_bits(before()[o]));
    }
  }

  // Standard normal, for value o = trajectory * kChannels + channel of the group's tokens.
  __device__ float noise_of(int o) {
    const int t = o / kChannels, channel = o % kChannels;
    if (t >= n() || channel >= p.channels) return 0;
    if (p.philox != nullptr) return philox_normal(first() + t, channel);
    if (p.noise == nullptr) return 0;
    return load_ahead(p.noise + (size_t(step) * p.trajectories + first() + t) * p.channels + channel);
  }

  // Philox4x32-10 and Box-Muller, number for number what disa_fast/philox.py draws.
  __device__ float philox_normal(int trajectory, int channel) {
    const u64 seed = p.philox[0], stream = p.philox[1 + trajectory];
    u32 key0 = u32(seed), key1 = u32(seed >> 32);
    u32 c0 = u32(p.first_step + step + 1), c1 = u32(channel / 4), c2 = u32(stream), c3 = u32(stream >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
      const u32 high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
      const u32 high1 = multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
      c0 = high1 ^ c1 ^ key0;
      c1 = low1;
      c2 = high0 ^ c3 ^ key1;
      c3 = low0;
    }
    const u32 r = channel % 4 < 2 ? c0 : c2, angle = channel % 4 < 2 ? c1 : c3;
    const float radius = sqrtf(-2 * logf(float((r >> 8) + 1) * 0x1p-24f));
    const float turns = 2 * float(angle >> 8) * 0x1p-24f;
    return radius * (channel % 2 ? sinpif(turns) : cospif(turns));
  }

  // Where things are ----------------------------------------------------------------------------------------------------------

  static constexpr int kApart = 128;             // columns between a lane's quadruples
  static constexpr int kEach = kWidth / kApart;  // quadruples of columns that a lane has of a row
  static_assert(kWidth % kApart == 0, "a warp reads whole rows");

  template <class T>
  __device__ __forceinline__ static T* shared(int at) {
    return reinterpret_cast<T*>(shared_memory + at);
  }
  __device__ float* partial(int of) const { return shared<float>(kPartialAt) + of * kTile; }
  __device__ float* x() const { return shared<float>(kStateAt); }
  __device__ float* before() const { return shared<float>(kBeforeAt); }
  __device__ u32* gave_up() const { return shared<u32>(kClockAt + 8); }
  __device__ u16* activations(int row) const { return shared<u16>(p.activations_at) + row * (width() + kPad); }
  __device__ float* residual(int tile) const { return shared<float>(p.own_at) + tile * kOwn; }
  __device__ float* in_weight(int tile) const { return residual(tile) + kTile; }
  __device__ float* in_bias(int tile) const { return in_weight(tile) + kColumns * (kChannels + 1); }
  __device__ char* out_unit(int tile) const { return shared_memory + p.units_at + tile * unit_bytes(); }
  __device__ char* unit(int index) const { return out_unit(p.out_resident ? kOutTiles : 0) + index * unit_bytes(); }
  __device__ char* slot(int use) const { return unit(p.resident + (use & (p.ring - 1))); }
  __device__ u64* barrier(int use) const { return shared<u64>(kBarriersAt) + (use & (p.ring - 1)); }
  __device__ u32* h_words(u32 exchange) const { return p.words + (group * 3 + int(exchange % 2)) * kRows * width(); }
  __device__ u32* u_words() const { return p.words + (group * 3 + 2) * kRows * width(); }

  // How often h and u have been told by the end of a block's half
  __device__ u32 h_exchange(int i) const { return step * (p.depth + 1) + i + 1; }
  __device__ u32 u_exchange(int i) const { return step * p.depth + i + 1; }

  __device__ int width() const { return kWidth ? kWidth : p.width; }
  __device__ int unit_bytes() const { return 16 * width(); }
  // First of a lane's; the others are constants behind it, so that all of them have one address in registers.
  __device__ int lane_column() const { return lane() * 4; }

  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    if constexpr (kWidth > 0) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) f(i);
    } else {
      for (int i = 0; lane_column() + i * kApart < width(); ++i) f(i);
    }
  }

  // Output of a tile that a thread sums up and stores
  __device__ int output_row() const { return thread % kTile / kColumns; }
  __device__ int column_of(int tile) const { return (block + tile * p.blocks) * kColumns + thread % kColumns; }

  __device__ int warp() const { return thread / 32; }
  __device__ int lane() const { return thread % 32; }

  // The group's trajectories, the first of them, and rows: from constants, so that no register holds them
  __device__ int n() const { return p.each + (group < p.more); }
  __device__ int first() const { return group * p.each + (group < p.more ? group : p.more); }
  __device__ int rows() const { return p.guided ? 2 * n() : n(); }

  // Of a group's row among all
  __device__ int row_of(int row) const { return row < n() ? first() + row : p.trajectories + first() + row - n(); }

  __device__ const u16* modulation_of(int row) const {
    const size_t all = p.guided ? 2 * p.trajectories : p.trajectories;
    return p.modulation + (step * all + row_of(row)) * size_t(3 * p.depth + 2) * width();
  }

  // For cuda_check.py: the outputs of one phase are left in p.dump.
#ifdef DISA_FAST_DUMP
  __device__ void dump(int of, int phase, int row, int column, float value) const {
    if (of == p.dump_step && phase == p.dump_phase) p.dump[row_of(row) * width() + column] = value;
  }
#else
  __device__ static void dump(int, int, int, int, float) {}
#endif

  const MlpDenoise& p;
  int thread;
  int group, block;  // of the grid; of the group
  int tiles;         // that this block owns in every layer
  int step = 0;
};

}  // namespace disa_fast::cuda
