// Paged attention for few query rows per KV head: decode, and a few speculative tokens.
//
// Grid: one CTA of 4 warps per (sequence, split, KV head), x = (seq * num_splits + split) * Hk +
// head. The query rows of the CTA (packed GQA, policy/query_rows.cuh) are served 8 * kQueryTiles at
// a time; the host picks the kernel so that one round is the rule.
//
// Layouts: q, out [T, Hq, D] by strides; K and V through the block table (policy/block_table.cuh).
// Keys are cut into slices of 16. Slice n of the CTA's span belongs to warp n % 4: the warp copies
// it into its own ring in shared memory, computes its scores and adds it to its own softmax state,
// without any CTA-wide barrier while keys stream. The ring holds halves of a slice, K and V in
// turn, [16][D] swizzled; kRing - 1 halves are in flight while one is used. The four states meet in
// shared memory at the end.
//
// Products are transposed so that K and V are the 16-row operand of the tensor cores and the few
// queries the 8-column one: S^T[16 keys, 8] = K Q^T, O^T[D, 8] = V^T P^T.
#include "abi/params.h"
#include "policy/block_table.cuh"
#include "policy/element.cuh"
#include "policy/query_rows.cuh"
#include "policy/softmax_state.cuh"
#include "policy/swizzle.cuh"
#include "policy/visibility.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/matrix.cuh"

namespace hkv {
namespace {

constexpr int kWarps = HKV_DECODE_THREADS / 32;
constexpr int kSliceTokens = 16;
constexpr int kRingBytes = HKV_DECODE_SHARED_BYTES / kWarps;
// What a warp has in flight: 128 KB per SM with two CTAs on it, past which bandwidth falls again
// (H100).
constexpr int kInFlightBytes = 16 << 10;
constexpr unsigned kFullWarp = 0xffffffffu;

using SliceTiles = KeyTiles<kSliceTokens>;

// The warp's ring: copies the halves of the slices first, first + kWarps, ... below `end` in order.
template <typename T, int kDim>
class SliceRing {
  using Layout = Swizzle<kDim>;
  static constexpr int kHalfBytes = kSliceTokens * Layout::kRowBytes;
  static constexpr int kRing = kInFlightBytes / kHalfBytes + 1;
  static_assert(kRing * kHalfBytes <= kRingBytes, "the ring must fit");
  static constexpr int kRowsPerCopy = 32 / Layout::kChunks;

 public:
  __device__ SliceRing(uint32_t ring_shared, const BlockTable<T>& table, const SliceTiles& tiles,
                       int32_t first, int32_t end)
      : table_(table), tiles_(tiles), ring_(ring_shared), next_slice_(first), end_(end) {
    lane_ = threadIdx.x % 32;
    const int row = lane_ / Layout::kChunks;
    const int chunk = lane_ % Layout::kChunks;
    lane_offset_ = row * table.stride_token() + chunk * 8;
    prefetched_id_ = fetch_id();
#pragma unroll
    for (int half = 0; half < kRing - 1; ++half) issue();
  }

  // Waits for the next half, starts the copy of the one that takes the place of the last; gives the
  // shared address of the half.
  __device__ uint32_t next() {
    cp_async_wait<kRing - 2>();
    __syncwarp();  // all lanes' copies have landed, and all lanes are done with the last half
    issue();
    const uint32_t half = ring_ + read_ * kHalfBytes;
    read_ = read_ + 1 == kRing ? 0 : read_ + 1;
    return half;
  }

 private:
  // Block of the token group lane % 2 of the next slice; read one slice ahead of its use.
  __device__ int32_t fetch_id() const {
    if (next_slice_ >= end_) return 0;
    const KeyTile tile = tiles_[next_slice_];
    const int32_t token = tile.base + lane_ % 2 * kGroupTokens;
    return tile.holds_any(token, kGroupTokens) ? table_.block_id(token) : 0;
  }

  __device__ void issue() {
    if (value_is_next_) {
      if (tile_.end > 0) copy(table_.values());
    } else {
      tile_ = next_slice_ < end_ ? tiles_[next_slice_] : KeyTile{};
      block_id_ = prefetched_id_;
      next_slice_ += kWarps;
      prefetched_id_ = fetch_id();
      if (tile_.end > 0) copy(table_.keys());
    }
    value_is_next_ = !value_is_next_;
    write_ = write_ + 1 == kRing ? 0 : write_ + 1;
    cp_async_commit();  // an empty group keeps the count
  }

