// A small conversation through the manager of the C ABI: a prompt is computed and stored on the
// host, pushed off the device by another one, and comes back, with a failed load in between. Prints
// what is wrong and exits with 1.
#include <hybridkv.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

#define MANY 256

static const char config[] =
    "{\"groups\": [{\"kind\": \"full\"}, {\"kind\": \"sliding\", \"window\": 20, \"block_size\": "
    "16}],"
    " \"num_blocks\": 17, \"max_model_len\": 128, \"in_flight_tokens\": 64,"
    " \"identity\": \"a test\", \"retention\": {\"interval\": null},"
    " \"host\": {\"num_slots\": 32, \"eviction\": \"reuse\"}}";

static uint32_t tokens[1024];

// Runs all transfers; the first of a direction fails if it is to. Gives what was said last.
static hkv_completion run(hkv_manager* manager, int fails, uint32_t direction) {
  hkv_transfer transfers[MANY];
  hkv_completion last = {HKV_COMPLETION_NONE, 0, 0, 0};
  uint64_t num = 1;
  while (num > 0) {
    CHECK(hkv_manager_transfers(manager, transfers, MANY, &num) == HKV_OK);
    for (uint64_t i = 0; i < num; i++) {
      hkv_completion completion;
      uint32_t succeeds = !(fails && transfers[i].direction == direction);
      fails = fails && succeeds;
      CHECK(hkv_manager_complete(manager, transfers[i].id, succeeds, &completion) == HKV_OK);
      while (completion.kind != HKV_COMPLETION_NONE) {
        last = completion;
        CHECK(hkv_manager_next_completion(manager, &completion) == HKV_OK);
      }
    }
  }
  return last;
}

static uint64_t hit(hkv_manager* manager, const uint32_t* prompt, const char* salt) {
  hkv_hit found = {0, 0, 0};
  CHECK(hkv_manager_lookup(manager, prompt, 65, salt, NULL, &found) == HKV_OK);
  CHECK(found.device_tokens <= found.host_tokens && found.host_tokens <= found.tokens);
  return found.tokens;
}

// Pushes everything off the device.
static void fill(hkv_manager* manager) {
  hkv_allocation allocation;
  uint64_t num = 7;
  CHECK(hkv_manager_allocate(manager, 99, tokens + 500, 128, 0, NULL, NULL, &allocation) == HKV_OK);
  CHECK(hkv_manager_abort(manager, 99, NULL, 0, &num) == HKV_OK && num == 0);
}

static void test_step(const hkv_manager* manager) {
  const hkv_slice slices[1] = {{1, 60, 4}};
  int32_t qo_indptr[2], kv_len[1], first_block[2];
  int64_t slot_mapping[2][4], block_row[2];
  uint32_t ids[16];
  uint64_t num = 0;
  hkv_step_args args;
  memset(&args, 0, sizeof args);
  CHECK_ERROR(hkv_manager_step(manager, &args, &num), HKV_INVALID_ARGUMENT, "struct_bytes");
  args.struct_bytes = sizeof args;
  args.seqs = slices;
  args.num_seqs = 1;
  args.num_groups = 2;
  args.num_tokens = 4;
  CHECK(hkv_manager_step(manager, &args, &num) == HKV_OK && num >= 6 && num <= 16);
  args.qo_indptr = qo_indptr;
  args.kv_len = kv_len;
  args.slot_mapping = slot_mapping[0];
  args.block_row = block_row;
  args.first_block = first_block;
  args.block_ids = ids;
  args.max_block_ids = 1;
  CHECK_ERROR(hkv_manager_step(manager, &args, &num), HKV_INVALID_ARGUMENT, "room for 1");
  args.max_block_ids = 16;
  CHECK(hkv_manager_step(manager, &args, &num) == HKV_OK);
  CHECK(qo_indptr[0] == 0 && qo_indptr[1] == 4 && kv_len[0] == 64);
  CHECK(block_row[0] == 0 && first_block[0] == 0 && block_row[1] == 4);
  for (int group = 0; group < 2; group++) {
    int64_t last = ids[block_row[group] + 3 - first_block[group]];
    for (int token = 0; token < 4; token++) {
      CHECK(slot_mapping[group][token] == last * 16 + 12 + token);
    }
  }
  args.num_tokens = 5;
  CHECK_ERROR(hkv_manager_step(manager, &args, &num), HKV_INVALID_ARGUMENT, "slices have 4");
}

