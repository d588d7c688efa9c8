// `int8`, `int6`, `int4`: integers between the least and the largest of a group, K by channel over
// up to 64 tokens, V by token, rotated first in `int4` (src/codec/int.rs).
//
// Every operation is one of IEEE f32, none fused, in the order of the CPU's code.
#ifndef HYBRIDKV_POLICY_CODEC_INT_CUH_
#define HYBRIDKV_POLICY_CODEC_INT_CUH_

#include "element_pair.cuh"
#include "slot.cuh"

namespace hkv {

template <typename T, int kBits>
struct Int : Codec {
  enum Section { kKeyGroups, kValueGroups, kWords, kPairs };
  using Pair = ElementPair<T>;
  static constexpr float kLevels = (1 << kBits) - 1;
  static constexpr bool kRotates = kBits == 4;
  static constexpr int kGroupTokens = 64;
  static constexpr float kLargestRotated = 3.3230699894622897e35f;  // 2^118
  static constexpr float kLeastStep = 7.888609052210118e-31f;       // 2^-100

  const hkv_codec_params& p;
  const Lanes lanes;
  const Tables tables;

  __device__ Int(const hkv_codec_params& p, Tables tables, char*)
      : p(p), lanes(p.head_dim, p.block_size), tables(tables) {}

  // What the codes of a group stand for, as stored: zero in the low half, step in the high one.
  __device__ static uint32_t fit(float least, float largest) {
    const uint16_t zero = Pair::down(__fadd_rn(least, 0.0f));
    const float range = __fsub_rn(largest, Pair::to_float(zero));
    const uint16_t step = Pair::up(fmaxf(__fdiv_rn(range, kLevels), kLeastStep));
    return static_cast<uint32_t>(step) << 16 | zero;
  }

  __device__ static float zero_of(uint32_t affine) {
    return Pair::to_float(static_cast<uint16_t>(affine));
  }
  __device__ static float step_of(uint32_t affine) {
    return Pair::to_float(static_cast<uint16_t>(affine >> 16));
  }

  // The code of an element of the group, in the low byte: the number of steps from zero, which the
  // group's zero and step keep within 0 .. kLevels, rounded by the addition of 1.5 * 2^23.
  __device__ static uint32_t quantise(float x, float zero, float inverse) {
    const float steps = __fmul_rn(__fsub_rn(x, zero), inverse);
    return __float_as_uint(__fadd_rn(steps, 12582912.0f));
  }

  // The value of the code in byte `k` of a word. The product is exact, so that it may be fused.
  __device__ static float value(uint32_t codes, int k, float zero, float step) {
    const float shifted = __uint_as_float(__byte_perm(codes, 0x4b000000u, 0x7440 + k));
    return __fmaf_rn(__fsub_rn(shifted, 8388608.0f), step, zero);
  }

  // The tokens of a group of K, in passes.
  __device__ int group_passes() const { return min(p.block_size, kGroupTokens) / lanes.rows; }

  // Where the groups of this lane's channels lie.
  __device__ uint4* key_groups(const Plane& plane, int group) const {
    return reinterpret_cast<uint4*>(key_group(plane, group, lanes.vector * kLaneElements));
  }

  __device__ uint32_t* key_group(const Plane& plane, int group, int channel) const {
    const int groups = (p.block_size + kGroupTokens - 1) / kGroupTokens;
    const int index = (plane.index_in_kind * groups + group) * p.head_dim + channel;
    return tables.at<uint32_t>(p.sections[kKeyGroups] + index * sizeof(uint32_t));
  }

  __device__ uint32_t* value_group(const Plane& plane, int pass) const {
    const int token = plane.index_in_kind * p.block_size + pass * lanes.rows + lanes.row;
    return tables.at<uint32_t>(p.sections[kValueGroups] + token * sizeof(uint32_t));
  }

