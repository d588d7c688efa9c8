// The ring through which one warp streams its slices of K and V from global to shared memory.
//
// It holds halves of a slice, K and V in turn, [tokens][D] swizzled, in the order in which the warp
// uses them; all halves but one are in flight while one is used.
#ifndef HYBRIDKV_POLICY_SLICE_RING_CUH_
#define HYBRIDKV_POLICY_SLICE_RING_CUH_

#include "../ptx/cp_async.cuh"
#include "../ptx/grid_dependency.cuh"
#include "block_table.cuh"
#include "kv_element.cuh"
#include "kv_scales.cuh"
#include "swizzle.cuh"
#include "visibility.cuh"

namespace hkv {

// The ring of one warp: copies the halves of the slices first, first + kWarps, ... below `end` in
// order, and with the keys the scales of both, where tokens have their own. Until the predecessor
// of the kernel has ended, keys from `settled_end` on are not read.
template <typename Kv, int kDim, int kSliceTokens, int kWarps, int kInFlightBytes>
class SliceRing {
  using Layout = Swizzle<kDim * sizeof(Kv)>;
  using Tiles = KeyTiles<kSliceTokens>;
  static constexpr int kHalfBytes = kSliceTokens * Layout::kRowBytes;
  static constexpr int kInFlight = kInFlightBytes / kHalfBytes;
  static constexpr int kRing = kInFlight + 1;
  static constexpr int kRowsPerCopy = 32 / Layout::kChunks;
  static constexpr int kGroups = kSliceTokens / kGroupTokens;
  static constexpr bool kScaled = KvElement<Kv>::kScaled;
  static constexpr int kScaleSlots = kRing / 2 + 1;  // slices in use or in flight
  static constexpr unsigned kFullWarp = 0xffffffffu;

 public:
  static constexpr int kBytes = kRing * kHalfBytes;
  // Scales of a slice's tokens.
  struct Scales {
    float keys[kSliceTokens];
    float values[kSliceTokens];
  };
  using ScaleRing = Scales[kScaled ? kScaleSlots : 1];

  __device__ SliceRing(uint32_t ring_shared, ScaleRing& scale_ring, const BlockTable<Kv>& table,
                       const KvScales& scales, const Tiles& tiles, int32_t first, int32_t end,
                       int32_t settled_end)
      : table_(table),
        scales_(scales),
        scale_ring_(scale_ring),
        tiles_(tiles),
        ring_(ring_shared),
        next_slice_(first),
        end_(end) {
    lane_ = threadIdx.x % 32;
    const int row = lane_ / Layout::kChunks;
    const int chunk = lane_ % Layout::kChunks;
    lane_offset_ = row * table.stride_token() + chunk * static_cast<int>(16 / sizeof(Kv));
    prefetched_id_ = fetch_id();
#pragma unroll
    for (int half = 0; half < kInFlight; half += 2) {
      if (next_slice_ < end_ && tiles_[next_slice_].base + kSliceTokens > settled_end) {
        grid_dependency_wait();
      }
      issue<false>();
      if (half + 1 < kInFlight) issue<true>();
    }
  }

  // The shared addresses of the next slice's keys and values, in turn: waits for the half and
  // starts the copy of the one that takes the place of the last.
  __device__ uint32_t next_keys() { return next<kInFlight % 2 == 1>(); }
  __device__ uint32_t next_values() { return next<kInFlight % 2 == 0>(); }

  // The scales of the slice whose keys next_keys() gave last, once per slice.
  __device__ const Scales& next_scales() {
    const Scales& scales = scale_ring_[scale_read_];
    scale_read_ = scale_read_ + 1 == kScaleSlots ? 0 : scale_read_ + 1;
    return scales;
  }

 private:
  template <bool kValuesFollow>
  __device__ uint32_t next() {
    cp_async_wait<kInFlight - 1>();
    __syncwarp();  // all lanes' copies have landed, and all lanes are done with the last half
    issue<kValuesFollow>();
    const uint32_t half = ring_ + read_ * kHalfBytes;
    read_ = read_ + 1 == kRing ? 0 : read_ + 1;
    return half;
  }

  // Block of the token group lane % kGroups of the next slice; read one slice ahead of its use.
  __device__ int32_t fetch_id() const {
    if (next_slice_ >= end_) return 0;
    const KeyTile tile = tiles_[next_slice_];
    const int32_t token = tile.base + lane_ % kGroups * kGroupTokens;
    return tile.holds_any(token, kGroupTokens) ? table_.block_id(token) : 0;
  }

  // Starts the copy of the next half, which holds values or keys: they take turns.
  template <bool kValues>
  __device__ void issue() {
    if (kValues) {
      if (tile_.end > 0) copy(table_.values());
    } else {
      tile_ = next_slice_ < end_ ? tiles_[next_slice_] : KeyTile{};
      block_id_ = prefetched_id_;
      next_slice_ += kWarps;
      prefetched_id_ = fetch_id();
      if (tile_.end > 0) {
        copy(table_.keys());
        if (kScaled && scales_.per_token()) copy_scales();
      }
    }
    write_ = write_ + 1 == kRing ? 0 : write_ + 1;
    cp_async_commit();  // an empty group keeps the count
  }

  __device__ void copy(const Kv* pool) const {
    const int row = lane_ / Layout::kChunks;
    const int chunk = lane_ % Layout::kChunks;
    const uint32_t half = ring_ + write_ * kHalfBytes;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int32_t token = tile_.base + group * kGroupTokens;
      const int32_t id = __shfl_sync(kFullWarp, block_id_, group);
      const Kv* src = pool + table_.offset(id, token) + lane_offset_;
#pragma unroll
      for (int r = 0; r < kGroupTokens; r += kRowsPerCopy) {
        cp_async_16(half + Layout::offset(group * kGroupTokens + r + row, chunk), src,
                    tile_.holds(token + r + row), policy_);
        src += kRowsPerCopy * table_.stride_token();
      }
    }
  }

  // A lane copies the scales of its token.
  __device__ void copy_scales() {
    const int slot_token = lane_ % kSliceTokens;
    const int32_t token = tile_.base + slot_token;
    const int32_t id = __shfl_sync(kFullWarp, block_id_, slot_token / kGroupTokens);
    const bool valid = tile_.holds(token);
    Scales& slot = scale_ring_[scale_write_];
    cp_async_4(static_cast<uint32_t>(__cvta_generic_to_shared(&slot.keys[slot_token])),
               scales_.key(id, token), valid);
    cp_async_4(static_cast<uint32_t>(__cvta_generic_to_shared(&slot.values[slot_token])),
               scales_.value(id, token), valid);
    scale_write_ = scale_write_ + 1 == kScaleSlots ? 0 : scale_write_ + 1;
  }

  const BlockTable<Kv>& table_;
  const KvScales& scales_;
  ScaleRing& scale_ring_;
  const Tiles& tiles_;
  const uint32_t ring_;
  int64_t lane_offset_;
  KeyTile tile_;  // slice whose halves are being issued; end == 0: past the last
  int32_t next_slice_;
  const int32_t end_;
  int32_t block_id_;
  int32_t prefetched_id_;
  int32_t lane_;
  const uint64_t policy_ = evict_first_policy();  // nothing else wants these bytes soon
  int32_t read_ = 0;
  int32_t write_ = 0;
  int32_t scale_read_ = 0;
  int32_t scale_write_ = 0;
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_SLICE_RING_CUH_
