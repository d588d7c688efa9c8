// The work lists of a decode batch: which sequences are cut into how many parts.
//
// Grid: one CTA per window class, of 1024 threads at most. A thread counts the visible tokens of up
// to kSeqsPerThread neighbouring sequences. Their sum gives the share, the share the number of
// parts of each, and prefix sums the places of the parts in the list; all entries are then written
// side by side.
//
// parts     [num_parts]                   written: parts of cut sequences, whole ones, empty ones
// arrivals  [cut parts, Hk]               zeroed
#include "abi/params.h"
#include "policy/visibility.cuh"
#include "ptx/grid_dependency.cuh"

namespace hkv {
namespace {

constexpr int kMaxThreads = HKV_PLAN_THREADS;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kSeqsPerThread = HKV_PLAN_MAX_SEQS / kMaxThreads;
constexpr unsigned kFullWarp = 0xffffffffu;
static_assert(kMaxWarps <= 32, "a warp holds a value of every warp");

// How many entries of the list go to parts of cut sequences and to whole ones, in one word: sums of
// both are one sum.
class Entries {
 public:
  __device__ explicit Entries(uint32_t word) : word_(word) {}
  // Those of a sequence of `parts` parts.
  __device__ static uint32_t of(int32_t parts) {
    return parts > 1 ? static_cast<uint32_t>(parts) << kWholeBits : 1u;
  }
  __device__ int32_t cut() const { return word_ >> kWholeBits; }
  __device__ int32_t whole() const { return word_ & ((1u << kWholeBits) - 1); }

 private:
  static constexpr int kWholeBits = 13;
  static_assert(HKV_PLAN_MAX_SEQS < 1 << kWholeBits);
  static_assert(HKV_PLAN_MAX_SEQS * HKV_PLAN_MAX_PARTS < 1 << (32 - kWholeBits));

  uint32_t word_;
};

// The sum over the warp, below 2^48.
__device__ __forceinline__ uint64_t sum_of_warp(uint64_t x) {
  const uint64_t high = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(x >> 16));
  return (high << 16) + __reduce_add_sync(kFullWarp, static_cast<uint32_t>(x & 0xffff));
}

// The value of the warp whose number is this lane's, 0 where there is none.
template <typename T>
__device__ __forceinline__ T of_warp(const T (&values)[kMaxWarps]) {
  const int lane = threadIdx.x % 32;
  return lane < blockDim.x / 32 ? values[lane] : 0;
}

// The sum over the CTA. Whole CTA.
__device__ __forceinline__ uint64_t sum_of_cta(uint64_t x) {
  __shared__ uint64_t warp_sum[kMaxWarps];
  x = sum_of_warp(x);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = x;
  __syncthreads();
  return sum_of_warp(of_warp(warp_sum));
}

// The sum over the threads before this one, and that over the CTA. Whole CTA.
__device__ __forceinline__ uint32_t sum_before(uint32_t x, uint32_t* all) {
  __shared__ uint32_t warp_sum[kMaxWarps];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  uint32_t scan = x;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, scan, delta);
    if (lane >= delta) scan += other;
  }
  if (lane == 31) warp_sum[warp] = scan;
  __syncthreads();
  const uint32_t other = of_warp(warp_sum);
  *all = __reduce_add_sync(kFullWarp, other);
  return __reduce_add_sync(kFullWarp, lane < warp ? other : 0u) + scan - x;
}

class Planner {
 public:
  __device__ static void run(const hkv_plan_params& p) {
    __shared__ int32_t cut_before[HKV_PLAN_MAX_SEQS + 1];  // parts of cut sequences before each
    grid_dependency_wait();
    grid_dependency_launch();
    const hkv_plan_class& list = p.classes[blockIdx.x];
    const int32_t threads = blockDim.x;
    const int32_t per_thread = (p.num_seqs + threads - 1) / threads;
    const int32_t first = threadIdx.x * per_thread;
    const int32_t count = min(max(p.num_seqs - first, 0), per_thread);

    int32_t tokens[kSeqsPerThread];
    count_tokens(p, list, first, count, tokens);
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kSeqsPerThread; ++i) sum += tokens[i];
    const uint32_t share = share_of(list, sum_of_cta(sum));

    int32_t parts[kSeqsPerThread];
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kSeqsPerThread; ++i) {
      parts[i] = parts_of(list, tokens[i], share);
      if (i < count) own += Entries::of(parts[i]);
    }
    uint32_t all_entries;
    uint32_t before = sum_before(own, &all_entries);
    const Entries all(all_entries);
