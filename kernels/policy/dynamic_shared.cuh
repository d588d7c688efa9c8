// The dynamic shared memory of a CTA.
#ifndef HYBRIDKV_POLICY_DYNAMIC_SHARED_CUH_
#define HYBRIDKV_POLICY_DYNAMIC_SHARED_CUH_

namespace hkv {

// Where it begins, at a multiple of 1024 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_DYNAMIC_SHARED_CUH_
