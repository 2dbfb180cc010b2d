// One instruction set's kernels. CMake compiles this file once for each, with DISA_FAST_ISA naming it and the compiler flags that
// allow it, so nothing here may include a header whose inline functions other files share: the linker could keep this file's copy
// of them.
#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace disa_fast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kMaxTileRows = 14, kAccumulators = 28;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kMaxTileRows = 6, kAccumulators = 12;
#else
constexpr int kLanes = 4, kMaxTileRows = 6, kAccumulators = 12;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedFloats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t UnalignedInts __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
inline void store(float* p, Floats x) { *reinterpret_cast<UnalignedFloats*>(p) = x; }
inline Floats all(float x) { return x - Floats{}; }

// a * b + c. Compiled with -ffp-contract=off: what is fused is written here, so that every instance rounds alike.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The sum of all lanes, always in the same order.
inline float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// exp(x) to about one unit in the last place; 0 and infinity where float32 ends (a little early: below 2^-126 and above 2^127.5).
inline Floats exponential(Floats x) {
  const Floats low = all(-87.3f), high = all(89.0f);
  x = x < low ? low : x;  // nan passes
  x = x > high ? high : x;
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats shifted = multiply_add(x, all(1.44269504f), all(round_to_int));
  const Ints n = (Ints)shifted - (Ints)all(round_to_int);
  const Floats whole = shifted - round_to_int;
  Floats r = multiply_add(whole, all(-0.693359375f), x);  // ln 2 in two parts, the first exact in whole * part
  r = multiply_add(whole, all(2.12194440e-4f), r);
  Floats p = all(1.0f / 5040);  // Taylor's series to r^7, |r| <= ln(2)/2: its remainder is 5e-9 of the value
  p = multiply_add(p, r, all(1.0f / 720));
  p = multiply_add(p, r, all(1.0f / 120));
  p = multiply_add(p, r, all(1.0f / 24));
  p = multiply_add(p, r, all(1.0f / 6));
  p = multiply_add(p, r, all(0.5f));
  p = multiply_add(p, r, all(1.0f));
  p = multiply_add(p, r, all(1.0f));
  return p * (Floats)((n + 127) << 23);
}

inline Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

// Vector v of the columns of a panel, at k = i.
template <Storage kStorage>
inline Floats load_weights(const char* w, int i, int v) {
  if constexpr (kStorage == Storage::float32) return load(reinterpret_cast<const float*>(w) + i * kPanel + v * kLanes);
  const Ints pairs = reinterpret_cast<const UnalignedInts*>(w + i / 2 * (kPanel * 4))[v];
  return (Floats)((pairs << (i & 1 ? 0 : 16)) & int32_t(0xffff0000));
}