  __device__ void copy(const T* pool) const {
    const int row = lane_ / Layout::kChunks;
    const int chunk = lane_ % Layout::kChunks;
    const uint32_t half = ring_ + write_ * kHalfBytes;
#pragma unroll
    for (int group = 0; group < kSliceTokens / kGroupTokens; ++group) {
      const int32_t token = tile_.base + group * kGroupTokens;
      const int32_t id = __shfl_sync(kFullWarp, block_id_, group);
      const T* src = pool + table_.offset(id, token) + lane_offset_;
#pragma unroll
      for (int r = 0; r < kGroupTokens; r += kRowsPerCopy) {
        cp_async_16(half + Layout::offset(group * kGroupTokens + r + row, chunk), src,
                    tile_.holds(token + r + row));
        src += kRowsPerCopy * table_.stride_token();
      }
    }
  }

  const BlockTable<T>& table_;
  const SliceTiles& tiles_;
  const uint32_t ring_;
  int64_t lane_offset_;
  KeyTile tile_;  // slice whose halves are being issued; end == 0: past the last
  int32_t next_slice_;
  const int32_t end_;
  int32_t block_id_;
  int32_t prefetched_id_;
  int32_t lane_;
  int32_t read_ = 0;
  int32_t write_ = 0;
  bool value_is_next_ = false;
};

// Softmax state of the warp over its slices, transposed: lane (g, t) holds the columns (queries)
// 2t, 2t+1 of every query tile; of the output the dims g, g+8 of every 16; a sum over its own keys.
template <int kDim, int kQueryTiles>
struct WarpState {
  float max[kQueryTiles][2];
  float sum[kQueryTiles][2];
  float output[kQueryTiles][kDim / 16][4];

  __device__ WarpState() {
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        max[qt][c] = -INFINITY;
        sum[qt][c] = 0.0f;
      }
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) output[qt][d][i] = 0.0f;
      }
    }
  }

  // Moves the maxima to those of the scores where any exceeds its slack, and rescales.
  __device__ void raise(const float (&score)[kQueryTiles][4], const LogitScale& scale) {
    bool exceeded = false;
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) exceeded |= exceeds(scale.logit(score[qt][i]), max[qt][i % 2]);
    }
    if (!__any_sync(kFullWarp, exceeded)) return;
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float top = fmaxf(max[qt][c], scale.logit(fmaxf(score[qt][c], score[qt][c + 2])));
#pragma unroll
        for (int delta = 4; delta < 32; delta *= 2) {
          top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, delta));
        }
        const float keep = rescale(max[qt][c], top);
        max[qt][c] = top;
        sum[qt][c] *= keep;
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
          output[qt][d][c] *= keep;
          output[qt][d][c + 2] *= keep;
        }
      }
    }
  }
};

template <typename T, int kDim, int kQueryTiles>
class Decode {
  using Layout = Swizzle<kDim>;
  static constexpr int kRows = 8 * kQueryTiles;
  // Rows of a warp's output in shared memory, in floats: padded so that the lanes' writes do not
  // collide.
  static constexpr int kPitch = kDim + 4;
  static_assert(kRows * kPitch * 4 <= kRingBytes, "a warp's output takes the place of its ring");

 public:
  __device__ static void run(const hkv_attention_params& p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ float warp_max[kWarps][kRows];
    __shared__ float warp_sum[kWarps][kRows];
    grid_dependency_launch();

    const int32_t kv_head = blockIdx.x % p.num_kv_heads;
    const int32_t split = blockIdx.x / p.num_kv_heads % p.num_splits;
    const int32_t seq = blockIdx.x / p.num_kv_heads / p.num_splits;
    const QueryRows rows(p, seq, kv_head);
    const hkv_window window = p.windows[p.layer];
    const Visibility visibility(window);
    const BlockTable<T> table(p, window, seq, kv_head);
    const LogitScale scale(p.sm_scale, p.logits_soft_cap);
    const int warp = threadIdx.x / 32;
    uint8_t* warp_shared = shared + warp * kRingBytes;

    for (int32_t row0 = 0; row0 < rows.count(); row0 += kRows) {
      const int32_t last_row = min(row0 + kRows, rows.count()) - 1;
      const SliceTiles tiles(visibility, rows.position(row0), rows.position(last_row));
      const TileSpan span(tiles.count(), split, p.num_splits, kWarps);

      WarpState<kDim, kQueryTiles> state;
      if (span.begin + warp < span.end) {
        attend(p, rows, row0, visibility, tiles, table, scale, span,
               static_cast<uint32_t>(__cvta_generic_to_shared(warp_shared)), state);
      }
      put_state(state, reinterpret_cast<float*>(warp_shared), warp_max[warp], warp_sum[warp]);
      __syncthreads();
      merge_warps(p, rows, row0, split, shared, warp_max, warp_sum);
      __syncthreads();  // the rings may be filled again
    }
  }

