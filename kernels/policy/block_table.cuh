// Where the K and V of one sequence's tokens lie, for one layer and KV head (layout in
// abi/params.h).
//
// Tokens are looked up in groups of 8: no block is smaller, so a group lies in one block. Only
// blocks that hold visible tokens are looked up; all other entries of the table may be stale.
#ifndef HYBRIDKV_POLICY_BLOCK_TABLE_CUH_
#define HYBRIDKV_POLICY_BLOCK_TABLE_CUH_

#include "../abi/params.h"

namespace hkv {

constexpr int kGroupTokens = 8;

template <typename T>
class BlockTable {
 public:
  BlockTable() = default;
  __device__ BlockTable(const hkv_attention_params& p, const hkv_window& window, int32_t seq,
                        int32_t kv_head) {
    const int64_t row = static_cast<int64_t>(window.group) * p.num_seqs + seq;
    ids_ = p.block_ids + p.block_row[row];
    block_shift_ = p.block_shift;
    offset_mask_ = (1 << p.block_shift) - 1;
    sink_blocks_ = (window.sink_tokens + offset_mask_) >> p.block_shift;
    const int32_t first_block = p.first_block == nullptr ? 0 : p.first_block[row];
    gap_blocks_ = max(first_block - sink_blocks_, 0);
    const int64_t head_offset = window.layer_slot * p.kv_stride_layer + kv_head * p.kv_stride_head;
    keys_ = static_cast<const T*>(p.k) + head_offset;
    values_ = static_cast<const T*>(p.v) + head_offset;
    stride_block_ = p.kv_stride_block;
    stride_token_ = p.kv_stride_token;
  }

  // Id of the block that holds the token.
  __device__ int32_t block_id(int32_t token) const {
    const int32_t block = token >> block_shift_;
    return __ldg(ids_ + (block < sink_blocks_ ? block : block - gap_blocks_));
  }

  // Distance in elements from keys() or values() to the first element of the token.
  __device__ int64_t offset(int32_t block_id, int32_t token) const {
    return block_id * stride_block_ + (token & offset_mask_) * stride_token_;
  }

  __device__ const T* keys() const { return keys_; }
  __device__ const T* values() const { return values_; }
  __device__ int64_t stride_token() const { return stride_token_; }

 private:
  const int32_t* ids_;
  const T* keys_;
  const T* values_;
  int64_t stride_block_;
  int64_t stride_token_;
  int32_t block_shift_;
  int32_t offset_mask_;
  int32_t sink_blocks_;
  int32_t gap_blocks_;  // blocks between the sinks and the first live block: not in the table
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_BLOCK_TABLE_CUH_
