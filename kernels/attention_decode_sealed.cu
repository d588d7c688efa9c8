// Paged attention for few query rows per KV head where blocks of 16 bits and sealed ones, int8 or
// int4 codes, stand side by side in a sequence (abi/params.h).
//
// Grid, parts, and how states meet: as attention_decode.cu (policy/decode_cta.cuh). A warp takes
// slices of blocks, of up to 64 keys where they are sealed (policy/sealed_ring.cuh). Codes are the
// f16 operands of the products as they are; zeros and steps of K go into the queries once per
// group, those of V into the weights (policy/sealed_codes.cuh). The output of a warp is kept in the
// order, and with int4 in the rotated space, of the blocks that it read last, and changes over with
// them (policy/output_order.cuh): rotated values are rotated back once, not each.
#include "abi/params.h"
#include "policy/block_table.cuh"
#include "policy/decode_cta.cuh"
#include "policy/decode_tuning.cuh"
#include "policy/element.cuh"
#include "policy/kv_element.cuh"
#include "policy/output_order.cuh"
#include "policy/query_operand.cuh"
#include "policy/query_rows.cuh"
#include "policy/row_states.cuh"
#include "policy/score_mask.cuh"
#include "policy/sealed_codes.cuh"
#include "policy/sealed_ring.cuh"
#include "policy/softmax_state.cuh"
#include "policy/visibility.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/matrix.cuh"

namespace hkv {
namespace {

template <typename T, int kBits, int kDim_>
class SealedSlices {
 public:
  using Query = T;
  static constexpr int kDim = kDim_;
  static constexpr int kQueryTiles = 1;
  using Tune = SealedTuning;

 private:
  using Ring = SealedRing<T, kBits, kDim, Tune::kInFlightBytes>;
  using Half = typename Ring::Half;
  using State = WarpState<kDim, kQueryTiles>;
  using Tiles = KeyTiles<0>;
  using Codes = SealedCodes<kBits>;
  using Order = OutputOrder<kBits, kDim, kQueryTiles>;
  using Exact = KvElement<T>;
  static constexpr unsigned kFullWarp = 0xffffffffu;
  static constexpr int kFragments = kDim / 16;
  static constexpr int kMostTiles = Ring::kMostTokens / 16;

 public:
  static constexpr int kRingBytes = Ring::kBytes;
  struct Side {};
  static constexpr int kSides = 1;

  __device__ SealedSlices(const hkv_attention_params& p, const hkv_window& window, int32_t seq,
                          int32_t kv_head)
      : table_(p, window, seq, kv_head),
        sealed_(p, kv_head, kDim, kBits),
        block_tokens_(1 << p.block_shift) {}

  __device__ Tiles tiles(const Visibility& visibility, int32_t first, int32_t last) const {
    return Tiles(visibility, first, last, min(block_tokens_, Ring::kMostTokens));
  }
  __device__ int32_t granule() const { return kDecodeWarps << run_shift(); }
  __device__ static float unit(const State& state) { return state.unit.value(); }
  __device__ static int value_dim(int g, int i) { return Exact::value_dim(g, i); }

  // Adds the warp's slices of the span to its state.
  __device__ void attend(const hkv_attention_params& p, const QueryRows& rows,
                         const Visibility& visibility, int32_t row0, const Tiles& tiles,
                         const TileSpan& span, uint32_t ring_shared, Side&, State& state) const {
    SliceRuns runs(span, threadIdx.x / 32, run_shift());
    Ring ring(ring_shared, table_, sealed_, tiles, runs, rows.first_position());
    follow_predecessor();

    Queries queries;
    bool in_codes = false;  // the order of the output
    bool first = true;
    while (runs.has_next()) {
      const KeyTile tile = tiles[runs.next()];
      const auto kind = ring.next_kind();
      if (first || kind.sealed != in_codes) {
        if (kind.sealed) {
          queries.scale = load_queries<T, __half, Codes>(p, rows, row0, queries.whole);
          if (!first) Order::to_codes(state);
        } else {
          load_queries<T, T, Exact>(p, rows, row0, queries.whole);
          if (!first) Order::to_natural(state);
          const float one[1][2] = {{1.0f, 1.0f}};
          state.raise_unit(one);
        }
        in_codes = kind.sealed;
        first = false;
      }
      const bool in_tree =
          p.tree_mask != nullptr && tile.base + tiles.tokens() > rows.first_position();
      if (kind.sealed) {
        const bool masked = in_tree || !tiles.is_clear(tile);
        attend_codes(p, rows, visibility, row0, tile, tiles.tokens() / 16, masked, kind.same_group,
                     ring, queries, state);
      } else {
        const ExactStages stages(tile, tiles.tokens());
        for (int32_t stage = stages.begin; stage < stages.end; ++stage) {
          const KeyTile keys{tile.base + stage * 16, tile.begin, tile.end, tile.sinks};
          attend_exact(p, rows, visibility, row0, keys, in_tree || !tiles.is_clear(keys, 16), ring,
                       queries, state);
        }
      }
    }
    if (in_codes) Order::to_natural(state);
    cp_async_wait<0>();
    __syncwarp();  // the warp is done with its ring
  }