static void test_conversation(hkv_manager* manager) {
  hkv_allocation allocation;
  hkv_event events[MANY];
  uint64_t num = 0, stored = 0;
  CHECK(hkv_manager_record_events(manager, 1) == HKV_OK);
  CHECK(hit(manager, tokens, NULL) == 0);
  CHECK(hkv_manager_allocate(manager, 1, tokens, 64, 0, NULL, NULL, &allocation) == HKV_OK);
  CHECK(allocation.hit_tokens == 0 && allocation.num_tokens == 64 && allocation.num_loads == 0);
  test_step(manager);
  CHECK(hkv_manager_advance(manager, 1, 64, 64) == HKV_OK);
  CHECK(hkv_manager_append(manager, 1, tokens + 64, 1) == HKV_OK);
  CHECK(run(manager, 0, 0).kind == HKV_COMPLETION_NONE);
  CHECK(hkv_manager_free(manager, 1) == HKV_OK);
  CHECK(hit(manager, tokens, NULL) == 64 && hit(manager, tokens, "another tenant") == 0);
  do {
    CHECK(hkv_manager_events(manager, events, 2, &num) == HKV_OK && num <= 2);
    for (uint64_t i = 0; i < num; i++)
      stored += events[i].kind == HKV_STORED && events[i].group == 0;
  } while (num > 0);
  CHECK(stored == 8);

  // It comes back, and the next turn goes on behind it.
  fill(manager);
  CHECK(hkv_manager_allocate(manager, 2, tokens, 65, 0, "", "", &allocation) == HKV_OK);
  CHECK(allocation.hit_tokens == 64 && allocation.device_hit_tokens == 0);
  CHECK(allocation.host_hit_tokens == 64 && allocation.num_loads > 0);
  CHECK_ERROR(hkv_manager_advance(manager, 2, 65, 64), HKV_INVALID_ARGUMENT, "waits for");
  CHECK_ERROR(hkv_manager_overlap(manager, 2), HKV_NOT_READY, "transfer");
  hkv_completion ready = run(manager, 0, 0);
  CHECK(ready.kind == HKV_COMPLETION_READY && ready.seq == 2 && ready.valid_tokens == 64);
  CHECK(hkv_manager_advance(manager, 2, 65, 65) == HKV_OK);
  CHECK(run(manager, 0, 0).kind == HKV_COMPLETION_NONE);
  CHECK(hkv_manager_free(manager, 2) == HKV_OK);

  // A step that ran behind a load which fails is void.
  fill(manager);
  hkv_transfer loads[MANY];
  CHECK(hkv_manager_allocate(manager, 3, tokens, 65, 1, NULL, NULL, &allocation) == HKV_OK);
  CHECK(hkv_manager_transfers(manager, loads, MANY, &num) == HKV_OK && num == allocation.num_loads);
  CHECK(hkv_manager_overlap(manager, 3) == HKV_OK);
  CHECK(hkv_manager_advance(manager, 3, 65, 64) == HKV_OK);
  hkv_completion last = {HKV_COMPLETION_NONE, 0, 0, 0};
  for (uint64_t i = 0; i < num; i++) {
    CHECK(loads[i].direction == HKV_ONBOARD && loads[i].has_seq == 1 && loads[i].seq == 3);
    CHECK(hkv_manager_complete(manager, loads[i].id, i > 0, &last) == HKV_OK);
  }
  CHECK(last.kind == HKV_COMPLETION_VOID && last.seq == 3);
  CHECK_ERROR(hkv_manager_free(manager, 3), HKV_INVALID_ARGUMENT, "not known");
  CHECK_ERROR(hkv_manager_complete(manager, loads[0].id, 1, &last), HKV_INVALID_ARGUMENT, "");
}

