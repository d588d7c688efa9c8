#!/usr/bin/env python3
"""Holds the kernels against PyTorch's own attention, through the C ABI.

Every case appends keys and values into a paged pool whose unused slots are NaN, with block ids at random
and only the blocks that the layer can still see, attends queries to it, and compares with
`scaled_dot_product_attention` in float64 under an explicit boolean mask over the dense keys and values.
Soft caps and sink logits, which that function lacks, are computed by their formula in float64; so is the
LSE. Where keys and values are fp8, PyTorch dequantises the pool's own bytes by their scales, and what append
wrote is held against PyTorch's conversion, bit for bit. Merging, movement, foreign streams and CUDA graphs have cases of their own.

    python3 validation/validate_torch.py --device cuda:0 --json validation/reports/H100/torch.json

Exits with 1 when a case fails.
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import random
import statistics
import sys
import time
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from report_file import write

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))
import hybridkv as hkv  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# Relative Frobenius norm of the output's error, as in docs/numerics.md.
TOLERANCE = {"bf16": 4e-3, "f16": 5e-4}
TOLERANCE_FP8 = {"bf16": 5e-3, "f16": 3e-3}
LSE_TOLERANCE = 1e-3
FP8, FP8_NAN, FP8_MAX = torch.float8_e4m3fn, 0x7F, 448.0


@dataclass(frozen=True)
class Case:
    """A batch to attend: `lengths` are (query tokens, tokens in all) of every sequence."""

    lengths: tuple
    qo_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bf16"
    block_size: int = 16
    kind: int = hkv.FULL
    extent: int = 0
    sink_tokens: int = 0
    sink_logits: bool = False
    soft_cap: float = 0.0
    layout: str = "HND"
    scale: float = None
    scales: str = None  # of fp8 keys and values: per "tensor", "head" or "token" (and head)

    @property
    def name(self):
        def short(count):
            return f"{count // 1024}K" if count % 1024 == 0 else str(count)

        queries, tokens = zip(*self.lengths)
        uniform = len(set(self.lengths)) == 1
        text = f"{len(tokens)}x{short(max(tokens)) if uniform else f'{min(tokens)}..{max(tokens)}'}"
        text += {hkv.FULL: "", hkv.SLIDING: f"/W{self.extent}", hkv.CHUNKED: f"/C{self.extent}"}[self.kind]
        if max(queries) > 1:
            text += f"/q{max(queries) if uniform else f'{min(queries)}..{max(queries)}'}"
        text += f"/{self.qo_heads}-{self.kv_heads}"
        text += f"/d{self.head_dim}" * (self.head_dim != 128) + f"/{self.dtype}"
        text += f"/fp8-{self.scales}" if self.scales else ""
        text += f"/b{self.block_size}" * (self.block_size != 16)
        text += f"/sinks{self.sink_tokens}" * (self.sink_tokens > 0) + "/sink-logits" * self.sink_logits
        text += f"/cap{self.soft_cap:g}" * (self.soft_cap > 0) + "/NHD" * (self.layout == "NHD")
        return text

    @property
    def tolerance(self):
        return (TOLERANCE_FP8 if self.scales else TOLERANCE)[self.dtype]

    def first_visible(self, position):
        """First token, sinks aside, that a query at this position sees."""
        if self.kind == hkv.SLIDING:
            return max(0, position - self.extent + 1)
        return position // self.extent * self.extent if self.kind == hkv.CHUNKED else 0

    def mask(self, queries, tokens, device):
        """[queries, tokens]: what the last `queries` tokens see, by the definition."""
        i = torch.arange(tokens - queries, tokens, device=device)[:, None]
        j = torch.arange(tokens, device=device)[None, :]
        seen = torch.ones(queries, tokens, dtype=torch.bool, device=device)
        if self.kind == hkv.SLIDING:
            seen = i - j < self.extent
        elif self.kind == hkv.CHUNKED:
            seen = i // self.extent == j // self.extent
        return (seen | (j < self.sink_tokens)) & (j <= i)


def by_head(rows, case):
    """[block, head, token, ...] of rows in the case's layout."""
    return rows if case.layout == "HND" else rows.transpose(1, 2)