 private:
  // Adds the warp's slices of the span to its state.
  __device__ static void attend(const hkv_attention_params& p, const QueryRows& rows, int32_t row0,
                                const Visibility& visibility, const SliceTiles& tiles,
                                const BlockTable<T>& table, const LogitScale& scale,
                                const TileSpan& span, uint32_t ring_shared,
                                WarpState<kDim, kQueryTiles>& state) {
    const int lane = threadIdx.x % 32;
    const int first = span.begin + threadIdx.x / 32;
    SliceRing<T, kDim> ring(ring_shared, table, tiles, first, span.end);

    uint32_t query[kQueryTiles][kDim / 16][2];
    load_queries(p, rows, row0, query);
    // This lane's row of the matrices of K (keys x dims) and of V (to be transposed).
    const uint32_t key_lane = Layout::offset(lane % 16, lane / 16);
    const uint32_t value_lane = Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);

    for (int32_t slice = first; slice < span.end; slice += kWarps) {
      const uint32_t keys = ring.next() + key_lane;
      float score[kQueryTiles][4] = {};
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t a[4];
        ldmatrix_x4(a, Layout::advance(keys, d));
#pragma unroll
        for (int qt = 0; qt < kQueryTiles; ++qt) {
          Element<T>::mma(score[qt], a, query[qt][d][0], query[qt][d][1]);
        }
      }
      if (scale.capped()) {
#pragma unroll
        for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
          for (int i = 0; i < 4; ++i) score[qt][i] = scale.cap(score[qt][i]);
        }
      }
      const KeyTile tile = tiles[slice];
      if (!tiles.is_clear(tile)) mask(rows, row0, visibility, tile, score);
      state.raise(score, scale);

      uint32_t weight[kQueryTiles][2];
#pragma unroll
      for (int qt = 0; qt < kQueryTiles; ++qt) {
        float w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          w[i] = scale.weight(score[qt][i], state.max[qt][i % 2]);
          state.sum[qt][i % 2] += w[i];
        }
        weight[qt][0] = movmatrix_trans(Element<T>::pack(w[0], w[1]));
        weight[qt][1] = movmatrix_trans(Element<T>::pack(w[2], w[3]));
      }
      const uint32_t values = ring.next() + value_lane;
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, Layout::advance(values, d));
#pragma unroll
        for (int qt = 0; qt < kQueryTiles; ++qt) {
          Element<T>::mma(state.output[qt][d], a, weight[qt][0], weight[qt][1]);
        }
      }
    }
    cp_async_wait<0>();
    __syncwarp();  // the warp is done with its ring
  }

  // The queries as B fragments: dims 16d + 2t (+8) of query 8qt + g. Rows past the last are zero.
  __device__ static void load_queries(const hkv_attention_params& p, const QueryRows& rows,
                                      int32_t row0, uint32_t (&query)[kQueryTiles][kDim / 16][2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
      const int32_t row = row0 + qt * 8 + lane / 4;
      const bool valid = row < rows.count();
      const T* q = static_cast<const T*>(p.q) + lane % 4 * 2;
      if (valid) q += rows.token(row) * p.q_stride_token + rows.head(row) * p.q_stride_head;
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          query[qt][d][i] =
              valid ? __ldg(reinterpret_cast<const uint32_t*>(q + d * 16 + i * 8)) : 0u;
        }
      }
    }
  }

  __device__ static void mask(const QueryRows& rows, int32_t row0, const Visibility& visibility,
                              const KeyTile& tile, float (&score)[kQueryTiles][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int32_t position = rows.position(row0 + qt * 8 + lane % 4 * 2 + c);
        const SeenKeys seen(visibility, tile, position, tile.base + lane / 4);
        if (!seen.has(0)) score[qt][c] = -INFINITY;
        if (!seen.has(8)) score[qt][c + 2] = -INFINITY;
      }
    }
  }

  // Puts the warp's state into shared memory: output [row][dim], maxima in log2 units, sums.
  __device__ static void put_state(const WarpState<kDim, kQueryTiles>& state, float* output,
                                   float* max, float* sum) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = qt * 8 + lane % 4 * 2 + c;
        float total = state.sum[qt][c];
