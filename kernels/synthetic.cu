// synthetic: keys, values and queries of new tokens as a function of their history hashes.
//
// Grid: 1-D, grid-stride over vectors of 8 elements in the order [token][q heads, k heads, v
// heads][vector]; one thread writes one 16-byte vector. q is [T, Hq, D], k and v are [T, Hk, D],
// contiguous. The definition is that of src/ops/synthetic.rs, to which the output is equal bit by
// bit.
#include "abi/params.h"

namespace {

constexpr int kVector = 8;
constexpr int kChannels = 192;
constexpr int kQuantiles = 128;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

enum Tensor : int { kK = 0, kV = 1, kQ = 2 };

__device__ uint64_t splitmix64(uint64_t x) {
  uint64_t z = x + kGolden;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    hkv_synthetic(const __grid_constant__ hkv_synthetic_params p) {
  const int vectors_per_head = p.head_dim / kVector;
  const int rows_per_token = p.num_qo_heads + 2 * p.num_kv_heads;
  const int64_t vectors_per_token = static_cast<int64_t>(rows_per_token) * vectors_per_head;
  const int64_t total = vectors_per_token * p.num_tokens;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    const int64_t token = i / vectors_per_token;
    const int in_token = static_cast<int>(i - token * vectors_per_token);
    const int row = in_token / vectors_per_head;
    const int vector = in_token - row * vectors_per_head;

    Tensor tensor = kQ;
    int head = row, num_heads = p.num_qo_heads;
    void* out = p.q;
    if (row >= p.num_qo_heads) {
      const bool is_k = row < p.num_qo_heads + p.num_kv_heads;
      tensor = is_k ? kK : kV;
      out = is_k ? p.k_new : p.v_new;
      num_heads = p.num_kv_heads;
      head = row - p.num_qo_heads - (is_k ? 0 : p.num_kv_heads);
    }

    const int first_vector = head * vectors_per_head + vector;
    const uint64_t counter = (static_cast<uint64_t>(tensor) + 1) << 56 |
                             static_cast<uint64_t>(p.layer) << 32 |
                             static_cast<uint64_t>(first_vector);
    const uint64_t bits = splitmix64(p.hashes[token] + kGolden * counter);
    const int channel = tensor * kChannels + first_vector * kVector % kChannels;
    const uint16_t* rows = p.distribution + channel * kQuantiles;

    uint32_t packed[kVector / 2];
#pragma unroll
    for (int e = 0; e < kVector; e += 2) {
      const uint32_t low = rows[e * kQuantiles + (bits >> (8 * e)) % kQuantiles];
      const uint32_t high = rows[(e + 1) * kQuantiles + (bits >> (8 * e + 8)) % kQuantiles];
      packed[e / 2] = low | high << 16;
    }
    const int64_t at = (token * num_heads + head) * vectors_per_head + vector;
    static_cast<uint4*>(out)[at] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}
