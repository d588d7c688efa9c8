// The 8-bit float of quantised keys and values (OCP e4m3: bias 7, no infinities, largest 448), as
// src/e4m3.rs defines its conversions; with the same results on every architecture.
#ifndef HYBRIDKV_POLICY_E4M3_CUH_
#define HYBRIDKV_POLICY_E4M3_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "../ptx/convert.cuh"

namespace hkv {

constexpr float kE4m3Max = 448.0f;
// The smallest scale of a quantised row, 2^-100 (src/e4m3.rs).
constexpr float kLeastScale = 7.888609052210118e-31f;

// An element in memory.
struct E4m3 {
  uint8_t bits;
};

// Four elements as f16, exactly: pair[0] has the first two, the first in the low bits.
__device__ __forceinline__ void e4m3_to_f16(uint32_t (&pair)[2], uint32_t word) {
#if __CUDA_ARCH__ >= 890
  pair[0] = e4m3x2_to_f16x2(static_cast<uint16_t>(word));
  pair[1] = e4m3x2_to_f16x2(static_cast<uint16_t>(word >> 16));
#else
  // The same bits one place further right are an f16 2^8 times smaller, subnormals too.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t high = __byte_perm(word, 0, i == 0 ? 0x1404 : 0x3424);
    const uint32_t small = (high & 0x80008000u) | (high >> 1 & 0x3f803f80u);
    const __half2 value =
        __hmul2(reinterpret_cast<const __half2&>(small), __half2half2(__float2half(256.0f)));
    // What would be 480 stands for NaN.
    const uint32_t nan = __heq2_mask(__habs2(value), __half2half2(__float2half(480.0f)));
    pair[i] = reinterpret_cast<const uint32_t&>(value) | (nan & 0x7fff7fffu);
  }
#endif
}

// Four floats to the nearest elements, ties to even, beyond the largest to it; NaN to 0x7f. The
// first in the low bits.
__device__ __forceinline__ uint32_t f32_to_e4m3(const float (&value)[4]) {
#if __CUDA_ARCH__ >= 890
  return f32x2_to_e4m3x2(value[0], value[1]) |
         static_cast<uint32_t>(f32x2_to_e4m3x2(value[2], value[3])) << 16;
#else
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t magnitude = min(__float_as_uint(value[i]) & 0x7fffffffu, 0x43e00000u);
    // Below the smallest normal value, 2^-6, multiples of 2^-9; else 20 mantissa bits are dropped,
    // and a carry moves into the exponent.
    const uint32_t code =
        magnitude < 0x3c800000u
            ? static_cast<uint32_t>(__float2int_rn(__uint_as_float(magnitude) * 512.0f))
            : ((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
    const uint32_t sign = __float_as_uint(value[i]) >> 24 & 0x80u;
    word |= (value[i] == value[i] ? sign | code : 0x7fu) << 8 * i;
  }
  return word;
#endif
}

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_E4M3_CUH_