 private:
  // Queries as B fragments. Those of codes are f16, with steps folded in, and a product is
  // sum * undo + offset[c] in units of 1 / scale.
  struct Queries {
    uint32_t whole[kQueryTiles][kFragments][2];
    uint32_t folded[kFragments][2];
    float scale;
    float undo;
    float offset[2];
  };

  // log2 of the slices that share a group of K.
  __device__ int run_shift() const {
    return block_tokens_ >= kSealedGroupTokens && Ring::kMostTokens < kSealedGroupTokens ? 1 : 0;
  }
  static_assert(Ring::kMostTokens * 2 >= kSealedGroupTokens);

  // Folds a group's steps into the queries, scaled by the power of two that keeps them in the range
  // of f16, and its zeros into a number per query.
  __device__ static void fold(const uint32_t* groups, Queries& queries) {
    using Affine = SealedAffine<T>;
    const int t = threadIdx.x % 4;
    float largest = 0.0f;
    for_each_pair([&](int f, int i) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        largest = fmaxf(largest, Affine::step(groups[Codes::key_dim(t, f, i, k)]));
      }
    });
    const uint32_t exponent =
        __reduce_max_sync(kFullWarp, __float_as_uint(largest)) >> 23;  // of steps below 2^(e - 126)
    const float down = __uint_as_float((253u - exponent) << 23);
    queries.undo = __uint_as_float((exponent + 1u) << 23);
    float offset = 0.0f;
    for_each_pair([&](int f, int i) {
      const uint32_t pair = queries.whole[0][f][i];
      const float2 q = __half22float2(reinterpret_cast<const __half2&>(pair));
      const uint32_t low = groups[Codes::key_dim(t, f, i, 0)];
      const uint32_t high = groups[Codes::key_dim(t, f, i, 1)];
      queries.folded[f][i] = Element<__half>::pack(q.x * (Affine::step(low) * down),
                                                   q.y * (Affine::step(high) * down));
      offset = fmaf(q.x, fmaf(Codes::kMiddle, Affine::step(low), Affine::zero(low)), offset);
      offset = fmaf(q.y, fmaf(Codes::kMiddle, Affine::step(high), Affine::zero(high)), offset);
    });
    offset += __shfl_xor_sync(kFullWarp, offset, 1);
    offset += __shfl_xor_sync(kFullWarp, offset, 2);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      queries.offset[c] = __shfl_sync(kFullWarp, offset, (2 * t + c) * 4);
    }
  }

  template <typename F>
  __device__ static void for_each_pair(F f) {
#pragma unroll
    for (int fragment = 0; fragment < kFragments; ++fragment) {
#pragma unroll
      for (int i = 0; i < 2; ++i) f(fragment, i);
    }
  }

  // Adds a slice of a sealed block, `num_tiles` of 16 keys.
  __device__ static void attend_codes(const hkv_attention_params& p, const QueryRows& rows,
                                      const Visibility& visibility, int32_t row0,
                                      const KeyTile& tile, int32_t num_tiles, bool masked,
                                      bool same_group, Ring& ring, Queries& queries, State& state) {
    using Layout = typename Ring::Codes;
    constexpr int kSteps = Layout::kRowBytes / 32;
    const int lane = threadIdx.x % 32;
    const LogitScale scale(p.sm_scale * queries.scale, p.logits_soft_cap);
    const Half keys = ring.next_keys();
    if (!same_group) fold(keys.table(), queries);
    float score[kMostTiles][1][4];
    const uint32_t key_rows = keys.rows + Layout::offset(lane % 16, lane / 16);
#pragma unroll
    for (int kt = 0; kt < kMostTiles; ++kt) {
      if (kt >= num_tiles) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[kt][0][i] = -INFINITY;
        continue;
      }
      float product[2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t m[4], a[Codes::kFragments][4];
        ldmatrix_x4(m, Layout::advance(key_rows, step) + kt * 16 * Layout::kRowBytes);
        Codes::keys(a, m);
#pragma unroll
        for (int f = 0; f < Codes::kFragments; ++f) {
          const uint32_t(&q)[2] = queries.folded[step * Codes::kFragments + f];
          Element<__half>::mma(product[f % 2], a[f], q[0], q[1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[kt][0][i] = fmaf(product[0][i] + product[1][i], queries.undo, queries.offset[i % 2]);
        if (scale.capped()) score[kt][0][i] = scale.cap(score[kt][0][i]);
      }
    }
    if (masked) mask_scores(p, rows, visibility, row0, tile, score);
    state.raise(score, scale);

    const Half values = ring.next_values();
    using Affine = SealedAffine<T>;
    uint32_t group[kMostTiles][2];
    float step_of[kMostTiles][2];
#pragma unroll
    for (int kt = 0; kt < kMostTiles; ++kt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        group[kt][h] = kt < num_tiles ? values.table()[kt * 16 + h * 8 + lane / 4] : 0u;
        step_of[kt][h] = Affine::step(group[kt][h]);
      }
    }
    state.raise_unit(step_of);
    uint32_t weight[kMostTiles][2];
#pragma unroll
    for (int kt = 0; kt < kMostTiles; ++kt) {
      float w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[i] = scale.weight(score[kt][0][i], state.base[0][i % 2]);
        state.sum[0][i % 2] += w[i];
        const float middle =
            fmaf(Codes::kMiddle, step_of[kt][i / 2], Affine::zero(group[kt][i / 2]));
        state.common[0][i % 2] = fmaf(w[i], state.unit.share(middle), state.common[0][i % 2]);
        w[i] *= state.unit.share(step_of[kt][i / 2]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        weight[kt][h] = movmatrix_trans(Element<__half>::pack(w[2 * h], w[2 * h + 1]));
      }
    }
    const uint32_t value_rows =
        values.rows + Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int kt = 0; kt < kMostTiles; ++kt) {
      if (kt >= num_tiles) break;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t m[4], a[Codes::kFragments][4];
        ldmatrix_x4_trans(m, Layout::advance(value_rows, step) + kt * 16 * Layout::kRowBytes);
        Codes::values(a, m);
#pragma unroll
        for (int f = 0; f < Codes::kFragments; ++f) {
          Element<__half>::mma(state.output[0][step * Codes::kFragments + f], a[f], weight[kt][0],
                               weight[kt][1]);
        }
      }
    }
  }

  // Adds 16 keys of a block of 16 bits.
  __device__ static void attend_exact(const hkv_attention_params& p, const QueryRows& rows,
                                      const Visibility& visibility, int32_t row0,
                                      const KeyTile& tile, bool masked, Ring& ring,
                                      const Queries& queries, State& state) {
    using Layout = typename Ring::Exact;
    constexpr int kParts = Element<T>::kWeightParts;
    const int lane = threadIdx.x % 32;
    const LogitScale scale(p.sm_scale, p.logits_soft_cap);
    const uint32_t keys = ring.next_keys().rows + Layout::offset(lane % 16, lane / 16);
    float score[1][1][4] = {};
#pragma unroll
    for (int d = 0; d < kFragments; ++d) {
      uint32_t m[4];
      ldmatrix_x4(m, Layout::advance(keys, d));
      Element<T>::mma(score[0][0], m, queries.whole[0][d][0], queries.whole[0][d][1]);
    }
    if (scale.capped()) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[0][0][i] = scale.cap(score[0][0][i]);
    }
    if (masked) mask_scores(p, rows, visibility, row0, tile, score);
    state.raise(score, scale);
    uint32_t weight[kParts][2];
    float w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      w[i] = scale.weight(score[0][0][i], state.base[0][i % 2]);
      state.sum[0][i % 2] += w[i];
      w[i] = state.unit.share(w[i]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t pair = Element<T>::pack(w[2 * h], w[2 * h + 1]);
      weight[0][h] = movmatrix_trans(pair);
      if constexpr (kParts == 2) {
        weight[1][h] = movmatrix_trans(Element<T>::pack_rest(w[2 * h], w[2 * h + 1], pair));
      }
    }
    const uint32_t values =
        ring.next_values().rows + Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int d = 0; d < kFragments; ++d) {
      uint32_t m[4];
      ldmatrix_x4_trans(m, Layout::advance(values, d));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Element<T>::mma(state.output[0][d], m, weight[part][0], weight[part][1]);
      }
    }
  }

  const BlockTable<T> table_;
  const SealedBlocks sealed_;
  const int32_t block_tokens_;
};

}  // namespace
}  // namespace hkv

// Registers do not reach for 256 dims.
#define HKV_DECODE_KERNEL(name, type, bits, dim)                                     \
  extern "C" __global__ void __launch_bounds__(                                      \
      HKV_DECODE_THREADS, hkv::DecodeCta<hkv::SealedSlices<type, bits, dim>>::kCtas) \
      name(const __grid_constant__ hkv_attention_params p) {                         \
    hkv::DecodeCta<hkv::SealedSlices<type, bits, dim>>::run(p);                      \
  }
#define HKV_DECODE(name, type, bits)               \
  HKV_DECODE_KERNEL(name##_d64_r8, type, bits, 64) \
  HKV_DECODE_KERNEL(name##_d128_r8, type, bits, 128)

HKV_DECODE(hkv_attention_decode_bf16_int8, __nv_bfloat16, 8)
HKV_DECODE(hkv_attention_decode_bf16_int4, __nv_bfloat16, 4)
HKV_DECODE(hkv_attention_decode_f16_int8, __half, 8)
HKV_DECODE(hkv_attention_decode_f16_int4, __half, 4)