class Batch:
    """A case, laid out in memory: dense tensors for the reference, a paged pool for the kernels.

    The layer under test is layer 1 of the window table, in group 1 and layer slot 1; layer 0 is a full
    layer of group 0, so that an index that is taken from the wrong group or layer shows.
    """

    LAYER, GROUP, SLOT, SLOTS = 1, 1, 1, 2

    def __init__(self, case, device, seed):
        self.case, self.device = case, device
        self.draw = random.Random(seed)
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = DTYPES[case.dtype]

        def gauss(*shape):
            values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
            return values.to(dtype)

        queries, tokens = zip(*case.lengths)
        self.q = gauss(sum(queries), case.qo_heads, case.head_dim)
        self.k = gauss(sum(tokens), case.kv_heads, case.head_dim)
        self.v = gauss(sum(tokens), case.kv_heads, case.head_dim)
        self.sink_logits = None
        if case.sink_logits:
            self.sink_logits = torch.randn(case.qo_heads, generator=generator, device=device)
        self.scale = case.head_dim**-0.5 if case.scale is None else case.scale
        self._page()

    def _page(self):
        case, size = self.case, self.case.block_size
        live = [self._live_blocks(*lengths) for lengths in case.lengths]
        ids = list(range(sum(map(len, live)) + 3))
        self.draw.shuffle(ids)
        rows, starts, first, slots = [], [], [], []
        for (queries, tokens), blocks in zip(case.lengths, live):
            starts.append(len(rows))
            sinks = -(-case.sink_tokens // size)
            first.append(next((b for b in blocks if b >= sinks), sinks))
            block_of = dict(zip(blocks, ids))
            ids = ids[len(blocks) :]
            rows += [block_of[b] for b in blocks]
            slots += [block_of[t // size] * size + t % size if t // size in block_of else -1 for t in range(tokens)]

        def on_device(values, dtype):
            return torch.tensor(values, dtype=dtype, device=self.device)

        # Group 0 is another one, whose rows and slots must not be touched: they are out of the pool.
        away = 1 << 30
        self.block_ids = on_device(rows or [0], torch.int32)
        self.block_row = on_device([[away] * len(starts), starts], torch.int64)
        self.first_block = on_device([[0] * len(starts), first], torch.int32)
        self.slot_mapping = on_device([[away] * len(slots), slots], torch.int64)
        lengths = torch.tensor([q for q, _ in case.lengths]).cumsum(0).tolist()
        self.qo_indptr = on_device([0] + lengths, torch.int32)
        self.kv_len = on_device([n for _, n in case.lengths], torch.int32)
        self.windows = on_device(
            [
                [hkv.FULL, 0, 0, 0, 0, 0, 0, 0],
                [case.kind, case.extent, case.sink_tokens, self.GROUP, self.SLOT, 0, 0, 0],
            ],
            torch.int32,
        )
        blocks = sum(map(len, live)) + 3
        inner = (case.kv_heads, size) if case.layout == "HND" else (size, case.kv_heads)
        shape = (blocks, self.SLOTS, 2, *inner, case.head_dim)
        self.scales = None
        if case.scales:
            self.pool = torch.full(shape, FP8_NAN, dtype=torch.uint8, device=self.device).view(FP8)
            self.scales = self._scales(shape[:-1])
        else:
            self.pool = torch.full(shape, math.nan, dtype=self.q.dtype, device=self.device)
        k_scale, v_scale = (None, None) if self.scales is None else (self.scales[:, :, i] for i in (0, 1))
        self.kv = hkv.KV(
            self.pool[:, :, 0], self.pool[:, :, 1], layout=case.layout, k_scale=k_scale, v_scale=v_scale
        )

    def _scales(self, shape):
        """[block, layer slot, K|V, ...]: what every row of the pool is multiplied with. Those of tokens are for
        append to compute; the others let the largest numbers saturate."""
        case, device = self.case, self.device
        if case.scales == "token":
            return torch.full(shape, math.nan, device=device)
        heads = case.kv_heads if case.scales == "head" else 1
        scales = (0.004 + 0.004 * torch.rand(2, heads, generator=torch.Generator().manual_seed(3))).to(device)
        return scales[:, :, None].expand(shape) if case.layout == "HND" else scales[:, None].expand(shape)

    def stored(self, half):
        """[tokens, heads, dim] K or V as float64: what is in the pool where it is fp8, the tokens that are in
        no block being 0."""
        dense = (self.k, self.v)[half].double()
        if self.scales is not None:
            block, offset, kept = self.places()
            rows, scales = (by_head(t, self.case) for t in (self.pool[:, self.SLOT, half], self.scales[:, self.SLOT, half]))
            dense.zero_()
            dense[kept] = rows.view(torch.uint8)[block, :, offset].view(FP8).double() * scales[block, :, offset, None].double()
        return dense

    def places(self):
        """Blocks and offsets of the tokens that have a slot, and which do."""
        slots = self.slot_mapping[self.GROUP]
        kept = slots >= 0
        return slots[kept] // self.case.block_size, slots[kept] % self.case.block_size, kept

    def _live_blocks(self, queries, tokens):
        """Indices of the blocks of a sequence that its queries can see."""
        case, size = self.case, self.case.block_size
        total = -(-tokens // size)
        sinks = range(min(-(-case.sink_tokens // size), total))
        first = case.first_visible(tokens - queries) // size if queries else 0
        return [*sinks, *range(max(first, len(sinks)), total)]

    def append(self, kernels, stream):
        kernels.append(
            hkv.append_args(
                self.kv, layer=self.LAYER, k_new=self.k, v_new=self.v, slot_mapping=self.slot_mapping,
                windows=self.windows,
            ),
            stream,
        )

    def args(self, kernels, stream):
        """Arguments of the attention, planned; `out` and `lse` are poisoned."""
        self.out = torch.full_like(self.q, math.nan)
        self.lse = torch.full(self.q.shape[:2], math.nan, dtype=torch.float32, device=self.device)
        spans = [n - self.case.first_visible(n - q) if q else n for q, n in self.case.lengths]
        args = hkv.attention_args(
            self.kv, layer=self.LAYER, q=self.q, out=self.out, lse=self.lse, qo_indptr=self.qo_indptr,
            kv_len=self.kv_len, block_ids=self.block_ids, block_row=self.block_row,
            first_block=self.first_block, windows=self.windows, sink_logits=self.sink_logits,
            max_q_len=max(q for q, _ in self.case.lengths),
            max_kv_len=max(spans) + self.case.sink_tokens, sm_scale=self.scale,
            logits_soft_cap=self.case.soft_cap,
        )
        plan = hkv.plan_args([args])
        self.plan = torch.full((kernels.plan_memory(plan),), 0xFF, dtype=torch.uint8, device=self.device)
        plan.memory = hkv.span(self.plan)
        [args.plan] = kernels.plan(plan, stream)
        bytes_needed = kernels.attention_workspace(args)
        self.workspace = torch.full((bytes_needed,), 0xFF, dtype=torch.uint8, device=self.device)
        args.workspace = hkv.span(self.workspace)
        return args

    def expected(self):
        """Output and LSE in float64, by PyTorch, from the dense tensors."""
        outs, lses, token, row = [], [], 0, 0
        group = self.case.qo_heads // self.case.kv_heads
        dense = self.stored(0), self.stored(1)
        for queries, tokens in self.case.lengths:
            q = self.q[row : row + queries].double().transpose(0, 1)
            k, v = (t[token : token + tokens].transpose(0, 1).repeat_interleave(group, dim=0) for t in dense)
            mask = self.case.mask(queries, tokens, self.device)
            logits = q @ k.transpose(1, 2) * self.scale
            if self.case.soft_cap > 0:
                logits = self.case.soft_cap * torch.tanh(logits / self.case.soft_cap)
            logits = logits.masked_fill(~mask, -math.inf)
            if self.sink_logits is not None:
                sink = self.sink_logits.double()[:, None, None].expand(-1, queries, 1)
                logits = torch.cat([logits, sink], dim=2)
            lse = torch.logsumexp(logits, dim=2)
            if self.case.soft_cap > 0 or self.sink_logits is not None:
                out = torch.exp(logits - lse[:, :, None])[:, :, :tokens] @ v
            else:
                out = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=self.scale)[0]
            outs.append(out.transpose(0, 1))
            lses.append(lse.transpose(0, 1))
            token, row = token + tokens, row + queries
        return torch.cat(outs), torch.cat(lses)


@dataclass
class Row:
    """A row of the report."""

    case: str
    ours: float = 0.0
    unit: str = "us"
    gbps: float = None
    peers: dict = field(default_factory=dict)
    error: dict = field(default_factory=dict)
    tolerance: float = None
    passed: bool = False
    note: str = None

    def json(self):
        # JSON has no infinity and no NaN; neither passes.
        self.error = {key: value if math.isfinite(value) else 1e308 for key, value in self.error.items()}
        row = {"pass" if key == "passed" else key: value for key, value in vars(self).items()}
        return {key: value for key, value in row.items() if value not in (None, {})}


def errors(out, lse, expected, expected_lse):
    """Relative Frobenius norm and largest error of the output, largest error of the LSE."""
    difference = out.double() - expected
    norm = expected.norm().item()
    return {
        "rel_fro": difference.norm().item() / norm if norm > 0 else difference.norm().item(),
        "max_abs": difference.abs().max().item(),
        "lse_max_abs": (lse.double() - expected_lse).abs().max().item(),
    }


class Bench:
    """The device under test, and what it takes to run things on it."""

    def __init__(self, name, seed):
        self.device = torch.device(name)
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu:
            torch.cuda.set_device(self.device)
        self.kernels = hkv.Kernels(hkv.Device(name))
        self.seed = seed

    def stream(self):
        return torch.cuda.current_stream().cuda_stream if self.on_gpu else 0

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def microseconds(self, action):
        """Median time of an action: events on a GPU, the clock on the CPU, where once is enough."""
        if not self.on_gpu:
            start = time.perf_counter()
            action()
            return (time.perf_counter() - start) * 1e6
        times = []
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def attention(self, case):
        batch = Batch(case, self.device, self.seed)
        batch.append(self.kernels, self.stream())
        args = batch.args(self.kernels, self.stream())
        took = self.microseconds(lambda: self.kernels.attention(args, self.stream()))
        self.synchronize()
        return self.judge(case.name, batch, took)

    def judge(self, name, batch, took):
        error = errors(batch.out, batch.lse, *batch.expected())
        tolerance = batch.case.tolerance
        passed = error["rel_fro"] <= tolerance and error["lse_max_abs"] <= LSE_TOLERANCE
        return Row(name, took, error=error, tolerance=tolerance, passed=passed)

    def append_is_exact(self, case):
        """Every token lies where its slot says, bit for bit, and no other slot is written."""
        batch = Batch(case, self.device, self.seed)
        took = self.microseconds(lambda: batch.append(self.kernels, self.stream()))
        self.synchronize()
        block, offset, kept = batch.places()
        pool = batch.pool.view(torch.uint8 if case.scales else torch.int16)
        expected = torch.full_like(batch.pool.view(torch.uint8), FP8_NAN) if case.scales else torch.full_like(batch.pool, math.nan)
        same = True
        for half, tokens in enumerate((batch.k[kept], batch.v[kept])):
            target = by_head(expected[:, Batch.SLOT, half], case)
            if case.scales:
                given = by_head(batch.scales[:, Batch.SLOT, half], case)[block, :, offset]
                if case.scales == "token":
                    largest = tokens.float().abs().amax(dim=2)
                    # By a tensor: on a GPU torch divides by a number by multiplying with its reciprocal.
                    scale = torch.clamp(largest / torch.full_like(largest, FP8_MAX), min=2.0**-100)
                    same &= torch.equal(given, scale)
                scaled = (tokens.float() * (1.0 / given)[:, :, None]).clamp(-FP8_MAX, FP8_MAX)
                target[block, :, offset] = scaled.to(FP8).view(torch.uint8)
            else:
                target[block, :, offset] = tokens
        same &= torch.equal(pool, expected.view(pool.dtype))
        return Row("append/" + case.name, took, error={"wrong": float(not same)}, tolerance=0.0, passed=same)

    def merge(self, case):
        """The states of two parts of every sequence's keys, merged, are the state of the whole."""
        batch = Batch(case, self.device, self.seed)
        generator = torch.Generator(device=self.device).manual_seed(self.seed)
        shape, rows = (3, *batch.q.shape), batch.q.shape[:2]
        states = torch.randn(shape, generator=generator, device=self.device)
        lse = 4 * torch.randn(3, *rows, generator=generator, device=self.device)
        lse[1, ::2], states[1, ::2] = -math.inf, 0
        batch.out, batch.lse = torch.full_like(batch.q, math.nan), torch.full_like(lse[0], math.nan)
        args = hkv.merge_args(
            states=states, state_lse=lse, out=batch.out, lse=batch.lse, sink_logits=batch.sink_logits
        )
        took = self.microseconds(lambda: self.kernels.merge_states(args, self.stream()))
        self.synchronize()
        logits = lse.double()
        if batch.sink_logits is not None:
            logits = torch.cat([logits, batch.sink_logits.double().expand(1, *rows)])
        expected_lse = torch.logsumexp(logits, dim=0)
        weights = torch.exp(lse.double() - expected_lse)
        error = errors(batch.out, batch.lse, (weights[..., None] * states.double()).sum(0), expected_lse)
        tolerance = case.tolerance
        passed = error["rel_fro"] <= tolerance and error["lse_max_abs"] <= LSE_TOLERANCE
        return Row("merge/" + case.name, took, error=error, tolerance=tolerance, passed=passed)

    def move(self, direction, fragment, count):
        """Fragments at random places reach random places, and nothing else changes."""
        host = {"device": self.device, "pin_memory": False}
        if self.on_gpu:
            host = {"device": "cpu", "pin_memory": True}
        places = {"h2d": (host, {"device": self.device}), "d2h": ({"device": self.device}, host)}
        places["d2d"] = {"device": self.device}, {"device": self.device}
        source, target = (
            torch.zeros(2 * count, fragment, dtype=torch.uint8, **place) for place in places[direction]
        )
        source.copy_(torch.randint(0, 256, source.shape, dtype=torch.uint8))
        order = random.Random(self.seed)
        take = torch.tensor(order.sample(range(2 * count), count))
        put = torch.tensor(order.sample(range(2 * count), count))
        table = torch.stack(
            [source.data_ptr() + take * fragment, target.data_ptr() + put * fragment, torch.full_like(take, fragment)],
            dim=1,
        ).to(self.device)
        args = hkv.move_args(table, count, max_ctas=0 if direction == "d2d" else 4)
        self.synchronize()
        took = self.microseconds(lambda: self.kernels.move_blocks(args, self.stream()))
        self.synchronize()
        expected = torch.zeros(target.shape, dtype=torch.uint8)
        expected[put] = source.cpu()[take]
        same = torch.equal(target.cpu(), expected)
        gbps = count * fragment / took / 1e3
        return Row(
            f"{direction}/{fragment}", took, gbps=gbps, error={"wrong": float(not same)}, tolerance=0.0, passed=same
        )

    def on_a_side_stream(self, case):
        """Work goes to the stream that is given: results are there when that stream says so."""
        side = torch.cuda.Stream()
        batch = Batch(case, self.device, self.seed)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            batch.append(self.kernels, side.cuda_stream)
            args = batch.args(self.kernels, side.cuda_stream)
            took = self.microseconds(lambda: self.kernels.attention(args, side.cuda_stream))
        side.synchronize()
        return self.judge("stream/" + case.name, batch, took)

    def in_a_graph(self, case):
        """Append and attention, captured by PyTorch for one batch, replayed with shorter sequences."""
        batch = Batch(case, self.device, self.seed)
        args = batch.args(self.kernels, self.stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            batch.append(self.kernels, torch.cuda.current_stream().cuda_stream)
            self.kernels.attention(args, torch.cuda.current_stream().cuda_stream)
        shorter = Batch(
            replace(case, lengths=tuple((q, n - n // 3 if n // 3 < n - q else n) for q, n in case.lengths)),
            self.device, self.seed + 1,
        )
        # The graph reads the arrays where they are: put the other batch into them.
        tokens = shorter.k.shape[0]
        batch.slot_mapping.fill_(-1)
        batch.slot_mapping[:, :tokens] = shorter.slot_mapping
        for name in ["q", "k", "v", "block_ids", "block_row", "first_block", "kv_len", "qo_indptr"]:
            new, old = getattr(shorter, name), getattr(batch, name)
            old[tuple(slice(size) for size in new.shape)] = new
        batch.out.fill_(math.nan)
        graph.replay()
        self.synchronize()
        shorter.out, shorter.lse = batch.out, batch.lse
        shorter.pool, shorter.scales = batch.pool, batch.scales
        took = self.microseconds(graph.replay)
        return self.judge("graph/" + case.name, shorter, took)


def cases(big):
    """What is compared: every kind of layer against everything else that varies, one thing at a time,
    and then combinations at random. `big` chooses shapes for a GPU."""
    long = 8192 if big else 256
    window, chunk = (1024, 2048) if big else (50, 64)
    decode = Case(((1, long),) * (4 if big else 2), qo_heads=32 if big else 8, kv_heads=8 if big else 2)
    prefill = replace(decode, lengths=((long // 4, long),) if big else ((40, 100),))
    varlen = replace(
        decode,
        lengths=((1, 1), (7, 7), (1, long), (33, long // 2), (1, 129), (128 if big else 20, 300), (5, 17)),
    )
    kinds = [
        {},
        {"kind": hkv.SLIDING, "extent": window},
        {"kind": hkv.CHUNKED, "extent": chunk},
        {"kind": hkv.SLIDING, "extent": window, "sink_tokens": 4},
        {"kind": hkv.CHUNKED, "extent": chunk, "sink_tokens": 21},
        {"sink_logits": True},
        {"kind": hkv.SLIDING, "extent": 128 if big else 33, "sink_logits": True},
        {"kind": hkv.SLIDING, "extent": window, "soft_cap": 50.0, "scale": 1.0},
        {"soft_cap": 30.0, "sink_logits": True, "scale": 1.0},
    ]
    for kind in kinds:
        for batch in (decode, prefill, varlen):
            yield replace(batch, **kind)

    for qo, kv in [(8, 8), (8, 4), (8, 1), (5, 1), (10, 2), (12, 4), (16, 1), (7, 7), (64, 8)]:
        for batch in (decode, varlen):
            yield replace(batch, qo_heads=qo, kv_heads=kv)
    for head_dim in (64, 128, 256):
        for dtype in ("bf16", "f16"):
            for batch in (decode, prefill, varlen):
                yield replace(batch, head_dim=head_dim, dtype=dtype, qo_heads=8, kv_heads=2)
    for block_size in (8, 16, 32, 64, 128):
        for layout in ("HND", "NHD"):
            for kind in (kinds[0], kinds[3], kinds[2]):
                yield replace(varlen, block_size=block_size, layout=layout, **kind)
    # Keys and values of 8 bits.
    for scales in ("tensor", "head", "token"):
        for kind in kinds:
            for batch in (decode, varlen):
                yield replace(batch, scales=scales, **kind)
        for head_dim, dtype, layout in [(64, "f16", "HND"), (128, "f16", "NHD"), (256, "bf16", "NHD")]:
            for batch in (decode, prefill, varlen):
                yield replace(
                    batch, scales=scales, head_dim=head_dim, dtype=dtype, layout=layout, qo_heads=10, kv_heads=2
                )
        for block_size in (8, 64, 128):
            yield replace(varlen, scales=scales, block_size=block_size)
    # Lengths at the edges of blocks, windows and chunks.
    for kind, extent in [(hkv.SLIDING, 1), (hkv.SLIDING, 17), (hkv.CHUNKED, 1), (hkv.CHUNKED, 48)]:
        edge = tuple((1, max(1, extent * n + d)) for n in (1, 2) for d in (-1, 0, 1))
        yield replace(decode, kind=kind, extent=extent, lengths=edge)
        yield replace(decode, kind=kind, extent=extent, lengths=((30, 97), (16, 16), (17, 64)))

    draw = random.Random(2)
    for _ in range(60 if big else 12):
        kv = draw.choice([1, 2, 3, 8])
        lengths = []
        for _ in range(draw.randint(1, 9 if big else 3)):
            tokens = draw.choice([draw.randint(1, 300), draw.randint(1, long)])
            lengths.append((min(tokens, draw.choice([1, 1, 2, 4, draw.randint(1, 70)])), tokens))
        yield Case(
            tuple(lengths), qo_heads=kv * draw.choice([1, 2, 4, 5, 6, 8]), kv_heads=kv,
            head_dim=draw.choice([64, 128, 256]), dtype=draw.choice(["bf16", "f16"]),
            block_size=draw.choice([8, 16, 32, 64, 128]), kind=draw.choice([0, 1, 2]),
            extent=draw.choice([1, 16, 100, 128, 511]), sink_tokens=draw.choice([0, 0, 1, 16, 40]),
            sink_logits=draw.random() < 0.3, soft_cap=draw.choice([0.0, 0.0, 20.0]),
            layout=draw.choice(["HND", "NHD"]), scale=draw.choice([None, None, 0.2]),
            scales=draw.choice([None, None, "tensor", "head", "token"]),
        )


def checks(bench):
    """Every check as (name, function that makes its row)."""
    for case in cases(bench.on_gpu):
        yield case.name, lambda case=case: bench.attention(case)
    small = Case(((20, 100), (1, 33), (3, 3)), qo_heads=8, kv_heads=4, kind=hkv.SLIDING, extent=30)
    for dtype in ("bf16", "f16"):
        for layout in ("HND", "NHD"):
            case = replace(small, dtype=dtype, layout=layout)
            for scales in (None, "tensor", "head", "token"):
                quantised = replace(case, scales=scales)
                yield "append/" + quantised.name, lambda case=quantised: bench.append_is_exact(case)
        for sinks in (False, True):
            case = replace(small, dtype=dtype, sink_logits=sinks)
            yield "merge/" + case.name, lambda case=case: bench.merge(case)
    for direction in ("d2d", "d2h", "h2d"):
        for fragment in (16, 272, 4096, 98304):
            count = (1 << 26 if bench.on_gpu else 1 << 20) // fragment // 8
            yield (
                f"{direction}/{fragment}",
                lambda d=direction, f=fragment, n=count: bench.move(d, f, n),
            )
    if bench.on_gpu:
        graph = Case(((1, 900), (1, 2000), (1, 64)), kind=hkv.SLIDING, extent=512)
        prefill = replace(graph, lengths=((64, 700), (30, 30)), kind=hkv.FULL)
        for case in (graph, prefill, replace(graph, scales="token"), replace(prefill, scales="head")):
            yield "stream/" + case.name, lambda case=case: bench.on_a_side_stream(case)
            yield "graph/" + case.name, lambda case=case: bench.in_a_graph(case)


def provenance():
    """Commit and hash of the kernels, as `cargo xtask` gives them."""
    text = os.environ.get("HYBRIDKV_PROVENANCE")
    file = ROOT / "provenance.json"
    if not text and file.is_file():
        text = file.read_text()
    known = json.loads(text) if text else {}
    commit = known.get("commit", "unknown") + "-dirty" * known.get("dirty", False)
    return commit, known.get("kernels_sha256", "unknown")


def report(bench):
    """The report, in the form of those of `hybridkv validate`, still without rows."""
    name, driver, cuda = hkv.Device(str(bench.device)).name, "none", "none"
    if bench.on_gpu:
        name, cuda, driver = torch.cuda.get_device_name(), torch.version.cuda, "unknown"
        try:
            import pynvml

            pynvml.nvmlInit()
            driver = pynvml.nvmlSystemGetDriverVersion()
        except Exception:  # The report is worth having without the version.
            pass
    commit, kernels = provenance()
    return {
        "schema": 1, "suite": "torch", "device": name, "driver": driver, "cuda": cuda,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "commit": commit,
        "kernels_sha256": kernels,
        "command": " ".join(["validate_torch.py", *sys.argv[1:]]) + f" (torch {torch.__version__})",
        "limits": {}, "rows": [],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--filter", default="", help="only the cases whose name holds this")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the report")
    options = parser.parse_args()

    bench, rows = Bench(options.device, options.seed), []
    print(f"{'case':58} {'us':>10} {'rel. error':>10} {'LSE error':>10}")
    for name, check in checks(bench):
        if options.filter not in name:
            continue
        try:
            row = check()
        except hkv.Error as error:
            row = Row(name, note=str(error))
        rows.append(row)
        figures = [row.error.get(key) for key in ("rel_fro", "lse_max_abs")]
        figures = ["-" if figure is None else f"{figure:.1e}" for figure in figures]
        verdict = "" if row.passed else f"  FAILED {row.note or ''}"
        print(f"{row.case:58} {row.ours:10.1f} {figures[0]:>10} {figures[1]:>10}{verdict}", flush=True)

    failed = sum(not row.passed for row in rows)
    worst = {d: max((r.error.get("rel_fro", 0) for r in rows if f"/{d}" in r.case), default=0) for d in DTYPES}
    print(f"\n{len(rows)} cases, {failed} failed; worst relative error {worst}")
    if options.json:
        write(dict(report(bench), rows=[row.json() for row in rows]), options.json)
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
