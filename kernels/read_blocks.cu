// The load path of decode alone: reads K and V of every key that some query of a sequence sees,
// once, as attention_decode does, without its arithmetic. What it reaches is what the layout of
// blocks leaves of the memory's bandwidth.
//
// Grid: as attention_decode's, CTAs of 4 warps (policy/decode_share.cuh). Slice n of the CTA's span
// belongs to warp n % 4, which streams it through its own ring in shared memory
// (policy/slice_ring.cuh) and adds up its words. Keys of a slice that no query sees are zeros
// there. As with attention_decode, the kernel starts while its predecessor runs.
#include "abi/params.h"
#include "policy/block_table.cuh"
#include "policy/decode_share.cuh"
#include "policy/decode_tuning.cuh"
#include "policy/dynamic_shared.cuh"
#include "policy/kv_scales.cuh"
#include "policy/query_rows.cuh"
#include "policy/slice_ring.cuh"
#include "policy/visibility.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/matrix.cuh"

namespace hkv {
namespace {

template <typename Kv, int kDim, bool kNarrow>
class ReadBlocks {
  using Tune = DecodeTuning<Kv, kDim, 1, kNarrow>;
  static constexpr int kSliceTokens = Tune::kSliceTokens;
  static constexpr int kHalfBytes = kSliceTokens * kDim * static_cast<int>(sizeof(Kv));
  using Ring = SliceRing<Kv, kDim, kSliceTokens, kDecodeWarps, Tune::kInFlightBytes>;
  static constexpr bool kScaled = KvElement<Kv>::kScaled;

 public:
  static constexpr int kCtas = Tune::kCtas;

  __device__ static void run(const hkv_read_blocks_params& params) {
    uint8_t* const shared = dynamic_shared<uint8_t>();
    __shared__ typename Ring::ScaleRing scale_rings[kScaled ? kDecodeWarps : 1];
    const hkv_attention_params& p = params.attention;
    if (p.reads_early == 0) grid_dependency_wait();
    const DecodeShare share(p);
    if (share.parts == 0) return;
    const QueryRows rows(p, share.seq, share.kv_head);
    if (rows.count() == 0) return;

    const hkv_window window = p.windows[p.layer];
    const KeyTiles<kSliceTokens> tiles(Visibility(window), rows.position(0),
                                       rows.position(rows.count() - 1));
    const TileSpan span = share.of(tiles.count(), kDecodeWarps);
    const BlockTable<Kv> table(p, window, share.seq, share.kv_head);
    const KvScales scales(p, window, share.kv_head);
    const int warp = threadIdx.x / 32;
    const uint8_t* warp_shared = shared + warp * Tune::kRingBytes;
    Ring ring(static_cast<uint32_t>(__cvta_generic_to_shared(warp_shared)),
              scale_rings[kScaled ? warp : 0], table, scales, tiles, span.begin + warp, span.end,
              rows.first_position());
    grid_dependency_wait();
    grid_dependency_launch();

    uint32_t sum = 0;
    for (int32_t slice = span.begin + warp; slice < span.end; slice += kDecodeWarps) {
      sum += words(ring.next_keys());
      sum += words(ring.next_values());
    }
    sum = __reduce_add_sync(~0u, sum);
    if (threadIdx.x % 32 == 0) atomicAdd(params.checksum, sum);
  }

 private:
  // The sum of a lane's words of a half; all words are some lane's.
  __device__ static uint32_t words(uint32_t half) {
    uint32_t sum = 0;
#pragma unroll
    for (int at = 0; at < kHalfBytes; at += 32 * 16) {
      uint32_t m[4];
      ldmatrix_x4(m, half + at + threadIdx.x % 32 * 16);
      sum += m[0] + m[1] + m[2] + m[3];
    }
    return sum;
  }
};

}  // namespace
}  // namespace hkv

#define HKV_READ_BLOCKS_KERNEL(name, kv, dim, narrow)                                   \
  extern "C" __global__ void __launch_bounds__(HKV_DECODE_THREADS,                      \
                                               hkv::ReadBlocks<kv, dim, narrow>::kCtas) \
      name(const __grid_constant__ hkv_read_blocks_params p) {                          \
    hkv::ReadBlocks<kv, dim, narrow>::run(p);                                           \
  }
#define HKV_READ_BLOCKS(name, kv)                     \
  HKV_READ_BLOCKS_KERNEL(name##_d64, kv, 64, false)   \
  HKV_READ_BLOCKS_KERNEL(name##_d128, kv, 128, false) \
  HKV_READ_BLOCKS_KERNEL(name##_d256, kv, 256, false)

HKV_READ_BLOCKS(hkv_read_blocks_16bit, __half)
HKV_READ_BLOCKS(hkv_read_blocks_e4m3, hkv::E4m3)
HKV_READ_BLOCKS_KERNEL(hkv_read_blocks_e4m3_d64_narrow, hkv::E4m3, 64, true)
HKV_READ_BLOCKS_KERNEL(hkv_read_blocks_e4m3_d128_narrow, hkv::E4m3, 128, true)
