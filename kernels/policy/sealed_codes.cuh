// How the codes of sealed blocks become operands of the tensor cores.
//
// An element is zero + code * step (src/codec/int.rs). Codes become f16 exactly, less kMiddle,
// which keeps products small; zeros and steps never meet them:
//   K  zero and step belong to a channel of a group of tokens: q . k = (q * step) . (code -
//   kMiddle)
//      + q . (zero + kMiddle * step), so that a group costs one folding of the queries and one
//      number per query;
//   V  zero and step belong to a token: weights are multiplied with the step, and all dims of the
//      output get weight * (zero + kMiddle * step) in common.
// Rows of codes are kDim * kBits / 8 bytes; a step of ldmatrix is 16 rows x 32 bytes. With g = lane
// / 4, t = lane % 4, fragment f of the head
//          columns of K: a lane's dims                     rows of V^T: dims of rows g, g + 8
//   int8   16f + 4t, +1; +2, +3                            16f + 2g; +1
//   int4   with e = 32 (f / 2) + 8t + 2 (f % 2):           with e = 32 (f / 2) + 4g + 2 (f % 2):
//          e, e + 4; e + 1, e + 5                          e; e + 1
#ifndef HYBRIDKV_POLICY_SEALED_CODES_CUH_
#define HYBRIDKV_POLICY_SEALED_CODES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace hkv {

// Tokens of a group of K, of blocks that have so many.
constexpr int kSealedGroupTokens = 64;

__device__ __forceinline__ uint32_t subtract(uint32_t pair, float x) {
  const __half2 difference =
      __hsub2(reinterpret_cast<const __half2&>(pair), __half2half2(__float2half(x)));
  return reinterpret_cast<const uint32_t&>(difference);
}

template <int kBits>
struct SealedCodes;

template <>
struct SealedCodes<8> {
  static constexpr float kMiddle = 128.0f;
  static constexpr bool kRotated = false;
  static constexpr int kFragments = 2;  // of a step

  template <typename T>
  __device__ static uint32_t pair(const T* q, int t, int f, int i) {
    return __ldcg(reinterpret_cast<const uint32_t*>(q + 16 * f + 4 * t + 2 * i));
  }
  // The dim of element `k` of the lane's pair i.
  __device__ static int key_dim(int t, int f, int i, int k) { return 16 * f + 4 * t + 2 * i + k; }

  // m: keys 0-7 and 8-15 of the first 16 bytes, then of the next 16. A code above 0x64 is the f16
  // 1024 + code.
  __device__ static void keys(uint32_t (&a)[kFragments][4], const uint32_t (&m)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i / 2][i % 2] = widen(m[i], 0x4140);
      a[i / 2][i % 2 + 2] = widen(m[i], 0x4342);
    }
  }
  // m, transposed: the first and the next 16 bytes of values 0-7, then of 8-15. A word has two dims
  // of one value, then the same of the next.
  __device__ static void values(uint32_t (&a)[kFragments][4], const uint32_t (&m)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i % 2][i / 2 * 2] = widen(m[i], 0x4240);
      a[i % 2][i / 2 * 2 + 1] = widen(m[i], 0x4341);
    }
  }

 private:
  __device__ static uint32_t widen(uint32_t word, uint32_t selector) {
    return subtract(__byte_perm(word, 0x64u, selector), 1024.0f + kMiddle);
  }
};

template <>
struct SealedCodes<4> {
  static constexpr float kMiddle = 8.0f;
  static constexpr bool kRotated = true;  // V, by the Hadamard matrix (src/codec/rotate.rs)
  static constexpr int kFragments = 4;

  template <typename T>
  __device__ static uint32_t pair(const T* q, int t, int f, int i) {
    const T* first = q + key_dim(t, f, i, 0);
    const uint32_t low = __ldcg(reinterpret_cast<const uint16_t*>(first));
    return low | static_cast<uint32_t>(__ldcg(reinterpret_cast<const uint16_t*>(first + 4))) << 16;
  }
  __device__ static int key_dim(int t, int f, int i, int k) {
    return 32 * (f / 2) + 8 * t + 2 * (f % 2) + i + 4 * k;
  }

  __device__ static void keys(uint32_t (&a)[kFragments][4], const uint32_t (&m)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t pair[4];
      widen(pair, m[i]);
#pragma unroll
      for (int k = 0; k < 4; ++k) a[i / 2 * 2 + k / 2][i % 2 + k % 2 * 2] = pair[k];
    }
  }
  // A transposed word has four dims of one value, then the same of the next.
  __device__ static void values(uint32_t (&a)[kFragments][4], const uint32_t (&m)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t pair[4];
      widen(pair, m[i]);
#pragma unroll
      for (int k = 0; k < 4; ++k) a[i % 2 * 2 + k / 2][i / 2 * 2 + k % 2] = pair[k];
    }
  }

 private:
  // pair[k]: nibbles k and k + 4. Below 0x64 a low nibble is the f16 1024 + code, a high one 1024 +
  // 16 * code.
  __device__ static void widen(uint32_t (&pair)[4], uint32_t word) {
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      const uint32_t nibbles = word >> 4 * k;
      pair[k] = subtract((nibbles & 0x000f000fu) | 0x64006400u, 1024.0f + kMiddle);
      const uint32_t high = (nibbles & 0x00f000f0u) | 0x64006400u;
      const __half2 code =
          __hfma2(reinterpret_cast<const __half2&>(high), __half2half2(__float2half(1.0f / 16)),
                  __half2half2(__float2half(-64.0f - kMiddle)));
      pair[k + 1] = reinterpret_cast<const uint32_t&>(code);
    }
  }
};

// Zero and step of a group as stored, of elements of type T: zero in the low half.
template <typename T>
struct SealedAffine;

template <>
struct SealedAffine<__nv_bfloat16> {
  __device__ static float zero(uint32_t word) { return __uint_as_float(word << 16); }
  __device__ static float step(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
};

template <>
struct SealedAffine<__half> {
  __device__ static float zero(uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
  }
  __device__ static float step(uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16)));
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_SEALED_CODES_CUH_
