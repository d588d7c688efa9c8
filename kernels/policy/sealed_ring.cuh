// The ring through which one warp streams blocks of a sequence that has sealed ones among them.
//
// A slice is as many keys of one block as fit into a half of the ring as codes. Where the block is
// sealed it is one stage, else as many stages of 16 keys as hold keys that are seen. A stage is two
// halves, K and V in turn: rows of codes or elements, swizzled, and behind codes their zeros and
// steps. All halves but one are in flight while one is used.
#ifndef HYBRIDKV_POLICY_SEALED_RING_CUH_
#define HYBRIDKV_POLICY_SEALED_RING_CUH_

#include "../ptx/cp_async.cuh"
#include "../ptx/grid_dependency.cuh"
#include "block_table.cuh"
#include "decode_tuning.cuh"
#include "sealed_codes.cuh"
#include "swizzle.cuh"
#include "visibility.cuh"

namespace hkv {

// Where the codes of one layer and KV head lie.
class SealedBlocks {
 public:
  __device__ SealedBlocks(const hkv_attention_params& p, int32_t kv_head, int head_dim, int bits)
      : slots_(static_cast<const char*>(p.sealed)),
        stride_(p.sealed_stride),
        block_tokens_(1 << p.block_shift),
        row_bytes_(head_dim * bits / 8),
        group_bytes_(head_dim * static_cast<int>(sizeof(uint32_t))) {
    const int32_t groups = (block_tokens_ + kSealedGroupTokens - 1) / kSealedGroupTokens;
    key_groups_ = p.sealed_key_groups + kv_head * groups * group_bytes_;
    value_groups_ = p.sealed_value_groups + kv_head * block_tokens_ * int{sizeof(uint32_t)};
    keys_ = p.sealed_keys + kv_head * block_tokens_ * row_bytes_;
    values_ = p.sealed_values + kv_head * block_tokens_ * row_bytes_;
  }

  __device__ static bool is_sealed(int32_t id) { return (id & HKV_SEALED_BLOCK) != 0; }

  // Of a token of a block: codes, of K or V; zeros and steps of its channels; its zero and step.
  __device__ const char* codes(bool values, int32_t id, int32_t token) const {
    return slot(id) + (values ? values_ : keys_) + offset(token) * row_bytes_;
  }
  __device__ const char* key_groups(int32_t id, int32_t token) const {
    return slot(id) + key_groups_ + offset(token) / kSealedGroupTokens * group_bytes_;
  }
  __device__ const char* value_group(int32_t id, int32_t token) const {
    return slot(id) + value_groups_ + offset(token) * int{sizeof(uint32_t)};
  }

 private:
  __device__ const char* slot(int32_t id) const {
    return slots_ + (id & ~HKV_SEALED_BLOCK) * stride_;
  }
  __device__ int32_t offset(int32_t token) const { return token & (block_tokens_ - 1); }

  const char* slots_;
  int64_t stride_;
  int32_t block_tokens_;
  int32_t row_bytes_;
  int32_t group_bytes_;
  int32_t key_groups_;
  int32_t value_groups_;
  int32_t keys_;
  int32_t values_;
};

// The slices that a warp takes: runs of neighbours that share a group of K, dealt to the warps in
// turn.
class SliceRuns {
 public:
  __device__ SliceRuns(const TileSpan& span, int warp, int run_shift)
      : next_(span.begin + (warp << run_shift)), end_(span.end), mask_((1 << run_shift) - 1) {}

  __device__ bool has_next() const { return next_ < end_; }
  __device__ int32_t next() {
    const int32_t slice = next_;
    ++taken_;
    next_ += (taken_ & mask_) == 0 ? (kDecodeWarps - 1) * (mask_ + 1) + 1 : 1;
    return slice;
  }
  __device__ int32_t peek() const { return next_; }

