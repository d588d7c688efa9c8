"""Drives every operation on the CPU device with nothing but the standard library."""

import itertools
import math
import random
import struct
import unittest
from array import array

import hybridkv as hkv

BLOCK, DIM, HEADS, GROUPS, TOKENS = 8, 64, 2, 2, 21


def halves(values):
    """IEEE half-precision numbers as 16-bit words, in memory that starts at a multiple of 16 bytes."""
    return array("H", struct.unpack(f"{len(values)}H", struct.pack(f"{len(values)}e", *values)))


def numbers(words):
    return struct.unpack(f"{len(words)}e", bytes(words))


def tensor(words, *shape):
    return memoryview(words).cast("B").cast(memoryview(words).format, shape)


def sink_attention(q, keys, values, sink):
    """Output and LSE of one query, in double precision."""
    logits = [sum(a * b for a, b in zip(q, key)) / math.sqrt(DIM) for key in keys]
    top = max(logits + [sink])
    weights = [math.exp(logit - top) for logit in logits]
    total = sum(weights) + math.exp(sink - top)
    out = [sum(w * value[d] for w, value in zip(weights, values)) / total for d in range(DIM)]
    return out, top + math.log(total)


class Transposed:
    """What a tensor of PyTorch says of itself."""

    shape, dtype = (4, 2), "torch.bfloat16"
    data_ptr, element_size, stride = (lambda self: 4096), (lambda self: 2), (lambda self: (1, 4))


