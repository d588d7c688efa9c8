// The scales of 8-bit keys and values (abi/params.h), of one layer and KV head.
//
// Scales that all tokens share are folded into the logits' scale and into the output. Scales of
// tokens multiply the scores, and the weights before these are rounded for the second product.
#ifndef HYBRIDKV_POLICY_KV_SCALES_CUH_
#define HYBRIDKV_POLICY_KV_SCALES_CUH_

#include "../abi/params.h"
#include "../ptx/cp_async.cuh"
#include "block_table.cuh"

namespace hkv {

class KvScales {
 public:
  KvScales() = default;
  __device__ KvScales(const hkv_attention_params& p, const hkv_window& window, int32_t kv_head) {
    const int64_t head_offset =
        window.layer_slot * p.scale_stride_layer + kv_head * p.scale_stride_head;
    keys_ = p.k_scale + head_offset;
    values_ = p.v_scale + head_offset;
    stride_block_ = p.scale_stride_block;
    stride_token_ = p.scale_stride_token;
    offset_mask_ = (1 << p.block_shift) - 1;
  }

  // Whether scales differ between tokens.
  __device__ bool per_token() const { return (stride_block_ | stride_token_) != 0; }
  // The scale that all keys (values) share; 1 where each token has its own.
  __device__ float of_keys() const { return per_token() ? 1.0f : __ldg(keys_); }
  __device__ float of_values() const { return per_token() ? 1.0f : __ldg(values_); }

  // Brings the scale that all values share nearer.
  __device__ void prefetch_values() const { prefetch_l1(values_); }

  // Where the scales of a token of a block lie.
  __device__ const float* key(int32_t block_id, int32_t token) const {
    return keys_ + offset(block_id, token);
  }
  __device__ const float* value(int32_t block_id, int32_t token) const {
    return values_ + offset(block_id, token);
  }

 private:
  __device__ int64_t offset(int32_t block_id, int32_t token) const {
    return block_id * stride_block_ + (token & offset_mask_) * stride_token_;
  }

  const float* keys_;
  const float* values_;
  int64_t stride_block_;
  int64_t stride_token_;
  int32_t offset_mask_;
};

// The unit in which an output sum is kept while weights are multiplied with the values' scales: a
// power of two no less than any scale so far, so that their products stay in the range of f16.
// Moving it up is exact.
class ValueUnit {
 public:
  // A scale in this unit, at most 1.
  __device__ float share(float scale) const { return scale * inverse(bits_); }
  __device__ bool exceeded_by(float scale) const { return scale > value(); }
  // Moves up to `top`; gives what sums in the old unit are to be multiplied with.
  __device__ float raise(float top) {
    const float old = value();
    // The next power of two; an infinite scale stays infinite in it.
    const uint32_t above = (__float_as_uint(top) & 0x7f800000u) + 0x00800000u;
    bits_ = max(bits_, min(above, kLargest));
    return old * inverse(bits_);
  }
  __device__ float value() const { return __uint_as_float(bits_); }

 private:
  static constexpr uint32_t kSmallest = 1u << 23;   // 2^-126
  static constexpr uint32_t kLargest = 253u << 23;  // 2^126
  __device__ static float inverse(uint32_t bits) { return __uint_as_float((254u << 23) - bits); }

  uint32_t bits_ = kSmallest;
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_KV_SCALES_CUH_