#pragma unroll
        for (int delta = 4; delta < 32; delta *= 2) {
          total += __shfl_xor_sync(kFullWarp, total, delta);
        }
        if (lane / 4 == 0) {
          max[row] = state.max[qt][c];
          sum[row] = total;
        }
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
          output[row * kPitch + d * 16 + lane / 4] = state.output[qt][d][c];
          output[row * kPitch + d * 16 + lane / 4 + 8] = state.output[qt][d][c + 2];
        }
      }
    }
  }

  // Merges the warps' states and writes the rows: to the output, or as partial states of this
  // split.
  __device__ static void merge_warps(const hkv_attention_params& p, const QueryRows& rows,
                                     int32_t row0, int32_t split, const uint8_t* shared,
                                     const float (&max)[kWarps][kRows],
                                     const float (&sum)[kWarps][kRows]) {
    constexpr int kVectors = kDim / 4;
    const bool whole = p.num_splits == 1;
    for (int i = threadIdx.x; i < kRows * kVectors; i += kWarps * 32) {
      const int local = i / kVectors;
      const int32_t row = row0 + local;
      if (row >= rows.count()) return;
      const int dim = i % kVectors * 4;
      float top = max[0][local];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) top = fmaxf(top, max[w][local]);
      float total = 0.0f;
      float o[4] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float share = top == -INFINITY ? 0.0f : ex2(max[w][local] - top);
        total = fmaf(share, sum[w][local], total);
        const float4 part = *reinterpret_cast<const float4*>(
            shared + w * kRingBytes + (local * kPitch + dim) * sizeof(float));
        o[0] = fmaf(share, part.x, o[0]);
        o[1] = fmaf(share, part.y, o[1]);
        o[2] = fmaf(share, part.z, o[2]);
        o[3] = fmaf(share, part.w, o[3]);
      }
      const int64_t token = rows.token(row);
      const int32_t head = rows.head(row);
      const bool has_sink = whole && p.sink_logits != nullptr;
      const ClosedRow closed(top, total, has_sink ? p.sink_logits[head] : -INFINITY);
#pragma unroll
      for (int c = 0; c < 4; ++c) o[c] *= closed.scale;
      const int64_t index = token * p.num_qo_heads + head;
      if (whole) {
        T* out = static_cast<T*>(p.out) + token * p.out_stride_token + head * p.out_stride_head;
        *reinterpret_cast<uint2*>(out + dim) =
            make_uint2(Element<T>::pack(o[0], o[1]), Element<T>::pack(o[2], o[3]));
        if (dim == 0 && p.lse != nullptr) p.lse[index] = closed.lse;
      } else {
        const int64_t state = static_cast<int64_t>(split) * p.num_tokens * p.num_qo_heads + index;
        *reinterpret_cast<float4*>(p.partial_out + state * kDim + dim) =
            make_float4(o[0], o[1], o[2], o[3]);
        if (dim == 0) p.partial_lse[state] = closed.lse;
      }
    }
  }
};

}  // namespace
}  // namespace hkv

#define HKV_DECODE(name, type, dim, query_tiles)                      \
  extern "C" __global__ void __launch_bounds__(HKV_DECODE_THREADS, 2) \
      name(const __grid_constant__ hkv_attention_params p) {          \
    hkv::Decode<type, dim, query_tiles>::run(p);                      \
  }

HKV_DECODE(hkv_attention_decode_bf16_d64_r8, __nv_bfloat16, 64, 1)
HKV_DECODE(hkv_attention_decode_bf16_d64_r16, __nv_bfloat16, 64, 2)
HKV_DECODE(hkv_attention_decode_bf16_d128_r8, __nv_bfloat16, 128, 1)
HKV_DECODE(hkv_attention_decode_bf16_d128_r16, __nv_bfloat16, 128, 2)
HKV_DECODE(hkv_attention_decode_bf16_d256_r8, __nv_bfloat16, 256, 1)
HKV_DECODE(hkv_attention_decode_bf16_d256_r16, __nv_bfloat16, 256, 2)
HKV_DECODE(hkv_attention_decode_f16_d64_r8, __half, 64, 1)
HKV_DECODE(hkv_attention_decode_f16_d64_r16, __half, 64, 2)
HKV_DECODE(hkv_attention_decode_f16_d128_r8, __half, 128, 1)
HKV_DECODE(hkv_attention_decode_f16_d128_r16, __half, 128, 2)
HKV_DECODE(hkv_attention_decode_f16_d256_r8, __half, 256, 1)
HKV_DECODE(hkv_attention_decode_f16_d256_r16, __half, 256, 2)
