// Tensor core products C += A * B of one warp with fp32 accumulation, one instruction per function.
//
// m16n8k16 fragments, with g = lane / 4 and t = lane % 4:
//   A (16x16)  a[0]: row g, columns 2t, 2t+1;  a[1]: row g+8;  a[2]: row g, columns +8;  a[3]: both
//   B (16x8)   b0: rows 2t, 2t+1, column g;  b1: rows 2t+8, 2t+9
//   C (16x8)   c[0], c[1]: row g, columns 2t, 2t+1;  c[2], c[3]: row g+8
#ifndef HYBRIDKV_PTX_MMA_CUH_
#define HYBRIDKV_PTX_MMA_CUH_

#include <stdint.h>

namespace hkv {

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace hkv

#endif  // HYBRIDKV_PTX_MMA_CUH_
