// hybridkv: paged attention over hybrid KV caches, and the movement of their blocks, by raw
// pointers.
//
// A device is opened once, its kernels are loaded once, and each operation takes a struct of
// arguments and a stream. Operations allocate nothing, never synchronise and can be captured in a
// CUDA graph; arrays on the device may hold other values when the graph is replayed. On the CPU
// device "device memory" is host memory, the stream is NULL, and an operation is done when it
// returns.
//
// Every function that can fail returns a hkv_status, and hkv_last_error() says in words what was
// given, what is supported and what to do. After a failure nothing has been launched and nothing
// was written, where nothing else is said.
//
// Handles may be used from any thread, a manager and a mover by one at a time. A kernels handle
// keeps its device alive, a mover its kernels.
//
// Conventions
//   strides count elements; a shape in brackets is row-major unless strides are given beside it
//   T tokens in the batch, S sequences, G layer groups, L layers, Hq query heads, Hk KV heads, D
//   head_dim LSE is the natural-log log-sum-exp of the scaled logits, -inf for a row that sees no
//   key "device" arrays are read by the kernel when it runs and have to stay valid until then
#ifndef HYBRIDKV_H_
#define HYBRIDKV_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Changes when a struct or a function here changes. Compare with hkv_abi_version().
#define HKV_ABI_VERSION 6u

// What a call came to.
typedef enum hkv_status {
  HKV_OK = 0,
  HKV_INVALID_ARGUMENT = 1,  // can never be served as given
  HKV_UNSUPPORTED = 2,       // a value outside of what is supported; the message names what is
  HKV_NO_DRIVER = 3,         // no CUDA driver, or too old a one
  HKV_NO_DEVICE = 4,         // no CUDA device of this ordinal
  HKV_NO_KERNELS = 5,        // no kernel image for this GPU in this build
  HKV_OUT_OF_MEMORY = 6,
  HKV_CUDA_ERROR = 7,      // a driver call failed
  HKV_INTERNAL_ERROR = 8,  // a bug of the library
  HKV_NO_BLOCKS = 9,       // not enough free blocks or slots now; nothing has changed
  HKV_NOT_READY = 10,      // transfers have to end first; nothing has changed
  HKV_CORRUPT = 11,        // stored bytes are not what was stored; nothing was written
} hkv_status;

// Element types of queries, keys, values and outputs.
enum hkv_dtype {
  HKV_DTYPE_BF16 = 0,
  HKV_DTYPE_F16 = 1,
  HKV_DTYPE_F32 = 2,  // partial states only
  HKV_DTYPE_E4M3 =
      3,  // keys and values only: 8-bit float (4 exponent, 3 mantissa bits), with scales
};

// Which keys `j <= i` a query at absolute position `i` sees (0-based, besides the sink tokens).
enum hkv_layer_kind {
  HKV_LAYER_FULL = 0,     // every j
  HKV_LAYER_SLIDING = 1,  // i - j < extent
  HKV_LAYER_CHUNKED = 2,  // i / extent == j / extent
};

// One row of the window table, a device array indexed by layer: what makes the kind of a layer
// data.
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

// A piece of memory. What an operation will reach is checked against its length.
typedef struct hkv_span {
  void* data;      // NULL: not given
  uint64_t bytes;  // from data on
} hkv_span;

// Strides of a [token, head, D] tensor whose last dimension is contiguous.
typedef struct hkv_head_strides {
  int64_t token;
  int64_t head;
} hkv_head_strides;

// K and V of one pool of blocks. Token t of block b, layer slot l, head h lies at
//   k + b * stride_block + l * stride_layer + h * stride_head + t * stride_token
// with D contiguous elements, and the same for v: every layout is a choice of bases and strides.
//
// Elements of HKV_DTYPE_E4M3 stand for element * scale, and the float scale of the same token lies
// at
//   k_scale + b * scale_stride_block + l * scale_stride_layer + h * scale_stride_head
//           + t * scale_stride_token
// and the same for v. Strides of 0 make it one per tensor or per head, which hkv_append reads; with
// a token stride every token of every head has its own, which hkv_append computes and writes.
typedef struct hkv_kv {
  hkv_span k;            // from the first element of K on, 16-byte aligned
  hkv_span v;            // from the first element of V on, 16-byte aligned
  int64_t stride_block;  // this and the others: multiples of 16 bytes
  int64_t stride_layer;  // 0 where every layer has a base of its own
  int64_t stride_head;
  int64_t stride_token;
  uint64_t num_blocks;         // blocks that a block table may name
  uint32_t num_layer_slots;    // layer slots per block that a window table may name
  uint32_t block_size;         // tokens per block: 8, 16, 32, 64, 128
  uint32_t num_kv_heads;       // Hk
  uint32_t head_dim;           // D: 64, 128, 256
  uint32_t dtype;              // enum hkv_dtype: bf16, f16 or e4m3
  uint32_t reserved;           // zero
  hkv_span k_scale;            // given if, and only if, dtype is e4m3
  hkv_span v_scale;            // likewise
  int64_t scale_stride_block;  // this and the others: in floats
  int64_t scale_stride_layer;
  int64_t scale_stride_head;
  int64_t scale_stride_token;
} hkv_kv;

