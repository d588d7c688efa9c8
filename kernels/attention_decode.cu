// Paged attention for few query rows per KV head: decode, and a few speculative tokens.
//
// Grid: one CTA of 4 warps per (sequence, split, KV head), x = (seq * num_splits + split) * Hk +
// head. The query rows of the CTA (packed GQA, policy/query_rows.cuh) are served 8 * kQueryTiles at
// a time; the host picks the kernel so that one round is the rule.
//
// Layouts: q, out [T, Hq, D] by strides; K and V through the block table (policy/block_table.cuh).
// Keys are cut into slices of 16, or mostly of 32 where elements have 8 bits. Slice n of the CTA's
// span belongs to warp n % 4: the warp copies it into its own ring in shared memory, computes its
// scores and adds it to its own softmax state, without any CTA-wide barrier while keys stream. The
// ring holds halves of a slice, K and V in turn, [tokens][D] swizzled; kRing - 1 halves are in
// flight while one is used. The four states meet in shared memory at the end.
//
// Products are transposed so that K and V are the 16-row operand of the tensor cores and the few
// queries the 8-column one: S^T[16 keys, 8] = K Q^T, O^T[D, 8] = V^T P^T. 8-bit elements become f16
// between shared memory and the products (policy/kv_element.cuh).
#include <type_traits>

#include "abi/params.h"
#include "policy/block_table.cuh"
#include "policy/element.cuh"
#include "policy/kv_element.cuh"
#include "policy/kv_scales.cuh"
#include "policy/query_operand.cuh"
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
constexpr unsigned kFullWarp = 0xffffffffu;

// How a kernel shares a multiprocessor. 128 KB are in flight on it, past which bandwidth falls
// again (H100). Widening 8-bit elements keeps 16 warps busy; kernels with larger states have room
// for 8.
template <typename Kv, int kDim, int kQueryTiles>
struct Tuning {
  static constexpr int kCtas = sizeof(Kv) == 1 && kDim * kQueryTiles <= 128 ? 4 : 2;
  static constexpr int kSharedBytes =
      kCtas == 4 ? HKV_DECODE_NARROW_SHARED_BYTES : HKV_DECODE_SHARED_BYTES;
  static constexpr int kRingBytes = kSharedBytes / kWarps;
  // Keys of a warp at a time: 4 KB at head_dim 128, but where registers do not reach.
  static constexpr int kSliceTokens = sizeof(Kv) == 1 && kDim * kQueryTiles <= 256 ? 32 : 16;
  static constexpr int kInFlightBytes = (128 << 10) / (kCtas * kWarps);
};

// The warp's ring: copies the halves of the slices first, first + kWarps, ... below `end` in order,
// and with the keys the scales of both, where tokens have their own.
template <typename Kv, int kDim, typename Tuning>
class SliceRing {
  using Layout = Swizzle<kDim * sizeof(Kv)>;
  static constexpr int kSliceTokens = Tuning::kSliceTokens;
  using Tiles = KeyTiles<kSliceTokens>;
  static constexpr int kHalfBytes = kSliceTokens * Layout::kRowBytes;
  static constexpr int kRing = Tuning::kInFlightBytes / kHalfBytes + 1;
  static_assert(kRing * kHalfBytes <= Tuning::kRingBytes, "the ring must fit");
  static constexpr int kRowsPerCopy = 32 / Layout::kChunks;
  static constexpr int kGroups = kSliceTokens / kGroupTokens;
  static constexpr bool kScaled = KvElement<Kv>::kScaled;
  static constexpr int kScaleSlots = kRing / 2 + 1;  // slices in use or in flight

 public:
  // Scales of a slice's tokens.
  struct Scales {
    float keys[kSliceTokens];
    float values[kSliceTokens];
  };
  using ScaleRing = Scales[kScaled ? kScaleSlots : 1];

