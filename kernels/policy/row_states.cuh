// The softmax states of a tile of query rows: while keys stream, spread over a warp; afterwards row
// by row, to be merged.
#ifndef HYBRIDKV_POLICY_ROW_STATES_CUH_
#define HYBRIDKV_POLICY_ROW_STATES_CUH_

#include "element.cuh"
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
  float common[kQueryTiles][2];  // what is to be added to all dims of the output; of own keys
  ValueUnit unit;                // of the output, where values have scales of their own

  __device__ WarpState() {
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        base[qt][c] = -INFINITY;
        sum[qt][c] = 0.0f;
        common[qt][c] = 0.0f;
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
        common[qt][c] *= keep;
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
      common[qt][0] *= keep;
      common[qt][1] *= keep;
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

// A row's state, spread over a warp: lane l has the dims from l * kDims on; base in log2 units, sum
// of weights.
template <int kDims>
struct LaneRow {
  struct alignas(kDims < 4 ? 8 : 16) Dims {
    float value[kDims];
  };

  float base = -INFINITY;
  float sum = 0.0f;
  Dims output = {};

  // Moves the base up to that of other keys' states.
  __device__ void raise(float top) {
    const float higher = fmaxf(base, top);
    const float keep = rescale(base, higher);
    base = higher;
    sum *= keep;
#pragma unroll
    for (int i = 0; i < kDims; ++i) output.value[i] *= keep;
  }

  // Takes in the bases and sums of 32 states, one per lane, and gives this lane's what its output
  // is to be added with. Whole warp.
  __device__ float take_sums(const float2& sums) {
    float top = sums.x;
#pragma unroll
    for (int delta = 16; delta > 0; delta /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, delta));
    raise(top);
    const float share = rescale(sums.x, base);
    float total = share * sums.y;
#pragma unroll
    for (int delta = 16; delta > 0; delta /= 2) total += __shfl_xor_sync(~0u, total, delta);
    sum += total;
    return share;
  }

  __device__ void add(float share, const Dims& other) {
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
      output.value[i] = fmaf(share, other.value[i], output.value[i]);
    }
  }

  // Writes the output times `scale`.
  template <typename T>
  __device__ void put(float scale, T* out) const {
    struct alignas(kDims * 2) Words {
      uint32_t pair[kDims / 2];
    } words;
#pragma unroll
    for (int i = 0; i < kDims / 2; ++i) {
      words.pair[i] =
          Element<T>::pack(output.value[2 * i] * scale, output.value[2 * i + 1] * scale);
    }
    *reinterpret_cast<Words*>(out) = words;
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_ROW_STATES_CUH_
