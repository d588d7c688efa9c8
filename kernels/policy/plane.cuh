// How a warp walks a plane, one head of K or V of one layer of a block, [token][dim]: in passes of
// whole tokens, 16 elements per lane.
//
// A pass has `rows` tokens, a power of two; lane `row * vectors + vector` has elements 16 * vector
// on of token `row`, so that the elements of a pass are in the order of its lanes. Lanes past the
// last are not active; they take part in shuffles only.
#ifndef HYBRIDKV_POLICY_PLANE_CUH_
#define HYBRIDKV_POLICY_PLANE_CUH_

#include <stdint.h>

#include "../abi/params.h"

namespace hkv {

constexpr int kWarpLanes = 32;
// Elements of a lane in a pass.
constexpr int kLaneElements = 16;
// Passes whose loads are in flight together.
constexpr int kPasses = 4;

// 16 elements of 16 bits, two to a word.
struct Elements {
  uint32_t pair[kLaneElements / 2];
};

struct Lanes {
  int vectors;  // lanes that share a token
  int rows;     // tokens of a pass
  int row;
  int vector;
  bool active;

  __device__ Lanes(int head_dim, int block_size) {
    const int lane = threadIdx.x % kWarpLanes;
    vectors = head_dim / kLaneElements;
    rows = min(1 << (31 - __clz(kWarpLanes / vectors)), block_size);
    row = lane / vectors;
    vector = lane % vectors;
    active = row < rows;
  }

  // The lane with the same elements `step` tokens away (a power of two, row XOR step).
  __device__ int across_rows(int step) const {
    return active ? (row ^ step) * vectors + vector : threadIdx.x % kWarpLanes;
  }

  // The lane of the same token with elements of vector `other`.
  __device__ int in_row(int other) const {
    return active ? row * vectors + other : threadIdx.x % kWarpLanes;
  }

  // The largest of a value over the lanes of a token.
  __device__ float row_max(float value) const {
    float largest = value;
    for (int i = 1; i < vectors; ++i) {
      const int other = vector + i < vectors ? vector + i : vector + i - vectors;
      largest = fmaxf(largest, __shfl_sync(~0u, value, in_row(other)));
    }
    return largest;
  }
};

// A plane in the pool. `index` counts the planes of a block, [layer][K|V][head].
struct Plane {
  uint16_t* first;  // this lane's elements of token 0
  int64_t stride_token;
  int index;
  bool is_key;
  int index_in_kind;  // among the planes of K, or of V
  int passes;
  int elements;

  __device__ Plane(const hkv_codec_params& p, const Lanes& lanes, int64_t block, int plane) {
    const int heads = p.num_kv_heads;
    const int layer = plane / (2 * heads);
    const int head = plane % heads;
    index = plane;
    is_key = plane / heads % 2 == 0;
    index_in_kind = layer * heads + head;
    stride_token = p.kv_stride_token;
    first = static_cast<uint16_t*>(is_key ? p.k : p.v) + block * p.kv_stride_block +
            (p.first_layer_slot + layer) * p.kv_stride_layer + head * p.kv_stride_head +
            lanes.row * p.kv_stride_token + lanes.vector * kLaneElements;
    passes = p.block_size / lanes.rows;
    elements = p.block_size * p.head_dim;
  }

  __device__ uint4* address(const Lanes& lanes, int pass) const {
    return reinterpret_cast<uint4*>(first + pass * lanes.rows * stride_token);
  }

  // A pass, which is one of the plane's; lanes that are not active get 0.
  __device__ Elements load(const Lanes& lanes, int pass) const {
    uint4 low = make_uint4(0, 0, 0, 0), high = low;
    if (lanes.active) {
      low = address(lanes, pass)[0];
      high = address(lanes, pass)[1];
    }
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  }

  // Up to kPasses passes from `begin` on; elements that there are not become 0.
  __device__ void load(Elements (&chunk)[kPasses], const Lanes& lanes, int begin) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      chunk[i] = begin + i < passes ? load(lanes, begin + i) : Elements{};
    }
  }

  __device__ void store(const Elements& e, const Lanes& lanes, int pass) const {
    uint4* to = address(lanes, pass);
    to[0] = make_uint4(e.pair[0], e.pair[1], e.pair[2], e.pair[3]);
    to[1] = make_uint4(e.pair[4], e.pair[5], e.pair[6], e.pair[7]);
  }

  // Index in the block of this lane's first element in a pass.
  __device__ uint32_t element(const Lanes& lanes, int pass) const {
    return static_cast<uint32_t>(index) * elements + position(lanes, pass);
  }

  // The same in the plane.
  __device__ uint32_t position(const Lanes& lanes, int pass) const {
    return (pass * lanes.rows * lanes.vectors + threadIdx.x % kWarpLanes) * kLaneElements;
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_PLANE_CUH_
