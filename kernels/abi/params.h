// The parameter block of every kernel: one POD struct each, passed by value as the only argument.
//
// Letters: T tokens in the batch, S sequences, G layer groups, L layers, Hq query heads, Hk KV heads,
// D head_dim, B blocks in the pool. A shape in brackets is row-major unless strides are given beside it;
// "device" arrays are read by the kernel, so that a captured graph replays with other values.
// All strides count elements, not bytes.
//
// Block table. Row (g, s) lists the live blocks of sequence s in group g and starts at
// block_ids[block_row[g * S + s]]. With sink_blocks = ceil(sink_tokens / block_size) the row holds first
// the sink blocks 0 .. sink_blocks - 1, then the blocks from first_block on:
//   index(b) = b < sink_blocks ? b : sink_blocks + b - max(first_block, sink_blocks)
// where first_block[g * S + s] is the absolute index of the first live block after the sinks.
//
// KV addressing. Token t of block b, layer slot l, head h lies at
//   k + b * kv_stride_block + l * kv_stride_layer + h * kv_stride_head + t * kv_stride_token
// and the same for v: every layout (BlockFirst, LayerFirst, HND, NHD) is a choice of bases and strides.
//
// Sealed blocks. A block id with HKV_SEALED_BLOCK set names, without it, a slot of `sealed`: a full block
// that a codec (int8 or int4, src/codec/int.rs) has written, whose layers and heads lie at fixed places.
// Blocks of 16 bits and sealed ones stand side by side in a row of the table. Sealed blocks have at
// least 16 tokens.
//
// Scales. Keys and values of 8 bits stand for element * scale. The scale of token t of block b, layer
// slot l, head h lies at
//   k_scale + b * scale_stride_block + l * scale_stride_layer + h * scale_stride_head
//           + t * scale_stride_token
// and the same for v. Zero strides make it one per tensor or per head; with a token stride every token
// of every head has its own, which append computes. All scales are null where KV has 16 bits.
#ifndef HYBRIDKV_ABI_PARAMS_H_
#define HYBRIDKV_ABI_PARAMS_H_

#include "layout.h"

// Writes the K and V of new tokens into their slots. Tokens whose slot is negative are skipped.
typedef struct hkv_append_params {
  const void* k_new;            // [T, Hk, D], strides below
  const void* v_new;            // [T, Hk, D], strides below
  void* k;                      // pool base of K
  void* v;                      // pool base of V
  const int64_t* slot_mapping;  // [G, T] device: block_id * block_size + offset, or -1
  const hkv_window* windows;    // [L] device
  float* k_scale;               // read, or written when scale_stride_token != 0; null for 16-bit KV
  float* v_scale;               // likewise
  int64_t new_stride_token;
  int64_t new_stride_head;
  int64_t kv_stride_block;
  int64_t kv_stride_layer;
  int64_t kv_stride_head;
  int64_t kv_stride_token;
  int64_t scale_stride_block;
  int64_t scale_stride_layer;
  int64_t scale_stride_head;
  int64_t scale_stride_token;
  int32_t layer;
  int32_t num_tokens;  // T
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_shift;  // log2(block_size)
  int32_t new_dtype;    // enum hkv_dtype of k_new and v_new
  int32_t kv_dtype;     // enum hkv_dtype of the pool: new_dtype or E4M3
} hkv_append_params;

// Launch shapes on which kernels and launchers agree; shared memory is dynamic.
#define HKV_SEALED_BLOCK 0x40000000
#define HKV_DECODE_THREADS 128
#define HKV_DECODE_SHARED_BYTES 98304
#define HKV_DECODE_NARROW_SHARED_BYTES 49152  // of the kernels of which four share an SM
#define HKV_SEALED_SHARED_BYTES 110592  // of decode with sealed blocks
#define HKV_PLAN_THREADS 1024  // at most
#define HKV_PLAN_MAX_CLASSES 8
#define HKV_PLAN_MAX_SEQS 4096
#define HKV_PLAN_MAX_PARTS 64  // of a sequence in a plan of fixed parts
#define HKV_PREFILL_THREADS 128
#define HKV_PREFILL_SHARED_BYTES 98304
#define HKV_MERGE_THREADS 128

// One entry of the work list of a decode batch: part `index` of the `count` parts into which the
// visible keys of a sequence are cut. The entries of a sequence follow each other, those of cut
// sequences (count > 1) come before all others, and entries without work have count 0.
typedef struct hkv_part {
  int32_t seq;
  int16_t index;
  int16_t count;
} hkv_part;

