// Grid: tiles of up to 512 fragments, each shared by `tile_ctas` CTAs of 512 threads; CTAs stride
// over the tiles. A warp owns one piece of one fragment at a time, 4 KiB or what is left of it:
// every lane has eight 16-byte loads in flight, then stores them. The pieces of a tile are dealt to
// the warps of its CTAs in turn, whatever fragment they belong to, so that one large fragment is
// copied by all of them and no warp idles beside it.
//
// copies     [num_copies] descriptors      read once by each CTA of the tile
// fragments  contiguous, device or mapped pinned host memory; each vector copied by exactly one
// lane
//
// A few CTAs fill a PCIe link: what counts there is bytes in flight, 64 KiB per CTA.
#include "abi/params.h"

namespace {

constexpr int kThreads = 512;
constexpr int kWarpLanes = 32;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr int kLoads = 8;

using Vector = uint4;
constexpr int kPieceVectors = kLoads * kWarpLanes;

// The fragments of a tile, and where their pieces end when the pieces of all are numbered in turn.
// 32 bits number 8 TiB of pieces.
struct Tile {
  const Vector* src[kThreads];
  Vector* dst[kThreads];
  int64_t vectors[kThreads];
  int32_t pieces_end[kThreads];
  int32_t warp_pieces[kWarps];
};

// Inclusive sum over the lanes of a warp.
__device__ inline int32_t warp_prefix_sum(int32_t value, int lane) {
  for (int step = 1; step < kWarpLanes; step *= 2) {
    const int32_t below = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// Reads the descriptors, one per thread, and numbers their pieces. Returns how many there are.
__device__ inline int32_t load_tile(Tile& tile, const hkv_copy* copies, int32_t count) {
  const int thread = threadIdx.x;
  const int lane = thread % kWarpLanes;
  const int warp = thread / kWarpLanes;
  int32_t pieces = 0;
  if (thread < count) {
    const hkv_copy copy = copies[thread];
    const int64_t vectors = static_cast<int64_t>(copy.bytes / sizeof(Vector));
    tile.src[thread] = static_cast<const Vector*>(copy.src);
    tile.dst[thread] = static_cast<Vector*>(copy.dst);
    tile.vectors[thread] = vectors;
    pieces = static_cast<int32_t>((vectors + kPieceVectors - 1) / kPieceVectors);
  }
  const int32_t end_in_warp = warp_prefix_sum(pieces, lane);
  if (lane == kWarpLanes - 1) tile.warp_pieces[warp] = end_in_warp;
  __syncthreads();
  int32_t before_warp = 0;
  for (int w = 0; w < warp; ++w) before_warp += tile.warp_pieces[w];
  tile.pieces_end[thread] = before_warp + end_in_warp;
  __syncthreads();
  return tile.pieces_end[kThreads - 1];
}

// The fragment that piece `piece` belongs to: the first one that ends after it.
__device__ inline int find_fragment(const Tile& tile, int32_t piece) {
  int first = 0;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (tile.pieces_end[first + half - 1] <= piece) first += half;
  }
  return first;
}

__device__ inline void copy_piece(const Tile& tile, int32_t piece, int lane) {
  const int fragment = find_fragment(tile, piece);
  const int32_t begin = fragment == 0 ? 0 : tile.pieces_end[fragment - 1];
  const int64_t first = static_cast<int64_t>(piece - begin) * kPieceVectors;
  const int64_t fragment_left = tile.vectors[fragment] - first;
  const int32_t left =
      static_cast<int32_t>(fragment_left < kPieceVectors ? fragment_left : kPieceVectors) - lane;
  const Vector* src = tile.src[fragment] + first + lane;
  Vector* dst = tile.dst[fragment] + first + lane;
  Vector values[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    if (i * kWarpLanes < left) values[i] = __ldcs(src + i * kWarpLanes);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    if (i * kWarpLanes < left) __stcs(dst + i * kWarpLanes, values[i]);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    hkv_move_blocks(const __grid_constant__ hkv_move_params p) {
  __shared__ Tile tile;
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  const int32_t member = blockIdx.x % p.tile_ctas;
  const int64_t first_tile = blockIdx.x / p.tile_ctas;
  const int64_t tile_step = gridDim.x / p.tile_ctas;
  for (int64_t t = first_tile; t * p.tile_copies < p.num_copies; t += tile_step) {
    const int64_t first_copy = t * p.tile_copies;
    const int64_t left = p.num_copies - first_copy;
    const int32_t count = static_cast<int32_t>(left < p.tile_copies ? left : p.tile_copies);
    const int32_t pieces = load_tile(tile, p.copies + first_copy, count);
    for (int32_t piece = member * kWarps + warp; piece < pieces; piece += p.tile_ctas * kWarps) {
      copy_piece(tile, piece, lane);
    }
    __syncthreads();  // The tile is reused.
  }
}
