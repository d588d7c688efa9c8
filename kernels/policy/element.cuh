// The 16-bit element types of queries, keys, values and outputs, and the products on them.
#ifndef HYBRIDKV_POLICY_ELEMENT_CUH_
#define HYBRIDKV_POLICY_ELEMENT_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "../ptx/mma.cuh"

namespace hkv {

// mma: C += A * B (fragments in ptx/mma.cuh). pack: two floats rounded to nearest even, `low`
// first. pack_rest: what they lost by that, likewise. kWeightParts: how many elements a weight of
// the softmax takes, so that what its rounding adds is small beside the rounding of the output.
template <typename T>
struct Element;

template <>
struct Element<__nv_bfloat16> {
  static constexpr int kWeightParts = 2;
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16_bf16(c, a, b0, b1);
  }
  __device__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static uint32_t pack_rest(float low, float high, uint32_t packed) {
    return pack(low - __uint_as_float(packed << 16), high - __uint_as_float(packed & 0xffff0000u));
  }
};

template <>
struct Element<__half> {
  static constexpr int kWeightParts = 1;
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16_f16(c, a, b0, b1);
  }
  __device__ static uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_ELEMENT_CUH_