// total[r][column] (+)= sum over `k` of a[r][k] * w[k][column], for kRows rows and kVectors vectors of columns. `ahead` walks
// memory that will be wanted soon, `lines` cache lines for every k.
template <Storage kStorage, int kRows, int kVectors>
void tile(const float* a, size_t stride, const char* w, int k, float* total, bool first, const char* ahead, int lines) {
  Floats sums[kRows][kVectors] = {};
  for (int i = 0; i < k; ++i) {
    for (int line = 0; line < lines; ++line) __builtin_prefetch(ahead + 64 * line);
    ahead += 64 * lines;
    Floats weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = load_weights<kStorage>(w, i, v);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Floats x = all(a[r * stride + i]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(x, weights[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      float* at = total + r * kPanel + v * kLanes;
      store(at, first ? sums[r][v] : load(at) + sums[r][v]);
    }
}

// As many vectors of columns at a time as the registers hold, and the rest of the panel after them.
template <Storage kStorage, int kRows>
void panel_tile(const float* a, size_t stride, const char* w, int k, float* total, bool first, const char* ahead, int lines) {
  constexpr int kAll = kPanel / kLanes;
  constexpr int kVectors = kRows * kAll <= kAccumulators ? kAll : kRows * kAll / 2 <= kAccumulators ? kAll / 2 : kAll / 4;
  static_assert(kRows * kVectors <= kAccumulators && kVectors > 0);
  for (int v = 0; v < kAll; v += kVectors)
    tile<kStorage, kRows, kVectors>(a, stride, w + v * kLanes * 4, k, total + v * kLanes, first, ahead, v == 0 ? lines : 0);
}

using Tile = void (*)(const float*, size_t, const char*, int, float*, bool, const char*, int);

template <Storage kStorage, int kRows>
constexpr Tile tile_of(int rows) {
  if constexpr (kRows > 0)
    return rows == kRows ? &panel_tile<kStorage, kRows> : tile_of<kStorage, kRows - 1>(rows);
  else
    return nullptr;
}

struct Tiles {
  Tile of[2][kMaxTileRows + 1];
};

constexpr Tiles all_tiles() {
  Tiles tiles{};
  for (int rows = 1; rows <= kMaxTileRows; ++rows) {
    tiles.of[0][rows] = tile_of<Storage::float32, kMaxTileRows>(rows);
    tiles.of[1][rows] = tile_of<Storage::bfloat16, kMaxTileRows>(rows);
  }
  return tiles;
}

constexpr Tiles kTiles = all_tiles();

constexpr size_t kAhead = 16384;  // bytes
constexpr int kWidenFrom = 3;     // tiles

void linear_panel(const Linear& linear, int panel, Matrix in, int rows, Epilogue epilogue, Matrix out, Matrix gate) {
  alignas(64) float total[kTaskRows * kPanel];
  const char* w = static_cast<const char*>(linear.panels) + panel * linear.panel_bytes();
  const int bytes_per_k = int(linear.panel_bytes() / linear.k);
  const int count = (rows + kMaxTileRows - 1) / kMaxTileRows;
  // Where several tiles use a block of bfloat16, it is widened once for all of them. The numbers are the same.
  alignas(64) float widened[kBlockK * kPanel];
  const bool widen = linear.storage == Storage::bfloat16 && count >= kWidenFrom;
  const Tile* tiles = kTiles.of[linear.storage == Storage::float32 || widen ? 0 : 1];
  const int lines = bytes_per_k / 64;

  for (int start = 0; start < linear.k; start += kBlockK) {
    const int k = linear.k - start < kBlockK ? linear.k - start : kBlockK;
    // Meanwhile what lies behind is fetched: with several tiles the next block, of which each tile asks for its share.
    const char* ahead = w + (count == 1 ? kAhead : size_t(k) * bytes_per_k);
    const char* block = w;
    if (widen) {
      for (int i = 0; i < k; ++i)
        for (int v = 0; v < kPanel / kLanes; ++v)
          store(widened + i * kPanel + v * kLanes, load_weights<Storage::bfloat16>(w, i, v));
      block = reinterpret_cast<const char*>(widened);
    }
    for (int i = 0, row = 0; i < count; ++i) {
      const int end = (i + 1) * rows / count;
      const int from = i * lines / count, to = (i + 1) * lines / count;
      tiles[end - row](in.row(row) + start, in.stride, block, k, total + row * kPanel, start == 0, ahead + size_t(from) * 64 * k,
                       to - from);
      row = end;
    }
    w += size_t(k) * bytes_per_k;
  }

  const float* bias = linear.bias + panel * kPanel;
  const size_t column = size_t(panel) * kPanel;
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < kPanel; j += kLanes) {
      float* at = out.row(r) + column + j;
      const Floats x = load(total + r * kPanel + j) + load(bias + j);
      switch (epilogue) {
        case Epilogue::store:
          store(at, x);
          break;
        case Epilogue::silu:
          store(at, silu(x));
          break;
        case Epilogue::gated_residual:
          store(at, multiply_add(load(gate.row(r) + column + j), x, load(at)));
          break;
      }
    }
}

void normalize(const float* in, const float* shift, const float* scale, int width, int padded, float eps, float* out) {
  constexpr int kSums = 4;  // independent chains of additions
  const int whole = width / (kSums * kLanes) * kSums * kLanes;

  Floats sums[kSums] = {};
  for (int j = 0; j < whole; j += kSums * kLanes)
    for (int s = 0; s < kSums; ++s) sums[s] = sums[s] + load(in + j + s * kLanes);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (int j = whole; j < width; ++j) total += in[j];
  const float mean = total / width;

  Floats squares[kSums] = {};
  for (int j = 0; j < whole; j += kSums * kLanes)
    for (int s = 0; s < kSums; ++s) {
      const Floats d = load(in + j + s * kLanes) - mean;
      squares[s] = multiply_add(d, d, squares[s]);
    }
  float square = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (int j = whole; j < width; ++j) square += (in[j] - mean) * (in[j] - mean);
  const float factor = 1.0f / __builtin_sqrtf(square / width + eps);

  for (int j = 0; j < padded; j += kLanes) {
    const Floats normalized = (load(in + j) - mean) * factor;
    store(out + j, multiply_add(normalized, load(scale + j), load(shift + j)));
  }
}

void silu_sum(const float* a, const float* b, int count, float* out) {
  for (int j = 0; j < count; j += kLanes) store(out + j, silu(load(a + j) + load(b + j)));
}

float read_memory(const void* data, size_t bytes) {
  const float* p = static_cast<const float*>(data);
  constexpr int kSums = 256 / (kLanes * 4);
  Floats sums[kSums] = {};
  for (size_t i = 0; i < bytes / 256; ++i, p += 64) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(p + 8192 + 16 * line, 0, 2);
    for (int s = 0; s < kSums; ++s) sums[s] = sums[s] + load(p + s * kLanes);
  }
  float total = 0;
  for (int s = 0; s < kSums; ++s) total += sum(sums[s]);
  return total;
}

int64_t multiply_add_rounds(int64_t rounds, float* sink) {
  constexpr int kSums = 12;
  Floats sums[kSums];
  for (int s = 0; s < kSums; ++s) sums[s] = all(sink[s]);
  const Floats x = all(sink[0]), y = all(sink[1]);
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 12
    for (int s = 0; s < kSums; ++s) sums[s] = multiply_add(sums[s], x, y);
  float total = 0;
  for (int s = 0; s < kSums; ++s) total += sum(sums[s]);
  *sink = total;
  return rounds * kSums * kLanes;
}

}  // namespace

#define DISA_FAST_TEXT_(x) #x
#define DISA_FAST_TEXT(x) DISA_FAST_TEXT_(x)
#define DISA_FAST_JOIN_(a, b) a##b
#define DISA_FAST_JOIN(a, b) DISA_FAST_JOIN_(a, b)

extern const Kernels DISA_FAST_JOIN(kernels_, DISA_FAST_ISA);
const Kernels DISA_FAST_JOIN(kernels_, DISA_FAST_ISA) = {
    DISA_FAST_TEXT(DISA_FAST_ISA), linear_panel, normalize, silu_sum, read_memory, multiply_add_rounds,
};

}  // namespace disa_fast::cpu
