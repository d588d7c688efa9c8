// Special functions of the hardware, one instruction per function.
#ifndef HYBRIDKV_PTX_MATH_CUH_
#define HYBRIDKV_PTX_MATH_CUH_

namespace hkv {

// 2^x with a relative error of 2^-22; -inf gives 0.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x with a relative error of 2^-23; inf gives 0.
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace hkv

#endif  // HYBRIDKV_PTX_MATH_CUH_
