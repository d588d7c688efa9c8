// Paged attention for few query rows per KV head: decode, and a few speculative tokens.
//
// Grid: CTAs of 4 warps, x = part * Hk + head. A part is an entry of the work list (abi/params.h),
// some of the visible keys of a sequence; without a list every sequence is one part. The query rows
// of the CTA (packed GQA, policy/query_rows.cuh) are served 8 * kQueryTiles at a time; the host
// picks the kernel so that one round is the rule.
//
// Layouts: q, out [T, Hq, D] by strides; K and V through the block table (policy/block_table.cuh).
// Keys are cut into slices of 16, or mostly of 32 where elements have 8 bits. Slice n of the CTA's
// span belongs to warp n % 4: the warp copies it into its own ring in shared memory
// (policy/slice_ring.cuh), computes its scores and adds it to its own softmax state, without any
// CTA-wide barrier while keys stream.
//
// The warps' states meet in shared memory, those of a sequence's parts in the workspace, where the
// CTA that comes last merges them, in the order of the parts.
//
// The kernel starts while its predecessor in the stream runs, and reads nothing that it may write
// before it has ended. With reads_early that leaves lengths, tables and old keys to begin with.
//
// Products are transposed so that K and V are the 16-row operand of the tensor cores and the few
// queries the 8-column one: S^T[16 keys, 8] = K Q^T, O^T[D, 8] = V^T P^T. 8-bit elements become f16
// between shared memory and the products (policy/kv_element.cuh).
#include "abi/params.h"
#include "policy/block_table.cuh"
#include "policy/decode_cta.cuh"
#include "policy/decode_tuning.cuh"
#include "policy/element.cuh"
#include "policy/kv_element.cuh"
#include "policy/kv_scales.cuh"
#include "policy/query_operand.cuh"
#include "policy/query_rows.cuh"
#include "policy/row_states.cuh"
#include "policy/score_mask.cuh"
#include "policy/slice_ring.cuh"
#include "policy/softmax_state.cuh"
#include "policy/swizzle.cuh"
#include "policy/visibility.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/matrix.cuh"

namespace hkv {
namespace {

template <typename T, typename Kv, int kDim_, int kQueryTiles_, bool kNarrow>
class Slices {
 public:
  using Query = T;
  static constexpr int kDim = kDim_;
  static constexpr int kQueryTiles = kQueryTiles_;
  using Tune = DecodeTuning<Kv, kDim, kQueryTiles, kNarrow>;

 private:
  using Keys = KvElement<Kv>;
  using Operand = typename Keys::Operand;
  using Layout = Swizzle<kDim * sizeof(Kv)>;
  static constexpr int kSliceTokens = Tune::kSliceTokens;
  using Ring = SliceRing<Kv, kDim, kSliceTokens, kDecodeWarps, Tune::kInFlightBytes>;
  using State = WarpState<kDim, kQueryTiles>;
  using Tiles = KeyTiles<kSliceTokens>;
  static constexpr int kKeyTiles = kSliceTokens / 16;
  static constexpr bool kOneTile = kKeyTiles * kQueryTiles == 1;
  static constexpr int kSteps = Layout::kRowBytes / 32;
  static constexpr int kFragments = Keys::kFragments;
  static constexpr int kParts = Element<Operand>::kWeightParts;

 public:
  static constexpr int kRingBytes = Ring::kBytes;
  using Side = typename Ring::ScaleRing;
  static constexpr int kSides = Keys::kScaled ? kDecodeWarps : 1;

  __device__ Slices(const hkv_attention_params& p, const hkv_window& window, int32_t seq,
                    int32_t kv_head)
      : table_(p, window, seq, kv_head), scales_(p, window, kv_head) {}

  __device__ Tiles tiles(const Visibility& visibility, int32_t first, int32_t last) const {
    return Tiles(visibility, first, last);
  }
  __device__ static int32_t granule() { return kDecodeWarps; }
  __device__ float unit(const State& state) const {
    return !Keys::kScaled ? 1.0f : scales_.per_token() ? state.unit.value() : scales_.of_values();
  }
  __device__ static int value_dim(int g, int i) { return Keys::value_dim(g, i); }

  // Adds the warp's slices of the span to its state.
  __device__ void attend(const hkv_attention_params& p, const QueryRows& rows,
                         const Visibility& visibility, int32_t row0, const Tiles& tiles,
                         const TileSpan& span, uint32_t ring_shared, Side& scale_ring,
                         State& state) const {
    const int lane = threadIdx.x % 32;
    const int first = span.begin + threadIdx.x / 32;
    const bool scaled_tokens = Keys::kScaled && scales_.per_token();
    // Scales of tokens come through L1, where a line that was read early would stay.
    const int32_t settled_end = scaled_tokens ? 0 : rows.first_position();
    Ring ring(ring_shared, scale_ring, table_, scales_, tiles, first, span.end, settled_end);
    follow_predecessor();

    uint32_t query[kQueryTiles][kDim / 16][2];
    float sm_scale = p.sm_scale * load_queries<T, Operand, Keys>(p, rows, row0, query);
    if (Keys::kScaled) {
      scales_.prefetch_values();
      sm_scale *= scales_.of_keys();
    }
    const LogitScale scale(sm_scale, p.logits_soft_cap);
    // This lane's row of the matrices of K (keys x dims) and of V (to be transposed).
    const uint32_t key_lane = Layout::offset(lane % 16, lane / 16);
    const uint32_t value_lane = Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);