class OnTheCpu(unittest.TestCase):
    def setUp(self):
        self.draw = random.Random(7)
        self.kernels = hkv.Kernels(hkv.Device("cpu"))

    def gauss(self, count):
        return halves([self.draw.gauss(0, 1) for _ in range(count)])

    def test_append_and_attention_of_a_chunked_layer_with_a_sink_logit(self):
        chunk, layer = 8, 1
        windows = (hkv.Window * 2)(
            hkv.Window(hkv.FULL, 0, 0, 0, 0), hkv.Window(hkv.CHUNKED, chunk, 0, 1, 0)
        )
        k_words, v_words = self.gauss(TOKENS * HEADS * DIM), self.gauss(TOKENS * HEADS * DIM)
        nan = array("H", [0x7E00]) * (6 * HEADS * BLOCK * DIM)
        k_pool, v_pool = nan[:], nan[:]
        kv = hkv.KV(
            tensor(k_pool, 6, 1, HEADS, BLOCK, DIM), tensor(v_pool, 6, 1, HEADS, BLOCK, DIM), dtype=hkv.F16
        )
        # Of the chunked group only the block of the last chunk, 16 .., is live.
        slots = array("q", [-1] * TOKENS + [4 * BLOCK + t - 16 if t >= 16 else -1 for t in range(TOKENS)])
        self.kernels.append(
            hkv.append_args(
                kv, layer=layer, k_new=tensor(k_words, TOKENS, HEADS, DIM),
                v_new=tensor(v_words, TOKENS, HEADS, DIM), slot_mapping=tensor(slots, GROUPS, TOKENS),
                windows=windows,
            )
        )
        q_words, out_words = self.gauss(2 * HEADS * DIM), array("H", [0]) * (2 * HEADS * DIM)
        lse, sinks = array("f", [0] * 2 * HEADS), array("f", [0.5, -1.0, 2.0, 0.0][: 2 * HEADS])
        args = hkv.attention_args(
            kv, layer=layer, q=tensor(q_words, 1, 2 * HEADS, DIM), out=tensor(out_words, 1, 2 * HEADS, DIM),
            qo_indptr=array("i", [0, 1]), kv_len=array("i", [TOKENS]), block_ids=array("i", [4]),
            block_row=tensor(array("q", [0, 0]), GROUPS, 1), windows=windows, max_q_len=1,
            max_kv_len=chunk, first_block=tensor(array("i", [0, 2]), GROUPS, 1),
            lse=tensor(lse, 1, 2 * HEADS), sink_logits=sinks,
        )
        plan = hkv.plan_args([args, args], batch_invariant=True)
        memory = array("q", [-1] * (self.kernels.plan_memory(plan) // 8))
        plan.memory = hkv.span(memory)
        args.plan = self.kernels.plan(plan)[1]
        self.assertEqual((args.plan.num_seqs, args.plan.num_kv_heads), (1, HEADS))
        workspace = bytearray(self.kernels.attention_workspace(args) + 16)
        args.workspace = hkv.span(workspace)
        self.kernels.attention(args)

        k, v, q, out = map(numbers, (k_words, v_words, q_words, out_words))
        at = lambda data, token, head: data[(token * HEADS + head) * DIM :][:DIM]
        for head in range(2 * HEADS):
            seen = range(16, TOKENS)
            expected, expected_lse = sink_attention(
                q[head * DIM :][:DIM], [at(k, t, head // 2) for t in seen],
                [at(v, t, head // 2) for t in seen], sinks[head],
            )
            self.assertAlmostEqual(lse[head], expected_lse, delta=1e-3)
            for d in range(DIM):
                self.assertAlmostEqual(out[head * DIM + d], expected[d], delta=2e-3)

    def test_merging_with_an_empty_state_is_the_identity(self):
        state = array("f", [self.draw.gauss(0, 1) for _ in range(DIM)] + [math.nan] * DIM)
        state_lse, out, lse = array("f", [1.5, -math.inf]), array("f", [0] * DIM), array("f", [0])
        self.kernels.merge_states(
            hkv.merge_args(
                states=tensor(state, 2, 1, 1, DIM), state_lse=tensor(state_lse, 2, 1, 1),
                out=tensor(out, 1, 1, DIM), lse=tensor(lse, 1, 1),
            )
        )
        self.assertEqual(out, state[:DIM])
        self.assertEqual(lse[0], 1.5)

    def test_move_blocks(self):
        source, target = array("Q", range(64)), array("Q", [0] * 64)
        a, b = hkv.View(source).address, hkv.View(target).address
        copies = (hkv.Copy * 2)(hkv.Copy(a, b + 256, 128), hkv.Copy(a + 256, b, 64))
        self.kernels.move_blocks(hkv.move_args(copies, 2))
        expected = [*range(32, 40), *[0] * 24, *range(16), *[0] * 16]
        self.assertEqual(list(target), expected)

    def test_codecs_on_the_device_and_on_the_host(self):
        shape = 3, 2, HEADS, BLOCK, DIM
        k_pool, v_pool = self.gauss(math.prod(shape)), self.gauss(math.prod(shape))
        kv = hkv.KV(tensor(k_pool, *shape), tensor(v_pool, *shape), dtype=hkv.F16)
        before, plane = (k_pool[:], v_pool[:]), HEADS * BLOCK * DIM
        # The second layer slot of blocks 2 and 0.
        geometry = hkv.Geometry(1, HEADS, DIM, BLOCK, hkv.F16)
        for codec in ["raw", "fp8-tensor", "fp8-head", "fp8", "int8", "int6", "int4"]:
            size = hkv.slot_bytes(codec, geometry)
            self.assertEqual(size < 4 * plane, codec != "raw")
            slots = array("Q", bytes(2 * size))
            address = hkv.View(slots).address
            self.assertEqual(address % 16, 0)
            blocks = (hkv.SlotBlock * 2)(hkv.SlotBlock(2, address), hkv.SlotBlock(0, address + size))
            results = (hkv.SlotResult * 2)()
            args = hkv.codec_args(
                kv, codec=codec, blocks=blocks, results=results, num_blocks=2, first_layer_slot=1, max_ctas=8
            )
            self.assertEqual(args.num_layers, 1)
            self.kernels.encode(args)
            for result, block, at in zip(results, [2, 0], [0, size]):
                self.assertEqual(result.status, hkv.SLOT_OK)
                begin = (2 * block + 1) * plane
                elements = k_pool[begin:][:plane] + v_pool[begin:][:plane]
                slot = bytearray(size)
                encoded = hkv.encode_slot(codec, geometry, elements, slot)
                self.assertEqual((encoded.status, encoded.hash), (hkv.SLOT_OK, result.hash))
                self.assertEqual(slot, bytes(slots)[at:][:size])
                header = hkv.inspect_slot(slot)
                self.assertEqual((header.codec, header.version, header.bytes), (codec, 1, size))
                self.assertEqual((header.hash, bytes(header.geometry)), (result.hash, bytes(geometry)))
                decoded = array("H", bytes(4 * plane))
                self.assertEqual(bytes(hkv.decode_slot(geometry, slot, decoded)), bytes(header))
                # In place of the block in the pool, what decoding on the device has to give there.
                k_pool[begin : begin + plane], v_pool[begin : begin + plane] = decoded[:plane], decoded[plane:]
            expected = k_pool[:], v_pool[:]
            for pool, old in zip((k_pool, v_pool), before):
                pool[:] = old
            self.kernels.decode(args)
            self.assertEqual([r.status for r in results], [hkv.SLOT_OK] * 2)
            self.assertEqual((k_pool, v_pool), expected)
            self.assertEqual((k_pool, v_pool) == before, codec == "raw")
            slots[size // 8] ^= 1 << 20
            self.kernels.decode(args)
            self.assertEqual([r.status for r in results], [hkv.SLOT_OK, hkv.SLOT_CORRUPT])
            for pool, old in zip((k_pool, v_pool), before):
                pool[:] = old

    def test_slots_that_hold_nothing_or_are_damaged(self):
        geometry = hkv.Geometry(2, HEADS, DIM, BLOCK, hkv.BF16)
        block = array("H", [self.draw.getrandbits(16) for _ in range(4 * HEADS * DIM * BLOCK)])
        slot = bytearray(hkv.slot_bytes("lx4", geometry))
        self.assertEqual(hkv.encode_slot("lx4", geometry, block, slot).status, hkv.SLOT_ESCAPES)
        block = array("H", [0x3F80] * (len(block) - 1) + [0x7FC0])  # 1, and one NaN
        self.assertEqual(hkv.encode_slot("int6", geometry, block, slot).status, hkv.SLOT_NOT_FINITE)
        block[-1] = 0x2000  # far below the rest
        result, decoded = hkv.encode_slot("lx4", geometry, block, slot), array("H", bytes(2 * len(block)))
        self.assertEqual((result.status, result.escapes), (hkv.SLOT_OK, 1))
        self.assertEqual(hkv.decode_slot(geometry, slot, decoded).escapes, 1)
        self.assertEqual(decoded, block)
        self.assertEqual(hkv.verify_slot(geometry, slot).hash, result.hash)
        self.assertEqual(hkv.inspect_slot(bytes(slot)).hash, result.hash)
        self.assertEqual(hkv.decode_slot(geometry, bytes(slot), decoded).hash, result.hash)
        with self.assertRaises(TypeError):
            hkv.decode_slot(geometry, slot, bytes(2 * len(block)))

        untouched = decoded[:] = array("H", [7]) * len(block)
        for bit in [0, 37, 300, 8 * len(slot) - 1]:
            slot[bit // 8] ^= 1 << bit % 8
            for read in [lambda: hkv.decode_slot(geometry, slot, decoded), lambda: hkv.verify_slot(geometry, slot)]:
                with self.assertRaisesRegex(hkv.Error, "HKV_CORRUPT"):
                    read()
            slot[bit // 8] ^= 1 << bit % 8
        for foreign in [(1, HEADS, DIM, BLOCK, hkv.BF16), (2, HEADS, DIM, BLOCK, hkv.F16)]:
            with self.assertRaisesRegex(hkv.Error, "HKV_CORRUPT.*a slot of 2 layers"):
                hkv.verify_slot(hkv.Geometry(*foreign), slot)
        with self.assertRaisesRegex(hkv.Error, "HKV_CORRUPT.*truncated"):
            hkv.decode_slot(geometry, slot[:-16], decoded)
        with self.assertRaisesRegex(hkv.Error, "HKV_CORRUPT.*31 bytes are no header"):
            hkv.inspect_slot(slot[:31])
        self.assertEqual(decoded, untouched)

        for error, call in [
            ("HKV_UNSUPPORTED.*gzip.*raw, lx4", lambda: hkv.slot_bytes("gzip", geometry)),
            ("HKV_UNSUPPORTED", lambda: hkv.slot_bytes("lx4", hkv.Geometry(2, HEADS, DIM, BLOCK, hkv.F16))),
            ("HKV_UNSUPPORTED.*head_dim 65", lambda: hkv.slot_bytes("raw", hkv.Geometry(2, HEADS, 65, BLOCK))),
            ("HKV_INVALID_ARGUMENT.*a slot of 64", lambda: hkv.encode_slot("raw", geometry, block, bytearray(64))),
            ("HKV_INVALID_ARGUMENT.*elements", lambda: hkv.encode_slot("raw", geometry, block[1:], slot)),
        ]:
            with self.assertRaisesRegex(hkv.Error, error):
                call()
        with self.assertRaisesRegex(ValueError, "contiguous"):
            hkv.encode_slot("raw", geometry, Transposed(), slot)

    def test_checking_mode_reads_the_tables(self):
        copies = (hkv.Copy * 1)(hkv.Copy(24, 48, 16))
        with self.assertRaisesRegex(hkv.Error, "HKV_INVALID_ARGUMENT"):
            hkv.Kernels(hkv.Device("cpu"), checked=True).move_blocks(hkv.move_args(copies, 1))

    def test_failures_say_what_and_why(self):
        with self.assertRaisesRegex(hkv.Error, "HKV_NO_(DRIVER|DEVICE)"):
            hkv.Device("cuda:1000")
        with self.assertRaisesRegex(hkv.Error, "HKV_INVALID_ARGUMENT.*struct_bytes is 0"):
            self.kernels.append(hkv.AppendArgs())
        with self.assertRaisesRegex(hkv.Error, "descriptor table has 24 bytes, 48 are needed"):
            self.kernels.move_blocks(hkv.move_args((hkv.Copy * 1)(), 2))


class Moving(unittest.TestCase):
    """Blocks of 3 layers, K and V, 2 heads, 4 tokens, rows of 16 bytes, between two layouts."""

    ROWS = {"num_layers": 3, "num_kv_heads": 2, "block_size": 4, "row_bytes": 16}
    BLOCKS, BLOCK, ROW = 6, 3 * 2 * 2 * 4 * 16, 16

    def setUp(self):
        self.kernels = hkv.Kernels(hkv.Device("cpu"))
        self.packed = hkv.block_layout(hkv.HEADS_OUTERMOST, **self.ROWS)
        # A tensor [block][K|V][token][head] per layer, the last layer's first.
        of_layer = self.BLOCKS * 2 * 2 * 4 * 16
        self.first = 2 * of_layer
        self.layered = hkv.block_layout(
            hkv.BLOCK_FIRST_NHD, layer_offsets=[0, -of_layer, -2 * of_layer], **self.ROWS
        )

    def row(self, layout, block, layer, part, head, token):
        """Index of a row in its pool."""
        if layout is self.packed:
            base, layer = block * self.BLOCK, layer * layout.stride_layer
        else:
            base, layer = self.first + block * 2 * 2 * 4 * 16, layout.layer_offsets[layer]
        inside = layer + part * layout.stride_part + head * layout.stride_head + token * layout.stride_token
        return (base + inside) // self.ROW

    def test_blocks_move_between_layouts_by_kernel_and_mover(self):
        table = (hkv.Copy * 3)()
        mover = hkv.Mover(self.kernels, hkv.LinkModel(self.kernels), num_copies=3)
        for src, dst in (self.layered, self.packed), (self.packed, self.layered):
            move = hkv.BlockMove(self.kernels, src, dst, layers=range(1, 3), tokens=range(1, 4))
            base = lambda layout, block: 0 if layout is self.packed else self.first  # noqa: E731
            stride = {True: self.BLOCK, False: 2 * 2 * 4 * 16}
            for by_mover in False, True:
                source = array("Q", range(self.BLOCKS * self.BLOCK // 8))
                target = array("Q", [0] * len(source))
                at = [
                    [hkv.View(memory).address + base(layout, b) + b * stride[layout is self.packed] for b in blocks]
                    for memory, layout, blocks in ((source, src, [0, 4, 5]), (target, dst, [2, 1, 0]))
                ]
                move.copies(*at, table)
                if by_mover:
                    mover.submit(table, 3, hkv.DEVICE_TO_HOST, blocks=move)
                else:
                    self.kernels.move_blocks(hkv.move_args(table, 3, blocks=move))
                expected = array("Q", [0] * len(source))
                for a, b in (0, 2), (4, 1), (5, 0):
                    for layer, part, head, token in itertools.product((1, 2), (0, 1), (0, 1), (1, 2, 3)):
                        i = 2 * self.row(src, a, layer, part, head, token)
                        j = 2 * self.row(dst, b, layer, part, head, token)
                        expected[j : j + 2] = source[i : i + 2]
                self.assertEqual(target, expected)

    def test_models_say_how_many_ctas(self):
        model = hkv.LinkModel(self.kernels)
        self.assertGreaterEqual(model.quota(hkv.HOST_TO_DEVICE, 1000, 4_096_000), 1)
        with self.assertRaisesRegex(hkv.Error, "HKV_UNSUPPORTED.*way 3"):
            model.quota(3, 1, 16)

    def test_what_does_not_fit_is_refused(self):
        with self.assertRaisesRegex(hkv.Error, "HKV_UNSUPPORTED.*multiples of 16"):
            hkv.block_layout(**{**self.ROWS, "row_bytes": 24})
        with self.assertRaisesRegex(hkv.Error, "is no part of"):
            hkv.BlockMove(self.kernels, self.packed, self.layered, layers=range(1, 4))
        with self.assertRaisesRegex(ValueError, "2 offsets of 3 layers"):
            hkv.block_layout(layer_offsets=[0, 16], **self.ROWS)
        move = hkv.BlockMove(self.kernels, self.packed, self.packed)
        with self.assertRaisesRegex(ValueError, "a table of 24 bytes for 2 blocks"):
            move.copies([0, 16], [0, 16], (hkv.Copy * 1)())
        mover = hkv.Mover(self.kernels, hkv.LinkModel(self.kernels), num_copies=1, staging=False)
        with self.assertRaisesRegex(hkv.Error, "descriptor table has 24 bytes, 48 are needed"):
            mover.submit((hkv.Copy * 1)(), 2, hkv.INSIDE_DEVICE)


class Managing(unittest.TestCase):
    CONFIG = {
        "groups": [{"kind": "full"}, {"kind": "chunked", "chunk": 64}], "num_blocks": 17,
        "max_model_len": 112, "in_flight_tokens": 64, "host": {"num_slots": 32},
    }

    def setUp(self):
        self.manager = hkv.Manager(self.CONFIG)

    def run_all(self, fails=None):
        told = []
        while transfers := self.manager.transfers():
            for transfer in transfers:
                succeeds = transfer.direction != fails
                told += self.manager.complete(transfer, succeeds)
        return told

    def turn(self, seq, tokens):
        given = self.manager.allocate(seq, tokens)
        if given.num_loads:
            with self.assertRaisesRegex(hkv.Error, "HKV_INVALID_ARGUMENT.*waits for"):
                self.manager.append(seq, [1])
            (told,) = self.run_all()
            self.assertEqual((told.kind, told.seq, told.valid_tokens), (hkv.READY, seq, given.hit_tokens))
        self.manager.advance(seq, len(tokens), len(tokens))
        self.run_all()
        return given

    def test_a_conversation_goes_down_and_comes_back(self):
        prompt = list(range(60))
        self.manager.record_events()
        self.assertEqual(self.turn(1, prompt).hit_tokens, 0)
        arrays = self.manager.step([(1, 56, 4)], num_groups=2)
        self.assertEqual((list(arrays["qo_indptr"]), list(arrays["kv_len"])), ([0, 4], [60]))
        ids, row = arrays["block_ids"], arrays["block_row"]
        for group in range(2):
            last = ids[row[group] + 3 - arrays["first_block"][group]]
            slots = arrays["slot_mapping"][4 * group:4 * group + 4]
            self.assertEqual(list(slots), [16 * last + 8 + token for token in range(4)])
        self.manager.append(1, [60, 61])
        self.manager.advance(1, 62, 62)
        self.assertEqual(self.manager.copies(), [])
        self.manager.free(1)
        stored = [event.tier for event in self.manager.events() if event.kind == hkv.STORED]
        self.assertEqual((stored.count(hkv.DEVICE), stored.count(hkv.HOST)), (6, 6))

        self.manager.allocate(2, list(range(500, 612)))
        self.assertEqual(self.manager.abort(2), [])
        hit = self.manager.lookup(prompt)
        self.assertEqual((hit.tokens, hit.device_tokens, hit.host_tokens), (48, 0, 48))
        self.assertEqual(self.manager.lookup(prompt, salt="another tenant").tokens, 0)
        given = self.turn(3, prompt)
        # Two of the six blocks are still on the device.
        self.assertEqual((given.hit_tokens, given.num_loads), (48, 4))
        self.manager.free(3)

    def test_what_ran_behind_a_failed_load_is_void(self):
        self.turn(1, list(range(60)))
        self.manager.free(1)
        self.manager.allocate(2, list(range(500, 612)))
        self.manager.abort(2)
        self.manager.allocate(3, list(range(60)))
        with self.assertRaisesRegex(hkv.Error, "HKV_NOT_READY"):
            self.manager.overlap(3)
        loads = self.manager.transfers()
        self.manager.overlap(3)
        self.manager.advance(3, 60, 48)
        told = [said for load in loads for said in self.manager.complete(load, load is not loads[1])]
        self.assertEqual([(said.kind, said.seq) for said in told], [(hkv.VOID, 3)])

    def test_pins_and_quotas(self):
        self.turn(1, list(range(60)))
        self.manager.free(1)
        pin = self.manager.pin(hkv.HOST, list(range(60)))
        self.assertEqual((pin.tokens, pin.blocks), (48, 6))
        self.manager.unpin(pin)
        with self.assertRaisesRegex(hkv.Error, "is not known"):
            self.manager.unpin(pin)
        self.manager.set_quota(hkv.HOST, "tenant", 3 * 4096, 4096)
        with self.assertRaisesRegex(hkv.Error, "4095 bytes holds no block of 4096"):
            self.manager.set_quota(hkv.STORAGE, "tenant", 4095, 4096)
        self.manager.set_quota(hkv.HOST, "tenant", None, 4096)

    def test_forks_and_cuts(self):
        self.turn(1, list(range(40)))
        self.manager.reserve(1, 60)
        self.assertEqual(self.manager.fork(1, 2), 40)
        self.manager.append(2, [90])
        (full, _) = self.manager.copies()
        self.assertNotEqual(full.source, full.target)
        self.assertEqual(self.manager.rollback(2, 40), [])
        self.manager.append(1, [40, 41])
        self.manager.advance(1, 42, 40)
        self.assertEqual(self.manager.fork(1, 3), 42)
        # The work of the two tokens fails.
        self.assertEqual(self.manager.abort(1), [3])
        self.manager.abort(3)
        with self.assertRaisesRegex(hkv.Error, "wanted are 1 to 40"):
            self.manager.trim(2, 41)
        self.assertEqual(self.manager.trim(2, 32), [])
        self.manager.free(2)

    def test_a_sequence_is_swapped_out_and_in(self):
        self.turn(1, list(range(40)))
        kept, others = self.manager.preempt(1)
        self.assertEqual((kept.tokens, others), (40, []))
        with self.assertRaisesRegex(hkv.Error, "HKV_NOT_READY"):
            self.manager.resume(1)
        self.run_all()
        with self.assertRaisesRegex(hkv.Error, "sequence 1 is not known"):
            self.manager.append(1, [1])
        given = self.manager.resume(1)
        if given.num_loads:
            self.run_all()
        self.assertEqual(given.hit_tokens, 40)
        self.manager.append(1, [1])
        self.manager.advance(1, 41, 41)
        self.manager.free(1)

    def test_a_request_that_waits_is_prefetched_for(self):
        prefetch = {"policy": "timeout", "base_ns": 1000, "per_1024_tokens_ns": 0}
        storage = {"num_slots": 64, "prefetch_threshold": 16, "prefetch": prefetch}
        full = {"groups": [{"kind": "full"}], "host": {"num_slots": 8, "load_back_threshold": 16}}
        self.manager = hkv.Manager(self.CONFIG | full | {"storage": storage})
        prompt = list(range(49))
        self.turn(1, prompt)
        self.manager.free(1)
        for seq in range(2, 6):
            self.turn(seq, list(range(1000 * seq, 1000 * seq + 112)))
            self.manager.free(seq)
            self.run_all()
        hit = self.manager.lookup(prompt)
        self.assertEqual((hit.tokens, hit.host_tokens), (48, 0))
        begun = self.manager.prefetch(7, prompt, now=5)
        self.assertEqual((begun.hit_tokens, begun.blocks), (48, 3))
        self.assertEqual(self.manager.poll_prefetch(6), [])
        first, *late = self.manager.transfers()
        self.manager.complete(first)
        self.assertEqual(self.manager.poll_prefetch(1005), [7])
        self.assertEqual(self.manager.poll_prefetch(1006), [])
        self.assertEqual(self.manager.allocate(7, prompt).hit_tokens, 16)
        [self.manager.complete(transfer) for transfer in late]
        self.manager.cancel_prefetch(8)

    def test_what_can_be_seen(self):
        self.turn(1, list(range(60)))
        seen = self.manager.stats()
        self.assertEqual((seen["stats"]["allocations"], seen["stats"]["prompt_tokens"]), (1, 60))
        self.assertEqual((seen["usage"]["device_capacity"], seen["usage"]["host_used"]), (16, 6))
        self.assertGreater(seen["metadata"]["sequences"], 4 * 60)
        self.assertIn("hybridkv_prompt_tokens_total 60\n", self.manager.prometheus())

    def test_refusals(self):
        with self.assertRaisesRegex(hkv.Error, "HKV_INVALID_ARGUMENT.*unknown field `policy`|unknown variant `now`"):
            hkv.Manager(self.CONFIG | {"storage": {"num_slots": 1, "prefetch": {"policy": "now"}}})
        with self.assertRaisesRegex(hkv.Error, "HKV_INVALID_ARGUMENT.*unknown field `blocks`"):
            hkv.Manager({"blocks": 3})
        self.manager.allocate(1, list(range(112)))
        with self.assertRaisesRegex(hkv.Error, "HKV_NO_BLOCKS"):
            self.manager.allocate(2, list(range(500, 600)))
        with self.assertRaisesRegex(hkv.Error, "sequence 9 is not known"):
            self.manager.free(9)
        self.manager.tick(5)


if __name__ == "__main__":
    unittest.main()