#pragma unroll
    for (int i = 0; i < kSeqsPerThread; ++i) {
      if (i >= count) break;
      const Entries here(before);
      cut_before[first + i] = here.cut();
      if (parts[i] == 1) write(list, all.cut() + here.whole(), first + i, 0, 1);
      before += Entries::of(parts[i]);
    }
    if (threadIdx.x == 0) cut_before[p.num_seqs] = all.cut();
    __syncthreads();

    for (int32_t entry = threadIdx.x; entry < all.cut(); entry += threads) {
      const int32_t seq = owner(cut_before, p.num_seqs, entry);
      const int32_t begin = cut_before[seq];
      write(list, entry, seq, entry - begin, cut_before[seq + 1] - begin);
    }
    const int32_t used = all.cut() + all.whole();
    for (int32_t entry = used + threadIdx.x; entry < list.num_parts; entry += threads) {
      write(list, entry, 0, 0, 0);
    }
    const int64_t arrivals = int64_t{all.cut()} * list.num_kv_heads;
    for (int64_t i = threadIdx.x; i < arrivals; i += threads) list.arrivals[i] = 0;
  }

 private:
  // Tokens that the queries of each sequence see together. All loads are under way before one is
  // waited for.
  __device__ static void count_tokens(const hkv_plan_params& p, const hkv_plan_class& list,
                                      int32_t first, int32_t count,
                                      int32_t (&tokens)[kSeqsPerThread]) {
    const hkv_window window = p.windows[list.layer];
    int32_t q_begin[kSeqsPerThread];
    int32_t q_end[kSeqsPerThread];
    int32_t kv_len[kSeqsPerThread];
#pragma unroll
    for (int i = 0; i < kSeqsPerThread; ++i) {
      const bool valid = i < count;
      q_begin[i] = valid ? p.qo_indptr[first + i] : 0;
      q_end[i] = valid ? p.qo_indptr[first + i + 1] : 0;
      kv_len[i] = valid ? p.kv_len[first + i] : 0;
    }
    const Visibility visibility(window);
#pragma unroll
    for (int i = 0; i < kSeqsPerThread; ++i) {
      const int32_t q_len = q_end[i] - q_begin[i];
      tokens[i] = 0;
      if (q_len > 0) {
        tokens[i] = KeyTiles<1>(visibility, kv_len[i] - q_len, kv_len[i] - 1).count();
      }
    }
  }

  // Tokens of a part, in a batch of so many.
  __device__ static uint32_t share_of(const hkv_plan_class& list, uint64_t tokens) {
    const uint64_t share = tokens / list.spare_parts;
    return static_cast<uint32_t>(max(min(share, uint64_t{INT32_MAX}), uint64_t(list.min_tokens)));
  }

  __device__ static int32_t parts_of(const hkv_plan_class& list, uint32_t tokens, uint32_t share) {
    if (list.fixed_tokens > 0) {
      const uint32_t fixed = list.fixed_tokens;
      const uint32_t parts = tokens / fixed + (tokens % fixed != 0);
      return max(min(parts, static_cast<uint32_t>(list.max_parts)), 1u);
    }
    const uint32_t most = sqrtf(tokens / list.merge_tokens);
    return max(min(tokens / share, most), 1u);
  }

  // The cut sequence to which an entry belongs: the last one that begins at or before it.
  __device__ static int32_t owner(const int32_t* cut_before, int32_t num_seqs, int32_t entry) {
    int32_t seq = 0;
    int32_t count = num_seqs;
    while (count > 1) {
      const int32_t half = count / 2;
      const bool later = cut_before[seq + half] <= entry;
      seq += later ? half : 0;
      count = later ? count - half : half;
    }
    return seq;
  }

  __device__ static void write(const hkv_plan_class& list, int32_t entry, int32_t seq,
                               int32_t index, int32_t count) {
    static_assert(sizeof(hkv_part) == sizeof(int2));
    reinterpret_cast<int2*>(list.parts)[entry] = make_int2(seq, count << 16 | index);
  }
};

}  // namespace
}  // namespace hkv

extern "C" __global__ void __launch_bounds__(HKV_PLAN_THREADS)
    hkv_plan(const __grid_constant__ hkv_plan_params p) {
  hkv::Planner::run(p);
}