// The work list of one window class: layers that see the same keys. A sequence that sees n tokens
// becomes min(n / share, sqrt(n / merge_tokens)) parts with share = max(n of all sequences /
// spare_parts, min_tokens), all rounded down: in all no more than spare_parts * (1 + 1 /
// min_tokens) parts of cut sequences. With fixed_tokens > 0 it becomes min(ceil(n / fixed_tokens),
// max_parts), whatever else is in the batch. It is at least one part.
typedef struct hkv_plan_class {
  hkv_part* parts;       // [num_parts], written
  int32_t* arrivals;     // [parts of cut sequences, Hk], those in use set to 0
  int32_t layer;         // any layer of the class
  int32_t num_parts;     // S and the parts that cutting may add
  int32_t spare_parts;   // 1 to 32767
  int32_t min_tokens;    // of a part, at least 1
  int32_t fixed_tokens;  // 0: sequences are cut by their share of the batch
  int32_t max_parts;     // of one sequence, where fixed_tokens > 0; 1 to HKV_PLAN_MAX_PARTS
  int32_t num_kv_heads;  // Hk
  float merge_tokens;    // what merging a part costs, in the tokens that the same time reads
} hkv_plan_class;

// Makes the work lists of a decode batch. They only say who does what: with other lengths than
// they were made for, results stay right.
typedef struct hkv_plan_params {
  const int32_t* qo_indptr;   // [S + 1] device
  const int32_t* kv_len;      // [S] device
  const hkv_window* windows;  // [L] device
  hkv_plan_class classes[HKV_PLAN_MAX_CLASSES];
  int32_t num_seqs;  // S, at most HKV_PLAN_MAX_SEQS
  int32_t reserved;
} hkv_plan_params;

// Paged attention of q against the KV of the sequences' live blocks, for one layer of any kind.
// Query token t of sequence s has absolute position kv_len[s] - q_len + t, q_len = qo_indptr difference.
typedef struct hkv_attention_params {
  const void* q;               // [T, Hq, D], strides below
  void* out;                   // [T, Hq, D], strides below
  float* lse;                  // [T, Hq] natural log, or null
  const void* k;               // pool base of K
  const void* v;               // pool base of V
  const int32_t* qo_indptr;    // [S + 1] device: query tokens of sequence s are [s] .. [s + 1]
  const int32_t* kv_len;       // [S] device: tokens of each sequence, new ones included
  const int32_t* block_ids;    // device, rows as said above
  const int64_t* block_row;    // [G, S] device
  const int32_t* first_block;  // [G, S] device, or null: every row starts at block 0
  const hkv_window* windows;   // [L] device
  const float* sink_logits;    // [Hq] device, or null
  const float* k_scale;        // scales of K, or null: 16-bit KV
  const float* v_scale;        // scales of V, or null: 16-bit KV
  const uint32_t* tree_mask;   // [T] device, or null: bit u of word t says whether query token t sees
                               // query token u of its sequence (bit t of itself is set), besides what
                               // the layer's kind says; at most 32 query tokens per sequence
  const hkv_part* parts;       // decode: [num_parts] device, or null: every sequence is one part
  int32_t* arrivals;           // decode: [cut parts, Hk] device, 0 before and after; null without
                               // parts
  float* partial_out;          // prefill: [num_splits, T, Hq, D], null when num_splits == 1; decode:
                               // [cut parts, Hk, rows * (D + 2)], rows (8 or 16) of the kernel
  float* partial_lse;          // prefill: [num_splits, T, Hq], null when num_splits == 1
  const void* sealed;          // decode: slots of sealed blocks, or null: there are none
  int64_t sealed_stride;       // bytes from slot to slot
  int32_t sealed_key_groups;   // bytes from the start of a slot to this layer's first head of: zeros
  int32_t sealed_value_groups;  // and steps of K, of V, codes of K, of V
  int32_t sealed_keys;
  int32_t sealed_values;
  int64_t q_stride_token;
  int64_t q_stride_head;
  int64_t out_stride_token;
  int64_t out_stride_head;
  int64_t kv_stride_block;
  int64_t kv_stride_layer;
  int64_t kv_stride_head;
  int64_t kv_stride_token;
  int64_t scale_stride_block;
  int64_t scale_stride_layer;
  int64_t scale_stride_head;
  int64_t scale_stride_token;
  int32_t layer;
  int32_t num_seqs;    // S
  int32_t num_tokens;  // T, an upper bound when a graph replays with fewer
  int32_t num_qo_heads;
  int32_t num_kv_heads;
  int32_t block_shift;  // log2(block_size)
  int32_t num_splits;   // prefill: parts into which the visible keys of every query tile are cut
  int32_t reads_early;  // decode: lengths, tables, parts and all tokens but this step's may be read
                        // before the kernel's predecessor in the stream has ended
  float sm_scale;
  float logits_soft_cap;  // 0: none; else logits become cap * tanh(logits / cap)
} hkv_attention_params;

