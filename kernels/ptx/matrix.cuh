// Warp-wide moves of 8x8 matrices of 16-bit elements, one instruction per function.
//
// A matrix lives in a register of every lane: lane l holds row l / 4, columns 2 * (l % 4) and the
// next.
#ifndef HYBRIDKV_PTX_MATRIX_CUH_
#define HYBRIDKV_PTX_MATRIX_CUH_

#include <stdint.h>

namespace hkv {

// Loads four matrices; lane l gives the shared address of row l % 8 of matrix l / 8 (16 bytes).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&m)[4], uint32_t row_shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row_shared)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&m)[4], uint32_t row_shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row_shared)
               : "memory");
}

// Transposes a matrix that is spread over the warp.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t m) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(transposed) : "r"(m));
  return transposed;
}

}  // namespace hkv

#endif  // HYBRIDKV_PTX_MATRIX_CUH_