// Arguments of hkv_append.
typedef struct hkv_append_args {
  uint64_t struct_bytes;  // sizeof(hkv_append_args)
  hkv_kv kv;
  hkv_span k_new;  // [T, Hk, D] of dtype, strides below
  hkv_span v_new;  // [T, Hk, D] of dtype, strides below
  hkv_head_strides new_strides;
  hkv_span
      slot_mapping;     // [G, T] int64 device: block_id * block_size + offset, or negative to skip
  hkv_span windows;     // [L] hkv_window device
  uint32_t num_groups;  // G
  uint32_t num_layers;  // L
  uint32_t layer;       // the layer to write
  uint32_t num_tokens;  // T; 0 is a no-op
  uint32_t dtype;       // enum hkv_dtype: bf16 or f16; kv.dtype, unless that is e4m3
  uint32_t reserved;    // zero
} hkv_append_args;

// How the decode work of a batch is dealt out in layers that see the same keys: what hkv_planned()
// gives. All zero: not planned.
typedef struct hkv_class_plan {
  hkv_span memory;
  uint32_t num_seqs;
  uint32_t num_kv_heads;
  uint32_t num_parts;    // entries of the work list
  uint32_t cut_parts;    // most of them that are parts of cut sequences
  uint32_t reads_early;  // to be set to 1 for a layer whose predecessor in the stream, the kernel
                         // launched just before it, writes nothing that attention reads but queries
                         // and this step's new keys and values, as hkv_append and attention of the
                         // layer before do: it then begins on older keys while that kernel ends.
                         // Where the predecessor writes tables, lengths, older tokens or the plan,
                         // results would be wrong: where in doubt, leave it 0
  uint32_t reserved;     // zero
} hkv_class_plan;

// Arguments of hkv_attention. Query token t of sequence s has absolute position
// kv_len[s] - q_len + t, where q_len = qo_indptr[s + 1] - qo_indptr[s].
//
// Row (g, s) of the block tables starts at block_ids[block_row[g * S + s]] and lists the blocks of
// the sequence that are live in group g: those of the sink tokens, if the group has any, and then
// all from block first_block[g * S + s] on.
typedef struct hkv_attention_args {
  uint64_t struct_bytes;  // sizeof(hkv_attention_args)
  hkv_kv kv;
  hkv_span q;  // [T, Hq, D] of dtype, strides below
  hkv_head_strides q_strides;
  hkv_span out;  // [T, Hq, D] of dtype, strides below
  hkv_head_strides out_strides;
  hkv_span lse;           // [T, Hq] float, or not given
  hkv_span qo_indptr;     // [S + 1] int32 device
  hkv_span kv_len;        // [S] int32 device: tokens of each sequence, the new ones included
  hkv_span block_ids;     // int32 device, all rows
  hkv_span block_row;     // [G, S] int64 device
  hkv_span first_block;   // [G, S] int32 device, or not given: every row starts at block 0
  hkv_span windows;       // [L] hkv_window device
  hkv_span sink_logits;   // [Hq] float device, learned (gpt-oss), or not given
  hkv_span tree_mask;     // [T] uint32 device: bit u of word t says whether query token t sees
                          // query token u of its sequence (bit t of itself is set), where the
                          // layer's kind lets it; or not given. max_q_len is at most 32 then
  hkv_span workspace;     // device, hkv_attention_workspace() bytes
  hkv_class_plan plan;    // out of hkv_planned(); without one, a sequence that is longer than the
                          // others keeps the device waiting
  uint32_t num_groups;    // G
  uint32_t num_layers;    // L
  uint32_t layer;         // the layer to attend
  uint32_t num_seqs;      // S; 0 is a no-op
  uint32_t num_tokens;    // T, an upper bound for every replay of a graph; 0 is a no-op
  uint32_t num_qo_heads;  // Hq, a multiple of Hk
  uint32_t max_q_len;     // upper bound on the query tokens of one sequence
  uint32_t max_kv_len;    // upper bound on the visible tokens of one sequence in this layer
  float sm_scale;         // factor of the logits, usually 1 / sqrt(D)
  float logits_soft_cap;  // 0: none; else logits become cap * tanh(logits / cap)
  uint32_t dtype;         // enum hkv_dtype: bf16 or f16; kv.dtype, unless that is e4m3
  uint32_t reserved;      // zero
} hkv_attention_args;

// Arguments of hkv_plan: layers of one *window class*, the same kind, extent and sink tokens, see
// the same keys and share a plan.
typedef struct hkv_plan_args {
  uint64_t struct_bytes;  // sizeof(hkv_plan_args)
  // [num_classes], at most 8: the arguments with which one layer of each class will be attended, of
  // one batch of at most 4096 sequences: num_seqs, qo_indptr, kv_len and windows are the same in
  // all. Queries, outputs, block tables and the memory of keys and values are not looked at.
  const hkv_attention_args* classes;
  hkv_span memory;  // device, hkv_plan_memory() bytes; attention uses it until the next plan there
  uint32_t num_classes;
  uint32_t
      batch_invariant;  // 1: the length of a sequence alone decides how it is cut, so that the
                        // bits of its output do not depend on what else is in the batch, as
                        // long as max_q_len is the same. Takes room for the parts of max_kv_len
                        // tokens for every sequence. 0: sequences are cut by the batch
} hkv_plan_args;

