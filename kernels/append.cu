// Grid: any number of CTAs of 256 threads. A warp owns one piece of one new token at a time: 32
// consecutive 16-byte vectors of its K row, one per lane, and the same vectors of its V row. Warps
// stride over all pieces of all tokens.
//
// new K, V   [T, Hk, D] by strides         read once
// pool       by strides (abi/params.h)     each vector written by exactly one lane
//
// Elements are moved as bits, so that one kernel serves every 16-bit type. Which layers and blocks
// are written is read from the window table and the slot mapping on the device: a captured graph
// replays with other slots, and with fewer tokens by negative slots.
//
// The e4m3 kernels, of the same grid, quantise: a warp owns one head of one new token at a time,
// its K row and then its V row, 8 elements per lane. An element becomes the nearest of element * (1
// / scale), in f32 as src/ops/cpu.rs computes it; the scale is given, or is that of the row's
// largest magnitude, and then is written.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "abi/params.h"
#include "policy/e4m3.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarpLanes = 32;
constexpr int kVectorBytes = 16;

using Vector = uint4;
static_assert(sizeof(Vector) == kVectorBytes);

// Vector `index` of the 16-byte vectors that start `elements` elements after `base`.
__device__ inline int64_t vector_offset(int64_t elements, int32_t element_bytes, int32_t index) {
  return elements * element_bytes + static_cast<int64_t>(index) * kVectorBytes;
}

__device__ inline Vector load(const void* base, int64_t offset) {
  return *reinterpret_cast<const Vector*>(static_cast<const char*>(base) + offset);
}

__device__ inline void store(void* base, int64_t offset, Vector value) {
  *reinterpret_cast<Vector*>(static_cast<char*>(base) + offset) = value;
}

// Where a new token goes, in units of the strides.
struct Slot {
  int64_t block;
  int64_t offset;

  __device__ Slot(int64_t slot, int32_t block_shift)
      : block(slot >> block_shift), offset(slot & ((int64_t{1} << block_shift) - 1)) {}
};

__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ inline void load_row(float (&values)[8], const T* row, int32_t vector) {
  const Vector bits = reinterpret_cast<const Vector*>(row)[vector];
  const T* elements = reinterpret_cast<const T*>(&bits);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = to_float(elements[i]);
}

// The scale at which the largest magnitude of a row is the largest e4m3. Never so small that its
// inverse overflows; NaN elements do not count.
template <typename T>
__device__ inline float row_scale(const T* row, int32_t vectors, int32_t lane) {
  float largest = 0.0f;
  for (int32_t vector = lane; vector < vectors; vector += kWarpLanes) {
    float values[8];
    load_row(values, row, vector);
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(values[i]));
  }
#pragma unroll
  for (int delta = 1; delta < kWarpLanes; delta *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, delta));
  }
  return fmaxf(__fdiv_rn(largest, hkv::kE4m3Max), hkv::kLeastScale);
}

// Quantises a row by the warp. `scale` is read, or computed and written.
template <typename T>
__device__ inline void quantise_row(const T* row, hkv::E4m3* target, float* scale, bool compute,
                                    int32_t vectors, int32_t lane) {
  float step;
  if (compute) {
    step = row_scale(row, vectors, lane);
    if (lane == 0) *scale = step;
  } else {
    step = __ldg(scale);
  }
  const float inverse = __frcp_rn(step);
  for (int32_t vector = lane; vector < vectors; vector += kWarpLanes) {
    float values[8];
    load_row(values, row, vector);
    uint32_t words[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      float scaled[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) scaled[i] = __fmul_rn(values[w * 4 + i], inverse);
      words[w] = hkv::f32_to_e4m3(scaled);
    }
    reinterpret_cast<uint2*>(target)[vector] = make_uint2(words[0], words[1]);
  }
}

template <typename T>
__device__ inline void append_e4m3(const hkv_append_params& p) {
  const hkv_window window = p.windows[p.layer];
  const int64_t* slots = p.slot_mapping + static_cast<int64_t>(window.group) * p.num_tokens;
  const bool compute = p.scale_stride_token != 0;
  const int32_t vectors = p.head_dim / 8;
  const int64_t rows = static_cast<int64_t>(p.num_tokens) * p.num_kv_heads;

  const int32_t lane = threadIdx.x % kWarpLanes;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kThreads / kWarpLanes;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarpLanes;
  for (int64_t row = first; row < rows; row += warps) {
    const int64_t token = row / p.num_kv_heads;
    const int64_t head = row % p.num_kv_heads;
    if (slots[token] < 0) continue;
    const Slot slot(slots[token], p.block_shift);
    const int64_t from = token * p.new_stride_token + head * p.new_stride_head;
    const int64_t to = slot.block * p.kv_stride_block + window.layer_slot * p.kv_stride_layer +
                       head * p.kv_stride_head + slot.offset * p.kv_stride_token;
    const int64_t scale = slot.block * p.scale_stride_block +
                          window.layer_slot * p.scale_stride_layer + head * p.scale_stride_head +
                          slot.offset * p.scale_stride_token;
    quantise_row(static_cast<const T*>(p.k_new) + from, static_cast<hkv::E4m3*>(p.k) + to,
                 p.k_scale + scale, compute, vectors, lane);
    quantise_row(static_cast<const T*>(p.v_new) + from, static_cast<hkv::E4m3*>(p.v) + to,
                 p.v_scale + scale, compute, vectors, lane);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    hkv_append(const __grid_constant__ hkv_append_params p) {
  const hkv_window window = p.windows[p.layer];
  const int64_t* slots = p.slot_mapping + static_cast<int64_t>(window.group) * p.num_tokens;

  constexpr int32_t kElementBytes = 2;
  const int32_t head_vectors = p.head_dim * kElementBytes / kVectorBytes;
  const int32_t row_vectors = p.num_kv_heads * head_vectors;
  const int32_t row_pieces = (row_vectors + kWarpLanes - 1) / kWarpLanes;
  const int64_t pieces = static_cast<int64_t>(p.num_tokens) * row_pieces;

  const int32_t lane = threadIdx.x % kWarpLanes;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kThreads / kWarpLanes;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarpLanes;
  for (int64_t piece = first; piece < pieces; piece += warps) {
    const int64_t token = piece / row_pieces;
    const int32_t vector = static_cast<int32_t>(piece % row_pieces) * kWarpLanes + lane;
    if (slots[token] < 0 || vector >= row_vectors) continue;

    const Slot slot(slots[token], p.block_shift);
    const int32_t head = vector / head_vectors;
    const int32_t head_vector = vector % head_vectors;
    const int64_t from = vector_offset(token * p.new_stride_token + head * p.new_stride_head,
                                       kElementBytes, head_vector);
    const int64_t to =
        vector_offset(slot.block * p.kv_stride_block + window.layer_slot * p.kv_stride_layer +
                          head * p.kv_stride_head + slot.offset * p.kv_stride_token,
                      kElementBytes, head_vector);
    const Vector key = load(p.k_new, from);
    const Vector value = load(p.v_new, from);
    store(p.k, to, key);
    store(p.v, to, value);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    hkv_append_bf16_e4m3(const __grid_constant__ hkv_append_params p) {
  append_e4m3<__nv_bfloat16>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    hkv_append_f16_e4m3(const __grid_constant__ hkv_append_params p) {
  append_e4m3<__half>(p);
}
