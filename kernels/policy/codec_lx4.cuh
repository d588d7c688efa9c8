// `lx4`: bf16 elements as sign and mantissa in a byte and the exponent's place in a window in 4
// bits (src/codec/lx4.rs, which defines every section).
//
// Windows and codes are computed two elements to a word, in 16-bit halves. Escapes are collected in
// shared memory in whatever order they are found, and go into the list by their rank, so that the
// list does not depend on who found them.
#ifndef HYBRIDKV_POLICY_CODEC_LX4_CUH_
#define HYBRIDKV_POLICY_CODEC_LX4_CUH_

#include "slot.cuh"

namespace hkv {

struct Lx4 : Codec {
  enum Section { kBases, kEnds, kOffsets, kPositions, kExponents, kBytes, kNibbles };
  static constexpr uint32_t kWindow = 15;

  const hkv_codec_params& p;
  const Lanes lanes;
  const Tables tables;
  const int capacity;
  // Of an encoder: how many escapes were found, and of those that have room plane << 16 | position,
  // and the exponent.
  int* found;
  uint32_t* keys;
  uint8_t* exponents;

  __device__ Lx4(const hkv_codec_params& p, Tables tables, char* scratch)
      : p(p),
        lanes(p.head_dim, p.block_size),
        tables(tables),
        capacity(p.escapes),
        found(reinterpret_cast<int*>(scratch)),
        keys(reinterpret_cast<uint32_t*>(scratch + 16)),
        exponents(reinterpret_cast<uint8_t*>(keys + capacity)) {}

  // The four bytes 0 and 2 of two words.
  __device__ static uint32_t bytes_of(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x6420); }

  __device__ static uint32_t exponents_of(uint32_t pair) { return pair >> 7 & 0x00ff00ffu; }

