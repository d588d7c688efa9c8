// Paged attention for many query rows per KV head: prefill, chunked prefill and appends.
//
// Grid: one CTA of 4 warps per (tile of query rows, split, KV head),
// x = (tile * num_splits + split) * Hk + head, tiles counted from the last one down: under a causal
// mask the last have the most work and should start first. Tiles are found on the device, some are
// empty (policy/query_rows.cuh).
//
// Layouts: q, out [T, Hq, D] by strides; K and V through the block table (policy/block_table.cuh).
// A CTA owns kRows packed rows, a warp kRowTiles * 16 of them. Queries stay in shared memory
// [kRows][D]; tiles of kKeys keys go through two stages of K [kKeys][D] and V [kKeys][D], all
// swizzled: while the warps compute on one stage, all threads' copies fill the other. Scores S = Q
// K^T, weights and output O = P V live in registers of the warp that owns the rows.
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

constexpr int kThreads = HKV_PREFILL_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// What a CTA needs now and then. It lies in shared memory: registers are for the rows' states and
// for the walk along the keys.
struct Work {
  QueryRows rows;
  int32_t row0;  // first row of the CTA's tile
  int32_t split;
  Visibility visibility;
  LogitScale scale;
};

template <typename T, int kDim>
class Prefill {
  using Layout = Swizzle<kDim>;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;  // 16-row tiles of a warp
  static constexpr int kWarpRows = kRowTiles * 16;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = kDim <= 128 ? 64 : 32;
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kDimTiles = kDim / 8;
  static constexpr int kTileBytes = kKeys * Layout::kRowBytes;
  static constexpr int kQueryBytes = kRows * Layout::kRowBytes;
  static constexpr int kRowsPerCopy = kThreads / Layout::kChunks;
  static constexpr int kGroups = kKeys / kGroupTokens;
  static_assert(kQueryBytes + 4 * kTileBytes <= HKV_PREFILL_SHARED_BYTES, "two stages must fit");