// Arguments of hkv_merge_states. Rows are (token, head) pairs.
typedef struct hkv_merge_args {
  uint64_t struct_bytes;  // sizeof(hkv_merge_args)
  hkv_span states;        // [num_states, T * Hq, D] of in_dtype
  hkv_span state_lse;     // [num_states, T * Hq] float; -inf is the identity
  hkv_span out;           // [T, Hq, D] of out_dtype, strides below
  hkv_head_strides out_strides;
  hkv_span lse;          // [T, Hq] float, or not given
  hkv_span sink_logits;  // [Hq] float: adds exp(sink) to the denominator once; or not given
  hkv_span live_tokens;  // one int32 device: rows of tokens from it on are left alone; or not given
  uint32_t in_dtype;     // enum hkv_dtype
  uint32_t out_dtype;    // enum hkv_dtype
  uint32_t num_states;   // none give output 0 and LSE -inf
  uint32_t num_tokens;   // T; 0 is a no-op
  uint32_t num_qo_heads;
  uint32_t head_dim;
} hkv_merge_args;

// What a block holds, rows [layers][K|V][heads][tokens], and where they lie from its address on. A
// row is one token of one head. Strides are in bytes here, and multiples of 16: a pool of any
// layout is a choice of them and of the addresses of its blocks.
typedef struct hkv_block_layout {
  uint32_t num_layers;
  uint32_t num_parts;  // K and V: 2; a latent that serves as both: 1
  uint32_t num_kv_heads;
  uint32_t block_size;   // tokens
  uint32_t row_bytes;    // a multiple of 16
  uint32_t reserved;     // zero
  int64_t stride_layer;  // hkv_block_layout_fill() sets this and the others for contiguous blocks
  int64_t stride_part;
  int64_t stride_head;
  int64_t stride_token;
  const int64_t* layer_offsets;  // [num_layers] host: bytes of each layer from the first one's
                                 // place, where layers have no stride; or NULL
} hkv_block_layout;

// Contiguous blocks.
typedef enum hkv_block_order {
  HKV_BLOCK_FIRST_HND = 0,  // [layer][K|V][head][token], as blocks of the pools here are
  HKV_BLOCK_FIRST_NHD = 1,  // [layer][K|V][token][head]
  HKV_HEADS_OUTERMOST = 2,  // [head][layer][K|V][token], whatever the tensor parallelism
} hkv_block_order;

// Arguments of hkv_block_move_create: the same rows in two layouts.
typedef struct hkv_block_move_args {
  uint64_t struct_bytes;  // sizeof(hkv_block_move_args)
  hkv_block_layout src;
  hkv_block_layout dst;
  uint32_t first_layer;
  uint32_t num_layers;  // from the first one on; of both layouts' layers, those that move
  uint32_t first_token;
  uint32_t num_tokens;  // likewise: the live ones of a window, say
} hkv_block_move_args;

// The move of blocks from one layout to another.
typedef struct hkv_block_move hkv_block_move;

// Arguments of hkv_move_blocks.
typedef struct hkv_move_args {
  uint64_t struct_bytes;         // sizeof(hkv_move_args)
  hkv_span copies;               // [num_copies] hkv_copy, in device or pinned host memory
  uint64_t num_copies;           // 0 is a no-op
  const hkv_block_move* blocks;  // what each of them stands for; NULL: one fragment
  uint32_t max_ctas;  // CTAs the move may occupy; 0: the whole device. 4 fill a PCIe 5 link
  uint32_t reserved;  // zero
} hkv_move_args;

// Which way a move goes.
typedef enum hkv_way {
  HKV_HOST_TO_DEVICE = 0,  // from pinned memory
  HKV_DEVICE_TO_HOST = 1,  // to pinned memory
  HKV_INSIDE_DEVICE = 2,
} hkv_way;

// Arguments of hkv_mover_submit.
typedef struct hkv_submit_args {
  uint64_t struct_bytes;  // sizeof(hkv_submit_args)
  hkv_span copies;        // [num_copies] hkv_copy, in pinned host memory; put in another order and
                          // merged, and nobody else's until the stream has passed the move
  uint64_t num_copies;    // 0 is a no-op
  const hkv_block_move* blocks;  // what each of them stands for; NULL: one fragment
  uint32_t way;                  // enum hkv_way
  uint32_t both_ways;            // 1: the link is busy the other way meanwhile; else 0
} hkv_submit_args;

