// Writing and reading the arrays of a slot, in device or pinned host memory, while adding up its
// hash. Every byte goes through one of these functions once. The layout is that of
// src/codec/mod.rs.
#ifndef HYBRIDKV_POLICY_SLOT_CUH_
#define HYBRIDKV_POLICY_SLOT_CUH_

#include "content_hash.cuh"
#include "plane.cuh"

namespace hkv {

struct SlotWriter {
  char* slot;
  uint64_t hash = 0;

  __device__ void put(uint32_t offset, uint4 value) {
    __stcs(reinterpret_cast<uint4*>(slot + offset), value);
    hash += hash_word(offset / 8, low_high(value.x, value.y));
    hash += hash_word(offset / 8 + 1, low_high(value.z, value.w));
  }

  __device__ void put(uint32_t offset, uint2 value) {
    __stcs(reinterpret_cast<uint2*>(slot + offset), value);
    hash += hash_word(offset / 8, low_high(value.x, value.y));
  }

  // By all lanes of a warp, those of `active` an even number from lane 0 on, at adjoining offsets:
  // two lanes share a word.
  __device__ void put_halves(uint32_t offset, uint32_t value, bool active) {
    const uint32_t next = __shfl_down_sync(~0u, value, 1);
    if (!active) return;
    __stcs(reinterpret_cast<uint32_t*>(slot + offset), value);
    if (threadIdx.x % 2 == 0) hash += hash_word(offset / 8, low_high(value, next));
  }
};

struct SlotReader {
  const char* slot;
  uint64_t hash = 0;

  __device__ uint4 load16(uint32_t offset) const {
    return __ldcs(reinterpret_cast<const uint4*>(slot + offset));
  }
  __device__ uint2 load8(uint32_t offset) const {
    return __ldcs(reinterpret_cast<const uint2*>(slot + offset));
  }
  __device__ uint32_t load4(uint32_t offset) const {
    return __ldcs(reinterpret_cast<const uint32_t*>(slot + offset));
  }

  // What was loaded from `offset` counts in the hash: apart from the loads, so that several can be
  // in flight.
  __device__ void take(uint32_t offset, uint4 value) {
    hash += hash_word(offset / 8, low_high(value.x, value.y));
    hash += hash_word(offset / 8 + 1, low_high(value.z, value.w));
  }
  __device__ void take(uint32_t offset, uint2 value) {
    hash += hash_word(offset / 8, low_high(value.x, value.y));
  }
  // As put_halves.
  __device__ void take_halves(uint32_t offset, uint32_t value, bool active) {
    const uint32_t next = __shfl_down_sync(~0u, value, 1);
    if (active && threadIdx.x % 2 == 0) hash += hash_word(offset / 8, low_high(value, next));
  }
};

// The beginning of a slot, header and tables, in shared memory while a CTA works on it.
struct Tables {
  char* bytes;

  template <typename T>
  __device__ T* at(uint32_t offset) const {
    return reinterpret_cast<T*>(bytes + offset);
  }
};

// What a codec does besides `encode` and `decode` of a plane, which a warp calls for every plane:
// here, nothing. All threads of a CTA call these, and meet before and after.
struct Codec {
  // A look at every plane, by a warp, before any is encoded.
  static constexpr bool kSurveys = false;
  __device__ void survey(const Plane&) {}
  __device__ void end_survey() {}
  // After the last plane is encoded; false when the slot cannot hold the block.
  __device__ bool finish() { return true; }
  // After the last plane is decoded, whether the slot can have so many escapes.
  __device__ bool complete(uint32_t escapes) const { return escapes == 0; }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_SLOT_CUH_
