// What a CTA of a decode kernel works on: x = part * Hk + head, where a part is an entry of the
// work list (abi/params.h), some of the visible keys of a sequence. Without a list every sequence
// is one part.
#ifndef HYBRIDKV_POLICY_DECODE_SHARE_CUH_
#define HYBRIDKV_POLICY_DECODE_SHARE_CUH_

#include "../abi/params.h"
#include "decode_tuning.cuh"
#include "visibility.cuh"

namespace hkv {

struct DecodeShare {
  int32_t seq;
  int32_t kv_head;
  int32_t entry;  // of the work list
  int32_t part;   // of the `parts` parts of the sequence; 0 parts: no work
  int32_t parts;

  DecodeShare() = default;
  __device__ explicit DecodeShare(const hkv_attention_params& p)
      : kv_head(blockIdx.x % p.num_kv_heads), entry(blockIdx.x / p.num_kv_heads) {
    seq = entry;
    part = 0;
    parts = 1;
    if (p.parts == nullptr) return;
    const int2 raw = __ldcg(reinterpret_cast<const int2*>(p.parts + entry));
    const hkv_part listed = reinterpret_cast<const hkv_part&>(raw);
    seq = listed.seq;
    part = listed.index;
    parts = listed.count;
  }

  // The whole sequence as the work of this CTA alone.
  __device__ DecodeShare alone() const {
    DecodeShare share = *this;
    share.part = 0;
    share.parts = 1;
    return share;
  }
  // Its tiles, cut at multiples of `granule`.
  __device__ TileSpan of(int32_t tiles, int32_t granule) const {
    return TileSpan(tiles, part, parts, granule);
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_DECODE_SHARE_CUH_
