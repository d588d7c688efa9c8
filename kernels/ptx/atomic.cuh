// Atomic operations on global memory, one instruction per function.
#ifndef HYBRIDKV_PTX_ATOMIC_CUH_
#define HYBRIDKV_PTX_ATOMIC_CUH_

#include <stdint.h>

namespace hkv {

// Adds 1 and gives the old value. What the CTA wrote before (and passed a barrier) is visible to
// whoever reads a later value this way, and what those before it wrote is visible to this CTA.
__device__ __forceinline__ int32_t atomic_arrive(int32_t* counter) {
  int32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;\n"
               : "=r"(old)
               : "l"(counter)
               : "memory");
  return old;
}

}  // namespace hkv

#endif  // HYBRIDKV_PTX_ATOMIC_CUH_
