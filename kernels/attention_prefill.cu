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
// K^T, weights and output O = P V live in registers of the warp that owns the rows. Keys and values
// of 8 bits become f16 on their way into a stage.
#include <type_traits>

#include "abi/params.h"
#include "policy/block_table.cuh"
#include "policy/dynamic_shared.cuh"
#include "policy/element.cuh"
#include "policy/kv_element.cuh"
#include "policy/kv_scales.cuh"
#include "policy/query_operand.cuh"
#include "policy/query_rows.cuh"
#include "policy/softmax_state.cuh"
#include "policy/swizzle.cuh"
#include "policy/tree_row.cuh"
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
template <int kRows>
struct Work {
  QueryRows rows;
  int32_t row0;  // first row of the CTA's tile
  int32_t split;
  Visibility visibility;
  LogitScale scale;
  KvScales kv_scales;      // of 8-bit keys and values
  uint32_t largest_query;  // bits of the largest magnitude, where queries are scaled
  int32_t tree_begin;      // first key that a tree mask may hide
  TreeRow trees[kRows];    // of the tile's rows, where there is a tree mask
};

template <typename T, typename Kv, int kDim>
class Prefill {
  using Operand = typename KvElement<Kv>::Operand;
  using Layout = Swizzle<kDim * 2>;
  static constexpr bool kScaled = KvElement<Kv>::kScaled;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;  // 16-row tiles of a warp
  static constexpr int kWarpRows = kRowTiles * 16;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = kDim < (kScaled ? 128 : 256) ? 64 : 32;
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kDimTiles = kDim / 8;
  static constexpr int kTileBytes = kKeys * Layout::kRowBytes;
  static constexpr int kQueryBytes = kRows * Layout::kRowBytes;
  static constexpr int kRowsPerCopy = kThreads / Layout::kChunks;
  static constexpr int kGroups = kKeys / kGroupTokens;
  static_assert(kQueryBytes + 4 * kTileBytes <= HKV_PREFILL_SHARED_BYTES, "two stages must fit");

  // Scales of the tokens of both stages, where each has its own.
  struct TokenScales {
    float keys[2][kKeys];
    float values[2][kKeys];
  };

