// The layout of tiles of rows of kRowBytes bytes in shared memory: rows without padding, the
// 16-byte chunks of a row permuted so that the same chunk of 8 neighbouring rows lies in different
// banks: chunk c of row r at c ^ (r % 8), or at c ^ (r / 2 % 4) where two rows of 64 bytes share
// the banks, at c ^ (r / 4 % 2) where four of 32 do. Tiles are aligned to 128 bytes.
#ifndef HYBRIDKV_POLICY_SWIZZLE_CUH_
#define HYBRIDKV_POLICY_SWIZZLE_CUH_

#include <stdint.h>

namespace hkv {

template <int kRowBytes_>
struct Swizzle {
  static constexpr int kRowBytes = kRowBytes_;
  static constexpr int kChunks = kRowBytes / 16;
  static_assert(kRowBytes == 32 || kRowBytes % 64 == 0);

  // Byte offset of a chunk from the start of the tile.
  __device__ static uint32_t offset(int row, int chunk) {
    const int permutation = kRowBytes == 32 ? row / 4 & 1 : kRowBytes == 64 ? row / 2 & 3 : row & 7;
    return row * kRowBytes + ((chunk ^ permutation) << 4);
  }

  // The address of chunk c + 2 * pair of a row from that of its chunk c < 2. Four pairs share their
  // upper bits, which the swizzle leaves alone: they become immediate offsets.
  __device__ static uint32_t advance(uint32_t address, int pair) {
    return (address ^ (pair % 4 << 5)) + pair / 4 * 128;
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_SWIZZLE_CUH_
