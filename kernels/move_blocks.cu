// Grid: tiles of up to 512 descriptors, each shared by `tile_ctas` CTAs of 512 threads; CTAs stride
// over the tiles. The 16-byte vectors of a tile are numbered in turn, descriptor by descriptor and
// row by row; a warp owns one piece at a time, 256 of them, whatever fragments they belong to:
// every lane has eight loads in flight, then stores them. The pieces of a tile are dealt to the
// warps of its CTAs in turn. So one large fragment is copied by all of them, and of small ones a
// warp has as many under way as fill its lanes.
//
// copies  [num_copies] descriptors, of fragments or of blocks   read once by each CTA of the tile
// rows    contiguous, device or mapped pinned host memory; each vector copied by exactly one lane
//
// A few CTAs fill a PCIe link: what counts there is bytes in flight, 56 KiB per CTA. 448 threads
// leave the registers for that, and half of those of a multiprocessor to whatever runs beside.
#include "abi/params.h"
#include "policy/divisor.cuh"

namespace {

constexpr int kThreads = 448;
constexpr int kWarpLanes = 32;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr int kLoads = 8;
constexpr int kPieceVectors = kLoads * kWarpLanes;
constexpr int kSearched = 512;  // the power of two above kThreads

using Vector = uint4;

// The descriptors of a tile, and how many vectors come before each when those of all are numbered
// in turn.
struct Tile {
  const char* src[kThreads];
  char* dst[kThreads];
  int64_t first_vector[kSearched + 1];  // behind the last descriptor: of all
  int64_t warp_vectors[kWarps];
  Divisor row_vectors[kThreads];  // of blocks
  Divisor counts[HKV_MOVE_DIMS];  // of blocks
};

// Inclusive sum over the lanes of a warp.
__device__ inline int64_t warp_prefix_sum(int64_t value, int lane) {
  for (int step = 1; step < kWarpLanes; step *= 2) {
    const int64_t below = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// Reads the descriptors, one per thread, and numbers their vectors. Returns how many pieces those
// are.
template <bool kBlocks>
__device__ inline int32_t load_tile(Tile& tile, const hkv_copy* copies, int32_t count,
                                    int64_t block_rows) {
  const int thread = threadIdx.x;
  const int lane = thread % kWarpLanes;
  const int warp = thread / kWarpLanes;
  int64_t vectors = 0;
  if (thread < count) {
    const hkv_copy copy = copies[thread];
    vectors = static_cast<int64_t>(copy.bytes / sizeof(Vector));
    tile.src[thread] = static_cast<const char*>(copy.src);
    tile.dst[thread] = static_cast<char*>(copy.dst);
    if (kBlocks && vectors > 0) {
      tile.row_vectors[thread] = Divisor::of(static_cast<uint32_t>(vectors));
      vectors *= block_rows;
    }
  }
  const int64_t end_in_warp = warp_prefix_sum(vectors, lane);
  if (lane == kWarpLanes - 1) tile.warp_vectors[warp] = end_in_warp;
  __syncthreads();
  int64_t before_warp = 0;
  for (int w = 0; w < warp; ++w) before_warp += tile.warp_vectors[w];
  tile.first_vector[thread + 1] = before_warp + end_in_warp;
  if (thread == 0) tile.first_vector[0] = 0;
  __syncthreads();
  if (thread < kSearched - kThreads) {
    tile.first_vector[kThreads + 1 + thread] = tile.first_vector[kThreads];
  }
  __syncthreads();
  return static_cast<int32_t>((tile.first_vector[kThreads] + kPieceVectors - 1) / kPieceVectors);
}

// The descriptor that a vector belongs to: the last one that begins at it or before and is not
// empty.
__device__ inline int find_descriptor(const Tile& tile, int64_t vector) {
  int first = 0;
  for (int half = kSearched / 2; half > 0; half /= 2) {
    if (tile.first_vector[first + half] <= vector) first += half;
  }
  return first;
}

// Where a vector lies, relative to the addresses of its descriptor, in bytes.
struct Offsets {
  int64_t src;
  int64_t dst;
};

template <bool kBlocks>
__device__ inline Offsets offsets_of(const Tile& tile, const hkv_move_params& p, int descriptor,
                                     int64_t vector) {
  if (!kBlocks) {
    const int64_t offset = vector * static_cast<int64_t>(sizeof(Vector));
    return Offsets{offset, offset};
  }
  const Divisor row_vectors = tile.row_vectors[descriptor];
  uint32_t row = row_vectors.quotient(static_cast<uint32_t>(vector));
  const uint32_t in_row = static_cast<uint32_t>(vector) - row * row_vectors.value;
  Offsets offsets{in_row * static_cast<int64_t>(sizeof(Vector)),
                  in_row * static_cast<int64_t>(sizeof(Vector))};
#pragma unroll
  for (int d = HKV_MOVE_DIMS - 1; d > 0; --d) {
    if (d < p.num_dims) {
      const uint32_t above = tile.counts[d].quotient(row);
      const int64_t index = row - above * tile.counts[d].value;
      offsets.src += index * p.src_strides[d];
      offsets.dst += index * p.dst_strides[d];
      row = above;
    }
  }
  const int64_t index = row;
  offsets.src += p.src_offsets ? p.src_offsets[index] : index * p.src_strides[0];
  offsets.dst += p.dst_offsets ? p.dst_offsets[index] : index * p.dst_strides[0];
  return offsets;
}

template <bool kBlocks>
__device__ inline void copy_piece(const Tile& tile, const hkv_move_params& p, int32_t piece,
                                  int lane) {
  const int64_t first = static_cast<int64_t>(piece) * kPieceVectors;
  const int64_t tile_left = tile.first_vector[kThreads] - first;
  const int32_t left =
      static_cast<int32_t>(tile_left < kPieceVectors ? tile_left : kPieceVectors) - lane;
  int descriptor = find_descriptor(tile, first);
  Vector values[kLoads];
  char* targets[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    if (i * kWarpLanes < left) {
      const int64_t vector = first + (i * kWarpLanes + lane);
      while (tile.first_vector[descriptor + 1] <= vector) ++descriptor;
      const Offsets offsets =
          offsets_of<kBlocks>(tile, p, descriptor, vector - tile.first_vector[descriptor]);
      values[i] = __ldcs(reinterpret_cast<const Vector*>(tile.src[descriptor] + offsets.src));
      targets[i] = tile.dst[descriptor] + offsets.dst;
    }
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    if (i * kWarpLanes < left) __stcs(reinterpret_cast<Vector*>(targets[i]), values[i]);
  }
}

template <bool kBlocks>
__device__ inline void move(Tile& tile, const hkv_move_params& p) {
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  int64_t block_rows = 1;
  if (kBlocks) {
    for (int d = 0; d < p.num_dims; ++d) block_rows *= p.counts[d];
    if (threadIdx.x < p.num_dims) tile.counts[threadIdx.x] = Divisor::of(p.counts[threadIdx.x]);
  }
  const int32_t member = blockIdx.x % p.tile_ctas;
  const int32_t tile_step = gridDim.x / p.tile_ctas;
  for (int32_t t = blockIdx.x / p.tile_ctas; t < p.num_tiles; t += tile_step) {
    const int64_t first_copy = static_cast<int64_t>(t) * p.tile_copies;
    const int64_t left = p.num_copies - first_copy;
    const int32_t count = static_cast<int32_t>(left < p.tile_copies ? left : p.tile_copies);
    const int32_t pieces = load_tile<kBlocks>(tile, p.copies + first_copy, count, block_rows);
    for (int32_t piece = member * kWarps + warp; piece < pieces; piece += p.tile_ctas * kWarps) {
      copy_piece<kBlocks>(tile, p, piece, lane);
    }
    __syncthreads();  // The tile is reused.
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    hkv_move_fragments(const __grid_constant__ hkv_move_params p) {
  __shared__ Tile tile;
  move<false>(tile, p);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    hkv_move_blocks(const __grid_constant__ hkv_move_params p) {
  __shared__ Tile tile;
  move<true>(tile, p);
}