// Merges num_states attention states of the same rows: out = sum_i w_i o_i, w = softmax over the lse.
// A state with lse = -inf is the identity. Rows are (token, head) pairs, row = t * Hq + h.
typedef struct hkv_merge_params {
  const void* states;        // [num_states, rows, D] of in_dtype
  const float* state_lse;    // [num_states, rows] natural log
  void* out;                 // [T, Hq, D] of out_dtype, strides below
  float* lse;                // [T, Hq] natural log, or null
  const float* sink_logits;  // [Hq]: adds exp(sink) to the denominator once; or null
  const int32_t* live_tokens;  // device: rows of tokens >= *live_tokens are left alone; or null
  int64_t out_stride_token;
  int64_t out_stride_head;
  int32_t num_states;
  int32_t num_tokens;
  int32_t num_qo_heads;
  int32_t head_dim;
  int32_t in_dtype;   // enum hkv_dtype
  int32_t out_dtype;  // enum hkv_dtype
} hkv_merge_params;

// Most dimensions over which the rows of a block are repeated.
#define HKV_MOVE_DIMS 4

// Copies every fragment of a descriptor table. Source and destination are device or mapped pinned host
// memory; fragments do not overlap.
//
// Without dimensions a descriptor is one fragment. With them it is a block: a row of its `bytes` at its
// addresses and at every combination of steps along the dimensions, which are those of all blocks; fewer
// than 2^31 vectors of 16 bytes per block.
typedef struct hkv_move_params {
  const hkv_copy* copies;      // [num_copies], device or mapped pinned host
  const int64_t* src_offsets;  // [counts[0]] bytes, in place of multiples of src_strides[0]; or null
  const int64_t* dst_offsets;  // [counts[0]] bytes, in place of multiples of dst_strides[0]; or null
  int64_t num_copies;
  int64_t src_strides[HKV_MOVE_DIMS];  // bytes, multiples of 16; outermost dimension first
  int64_t dst_strides[HKV_MOVE_DIMS];
  int32_t counts[HKV_MOVE_DIMS];
  int32_t num_dims;
  int32_t num_tiles;
  int32_t tile_copies;  // descriptors per tile, at most 448
  int32_t tile_ctas;    // CTAs that share a tile; divides the grid
} hkv_move_params;

// Writes synthetic queries, keys and values of new tokens of one layer, as src/ops/synthetic.rs
// defines them.
typedef struct hkv_synthetic_params {
  const uint64_t* hashes;        // [T] device: history hash of each token
  const uint16_t* distribution;  // [K|V|Q][192 channels][128 quantiles] device, bit patterns
  void* q;                       // [T, Hq, D] contiguous
  void* k_new;                   // [T, Hk, D] contiguous
  void* v_new;                   // [T, Hk, D] contiguous
  int32_t layer;
  int32_t num_tokens;  // T
  int32_t num_qo_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
} hkv_synthetic_params;

// Reads a contiguous range once: the machine's own limit, beside which kernels are measured.
typedef struct hkv_read_params {
  const void* data;    // [bytes]
  int64_t bytes;       // a multiple of 16
  uint32_t* checksum;  // device: the sum of all 32-bit words is added to it, modulo 2^32
} hkv_read_params;

// Reads K and V of every key that some query sees, each once: the load path of attention, without its
// arithmetic.
typedef struct hkv_read_blocks_params {
  hkv_attention_params attention;  // of its tensors, only K, V and their scales are read
  uint32_t* checksum;              // device: the sum of all 32-bit words is added to it, modulo 2^32
} hkv_read_blocks_params;

#define HKV_CODEC_THREADS 512
#define HKV_CODEC_SECTIONS 7

// Encodes blocks of a pool into slots, or decodes them out of slots. What a slot holds is said in
// src/codec; offsets and sizes of its parts are computed there.
typedef struct hkv_codec_params {
  void* k;                       // pool base of K
  void* v;                       // pool base of V
  const hkv_slot_block* blocks;  // [num_blocks] device or pinned
  hkv_slot_result* results;      // [num_blocks] device or pinned, written
  int64_t num_blocks;
  int64_t kv_stride_block;
  int64_t kv_stride_layer;
  int64_t kv_stride_head;
  int64_t kv_stride_token;
  uint64_t header[2];                     // the first words of every slot of this codec and geometry
  uint32_t sections[HKV_CODEC_SECTIONS];  // offsets of the codec's arrays in a slot
  uint32_t elements;                      // offset of the first array that is not kept in shared memory
  uint32_t slot_bytes;
  int32_t escapes;       // lx4: how many a slot lists
  int32_t scale_planes;  // fp8: planes that share a scale, 0: every token has its own
  int32_t codec;         // its code in headers
  int32_t first_layer_slot;
  int32_t num_layers;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t dtype;  // enum hkv_dtype, 16 bits
} hkv_codec_params;

#endif  // HYBRIDKV_ABI_PARAMS_H_
