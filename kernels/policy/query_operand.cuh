// Queries as operands of the products with keys.
//
// Products with 8-bit keys are of f16, whose range bf16 queries exceed: they are first scaled by a
// power of two that brings the largest of them to the top of the range. That is exact, but for what
// is 2^28 times smaller than the largest; the factor comes back in the scale of the logits.
#ifndef HYBRIDKV_POLICY_QUERY_OPERAND_CUH_
#define HYBRIDKV_POLICY_QUERY_OPERAND_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

namespace hkv {

// The power of two for bf16 queries whose largest magnitude has the bits `largest` (the sign
// cleared).
class QueryScale {
 public:
  __device__ explicit QueryScale(uint32_t largest) : exponent_(min(max(largest >> 7, 15u), 254u)) {}

  // Two bf16 as two f16, scaled.
  __device__ uint32_t apply(uint32_t pair) const {
    const float factor = __uint_as_float((268u - exponent_) << 23);
    const __half2 halves = __floats2half2_rn(__uint_as_float(pair << 16) * factor,
                                             __uint_as_float(pair & 0xffff0000u) * factor);
    return reinterpret_cast<const uint32_t&>(halves);
  }
  // What products of scaled queries are to be multiplied with.
  __device__ float undo() const { return __uint_as_float((exponent_ - 14u) << 23); }

 private:
  uint32_t exponent_;  // of the largest, biased: it becomes 2^14 up to 2^15
};

// The larger magnitude of two pairs of bf16, element by element, and of the two of a pair.
__device__ __forceinline__ uint32_t larger_pair(uint32_t magnitudes, uint32_t pair) {
  return __vmaxu2(magnitudes, pair & 0x7fff7fffu);
}
__device__ __forceinline__ uint32_t larger_half(uint32_t magnitudes) {
  return max(magnitudes >> 16, magnitudes & 0xffffu);
}

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_QUERY_OPERAND_CUH_