// How a block of 16-bit elements is written into a slot: hkv_slot_bytes() of them, whatever the
// block, or, of lxe, at most.
enum hkv_codec {
  HKV_CODEC_RAW = 0,         // "raw": as it is
  HKV_CODEC_LX4 = 1,         // "lx4": every bit of bf16, exponents in 4 bits
  HKV_CODEC_LXE = 2,         // "lxe": likewise, in slots of different sizes; host functions only
  HKV_CODEC_FP8_TENSOR = 3,  // "fp8-tensor": e4m3, scale per layer
  HKV_CODEC_FP8_HEAD = 4,    // "fp8-head": e4m3, scale per head
  HKV_CODEC_FP8 = 5,         // "fp8": e4m3, scale per token and head
  HKV_CODEC_INT8 = 6,        // "int8": K per channel, V per token
  HKV_CODEC_INT6 = 7,        // "int6": likewise
  HKV_CODEC_INT4 = 8,        // "int4": likewise, V after a Hadamard rotation
};

// Shape of the block that a slot holds: [num_layers][K|V][num_kv_heads][block_size][head_dim].
typedef struct hkv_geometry {
  uint32_t num_layers;
  uint32_t num_kv_heads;
  uint32_t head_dim;    // a multiple of 16 up to 256
  uint32_t block_size;  // tokens per block: 8, 16, 32, 64, 128
  uint32_t dtype;       // enum hkv_dtype: bf16 or f16
} hkv_geometry;

// What a slot says of itself.
typedef struct hkv_slot_header {
  hkv_geometry geometry;
  uint32_t codec;     // enum hkv_codec
  uint32_t version;   // of the layout of slots; a library reads its own
  uint32_t bytes;     // of the slot, header included
  uint32_t escapes;   // elements listed apart (lx4, else 0)
  uint32_t reserved;  // zero
  uint64_t hash;      // content hash of the whole slot
} hkv_slot_header;

// A block of the pool and the slot that it is encoded into or decoded from, device or pinned host
// memory, at a multiple of 16 bytes.
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

// Arguments of hkv_encode and hkv_decode.
typedef struct hkv_codec_args {
  uint64_t struct_bytes;  // sizeof(hkv_codec_args)
  hkv_kv kv;              // of bf16 or f16
  hkv_span blocks;      // [num_blocks] hkv_slot_block, in device or pinned host memory. No two rows
                        // write to the same memory
  hkv_span results;     // [num_blocks] hkv_slot_result, in device or pinned host memory: written
  uint64_t num_blocks;  // 0 is a no-op
  uint32_t codec;       // enum hkv_codec
  uint32_t first_layer_slot;  // the first layer slot of a block that goes into its slot
  uint32_t num_layers;        // how many
  uint32_t max_ctas;  // CTAs the codec may occupy; 0: the whole device. 8 to 16 fill a PCIe 5 link
} hkv_codec_args;

// A device. Destroyed when no handle refers to it any more.
typedef struct hkv_device hkv_device;

// The kernels of a device, loaded.
typedef struct hkv_kernels hkv_kernels;

// HKV_ABI_VERSION of the library that is linked.
uint32_t hkv_abi_version(void);

// Version of the library that is linked, "0.1.0".
const char* hkv_version(void);

// Name of a status, "HKV_OK".
const char* hkv_status_name(hkv_status status);

// What went wrong in the last call of this thread that failed; "" before any. Valid until the
// thread's next failure.
const char* hkv_last_error(void);

// Opens the CPU device, which is always there and runs every operation from reference code.
hkv_status hkv_device_cpu(hkv_device** device);

// Opens the CUDA device of this ordinal, on its primary context.
hkv_status hkv_device_cuda(uint32_t ordinal, hkv_device** device);

// Gives up a device. NULL is ignored.
void hkv_device_destroy(hkv_device* device);

// Name of the device, valid as long as the handle.
const char* hkv_device_name(const hkv_device* device);

// Loads all kernels of a device.
hkv_status hkv_kernels_load(const hkv_device* device, hkv_kernels** kernels);

// The same in checking mode, for debugging: every operation waits for its stream, reads what its
// kernel will read of slots, block tables, lengths, windows, copies and rows of codecs, and fails
// instead of running on a wrong one. Operations block and cannot be captured.
hkv_status hkv_kernels_load_checked(const hkv_device* device, hkv_kernels** kernels);

// Unloads kernels, once what they run is done. NULL is ignored.
void hkv_kernels_destroy(hkv_kernels* kernels);

// The operations. stream is a CUstream or cudaStream_t of the device, NULL for its default stream.
// All memory has to stay valid until the stream has passed the operation.

// Writes the K and V of new tokens into their slots.
hkv_status hkv_append(const hkv_kernels* kernels, const hkv_append_args* args, void* stream);

// Bytes of workspace that hkv_attention needs for these arguments (args->workspace is not looked
// at).
hkv_status hkv_attention_workspace(const hkv_kernels* kernels, const hkv_attention_args* args,
                                   uint64_t* bytes);

// Bytes of memory that hkv_plan needs for these arguments (args->memory is not looked at).
hkv_status hkv_plan_memory(const hkv_kernels* kernels, const hkv_plan_args* args, uint64_t* bytes);

