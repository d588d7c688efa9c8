// Drives every operation of the C ABI on the CPU device: results against sums in double precision,
// and every kind of error a caller can make. Prints what is wrong and exits with 1.
#include <hybridkv.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

#define BLOCK_SIZE 16
#define NUM_BLOCKS 8
#define KV_HEADS 2
#define QO_HEADS 6
#define HEAD_DIM 64
#define TOKENS 50
#define QUERIES 3
#define WINDOW 20
#define LAYERS 2
#define GROUPS 2

// Small multiples of 1/16, which bf16 holds exactly: its upper half is the float.
static uint32_t state = 1;
static float draw(void) {
  state = state * 1664525u + 1013904223u;
  return (float)((int)(state >> 24) % 33 - 16) / 16.0f;
}
static uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)(bits >> 16);
}
static float from_bf16(uint16_t value) {
  uint32_t bits = (uint32_t)value << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

static hkv_span span(const void* data, size_t bytes) {
  hkv_span result;
  result.data = (void*)(uintptr_t)data;
  result.bytes = bytes;
  return result;
}
#define SPAN(array) span(array, sizeof(array))

// [block][K|V][head][token][dim], one layer slot.
static uint16_t pool[NUM_BLOCKS][2][KV_HEADS][BLOCK_SIZE][HEAD_DIM];
static uint16_t k_new[TOKENS][KV_HEADS][HEAD_DIM], v_new[TOKENS][KV_HEADS][HEAD_DIM];
static uint16_t q[QUERIES][QO_HEADS][HEAD_DIM], out[QUERIES][QO_HEADS][HEAD_DIM];
static float lse[QUERIES][QO_HEADS];
static int64_t slots[GROUPS][TOKENS];

// Layer 0 sees everything; layer 1 a window, whose first block is gone already.
static const hkv_window windows[LAYERS] = {
    {HKV_LAYER_FULL, 0, 0, 0, 0, {0, 0, 0}},
    {HKV_LAYER_SLIDING, WINDOW, 0, 1, 0, {0, 0, 0}},
};
static const int32_t block_ids[] = {5, 2, 7, 0, /* group 1: */ 1, 6, 3};
static const int64_t block_row[GROUPS] = {0, 4};
static const int32_t first_block[GROUPS] = {0, 1};

static hkv_kv kv_view(void) {
  hkv_kv kv;
  memset(&kv, 0, sizeof kv);
  kv.k = SPAN(pool);
  kv.v = span(&pool[0][1], sizeof pool - sizeof pool[0][0]);
  kv.stride_block = 2 * KV_HEADS * BLOCK_SIZE * HEAD_DIM;
  kv.stride_layer = kv.stride_block;
  kv.stride_head = BLOCK_SIZE * HEAD_DIM;
  kv.stride_token = HEAD_DIM;
  kv.num_blocks = NUM_BLOCKS;
  kv.num_layer_slots = 1;
  kv.block_size = BLOCK_SIZE;
  kv.num_kv_heads = KV_HEADS;
  kv.head_dim = HEAD_DIM;
  kv.dtype = HKV_DTYPE_BF16;
  return kv;
}

static hkv_append_args append_args(void) {
  hkv_append_args args;
  memset(&args, 0, sizeof args);
  args.struct_bytes = sizeof args;
  args.kv = kv_view();
  args.k_new = SPAN(k_new);
  args.v_new = SPAN(v_new);
  args.new_strides.token = KV_HEADS * HEAD_DIM;
  args.new_strides.head = HEAD_DIM;
  args.slot_mapping = SPAN(slots);
  args.windows = SPAN(windows);
  args.num_groups = GROUPS;
  args.num_layers = LAYERS;
  args.num_tokens = TOKENS;
  args.dtype = HKV_DTYPE_BF16;
  return args;
}

static const int32_t qo_indptr[] = {0, QUERIES};
static const int32_t kv_len[] = {TOKENS};

static hkv_attention_args attention_args(uint32_t layer) {
  hkv_attention_args args;
  memset(&args, 0, sizeof args);
  args.struct_bytes = sizeof args;
  args.kv = kv_view();
  args.q = SPAN(q);
  args.out = SPAN(out);
  args.q_strides.token = args.out_strides.token = QO_HEADS * HEAD_DIM;
  args.q_strides.head = args.out_strides.head = HEAD_DIM;
  args.lse = SPAN(lse);
  args.qo_indptr = SPAN(qo_indptr);
  args.kv_len = SPAN(kv_len);
  args.block_ids = SPAN(block_ids);
  args.block_row = SPAN(block_row);
  args.first_block = SPAN(first_block);
  args.windows = SPAN(windows);
  args.num_groups = GROUPS;
  args.num_layers = LAYERS;
  args.layer = layer;
  args.num_seqs = 1;
  args.num_tokens = QUERIES;
  args.num_qo_heads = QO_HEADS;
  args.max_q_len = QUERIES;
  args.max_kv_len = TOKENS;
  args.sm_scale = 0.125f;
  args.dtype = HKV_DTYPE_BF16;
  return args;
}

// Attention of query (t, h) to the keys first .. end: the output in `o`, the LSE as the result.
static double attend(int t, int h, int first, int end, double o[HEAD_DIM]) {
  double logits[TOKENS], sum = 0, top = -INFINITY;
  int kv_head = h / (QO_HEADS / KV_HEADS);
  for (int j = first; j < end; j++) {
    double dot = 0;
    for (int d = 0; d < HEAD_DIM; d++) {
      dot += (double)from_bf16(q[t][h][d]) * (double)from_bf16(k_new[j][kv_head][d]);
    }
    logits[j] = dot * 0.125;
    top = logits[j] > top ? logits[j] : top;
  }
  for (int d = 0; d < HEAD_DIM; d++) o[d] = 0;
  for (int j = first; j < end; j++) {
    double weight = exp(logits[j] - top);
    sum += weight;
    for (int d = 0; d < HEAD_DIM; d++) o[d] += weight * (double)from_bf16(v_new[j][kv_head][d]);
  }
  for (int d = 0; d < HEAD_DIM; d++) o[d] /= sum;
  return top + log(sum);
}

static void test_append(const hkv_kernels* kernels) {
  for (int t = 0; t < TOKENS; t++) {
    int block = t / BLOCK_SIZE;
    slots[0][t] = (int64_t)block_ids[block] * BLOCK_SIZE + t % BLOCK_SIZE;
    slots[1][t] = block < 1 ? -1 : (int64_t)block_ids[3 + block] * BLOCK_SIZE + t % BLOCK_SIZE;
    for (int h = 0; h < KV_HEADS; h++) {
      for (int d = 0; d < HEAD_DIM; d++) {
        k_new[t][h][d] = to_bf16(draw());
        v_new[t][h][d] = to_bf16(draw());
      }
    }
  }
  memset(pool, 0xff, sizeof pool);  // NaN
  hkv_append_args args = append_args();
  for (args.layer = 0; args.layer < LAYERS; args.layer++) {
    CHECK(hkv_append(kernels, &args, NULL) == HKV_OK);
  }
  int wrong = 0, untouched = 0;
  for (int t = 0; t < TOKENS; t++) {
    for (int h = 0; h < KV_HEADS; h++) {
      for (int g = 0; g < GROUPS; g++) {
        if (slots[g][t] < 0) continue;
        int64_t block = slots[g][t] / BLOCK_SIZE, offset = slots[g][t] % BLOCK_SIZE;
        wrong += memcmp(pool[block][0][h][offset], k_new[t][h], sizeof k_new[t][h]) != 0;
        wrong += memcmp(pool[block][1][h][offset], v_new[t][h], sizeof v_new[t][h]) != 0;
      }
    }
  }
  for (int d = 0; d < HEAD_DIM; d++) untouched += pool[4][0][0][0][d] == 0xffff;
  CHECK(wrong == 0);
  CHECK(untouched == HEAD_DIM);

  args.layer = 0;
  args.num_tokens = 0;
  CHECK(hkv_append(kernels, &args, NULL) == HKV_OK);
  args = append_args();
  args.layer = LAYERS;
  CHECK_ERROR(hkv_append(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "layer 2");
  args = append_args();
  args.kv.v.bytes -= 2;
  CHECK_ERROR(hkv_append(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "V buffer");
  args = append_args();
  args.k_new.data = (char*)args.k_new.data + 2;
  CHECK_ERROR(hkv_append(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "aligned");
  args = append_args();
  args.kv.block_size = 24;
  CHECK_ERROR(hkv_append(kernels, &args, NULL), HKV_UNSUPPORTED, "8, 16, 32, 64, 128");
  args = append_args();
  args.kv.dtype = HKV_DTYPE_E4M3;
  CHECK_ERROR(hkv_append(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "without scales");
  args.kv.k_scale = SPAN(lse);
  CHECK_ERROR(hkv_append(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "kv.v_scale");
  args = append_args();
  args.kv.dtype = 77;
  CHECK_ERROR(hkv_append(kernels, &args, NULL), HKV_UNSUPPORTED, "77");
  args.struct_bytes = 8;
  CHECK_ERROR(hkv_append(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "struct_bytes is 8");
  CHECK_ERROR(hkv_append(kernels, NULL, NULL), HKV_INVALID_ARGUMENT, "args is null");
  CHECK_ERROR(hkv_append(NULL, &args, NULL), HKV_INVALID_ARGUMENT, "kernels is null");
}

static void test_attention(const hkv_kernels* kernels) {
  for (int t = 0; t < QUERIES; t++) {
    for (int h = 0; h < QO_HEADS; h++) {
      for (int d = 0; d < HEAD_DIM; d++) q[t][h][d] = to_bf16(draw());
    }
  }
  for (uint32_t layer = 0; layer < LAYERS; layer++) {
    hkv_attention_args args = attention_args(layer);
    uint64_t bytes = ~(uint64_t)0;
    CHECK(hkv_attention_workspace(kernels, &args, &bytes) == HKV_OK);
    // With a plan, as a window class of its own.
    hkv_plan_args plan;
    memset(&plan, 0, sizeof plan);
    plan.struct_bytes = sizeof plan;
    plan.classes = &args;
    plan.num_classes = 1;
    plan.batch_invariant = layer;
    CHECK(hkv_plan_memory(kernels, &plan, &bytes) == HKV_OK && bytes > 0);
    void* plan_memory = calloc((size_t)bytes, 1);
    plan.memory = span(plan_memory, (size_t)bytes - 1);
    CHECK_ERROR(hkv_plan(kernels, &plan, NULL), HKV_INVALID_ARGUMENT, "the plan's memory");
    plan.memory.bytes++;
    CHECK(hkv_plan(kernels, &plan, NULL) == HKV_OK);
    hkv_class_plan class_plan;
    CHECK_ERROR(hkv_planned(kernels, &plan, 1, &class_plan), HKV_INVALID_ARGUMENT, "class 1 of 1");
    CHECK_ERROR(hkv_planned(kernels, &plan, 0, NULL), HKV_INVALID_ARGUMENT, "plan is null");
    CHECK(hkv_planned(kernels, &plan, 0, &class_plan) == HKV_OK);
    args.plan = class_plan;
    args.plan.reads_early = 1;
    CHECK(hkv_attention_workspace(kernels, &args, &bytes) == HKV_OK);
    void* workspace = malloc((size_t)bytes + 1);
    args.workspace = span(workspace, (size_t)bytes);
    memset(out, 0xff, sizeof out);
    CHECK(hkv_attention(kernels, &args, NULL) == HKV_OK);
    args.plan.num_seqs = 2;
    CHECK_ERROR(hkv_attention(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "the plan is of 2");
    plan.classes = NULL;
    CHECK_ERROR(hkv_plan(kernels, &plan, NULL), HKV_INVALID_ARGUMENT, "null");
    free(workspace);
    free(plan_memory);
    double error = 0, norm = 0, lse_error = 0;
    for (int t = 0; t < QUERIES; t++) {
      int position = TOKENS - QUERIES + t;
      int first = layer == 1 ? position - WINDOW + 1 : 0;
      for (int h = 0; h < QO_HEADS; h++) {
        double o[HEAD_DIM];
        double expected = attend(t, h, first, position + 1, o);
        lse_error = fmax(lse_error, fabs(expected - (double)lse[t][h]));
        for (int d = 0; d < HEAD_DIM; d++) {
          double difference = (double)from_bf16(out[t][h][d]) - o[d];
          error += difference * difference;
          norm += o[d] * o[d];
        }
      }
    }
    CHECK(sqrt(error / norm) < 4e-3);
    CHECK(lse_error < 1e-3);
  }

  hkv_attention_args args = attention_args(0);
  args.num_seqs = args.num_tokens = 0;
  CHECK(hkv_attention(kernels, &args, NULL) == HKV_OK);
  args = attention_args(0);
  args.kv.head_dim = 80;
  CHECK_ERROR(hkv_attention(kernels, &args, NULL), HKV_UNSUPPORTED, "64, 128, 256");
  args = attention_args(0);
  args.num_qo_heads = 5;
  CHECK_ERROR(hkv_attention(kernels, &args, NULL), HKV_UNSUPPORTED, "num_qo_heads 5");
  args = attention_args(0);
  args.kv_len.data = NULL;
  CHECK_ERROR(hkv_attention(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "kv_len");
  args = attention_args(0);
  CHECK_ERROR(hkv_attention_workspace(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "bytes is null");
}

// The states of the first 32 keys and of the rest make the state of all.
static void test_merge(const hkv_kernels* kernels) {
  static float states[2][QUERIES][QO_HEADS][HEAD_DIM], merged[QUERIES][QO_HEADS][HEAD_DIM];
  static float state_lse[2][QUERIES][QO_HEADS];
  hkv_merge_args args;
  memset(&args, 0, sizeof args);
  args.struct_bytes = sizeof args;
  args.states = SPAN(states);
  args.state_lse = SPAN(state_lse);
  args.out = SPAN(merged);
  args.out_strides.token = QO_HEADS * HEAD_DIM;
  args.out_strides.head = HEAD_DIM;
  args.lse = SPAN(lse);
  args.in_dtype = args.out_dtype = HKV_DTYPE_F32;
  args.num_states = 2;
  args.num_tokens = QUERIES;
  args.num_qo_heads = QO_HEADS;
  args.head_dim = HEAD_DIM;
  for (int t = 0; t < QUERIES; t++) {
    for (int h = 0; h < QO_HEADS; h++) {
      for (int i = 0; i < 2; i++) {
        double o[HEAD_DIM];
        state_lse[i][t][h] = (float)attend(t, h, i == 0 ? 0 : 32, i == 0 ? 32 : TOKENS, o);
        for (int d = 0; d < HEAD_DIM; d++) states[i][t][h][d] = (float)o[d];
      }
    }
  }
  CHECK(hkv_merge_states(kernels, &args, NULL) == HKV_OK);
  double worst = 0;
  for (int t = 0; t < QUERIES; t++) {
    for (int h = 0; h < QO_HEADS; h++) {
      double o[HEAD_DIM];
      worst = fmax(worst, fabs(attend(t, h, 0, TOKENS, o) - (double)lse[t][h]));
      for (int d = 0; d < HEAD_DIM; d++) worst = fmax(worst, fabs(o[d] - (double)merged[t][h][d]));
    }
  }
  CHECK(worst < 1e-5);
  args.states.bytes -= 4;
  CHECK_ERROR(hkv_merge_states(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "states");
}

static void test_move(const hkv_kernels* kernels) {
  // Fragments are 16-byte aligned: rows of the pool are.
  unsigned char* source = (unsigned char*)pool[0];
  unsigned char* target = (unsigned char*)pool[1];
  hkv_copy copies[2];
  copies[0].src = source;
  copies[0].dst = target + 64;
  copies[0].bytes = 32;
  copies[1].src = source + 128;
  copies[1].dst = target;
  copies[1].bytes = 48;
  for (int i = 0; i < 256; i++) {
    source[i] = (unsigned char)i;
    target[i] = 0;
  }
  hkv_move_args args;
  memset(&args, 0, sizeof args);
  args.struct_bytes = sizeof args;
  args.copies = SPAN(copies);
  args.num_copies = 2;
  CHECK(hkv_move_blocks(kernels, &args, NULL) == HKV_OK);
  CHECK(memcmp(target, source + 128, 48) == 0);
  CHECK(memcmp(target + 64, source, 32) == 0);
  CHECK(target[48] == 0 && target[63] == 0 && target[96] == 0);
  args.num_copies = 3;
  CHECK_ERROR(hkv_move_blocks(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "72");
}

// [layer][K|V][head][token][dim] of one block of a pool of two layer slots, of which the second is
// encoded.
#define BLOCK_ELEMENTS (2 * KV_HEADS * BLOCK_SIZE * HEAD_DIM)
static uint16_t codec_pool[NUM_BLOCKS][2][BLOCK_ELEMENTS];
// Slots are at multiples of 16 bytes.
static uint64_t slot_memory[2][BLOCK_ELEMENTS / 4 + 64];
static hkv_slot_result slot_results[2];

static hkv_codec_args codec_args(const hkv_slot_block* rows) {
  hkv_codec_args args;
  memset(&args, 0, sizeof args);
  args.struct_bytes = sizeof args;
  args.kv = kv_view();
  args.kv.k = SPAN(codec_pool);
  args.kv.v = span(&codec_pool[0][0][BLOCK_ELEMENTS / 2], sizeof codec_pool - BLOCK_ELEMENTS);
  args.kv.stride_block = 2 * BLOCK_ELEMENTS;
  args.kv.stride_layer = BLOCK_ELEMENTS;
  args.kv.num_layer_slots = 2;
  args.blocks = span(rows, 2 * sizeof *rows);
  args.results = SPAN(slot_results);
  args.num_blocks = 2;
  args.codec = HKV_CODEC_LX4;
  args.first_layer_slot = 1;
  args.num_layers = 1;
  args.max_ctas = 4;
  return args;
}

static void test_codec(const hkv_kernels* kernels, int checked) {
  static uint16_t before[NUM_BLOCKS][2][BLOCK_ELEMENTS], decoded[BLOCK_ELEMENTS];
  static uint64_t one[BLOCK_ELEMENTS / 4 + 64];
  static const int64_t named[2] = {6, 1};
  const hkv_geometry geometry = {1, KV_HEADS, HEAD_DIM, BLOCK_SIZE, HKV_DTYPE_BF16};
  uint16_t* elements = &codec_pool[0][0][0];
  // None is zero: lx4 lists zeros apart, and these would be more than a slot has room for.
  for (size_t i = 0; i < sizeof codec_pool / sizeof *elements; i++) {
    elements[i] = to_bf16(draw() + 1.0625f);
  }
  memcpy(before, codec_pool, sizeof before);
  hkv_slot_block rows[2];
  for (int i = 0; i < 2; i++) {
    rows[i].block = named[i];
    rows[i].slot = slot_memory[i];
  }
  uint64_t bytes = 0;
  for (uint32_t codec = HKV_CODEC_RAW; codec <= HKV_CODEC_INT4; codec++) {
    if (strcmp(hkv_codec_name(codec), "unknown codec") == 0) continue;
    uint32_t number = 77;
    CHECK(hkv_codec_by_name(hkv_codec_name(codec), &number) == HKV_OK && number == codec);
    CHECK(hkv_slot_bytes(codec, &geometry, &bytes) == HKV_OK && bytes <= sizeof one);
    hkv_codec_args args = codec_args(rows);
    args.codec = codec;
    if (codec == HKV_CODEC_LXE) {
      CHECK_ERROR(hkv_encode(kernels, &args, NULL), HKV_UNSUPPORTED, "a kernel for lxe");
      hkv_slot_header header;
      hkv_slot_result result;
      CHECK(hkv_slot_encode(codec, &geometry, before[0][1], BLOCK_ELEMENTS, one, bytes, &result) ==
            HKV_OK);
      CHECK(result.status == HKV_SLOT_OK && hkv_slot_verify(&geometry, one, bytes, &header) == HKV_OK);
      CHECK(header.hash == result.hash && header.bytes < bytes);
      CHECK(hkv_slot_decode(&geometry, one, header.bytes, decoded, BLOCK_ELEMENTS, NULL) == HKV_OK);
      CHECK(memcmp(decoded, before[0][1], sizeof decoded) == 0);
      continue;
    }
    CHECK(hkv_encode(kernels, &args, NULL) == HKV_OK);
    for (int i = 0; i < 2; i++) {
      hkv_slot_result result;
      hkv_slot_header header, verified;
      const uint16_t* block = codec_pool[named[i]][1];
      CHECK(slot_results[i].status == HKV_SLOT_OK);
      CHECK(hkv_slot_encode(codec, &geometry, block, BLOCK_ELEMENTS, one, bytes, &result) ==
            HKV_OK);
      CHECK(result.status == HKV_SLOT_OK && result.hash == slot_results[i].hash);
      CHECK(memcmp(one, slot_memory[i], (size_t)bytes) == 0);
      CHECK(hkv_slot_inspect(one, 32, &header) == HKV_OK);
      CHECK(header.codec == codec && header.version == 1 && header.bytes == bytes);
      CHECK(header.hash == result.hash && header.escapes == result.escapes && header.reserved == 0);
      CHECK(memcmp(&header.geometry, &geometry, sizeof geometry) == 0);
      CHECK(hkv_slot_verify(&geometry, one, bytes, &verified) == HKV_OK);
      CHECK(memcmp(&header, &verified, sizeof header) == 0);
      CHECK(hkv_slot_decode(&geometry, one, bytes, decoded, BLOCK_ELEMENTS, NULL) == HKV_OK);
      memset(codec_pool[named[i]][1], 0xff, sizeof decoded);
      if (codec <= HKV_CODEC_LX4) CHECK(memcmp(decoded, before[named[i]][1], sizeof decoded) == 0);
    }
    CHECK(hkv_decode(kernels, &args, NULL) == HKV_OK);
    CHECK(slot_results[0].status == HKV_SLOT_OK && slot_results[1].status == HKV_SLOT_OK);
    CHECK(memcmp(codec_pool[named[1]][1], decoded, sizeof decoded) == 0);
    slot_memory[0][9] ^= 1;
    CHECK(hkv_decode(kernels, &args, NULL) == HKV_OK);
    CHECK(slot_results[0].status == HKV_SLOT_CORRUPT && slot_results[1].status == HKV_SLOT_OK);
    for (int i = 0; i < 2; i++)
      memcpy(codec_pool[named[i]][1], before[named[i]][1], sizeof decoded);
    CHECK(memcmp(codec_pool, before, sizeof before) == 0);
  }

  // Blocks that a slot does not hold.
  hkv_codec_args args = codec_args(rows);
  args.codec = HKV_CODEC_INT8;
  codec_pool[6][1][3] = 0x7f80;  // infinity
  CHECK(hkv_encode(kernels, &args, NULL) == HKV_OK);
  CHECK(slot_results[0].status == HKV_SLOT_NOT_FINITE && slot_results[0].hash == 0);
  for (int i = 0; i < BLOCK_ELEMENTS; i++) codec_pool[6][1][i] = (uint16_t)(i << 7);
  hkv_slot_result result;
  CHECK(hkv_slot_encode(HKV_CODEC_LX4, &geometry, codec_pool[6][1], BLOCK_ELEMENTS, one, sizeof one,
                        &result) == HKV_OK);
  CHECK(result.status == HKV_SLOT_ESCAPES && result.escapes > 0 && result.hash == 0);
  memcpy(codec_pool, before, sizeof before);

  // What no caller may ask for.
  args = codec_args(rows);
  args.codec = 9;
  CHECK_ERROR(hkv_encode(kernels, &args, NULL), HKV_UNSUPPORTED, "codec 9");
  args = codec_args(rows);
  args.first_layer_slot = 2;
  CHECK_ERROR(hkv_decode(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "layer slots 2..3");
  args = codec_args(rows);
  args.num_layers = 0;
  CHECK_ERROR(hkv_encode(kernels, &args, NULL), HKV_UNSUPPORTED, "0 layers");
  args = codec_args(rows);
  args.num_blocks = 3;
  CHECK_ERROR(hkv_encode(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "the rows");
  args = codec_args(rows);
  args.results.bytes--;
  CHECK_ERROR(hkv_decode(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "the results");
  args = codec_args(rows);
  args.struct_bytes--;
  CHECK_ERROR(hkv_encode(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "struct_bytes");
  CHECK_ERROR(hkv_decode(NULL, &args, NULL), HKV_INVALID_ARGUMENT, "kernels is null");
  args = codec_args(rows);
  args.num_blocks = 0;
  CHECK(hkv_encode(kernels, &args, NULL) == HKV_OK);
  rows[0].block = NUM_BLOCKS;
  args = codec_args(rows);
  if (checked) {
    CHECK_ERROR(hkv_encode(kernels, &args, NULL), HKV_INVALID_ARGUMENT, "row 0 names block 8");
  }
}

// Slots on the host that are not what they should be.
static void test_slots(void) {
  static uint16_t block[BLOCK_ELEMENTS], decoded[BLOCK_ELEMENTS];
  static uint64_t slot[BLOCK_ELEMENTS / 4 + 64];
  unsigned char* bytes_of = (unsigned char*)slot;
  const hkv_geometry geometry = {1, KV_HEADS, HEAD_DIM, BLOCK_SIZE, HKV_DTYPE_BF16};
  hkv_geometry other = geometry;
  hkv_slot_result result;
  hkv_slot_header header;
  uint64_t bytes;
  uint32_t codec;
  for (int i = 0; i < BLOCK_ELEMENTS; i++) block[i] = to_bf16(draw());
  CHECK(hkv_slot_bytes(HKV_CODEC_INT6, &geometry, &bytes) == HKV_OK);
  CHECK(hkv_slot_encode(HKV_CODEC_INT6, &geometry, block, BLOCK_ELEMENTS, slot, bytes, &result) ==
        HKV_OK);
  memset(decoded, 0x55, sizeof decoded);
  for (uint64_t i = 0; i < bytes; i += 5) {
    bytes_of[i] ^= (unsigned char)(1u << i % 8);
    CHECK(hkv_slot_decode(&geometry, slot, bytes, decoded, BLOCK_ELEMENTS, &header) == HKV_CORRUPT);
    CHECK(hkv_slot_verify(&geometry, slot, bytes, NULL) == HKV_CORRUPT);
    bytes_of[i] ^= (unsigned char)(1u << i % 8);
  }
  CHECK_ERROR(hkv_slot_verify(&geometry, slot, bytes - 1, NULL), HKV_CORRUPT, "truncated");
  CHECK_ERROR(hkv_slot_inspect(slot, 31, &header), HKV_CORRUPT, "31 bytes");
  CHECK_ERROR(hkv_slot_inspect(block, sizeof block, &header), HKV_CORRUPT, "magic");
  other.num_layers = 2;
  CHECK_ERROR(hkv_slot_verify(&other, slot, bytes, NULL), HKV_CORRUPT, "2 layers");
  bytes_of[5]++;
  CHECK_ERROR(hkv_slot_inspect(slot, bytes, &header), HKV_CORRUPT, "version 2");
  bytes_of[5]--;
  CHECK_ERROR(hkv_slot_decode(&geometry, slot, bytes, decoded, BLOCK_ELEMENTS - 1, NULL),
              HKV_INVALID_ARGUMENT, "elements");
  int touched = 0;
  for (int i = 0; i < BLOCK_ELEMENTS; i++) touched += decoded[i] != 0x5555;
  CHECK(touched == 0);
  CHECK(hkv_slot_decode(&geometry, slot, bytes, decoded, BLOCK_ELEMENTS, &header) == HKV_OK);
  CHECK(header.codec == HKV_CODEC_INT6);

  other = geometry;
  other.dtype = HKV_DTYPE_F16;
  CHECK_ERROR(hkv_slot_bytes(HKV_CODEC_LX4, &other, &bytes), HKV_UNSUPPORTED, "f16");
  other.dtype = HKV_DTYPE_E4M3;
  CHECK_ERROR(hkv_slot_bytes(HKV_CODEC_RAW, &other, &bytes), HKV_UNSUPPORTED, "bf16, f16");
  CHECK_ERROR(hkv_slot_bytes(HKV_CODEC_RAW, NULL, &bytes), HKV_INVALID_ARGUMENT,
              "geometry is null");
  CHECK_ERROR(hkv_slot_bytes(HKV_CODEC_RAW, &geometry, NULL), HKV_INVALID_ARGUMENT,
              "bytes is null");
  CHECK_ERROR(hkv_slot_bytes(300, &geometry, &bytes), HKV_UNSUPPORTED, "codec 300");
  CHECK_ERROR(hkv_slot_encode(HKV_CODEC_RAW, &geometry, block, BLOCK_ELEMENTS, slot, 64, &result),
              HKV_INVALID_ARGUMENT, "a slot of 64 bytes");
  CHECK_ERROR(hkv_slot_encode(HKV_CODEC_RAW, &geometry, NULL, BLOCK_ELEMENTS, slot, 64, &result),
              HKV_INVALID_ARGUMENT, "elements is null");
  CHECK_ERROR(
      hkv_slot_encode(HKV_CODEC_RAW, &geometry, block, BLOCK_ELEMENTS, slot, sizeof slot, NULL),
      HKV_INVALID_ARGUMENT, "result is null");
  CHECK_ERROR(hkv_slot_inspect(NULL, 32, &header), HKV_INVALID_ARGUMENT, "null");
  CHECK_ERROR(hkv_slot_inspect(slot, 32, NULL), HKV_INVALID_ARGUMENT, "header is null");
  CHECK_ERROR(hkv_codec_by_name("zstd", &codec), HKV_UNSUPPORTED, "int6");
  CHECK_ERROR(hkv_codec_by_name("raw", NULL), HKV_INVALID_ARGUMENT, "codec is null");
}

// What only checking mode sees, since it is in device memory.
static void test_checked(const hkv_kernels* kernels) {
  hkv_append_args append = append_args();
  int64_t slot = slots[0][7];
  slots[0][7] = NUM_BLOCKS * BLOCK_SIZE;
  CHECK_ERROR(hkv_append(kernels, &append, NULL), HKV_INVALID_ARGUMENT, "token 7 has slot 128");
  slots[0][7] = slot;
  static const int32_t longer[] = {TOKENS + 2 * BLOCK_SIZE};
  hkv_attention_args attention = attention_args(0);
  attention.kv_len = SPAN(longer);
  attention.max_kv_len = longer[0];
  CHECK_ERROR(hkv_attention(kernels, &attention, NULL), HKV_INVALID_ARGUMENT, "block");
}

int main(void) {
  hkv_device* device = NULL;
  hkv_kernels* kernels = NULL;
  CHECK(hkv_abi_version() == HKV_ABI_VERSION);
  CHECK(strchr(hkv_version(), '.') != NULL);
  CHECK(strcmp(hkv_last_error(), "") == 0);
  CHECK(strcmp(hkv_status_name(HKV_NO_DRIVER), "HKV_NO_DRIVER") == 0);

  hkv_status status = hkv_device_cuda(1000, &device);
  CHECK((status == HKV_NO_DRIVER || status == HKV_NO_DEVICE) && device == NULL);
  CHECK(strlen(hkv_last_error()) > 0);
  CHECK_ERROR(hkv_device_cpu(NULL), HKV_INVALID_ARGUMENT, "null");
  CHECK_ERROR(hkv_kernels_load(NULL, &kernels), HKV_INVALID_ARGUMENT, "device is null");

  CHECK(hkv_device_cpu(&device) == HKV_OK);
  CHECK(strlen(hkv_device_name(device)) > 0);
  CHECK(hkv_kernels_load(device, &kernels) == HKV_OK);
  test_append(kernels);
  test_attention(kernels);
  test_merge(kernels);
  test_move(kernels);
  test_codec(kernels, 0);
  test_slots();
  hkv_kernels_destroy(kernels);

  CHECK(hkv_kernels_load_checked(device, &kernels) == HKV_OK);
  hkv_device_destroy(device);  // the kernels keep it
  test_append(kernels);
  test_attention(kernels);
  test_move(kernels);
  test_codec(kernels, 1);
  test_checked(kernels);
  hkv_kernels_destroy(kernels);
  hkv_device_destroy(NULL);
  hkv_kernels_destroy(NULL);
  printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