  // The windows of this lane's channels, from the largest exponents of the plane; writes base and
  // offsets.
  __device__ void fit(uint32_t (&window)[8], const Plane& plane, Elements (&chunk)[kPasses]) {
#pragma unroll
    for (int c = 0; c < 8; ++c) window[c] = 0;
    for (int begin = 0; begin < plane.passes; begin += kPasses) {
      if (begin > 0) plane.load(chunk, lanes, begin);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          window[c] = __vmaxu2(window[c], chunk[i].pair[c] & 0x7fff7fffu);
        }
      }
    }
    for (int step = 1; step < lanes.rows; step *= 2) {
      const int other = lanes.across_rows(step);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        window[c] = __vmaxu2(window[c], __shfl_sync(~0u, window[c], other));
      }
    }
    uint32_t largest = 0;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      window[c] = exponents_of(window[c]);
      largest = __vmaxu2(largest, window[c]);
    }
    const uint32_t base = __reduce_max_sync(~0u, max(largest & 0xffffu, largest >> 16));
    if (threadIdx.x % kWarpLanes == 0) tables.at<uint8_t>(p.sections[kBases])[plane.index] = base;
    uint32_t below[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      below[c] = plane.is_key ? __vminu2(base * 0x00010001u - window[c], 0x000f000fu) : 0;
      window[c] = base * 0x00010001u - below[c];
    }
    if (plane.is_key && lanes.active && lanes.row == 0) {
      const uint32_t offset = plane.index_in_kind * p.head_dim / 2 + lanes.vector * 8;
      *tables.at<uint2>(p.sections[kOffsets] + offset) = nibbles_of(below);
    }
  }

  // 16 nibbles out of 16-bit halves.
  __device__ static uint2 nibbles_of(const uint32_t (&half)[8]) {
    uint32_t byte[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) byte[c] = half[c] | half[c] >> 12;
    uint32_t two[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) two[c] = __byte_perm(byte[2 * c], byte[2 * c + 1], 0x0040);
    return make_uint2(__byte_perm(two[0], two[1], 0x5410), __byte_perm(two[2], two[3], 0x5410));
  }

  // 16-bit halves out of the 4 nibbles of two bytes.
  __device__ static uint32_t halves_of(uint32_t byte) { return (byte | byte << 12) & 0x000f000fu; }

  __device__ bool encode(const Plane& plane, SlotWriter& writer) {
    Elements chunk[kPasses];
    plane.load(chunk, lanes, 0);
    uint32_t window[8];
    fit(window, plane, chunk);
    for (int begin = 0; begin < plane.passes; begin += kPasses) {
      if (plane.passes > kPasses) plane.load(chunk, lanes, begin);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        if (!lanes.active || begin + i >= plane.passes) continue;
        uint32_t byte[8], code[8], last = 0;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const uint32_t pair = chunk[i].pair[c];
          byte[c] = (pair >> 8 & 0x00800080u) | (pair & 0x007f007fu);
          const uint32_t below = __vminu2(window[c] - exponents_of(pair), 0x000f000fu);
          code[c] = 0x000f000fu - below;
          last |= below + 0x00010001u;
        }
        const uint32_t element = plane.element(lanes, begin + i);
        writer.put(p.sections[kBytes] + element,
                   make_uint4(bytes_of(byte[0], byte[1]), bytes_of(byte[2], byte[3]),
                              bytes_of(byte[4], byte[5]), bytes_of(byte[6], byte[7])));
        writer.put(p.sections[kNibbles] + element / 2, nibbles_of(code));
        if (last & 0x00100010u) collect(plane, begin + i, chunk[i], code);
      }
    }
    return true;
  }

  // Takes note of the escapes among this lane's elements.
  __device__ void collect(const Plane& plane, int pass, const Elements& e,
                          const uint32_t (&code)[8]) {
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      const int shift = j % 2 * 16;
      if (code[j / 2] >> shift & 15) continue;
      const int index = atomicAdd(found, 1);
      if (index >= capacity) continue;
      keys[index] = plane.index << 16 | (plane.position(lanes, pass) + j);
      exponents[index] = exponents_of(e.pair[j / 2]) >> shift;
    }
  }

  // Lists the escapes. By all threads, when all planes are encoded; false when there are too many.
  __device__ bool finish() {
    const int count = *found;
    if (count > capacity) return false;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      int rank = 0;
      for (int j = 0; j < count; ++j) rank += keys[j] < keys[i];
      tables.at<uint16_t>(p.sections[kPositions])[rank] = keys[i];
      tables.at<uint8_t>(p.sections[kExponents])[rank] = exponents[i];
    }
    const int planes = 2 * p.num_layers * p.num_kv_heads;
    for (int plane = threadIdx.x; plane < planes; plane += blockDim.x) {
      int end = 0;
      for (int j = 0; j < count; ++j) end += (keys[j] >> 16) <= plane;
      tables.at<uint16_t>(p.sections[kEnds])[plane] = end;
    }
    return true;
  }

  // Up to kPasses passes as they lie in the slot.
  struct Packed {
    uint4 bytes[kPasses];
    uint2 nibbles[kPasses];
  };

  __device__ void load(Packed& chunk, const Plane& plane, int begin, const SlotReader& reader) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (!lanes.active || begin + i >= plane.passes) continue;
      const uint32_t element = plane.element(lanes, begin + i);
      chunk.bytes[i] = reader.load16(p.sections[kBytes] + element);
      chunk.nibbles[i] = reader.load8(p.sections[kNibbles] + element / 2);
    }
  }

  __device__ bool decode(const Plane& plane, Packed& chunk, SlotReader& reader) {
    const uint32_t base = tables.at<uint8_t>(p.sections[kBases])[plane.index];
    // The exponent of code 0, modulo 2^8.
    uint32_t lowest[8];
    uint2 offsets = make_uint2(0, 0);
    if (plane.is_key && lanes.active) {
      const uint32_t offset = plane.index_in_kind * p.head_dim / 2 + lanes.vector * 8;
      offsets = *tables.at<uint2>(p.sections[kOffsets] + offset);
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const uint32_t byte = (c < 4 ? offsets.x : offsets.y) >> c % 4 * 8 & 0xffu;
      lowest[c] = ((base + 256 - kWindow) * 0x00010001u - halves_of(byte)) & 0x00ff00ffu;
    }
    bool valid = true;
    for (int begin = 0; begin < plane.passes; begin += kPasses) {
      if (begin > 0) load(chunk, plane, begin, reader);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        if (!lanes.active || begin + i >= plane.passes) continue;
        const uint32_t element = plane.element(lanes, begin + i);
        reader.take(p.sections[kBytes] + element, chunk.bytes[i]);
        reader.take(p.sections[kNibbles] + element / 2, chunk.nibbles[i]);
        const uint32_t words[4] = {chunk.bytes[i].x, chunk.bytes[i].y, chunk.bytes[i].z,
                                   chunk.bytes[i].w};
        Elements e;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const uint32_t byte = __byte_perm(words[c / 2], 0, c % 2 == 0 ? 0x4140 : 0x4342);
          const uint32_t code =
              (c < 4 ? chunk.nibbles[i].x : chunk.nibbles[i].y) >> c % 4 * 8 & 0xffu;
          const uint32_t exponent = (lowest[c] + halves_of(code)) & 0x00ff00ffu;
          e.pair[c] = (byte & 0x00800080u) << 8 | exponent << 7 | (byte & 0x007f007fu);
        }
        if (has_zero(chunk.nibbles[i].x) || has_zero(chunk.nibbles[i].y)) {
          valid &= replace(e, plane, begin + i, chunk.nibbles[i]);
        }
        plane.store(e, lanes, begin + i);
      }
    }
    return valid;
  }

  __device__ static bool has_zero(uint32_t nibbles) {
    return (nibbles - 0x11111111u) & ~nibbles & 0x88888888u;
  }

  // Puts the listed exponents into the elements of code 0. False when one is not on the list.
  __device__ bool replace(Elements& e, const Plane& plane, int pass, uint2 nibbles) {
    bool valid = true;
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      if ((j < 8 ? nibbles.x : nibbles.y) >> j % 8 * 4 & 15) continue;
      atomicAdd(found, 1);
      const int index = find(plane.index, plane.position(lanes, pass) + j);
      if (index < 0) {
        valid = false;
        continue;
      }
      const int shift = j % 2 * 16;
      const uint32_t exponent = tables.at<uint8_t>(p.sections[kExponents])[index];
      e.pair[j / 2] = (e.pair[j / 2] & ~(0x7f80u << shift)) | exponent << 7 << shift;
    }
    return valid;
  }

  // Index of an escape in the list, or -1.
  __device__ int find(int plane, uint32_t position) const {
    const uint16_t* ends = tables.at<uint16_t>(p.sections[kEnds]);
    const uint16_t* positions = tables.at<uint16_t>(p.sections[kPositions]);
    int low = plane == 0 ? 0 : ends[plane - 1];
    int high = ends[plane];
    const int end = high;
    if (end > capacity) return -1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (positions[middle] < position) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < end && positions[low] == position ? low : -1;
  }

  // Whether the list has no other escapes than those found. By one thread, after all planes.
  __device__ bool complete(uint32_t escapes) const { return *found == escapes; }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_CODEC_LX4_CUH_
