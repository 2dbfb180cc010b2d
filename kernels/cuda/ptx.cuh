// The instructions that mlp_denoise.cuh is made of. tests/host_cuda/ptx.h has the same names in plain C++.
#pragma once

#include "mlp_denoise.h"

namespace disa_fast::cuda {

extern __shared__ __align__(128) char shared_memory[];

// Words that blocks tell each other -------------------------------------------------------------------------------------

// Each of the four words is read whole, and from level 2, where other multiprocessors write.
__device__ __forceinline__ uint4 load_words(const u32* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ u32 load_word(const u32* from) {
  u32 word;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return word;
}

__device__ __forceinline__ void store_word(u32* to, u32 word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

// Into memory of the host, which looks when it likes.
__device__ __forceinline__ void tell_host(u32* flag) { asm volatile("st.relaxed.sys.global.u32 [%0], 1;" ::"l"(flag) : "memory"); }

__device__ __forceinline__ void pause() {}

__device__ __forceinline__ u64 nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// A flag in shared memory that threads raise and read without waiting for each other.
__device__ __forceinline__ void raise(u32* flag) { asm volatile("st.relaxed.cta.u32 [%0], 1;" ::"l"(flag) : "memory"); }

__device__ __forceinline__ bool raised(const u32* flag) {
  u32 value;
  asm volatile("ld.relaxed.cta.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value != 0;
}

// What nobody writes during the launch ----------------------------------------------------------------------------------

// Volatile, since they are asked for ahead: the compiler is not to move them behind the waiting that hides them.
__device__ __forceinline__ float load_ahead(const float* from) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(from));
  return v;
}

__device__ __forceinline__ uint2 load_ahead(const uint2* from) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}

__device__ __forceinline__ u16 load_ahead(const u16* from) {
  u16 bits;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(bits) : "l"(from));
  return bits;
}

// Copies into shared memory that go on in the background, in groups
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const u32 address = u32(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes) : "memory");
}

__device__ __forceinline__ void end_group_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Copies of whole units into shared memory, in the background, whose end a barrier there tells: asked for by the block's last
// thread at once where the GPU can, else by every thread for its part. Calls the whole block makes; `threads` of it.
__device__ __forceinline__ void init_barrier(u64* barrier, int threads) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(u32(__cvta_generic_to_shared(barrier))) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(u32(__cvta_generic_to_shared(barrier))), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void copy_unit(char* to, const char* from, int bytes, int thread, int threads, u64* barrier) {
  const u32 address = u32(__cvta_generic_to_shared(barrier));
#if __CUDA_ARCH__ >= 900
  if (thread != threads - 1) return;
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   u32(__cvta_generic_to_shared(to))),
               "l"(from), "r"(bytes), "r"(address)
               : "memory");
#else
  for (int at = 16 * thread; at < bytes; at += 16 * threads) copy_async<16>(to + at, from + at);
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address) : "memory");
#endif
}

// Until as many copies of a barrier have ended as make their number's last bit differ from `parity`.
__device__ __forceinline__ void wait_for_copy(u64* barrier, u32 parity) {
  u32 ended;
  do
    asm volatile("{ .reg .pred ended; mbarrier.test_wait.parity.shared.b64 ended, [%1], %2; selp.u32 %0, 1, 0, ended; }"
                 : "=r"(ended)
                 : "r"(u32(__cvta_generic_to_shared(barrier))), "r"(parity)
                 : "memory");
  while (!ended);
}

// The same value, of which the compiler knows nothing: so it cannot compute all that follows from it ahead, and keep it in
// registers.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Arithmetic ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float as_float(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 as_bits(float value) { return __float_as_uint(value); }

__device__ __forceinline__ u32 multiply_high(u32 a, u32 b) { return __umulhi(a, b); }

// To a few units in the last place, which neither bfloat16 nor float16 sees
__device__ __forceinline__ float silu(float value) { return __fdividef(value, 1 + __expf(-value)); }
__device__ __forceinline__ float reciprocal_root(float value) { return rsqrtf(value); }

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// The four 8 x 8 matrices of a 16 x 16 one, as the matrix instruction wants its first operand: `row` is where the row
// lane % 16 of columns 8 * (lane / 16) to + 7 starts in shared memory.
__device__ __forceinline__ uint4 load_matrix(const void* row) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(u32(__cvta_generic_to_shared(row)))
               : "memory");
  return v;
}

// The types that weights, modulation and the operands of products may have, each with
// - low, high: of a pair in a word; pack: a pair, rounded to nearest, ties to even
// - held: a pair without the infinities that rounding may have made, where the type is of short range
// - multiply_add: c [16, 8] += a [16, 16] b [16, 8] with float32 sums. A lane has c[lane/4][2*(lane%4) + 0, 1] in x, y and the same
//   of row lane/4 + 8 in z, w; of b it has [2*(lane%4) + 0, 1][lane/4] in x and the same of k + 8 in y.
#define DISA_FAST_MULTIPLY_ADD(type)                                                    \
  static __device__ __forceinline__ void multiply_add(float4& c, uint4 a, uint2 b) {    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)                           \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));         \
  }

struct Bfloat16 {
  static __device__ __forceinline__ float low(u32 pair) { return as_float(pair << 16); }
  static __device__ __forceinline__ float high(u32 pair) { return as_float(pair & 0xffff0000u); }
  static __device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static __device__ __forceinline__ u32 held(u32 pair) { return pair; }
  DISA_FAST_MULTIPLY_ADD("bf16")
};

struct Float16 {
  static __device__ __forceinline__ float low(u32 pair) {
    float value;
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(value) : "r"(pair));
    return value;
  }
  static __device__ __forceinline__ float high(u32 pair) {
    float value;
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(value) : "r"(pair));
    return value;
  }
  static __device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  // To +-65504; NaN stays NaN.
  static __device__ __forceinline__ u32 held(u32 pair) {
    asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x7bff7bffu));
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0xfbfffbffu));
    return pair;
  }
  DISA_FAST_MULTIPLY_ADD("f16")
};

#undef DISA_FAST_MULTIPLY_ADD

}  // namespace disa_fast::cuda