 public:
  __device__ static void run(const hkv_attention_params& p) {
    uint8_t* const shared = dynamic_shared<uint8_t>();
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
    __shared__ Work<kRows> work;
    __shared__ int32_t positions[kRows];
    __shared__ TokenScales token_scales[1];
    const KvScales scales(p, window, kv_head);
    if (threadIdx.x == 0) {
      const float key_scale = kScaled ? scales.of_keys() : 1.0f;
      work.rows = rows;
      work.row0 = row0;
      work.split = split;
      work.visibility = visibility;
      work.scale = LogitScale(p.sm_scale * key_scale, p.logits_soft_cap);
      work.kv_scales = scales;
      work.largest_query = 0;
      work.tree_begin = p.tree_mask == nullptr ? INT32_MAX : rows.first_position();
    }
    if (threadIdx.x < kRows) {
      positions[threadIdx.x] = rows.position(row0 + threadIdx.x);
      work.trees[threadIdx.x] = TreeRow(p, rows, row0 + threadIdx.x);
    }
    __syncthreads();
    const int32_t last_row = min(row0 + kRows, rows.count()) - 1;
    const KeyTiles<kKeys> tiles(visibility, rows.position(row0), rows.position(last_row));
    Prefill tile(p, work, positions, token_scales, BlockTable<Kv>(p, window, seq, kv_head), tiles,
                 TileSpan(tiles.count(), split, p.num_splits, 1),
                 static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
    tile.attend();
    tile.finish(shared);
  }

 private:
  __device__ Prefill(const hkv_attention_params& p, Work<kRows>& work, const int32_t* positions,
                     TokenScales* token_scales, const BlockTable<Kv>& table,
                     const KeyTiles<kKeys>& tiles, const TileSpan& span, uint32_t shared)
      : p_(p),
        work_(work),
        warp_positions_(positions + threadIdx.x / 32 * kWarpRows),
        token_scales_(token_scales),
        table_(table),
        tiles_(tiles),
        span_(span),
        queries_(shared),
        stages_(shared + kQueryBytes) {
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        base_[rt][h] = -INFINITY;
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

  // Address of a chunk of row r of the tile, or null past the last row.
  __device__ const T* query_chunk(int r, int chunk) const {
    const int32_t row = work_.row0 + r;
    if (row >= work_.rows.count()) return nullptr;
    return static_cast<const T*>(p_.q) + work_.rows.token(row) * p_.q_stride_token +
           work_.rows.head(row) * p_.q_stride_head + chunk * 8;
  }

  __device__ void copy_queries() {
    if constexpr (!std::is_same_v<T, Operand>) return convert_queries();
    const int chunk = threadIdx.x % Layout::kChunks;
#pragma unroll 4
    for (int r = threadIdx.x / Layout::kChunks; r < kRows; r += kRowsPerCopy) {
      const T* q = query_chunk(r, chunk);
      cp_async_16(queries_ + Layout::offset(r, chunk), q == nullptr ? p_.q : q, q != nullptr);
    }
  }

  // Copies bf16 queries as f16, scaled; what this does to the products goes into the logits' scale.
  __device__ void convert_queries() {
    const int chunk = threadIdx.x % Layout::kChunks;
    uint32_t magnitudes = 0;
    for (int r = threadIdx.x / Layout::kChunks; r < kRows; r += kRowsPerCopy) {
      const uint4 pairs = load_query(r, chunk);
      magnitudes = larger_pair(magnitudes, pairs.x);
      magnitudes = larger_pair(magnitudes, pairs.y);
      magnitudes = larger_pair(magnitudes, pairs.z);
      magnitudes = larger_pair(magnitudes, pairs.w);
    }
    atomicMax(&work_.largest_query, __reduce_max_sync(kFullWarp, larger_half(magnitudes)));
    __syncthreads();
    const QueryScale scale(work_.largest_query);
    for (int r = threadIdx.x / Layout::kChunks; r < kRows; r += kRowsPerCopy) {
      const uint4 pairs = load_query(r, chunk);
      store_shared_16(queries_ + Layout::offset(r, chunk),
                      make_uint4(scale.apply(pairs.x), scale.apply(pairs.y), scale.apply(pairs.z),
                                 scale.apply(pairs.w)));
    }
    if (threadIdx.x == 0) work_.scale.multiply(scale.undo());
  }

  __device__ uint4 load_query(int r, int chunk) const {
    const T* q = query_chunk(r, chunk);
    return q == nullptr ? uint4{} : __ldg(reinterpret_cast<const uint4*>(q));
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
#pragma unroll (kScaled ? 2 : kKeys / kRowsPerCopy)
    for (int i = 0; i < kKeys / kRowsPerCopy; ++i) {
      const int r = i * kRowsPerCopy + thread_row;
      const int32_t token = tile.base + r;
      const int32_t id = __shfl_sync(kFullWarp, ids, r / kGroupTokens);
      const Kv* src = table_.keys() + table_.offset(id, token) + chunk * 8;
      const uint32_t dst = keys + Layout::offset(r, chunk);
      copy_chunk(dst, src, tile.holds(token));
      copy_chunk(dst + kTileBytes, src + to_values, tile.holds(token));
    }
    if (kScaled && work_.kv_scales.per_token()) copy_scales(n, tile, ids);
    cp_async_commit();
  }

  // 8 elements, as operands.
  __device__ static void copy_chunk(uint32_t dst, const Kv* src, bool valid) {
    if constexpr (kScaled) {
      const uint2 words = valid ? __ldg(reinterpret_cast<const uint2*>(src)) : uint2{};
      uint32_t low[2], high[2];
      e4m3_to_f16(low, words.x);
      e4m3_to_f16(high, words.y);
      store_shared_16(dst, make_uint4(low[0], low[1], high[0], high[1]));
    } else {
      cp_async_16(dst, src, valid);
    }
  }

  __device__ static void store_shared_16(uint32_t dst, uint4 value) {
    *static_cast<uint4*>(__cvta_shared_to_generic(dst)) = value;
  }

  __device__ void copy_scales(int32_t n, const KeyTile& tile, int32_t ids) {
    const int key = threadIdx.x % kKeys;
    const int32_t token = tile.base + key;
    const int32_t id = __shfl_sync(kFullWarp, ids, key / kGroupTokens);
    const int s = (n - span_.begin) % 2;
    const bool valid = tile.holds(token);
    if (threadIdx.x < kKeys) {
      token_scales_->keys[s][key] = valid ? __ldg(work_.kv_scales.key(id, token)) : 0.0f;
    } else if (threadIdx.x < 2 * kKeys) {
      token_scales_->values[s][key] = valid ? __ldg(work_.kv_scales.value(id, token)) : 0.0f;
    }
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
          Element<Operand>::mma(score[rt][2 * k], a[rt], b[0], b[1]);
          Element<Operand>::mma(score[rt][2 * k + 1], a[rt], b[2], b[3]);
        }
      }
    }

