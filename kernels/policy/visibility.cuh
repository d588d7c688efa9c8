// Which keys a query sees, and which tiles of keys a group of queries has to visit.
//
// A query at absolute position i sees the keys j <= i that the layer's kind allows, and the first
// sink_tokens keys. Positions below zero (more new tokens than tokens in all) see nothing.
#ifndef HYBRIDKV_POLICY_VISIBILITY_CUH_
#define HYBRIDKV_POLICY_VISIBILITY_CUH_

#include "../abi/layout.h"

namespace hkv {

struct Visibility {
  int32_t kind;
  int32_t extent;
  int32_t sink_tokens;  // 0 where every key is seen anyway

  Visibility() = default;
  __device__ explicit Visibility(const hkv_window& window)
      : kind(window.kind),
        extent(max(window.extent, 1)),
        sink_tokens(window.kind == HKV_LAYER_FULL ? 0 : window.sink_tokens) {}

  // The first key, sinks aside, that a query at i >= 0 sees. Never decreases with i.
  __device__ int32_t first_key(int32_t i) const {
    if (kind == HKV_LAYER_SLIDING) return max(i - extent + 1, 0);
    if (kind == HKV_LAYER_CHUNKED) return i - i % extent;
    return 0;
  }
};

// `kTokens` keys from `base` on, of which only those in [begin, end) may be read. They are visited
// as sinks or as live keys; a tile with keys of both is visited twice.
struct KeyTile {
  int32_t base;
  int32_t begin;
  int32_t end;
  bool sinks;

  __device__ bool holds(int32_t j) const { return begin <= j && j < end; }
  // Whether any of the keys [j, j + count) may be read.
  __device__ bool holds_any(int32_t j, int32_t count) const { return j < end && j + count > begin; }
};

// The keys [begin, end) of a tile that the query at position i sees, counted from `origin`.
struct SeenKeys {
  int32_t begin;
  int32_t end;

  __device__ SeenKeys(const Visibility& visibility, const KeyTile& tile, int32_t i,
                      int32_t origin) {
    begin = max(tile.begin, tile.sinks ? 0 : visibility.first_key(i)) - origin;
    end = min(tile.end, i + 1) - origin;
  }

  __device__ bool has(int32_t j) const { return (begin <= j) & (j < end); }
};

// The tiles of `kTokens` keys that queries at the positions first .. last visit, numbered 0 ..
// count - 1: those of the sinks, then those of the live keys after them, from the first query's
// first key to the last query. kTokens == 0: as many as the kernel finds out.
template <int kTokens>
class KeyTiles {
 public:
  KeyTiles() = default;
  __device__ KeyTiles(const Visibility& visibility, int32_t first, int32_t last,
                      int32_t tokens = kTokens)
      : tokens_(tokens) {
    live_end_ = max(last + 1, 0);
    sink_end_ = min(visibility.sink_tokens, live_end_);
    live_begin_ = max(visibility.first_key(max(first, 0)), visibility.sink_tokens);
    clear_begin_ = max(visibility.first_key(max(last, 0)), live_begin_);
    clear_end_ = first + 1;
    sink_tiles_ = tiles_to(sink_end_);
    const int32_t live_first = live_begin_ / this->tokens();
    skipped_tiles_ = live_first - sink_tiles_;
    count_ = sink_tiles_ + max(tiles_to(live_end_) - live_first, 0);
  }

  __device__ int32_t count() const { return count_; }
  __device__ int32_t tokens() const { return kTokens > 0 ? kTokens : tokens_; }

  __device__ KeyTile operator[](int32_t n) const {
    if (n < sink_tiles_) return {n * tokens(), 0, sink_end_, true};
    return {(n + skipped_tiles_) * tokens(), live_begin_, live_end_, false};
  }

  // Whether every query sees every key of the tile, so that no mask is needed.
  __device__ bool is_clear(const KeyTile& tile) const { return is_clear(tile, tokens()); }
  // The same of the first `count` keys of a tile.
  __device__ bool is_clear(const KeyTile& tile, int32_t count) const {
    const int32_t begin = tile.sinks ? 0 : clear_begin_;
    return tile.base >= begin && tile.base + count <= min(tile.end, clear_end_);
  }

 private:
  __device__ int32_t tiles_to(int32_t end) const { return end / tokens() + (end % tokens() != 0); }

  int32_t tokens_;      // where kTokens is 0
  int32_t sink_end_;    // keys [0, sink_end_) are visited as sinks
  int32_t live_begin_;  // keys [live_begin_, live_end_) are visited as live keys
  int32_t live_end_;
  int32_t clear_begin_;  // every query sees all live keys of [clear_begin_, clear_end_)
  int32_t clear_end_;
  int32_t sink_tiles_;
  int32_t skipped_tiles_;  // tiles between the sinks and the live keys (-1 when they share one)
  int32_t count_;
};

// Part `split` of `num_splits` of the tiles 0 .. count - 1, in whole multiples of `granule` tiles
// that are shared out as evenly as they can be.
struct TileSpan {
  int32_t begin;
  int32_t end;

  TileSpan() = default;
  __device__ TileSpan(int32_t count, int32_t split, int32_t num_splits, int32_t granule) {
    const int32_t granules = (count + granule - 1) / granule;
    const int32_t share = granules / num_splits;
    const int32_t longer = granules - share * num_splits;  // parts with one granule more
    const int32_t first = split * share + min(split, longer);
    begin = min(first * granule, count);
    end = min((first + share + (split < longer)) * granule, count);
  }
};

}  // namespace hkv

#endif  // HYBRIDKV_POLICY_VISIBILITY_CUH_
