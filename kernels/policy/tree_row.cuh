// The tree mask of speculative tokens: which of its sequence's new tokens a query row sees.
#ifndef HYBRIDKV_POLICY_TREE_ROW_CUH_
#define HYBRIDKV_POLICY_TREE_ROW_CUH_

#include "query_rows.cuh"

namespace hkv {

class TreeRow {
 public:
  TreeRow() = default;
  // A row past the last sees everything: it is not written.
  __device__ TreeRow(const hkv_attention_params& p, const QueryRows& rows, int32_t row)
      : seen_(~0u), first_position_(rows.first_position()) {
    if (p.tree_mask != nullptr && row < rows.count()) seen_ = __ldg(p.tree_mask + rows.token(row));
  }

  // Whether the mask hides the key at position j.
  __device__ bool hides(int32_t j) const {
    const int32_t token = j - first_position_;
    return token >= 0 && token < 32 && (seen_ >> token & 1u) == 0;
  }

 private:
  uint32_t seen_;
  int32_t first_position_;
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_TREE_ROW_CUH_
