// How keys and values in shared memory become operands of the tensor cores (the 16-row operand of
// S^T = K Q^T and of O^T = V^T P^T), by their element type.
//
// A step is one ldmatrix of four matrices: 16 keys (or values) times 32 bytes of their rows, which
// are kFragments fragments of 16 keys x 16 dims. 8-bit elements are widened in registers; the
// dims of a fragment are then not in order, and nothing is shuffled for that: queries are loaded in
// the order of the keys' dims, and the rows of the output are named accordingly. With g = lane / 4
// and t = lane % 4, fragment f of the head
//              columns of K: a lane's dims        rows of V^T: dims of rows g, g + 8
//   16 bits    16f + 2t, +1, +8, +9               16f + g, 16f + g + 8
//   e4m3       16f + 4t, +1, +2, +3               16f + 2g, 16f + 2g + 1
#ifndef HYBRIDKV_POLICY_KV_ELEMENT_CUH_
#define HYBRIDKV_POLICY_KV_ELEMENT_CUH_

#include "e4m3.cuh"
#include "element.cuh"

namespace hkv {

template <typename T>
__device__ __forceinline__ uint32_t load_pair(const T* pair) {
  return __ldcg(reinterpret_cast<const uint32_t*>(pair));
}

template <typename Kv>
struct KvElement {
  using Operand = Kv;  // type of the products' operands
  static constexpr int kFragments = 1;
  static constexpr bool kScaled = false;

  // The elements of a query at a lane's key columns 0, 1 (i = 0) or 8, 9 (i = 1) of fragment f.
  template <typename T>
  __device__ static uint32_t pair(const T* q, int t, int f, int i) {
    return load_pair(q + 16 * f + 2 * t + 8 * i);
  }
  // Dim of the output row g (i = 0) or g + 8 (i = 1) of a fragment.
  __device__ static int value_dim(int g, int i) { return g + 8 * i; }

  // m: keys 0-7 and 8-15 of the first 16 bytes, then of the next 16.
  __device__ static void keys(uint32_t (&a)[kFragments][4], const uint32_t (&m)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[0][i] = m[i];
  }
  // m, transposed: the first and the next 16 bytes of values 0-7, then of 8-15.
  __device__ static void values(uint32_t (&a)[kFragments][4], const uint32_t (&m)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[0][i] = m[i];
  }
};

template <>
struct KvElement<E4m3> {
  using Operand = __half;
  static constexpr int kFragments = 2;
  static constexpr bool kScaled = true;

  template <typename T>
  __device__ static uint32_t pair(const T* q, int t, int f, int i) {
    return load_pair(q + 16 * f + 4 * t + 2 * i);
  }
  __device__ static int value_dim(int g, int i) { return 2 * g + i; }

  __device__ static void keys(uint32_t (&a)[kFragments][4], const uint32_t (&m)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t pair[2];
      e4m3_to_f16(pair, m[i]);
      a[i / 2][i % 2] = pair[0];
      a[i / 2][i % 2 + 2] = pair[1];
    }
  }
  // A transposed word has two dims of one value, then the same of the next: swapping the middle
  // bytes pairs the values.
  __device__ static void values(uint32_t (&a)[kFragments][4], const uint32_t (&m)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t pair[2];
      e4m3_to_f16(pair, __byte_perm(m[i], 0, 0x3120));
      a[i % 2][i / 2 * 2] = pair[0];
      a[i % 2][i / 2 * 2 + 1] = pair[1];
    }
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_KV_ELEMENT_CUH_
