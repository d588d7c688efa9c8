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
#include <type_traits>

#include "abi/params.h"
#include "policy/block_table.cuh"
#include "policy/decode_share.cuh"
#include "policy/decode_tuning.cuh"
#include "policy/element.cuh"
#include "policy/kv_element.cuh"
#include "policy/kv_scales.cuh"
#include "policy/query_operand.cuh"
#include "policy/query_rows.cuh"
#include "policy/row_states.cuh"
#include "policy/slice_ring.cuh"
#include "policy/softmax_state.cuh"
#include "policy/swizzle.cuh"
#include "policy/tree_row.cuh"
#include "policy/visibility.cuh"
#include "ptx/atomic.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/matrix.cuh"

namespace hkv {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T, typename Kv, int kDim, int kQueryTiles, bool kNarrow>
class Decode {
  using Keys = KvElement<Kv>;
  using Operand = typename Keys::Operand;
  using Layout = Swizzle<kDim * sizeof(Kv)>;
  using Tune = DecodeTuning<Kv, kDim, kQueryTiles, kNarrow>;
  static constexpr int kSliceTokens = Tune::kSliceTokens;
  using Ring = SliceRing<Kv, kDim, kSliceTokens, kDecodeWarps, Tune::kInFlightBytes>;
  using State = WarpState<kDim, kQueryTiles>;
  using Tiles = KeyTiles<kSliceTokens>;
  static constexpr int kKeyTiles = kSliceTokens / 16;
  static constexpr bool kOneTile = kKeyTiles * kQueryTiles == 1;
  static constexpr int kSteps = Layout::kRowBytes / 32;
  static constexpr int kFragments = Keys::kFragments;
  static constexpr int kParts = Element<Operand>::kWeightParts;
  static constexpr int kRows = 8 * kQueryTiles;
  // Rows of a warp's output in shared memory, in floats: padded so that the lanes' writes do not
  // collide.
  static constexpr int kPitch = kDim + 4;
  static constexpr int kRingBytes = Tune::kRingBytes;
  static_assert(Ring::kBytes <= kRingBytes, "the ring must fit");
  static_assert(kRows * kPitch * 4 <= kRingBytes, "a warp's output takes the place of its ring");

  // States are merged by the row: rows w, w + 4, ... by warp w, dims by lanes.
  using Row = LaneRow<kDim / 32>;
  using Dims = typename Row::Dims;
  static constexpr int kWarpRows = kRows / kDecodeWarps;
  // A part's state in the workspace, of which rows that are not there are left out: bases in log2
  // units and sums of all rows, then outputs.
  struct PartState {
    float2 sums[kRows];
    Dims output[kRows][32];
  };

  // What lies beside the rings: what a warp seldom needs while keys stream, for registers are
  // scarce then, and what the warps tell each other.
  struct Meeting {
    DecodeShare share;
    QueryRows rows;
    Visibility visibility;
    float2 sums[kDecodeWarps][kRows];  // bases in log2 units, sums
    int32_t is_last;
  };

 public:
  static constexpr int kCtas = Tune::kCtas;

  __device__ static void run(const hkv_attention_params& p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ Meeting meeting;
    __shared__ typename Ring::ScaleRing scale_rings[Keys::kScaled ? kDecodeWarps : 1];
    if (p.reads_early == 0) grid_dependency_wait();

    DecodeShare share(p);
    if (share.parts == 0) return;
    const QueryRows rows(p, share.seq, share.kv_head);
    const hkv_window window = p.windows[p.layer];
    const Visibility visibility(window);
    if (threadIdx.x == 0) {
      meeting.share = share;
      meeting.rows = rows;
      meeting.visibility = visibility;
    }
    __syncthreads();
    const BlockTable<Kv> table(p, window, share.seq, share.kv_head);
    const KvScales scales(p, window, share.kv_head);
    const int warp = threadIdx.x / 32;
    uint8_t* warp_shared = shared + warp * kRingBytes;

    int32_t row0 = 0;
    do {
      const int32_t last_row = min(row0 + kRows, rows.count()) - 1;
      const Tiles tiles(visibility, rows.position(row0), rows.position(last_row));
      const TileSpan span = last_row < row0 ? TileSpan{} : share.of(tiles.count());
      State state;
      if (span.begin + warp < span.end) {
        attend(p, meeting, row0, tiles, table, scales, span,
               static_cast<uint32_t>(__cvta_generic_to_shared(warp_shared)),
               scale_rings[Keys::kScaled ? warp : 0], state);
      } else {
        follow_predecessor();
      }
      const float unit = !Keys::kScaled       ? 1.0f
                         : scales.per_token() ? state.unit.value()
                                              : scales.of_values();
      put_state(state, unit, reinterpret_cast<float*>(warp_shared), meeting.sums[warp]);
      __syncthreads();
      meet(p, row0, shared, meeting);
      // Rows beyond those that the host counted on are left to one CTA.
      row0 += kRows;
      if (row0 >= meeting.rows.count() || meeting.share.part > 0) return;
      share = meeting.share.alone();
      __syncthreads();  // the rings may be filled again
      if (threadIdx.x == 0) meeting.share = share;
    } while (true);
  }