  __device__ SliceRing(uint32_t ring_shared, ScaleRing& scale_ring, const BlockTable<Kv>& table,
                       const KvScales& scales, const Tiles& tiles, int32_t first, int32_t end)
      : table_(table),
        scales_(scales),
        scale_ring_(scale_ring),
        tiles_(tiles),
        ring_(ring_shared),
        next_slice_(first),
        end_(end) {
    lane_ = threadIdx.x % 32;
    const int row = lane_ / Layout::kChunks;
    const int chunk = lane_ % Layout::kChunks;
    lane_offset_ = row * table.stride_token() + chunk * static_cast<int>(16 / sizeof(Kv));
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

  // The scales of the slice whose keys next() gave last, once per slice.
  __device__ const Scales& next_scales() {
    const Scales& scales = scale_ring_[scale_read_];
    scale_read_ = scale_read_ + 1 == kScaleSlots ? 0 : scale_read_ + 1;
    return scales;
  }

 private:
  // Block of the token group lane % kGroups of the next slice; read one slice ahead of its use.
  __device__ int32_t fetch_id() const {
    if (next_slice_ >= end_) return 0;
    const KeyTile tile = tiles_[next_slice_];
    const int32_t token = tile.base + lane_ % kGroups * kGroupTokens;
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
      if (tile_.end > 0) {
        copy(table_.keys());
        if (kScaled && scales_.per_token()) copy_scales();
      }
    }
    value_is_next_ = !value_is_next_;
    write_ = write_ + 1 == kRing ? 0 : write_ + 1;
    cp_async_commit();  // an empty group keeps the count
  }

  __device__ void copy(const Kv* pool) const {
    const int row = lane_ / Layout::kChunks;
    const int chunk = lane_ % Layout::kChunks;
    const uint32_t half = ring_ + write_ * kHalfBytes;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int32_t token = tile_.base + group * kGroupTokens;
      const int32_t id = __shfl_sync(kFullWarp, block_id_, group);
      const Kv* src = pool + table_.offset(id, token) + lane_offset_;
#pragma unroll
      for (int r = 0; r < kGroupTokens; r += kRowsPerCopy) {
        cp_async_16(half + Layout::offset(group * kGroupTokens + r + row, chunk), src,
                    tile_.holds(token + r + row));
        src += kRowsPerCopy * table_.stride_token();
      }
    }
  }

  // A lane copies the scales of its token.
  __device__ void copy_scales() {
    const int slot_token = lane_ % kSliceTokens;
    const int32_t token = tile_.base + slot_token;
    const int32_t id = __shfl_sync(kFullWarp, block_id_, slot_token / kGroupTokens);
    const bool valid = tile_.holds(token);
    Scales& slot = scale_ring_[scale_write_];
    cp_async_4(static_cast<uint32_t>(__cvta_generic_to_shared(&slot.keys[slot_token])),
               scales_.key(id, token), valid);
    cp_async_4(static_cast<uint32_t>(__cvta_generic_to_shared(&slot.values[slot_token])),
               scales_.value(id, token), valid);
    scale_write_ = scale_write_ + 1 == kScaleSlots ? 0 : scale_write_ + 1;
  }

  const BlockTable<Kv>& table_;
  const KvScales& scales_;
  ScaleRing& scale_ring_;
  const Tiles& tiles_;
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
  int32_t scale_read_ = 0;
  int32_t scale_write_ = 0;
  bool value_is_next_ = false;
};

// Softmax state of the warp over its slices, transposed: lane (g, t) holds the columns (queries)
// 2t, 2t+1 of every query tile; of the output the rows g, g+8 of every fragment of 16 dims; a sum
// over its own keys.
template <int kDim, int kQueryTiles>
struct WarpState {
  float base[kQueryTiles][2];
  float sum[kQueryTiles][2];
  float output[kQueryTiles][kDim / 16][4];
  ValueUnit unit;  // of the output, where values have scales of their own

