// Queries as operands of the products with keys.
//
// Products with 8-bit keys are of f16, whose range bf16 queries exceed: they are first scaled by a
// power of two that brings the largest of them to the top of the range. That is exact, but for what
// is 2^28 times smaller than the largest; the factor comes back in the scale of the logits.
#ifndef HYBRIDKV_POLICY_QUERY_OPERAND_CUH_
#define HYBRIDKV_POLICY_QUERY_OPERAND_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "query_rows.cuh"

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

// The query rows from `row0` on as B fragments of Operand: lane (g, t) has query 8qt + g of every
// 8 and the dims that Order::pair names; rows past the last are zero. Gives what their products are
// to be multiplied with.
template <typename T, typename Operand, typename Order, int kQueryTiles, int kFragments>
__device__ __forceinline__ float load_queries(const hkv_attention_params& p, const QueryRows& rows,
                                              int32_t row0,
                                              uint32_t (&query)[kQueryTiles][kFragments][2]) {
  const int lane = threadIdx.x % 32;
  uint32_t magnitudes = 0;
#pragma unroll
  for (int qt = 0; qt < kQueryTiles; ++qt) {
    const int32_t row = row0 + qt * 8 + lane / 4;
    const bool valid = row < rows.count();
    const T* q = static_cast<const T*>(p.q);
    if (valid) q += rows.token(row) * p.q_stride_token + rows.head(row) * p.q_stride_head;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        query[qt][f][i] = valid ? Order::pair(q, lane % 4, f, i) : 0u;
        magnitudes = larger_pair(magnitudes, query[qt][f][i]);
      }
    }
  }
  if constexpr (std::is_same_v<T, Operand>) return 1.0f;
  const QueryScale scale(__reduce_max_sync(0xffffffffu, larger_half(magnitudes)));
#pragma unroll
  for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) query[qt][f][i] = scale.apply(query[qt][f][i]);
    }
  }
  return scale.undo();
}

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_QUERY_OPERAND_CUH_