static void test_pins_and_quotas(hkv_manager* manager) {
  hkv_pin pin = {0, 0, 0};
  CHECK(hkv_manager_pin(manager, HKV_HOST, tokens, 64, NULL, NULL, &pin) == HKV_OK);
  CHECK(pin.tokens <= 64 && (pin.blocks > 0) == (pin.tokens > 0));
  CHECK(hkv_manager_unpin(manager, pin.id) == HKV_OK);
  CHECK_ERROR(hkv_manager_unpin(manager, pin.id), HKV_INVALID_ARGUMENT, "not known");
  CHECK_ERROR(hkv_manager_pin(manager, 3, tokens, 64, NULL, NULL, &pin), HKV_UNSUPPORTED, "tier 3");
  CHECK(hkv_manager_set_quota(manager, HKV_HOST, "t", 8192, 4096) == HKV_OK);
  CHECK(hkv_manager_set_quota(manager, HKV_HOST, "t", UINT64_MAX, 4096) == HKV_OK);
  CHECK_ERROR(hkv_manager_set_quota(manager, HKV_HOST, "t", 4095, 4096), HKV_INVALID_ARGUMENT,
              "holds no block");
  CHECK_ERROR(hkv_manager_set_quota(manager, HKV_DEVICE, "t", 4096, 4096), HKV_UNSUPPORTED,
              "device");
}

// Forks, cuts, a swap out and in again; sequence 20 has 40 computed tokens.
static void test_branches(hkv_manager* manager) {
  hkv_allocation allocation;
  hkv_block_copy copies[4];
  hkv_preemption kept;
  uint64_t shared = 0, num = 0, others[4];
  CHECK(hkv_manager_allocate(manager, 20, tokens + 300, 40, 0, NULL, NULL, &allocation) == HKV_OK);
  CHECK(hkv_manager_advance(manager, 20, 40, 40) == HKV_OK);
  CHECK(hkv_manager_reserve(manager, 20, 64) == HKV_OK);
  CHECK_ERROR(hkv_manager_reserve(manager, 20, UINT64_MAX), HKV_INVALID_ARGUMENT, "128");
  CHECK(hkv_manager_fork(manager, 20, 21, &shared) == HKV_OK && shared == 40);
  CHECK_ERROR(hkv_manager_fork(manager, 20, 21, &shared), HKV_INVALID_ARGUMENT, "21");
  CHECK(hkv_manager_append(manager, 21, tokens, 1) == HKV_OK);
  CHECK(hkv_manager_copies(manager, copies, 4, &num) == HKV_OK && num == 2);
  CHECK(hkv_manager_rollback(manager, 21, 40, others, 4, &num) == HKV_OK && num == 0);
  CHECK(hkv_manager_trim(manager, 21, 39, others, 4, &num) == HKV_OK && num == 0);
  CHECK_ERROR(hkv_manager_trim(manager, 21, 0, others, 4, &num), HKV_INVALID_ARGUMENT, "1 to 39");
  CHECK(hkv_manager_free(manager, 21) == HKV_OK);

  CHECK(run(manager, 0, 0).kind == HKV_COMPLETION_NONE);
  CHECK(hkv_manager_preempt(manager, 20, &kept, others, 4, &num) == HKV_OK && kept.tokens == 40);
  CHECK(kept.offloads > 0 && num == 0);
  CHECK_ERROR(hkv_manager_resume(manager, 20, &allocation), HKV_NOT_READY, "");
  CHECK(run(manager, 0, 0).kind == HKV_COMPLETION_NONE);
  CHECK(hkv_manager_resume(manager, 20, &allocation) == HKV_OK && allocation.hit_tokens == 40);
  CHECK(run(manager, 0, 0).kind == HKV_COMPLETION_READY || allocation.num_loads == 0);
  CHECK(hkv_manager_append(manager, 20, tokens, 1) == HKV_OK);
  CHECK(hkv_manager_abort(manager, 20, NULL, 0, &num) == HKV_OK);
}

