// Moves blocks between two layouts through the C ABI on the CPU device: by the kernel and by a
// mover, against rows found one by one, and every kind of error a caller can make. Prints what is
// wrong and exits with 1.
#include <hybridkv.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "check.h"

#define BLOCKS 5
#define LAYERS 4
#define HEADS 2
#define TOKENS 8
#define ROW 32
#define OF_LAYER (2 * HEADS * TOKENS * ROW)
#define BLOCK (LAYERS * OF_LAYER)

// 16-byte aligned, with room beside the blocks.
static uint64_t pool_memory[2 + BLOCKS * BLOCK / 8 + 2];
static uint64_t host_memory[2 + BLOCKS * BLOCK / 8 + 2];
static uint64_t before[sizeof host_memory / 8];
static unsigned char* aligned(uint64_t* memory) {
  return (unsigned char*)memory + (16 - (uintptr_t)memory % 16) % 16;
}

static hkv_block_layout layout(uint32_t order) {
  hkv_block_layout result;
  memset(&result, 0, sizeof result);
  result.num_layers = LAYERS;
  result.num_parts = 2;
  result.num_kv_heads = HEADS;
  result.block_size = TOKENS;
  result.row_bytes = ROW;
  CHECK(hkv_block_layout_fill(order, &result) == HKV_OK);
  return result;
}

// Of the pool on the device: a tensor [layer][block][K|V][token][head]; of the host: whole blocks.
static int64_t row(const hkv_block_layout* l, int64_t block, int layer, int part, int head,
                   int token) {
  return block + layer * l->stride_layer + part * l->stride_part + head * l->stride_head +
         token * l->stride_token;
}

static void fill(uint64_t* memory, size_t words, uint64_t seed) {
  for (size_t i = 0; i < words; i++) memory[i] = (i ^ seed << 32) * 0x9e3779b97f4a7c15u;
}

// Layers 1 and 2 and tokens 3 to 7 of three blocks, to the host.
static void test_move(const hkv_kernels* kernels, hkv_mover* mover) {
  static const int from[] = {0, 3, 4}, to[] = {4, 2, 1};
  hkv_block_move_args args;
  memset(&args, 0, sizeof args);
  args.struct_bytes = sizeof args;
  args.src = layout(HKV_BLOCK_FIRST_NHD);
  args.src.stride_layer = BLOCKS * OF_LAYER;
  args.dst = layout(HKV_BLOCK_FIRST_HND);
  args.first_layer = 1;
  args.num_layers = 2;
  args.first_token = 3;
  args.num_tokens = 5;
  hkv_block_move* move = NULL;
  CHECK(hkv_block_move_create(kernels, &args, &move) == HKV_OK);

  fill(pool_memory, sizeof pool_memory / 8, 1);
  fill(host_memory, sizeof host_memory / 8, 2);
  memcpy(before, host_memory, sizeof before);
  unsigned char* expected =
      (unsigned char*)before + (aligned(host_memory) - (unsigned char*)host_memory);
  uint64_t src[3], dst[3];
  for (int i = 0; i < 3; i++) {
    src[i] = (uintptr_t)aligned(pool_memory) + (uint64_t)from[i] * OF_LAYER;
    dst[i] = (uintptr_t)aligned(host_memory) + (uint64_t)to[i] * BLOCK;
    for (int n = 0; n < 2 * 2 * HEADS * 5; n++) {
      int layer = 1 + n % 2, part = n / 2 % 2, head = n / 4 % HEADS, token = 3 + n / 4 / HEADS;
      memcpy(expected + row(&args.dst, to[i] * BLOCK, layer, part, head, token),
             aligned(pool_memory) + row(&args.src, from[i] * OF_LAYER, layer, part, head, token),
             ROW);
    }
  }
  hkv_copy copies[3];
  CHECK(hkv_block_move_copies(move, src, dst, 3, copies) == HKV_OK);
  if (mover == NULL) {
    hkv_move_args by_kernel;
    memset(&by_kernel, 0, sizeof by_kernel);
    by_kernel.struct_bytes = sizeof by_kernel;
    by_kernel.copies.data = copies;
    by_kernel.copies.bytes = sizeof copies;
    by_kernel.num_copies = 3;
    by_kernel.blocks = move;
    by_kernel.max_ctas = 4;
    CHECK(hkv_move_blocks(kernels, &by_kernel, NULL) == HKV_OK);
  } else {
    hkv_submit_args planned;
    memset(&planned, 0, sizeof planned);
    planned.struct_bytes = sizeof planned;
    planned.copies.data = copies;
    planned.copies.bytes = sizeof copies;
    planned.num_copies = 3;
    planned.blocks = move;
    planned.way = HKV_DEVICE_TO_HOST;
    CHECK(hkv_mover_submit(mover, &planned, NULL) == HKV_OK);
    planned.num_copies = 4;
    CHECK_ERROR(hkv_mover_submit(mover, &planned, NULL), HKV_INVALID_ARGUMENT, "72 bytes, 96");
    planned.num_copies = 0;
    planned.way = 7;
    CHECK_ERROR(hkv_mover_submit(mover, &planned, NULL), HKV_UNSUPPORTED, "way 7");
  }
  CHECK(memcmp(host_memory, before, sizeof before) == 0);
  hkv_block_move_destroy(move);
}