  __device__ WarpState() {
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        base[qt][c] = -INFINITY;
        sum[qt][c] = 0.0f;
      }
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) output[qt][d][i] = 0.0f;
      }
    }
  }

  // Moves the bases up where a weight would be too large, and rescales.
  template <int kKeyTiles>
  __device__ void raise(const float (&score)[kKeyTiles][kQueryTiles][4], const LogitScale& scale) {
    float top[kQueryTiles][2];
    bool exceeded = false;
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        top[qt][c] = fmaxf(score[0][qt][c], score[0][qt][c + 2]);
#pragma unroll
        for (int kt = 1; kt < kKeyTiles; ++kt) {
          top[qt][c] = fmaxf(top[qt][c], fmaxf(score[kt][qt][c], score[kt][qt][c + 2]));
        }
        exceeded |= exceeds(scale.logit(top[qt][c]), base[qt][c]);
      }
    }
    if (!__any_sync(kFullWarp, exceeded)) return;
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float old = base[qt][c];
        base[qt][c] = raised(old, scale.logit(over_keys(top[qt][c])));
        const float keep = rescale(old, base[qt][c]);
        sum[qt][c] *= keep;
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
          output[qt][d][c] *= keep;
          output[qt][d][c + 2] *= keep;
        }
      }
    }
  }

  // Moves the unit up where a value's scale exceeds it.
  template <int kKeyTiles>
  __device__ void raise_unit(const float (&scale)[kKeyTiles][2]) {
    float top = 0.0f;
#pragma unroll
    for (int kt = 0; kt < kKeyTiles; ++kt) top = fmaxf(top, fmaxf(scale[kt][0], scale[kt][1]));
    if (!__any_sync(kFullWarp, unit.exceeded_by(top))) return;
    const float keep = unit.raise(over_keys(top));
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) output[qt][d][i] *= keep;
      }
    }
  }

 private:
  // The largest over the lanes that hold other keys of the same columns.
  __device__ static float over_keys(float x) {
#pragma unroll
    for (int delta = 4; delta < 32; delta *= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, delta));
    return x;
  }
};

template <typename T, typename Kv, int kDim, int kQueryTiles>
class Decode {
  using Keys = KvElement<Kv>;
  using Operand = typename Keys::Operand;
  using Layout = Swizzle<kDim * sizeof(Kv)>;
  using Tune = Tuning<Kv, kDim, kQueryTiles>;
  using Ring = SliceRing<Kv, kDim, Tune>;
  using State = WarpState<kDim, kQueryTiles>;
  using Tiles = KeyTiles<Tune::kSliceTokens>;
  static constexpr int kKeyTiles = Tune::kSliceTokens / 16;
  static constexpr int kSteps = Layout::kRowBytes / 32;
  static constexpr int kFragments = Keys::kFragments;
  static constexpr int kRingBytes = Tune::kRingBytes;
  static constexpr int kRows = 8 * kQueryTiles;
  // Rows of a warp's output in shared memory, in floats: padded so that the lanes' writes do not
  // collide.
  static constexpr int kPitch = kDim + 4;
  static_assert(kRows * kPitch * 4 <= kRingBytes, "a warp's output takes the place of its ring");

 public:
  static constexpr int kCtas = Tune::kCtas;

  __device__ static void run(const hkv_attention_params& p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ float warp_base[kWarps][kRows];
    __shared__ float warp_sum[kWarps][kRows];
    __shared__ typename Ring::ScaleRing scale_rings[Keys::kScaled ? kWarps : 1];
    grid_dependency_launch();

    const int32_t kv_head = blockIdx.x % p.num_kv_heads;
    const int32_t split = blockIdx.x / p.num_kv_heads % p.num_splits;
    const int32_t seq = blockIdx.x / p.num_kv_heads / p.num_splits;
    const QueryRows rows(p, seq, kv_head);
    const hkv_window window = p.windows[p.layer];
    const Visibility visibility(window);
    const BlockTable<Kv> table(p, window, seq, kv_head);
    const KvScales scales(p, window, kv_head);
    const int warp = threadIdx.x / 32;
    uint8_t* warp_shared = shared + warp * kRingBytes;

    for (int32_t row0 = 0; row0 < rows.count(); row0 += kRows) {
      const int32_t last_row = min(row0 + kRows, rows.count()) - 1;
      const Tiles tiles(visibility, rows.position(row0), rows.position(last_row));
      const TileSpan span(tiles.count(), split, p.num_splits, kWarps);

      State state;
      if (span.begin + warp < span.end) {
        attend(p, rows, row0, visibility, tiles, table, scales, span,
               static_cast<uint32_t>(__cvta_generic_to_shared(warp_shared)),
               scale_rings[Keys::kScaled ? warp : 0], state);
      }
      const float unit = !Keys::kScaled       ? 1.0f
                         : scales.per_token() ? state.unit.value()
                                              : scales.of_values();
      put_state(state, unit, reinterpret_cast<float*>(warp_shared), warp_base[warp],
                warp_sum[warp]);
      __syncthreads();
      merge_warps(p, rows, row0, split, shared, warp_base, warp_sum);
      __syncthreads();  // the rings may be filled again
    }
  }