 public:
  __device__ static void run(const hkv_attention_params& p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    grid_dependency_launch();

    const int32_t kv_head = blockIdx.x % p.num_kv_heads;
    const uint32_t rest = blockIdx.x / p.num_kv_heads;
    const int32_t split = rest % p.num_splits;
    const int64_t row_tile = gridDim.x / p.num_kv_heads / p.num_splits - 1 - rest / p.num_splits;
    const int32_t seq = sequence_of_row_tile<kRows>(p, row_tile);
    const int32_t row0 = static_cast<int32_t>(row_tile - first_row_tile<kRows>(p, seq)) * kRows;
    const QueryRows rows(p, seq, kv_head);
    if (row0 >= rows.count()) return;

    const hkv_window window = p.windows[p.layer];
    const Visibility visibility(window);
    __shared__ Work work;
    __shared__ int32_t positions[kRows];
    if (threadIdx.x == 0) {
      work = {rows, row0, split, visibility, LogitScale(p.sm_scale, p.logits_soft_cap)};
    }
    if (threadIdx.x < kRows) positions[threadIdx.x] = rows.position(row0 + threadIdx.x);
    __syncthreads();
    const int32_t last_row = min(row0 + kRows, rows.count()) - 1;
    const KeyTiles<kKeys> tiles(visibility, rows.position(row0), rows.position(last_row));
    Prefill tile(p, work, positions, BlockTable<T>(p, window, seq, kv_head), tiles,
                 TileSpan(tiles.count(), split, p.num_splits, 1),
                 static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
    tile.attend();
    tile.finish(shared);
  }

 private:
  __device__ Prefill(const hkv_attention_params& p, const Work& work, const int32_t* positions,
                     const BlockTable<T>& table, const KeyTiles<kKeys>& tiles, const TileSpan& span,
                     uint32_t shared)
      : p_(p),
        work_(work),
        warp_positions_(positions + threadIdx.x / 32 * kWarpRows),
        table_(table),
        tiles_(tiles),
        span_(span),
        queries_(shared),
        stages_(shared + kQueryBytes) {
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        max_[rt][h] = -INFINITY;
        sum_[rt][h] = 0.0f;
      }
#pragma unroll
      for (int d = 0; d < kDimTiles; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) output_[rt][d][i] = 0.0f;
      }
    }
  }

  __device__ void attend() {
    if (span_.begin >= span_.end) return;
    copy_queries();
    prefetched_id_ = fetch_id(span_.begin);
    copy_keys_and_values(span_.begin);
    for (int32_t n = span_.begin; n < span_.end; ++n) {
      cp_async_wait<0>();
      __syncthreads();  // the tile has landed, and no warp reads the other stage any more
      if (n + 1 < span_.end) copy_keys_and_values(n + 1);
      if (warp_row0() < work_.rows.count()) attend_tile(n);
    }
  }

  // First row of the warp.
  __device__ int32_t warp_row0() const { return work_.row0 + threadIdx.x / 32 * kWarpRows; }

  // ---- copies to shared memory, by all threads ----

  __device__ void copy_queries() const {
    const int chunk = threadIdx.x % Layout::kChunks;
#pragma unroll 4
    for (int r = threadIdx.x / Layout::kChunks; r < kRows; r += kRowsPerCopy) {
      const int32_t row = work_.row0 + r;
      const bool valid = row < work_.rows.count();
      const T* q = static_cast<const T*>(p_.q);
      if (valid) {
        q += work_.rows.token(row) * p_.q_stride_token + work_.rows.head(row) * p_.q_stride_head +
             chunk * 8;
      }
      cp_async_16(queries_ + Layout::offset(r, chunk), q, valid);
    }
  }

  // Block of the token group lane % kGroups of tile n; read one tile ahead of its use.
  __device__ int32_t fetch_id(int32_t n) const {
    if (n >= span_.end) return 0;
    const KeyTile tile = tiles_[n];
    const int32_t token = tile.base + threadIdx.x % kGroups * kGroupTokens;
    return tile.holds_any(token, kGroupTokens) ? table_.block_id(token) : 0;
  }

  __device__ void copy_keys_and_values(int32_t n) {
    const KeyTile tile = tiles_[n];
    const int32_t ids = prefetched_id_;
    prefetched_id_ = fetch_id(n + 1);
    const uint32_t keys = stage(n);
    const int chunk = threadIdx.x % Layout::kChunks;
    const int thread_row = threadIdx.x / Layout::kChunks;
    const int64_t to_values = table_.values() - table_.keys();
#pragma unroll
    for (int i = 0; i < kKeys / kRowsPerCopy; ++i) {
      const int r = i * kRowsPerCopy + thread_row;
      const int32_t token = tile.base + r;
      const int32_t id = __shfl_sync(kFullWarp, ids, r / kGroupTokens);
      const T* src = table_.keys() + table_.offset(id, token) + chunk * 8;
      const uint32_t dst = keys + Layout::offset(r, chunk);
      cp_async_16(dst, src, tile.holds(token));
      cp_async_16(dst + kTileBytes, src + to_values, tile.holds(token));
    }
    cp_async_commit();
  }

  // Shared address of the stage of tile n: its keys, then its values.
  __device__ uint32_t stage(int32_t n) const {
    return stages_ + (n - span_.begin) % 2 * (2 * kTileBytes);
  }

  // ---- one tile of keys, by the warp for its rows ----

  __device__ void attend_tile(int32_t n) {
    const int lane = threadIdx.x % 32;
    const uint32_t keys = stage(n);
    float score[kRowTiles][kKeyTiles][4] = {};
    // This lane's row of the matrices of Q (rows x dims), K (keys x dims) and V (to be transposed).
    const uint32_t query_lane =
        queries_ + Layout::offset(threadIdx.x / 32 * kWarpRows + lane % 16, lane / 16);
    const uint32_t key_lane = keys + Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const uint32_t value_lane = keys + kTileBytes + Layout::offset(lane % 16, lane / 16);
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
        ldmatrix_x4(a[rt], Layout::advance(query_lane, d) + rt * 16 * Layout::kRowBytes);
      }
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
        uint32_t b[4];
        ldmatrix_x4(b, Layout::advance(key_lane, d) + k * 16 * Layout::kRowBytes);