    for (int32_t slice = first; slice < span.end; slice += kDecodeWarps) {
      const uint32_t keys = ring.next_keys() + key_lane;
      float score[kKeyTiles][kQueryTiles][4] = {};
      float odd_score[4] = {};  // of odd steps, where there is but one tile: two chains of products
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int kt = 0; kt < kKeyTiles; ++kt) {
          uint32_t m[4], a[kFragments][4];
          ldmatrix_x4(m, Layout::advance(keys, step) + kt * 16 * Layout::kRowBytes);
          Keys::keys(a, m);
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
            const int d = step * kFragments + f;
#pragma unroll
            for (int qt = 0; qt < kQueryTiles; ++qt) {
              Element<Operand>::mma(kOneTile && d % 2 == 1 ? odd_score : score[kt][qt], a[f],
                                    query[qt][d][0], query[qt][d][1]);
            }
          }
        }
      }
      if constexpr (kOneTile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[0][0][i] += odd_score[i];
      }
      float value_scale[kKeyTiles][2];
      if (scaled_tokens) {
        const typename Ring::Scales& token = ring.next_scales();
#pragma unroll
        for (int kt = 0; kt < kKeyTiles; ++kt) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int key = kt * 16 + h * 8 + lane / 4;
            value_scale[kt][h] = token.values[key];
#pragma unroll
            for (int qt = 0; qt < kQueryTiles; ++qt) {
              score[kt][qt][2 * h] *= token.keys[key];
              score[kt][qt][2 * h + 1] *= token.keys[key];
            }
          }
        }
        state.raise_unit(value_scale);
      }
      if (scale.capped()) {
#pragma unroll
        for (int kt = 0; kt < kKeyTiles; ++kt) {
#pragma unroll
          for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
            for (int i = 0; i < 4; ++i) score[kt][qt][i] = scale.cap(score[kt][qt][i]);
          }
        }
      }
      const KeyTile tile = tiles[slice];
      const bool in_tree =
          p.tree_mask != nullptr && tile.base + kSliceTokens > rows.first_position();
      if (in_tree || !tiles.is_clear(tile)) mask_scores(p, rows, visibility, row0, tile, score);
      state.raise(score, scale);

      uint32_t weight[kKeyTiles][kQueryTiles][kParts][2];
#pragma unroll
      for (int kt = 0; kt < kKeyTiles; ++kt) {
#pragma unroll
        for (int qt = 0; qt < kQueryTiles; ++qt) {
          float w[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            w[i] = scale.weight(score[kt][qt][i], state.base[qt][i % 2]);
            state.sum[qt][i % 2] += w[i];
            if (scaled_tokens) w[i] *= state.unit.share(value_scale[kt][i / 2]);
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t pair = Element<Operand>::pack(w[2 * h], w[2 * h + 1]);
            weight[kt][qt][0][h] = movmatrix_trans(pair);
            if constexpr (kParts == 2) {
              const uint32_t rest = Element<Operand>::pack_rest(w[2 * h], w[2 * h + 1], pair);
              weight[kt][qt][1][h] = movmatrix_trans(rest);
            }
          }
        }
      }
      const uint32_t values = ring.next_values() + value_lane;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int kt = 0; kt < kKeyTiles; ++kt) {
          uint32_t m[4], a[kFragments][4];
          ldmatrix_x4_trans(m, Layout::advance(values, step) + kt * 16 * Layout::kRowBytes);
          Keys::values(a, m);
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
#pragma unroll
              for (int qt = 0; qt < kQueryTiles; ++qt) {
                Element<Operand>::mma(state.output[qt][step * kFragments + f], a[f],
                                      weight[kt][qt][part][0], weight[kt][qt][part][1]);
              }
            }
          }
        }
      }
    }
    cp_async_wait<0>();
    __syncwarp();  // the warp is done with its ring
  }

 private:
  const BlockTable<Kv> table_;
  const KvScales scales_;
};

}  // namespace
}  // namespace hkv

#define HKV_DECODE_KERNEL(name, type, kv, dim, query_tiles, narrow)                               \
  extern "C" __global__ void __launch_bounds__(                                                   \
      HKV_DECODE_THREADS, hkv::DecodeCta<hkv::Slices<type, kv, dim, query_tiles, narrow>>::kCtas) \
      name(const __grid_constant__ hkv_attention_params p) {                                      \
    hkv::DecodeCta<hkv::Slices<type, kv, dim, query_tiles, narrow>>::run(p);                      \
  }
// Registers do not reach for 16 rows of 256 dims.
#define HKV_DECODE(name, type, kv)                            \
  HKV_DECODE_KERNEL(name##_d64_r8, type, kv, 64, 1, false)    \
  HKV_DECODE_KERNEL(name##_d64_r16, type, kv, 64, 2, false)   \
  HKV_DECODE_KERNEL(name##_d128_r8, type, kv, 128, 1, false)  \
  HKV_DECODE_KERNEL(name##_d128_r16, type, kv, 128, 2, false) \
  HKV_DECODE_KERNEL(name##_d256_r8, type, kv, 256, 1, false)
#define HKV_DECODE_NARROW(name, type)                                   \
  HKV_DECODE_KERNEL(name##_d64_r8_narrow, type, hkv::E4m3, 64, 1, true) \
  HKV_DECODE_KERNEL(name##_d128_r8_narrow, type, hkv::E4m3, 128, 1, true)

HKV_DECODE(hkv_attention_decode_bf16, __nv_bfloat16, __nv_bfloat16)
HKV_DECODE(hkv_attention_decode_f16, __half, __half)
HKV_DECODE(hkv_attention_decode_bf16_e4m3, __nv_bfloat16, hkv::E4m3)
HKV_DECODE(hkv_attention_decode_f16_e4m3, __half, hkv::E4m3)
HKV_DECODE_NARROW(hkv_attention_decode_bf16_e4m3, __nv_bfloat16)
HKV_DECODE_NARROW(hkv_attention_decode_f16_e4m3, __half)