static void test_refusals(const hkv_kernels* kernels) {
  hkv_block_layout odd = layout(HKV_HEADS_OUTERMOST);
  CHECK_ERROR(hkv_block_layout_fill(9, &odd), HKV_UNSUPPORTED, "order 9");
  CHECK_ERROR(hkv_block_layout_fill(0, NULL), HKV_INVALID_ARGUMENT, "layout is null");
  odd.row_bytes = 40;
  CHECK_ERROR(hkv_block_layout_fill(0, &odd), HKV_UNSUPPORTED, "multiples of 16");

  hkv_block_move_args args;
  memset(&args, 0, sizeof args);
  hkv_block_move* move = NULL;
  CHECK_ERROR(hkv_block_move_create(kernels, &args, &move), HKV_INVALID_ARGUMENT, "struct_bytes");
  args.struct_bytes = sizeof args;
  args.src = args.dst = layout(HKV_BLOCK_FIRST_HND);
  args.num_tokens = TOKENS;
  CHECK_ERROR(hkv_block_move_create(kernels, &args, &move), HKV_INVALID_ARGUMENT, "is no part of");
  args.first_layer = 1;
  args.num_layers = UINT32_MAX;
  CHECK_ERROR(hkv_block_move_create(kernels, &args, &move), HKV_INVALID_ARGUMENT, "overflow");
  args.first_layer = 0;
  args.num_layers = LAYERS;
  args.dst.num_kv_heads = 1;
  CHECK_ERROR(hkv_block_move_create(kernels, &args, &move), HKV_INVALID_ARGUMENT, "at the source");
  CHECK(move == NULL);
  hkv_copy copy;
  uint64_t address = 0;
  CHECK_ERROR(hkv_block_move_copies(NULL, &address, &address, 1, &copy), HKV_INVALID_ARGUMENT,
              "move is null");

  hkv_mover* mover = NULL;
  CHECK_ERROR(hkv_mover_create(kernels, NULL, 1, 0, &mover), HKV_INVALID_ARGUMENT, "model is null");
  CHECK_ERROR(hkv_mover_submit(NULL, NULL, NULL), HKV_INVALID_ARGUMENT, "mover is null");
  CHECK_ERROR(hkv_link_model_calibrate(NULL, NULL), HKV_INVALID_ARGUMENT, "null");
}

int main(void) {
  hkv_device* device = NULL;
  hkv_kernels* kernels = NULL;
  hkv_link_model* model = NULL;
  hkv_mover* mover = NULL;
  CHECK(hkv_device_cpu(&device) == HKV_OK);
  CHECK(hkv_kernels_load(device, &kernels) == HKV_OK);
  test_move(kernels, NULL);
  CHECK(hkv_link_model_calibrate(kernels, &model) == HKV_OK);
  uint32_t ctas = 0;
  CHECK(hkv_link_model_quota(model, HKV_HOST_TO_DEVICE, 0, 1000, 4096000, &ctas) == HKV_OK);
  CHECK(ctas > 0);
  CHECK(hkv_mover_create(kernels, model, 3, 1, &mover) == HKV_OK);
  test_refusals(kernels);
  // The mover keeps what it was made of.
  hkv_link_model_destroy(model);
  hkv_kernels_destroy(kernels);
  CHECK(hkv_kernels_load_checked(device, &kernels) == HKV_OK);
  test_move(kernels, NULL);
  test_move(kernels, mover);
  hkv_mover_destroy(mover);
  hkv_kernels_destroy(kernels);
  hkv_device_destroy(device);
  hkv_mover_destroy(NULL);
  hkv_link_model_destroy(NULL);
  hkv_block_move_destroy(NULL);
  printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
