// How decode kernels share a multiprocessor, and the keys that a warp takes at a time.
#ifndef HYBRIDKV_POLICY_DECODE_TUNING_CUH_
#define HYBRIDKV_POLICY_DECODE_TUNING_CUH_

#include "../abi/params.h"

namespace hkv {

constexpr int kDecodeWarps = HKV_DECODE_THREADS / 32;

// 128 KB are in flight, past which bandwidth falls again (H100). Widening 8-bit elements keeps 16
// warps busy; kernels with larger states have room for 8.
template <typename Kv, int kDim, int kQueryTiles>
struct DecodeTuning {
  static constexpr int kCtas = sizeof(Kv) == 1 && kDim <= 128 && kQueryTiles == 1 ? 4 : 2;
  static constexpr int kSharedBytes =
      kCtas == 4 ? HKV_DECODE_NARROW_SHARED_BYTES : HKV_DECODE_SHARED_BYTES;
  static constexpr int kRingBytes = kSharedBytes / kDecodeWarps;
  // Keys of a warp at a time: 4 KB at head_dim 128, but where registers do not reach.
  static constexpr int kSliceTokens = sizeof(Kv) == 1 && kDim * kQueryTiles <= 256 ? 32 : 16;
  static constexpr int kInFlightBytes = (128 << 10) / (kCtas * kDecodeWarps);
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_DECODE_TUNING_CUH_
