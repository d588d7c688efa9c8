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
#include "abi/params.h"

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
    const int64_t slot = slots[token];
    if (slot < 0 || vector >= row_vectors) continue;

    const int64_t block = slot >> p.block_shift;
    const int64_t offset = slot & ((int64_t{1} << p.block_shift) - 1);
    const int32_t head = vector / head_vectors;
    const int32_t head_vector = vector % head_vectors;
    const int64_t from = vector_offset(token * p.new_stride_token + head * p.new_stride_head,
                                       kElementBytes, head_vector);
    const int64_t to =
        vector_offset(block * p.kv_stride_block + window.layer_slot * p.kv_stride_layer +
                          head * p.kv_stride_head + offset * p.kv_stride_token,
                      kElementBytes, head_vector);
    const Vector key = load(p.k_new, from);
    const Vector value = load(p.v_new, from);
    store(p.k, to, key);
    store(p.v, to, value);
  }
}
