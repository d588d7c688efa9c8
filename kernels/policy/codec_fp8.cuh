// `fp8`: e4m3 elements with f32 scales of a token, a head or a layer's K or V (src/codec/fp8.rs).
#ifndef HYBRIDKV_POLICY_CODEC_FP8_CUH_
#define HYBRIDKV_POLICY_CODEC_FP8_CUH_

#include "e4m3.cuh"
#include "element_pair.cuh"
#include "slot.cuh"

namespace hkv {

template <typename T>
struct Fp8 : Codec {
  enum Section { kScales, kBytes };
  static constexpr bool kSurveys = true;

  const hkv_codec_params& p;
  const Lanes lanes;
  float* scales;  // one per `shared` planes, or, when that is 0, per token
  const int shared;

  __device__ Fp8(const hkv_codec_params& p, Tables tables, char*)
      : p(p),
        lanes(p.head_dim, p.block_size),
        scales(tables.at<float>(p.sections[kScales])),
        shared(p.scale_planes) {}

  __device__ static float scale_of(float largest) {
    return fmaxf(__fdiv_rn(largest, kE4m3Max), kLeastScale);
  }

  __device__ static float largest_of(const float (&x)[16]) {
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < 16; ++j) largest = fmaxf(largest, fabsf(x[j]));
    return largest;
  }

  // The largest magnitudes where planes share a scale.
  __device__ void survey(const Plane& plane) {
    if (shared == 0) return;
    float largest = 0.0f;
    for (int begin = 0; begin < plane.passes; begin += kPasses) {
      Elements chunk[kPasses];
      plane.load(chunk, lanes, begin);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        float x[16];
        to_floats<T>(x, chunk[i].pair);
        largest = fmaxf(largest, largest_of(x));
      }
    }
    // Magnitudes are ordered as their bits are.
    const uint32_t bits = __reduce_max_sync(~0u, __float_as_uint(largest));
    if (threadIdx.x % kWarpLanes == 0) {
      atomicMax(reinterpret_cast<unsigned*>(scales) + plane.index / shared, bits);
    }
  }

  __device__ void end_survey() {
    if (shared == 0) return;
    const int count = 2 * p.num_layers * p.num_kv_heads / shared;
    for (int i = threadIdx.x; i < count; i += blockDim.x) scales[i] = scale_of(scales[i]);
  }

  // Index of the scale of this lane's token.
  __device__ int scale_index(const Plane& plane, int pass) const {
    return shared == 0 ? plane.index * p.block_size + pass * lanes.rows + lanes.row
                       : plane.index / shared;
  }

  __device__ bool encode(const Plane& plane, SlotWriter& writer) {
    bool finite = true;
    for (int begin = 0; begin < plane.passes; begin += kPasses) {
      Elements chunk[kPasses];
      plane.load(chunk, lanes, begin);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        if (begin + i >= plane.passes) break;
        float x[16];
        finite &= to_floats<T>(x, chunk[i].pair);
        const int index = scale_index(plane, begin + i);
        float scale;
        if (shared == 0) {
          scale = scale_of(lanes.row_max(largest_of(x)));
          if (lanes.active && lanes.vector == 0) scales[index] = scale;
        } else {
          scale = scales[index];
        }
        if (!lanes.active) continue;
        const float inverse = __frcp_rn(scale);
        uint32_t word[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float scaled[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) scaled[j] = __fmul_rn(x[4 * w + j], inverse);
          word[w] = f32_to_e4m3(scaled);
        }
        writer.put(p.sections[kBytes] + plane.element(lanes, begin + i),
                   make_uint4(word[0], word[1], word[2], word[3]));
      }
    }
    return finite;
  }

  // Up to kPasses passes as they lie in the slot.
  struct Packed {
    uint4 bytes[kPasses];
  };

  __device__ void load(Packed& chunk, const Plane& plane, int begin, const SlotReader& reader) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (!lanes.active || begin + i >= plane.passes) continue;
      chunk.bytes[i] = reader.load16(p.sections[kBytes] + plane.element(lanes, begin + i));
    }
  }

  __device__ bool decode(const Plane& plane, Packed& chunk, SlotReader& reader) {
    const uint4(&bytes)[kPasses] = chunk.bytes;
    for (int begin = 0; begin < plane.passes; begin += kPasses) {
      if (begin > 0) load(chunk, plane, begin, reader);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        if (!lanes.active || begin + i >= plane.passes) continue;
        reader.take(p.sections[kBytes] + plane.element(lanes, begin + i), bytes[i]);
        const float scale = scales[scale_index(plane, begin + i)];
        const uint32_t word[4] = {bytes[i].x, bytes[i].y, bytes[i].z, bytes[i].w};
        float x[16];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t pair[2];
          e4m3_to_f16(pair, word[w]);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 two = ElementPair<__half>::to_float(pair[h]);
            x[4 * w + 2 * h] = __fmul_rn(two.x, scale);
            x[4 * w + 2 * h + 1] = __fmul_rn(two.y, scale);
          }
        }
        Elements e;
        from_floats<T>(e.pair, x);
        plane.store(e, lanes, begin + i);
      }
    }
    return true;
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_CODEC_FP8_CUH_