 private:
  // Adds the warp's slices of the span to its state.
  __device__ static void attend(const hkv_attention_params& p, const QueryRows& rows, int32_t row0,
                                const Visibility& visibility, const Tiles& tiles,
                                const BlockTable<Kv>& table, const KvScales& scales,
                                const TileSpan& span, uint32_t ring_shared,
                                typename Ring::ScaleRing& scale_ring, State& state) {
    const int lane = threadIdx.x % 32;
    const int first = span.begin + threadIdx.x / 32;
    Ring ring(ring_shared, scale_ring, table, scales, tiles, first, span.end);

    uint32_t query[kQueryTiles][kDim / 16][2];
    float sm_scale = p.sm_scale * load_queries(p, rows, row0, query);
    if (Keys::kScaled) sm_scale *= scales.of_keys();
    const LogitScale scale(sm_scale, p.logits_soft_cap);
    const bool scaled_tokens = Keys::kScaled && scales.per_token();
    // This lane's row of the matrices of K (keys x dims) and of V (to be transposed).
    const uint32_t key_lane = Layout::offset(lane % 16, lane / 16);
    const uint32_t value_lane = Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);

    for (int32_t slice = first; slice < span.end; slice += kWarps) {
      const uint32_t keys = ring.next() + key_lane;
      float score[kKeyTiles][kQueryTiles][4] = {};
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
              Element<Operand>::mma(score[kt][qt], a[f], query[qt][d][0], query[qt][d][1]);
            }
          }
        }
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
      if (!tiles.is_clear(tile)) mask(rows, row0, visibility, tile, score);
      state.raise(score, scale);

      uint32_t weight[kKeyTiles][kQueryTiles][2];
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
          weight[kt][qt][0] = movmatrix_trans(Element<Operand>::pack(w[0], w[1]));
          weight[kt][qt][1] = movmatrix_trans(Element<Operand>::pack(w[2], w[3]));
        }
      }
      const uint32_t values = ring.next() + value_lane;
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
            for (int qt = 0; qt < kQueryTiles; ++qt) {
              Element<Operand>::mma(state.output[qt][step * kFragments + f], a[f],
                                    weight[kt][qt][0], weight[kt][qt][1]);
            }
          }
        }
      }
    }
    cp_async_wait<0>();
    __syncwarp();  // the warp is done with its ring
  }

  // The queries as B fragments: lane (g, t) has the dims of its key columns, of query 8qt + g. Rows
  // past the last are zero. Gives what their products are to be multiplied with.
  __device__ static float load_queries(const hkv_attention_params& p, const QueryRows& rows,
                                       int32_t row0, uint32_t (&query)[kQueryTiles][kDim / 16][2]) {
    const int lane = threadIdx.x % 32;
    uint32_t magnitudes = 0;
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
      const int32_t row = row0 + qt * 8 + lane / 4;
      const bool valid = row < rows.count();
      const T* q = static_cast<const T*>(p.q);
      if (valid) q += rows.token(row) * p.q_stride_token + rows.head(row) * p.q_stride_head;
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const T* pair = q + d * 16 + Keys::key_dim(lane % 4, i);
          query[qt][d][i] = valid ? __ldg(reinterpret_cast<const uint32_t*>(pair)) : 0u;
          magnitudes = larger_pair(magnitudes, query[qt][d][i]);
        }
      }
    }
    if constexpr (std::is_same_v<T, Operand>) return 1.0f;
    const QueryScale scale(__reduce_max_sync(kFullWarp, larger_half(magnitudes)));
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
        for (int i = 0; i < 2; ++i) query[qt][d][i] = scale.apply(query[qt][d][i]);
      }
    }
    return scale.undo();
  }

  __device__ static void mask(const QueryRows& rows, int32_t row0, const Visibility& visibility,
                              const KeyTile& tile, float (&score)[kKeyTiles][kQueryTiles][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int32_t position = rows.position(row0 + qt * 8 + lane % 4 * 2 + c);
        const SeenKeys seen(visibility, tile, position, tile.base + lane / 4);
#pragma unroll
        for (int kt = 0; kt < kKeyTiles; ++kt) {
          if (!seen.has(kt * 16)) score[kt][qt][c] = -INFINITY;
          if (!seen.has(kt * 16 + 8)) score[kt][qt][c + 2] = -INFINITY;
        }
      }
    }
  }

  // Puts the warp's state into shared memory: output [row][dim], bases in log2 units, sums. The
  // state's output is in `unit`.
  __device__ static void put_state(const State& state, float unit, float* output, float* base,
                                   float* sum) {
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
          base[row] = state.base[qt][c];
          sum[row] = total;
        }
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            output[row * kPitch + d * 16 + Keys::value_dim(lane / 4, i)] =
                state.output[qt][d][c + 2 * i] * unit;
          }
        }
      }
    }
  }

  // Merges the warps' states and writes the rows: to the output, or as partial states of this
  // split.
  __device__ static void merge_warps(const hkv_attention_params& p, const QueryRows& rows,
                                     int32_t row0, int32_t split, const uint8_t* shared,
                                     const float (&base)[kWarps][kRows],
                                     const float (&sum)[kWarps][kRows]) {
    constexpr int kVectors = kDim / 4;
    const bool whole = p.num_splits == 1;
    for (int i = threadIdx.x; i < kRows * kVectors; i += kWarps * 32) {
      const int local = i / kVectors;
      const int32_t row = row0 + local;
      if (row >= rows.count()) return;
      const int dim = i % kVectors * 4;
      float top = base[0][local];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) top = fmaxf(top, base[w][local]);
      float total = 0.0f;
      float o[4] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float share = top == -INFINITY ? 0.0f : ex2(base[w][local] - top);
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

#define HKV_DECODE_KERNEL(name, type, kv, dim, query_tiles)                                    \
  extern "C" __global__ void __launch_bounds__(HKV_DECODE_THREADS,                             \
                                               hkv::Decode<type, kv, dim, query_tiles>::kCtas) \
      name(const __grid_constant__ hkv_attention_params p) {                                   \
    hkv::Decode<type, kv, dim, query_tiles>::run(p);                                           \
  }
#define HKV_DECODE(name, type, kv)                     \
  HKV_DECODE_KERNEL(name##_d64_r8, type, kv, 64, 1)    \
  HKV_DECODE_KERNEL(name##_d64_r16, type, kv, 64, 2)   \
  HKV_DECODE_KERNEL(name##_d128_r8, type, kv, 128, 1)  \
  HKV_DECODE_KERNEL(name##_d128_r16, type, kv, 128, 2) \
  HKV_DECODE_KERNEL(name##_d256_r8, type, kv, 256, 1)  \
  HKV_DECODE_KERNEL(name##_d256_r16, type, kv, 256, 2)

HKV_DECODE(hkv_attention_decode_bf16, __nv_bfloat16, __nv_bfloat16)
HKV_DECODE(hkv_attention_decode_f16, __half, __half)
HKV_DECODE(hkv_attention_decode_bf16_e4m3, __nv_bfloat16, hkv::E4m3)
HKV_DECODE(hkv_attention_decode_f16_e4m3, __half, hkv::E4m3)