#pragma unroll
        for (int rt = 0; rt < kRowTiles; ++rt) {
          Element<T>::mma(score[rt][2 * k], a[rt], b[0], b[1]);
          Element<T>::mma(score[rt][2 * k + 1], a[rt], b[2], b[3]);
        }
      }
    }

    const LogitScale scale = work_.scale;
    if (scale.capped()) cap(scale, score);
    const KeyTile tile = tiles_[n];
    if (!tiles_.is_clear(tile)) mask(tile, score);
    raise(scale, score);

    // Weights of 16 keys at a time: exponentials of the next fill the gaps between the products.
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int h = i % 2;
          const float w0 = scale.weight(score[rt][2 * k + i / 2][2 * h], max_[rt][h]);
          const float w1 = scale.weight(score[rt][2 * k + i / 2][2 * h + 1], max_[rt][h]);
          sum_[rt][h] += w0 + w1;
          a[rt][i] = Element<T>::pack(w0, w1);
        }
      }
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, Layout::advance(value_lane, d) + k * 16 * Layout::kRowBytes);
#pragma unroll
        for (int rt = 0; rt < kRowTiles; ++rt) {
          Element<T>::mma(output_[rt][2 * d], a[rt], b[0], b[1]);
          Element<T>::mma(output_[rt][2 * d + 1], a[rt], b[2], b[3]);
        }
      }
    }
  }

  __device__ void cap(const LogitScale& scale, float (&score)[kRowTiles][kKeyTiles][4]) const {
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[rt][k][i] = scale.cap(score[rt][k][i]);
      }
    }
  }

  __device__ void mask(const KeyTile& tile, float (&score)[kRowTiles][kKeyTiles][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int32_t position = warp_positions_[rt * 16 + h * 8 + lane / 4];
        const SeenKeys seen(work_.visibility, tile, position, tile.base + lane % 4 * 2);
#pragma unroll
        for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (!seen.has(k * 8 + c)) score[rt][k][2 * h + c] = -INFINITY;
          }
        }
      }
    }
  }

  // Moves the maxima to those of the scores where any exceeds its slack, and rescales.
  __device__ void raise(const LogitScale& scale, const float (&score)[kRowTiles][kKeyTiles][4]) {
    float top[kRowTiles][2];
    bool exceeded = false;
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[rt][h] = fmaxf(score[rt][0][2 * h], score[rt][0][2 * h + 1]);
#pragma unroll
        for (int k = 1; k < kKeyTiles; ++k) {
          top[rt][h] = fmaxf(top[rt][h], fmaxf(score[rt][k][2 * h], score[rt][k][2 * h + 1]));
        }
        exceeded |= exceeds(scale.logit(top[rt][h]), max_[rt][h]);
      }
    }
    if (!__any_sync(kFullWarp, exceeded)) return;
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float m = fmaxf(max_[rt][h], scale.logit(top[rt][h]));
        m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, 1));
        m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, 2));
        const float keep = rescale(max_[rt][h], m);
        max_[rt][h] = m;
        sum_[rt][h] *= keep;
