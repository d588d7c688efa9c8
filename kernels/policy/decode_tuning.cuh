// How decode kernels share a multiprocessor, and the keys that a warp takes at a time.
#ifndef HYBRIDKV_POLICY_DECODE_TUNING_CUH_
#define HYBRIDKV_POLICY_DECODE_TUNING_CUH_

#include "../abi/params.h"

namespace hkv {

constexpr int kDecodeWarps = HKV_DECODE_THREADS / 32;

// 128 KB are in flight, past which bandwidth falls again (H100). Two CTAs with deep rings read few
// long sequences fastest; many short ones of 8-bit elements, which take longer to widen than to
// read where memory is fast, keep the 16 warps of four narrow CTAs busy.
template <typename Kv, int kDim, int kQueryTiles, bool kNarrow>
struct DecodeTuning {
  static constexpr int kCtas = kNarrow ? 4 : 2;
  static constexpr int kSharedBytes =
      kNarrow ? HKV_DECODE_NARROW_SHARED_BYTES : HKV_DECODE_SHARED_BYTES;
  static constexpr int kRingBytes = kSharedBytes / kDecodeWarps;
  // Keys of a warp at a time: 4 KB at head_dim 128, but where registers do not reach.
  static constexpr int kSliceTokens = sizeof(Kv) == 1 && kDim * kQueryTiles <= 256 ? 32 : 16;
  static constexpr int kInFlightBytes = (128 << 10) / (kCtas * kDecodeWarps);
};

// Of batches with sealed blocks.
struct SealedTuning {
  static constexpr int kCtas = 2;
  static constexpr int kSharedBytes = HKV_SEALED_SHARED_BYTES;
  static constexpr int kRingBytes = kSharedBytes / kDecodeWarps;
  static constexpr int kInFlightBytes = (128 << 10) / (kCtas * kDecodeWarps);
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_DECODE_TUNING_CUH_
