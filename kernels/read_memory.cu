// Grid: any number of CTAs of 512 threads; threads stride over the 16-byte vectors of one
// contiguous range, four loads in flight each, and add their words up. What plain loads reach is
// the yardstick of every kernel that is bound by memory.
//
// data       [bytes / 16] vectors          each read once
// checksum   one word                      one atomic per warp
#include "abi/params.h"

namespace {

constexpr int kThreads = 512;
constexpr int kWarpLanes = 32;
constexpr int kLoads = 4;

using Vector = uint4;

__device__ inline uint32_t words(Vector v) { return v.x + v.y + v.z + v.w; }

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    hkv_read_memory(const __grid_constant__ hkv_read_params p) {
  const Vector* data = static_cast<const Vector*>(p.data);
  const int64_t count = p.bytes / static_cast<int64_t>(sizeof(Vector));
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  uint32_t sum = 0;
  for (; i + (kLoads - 1) * step < count; i += kLoads * step) {
    Vector values[kLoads];
#pragma unroll
    for (int n = 0; n < kLoads; ++n) values[n] = __ldcs(data + i + n * step);
#pragma unroll
    for (int n = 0; n < kLoads; ++n) sum += words(values[n]);
  }
  for (; i < count; i += step) sum += words(__ldcs(data + i));
  sum = __reduce_add_sync(~0u, sum);
  if (threadIdx.x % kWarpLanes == 0) atomicAdd(p.checksum, sum);
}