 private:
  int32_t next_;
  const int32_t end_;
  const int32_t mask_;
  int32_t taken_ = 0;
};

// The stages of 16 keys of a slice that is not sealed: those with keys that may be read.
struct ExactStages {
  int32_t begin;
  int32_t end;
  __device__ ExactStages(const KeyTile& tile, int32_t tokens)
      : begin(max(tile.begin - tile.base, 0) / 16),
        end((min(tile.end - tile.base, tokens) + 15) / 16) {}
};

template <typename T, int kBits, int kDim, int kInFlightBytes>
class SealedRing {
 public:
  using Exact = Swizzle<kDim * sizeof(T)>;
  using Codes = Swizzle<kDim * kBits / 8>;

 private:
  static constexpr int kRowsBytes = 16 * Exact::kRowBytes;

 public:
  // Keys of a slice of blocks that have so many.
  static constexpr int kMostTokens = kRowsBytes / Codes::kRowBytes;
  static_assert(kMostTokens <= kSealedGroupTokens);

 private:
  static constexpr int kTableBytes = (kDim > kMostTokens ? kDim : kMostTokens) * 4;
  static constexpr int kHalfBytes = kRowsBytes + kTableBytes;
  static constexpr int kInFlight = kInFlightBytes / kRowsBytes;
  static_assert(kInFlight % 2 == 0, "stages are in flight whole");
  static constexpr int kRing = kInFlight + 1;

 public:
  static constexpr int kBytes = kRing * kHalfBytes;

  // A half in shared memory: where its rows begin, and its zeros and steps.
  struct Half {
    uint32_t rows;
    __device__ const uint32_t* table() const {
      return static_cast<const uint32_t*>(__cvta_shared_to_generic(rows + kRowsBytes));
    }
  };

  __device__ SealedRing(uint32_t ring_shared, const BlockTable<T>& table,
                        const SealedBlocks& sealed, const KeyTiles<0>& tiles, SliceRuns runs,
                        int32_t settled_end)
      : table_(table), sealed_(sealed), tiles_(tiles), ring_(ring_shared), runs_(runs) {
    lane_ = threadIdx.x % 32;
    fetch();
#pragma unroll 1
    for (int half = 0; half < kInFlight; half += 2) {
      issue_keys(settled_end);
      issue_values();
    }
  }

  // Whether the warp's next slice is sealed, and whether its keys share the group of the slice
  // before.
  struct Kind {
    bool sealed;
    bool same_group;
  };
  __device__ Kind next_kind() {
    const Kind kind{(kinds_ & 1) != 0, (kinds_ & 2) != 0};
    kinds_ >>= 2;
    kinds_count_ -= 2;
    return kind;
  }

  // The next stage's keys and values, in turn: waits for the half and starts the copy of the one
  // that takes the place of the last.
  __device__ Half next_keys() {
    meet();
    issue_keys(INT32_MAX);
    return take();
  }
  __device__ Half next_values() {
    meet();
    issue_values();
    return take();
  }

 private:
  __device__ static void meet() {
    cp_async_wait<kInFlight - 1>();
    __syncwarp();  // all lanes' copies have landed, and all lanes are done with the last half
  }
  __device__ Half take() {
    const Half half{ring_ + read_ * kHalfBytes};
    read_ = read_ + 1 == kRing ? 0 : read_ + 1;
    return half;
  }

  // Reads the id of the next slice's block, one slice ahead of its use.
  __device__ void fetch() {
    fetched_tile_ = KeyTile{};
    if (!runs_.has_next()) return;
    fetched_tile_ = tiles_[runs_.next()];
    fetched_id_ = table_.block_id(max(fetched_tile_.base, fetched_tile_.begin));
  }

