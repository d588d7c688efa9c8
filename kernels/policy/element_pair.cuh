// Two 16-bit elements in a word, the first in the low bits: values, least and largest, rounding, as
// src/codec/round.rs defines it.
#ifndef HYBRIDKV_POLICY_ELEMENT_PAIR_CUH_
#define HYBRIDKV_POLICY_ELEMENT_PAIR_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace hkv {

// to_float: both values. pack: the nearest finite elements. least, largest: of both halves apart.
// down, up: bits of the nearest element not above, not below. not_finite: whether either is NaN or
// infinite.
template <typename T>
struct ElementPair;

template <>
struct ElementPair<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr float kLargest = 3.38953138925153547590e38f;

  __device__ static float2 to_float(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
  __device__ static float to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
  __device__ static uint32_t pack(float low, float high) {
    const Pair pair = __floats2bfloat162_rn(fminf(fmaxf(low, -kLargest), kLargest),
                                            fminf(fmaxf(high, -kLargest), kLargest));
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static uint32_t least(uint32_t a, uint32_t b) {
    const Pair pair = __hmin2(reinterpret_cast<Pair&>(a), reinterpret_cast<Pair&>(b));
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static uint32_t largest(uint32_t a, uint32_t b) {
    const Pair pair = __hmax2(reinterpret_cast<Pair&>(a), reinterpret_cast<Pair&>(b));
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static uint16_t down(float x) { return __bfloat16_as_ushort(__float2bfloat16_rd(x)); }
  __device__ static uint16_t up(float x) { return __bfloat16_as_ushort(__float2bfloat16_ru(x)); }
  __device__ static bool not_finite(uint32_t pair) {
    return ((pair & 0x7f807f80u) + 0x00800080u) & 0x80008000u;
  }
};

template <>
struct ElementPair<__half> {
  using Pair = __half2;
  static constexpr float kLargest = 65504.0f;

  __device__ static float2 to_float(uint32_t pair) {
    return __half22float2(reinterpret_cast<const Pair&>(pair));
  }
  __device__ static float to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  __device__ static uint32_t pack(float low, float high) {
    const Pair pair = __floats2half2_rn(fminf(fmaxf(low, -kLargest), kLargest),
                                        fminf(fmaxf(high, -kLargest), kLargest));
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static uint32_t least(uint32_t a, uint32_t b) {
    const Pair pair = __hmin2(reinterpret_cast<Pair&>(a), reinterpret_cast<Pair&>(b));
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static uint32_t largest(uint32_t a, uint32_t b) {
    const Pair pair = __hmax2(reinterpret_cast<Pair&>(a), reinterpret_cast<Pair&>(b));
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static uint16_t down(float x) { return __half_as_ushort(__float2half_rd(x)); }
  __device__ static uint16_t up(float x) { return __half_as_ushort(__float2half_ru(x)); }
  __device__ static bool not_finite(uint32_t pair) {
    return ((pair & 0x7c007c00u) + 0x04000400u) & 0x80008000u;
  }
};

// The 16 values of a lane; false when one is not finite.
template <typename T>
__device__ __forceinline__ bool to_floats(float (&x)[16], const uint32_t (&pair)[8]) {
  bool finite = true;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const float2 two = ElementPair<T>::to_float(pair[c]);
    x[2 * c] = two.x;
    x[2 * c + 1] = two.y;
    finite &= !ElementPair<T>::not_finite(pair[c]);
  }
  return finite;
}

template <typename T>
__device__ __forceinline__ void from_floats(uint32_t (&pair)[8], const float (&x)[16]) {
#pragma unroll
  for (int c = 0; c < 8; ++c) pair[c] = ElementPair<T>::pack(x[2 * c], x[2 * c + 1]);
}

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_ELEMENT_PAIR_CUH_
