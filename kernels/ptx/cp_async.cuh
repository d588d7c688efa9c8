// Asynchronous copies from global to shared memory (sm_80 and up), one instruction per function.
#ifndef HYBRIDKV_PTX_CP_ASYNC_CUH_
#define HYBRIDKV_PTX_CP_ASYNC_CUH_

#include <stdint.h>

namespace hkv {

// Copies 16 bytes past L1, or writes 16 zero bytes without reading `src` when `valid` is false.
// Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(uint32_t dst_shared, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(dst_shared), "l"(src),
               "r"(valid ? 16 : 0)
               : "memory");
}

// A policy for what is read once: its lines are the first to leave L2.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}

// cp_async_16 under an L2 policy.
__device__ __forceinline__ void cp_async_16(uint32_t dst_shared, const void* src, bool valid,
                                            uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(dst_shared),
      "l"(src), "r"(valid ? 16 : 0), "l"(policy)
      : "memory");
}

// Copies 4 bytes, through L1, or writes zeros; both addresses are multiples of 4.
__device__ __forceinline__ void cp_async_4(uint32_t dst_shared, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(dst_shared), "l"(src),
               "r"(valid ? 4 : 0)
               : "memory");
}

// Brings the line of an address of global memory into L1.
__device__ __forceinline__ void prefetch_l1(const void* address) {
  asm volatile("prefetch.global.L1 [%0];\n" ::"l"(address));
}

// Closes the group of all copies that this thread has issued since the last group.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most `kPending` of this thread's groups are unfinished.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace hkv

#endif  // HYBRIDKV_PTX_CP_ASYNC_CUH_