// Deals the decode work of a batch to CTAs, once per step, for all layers: long sequences are cut
// into parts. In a graph it may be replayed with other lengths. Attention with a plan of other
// lengths is right, only unbalanced.
hkv_status hkv_plan(const hkv_kernels* kernels, const hkv_plan_args* args, void* stream);

// The plan of class `index` of the same arguments, for layers of that class that come after
// hkv_plan in the stream; all zero for a class that is not planned (chunked prefill).
hkv_status hkv_planned(const hkv_kernels* kernels, const hkv_plan_args* args, uint32_t index,
                       hkv_class_plan* plan);

// Attends q to the live blocks of the sequences, for one layer of any kind.
hkv_status hkv_attention(const hkv_kernels* kernels, const hkv_attention_args* args, void* stream);

// Merges attention states of the same rows: out = sum_i w_i o_i, w = softmax over their LSE.
hkv_status hkv_merge_states(const hkv_kernels* kernels, const hkv_merge_args* args, void* stream);

// Copies every fragment, or block, of a table, between device and pinned host memory in any
// direction.
hkv_status hkv_move_blocks(const hkv_kernels* kernels, const hkv_move_args* args, void* stream);

// Sets the strides of a contiguous block (enum hkv_block_order) from its counts.
hkv_status hkv_block_layout_fill(uint32_t order, hkv_block_layout* layout);

// The move of blocks from one layout to another. May own a table on the device: to be kept until
// the streams have passed the moves that name it.
hkv_status hkv_block_move_create(const hkv_kernels* kernels, const hkv_block_move_args* args,
                                 hkv_block_move** move);

// Gives it up. NULL is ignored.
void hkv_block_move_destroy(hkv_block_move* move);

// Writes the descriptors of `count` blocks at these addresses (in device or pinned host memory).
hkv_status hkv_block_move_copies(const hkv_block_move* move, const uint64_t* src,
                                 const uint64_t* dst, uint64_t count, hkv_copy* copies);

// What the paths between a host and a device cost: the kernel, the copy engines by fragment and by
// row, and both through a ring in device memory.
typedef struct hkv_link_model hkv_link_model;

// Measures them, in less than 200 ms, on an idle device; takes 256 MiB of device and of pinned
// memory meanwhile, less where there is less.
hkv_status hkv_link_model_calibrate(const hkv_kernels* kernels, hkv_link_model** model);

// Gives up a model. NULL is ignored.
void hkv_link_model_destroy(hkv_link_model* model);

// How many CTAs hkv_move_blocks should be given for so many rows (or fragments) and bytes in all:
// as few as are as fast as more.
hkv_status hkv_link_model_quota(const hkv_link_model* model, uint32_t way, uint32_t both_ways,
                                uint64_t rows, uint64_t bytes, uint32_t* ctas);

// Plans moves from a model and submits them, one after another.
typedef struct hkv_mover hkv_mover;

// A mover with room for plans of so many descriptors, which grows when there are more. With
// `staging` (1 or 0) blocks may go by way of a ring of 24 MiB in device memory, which it takes.
hkv_status hkv_mover_create(const hkv_kernels* kernels, const hkv_link_model* model,
                            uint64_t num_copies, uint32_t staging, hkv_mover** mover);

// Gives up a mover, when its moves are done. NULL is ignored.
void hkv_mover_destroy(hkv_mover* mover);

// Submits a move by the paths that are fastest for it. All of it is on the stream or joined back
// into it. The moves of a mover go to one stream, or to streams that wait for one another, and are
// submitted by one thread at a time. After HKV_CUDA_ERROR a part of the move may be under way on
// the stream.
hkv_status hkv_mover_submit(hkv_mover* mover, const hkv_submit_args* args, void* stream);

// Encodes blocks into slots, straight to where they are to stay. Look at the results when the
// stream has passed: a slot whose status is not HKV_SLOT_OK holds nothing, move its block as it is.
hkv_status hkv_encode(const hkv_kernels* kernels, const hkv_codec_args* args, void* stream);

// Decodes slots into blocks and verifies them on the way. Look at the results when the stream has
// passed: a block whose status is HKV_SLOT_CORRUPT holds garbage and must not be attended.
hkv_status hkv_decode(const hkv_kernels* kernels, const hkv_codec_args* args, void* stream);

// Slots on the host: the same bytes as hkv_encode writes, without a device. A slot is any memory, a
// block is aligned as its elements; neither overlaps the other.

// The codec of a name, as in enum hkv_codec.
hkv_status hkv_codec_by_name(const char* name, uint32_t* codec);

// Name of a codec, "int6"; "unknown codec" for a value that this library has none for.
const char* hkv_codec_name(uint32_t codec);

// Bytes of a slot, header included: the same for every block of this geometry; of lxe the most, and
// the header says how many.
hkv_status hkv_slot_bytes(uint32_t codec, const hkv_geometry* geometry, uint64_t* bytes);

