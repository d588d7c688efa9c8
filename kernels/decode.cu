// Reads blocks out of slots, one kernel per codec and element type.
//
// Grid: any number of CTAs of 512 threads. A CTA owns a slot at a time, and strides over them: it
// loads header and tables into shared memory, and every warp a plane at a time (policy/plane.cuh),
// 16 or 8 bytes per lane with four passes in flight, straight from where the slot is, device or
// mapped pinned host memory. The hash is added up on the way.
//
// slots    src/codec/mod.rs                            every byte read once
// blocks   [layer][K|V][head][token][dim] by strides   every element written once
// results  [num_blocks]                                written once each
//
// A slot is verified when it has been read: where its result is not HKV_SLOT_OK, the block holds
// nothing that may be attended. Of a slot of another codec or geometry, no element is written.
#include "abi/params.h"
#include "policy/codec_fp8.cuh"
#include "policy/codec_int.cuh"
#include "policy/codec_lx4.cuh"
#include "policy/codec_raw.cuh"
#include "policy/dynamic_shared.cuh"

namespace {

constexpr int kThreads = HKV_CODEC_THREADS;
constexpr int kWarps = kThreads / hkv::kWarpLanes;
constexpr uint32_t kHashWord = 3;  // of the header

template <typename Codec>
__device__ void decode(const hkv_codec_params& p) {
  uint4* const shared = hkv::dynamic_shared<uint4>();
  __shared__ uint64_t warp_hashes[kWarps];
  const int warp = threadIdx.x / hkv::kWarpLanes;
  const int planes = 2 * p.num_layers * p.num_kv_heads;
  const hkv::Tables tables{reinterpret_cast<char*>(shared)};
  char* const scratch = tables.bytes + p.elements;

  Codec codec(p, tables, scratch);

  // What a CTA wants first of a slot is on its way before the slot's turn comes: a link takes long
  // to answer.
  typename Codec::Packed chunk;
  uint4 first_tables;
  const auto prefetch = [&](const hkv_slot_block& where) {
    const hkv::SlotReader reader{static_cast<const char*>(where.slot)};
    if (threadIdx.x < p.elements / 16) first_tables = reader.load16(16 * threadIdx.x);
    if (warp < planes) codec.load(chunk, hkv::Plane(p, codec.lanes, where.block, warp), 0, reader);
  };
  hkv_slot_block next = {};
  if (blockIdx.x < p.num_blocks) {
    next = p.blocks[blockIdx.x];
    prefetch(next);
  }
  for (int64_t job = blockIdx.x; job < p.num_blocks; job += gridDim.x) {
    const hkv_slot_block where = next;
    if (job + gridDim.x < p.num_blocks) next = p.blocks[job + gridDim.x];
    hkv::SlotReader reader{static_cast<const char*>(where.slot)};
    if (threadIdx.x < p.elements / 16) shared[threadIdx.x] = first_tables;
    for (uint32_t i = kThreads + threadIdx.x; i < p.elements / 16; i += kThreads) {
      shared[i] = reader.load16(16 * i);
    }
    if (threadIdx.x == 0) *reinterpret_cast<int*>(scratch) = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < p.elements / 8; i += kThreads) {
      if (i != kHashWord) reader.hash += hkv::hash_word(i, *tables.at<uint64_t>(8 * i));
    }

    const uint64_t* const header = tables.at<uint64_t>(0);
    const uint32_t escapes = header[2] >> 32;
    bool valid = header[0] == p.header[0] && header[1] == p.header[1] &&
                 static_cast<uint32_t>(header[2]) == p.slot_bytes;
    if (valid) {
      for (int i = warp; i < planes; i += kWarps) {
        const hkv::Plane plane(p, codec.lanes, where.block, i);
        if (i != warp) codec.load(chunk, plane, 0, reader);
        valid &= codec.decode(plane, chunk, reader);
      }
    }
    if (job + gridDim.x < p.num_blocks) prefetch(next);

    uint64_t hash = reader.hash;
#pragma unroll
    for (int step = 1; step < hkv::kWarpLanes; step *= 2) {
      hash += __shfl_xor_sync(~0u, hash, step);
    }
    if (threadIdx.x % hkv::kWarpLanes == 0) warp_hashes[warp] = hash;
    valid = __syncthreads_and(valid);
    if (threadIdx.x == 0) {
      hash = 0;
      for (int i = 0; i < kWarps; ++i) hash += warp_hashes[i];
      valid = valid && hash == header[3] && codec.complete(escapes);
      p.results[job] = {valid ? hash : 0, valid ? escapes : 0,
                        valid ? HKV_SLOT_OK : HKV_SLOT_CORRUPT};
    }
    __syncthreads();  // Shared memory is reused.
  }
}

}  // namespace

#define HKV_DECODE(name, ...)                                         \
  extern "C" __global__ void __launch_bounds__(kThreads, 1)           \
      hkv_decode_##name(const __grid_constant__ hkv_codec_params p) { \
    decode<hkv::__VA_ARGS__>(p);                                      \
  }

HKV_DECODE(raw, Raw)
HKV_DECODE(lx4, Lx4)
HKV_DECODE(fp8_bf16, Fp8<__nv_bfloat16>)
HKV_DECODE(fp8_f16, Fp8<__half>)
HKV_DECODE(int8_bf16, Int<__nv_bfloat16, 8>)
HKV_DECODE(int8_f16, Int<__half, 8>)
HKV_DECODE(int6_bf16, Int<__nv_bfloat16, 6>)
HKV_DECODE(int6_f16, Int<__half, 6>)
HKV_DECODE(int4_bf16, Int<__nv_bfloat16, 4>)
HKV_DECODE(int4_f16, Int<__half, 4>)
