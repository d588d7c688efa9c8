// The dims of a warp's output that a lane holds, and how the warp goes over from one order to
// another.
//
// Of fragment f of 16 dims lane (g, t) holds the rows g (i = 0) and g + 8 (i = 1). Bits of a dim,
// from the highest of the fragment's number to the lowest:
//   natural        f.. f0   i  g2 g1 g0
//   int8           f.. f0  g2  g1 g0  i
//   int4           f.. g2  g1  g0 f0  i       (policy/sealed_codes.cuh)
// One bit of the registers changes places with one of the lanes, then lanes among themselves.
#ifndef HYBRIDKV_POLICY_OUTPUT_ORDER_CUH_
#define HYBRIDKV_POLICY_OUTPUT_ORDER_CUH_

#include "row_states.cuh"
#include "sealed_codes.cuh"

namespace hkv {

template <int kBits, int kDim, int kQueryTiles>
class OutputOrder {
  using State = WarpState<kDim, kQueryTiles>;
  static constexpr unsigned kFullWarp = 0xffffffffu;
  static constexpr int kFragments = kDim / 16;
  static constexpr int kG0 = 4;  // bits of g in the lane

 public:
  // From the natural order to that of the codes, and into the space of rotated values.
  __device__ static void to_codes(State& state) {
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        auto& output = state.output[qt];
        exchange_row(output, c, kG0);
        if (kBits == 4) exchange_fragment(output, c, kG0 * 2);
        permute(output, c, code_lane());
        if (SealedCodes<kBits>::kRotated) rotate(output, c);
      }
    }
  }

  // Back, with what all dims have in common.
  __device__ static void to_natural(State& state) {
#pragma unroll
    for (int qt = 0; qt < kQueryTiles; ++qt) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        auto& output = state.output[qt];
        float common = state.common[qt][c];
#pragma unroll
        for (int delta = 4; delta < 32; delta *= 2) {
          common += __shfl_xor_sync(kFullWarp, common, delta);
        }
        state.common[qt][c] = 0.0f;
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          output[f][c] += common;
          output[f][c + 2] += common;
        }
        if (SealedCodes<kBits>::kRotated) rotate(output, c);
        permute(output, c, natural_lane());
        if (kBits == 4) exchange_fragment(output, c, kG0 * 2);
        exchange_row(output, c, kG0);
      }
    }
  }

 private:
  using Output = float[kFragments][4];

  // Lets `low` of lanes with the bit and `high` of those without change places.
  __device__ static void exchange(float& low, float& high, int lane_bit) {
    const bool upper = (threadIdx.x & lane_bit) != 0;
    const float got = __shfl_xor_sync(kFullWarp, upper ? low : high, lane_bit);
    (upper ? low : high) = got;
  }
  __device__ static void exchange_row(Output& output, int c, int lane_bit) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) exchange(output[f][c], output[f][c + 2], lane_bit);
  }
  __device__ static void exchange_fragment(Output& output, int c, int lane_bit) {
#pragma unroll
    for (int f = 0; f < kFragments; f += 2) {
      exchange(output[f][c], output[f + 1][c], lane_bit);
      exchange(output[f][c + 2], output[f + 1][c + 2], lane_bit);
    }
  }

  __device__ static void permute(Output& output, int c, int from) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      output[f][c] = __shfl_sync(kFullWarp, output[f][c], from);
      output[f][c + 2] = __shfl_sync(kFullWarp, output[f][c + 2], from);
    }
  }

  // After the exchanges the bits g2 g1 g0 of a lane stand for those of the dim as follows, with
  // those they are to stand for: int8 2 1 3 for 3 2 1; int4 2 4 3 for 4 3 2.
  __device__ static int lane_of(int g2, int g1, int g0) {
    return (g2 << 4 | g1 << 3 | g0 << 2) + threadIdx.x % 4;
  }
  __device__ static int code_lane() {
    const int g2 = threadIdx.x >> 4 & 1, g1 = threadIdx.x >> 3 & 1, g0 = threadIdx.x >> 2 & 1;
    return kBits == 8 ? lane_of(g1, g0, g2) : lane_of(g0, g2, g1);
  }
  __device__ static int natural_lane() {
    const int g2 = threadIdx.x >> 4 & 1, g1 = threadIdx.x >> 3 & 1, g0 = threadIdx.x >> 2 & 1;
    return kBits == 8 ? lane_of(g0, g2, g1) : lane_of(g1, g0, g2);
  }

  // Multiplies with the orthonormal Hadamard matrix of order kDim, its own inverse.
  __device__ static void rotate(Output& output, int c) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      butterfly(output[f][c], output[f][c + 2]);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
#pragma unroll
        for (int bit = kG0; bit < 32; bit *= 2) {
          const float other = __shfl_xor_sync(kFullWarp, output[f][c + i], bit);
          output[f][c + i] =
              (threadIdx.x & bit) != 0 ? other - output[f][c + i] : output[f][c + i] + other;
        }
      }
    }
#pragma unroll
    for (int distance = 1; distance < kFragments; distance *= 2) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        if ((f & distance) != 0) continue;
        butterfly(output[f][c], output[f + distance][c]);
        butterfly(output[f][c + 2], output[f + distance][c + 2]);
      }
    }
    constexpr float kFactor = kDim == 64 ? 0.125f : kDim == 128 ? 0.08838834764831845f : 0.0625f;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      output[f][c] *= kFactor;
      output[f][c + 2] *= kFactor;
    }
  }
  __device__ static void butterfly(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_OUTPUT_ORDER_CUH_
