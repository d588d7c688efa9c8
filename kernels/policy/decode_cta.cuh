// What every decode kernel does around the stream of keys: a CTA finds its work, its warps attend,
// their states meet in shared memory, and those of a sequence's parts in the workspace, where the
// CTA that comes last merges them, in the order of the parts.
//
// A Stream attends: it brings the keys and values of a warp to the tensor cores.
//   Query, kDim, kQueryTiles    element type of the queries, head_dim, tiles of 8 query rows
//   Tune                        shared memory and CTAs per multiprocessor
//   (policy/decode_tuning.cuh) Side, kSides                what a warp keeps in static shared
//   memory, and how many do Stream(p, window, seq, kv_head) tiles(visibility, first, last),
//   granule()   the tiles that queries at these positions visit, and
//                               how many of them parts are cut at
//   attend(p, rows, visibility, row0, tiles, span, ring_shared, side, state)
//   unit(state)                 what the state's output is to be multiplied with
//   value_dim(g, i)             dim of row g (i = 0) or g + 8 (i = 1) of a fragment of the output
#ifndef HYBRIDKV_POLICY_DECODE_CTA_CUH_
#define HYBRIDKV_POLICY_DECODE_CTA_CUH_

#include "../abi/params.h"
#include "../ptx/atomic.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/grid_dependency.cuh"
#include "decode_share.cuh"
#include "decode_tuning.cuh"
#include "dynamic_shared.cuh"
#include "query_rows.cuh"
#include "row_states.cuh"
#include "softmax_state.cuh"
#include "visibility.cuh"

namespace hkv {

// Waits for the predecessor; the next kernel may then start, which counts on all before this one.
__device__ __forceinline__ void follow_predecessor() {
  grid_dependency_wait();
  grid_dependency_launch();
}

template <typename Stream>
class DecodeCta {
  using T = typename Stream::Query;
  using Tune = typename Stream::Tune;
  static constexpr int kDim = Stream::kDim;
  static constexpr int kQueryTiles = Stream::kQueryTiles;
  using State = WarpState<kDim, kQueryTiles>;
  static constexpr unsigned kFullWarp = 0xffffffffu;
  static constexpr int kRows = 8 * kQueryTiles;
  // Rows of a warp's output in shared memory, in floats: padded so that the lanes' writes do not
  // collide.
  static constexpr int kPitch = kDim + 4;
  static constexpr int kRingBytes = Tune::kRingBytes;
  static_assert(Stream::kRingBytes <= kRingBytes, "the ring must fit");
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
    uint8_t* const shared = dynamic_shared<uint8_t>();
    __shared__ Meeting meeting;
    __shared__ typename Stream::Side sides[Stream::kSides];
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
    const Stream stream(p, window, share.seq, share.kv_head);
    const int warp = threadIdx.x / 32;
    uint8_t* warp_shared = shared + warp * kRingBytes;

    int32_t row0 = 0;
    do {
      const int32_t last_row = min(row0 + kRows, rows.count()) - 1;
      const auto tiles = stream.tiles(visibility, rows.position(row0), rows.position(last_row));
      const TileSpan span =
          last_row < row0 ? TileSpan{} : share.of(tiles.count(), stream.granule());
      State state;
      if (span.begin + warp < span.end) {
        stream.attend(p, meeting.rows, meeting.visibility, row0, tiles, span,
                      static_cast<uint32_t>(__cvta_generic_to_shared(warp_shared)),
                      sides[Stream::kSides == kDecodeWarps ? warp : 0], state);
      } else {
        follow_predecessor();
      }
      put_state(state, stream.unit(state), reinterpret_cast<float*>(warp_shared),
                meeting.sums[warp]);
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
            output[row * kPitch + d * 16 + Stream::value_dim(lane / 4, i)] =
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

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_DECODE_CTA_CUH_