 private:
  // Waits for the predecessor; the next kernel may then start, which counts on all before this one.
  __device__ static void follow_predecessor() {
    grid_dependency_wait();
    grid_dependency_launch();
  }

  // Adds the warp's slices of the span to its state.
  __device__ static void attend(const hkv_attention_params& p, const Meeting& meeting, int32_t row0,
                                const Tiles& tiles, const BlockTable<Kv>& table,
                                const KvScales& scales, const TileSpan& span, uint32_t ring_shared,
                                typename Ring::ScaleRing& scale_ring, State& state) {
    const int lane = threadIdx.x % 32;
    const int first = span.begin + threadIdx.x / 32;
    const bool scaled_tokens = Keys::kScaled && scales.per_token();
    const QueryRows& rows = meeting.rows;
    // Scales of tokens come through L1, where a line that was read early would stay.
    const int32_t settled_end = scaled_tokens ? 0 : rows.first_position();
    Ring ring(ring_shared, scale_ring, table, scales, tiles, first, span.end, settled_end);
    follow_predecessor();

    uint32_t query[kQueryTiles][kDim / 16][2];
    float sm_scale = p.sm_scale * load_queries(p, rows, row0, query);
    if (Keys::kScaled) {
      scales.prefetch_values();
      sm_scale *= scales.of_keys();
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
      if (in_tree || !tiles.is_clear(tile)) mask(p, meeting, row0, tile, score);
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
          query[qt][d][i] = valid ? __ldcg(reinterpret_cast<const uint32_t*>(pair)) : 0u;
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

  __device__ static void mask(const hkv_attention_params& p, const Meeting& meeting, int32_t row0,
                              const KeyTile& tile, float (&score)[kKeyTiles][kQueryTiles][4]) {
    const int lane = threadIdx.x % 32;
    const int32_t key = tile.base + lane / 4;
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int32_t row = row0 + qt * 8 + lane % 4 * 2 + c;
        const SeenKeys seen(meeting.visibility, tile, meeting.rows.position(row), key);
        const TreeRow tree(p, meeting.rows, row);
#pragma unroll
        for (int kt = 0; kt < kKeyTiles; ++kt) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int offset = kt * 16 + h * 8;
            if (!seen.has(offset) || tree.hides(key + offset)) score[kt][qt][c + 2 * h] = -INFINITY;
          }
        }
      }
    }
  }

  // Puts the warp's state into shared memory: output [row][dim] in units of 1 / `unit`, bases and
  // sums.
  __device__ static void put_state(const State& state, float unit, float* output, float2* sums) {
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
        if (lane / 4 == 0) sums[row] = make_float2(state.base[qt][c], total);
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

  // Merges the warps' states and writes the rows; where the sequence has other parts, the CTA that
  // comes last does, with the states of all.
  __device__ static void meet(const hkv_attention_params& p, int32_t row0, uint8_t* shared,
                              Meeting& meeting) {
    const QueryRows& rows = meeting.rows;
    const DecodeShare& share = meeting.share;
    const int num_rows = min(rows.count() - row0, kRows);
    if (num_rows <= 0) return;
    const auto into_output = [&](int row, const Row& state) {
      put_result(p, rows, row0 + row, state);
    };
    if (share.parts == 1) return merge_warps(shared, meeting, num_rows, into_output);

    // The states of the parts lie Hk apart.
    const int64_t first =
        (share.entry - share.part) * static_cast<int64_t>(p.num_kv_heads) + share.kv_head;
    PartState* const states = reinterpret_cast<PartState*>(p.partial_out) + first;
    PartState& own = states[share.part * p.num_kv_heads];
    const int lane = threadIdx.x % 32;
    merge_warps(shared, meeting, num_rows, [&](int row, const Row& state) {
      own.output[row][lane] = state.output;
      if (lane == 0) own.sums[row] = make_float2(state.base, state.sum);
    });
    __syncthreads();  // the state has been written
    if (threadIdx.x == 0) {
      meeting.is_last = atomic_arrive(p.arrivals + first) == share.parts - 1;
      if (meeting.is_last) p.arrivals[first] = 0;
    }
    __syncthreads();
    if (meeting.is_last) {
      merge_parts(states, p.num_kv_heads, share.parts, num_rows, shared, into_output);
    }
  }

  // Merges the warps' states in shared memory and gives the first rows to `put`.
  template <typename Put>
  __device__ static void merge_warps(const uint8_t* shared, const Meeting& meeting, int num_rows,
                                     Put put) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    Row merged[kWarpRows];
#pragma unroll
    for (int u = 0; u < kWarpRows; ++u) {
      const int row = u * kDecodeWarps + warp;
      float2 sums[kDecodeWarps];
      float top = -INFINITY;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        sums[w] = meeting.sums[w][row];
        top = fmaxf(top, sums[w].x);
      }
      merged[u].raise(top);
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float share = rescale(sums[w].x, top);
        const float* output = reinterpret_cast<const float*>(shared + w * kRingBytes);
        merged[u].sum = fmaf(share, sums[w].y, merged[u].sum);
        merged[u].add(share, reinterpret_cast<const Dims*>(output + row * kPitch)[lane]);
      }
    }
