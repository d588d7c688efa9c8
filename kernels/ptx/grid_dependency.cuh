// Programmatic dependent launch (sm_90 and up), one instruction per function. Where the
// architecture lacks it, or the launch does not ask for it, kernels follow each other in stream
// order and both functions do nothing.
#ifndef HYBRIDKV_PTX_GRID_DEPENDENCY_CUH_
#define HYBRIDKV_PTX_GRID_DEPENDENCY_CUH_

namespace hkv {

// Lets the next kernel of the stream start once every CTA of this one has come here or ended.
__device__ __forceinline__ void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Waits until the kernels before this one have ended and their writes are visible.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace hkv

#endif  // HYBRIDKV_PTX_GRID_DEPENDENCY_CUH_
