// `raw`: the elements as they are (src/codec/raw.rs), in vectors of 16 bytes.
#ifndef HYBRIDKV_POLICY_CODEC_RAW_CUH_
#define HYBRIDKV_POLICY_CODEC_RAW_CUH_

#include "slot.cuh"

namespace hkv {

struct Raw : Codec {
  const hkv_codec_params& p;
  const Lanes lanes;
  static constexpr int kVectorElements = 8;
  static constexpr int kLoads = 2 * kPasses;

  __device__ Raw(const hkv_codec_params& p, Tables, char*)
      : p(p), lanes(p.head_dim, p.block_size) {}

  __device__ static int vectors(const Plane& plane) { return plane.elements / kVectorElements; }

  // Vector `index` of a plane in the pool.
  __device__ uint4* address(const Plane& plane, int index) const {
    const int in_row = p.head_dim / kVectorElements;
    const int64_t token = index / in_row - lanes.row;
    const int element = index % in_row * kVectorElements - lanes.vector * kLaneElements;
    return reinterpret_cast<uint4*>(plane.first + token * plane.stride_token + element);
  }

  // The same in the slot.
  __device__ uint32_t offset(const Plane& plane, int index) const {
    return p.sections[0] + plane.index * plane.elements * 2 + index * sizeof(uint4);
  }

  // The vector that is this lane's load `i` of a chunk.
  __device__ static int vector(int begin, int i) {
    return begin + i * kWarpLanes + threadIdx.x % kWarpLanes;
  }

  __device__ bool encode(const Plane& plane, SlotWriter& writer) {
    for (int begin = 0; begin < vectors(plane); begin += kLoads * kWarpLanes) {
      uint4 chunk[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int index = vector(begin, i);
        if (index < vectors(plane)) chunk[i] = *address(plane, index);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int index = vector(begin, i);
        if (index < vectors(plane)) writer.put(offset(plane, index), chunk[i]);
      }
    }
    return true;
  }

  struct Packed {
    uint4 vector[kLoads];
  };

  __device__ void load(Packed& chunk, const Plane& plane, int begin, const SlotReader& reader) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = vector(begin, i);
      if (index < vectors(plane)) chunk.vector[i] = reader.load16(offset(plane, index));
    }
  }

  __device__ bool decode(const Plane& plane, Packed& chunk, SlotReader& reader) {
    for (int begin = 0; begin < vectors(plane); begin += kLoads * kWarpLanes) {
      if (begin > 0) load(chunk, plane, begin, reader);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int index = vector(begin, i);
        if (index >= vectors(plane)) continue;
        reader.take(offset(plane, index), chunk.vector[i]);
        *address(plane, index) = chunk.vector[i];
      }
    }
    return true;
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_CODEC_RAW_CUH_
