// Shared vocabulary of the kernels and their launchers: element types, layer kinds, the window table
// and the copy descriptor. Plain C, no includes beyond the fixed-width integers. The Rust mirror in
// src/abi.rs is generated from this file and params.h by `cargo xtask abi`.
#ifndef HYBRIDKV_ABI_LAYOUT_H_
#define HYBRIDKV_ABI_LAYOUT_H_

#include <stdint.h>

// Element types of queries, keys, values and outputs.
enum hkv_dtype {
  HKV_DTYPE_BF16 = 0,
  HKV_DTYPE_F16 = 1,
  HKV_DTYPE_F32 = 2,  // partial states only
  HKV_DTYPE_E4M3 = 3,  // keys and values only: 8-bit float (4 exponent, 3 mantissa bits), with scales
};

// Which keys `j <= i` a query at absolute position `i` sees (0-based, besides the sink tokens).
enum hkv_layer_kind {
  HKV_LAYER_FULL = 0,     // every j
  HKV_LAYER_SLIDING = 1,  // i - j < extent
  HKV_LAYER_CHUNKED = 2,  // i / extent == j / extent
};

// One row of the window table, a device array indexed by layer: what makes the kind of a layer data.
typedef struct hkv_window {
  int32_t kind;         // enum hkv_layer_kind
  int32_t extent;       // window or chunk in tokens; unused for full layers
  int32_t sink_tokens;  // every j < sink_tokens is visible too
  int32_t group;        // layer group: the row of the block tables
  int32_t layer_slot;   // index of the layer inside a block of its group
  int32_t reserved[3];  // zero; rows are 32 bytes
} hkv_window;

// One contiguous fragment of a batched move. Addresses and size are multiples of 16 bytes.
typedef struct hkv_copy {
  const void* src;
  void* dst;
  uint64_t bytes;
} hkv_copy;

// A block of the pool and the slot that it is encoded into or decoded from, device or pinned host memory, at a
// multiple of 16 bytes.
typedef struct hkv_slot_block {
  int64_t block;
  void* slot;
} hkv_slot_block;

// What became of a slot.
enum hkv_slot_status {
  HKV_SLOT_OK = 0,
  HKV_SLOT_ESCAPES = 1,     // encode: more escapes than the slot lists; it holds nothing
  HKV_SLOT_NOT_FINITE = 2,  // encode: NaN or infinite elements; it holds nothing
  HKV_SLOT_CORRUPT = 3,     // decode: damaged, foreign or of another geometry; the block is garbage
};

typedef struct hkv_slot_result {
  uint64_t hash;     // content hash, 0 when the slot holds nothing
  uint32_t escapes;  // of lx4, those found
  int32_t status;    // enum hkv_slot_status
} hkv_slot_result;

#endif  // HYBRIDKV_ABI_LAYOUT_H_
