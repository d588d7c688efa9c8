// The layout of [row][kDim] tiles of 16-bit elements in shared memory: rows without padding, the
// 16-byte chunk c of row r at c ^ (r % 8), so that the 8 rows of a matrix lie in different banks.
#ifndef HYBRIDKV_POLICY_SWIZZLE_CUH_
#define HYBRIDKV_POLICY_SWIZZLE_CUH_

#include <stdint.h>

namespace hkv {

template <int kDim>
struct Swizzle {
  static constexpr int kChunks = kDim / 8;  // 16-byte chunks of a row
  static constexpr int kRowBytes = kDim * 2;

  // Byte offset of a chunk from the start of the tile.
  __device__ static uint32_t offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }

  // The address of chunk c + 2 * pair of a row from that of its chunk c < 2. Four pairs share their
  // upper bits, which the swizzle leaves alone: they become immediate offsets. Tiles are aligned to
  // 128.
  __device__ static uint32_t advance(uint32_t address, int pair) {
    return (address ^ (pair % 4 << 5)) + pair / 4 * 128;
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_SWIZZLE_CUH_
