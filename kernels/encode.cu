// Writes blocks into slots, one kernel per codec and element type.
//
// Grid: any number of CTAs of 512 threads. A CTA owns a slot at a time, and strides over them; a
// warp owns a plane of its block at a time (policy/plane.cuh). Slots are written straight to where
// they are to stay, device or mapped pinned host memory: elements by the warps, 16 or 8 bytes per
// lane, then header and tables, which the CTA keeps in shared memory meanwhile.
//
// blocks   [layer][K|V][head][token][dim] by strides   read once or twice
// slots    src/codec/mod.rs                            every byte written once
// results  [num_blocks]                                written once each
//
// What is written does not depend on the grid, and is what src/codec writes, to the bit.
#include "abi/params.h"
#include "policy/codec_fp8.cuh"
#include "policy/codec_int.cuh"
#include "policy/codec_lx4.cuh"
#include "policy/codec_raw.cuh"
#include "policy/dynamic_shared.cuh"

namespace {

constexpr int kThreads = HKV_CODEC_THREADS;
constexpr int kWarps = kThreads / hkv::kWarpLanes;
constexpr uint32_t kHeaderBytes = 32;

// The sum of a number over all threads, for thread 0.
__device__ uint64_t cta_sum(uint64_t value, uint64_t (&warps)[kWarps]) {
#pragma unroll
  for (int step = 1; step < hkv::kWarpLanes; step *= 2) {
    value += __shfl_xor_sync(~0u, value, step);
  }
  if (threadIdx.x % hkv::kWarpLanes == 0) warps[threadIdx.x / hkv::kWarpLanes] = value;
  __syncthreads();
  uint64_t sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += warps[warp];
  return sum;
}

template <typename Codec>
__device__ void encode(const hkv_codec_params& p) {
  uint4* const shared = hkv::dynamic_shared<uint4>();
  __shared__ uint64_t warp_hashes[kWarps];
  const int warp = threadIdx.x / hkv::kWarpLanes;
  const int planes = 2 * p.num_layers * p.num_kv_heads;
  const hkv::Tables tables{reinterpret_cast<char*>(shared)};
  char* const scratch = tables.bytes + p.elements;

  for (int64_t job = blockIdx.x; job < p.num_blocks; job += gridDim.x) {
    const hkv_slot_block where = p.blocks[job];
    // Header, tables, and the counter behind them.
    for (uint32_t i = threadIdx.x; i <= p.elements / 16; i += kThreads) {
      shared[i] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();

    Codec codec(p, tables, scratch);
    hkv::SlotWriter writer{static_cast<char*>(where.slot)};
    if (Codec::kSurveys) {
      for (int i = warp; i < planes; i += kWarps) {
        codec.survey(hkv::Plane(p, codec.lanes, where.block, i));
      }
      __syncthreads();
      codec.end_survey();
      __syncthreads();
    }
    bool finite = true;
    for (int i = warp; i < planes; i += kWarps) {
      finite &= codec.encode(hkv::Plane(p, codec.lanes, where.block, i), writer);
    }
    finite = __syncthreads_and(finite);
    const bool fits = codec.finish();
    __syncthreads();

    for (uint32_t i = kHeaderBytes / 8 + threadIdx.x; i < p.elements / 8; i += kThreads) {
      writer.hash += hkv::hash_word(i, *tables.at<uint64_t>(8 * i));
    }
    uint64_t hash = cta_sum(writer.hash, warp_hashes);
    if (threadIdx.x == 0) {
      const bool held = finite && fits;
      const uint32_t escapes = *reinterpret_cast<const uint32_t*>(scratch);
      const uint64_t sizes = hkv::low_high(p.slot_bytes, escapes);
      hash += hkv::hash_word(0, p.header[0]) + hkv::hash_word(1, p.header[1]);
      hash += hkv::hash_word(2, sizes);
      const uint64_t header[4] = {p.header[0], p.header[1], sizes, hash};
      for (int i = 0; i < 4; ++i) *tables.at<uint64_t>(8 * i) = held ? header[i] : 0;
      const int status = !finite ? HKV_SLOT_NOT_FINITE : fits ? HKV_SLOT_OK : HKV_SLOT_ESCAPES;
      p.results[job] = {held ? hash : 0, escapes, status};
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < p.elements / 16; i += kThreads) {
      __stcs(static_cast<uint4*>(where.slot) + i, shared[i]);
    }
    __syncthreads();  // Shared memory is reused.
  }
}

}  // namespace

#define HKV_ENCODE(name, ...)                                         \
  extern "C" __global__ void __launch_bounds__(kThreads, 1)           \
      hkv_encode_##name(const __grid_constant__ hkv_codec_params p) { \
    encode<hkv::__VA_ARGS__>(p);                                      \
  }

HKV_ENCODE(raw, Raw)
HKV_ENCODE(lx4, Lx4)
HKV_ENCODE(fp8_bf16, Fp8<__nv_bfloat16>)
HKV_ENCODE(fp8_f16, Fp8<__half>)
HKV_ENCODE(int8_bf16, Int<__nv_bfloat16, 8>)
HKV_ENCODE(int8_f16, Int<__half, 8>)
HKV_ENCODE(int6_bf16, Int<__nv_bfloat16, 6>)
HKV_ENCODE(int6_f16, Int<__half, 6>)
HKV_ENCODE(int4_bf16, Int<__nv_bfloat16, 4>)
HKV_ENCODE(int4_f16, Int<__half, 4>)
