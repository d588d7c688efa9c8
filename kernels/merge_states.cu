// Merges attention states (output, LSE) of the same rows: out = sum_i w_i o_i, w = softmax of the
// LSE.
//
// Grid: CTAs of 4 warps. With more than 4 states a CTA owns one row and its warps take the states
// w, w + 4, ...; with fewer each warp owns a row. States are [num_states, rows, D], row = token *
// Hq + head; a lane holds 4 neighbouring dims of every 128. States with LSE -inf are never read.
#include "abi/params.h"
#include "policy/element.cuh"
#include "policy/softmax_state.cuh"
#include "ptx/grid_dependency.cuh"

namespace hkv {
namespace {

constexpr int kWarps = HKV_MERGE_THREADS / 32;
constexpr int kBatch = 8;  // states whose loads are in flight at once
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ float4 load4(const float* x) { return *reinterpret_cast<const float4*>(x); }

__device__ float4 load4(const __nv_bfloat16* x) {
  const uint2 raw = *reinterpret_cast<const uint2*>(x);
  const float2 low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(raw.x));
  const float2 high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(raw.y));
  return make_float4(low.x, low.y, high.x, high.y);
}

__device__ float4 load4(const __half* x) {
  const uint2 raw = *reinterpret_cast<const uint2*>(x);
  const float2 low = __half22float2(reinterpret_cast<const __half2&>(raw.x));
  const float2 high = __half22float2(reinterpret_cast<const __half2&>(raw.y));
  return make_float4(low.x, low.y, high.x, high.y);
}

template <typename T>
__device__ void store4(T* out, float4 x) {
  *reinterpret_cast<uint2*>(out) =
      make_uint2(Element<T>::pack(x.x, x.y), Element<T>::pack(x.z, x.w));
}

__device__ void store4(float* out, float4 x) { *reinterpret_cast<float4*>(out) = x; }

__device__ float warp_max(float x) {
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, delta));
  return x;
}

__device__ float warp_sum(float x) {
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) x += __shfl_xor_sync(kFullWarp, x, delta);
  return x;
}

// Weight of a state relative to the largest.
__device__ float state_weight(float lse, float top_log2) {
  return lse == -INFINITY ? 0.0f : ex2(fmaf(lse, kLog2e, -top_log2));
}

// Sum of weight * state over the states first, first + stride, ... of a row, for the lane's 4 dims.
template <typename In>
__device__ float4 weigh(const hkv_merge_params& p, int64_t row, int dim, float top_log2, int first,
                        int stride) {
  const int lane = threadIdx.x % 32;
  const int64_t rows = static_cast<int64_t>(p.num_tokens) * p.num_qo_heads;
  const bool in_row = dim < p.head_dim;
  float4 sum = {};
  for (int base = first; base < p.num_states; base += 32 * stride) {
    const int mine = base + lane * stride;
    const float lane_weight =
        mine < p.num_states ? state_weight(p.state_lse[mine * rows + row], top_log2) : 0.0f;
    const In* state = static_cast<const In*>(p.states) + (base * rows + row) * p.head_dim + dim;
    for (int i = 0; i < 32 && base + i * stride < p.num_states; i += kBatch) {
      float weight[kBatch];
      float4 x[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        weight[b] = __shfl_sync(kFullWarp, lane_weight, i + b);
        x[b] = {};
        if (in_row && weight[b] != 0.0f) x[b] = load4(state);
        state += stride * rows * p.head_dim;
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        sum.x = fmaf(weight[b], x[b].x, sum.x);
        sum.y = fmaf(weight[b], x[b].y, sum.y);
        sum.z = fmaf(weight[b], x[b].z, sum.z);
        sum.w = fmaf(weight[b], x[b].w, sum.w);
      }
    }
  }
  return sum;
}

__device__ float4 weigh(const hkv_merge_params& p, int64_t row, int dim, float top_log2, int first,
                        int stride) {
  switch (p.in_dtype) {
    case HKV_DTYPE_BF16:
      return weigh<__nv_bfloat16>(p, row, dim, top_log2, first, stride);
    case HKV_DTYPE_F16:
      return weigh<__half>(p, row, dim, top_log2, first, stride);
    default:
      return weigh<float>(p, row, dim, top_log2, first, stride);
  }
}

__device__ void store(const hkv_merge_params& p, int64_t offset, float4 x) {
  switch (p.out_dtype) {
    case HKV_DTYPE_BF16:
      return store4(static_cast<__nv_bfloat16*>(p.out) + offset, x);
    case HKV_DTYPE_F16:
      return store4(static_cast<__half*>(p.out) + offset, x);
    default:
      return store4(static_cast<float*>(p.out) + offset, x);
  }
}

}  // namespace
}  // namespace hkv

extern "C" __global__ void __launch_bounds__(HKV_MERGE_THREADS)
    hkv_merge_states(const __grid_constant__ hkv_merge_params p) {
  using namespace hkv;
  __shared__ float4 partial[kWarps][32];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps_per_row = p.num_states > kWarps ? kWarps : 1;
  const int first = warps_per_row == 1 ? 0 : warp;
  const int64_t rows = static_cast<int64_t>(p.num_tokens) * p.num_qo_heads;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps / warps_per_row) + (warp - first);
  if (row >= rows) return;
  const int64_t token = row / p.num_qo_heads;
  const int32_t head = row % p.num_qo_heads;
  grid_dependency_wait();
  if (p.live_tokens != nullptr && token >= *p.live_tokens) return;

  // Every warp of the row computes the whole softmax.
  float top = -INFINITY;
  for (int i = lane; i < p.num_states; i += 32) top = fmaxf(top, p.state_lse[i * rows + row]);
  const float top_log2 = warp_max(top) * kLog2e;
  float total = 0.0f;
  for (int i = lane; i < p.num_states; i += 32) {
    total += state_weight(p.state_lse[i * rows + row], top_log2);
  }
  const float sink = p.sink_logits == nullptr ? -INFINITY : p.sink_logits[head];
  const ClosedRow closed(top_log2, warp_sum(total), sink);

  for (int base = 0; base < p.head_dim; base += 128) {
    const int dim = base + lane * 4;
    float4 sum = weigh(p, row, dim, top_log2, first, warps_per_row);
    if (warps_per_row > 1) {
      if (base > 0) __syncthreads();  // the last round's sums have been read
      partial[warp][lane] = sum;
      __syncthreads();
      if (warp > 0) continue;
#pragma unroll
      for (int w = 1; w < kWarps; ++w) {
        const float4 other = partial[w][lane];
        sum = make_float4(sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w);
      }
    }
    if (dim >= p.head_dim) continue;
    store(p, token * p.out_stride_token + head * p.out_stride_head + dim,
          make_float4(sum.x * closed.scale, sum.y * closed.scale, sum.z * closed.scale,
                      sum.w * closed.scale));
  }
  if (p.lse != nullptr && first == 0 && lane == 0) p.lse[row] = closed.lse;
}