  // Writes the codes of a pass, which are in the low bytes of `code`.
  __device__ void put(const Plane& plane, int pass, const uint32_t (&code)[16],
                      SlotWriter& writer) const {
    uint32_t word[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      word[w] = __byte_perm(__byte_perm(code[4 * w], code[4 * w + 1], 0x0040),
                            __byte_perm(code[4 * w + 2], code[4 * w + 3], 0x0040), 0x5410);
    }
    const uint32_t element = plane.element(lanes, pass);
    if constexpr (kBits == 8) {
      if (lanes.active) {
        writer.put(p.sections[kWords] + element, make_uint4(word[0], word[1], word[2], word[3]));
      }
    } else {
      uint32_t two[4], four[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t low = word[w] & 0x0f0f0f0fu, high = word[w] >> 4 & 0x03030303u;
        two[w] = low | low >> 4;
        four[w] = (high | high >> 6) & 0x000f000fu;
        four[w] |= four[w] >> 12;
      }
      if (lanes.active) {
        writer.put(
            p.sections[kWords] + element / 2,
            make_uint2(__byte_perm(two[0], two[1], 0x6420), __byte_perm(two[2], two[3], 0x6420)));
      }
      if constexpr (kBits == 6) {
        const uint32_t pairs = __byte_perm(__byte_perm(four[0], four[1], 0x0040),
                                           __byte_perm(four[2], four[3], 0x0040), 0x5410);
        writer.put_halves(p.sections[kPairs] + element / 4, pairs, lanes.active);
      }
    }
  }

  // Up to kPasses passes as they lie in the slot.
  struct Packed {
    uint4 words[kPasses];  // of nibbles half
    uint32_t pairs[kPasses];
  };