// There is no storage to fetch from.
static void test_prefetch(hkv_manager* manager) {
  hkv_prefetch prefetch;
  uint64_t seqs[2], num = 7;
  CHECK(hkv_manager_prefetch(manager, 30, tokens, 65, NULL, NULL, 1, &prefetch) == HKV_OK);
  CHECK(prefetch.blocks == 0);
  CHECK(hkv_manager_poll_prefetch(manager, 2, seqs, 2, &num) == HKV_OK && num == 0);
  CHECK_ERROR(hkv_manager_poll_prefetch(manager, 1, seqs, 2, &num), HKV_INVALID_ARGUMENT, "back");
  CHECK(hkv_manager_cancel_prefetch(manager, 30) == HKV_OK);
}

static void test_texts(const hkv_manager* manager) {
  static char text[1 << 16];
  uint64_t size = 0, again = 0;
  CHECK(hkv_manager_stats(manager, NULL, 0, &size) == HKV_OK && size > 100 && size < sizeof text);
  CHECK(hkv_manager_stats(manager, text, size - 1, &again) == HKV_OK && again == size && !text[0]);
  CHECK(hkv_manager_stats(manager, text, size, &again) == HKV_OK && strlen(text) + 1 == size);
  CHECK(strstr(text, "\"device_capacity\":16") != NULL);
  CHECK(hkv_manager_prometheus(manager, text, sizeof text, &size) == HKV_OK);
  CHECK(strlen(text) + 1 == size && strstr(text, "# TYPE hybridkv_") != NULL);
}

static void test_refusals(hkv_manager* manager) {
  hkv_manager* none = (hkv_manager*)&failures;
  hkv_allocation allocation;
  hkv_hit found;
  hkv_block_copy copies[1];
  uint64_t num = 0;
  CHECK_ERROR(hkv_manager_create("{\"groups\": []}", &none), HKV_INVALID_ARGUMENT, "num_blocks");
  CHECK(none == NULL);
  CHECK_ERROR(hkv_manager_create("{\"blocks\": 3}", &none), HKV_INVALID_ARGUMENT, "blocks");
  CHECK_ERROR(hkv_manager_create(NULL, &none), HKV_INVALID_ARGUMENT, "config is null");
  CHECK_ERROR(hkv_manager_create(config, NULL), HKV_INVALID_ARGUMENT, "null");
  CHECK_ERROR(hkv_manager_append(NULL, 1, tokens, 1), HKV_INVALID_ARGUMENT, "manager is null");
  CHECK_ERROR(hkv_manager_append(manager, 77, tokens, 1), HKV_INVALID_ARGUMENT, "77");
  CHECK_ERROR(hkv_manager_lookup(manager, NULL, 3, NULL, NULL, &found), HKV_INVALID_ARGUMENT,
              "tokens is null");
  CHECK_ERROR(hkv_manager_lookup(manager, tokens, 3, "\xff", NULL, &found), HKV_INVALID_ARGUMENT,
              "salt is no UTF-8");
  CHECK(hkv_manager_allocate(manager, 5, tokens + 200, 80, 0, NULL, NULL, &allocation) == HKV_OK);
  CHECK_ERROR(hkv_manager_allocate(manager, 6, tokens, 65, 0, NULL, NULL, &allocation),
              HKV_NO_BLOCKS, "free");
  CHECK(strcmp(hkv_status_name(HKV_NO_BLOCKS), "HKV_NO_BLOCKS") == 0);
  CHECK(hkv_manager_copies(manager, copies, 1, &num) == HKV_OK && num == 0);
  CHECK(hkv_manager_tick(manager, 10) == HKV_OK);
  CHECK_ERROR(hkv_manager_tick(manager, 9), HKV_INVALID_ARGUMENT, "back");
}

int main(void) {
  hkv_manager* manager = NULL;
  for (uint32_t i = 0; i < 1024; i++) tokens[i] = i;
  CHECK(hkv_manager_create(config, &manager) == HKV_OK);
  test_conversation(manager);
  test_pins_and_quotas(manager);
  test_branches(manager);
  test_prefetch(manager);
  test_texts(manager);
  test_refusals(manager);
  hkv_manager_destroy(manager);
  hkv_manager_destroy(NULL);
  printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
