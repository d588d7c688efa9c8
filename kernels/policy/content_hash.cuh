// The content hash of a slot (src/codec/hash.rs): a sum over 8-byte words, each mixed with its
// position, which lanes add up in any order.
#ifndef HYBRIDKV_POLICY_CONTENT_HASH_CUH_
#define HYBRIDKV_POLICY_CONTENT_HASH_CUH_

#include <stdint.h>

namespace hkv {

// What word `index` of a slot adds to its hash. The header's word 3, the hash itself, adds nothing.
__device__ __forceinline__ uint64_t hash_word(uint32_t index, uint64_t word) {
  uint64_t x = word ^ (index + uint64_t{1}) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

__device__ __forceinline__ uint64_t low_high(uint32_t low, uint32_t high) {
  return static_cast<uint64_t>(high) << 32 | low;
}

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_CONTENT_HASH_CUH_