// Encodes a block of num_elements 16-bit elements into a slot of at least hkv_slot_bytes(), of
// which no more are written. result->status as for hkv_encode: HKV_OK alone does not say that the
// slot holds the block.
hkv_status hkv_slot_encode(uint32_t codec, const hkv_geometry* geometry, const uint16_t* block,
                           uint64_t num_elements, void* slot, uint64_t slot_bytes,
                           hkv_slot_result* result);

// Decodes a slot of any codec into a block of num_elements, once all of it has been verified:
// HKV_CORRUPT for one that is truncated, damaged, of another geometry, or not known to this
// library. `header` is written on success, or NULL.
hkv_status hkv_slot_decode(const hkv_geometry* geometry, const void* slot, uint64_t slot_bytes,
                           uint16_t* block, uint64_t num_elements, hkv_slot_header* header);

// What the first 32 bytes of a slot say: HKV_CORRUPT when they are no header that this library
// knows. The rest is not looked at.
hkv_status hkv_slot_inspect(const void* slot, uint64_t slot_bytes, hkv_slot_header* header);

// Verifies a slot, header and content hash: HKV_CORRUPT as hkv_slot_decode. `header` is written on
// success, or NULL.
hkv_status hkv_slot_verify(const hkv_geometry* geometry, const void* slot, uint64_t slot_bytes,
                           hkv_slot_header* header);

// The manager: which blocks every sequence has in which tier, and what has to be moved. It touches
// no memory but its own, starts no thread and reads no clock: its caller runs the transfers that it
// hands out and says how they ended.
typedef struct hkv_manager hkv_manager;

// What a lookup found: the longest prefix that every layer group can serve.
typedef struct hkv_hit {
  uint64_t tokens;         // over all tiers
  uint64_t device_tokens;  // from the device alone
  uint64_t host_tokens;    // from device and host
} hkv_hit;

// What an allocation gave.
typedef struct hkv_allocation {
  uint64_t hit_tokens;  // tokens that need not be computed, once every load has succeeded
  uint64_t device_hit_tokens;
  uint64_t host_hit_tokens;  // on the device or on the host
  uint64_t num_tokens;       // tokens that have slots
  uint64_t num_loads;        // blocks to wait for, or to run behind; 0: ready now
} hkv_allocation;

enum hkv_direction {
  HKV_OFFLOAD = 0,  // device to host, behind all work submitted so far
  HKV_ONBOARD = 1,  // host to device, behind all work submitted so far
  HKV_PERSIST = 2,  // host to storage
  HKV_FETCH = 3,    // storage to host
};

// One block to move. To be answered once by hkv_manager_complete.
typedef struct hkv_transfer {
  uint64_t id;
  uint64_t seq;        // the sequence that waits for it, if has_seq
  uint32_t has_seq;    // 1 or 0
  uint32_t direction;  // enum hkv_direction
  uint32_t group;      // layer group of the block
  uint32_t from;       // index of the block or slot in its tier
  uint32_t to;
  uint32_t reserved;
  uint8_t hash[16];  // with the group, the key of the block
} hkv_transfer;

// One block to copy inside the device pool, on the compute stream, in the order given.
typedef struct hkv_block_copy {
  uint32_t group;
  uint32_t from;
  uint32_t to;
} hkv_block_copy;

enum hkv_completion_kind {
  HKV_COMPLETION_NONE = 0,     // nothing to say of a sequence
  HKV_COMPLETION_READY = 1,    // all its loads have ended: its first valid_tokens tokens are valid
  HKV_COMPLETION_DROPPED = 2,  // a load failed, and it has been freed; allocate it again
  HKV_COMPLETION_VOID = 3,     // the same, and what it computed behind its loads is void
};

// What became of a sequence.
typedef struct hkv_completion {
  uint32_t kind;  // enum hkv_completion_kind
  uint32_t reserved;
  uint64_t seq;
  uint64_t valid_tokens;
} hkv_completion;

enum hkv_tier {
  HKV_DEVICE = 0,
  HKV_HOST = 1,
  HKV_STORAGE = 2,
};

enum hkv_event_kind {
  HKV_STORED = 0,   // the tier has the block now
  HKV_REMOVED = 1,  // it has it no longer
  HKV_CLEARED = 2,  // it has none of the group; index and hash are zero
};

// A change of what a tier has.
typedef struct hkv_event {
  uint32_t kind;   // enum hkv_event_kind
  uint32_t tier;   // enum hkv_tier
  uint32_t group;  // layer group
  uint32_t index;  // of the block in its sequence
  uint8_t hash[16];
} hkv_event;

// New tokens of one sequence in a step.
typedef struct hkv_slice {
  uint64_t seq;
  uint32_t start;   // absolute position of the first of them
  uint32_t tokens;  // how many; hkv_manager_allocate or _append has given them slots
} hkv_slice;