  // Moves on to the next stage and starts the copy of its keys. Until the predecessor of the kernel
  // has ended, keys from `settled_end` on are not read.
  __device__ void issue_keys(int32_t settled_end) {
    ++stage_;
    if (stage_ >= last_stage_) {
      const bool was_sealed = tile_.end > 0 && SealedBlocks::is_sealed(id_);
      const int32_t last_id = was_sealed ? id_ : 0;
      const int32_t last_group = tile_.base / kSealedGroupTokens;
      tile_ = fetched_tile_;
      id_ = fetched_id_;
      if (tile_.end > 0) {
        const bool is_sealed = SealedBlocks::is_sealed(id_);
        same_group_ = is_sealed && id_ == last_id && tile_.base / kSealedGroupTokens == last_group;
        kinds_ |= static_cast<uint32_t>(is_sealed | same_group_ << 1) << kinds_count_;
        kinds_count_ += 2;
        const ExactStages exact(tile_, tiles_.tokens());
        stage_ = is_sealed ? 0 : exact.begin;
        last_stage_ = is_sealed ? 1 : exact.end;
        fetch();
      }
    }
    if (tile_.end > 0 && tile_.base + (stage_ + 1) * 16 > settled_end) grid_dependency_wait();
    copy(false);
    if (tile_.end > 0 && SealedBlocks::is_sealed(id_) && !same_group_) {
#pragma unroll
      for (int chunk = 0; chunk < kDim / 4; chunk += 32) {
        if (kDim % 128 != 0 && lane_ >= kDim / 4) break;
        copy_table(sealed_.key_groups(id_, tile_.base), chunk + lane_);
      }
    }
    advance();
  }

  __device__ void issue_values() {
    copy(true);
    if (tile_.end > 0 && SealedBlocks::is_sealed(id_) && lane_ * 4 < tiles_.tokens()) {
      copy_table(sealed_.value_group(id_, tile_.base), lane_);
    }
    advance();
  }

  __device__ void advance() {
    write_ = write_ + 1 == kRing ? 0 : write_ + 1;
    cp_async_commit();  // an empty group keeps the count
  }

  __device__ void copy_table(const char* table, int chunk) const {
    cp_async_16(ring_ + write_ * kHalfBytes + kRowsBytes + chunk * 16, table + chunk * 16, true,
                policy_);
  }

  // Copies the rows of the stage. A sealed block is whole: what is not seen is masked.
  __device__ void copy(bool values) const {
    if (tile_.end <= 0) return;
    const uint32_t half = ring_ + write_ * kHalfBytes;
    if (SealedBlocks::is_sealed(id_)) {
      const char* src = sealed_.codes(values, id_, tile_.base) + lane_ * 16;
      const int32_t rows = tiles_.tokens();
#pragma unroll
      for (int at = 0; at < kMostTokens * Codes::kChunks; at += 32) {
        const int row = (at + lane_) / Codes::kChunks;
        if (row < rows) {
          cp_async_16(half + Codes::offset(row, (at + lane_) % Codes::kChunks), src + at * 16, true,
                      policy_);
        }
      }
      return;
    }
    const T* pool = values ? table_.values() : table_.keys();
    const int32_t token = tile_.base + stage_ * 16;
    constexpr int kRows = 32 / Exact::kChunks > 0 ? 32 / Exact::kChunks : 1;
    const int row = lane_ / Exact::kChunks;
    const int chunk = lane_ % Exact::kChunks;
    const T* src = pool + table_.offset(id_, token) + row * table_.stride_token() +
                   chunk * static_cast<int>(16 / sizeof(T));
#pragma unroll
    for (int r = 0; r < 16; r += kRows) {
      cp_async_16(half + Exact::offset(r + row, chunk), src, tile_.holds(token + r + row), policy_);
      src += kRows * table_.stride_token();
    }
  }

  const BlockTable<T>& table_;
  const SealedBlocks& sealed_;
  const KeyTiles<0>& tiles_;
  const uint32_t ring_;
  SliceRuns runs_;
  int32_t lane_;
  KeyTile tile_ = {};  // slice whose stages are being issued; end == 0: past the last
  int32_t id_ = 0;
  int32_t stage_ = 0;
  int32_t last_stage_ = 0;
  bool same_group_ = false;
  KeyTile fetched_tile_;
  int32_t fetched_id_ = 0;
  uint32_t kinds_ = 0;  // two bits for every slice that is issued and not yet used
  int32_t kinds_count_ = 0;
  const uint64_t policy_ = evict_first_policy();  // nothing else wants these bytes soon
  int32_t read_ = 0;
  int32_t write_ = 0;
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_SEALED_RING_CUH_