    const bool scaled_tokens = kScaled && work_.kv_scales.per_token();
    if (scaled_tokens) scale_keys(n, score);
    const LogitScale scale = work_.scale;
    if (scale.capped()) cap(scale, score);
    const KeyTile tile = tiles_[n];
    if (!tiles_.is_clear(tile)) mask(tile, score);
    if (tile.base > work_.tree_begin - kKeys) mask_tree(tile, score);
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
          const float share0 = scaled_tokens ? value_share(n, k * 16 + i / 2 * 8) : 1.0f;
          const float share1 = scaled_tokens ? value_share(n, k * 16 + i / 2 * 8 + 1) : 1.0f;
          const float w0 = scale.weight(score[rt][2 * k + i / 2][2 * h], base_[rt][h]);
          const float w1 = scale.weight(score[rt][2 * k + i / 2][2 * h + 1], base_[rt][h]);
          sum_[rt][h] += w0 + w1;
          a[rt][i] = Element<Operand>::pack(w0 * share0, w1 * share1);
        }
      }
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, Layout::advance(value_lane, d) + k * 16 * Layout::kRowBytes);
#pragma unroll
        for (int rt = 0; rt < kRowTiles; ++rt) {
          Element<Operand>::mma(output_[rt][2 * d], a[rt], b[0], b[1]);
          Element<Operand>::mma(output_[rt][2 * d + 1], a[rt], b[2], b[3]);
        }
      }
    }
  }

  // Multiplies the scores with the scales of their keys, and moves the unit of the output up where
  // a value's scale exceeds it.
  __device__ void scale_keys(int32_t n, float (&score)[kRowTiles][kKeyTiles][4]) {
    const int lane = threadIdx.x % 32;
    const int s = (n - span_.begin) % 2;
    float top = 0.0f;
#pragma unroll
    for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int key = k * 8 + lane % 4 * 2 + c;
        top = fmaxf(top, token_scales_->values[s][key]);
#pragma unroll
        for (int rt = 0; rt < kRowTiles; ++rt) {
          score[rt][k][c] *= token_scales_->keys[s][key];
          score[rt][k][c + 2] *= token_scales_->keys[s][key];
        }
      }
    }
    if (!__any_sync(kFullWarp, unit_.exceeded_by(top))) return;
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
    const float keep = unit_.raise(top);
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int d = 0; d < kDimTiles; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) output_[rt][d][i] *= keep;
      }
    }
  }

  // The scale of a value of the lane's key columns, in the unit of the output.
  __device__ float value_share(int32_t n, int key) const {
    const int s = (n - span_.begin) % 2;
    return unit_.share(token_scales_->values[s][key + threadIdx.x % 4 * 2]);
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

  // Masks what the tree of new tokens hides.
  __device__ void mask_tree(const KeyTile& tile, float (&score)[kRowTiles][kKeyTiles][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const TreeRow tree = work_.trees[threadIdx.x / 32 * kWarpRows + rt * 16 + h * 8 + lane / 4];
#pragma unroll
        for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int32_t key = tile.base + k * 8 + lane % 4 * 2 + c;
            if (tree.hides(key)) score[rt][k][2 * h + c] = -INFINITY;
          }
        }
      }
    }
  }

  // Moves the bases up where a weight would be too large, and rescales.
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
        exceeded |= exceeds(scale.logit(top[rt][h]), base_[rt][h]);
      }
    }
    if (!__any_sync(kFullWarp, exceeded)) return;
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float m = scale.logit(top[rt][h]);
        m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, 1));
        m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, 2));
        m = raised(base_[rt][h], m);
        const float keep = rescale(base_[rt][h], m);
        base_[rt][h] = m;
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
    const KvScales& scales = work_.kv_scales;
    const float unit = !kScaled ? 1.0f : scales.per_token() ? unit_.value() : scales.of_values();
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
        const ClosedRow closed(base_[rt][h], total, has_sink ? p_.sink_logits[head] : -INFINITY);
        const float factor = closed.scale * unit;
        const int64_t index = token * p_.num_qo_heads + head;
        if (whole) {
#pragma unroll
          for (int d = 0; d < kDimTiles; ++d) {
            *reinterpret_cast<uint32_t*>(warp_rows + Layout::offset(local, d) + lane % 4 * 4) =
                Element<T>::pack(output_[rt][d][2 * h] * factor,
                                 output_[rt][d][2 * h + 1] * factor);
          }
          if (valid && lane % 4 == 0 && p_.lse != nullptr) p_.lse[index] = closed.lse;
        } else if (valid) {
          const int64_t state =
              static_cast<int64_t>(work_.split) * p_.num_tokens * p_.num_qo_heads + index;
          float* partial = p_.partial_out + state * kDim + lane % 4 * 2;
#pragma unroll
          for (int d = 0; d < kDimTiles; ++d) {
            *reinterpret_cast<float2*>(partial + d * 8) =
                make_float2(output_[rt][d][2 * h] * factor, output_[rt][d][2 * h + 1] * factor);
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
  Work<kRows>& work_;
  const int32_t* const warp_positions_;  // in shared memory, of the warp's rows
  TokenScales* const token_scales_;      // in shared memory
  const BlockTable<Kv> table_;
  const KeyTiles<kKeys> tiles_;
  const TileSpan span_;
  const uint32_t queries_;
  const uint32_t stages_;
  int32_t prefetched_id_ = 0;

  // Softmax state of the warp's rows: lane (g, t) holds rows g and g+8 of every row tile; of the
  // output the dims 2t, 2t+1 of every 8; a sum over its own keys.
  float base_[kRowTiles][2];
  float sum_[kRowTiles][2];
  float output_[kRowTiles][kDimTiles][4];
  ValueUnit unit_;  // of the output, where values have scales of their own
};

}  // namespace
}  // namespace hkv

#define HKV_PREFILL_KERNEL(name, type, kv, dim)                        \
  extern "C" __global__ void __launch_bounds__(HKV_PREFILL_THREADS, 2) \
      name(const __grid_constant__ hkv_attention_params p) {           \
    hkv::Prefill<type, kv, dim>::run(p);                               \
  }
#define HKV_PREFILL(name, type, kv)              \
  HKV_PREFILL_KERNEL(name##_d64, type, kv, 64)   \
  HKV_PREFILL_KERNEL(name##_d128, type, kv, 128) \
  HKV_PREFILL_KERNEL(name##_d256, type, kv, 256)

HKV_PREFILL(hkv_attention_prefill_bf16, __nv_bfloat16, __nv_bfloat16)
HKV_PREFILL(hkv_attention_prefill_f16, __half, __half)
HKV_PREFILL(hkv_attention_prefill_bf16_e4m3, __nv_bfloat16, hkv::E4m3)
HKV_PREFILL(hkv_attention_prefill_f16_e4m3, __half, hkv::E4m3)