  __device__ void load(Packed& chunk, const Plane& plane, int begin,
                       const SlotReader& reader) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      chunk.pairs[i] = 0;
      if (!lanes.active || begin + i >= plane.passes) continue;
      const uint32_t element = plane.element(lanes, begin + i);
      if constexpr (kBits == 8) {
        chunk.words[i] = reader.load16(p.sections[kWords] + element);
      } else {
        const uint2 low = reader.load8(p.sections[kWords] + element / 2);
        chunk.words[i] = make_uint4(low.x, low.y, 0, 0);
      }
      if constexpr (kBits == 6) chunk.pairs[i] = reader.load4(p.sections[kPairs] + element / 4);
    }
  }

  // The codes of pass `begin + i`, in the bytes of four words: of 8 bits in their order; of fewer,
  // the even ones of 8 elements in one word and the odd ones in the next.
  __device__ void take(uint32_t (&code)[4], const Packed& chunk, int i, const Plane& plane,
                       int begin, SlotReader& reader) const {
    const uint32_t element = plane.element(lanes, begin + i);
    const uint4 words = chunk.words[i];
    if constexpr (kBits == 8) {
      if (lanes.active) reader.take(p.sections[kWords] + element, words);
      code[0] = words.x;
      code[1] = words.y;
      code[2] = words.z;
      code[3] = words.w;
    } else {
      const uint2 low = make_uint2(words.x, words.y);
      if (lanes.active) reader.take(p.sections[kWords] + element / 2, low);
      code[0] = low.x & 0x0f0f0f0fu;
      code[1] = low.x >> 4 & 0x0f0f0f0fu;
      code[2] = low.y & 0x0f0f0f0fu;
      code[3] = low.y >> 4 & 0x0f0f0f0fu;
    }
    if constexpr (kBits == 6) {
      reader.take_halves(p.sections[kPairs] + element / 4, chunk.pairs[i], lanes.active);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // A nibble, of an even and an odd element, to each byte.
        uint32_t pairs = chunk.pairs[i] >> 16 * h & 0xffffu;
        pairs = (pairs | pairs << 8) & 0x00ff00ffu;
        pairs = (pairs | pairs << 4) & 0x0f0f0f0fu;
        code[2 * h] |= (pairs & 0x03030303u) << 4;
        code[2 * h + 1] |= (pairs & 0x0c0c0c0cu) << 2;
      }
    }
  }

  // Where the code of element j is among the words of `take`.
  __device__ static constexpr int word_of(int j) { return kBits == 8 ? j / 4 : j / 8 * 2 + j % 2; }
  __device__ static constexpr int byte_of(int j) { return kBits == 8 ? j % 4 : j % 8 / 2; }

  // Rotates the lanes' tokens (src/codec/rotate.rs). By a whole warp.
  __device__ void rotate(float (&x)[16]) const {
    const int order = p.head_dim & -p.head_dim;
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        if (j & distance) continue;
        const float a = x[j], b = x[j + distance];
        x[j] = __fadd_rn(a, b);
        x[j + distance] = __fsub_rn(a, b);
      }
    }
    for (int distance = 1; distance < order / 16; distance *= 2) {
      const int other = lanes.in_row(lanes.vector ^ distance);
      const bool high = lanes.vector & distance;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float theirs = __shfl_sync(~0u, x[j], other);
        x[j] = __fadd_rn(theirs, high ? -x[j] : x[j]);
      }
    }
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(order));
#pragma unroll
    for (int j = 0; j < 16; ++j) x[j] = __fmul_rn(x[j], factor);
  }

  __device__ bool encode(const Plane& plane, SlotWriter& writer) {
    return plane.is_key ? encode_key(plane, writer) : encode_value(plane, writer);
  }

  __device__ static bool finite(uint32_t affine) { return !Pair::not_finite(affine); }

  __device__ bool encode_key(const Plane& plane, SlotWriter& writer) {
    bool valid = true;
    const int passes = group_passes();
    Elements chunk[kPasses];
    for (int group = 0; group * passes < plane.passes; ++group) {
      const int end = (group + 1) * passes;
      uint32_t least[8], largest[8];
      for (int begin = group * passes; begin < end; begin += kPasses) {
        plane.load(chunk, lanes, begin);
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          if (begin + i >= end) break;
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            const uint32_t pair = chunk[i].pair[c];
            const bool first = i == 0 && begin == group * passes;
            least[c] = first ? pair : Pair::least(least[c], pair);
            largest[c] = first ? pair : Pair::largest(largest[c], pair);
            valid &= !Pair::not_finite(pair);
          }
        }
      }
      for (int step = 1; step < lanes.rows; step *= 2) {
        const int other = lanes.across_rows(step);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          least[c] = Pair::least(least[c], __shfl_sync(~0u, least[c], other));
          largest[c] = Pair::largest(largest[c], __shfl_sync(~0u, largest[c], other));
        }
      }
      // The bounds of every channel go where its group is to be; then each lane fits a part of
      // them.
      uint4* const groups = key_groups(plane, group);
      if (lanes.active && lanes.row == 0) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          groups[c] = make_uint4(__byte_perm(least[2 * c], largest[2 * c], 0x5410),
                                 __byte_perm(least[2 * c], largest[2 * c], 0x7632),
                                 __byte_perm(least[2 * c + 1], largest[2 * c + 1], 0x5410),
                                 __byte_perm(least[2 * c + 1], largest[2 * c + 1], 0x7632));
        }
      }
      __syncwarp();
      for (int channel = threadIdx.x % kWarpLanes; channel < p.head_dim; channel += kWarpLanes) {
        uint32_t* const bounds = key_group(plane, group, channel);
        *bounds = fit(zero_of(*bounds), step_of(*bounds));
        valid &= finite(*bounds);
      }
      __syncwarp();
      float zero[16], inverse[16];
      if (lanes.active) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const uint4 four = groups[c];
          const uint32_t affine[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            zero[4 * c + i] = zero_of(affine[i]);
            inverse[4 * c + i] = __frcp_rn(step_of(affine[i]));
          }
        }
      }
      // Once more, out of the nearest cache: registers are scarce here.