// The arrays of one step, in the caller's host memory, as hkv_append and hkv_attention take them: S
// sequences, T new tokens, G layer groups of attention, whose tables come first.
typedef struct hkv_step_args {
  uint64_t struct_bytes;  // sizeof(hkv_step_args)
  const hkv_slice* seqs;  // [S]
  int32_t* qo_indptr;     // [S + 1]
  int32_t* kv_len;        // [S]
  int64_t* slot_mapping;  // [G, T]
  int64_t* block_row;     // [G, S]
  int32_t* first_block;   // [G, S]
  uint32_t*
      block_ids;  // [max_block_ids]; NULL to learn how many there are: nothing is written then
  uint64_t max_block_ids;  // fewer than there are: refused, nothing is written
  uint32_t num_seqs;       // S
  uint32_t num_groups;     // G
  uint32_t num_tokens;     // T, the sum of the slices
  uint32_t reserved;       // zero
} hkv_step_args;

// Creates a manager from JSON:
//   {"groups": [{"kind": "full"}, {"kind": "sliding", "window": 1024}, {"kind": "chunked",
//     "chunk": 8192, "sink_tokens": 4, "block_size": 32}, {"kind": "state"}],
//    "block_size": 16, "num_blocks": 4096, "max_model_len": 32768, "in_flight_tokens": 8192,
//    "prefix_caching": true, "eviction": "reuse", "identity": "model, revision, dtype, layout",
//    "retention": {"interval": 0, "slack": null, "dense_chunks": false, "ends": true,
//      "fronts": true},
//    "host": {"num_slots": 8192, "write": "through", "uses": 2, "eviction": "lru",
//      "load_back_threshold": 0},
//    "storage": {"num_slots": 65536, "eviction": "lru", "prefetch_threshold": 256, "prefetch":
//      {"policy": "timeout", "base_ns": 1000000000, "per_1024_tokens_ns": 250000000}}}
// groups, num_blocks and max_model_len are required; the others are shown with what they are
// without them, but that there is no host and no storage, and that a group has the block_size of
// all. An interval of null keeps all tails, a slack of null goes by the kind of the group, a number
// is of alignment units. write is through, selective (once "uses" sequences had a block) or back. A
// prefetch policy is timeout, best_effort (no time) or wait_complete.
hkv_status hkv_manager_create(const char* config, hkv_manager** manager);

// Gives up a manager. NULL is ignored.
void hkv_manager_destroy(hkv_manager* manager);

// The longest prefix of a prompt that could be served now; nothing is pinned. salt and lora may be
// NULL.
hkv_status hkv_manager_lookup(const hkv_manager* manager, const uint32_t* tokens,
                              uint64_t num_tokens, const char* salt, const char* lora,
                              hkv_hit* hit);

// Begins a sequence: looks its prompt up and pins the hit in one act, and takes blocks for the next
// budget tokens of it (0: for all); the rest follows by hkv_manager_append. Everything or nothing.
hkv_status hkv_manager_allocate(hkv_manager* manager, uint64_t seq, const uint32_t* tokens,
                                uint64_t num_tokens, uint64_t budget, const char* salt,
                                const char* lora, hkv_allocation* allocation);

// Adds tokens to a sequence, or changes nothing.
hkv_status hkv_manager_append(hkv_manager* manager, uint64_t seq, const uint32_t* tokens,
                              uint64_t num_tokens);

// Writes the arrays of a step and gives the number of block ids in them.
hkv_status hkv_manager_step(const hkv_manager* manager, const hkv_step_args* args,
                            uint64_t* num_block_ids);

// Says that the work computing the first computed tokens has been submitted and that of the first
// settled has ended.
hkv_status hkv_manager_advance(hkv_manager* manager, uint64_t seq, uint64_t computed,
                               uint64_t settled);

// Lets the steps of a sequence be submitted while its loads are under way, each layer behind its
// own part of them.
hkv_status hkv_manager_overlap(hkv_manager* manager, uint64_t seq);

// Ends a sequence.
hkv_status hkv_manager_free(hkv_manager* manager, uint64_t seq);

// Ends a sequence whose step failed. dependents [max_dependents] gets the other sequences that hold
// what it did not finish, which are to be aborted, too; give it room for all.
hkv_status hkv_manager_abort(hkv_manager* manager, uint64_t seq, uint64_t* dependents,
                             uint64_t max_dependents, uint64_t* num_dependents);

// Makes room in the manager's own memory for a sequence to grow to so many tokens: no call for it
// up to there allocates any. No block is taken.
hkv_status hkv_manager_reserve(hkv_manager* manager, uint64_t seq, uint64_t tokens);

// Begins the sequence child with the computed tokens of parent, and gives their number: blocks are
// shared, and whoever goes on first inside of one gets a copy of it.
hkv_status hkv_manager_fork(hkv_manager* manager, uint64_t parent, uint64_t child,
                            uint64_t* tokens);

// Cut a sequence back to its first tokens tokens. After _trim what was computed of the others, by
// steps that have ended, stays findable; after _rollback it is as if these (rejected drafts) had
// never been given. dependents as for hkv_manager_abort.
hkv_status hkv_manager_trim(hkv_manager* manager, uint64_t seq, uint64_t tokens,
                            uint64_t* dependents, uint64_t max_dependents,
                            uint64_t* num_dependents);