#pragma unroll
        for (int d = 0; d < kDimTiles; ++d) {
          output_[rt][d][2 * h] *= keep;
          output_[rt][d][2 * h + 1] *= keep;
        }
      }
    }
  }

  // ---- the end: close the rows and write them ----

  __device__ void finish(uint8_t* shared) {
    const int lane = threadIdx.x % 32;
    const bool whole = p_.num_splits == 1;
    // Finished rows pass through the queries' place, of which each warp reads its own rows only.
    uint8_t* warp_rows = shared + threadIdx.x / 32 * kWarpRows * Layout::kRowBytes;
    cp_async_wait<0>();
    __syncwarp();
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float total = sum_[rt][h];
        total += __shfl_xor_sync(kFullWarp, total, 1);
        total += __shfl_xor_sync(kFullWarp, total, 2);
        const int local = rt * 16 + h * 8 + lane / 4;
        const int32_t row = warp_row0() + local;
        const bool valid = row < work_.rows.count();
        const int64_t token = work_.rows.token(row);
        const int32_t head = work_.rows.head(row);
        const bool has_sink = whole && p_.sink_logits != nullptr;
        const ClosedRow closed(max_[rt][h], total, has_sink ? p_.sink_logits[head] : -INFINITY);
        const int64_t index = token * p_.num_qo_heads + head;
        if (whole) {
#pragma unroll
          for (int d = 0; d < kDimTiles; ++d) {
            *reinterpret_cast<uint32_t*>(warp_rows + Layout::offset(local, d) + lane % 4 * 4) =
                Element<T>::pack(output_[rt][d][2 * h] * closed.scale,
                                 output_[rt][d][2 * h + 1] * closed.scale);
          }
          if (valid && lane % 4 == 0 && p_.lse != nullptr) p_.lse[index] = closed.lse;
        } else if (valid) {
          const int64_t state =
              static_cast<int64_t>(work_.split) * p_.num_tokens * p_.num_qo_heads + index;
          float* partial = p_.partial_out + state * kDim + lane % 4 * 2;
#pragma unroll
          for (int d = 0; d < kDimTiles; ++d) {
            *reinterpret_cast<float2*>(partial + d * 8) = make_float2(
                output_[rt][d][2 * h] * closed.scale, output_[rt][d][2 * h + 1] * closed.scale);
          }
          if (lane % 4 == 0) p_.partial_lse[state] = closed.lse;
        }
      }
    }
    if (!whole) return;
    __syncwarp();
    const int chunk = lane % Layout::kChunks;
#pragma unroll 4
    for (int local = lane / Layout::kChunks; local < kWarpRows; local += 32 / Layout::kChunks) {
      const int32_t row = warp_row0() + local;
      if (row >= work_.rows.count()) return;
      T* out = static_cast<T*>(p_.out) + work_.rows.token(row) * p_.out_stride_token +
               work_.rows.head(row) * p_.out_stride_head;
      *reinterpret_cast<uint4*>(out + chunk * 8) =
          *reinterpret_cast<const uint4*>(warp_rows + Layout::offset(local, chunk));
    }
  }

  const hkv_attention_params& p_;
  const Work& work_;
  const int32_t* const warp_positions_;  // in shared memory, of the warp's rows
  const BlockTable<T> table_;
  const KeyTiles<kKeys> tiles_;
  const TileSpan span_;
  const uint32_t queries_;
  const uint32_t stages_;
  int32_t prefetched_id_ = 0;

  // Softmax state of the warp's rows: lane (g, t) holds rows g and g+8 of every row tile; of the
  // output the dims 2t, 2t+1 of every 8; a sum over its own keys.
  float max_[kRowTiles][2];
  float sum_[kRowTiles][2];
  float output_[kRowTiles][kDimTiles][4];
};

}  // namespace
}  // namespace hkv

#define HKV_PREFILL(name, type, dim)                                   \
  extern "C" __global__ void __launch_bounds__(HKV_PREFILL_THREADS, 2) \
      name(const __grid_constant__ hkv_attention_params p) {           \
    hkv::Prefill<type, dim>::run(p);                                   \
  }

HKV_PREFILL(hkv_attention_prefill_bf16_d64, __nv_bfloat16, 64)
HKV_PREFILL(hkv_attention_prefill_bf16_d128, __nv_bfloat16, 128)
HKV_PREFILL(hkv_attention_prefill_bf16_d256, __nv_bfloat16, 256)
HKV_PREFILL(hkv_attention_prefill_f16_d64, __half, 64)
HKV_PREFILL(hkv_attention_prefill_f16_d128, __half, 128)
HKV_PREFILL(hkv_attention_prefill_f16_d256, __half, 256)