#pragma unroll
    for (int u = 0; u < kWarpRows; ++u) {
      const int row = u * kDecodeWarps + warp;
      if (row < num_rows) put(row, merged[u]);
    }
  }

  // Merges the states of the parts, `stride` apart, in their order, and gives the first rows to
  // `put`. They come through shared memory, of as many parts at a time as fit, and a warp waits for
  // its own rows alone; lane n has the sums of part n.
  template <typename Put>
  __device__ static void merge_parts(const PartState* states, int64_t stride, int parts,
                                     int num_rows, uint8_t* shared, Put put) {
    constexpr int kRowBytes = sizeof(PartState::output[0]);
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int at_once = min(Tune::kSharedBytes / (num_rows * kRowBytes), 32);
    const uint32_t staged_shared = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    Row merged[kWarpRows];
    for (int first = 0; first < parts; first += at_once) {
      const int count = min(parts - first, at_once);
      const PartState* const group = states + first * stride;
      float2 sums[kWarpRows];
#pragma unroll
      for (int u = 0; u < kWarpRows; ++u) {
        const int row = u * kDecodeWarps + warp;
        if (row >= num_rows) break;
        sums[u] = make_float2(-INFINITY, 0.0f);
        if (lane < count) sums[u] = __ldcg(&group[lane * stride].sums[row]);
        const uint32_t to = staged_shared + row * at_once * kRowBytes;
        for (int n = 0; n < count; ++n) {
          const uint8_t* from = reinterpret_cast<const uint8_t*>(group[n * stride].output[row]);
#pragma unroll
          for (int at = lane * 16; at < kRowBytes; at += 512) {
            cp_async_16(to + n * kRowBytes + at, from + at, true);
          }
        }
      }
      cp_async_commit();
      float share[kWarpRows];
#pragma unroll
      for (int u = 0; u < kWarpRows; ++u) {
        if (u * kDecodeWarps + warp < num_rows) share[u] = merged[u].take_sums(sums[u]);
      }
      cp_async_wait<0>();
      __syncwarp();  // all lanes' copies have landed
#pragma unroll
      for (int u = 0; u < kWarpRows; ++u) {
        const int row = u * kDecodeWarps + warp;
        if (row >= num_rows) break;
        const Dims* staged = reinterpret_cast<const Dims*>(shared + row * at_once * kRowBytes);
#pragma unroll 4
        for (int n = 0; n < count; ++n) {
          merged[u].add(__shfl_sync(kFullWarp, share[u], n), staged[n * 32 + lane]);
        }
      }
      __syncwarp();  // the next may take their place
    }
#pragma unroll
    for (int u = 0; u < kWarpRows; ++u) {
      const int row = u * kDecodeWarps + warp;
      if (row < num_rows) put(row, merged[u]);
    }
  }

  // Closes a row and writes it to the output.
  __device__ static void put_result(const hkv_attention_params& p, const QueryRows& rows,
                                    int32_t row, const Row& state) {
    const int lane = threadIdx.x % 32;
    const int64_t token = rows.token(row);
    const int32_t head = rows.head(row);
    const ClosedRow closed(state.base, state.sum,
                           p.sink_logits == nullptr ? -INFINITY : p.sink_logits[head]);
    T* out = static_cast<T*>(p.out) + token * p.out_stride_token + head * p.out_stride_head;
    state.template put<T>(closed.scale, out + lane * (kDim / 32));
    if (lane == 0 && p.lse != nullptr) p.lse[token * p.num_qo_heads + head] = closed.lse;
  }
};

}  // namespace
}  // namespace hkv

#define HKV_DECODE_KERNEL(name, type, kv, dim, query_tiles, narrow)               \
  extern "C" __global__ void __launch_bounds__(                                   \
      HKV_DECODE_THREADS, hkv::Decode<type, kv, dim, query_tiles, narrow>::kCtas) \
      name(const __grid_constant__ hkv_attention_params p) {                      \
    hkv::Decode<type, kv, dim, query_tiles, narrow>::run(p);                      \
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
