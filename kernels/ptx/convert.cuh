// Conversions between element types, one instruction per function.
#ifndef HYBRIDKV_PTX_CONVERT_CUH_
#define HYBRIDKV_PTX_CONVERT_CUH_

#include <stdint.h>

namespace hkv {

#if __CUDA_ARCH__ >= 890
// Two e4m3 elements as two f16, exactly; the first is in the low bits of both. NaN stays NaN.
__device__ __forceinline__ uint32_t e4m3x2_to_f16x2(uint16_t pair) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;\n" : "=r"(halves) : "h"(pair));
  return halves;
}

// Two floats to the nearest e4m3, ties to even, beyond 448 to 448; NaN to 0x7f. `low` into the low
// bits.
__device__ __forceinline__ uint16_t f32x2_to_e4m3x2(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

}  // namespace hkv

#endif  // HYBRIDKV_PTX_CONVERT_CUH_