hkv_status hkv_manager_rollback(hkv_manager* manager, uint64_t seq, uint64_t tokens,
                                uint64_t* dependents, uint64_t max_dependents,
                                uint64_t* num_dependents);

// What a preemption keeps.
typedef struct hkv_preemption {
  uint64_t tokens;    // the computed ones; the others are to be appended again
  uint64_t offloads;  // transfers that it takes; its blocks are free once these have ended
} hkv_preemption;

// Swaps a sequence without steps in flight out to the host, all or nothing. It keeps its name, to
// be resumed, freed or aborted. HKV_NO_BLOCKS when the host has no room for it. dependents as for
// hkv_manager_abort.
hkv_status hkv_manager_preempt(hkv_manager* manager, uint64_t seq, hkv_preemption* preemption,
                               uint64_t* dependents, uint64_t max_dependents,
                               uint64_t* num_dependents);

// Swaps it in again: its loads are those of an allocation. HKV_NOT_READY while it is being stored.
hkv_status hkv_manager_resume(hkv_manager* manager, uint64_t seq, hkv_allocation* allocation);

// What a prefetch does.
typedef struct hkv_prefetch {
  uint64_t hit_tokens;  // tokens of the prompt that hit once all has arrived
  uint64_t blocks;      // that are fetched for it; 0: none was begun
} hkv_prefetch;

// Begins to fetch what storage holds of a prompt to the host, for a sequence of this name that
// still waits: hkv_manager_allocate gives it what has arrived by then. now as for hkv_manager_tick.
hkv_status hkv_manager_prefetch(hkv_manager* manager, uint64_t seq, const uint32_t* tokens,
                                uint64_t num_tokens, const char* salt, const char* lora,
                                uint64_t now, hkv_prefetch* prefetch);

// Says what time it is, and writes the sequences [max] whose prefetch has arrived or has had its
// time, each once; ask again while num is max.
hkv_status hkv_manager_poll_prefetch(hkv_manager* manager, uint64_t now, uint64_t* seqs,
                                     uint64_t max, uint64_t* num);

// Ends a prefetch whose request has gone; no change when there is none.
hkv_status hkv_manager_cancel_prefetch(hkv_manager* manager, uint64_t seq);

// The next copies and transfers to start, up to so many; num is 0 when there are none. All copies
// are to be taken before transfers are given out; allocations that hit a part of a block ask for
// them, and appends inside of shared ones.
hkv_status hkv_manager_copies(hkv_manager* manager, hkv_block_copy* copies, uint64_t max,
                              uint64_t* num);
hkv_status hkv_manager_transfers(hkv_manager* manager, hkv_transfer* transfers, uint64_t max,
                                 uint64_t* num);

// Says how a transfer ended (succeeded: 1 or 0), and learns what that means for a sequence.
hkv_status hkv_manager_complete(hkv_manager* manager, uint64_t id, uint32_t succeeded,
                                hkv_completion* completion);

// What else there is to say: to be asked after every hkv_manager_complete and hkv_manager_tick,
// until it is HKV_COMPLETION_NONE.
hkv_status hkv_manager_next_completion(hkv_manager* manager, hkv_completion* completion);

// What a pin holds.
typedef struct hkv_pin {
  uint64_t id;
  uint64_t tokens;  // the prefix of the prompt that the tier alone can serve, and will
  uint64_t blocks;
} hkv_pin;

// Keeps what a tier (enum hkv_tier) has of a prompt there until hkv_manager_unpin, or until the
// tier is cleared.
hkv_status hkv_manager_pin(hkv_manager* manager, uint32_t tier, const uint32_t* tokens,
                           uint64_t num_tokens, const char* salt, const char* lora, hkv_pin* pin);
hkv_status hkv_manager_unpin(hkv_manager* manager, uint64_t pin);

// Limits what the blocks of a salt, of block_bytes each, may take of the host or the storage tier;
// with UINT64_MAX bytes no longer.
hkv_status hkv_manager_set_quota(hkv_manager* manager, uint32_t tier, const char* salt,
                                 uint64_t bytes, uint64_t block_bytes);

// Says what time it is, in nanoseconds of any clock.
hkv_status hkv_manager_tick(hkv_manager* manager, uint64_t now);

// Starts (on: 1) or stops the recording of events; takes the oldest, up to so many.
hkv_status hkv_manager_record_events(hkv_manager* manager, uint32_t on);
hkv_status hkv_manager_events(hkv_manager* manager, hkv_event* events, uint64_t max, uint64_t* num);

// All counters ("stats"), how full the tiers are ("usage") and the bytes of what is kept per block
// and sequence ("metadata") as a JSON object, and the same counters as Prometheus text. size tells
// the bytes with the terminating zero; the text is written when max bytes are enough for it,
// nothing otherwise, and text may be NULL with a max of 0.
hkv_status hkv_manager_stats(const hkv_manager* manager, char* text, uint64_t max, uint64_t* size);
hkv_status hkv_manager_prometheus(const hkv_manager* manager, char* text, uint64_t max,
                                  uint64_t* size);

#ifdef __cplusplus
}
#endif

#endif  // HYBRIDKV_H_
