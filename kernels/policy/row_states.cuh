// The softmax states of a tile of query rows: while keys stream, spread over a warp; afterwards row
// by row, to be merged.
#ifndef HYBRIDKV_POLICY_ROW_STATES_CUH_
#define HYBRIDKV_POLICY_ROW_STATES_CUH_

#include "kv_scales.cuh"
#include "softmax_state.cuh"

namespace hkv {

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
    if (!__any_sync(~0u, exceeded)) return;
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
    if (!__any_sync(~0u, unit.exceeded_by(top))) return;
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
    for (int delta = 4; delta < 32; delta *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, delta));
    return x;
  }
};

// 4 neighbouring dims of the state of a row: output sums, base in log2 units, sum of weights.
struct RowPiece {
  float base = -INFINITY;
  float sum = 0.0f;
  float4 output = {};

  RowPiece() = default;
  __device__ RowPiece(const float2& sums, const float4& output)
      : base(sums.x), sum(sums.y), output(output) {}

  // Takes in the pieces of other keys, in their order.
  template <int kCount>
  __device__ void add(const RowPiece (&others)[kCount]) {
    float top = base;
#pragma unroll
    for (int n = 0; n < kCount; ++n) top = fmaxf(top, others[n].base);
    const float keep = rescale(base, top);
    base = top;
    sum *= keep;
    output = make_float4(output.x * keep, output.y * keep, output.z * keep, output.w * keep);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const float share = rescale(others[n].base, top);
      sum = fmaf(share, others[n].sum, sum);
      output.x = fmaf(share, others[n].output.x, output.x);
      output.y = fmaf(share, others[n].output.y, output.y);
      output.z = fmaf(share, others[n].output.z, output.z);
      output.w = fmaf(share, others[n].output.w, output.w);
    }
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_ROW_STATES_CUH_
