// Hides the scores of keys that a query does not see.
#ifndef HYBRIDKV_POLICY_SCORE_MASK_CUH_
#define HYBRIDKV_POLICY_SCORE_MASK_CUH_

#include "query_rows.cuh"
#include "tree_row.cuh"
#include "visibility.cuh"

namespace hkv {

// Scores of 16 * kKeyTiles keys from the tile's base on: lane (g, t) has the keys g and g + 8 of
// every 16, of the queries 2t and 2t + 1 of every 8 rows from `row0` on.
template <int kKeyTiles, int kQueryTiles>
__device__ __forceinline__ void mask_scores(const hkv_attention_params& p, const QueryRows& rows,
                                            const Visibility& visibility, int32_t row0,
                                            const KeyTile& tile,
                                            float (&score)[kKeyTiles][kQueryTiles][4]) {
  const int lane = threadIdx.x % 32;
  const int32_t key = tile.base + lane / 4;
#pragma unroll
  for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int32_t row = row0 + qt * 8 + lane % 4 * 2 + c;
      const SeenKeys seen(visibility, tile, rows.position(row), key);
      const TreeRow tree(p, rows, row);
#pragma unroll
      for (int kt = 0; kt < kKeyTiles; ++kt) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int offset = kt * 16 + h * 8;
          if (!seen.has(offset) || tree.hides(key + offset)) score[kt][qt][c + 2 * h] = -INFINITY;
        }
      }
    }
  }
}

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_SCORE_MASK_CUH_
