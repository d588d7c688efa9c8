// The query rows of one sequence that share a KV head, packed so that K and V are read once for
// all: row r is query token r / group, query head kv_head * group + r % group, group = Hq / Hk.
#ifndef HYBRIDKV_POLICY_QUERY_ROWS_CUH_
#define HYBRIDKV_POLICY_QUERY_ROWS_CUH_

#include "../abi/params.h"

namespace hkv {

class QueryRows {
 public:
  QueryRows() = default;
  __device__ QueryRows(const hkv_attention_params& p, int32_t seq, int32_t kv_head) {
    group_ = p.num_qo_heads / p.num_kv_heads;
    first_head_ = kv_head * group_;
    first_token_ = p.qo_indptr[seq];
    const int32_t q_len = p.qo_indptr[seq + 1] - first_token_;
    first_position_ = p.kv_len[seq] - q_len;
    count_ = q_len * group_;
  }

  __device__ int32_t count() const { return count_; }
  // Absolute position of the first query token.
  __device__ int32_t first_position() const { return first_position_; }
  __device__ int32_t token(int32_t row) const { return first_token_ + row / group_; }
  __device__ int32_t head(int32_t row) const { return first_head_ + row % group_; }
  // Absolute position of the row's query, negative where it has no keys.
  __device__ int32_t position(int32_t row) const { return first_position_ + row / group_; }

 private:
  int32_t first_token_;
  int32_t first_head_;
  int32_t first_position_;
  int32_t group_;
  int32_t count_;
};

// Tiles of `kRows` packed rows are numbered through the batch so that sequence s starts at tile
// qo_indptr[s] * group / kRows + s: one tile per sequence more than rows fill, hence room for every
// remainder, and no prefix sum. Some numbers stand for no rows.
template <int kRows>
__device__ inline int64_t first_row_tile(const hkv_attention_params& p, int32_t seq) {
  const int32_t group = p.num_qo_heads / p.num_kv_heads;
  return static_cast<int64_t>(p.qo_indptr[seq]) * group / kRows + seq;
}

// The sequence to which a tile number belongs: the last one that starts at or before it. Whole
// warp.
template <int kRows>
__device__ inline int32_t sequence_of_row_tile(const hkv_attention_params& p, int64_t tile) {
  const int32_t lane = threadIdx.x % 32;
  int32_t first = 0;
  int32_t count = p.num_seqs;
  while (count > 1) {
    const int32_t step = (count + 31) / 32;
    const int32_t probe = lane * step;
    const bool starts = probe < count && first_row_tile<kRows>(p, first + probe) <= tile;
    const int32_t last = (31 - __clz(__ballot_sync(0xffffffffu, starts))) * step;
    first += last;
    count = min(step, count - last);
  }
  return first;
}

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_QUERY_ROWS_CUH_