#pragma unroll 1
      for (int pass = group * passes; pass < end; ++pass) {
        const Elements e = plane.load(lanes, pass);
        uint32_t code[16];
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const float2 x = Pair::to_float(e.pair[c]);
          code[2 * c] = quantise(x.x, zero[2 * c], inverse[2 * c]);
          code[2 * c + 1] = quantise(x.y, zero[2 * c + 1], inverse[2 * c + 1]);
        }
        put(plane, pass, code, writer);
      }
    }
    return valid;
  }

  __device__ bool encode_value(const Plane& plane, SlotWriter& writer) {
    bool valid = true;
    Elements next = plane.load(lanes, 0);
#pragma unroll 1
    for (int pass = 0; pass < plane.passes; ++pass) {
      float x[16];
      valid &= to_floats<T>(x, next.pair);
      if (pass + 1 < plane.passes) next = plane.load(lanes, pass + 1);
      if constexpr (kRotates) {
        rotate(x);
#pragma unroll
        for (int j = 0; j < 16; ++j) valid &= fabsf(x[j]) <= kLargestRotated;
      }
      float least = x[0], largest = x[0];
#pragma unroll
      for (int j = 1; j < 16; ++j) {
        least = fminf(least, x[j]);
        largest = fmaxf(largest, x[j]);
      }
      least = -lanes.row_max(-least);
      largest = lanes.row_max(largest);
      const uint32_t affine = fit(least, largest);
      valid &= finite(affine);
      if (lanes.active && lanes.vector == 0) *value_group(plane, pass) = affine;
      const float zero = zero_of(affine), inverse = __frcp_rn(step_of(affine));
      uint32_t code[16];
#pragma unroll
      for (int j = 0; j < 16; ++j) code[j] = quantise(x[j], zero, inverse);
      put(plane, pass, code, writer);
    }
    return valid;
  }

  __device__ bool decode(const Plane& plane, Packed& chunk, SlotReader& reader) {
    return plane.is_key ? decode_key(plane, chunk, reader) : decode_value(plane, chunk, reader);
  }

  __device__ bool decode_key(const Plane& plane, Packed& chunk, SlotReader& reader) {
    const int passes = group_passes();
    float zero[16], step[16];
    for (int begin = 0; begin < plane.passes; begin += kPasses) {
      if (begin > 0) load(chunk, plane, begin, reader);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int pass = begin + i;
        if (pass >= plane.passes) break;
        if (lanes.active && pass % passes == 0) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const uint4 four = key_groups(plane, pass / passes)[c];
            const uint32_t affine[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              zero[4 * c + k] = zero_of(affine[k]);
              step[4 * c + k] = step_of(affine[k]);
            }
          }
        }
        uint32_t code[4];
        take(code, chunk, i, plane, begin, reader);
        if (!lanes.active) continue;
        Elements e;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const int j = 2 * c, k = j + 1;
          e.pair[c] = Pair::pack(value(code[word_of(j)], byte_of(j), zero[j], step[j]),
                                 value(code[word_of(k)], byte_of(k), zero[k], step[k]));
        }
        plane.store(e, lanes, pass);
      }
    }
    return true;
  }

  __device__ bool decode_value(const Plane& plane, Packed& chunk, SlotReader& reader) {
    for (int begin = 0; begin < plane.passes; begin += kPasses) {
      if (begin > 0) load(chunk, plane, begin, reader);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int pass = begin + i;
        if (pass >= plane.passes) break;
        uint32_t code[4];
        take(code, chunk, i, plane, begin, reader);
        const uint32_t group = lanes.active ? *value_group(plane, pass) : 0;
        const float zero = zero_of(group), step = step_of(group);
        float x[16];
#pragma unroll
        for (int j = 0; j < 16; ++j) x[j] = value(code[word_of(j)], byte_of(j), zero, step);
        if constexpr (kRotates) rotate(x);
        if (!lanes.active) continue;
        Elements e;
        from_floats<T>(e.pair, x);
        plane.store(e, lanes, pass);
      }
    }
    return true;
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_CODEC_INT_CUH_
