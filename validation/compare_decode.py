#!/usr/bin/env python3
"""Paged decode beside others: FlashInfer's tensor-core decode, XQA and FlashAttention 3, on the cases of
`hybridkv bench decode`, in the same run on the same GPU.

    hybridkv bench decode --json decode.json
    python3 validation/compare_decode.py --report decode.json --fa3 _vllm_fa3_C.abi3.so

The cases are the rows of the report. Each is laid out once in memory, in FlashInfer's layout
[block][K|V][head][token][dim], one pool per layer, block ids at random; layers are enough to be several times
the L2 cache, and one CUDA graph holds a launch per layer, 16 at least, for every implementation alike. FA3 gets its own
layout ([block][token][head][dim], K and V apart) with blocks of 16 and of 64 tokens. What it takes to plan
(FlashInfer on the host, FA3 by a kernel) is not timed.

A figure counts only when the output it belongs to has been compared with ours, and ours with attention in
float64. Every implementation runs in a process of its own, whose end ends nothing else. The figures go into
the rows of the report (`peers`), errors of the output beside ours (`error`).

Versions: flashinfer-python 0.6.11; FA3 from vllm 0.20.2 (its library, which needs torch 2.11).
"""

import argparse
import json
import math
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass

import torch

from report_file import write

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))
import hybridkv as hkv  # noqa: E402

PAGE = 16
# Launches in a graph at least, as in `hybridkv bench`: a layer's time is what it takes among others.
LAYERS_OF_A_STEP = 16
IMPLEMENTATIONS = ["flashinfer", "xqa", "fa3"]
# Relative Frobenius norm of the difference from float64. With 8-bit keys and values XQA and FA3 round queries and
# probabilities to 8 bits, too.
TOLERANCE = {"bf16": 4e-3, "fp8": 5e-3}
PEER_TOLERANCE = {"bf16": 1e-2, "fp8": 1e-1}
# Seconds that the process of one implementation may take.
PATIENCE = 150
# Sequences of a batch that are computed in float64.
REFERENCE_SEQUENCES = 3


@dataclass(frozen=True)
class Case:
    """A case by its name, as `hybridkv bench decode` names it."""

    name: str
    lengths: tuple
    q_len: int
    qo_heads: int
    kv_heads: int
    head_dim: int
    kv: str
    window: int  # 0: none

    @classmethod
    def parse(cls, name):
        """None for what is not one attention launch with blocks of 16."""
        pattern = (
            r"(?:mixed/)?(?P<batch>\d+x\w+(?:\+\d+x\w+)*)(?:/W(?P<window>\d+))?(?:/q(?P<q>\d+))?"
            r"/(?P<qo>\d+)-(?P<kv_heads>\d+)(?:/d(?P<dim>\d+))?/(?P<kv>bf16|fp8)"
        )
        found = re.fullmatch(pattern, name)
        if not found:
            return None
        lengths = []
        for part in found["batch"].split("+"):
            count, length = part.split("x")
            lengths += [tokens(length)] * int(count)
        return cls(
            name, tuple(lengths), int(found["q"] or 1), int(found["qo"]), int(found["kv_heads"]),
            int(found["dim"] or 128), found["kv"], int(found["window"] or 0),
        )

    def first_visible(self, length):
        """First token that a new query of a sequence sees."""
        return max(0, length - self.q_len - self.window + 1) if self.window else 0

    @property
    def bytes(self):
        seen = sum(length - self.first_visible(length) for length in self.lengths)
        return seen * self.kv_heads * self.head_dim * 2 * (1 if self.kv == "fp8" else 2)

    def small(self):
        """A case of the same kind that the CPU can do."""
        few = tuple(min(length, 100 + 37 * i) for i, length in enumerate(self.lengths[:3]))
        return Case(
            self.name, few, self.q_len, self.qo_heads, self.kv_heads, self.head_dim, self.kv, min(self.window, 50)
        )


def tokens(text):
    """`8K` as the benchmark writes it: 10M is ten million, other M and K are powers of two."""
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1])
    return 10_000_000 if text == "10M" else int(text[:-1]) * unit if unit else int(text)


def bits(tensor):
    """The tensor as integers, which can be indexed whatever its type."""
    return tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int16)


class Batch:
    """A case in memory."""

    def __init__(self, case, device, layers=None, seed=1):
        self.case, self.device = case, device
        self.on_gpu = device.type == "cuda"
        generator = torch.Generator(device=device).manual_seed(seed)
        size = lambda first, last: -(-last // PAGE) - first // PAGE  # noqa: E731
        self.first = [case.first_visible(n) // PAGE for n in case.lengths]
        self.live = [size(f * PAGE, n) for f, n in zip(self.first, case.lengths)]
        self.blocks = sum(self.live)
        if layers is None:
            l2 = torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else 0
            layers = min(max(2, -(-6 * l2 // case.bytes)), 64)
        self.layers = int(layers)
        self.dtype = torch.float8_e4m3fn if case.kv == "fp8" else torch.bfloat16

        def gauss(*shape):
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

        shape = (self.blocks, 2, case.kv_heads, PAGE, case.head_dim)
        self.kv = [torch.empty(shape, device=device, dtype=self.dtype) for _ in range(self.layers)]
        for pool in self.kv:
            for i in range(0, self.blocks, 8192):
                piece = pool[i : i + 8192]
                piece.copy_(gauss(*piece.shape).to(self.dtype))
        self.q = gauss(len(case.lengths) * case.q_len, case.qo_heads, case.head_dim)
        order = torch.randperm(self.blocks, generator=generator, device=device, dtype=torch.int32)
        self.ids = order  # live blocks, sequence by sequence
        starts = [0]
        for count in self.live:
            starts.append(starts[-1] + count)
        self.starts = starts
        self.lengths = self.ints(case.lengths)
        self.scale = case.head_dim**-0.5

    def ints(self, values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device=self.device)

    def outputs(self):
        return [torch.full_like(self.q, math.nan) for _ in range(self.layers)]

    def pages(self, seq):
        """Live blocks of a sequence, in order."""
        return self.ids[self.starts[seq] : self.starts[seq + 1]]

    def table(self, per_block=1, ids=None):
        """[sequences, blocks]: rectangular, with block 0 where nothing is visible or there is nothing.
        `per_block` blocks of 16 make one of these blocks."""
        ids = self.ids if ids is None else ids
        first = [f // per_block for f in self.first]
        live = [-(-n // (PAGE * per_block)) - f for f, n in zip(first, self.case.lengths)]
        table = torch.zeros(len(live), max(f + n for f, n in zip(first, live)), dtype=torch.int32, device=self.device)
        start = 0
        for row, (f, n) in enumerate(zip(first, live)):
            table[row, f : f + n] = ids[start : start + n]
            start += n
        return table

    def reference(self):
        """Attention in float64 of the first layer, for some sequences: {sequence: [queries, heads, dim]}."""
        case, results = self.case, {}
        chosen = random.Random(7).sample(range(len(case.lengths)), min(REFERENCE_SEQUENCES, len(case.lengths)))
        for seq in sorted({0, *chosen}):
            length, rows = case.lengths[seq], slice(seq * case.q_len, (seq + 1) * case.q_len)
            group = case.qo_heads // case.kv_heads
            # [kv heads, queries * group, dim]
            q = self.q[rows].double().view(case.q_len, case.kv_heads, group, -1).transpose(0, 1).flatten(1, 2)
            position = torch.arange(length - case.q_len, length, device=self.device).repeat_interleave(group)
            top = torch.full((*q.shape[:2], 1), -math.inf, dtype=torch.float64, device=self.device)
            total, acc = torch.zeros_like(top), torch.zeros_like(q)
            pages, begin = self.pages(seq), self.first[seq] * PAGE
            step = max(1, (1 << 20) // (case.kv_heads * PAGE))
            for i in range(0, len(pages), step):
                kv = bits(self.kv[0])[pages[i : i + step].long()].view(self.dtype).double()
                k, v = (kv[:, half].transpose(0, 1).flatten(1, 2) for half in (0, 1))
                j = begin + i * PAGE + torch.arange(k.shape[1], device=self.device)
                seen = j[None] <= position[:, None]
                if case.window:
                    seen &= position[:, None] - j[None] < case.window
                logits = (q @ k.transpose(1, 2) * self.scale).masked_fill(~seen, -math.inf)
                new_top = torch.maximum(top, logits.amax(2, keepdim=True))
                weights = torch.exp(logits - new_top).nan_to_num(0.0)
                keep = torch.exp(top - new_top).nan_to_num(0.0)
                total = total * keep + weights.sum(2, keepdim=True)
                acc, top = acc * keep + weights @ v, new_top
                del kv, k, v, logits, weights
            out = (acc / total).view(case.kv_heads, case.q_len, group, -1).transpose(0, 1).flatten(1, 2)
            results[seq] = out
        return results

    def error(self, out, reference):
        """Relative Frobenius norm of the difference over the sequences of the reference."""
        difference = norm = 0.0
        for seq, expected in reference.items():
            rows = out[seq * self.case.q_len : (seq + 1) * self.case.q_len].double()
            difference += (rows - expected).square().sum().item()
            norm += expected.square().sum().item()
        return math.sqrt(difference / norm)


def ours(batch, kernels):
    """A launch per layer, and their outputs."""
    case, seqs = batch.case, len(batch.case.lengths)
    windows = batch.ints([[hkv.SLIDING if case.window else hkv.FULL, case.window, 0, 0, 0, 0, 0, 0]])
    common = {
        "qo_indptr": batch.ints([seq * case.q_len for seq in range(seqs + 1)]), "kv_len": batch.lengths,
        "block_ids": batch.ids, "block_row": batch.ints([batch.starts[:-1]], torch.int64),
        "first_block": batch.ints([batch.first]), "windows": windows, "max_q_len": case.q_len,
        "max_kv_len": max(n - case.first_visible(n) for n in case.lengths), "sm_scale": batch.scale,
    }
    scales = {}
    if case.kv == "fp8":
        one = torch.ones(1, dtype=torch.float32, device=batch.device).expand(batch.blocks, 1, case.kv_heads, PAGE)
        scales = {"k_scale": one, "v_scale": one}
    outputs, calls, plan, workspace = batch.outputs(), [], None, None
    for pool, out in zip(batch.kv, outputs):
        kv = hkv.KV(pool[:, None, 0], pool[:, None, 1], **scales)
        args = hkv.attention_args(kv, layer=0, q=batch.q, out=out, **common)
        if plan is None:
            plan_args = hkv.plan_args([args])
            plan_memory = torch.empty(kernels.plan_memory(plan_args), dtype=torch.uint8, device=batch.device)
            plan_args.memory = hkv.span(plan_memory)
            [plan] = kernels.plan(plan_args, stream(batch))
        args.plan = plan
        if workspace is None:
            workspace = torch.zeros(max(16, kernels.attention_workspace(args)), dtype=torch.uint8, device=batch.device)
        args.workspace = hkv.span(workspace)
        calls.append(lambda args=args: kernels.attention(args, stream(batch)))
    return {"hybridkv": (calls, outputs, (workspace, common, scales, plan_memory))}


def stream(batch):
    return torch.cuda.current_stream().cuda_stream if batch.on_gpu else 0


def flashinfer(batch):
    import flashinfer

    case = batch.case
    if case.q_len > 1:
        raise NotImplementedError("its decode takes one query token")
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device=batch.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    # It has no first block: rows begin at block 0, and what is not visible is not read.
    table, rows = batch.table(), [-(-n // PAGE) for n in case.lengths]
    indices = torch.cat([table[seq, :count] for seq, count in enumerate(rows)])
    indptr = torch.tensor([0, *rows]).cumsum(0).to(device=batch.device, dtype=torch.int32)
    last = batch.ints([(n - 1) % PAGE + 1 for n in case.lengths])
    wrapper.plan(
        indptr, indices, last, case.qo_heads, case.kv_heads, case.head_dim, PAGE, q_data_type=torch.bfloat16,
        kv_data_type=batch.dtype, window_left=case.window - 1 if case.window else -1, sm_scale=batch.scale,
    )
    outputs = batch.outputs()
    calls = [lambda kv=kv, out=out: wrapper.run(batch.q, kv, out=out) for kv, out in zip(batch.kv, outputs)]
    return {"flashinfer": (calls, outputs, (wrapper, workspace, indices))}


def xqa(batch):
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    case = batch.case
    if case.q_len > 1:
        raise NotImplementedError("its module for several query tokens is not carried")
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=batch.device)
    table, outputs = batch.table(), batch.outputs()
    window = case.window - 1 if case.window else -1

    def call(kv, out):
        return lambda: xqa_batch_decode_with_kv_cache(
            batch.q, (kv[:, 0], kv[:, 1]), workspace, table, batch.lengths, max(case.lengths), batch.scale, 1.0,
            window, out=out, kv_layout="HND",
        )

    return {"xqa": ([call(*pair) for pair in zip(batch.kv, outputs)], outputs, (workspace, table))}


def fa3(batch):
    """Blocks of 16 and of 64 tokens, in FA3's own layout."""
    case, op = batch.case, torch.ops._vllm_fa3_C
    seqs, longest = len(case.lengths), max(case.lengths)
    fp8 = case.kv == "fp8"
    q = batch.q.to(batch.dtype)
    ones = torch.ones(seqs, case.kv_heads, device=batch.device) if fp8 else None
    starts = batch.ints([seq * case.q_len for seq in range(seqs + 1)])
    left, right = (case.window - 1, 0) if case.window else (-1, -1)
    # Live tokens in order; a sequence begins at its first live block of 64.
    results = {}
    for page in (16, 64):
        ratio = page // PAGE
        if ratio > 1 and any(f % ratio for f in batch.first):
            continue
        order, table = block_order(batch, ratio)
        pools = [[to_blocks(batch, kv, half, order, ratio) for half in (0, 1)] for kv in batch.kv]
        plan = op.get_scheduler_metadata(
            seqs, case.q_len, longest, case.qo_heads, case.kv_heads, case.head_dim, case.head_dim, batch.dtype,
            batch.lengths, starts, None, None, None, None, page, 0, True, left, right, False, 0, None, 0,
        )
        outputs = batch.outputs()

        def call(k, v, out, plan=plan, table=table):
            return lambda: op.fwd(
                q, k, v, None, None, None, out, starts, None, None, None, batch.lengths, case.q_len, longest, table,
                None, None, None, None, None, ones, ones, ones, batch.scale, True, left, right, 0.0, True, plan, 0,
                None, 0, None, 1, 0, None,
            )

        calls = [call(*pool, out) for pool, out in zip(pools, outputs)]
        name = "fa3" if page == 16 else f"fa3-b{page}"
        results[name] = (calls, outputs, (pools, plan, table))
    return results


def block_order(batch, ratio):
    """For blocks of `ratio` times 16 tokens: [blocks, ratio] the blocks of 16 that each consists of, in random
    order, and the block table."""
    counts = [-(-n // ratio) for n in batch.live]
    padded = []
    for seq, count in enumerate(counts):
        pages = batch.pages(seq)
        padded.append(torch.nn.functional.pad(pages, (0, count * ratio - len(pages))))
    rows = torch.cat(padded).view(-1, ratio)
    generator = torch.Generator(device=batch.device).manual_seed(3)
    place = torch.randperm(len(rows), generator=generator, device=batch.device, dtype=torch.int32)
    order = torch.empty_like(rows)
    order[place.long()] = rows
    return order, batch.table(ratio, place)


def to_blocks(batch, kv, half, order, ratio):
    """K or V of a layer as [blocks, tokens, heads, dim]."""
    case = batch.case
    shape = (len(order), ratio, PAGE, case.kv_heads, case.head_dim)
    out = torch.empty(shape, dtype=kv.dtype, device=kv.device)
    source, target = bits(kv), bits(out)
    for i in range(0, len(order), 16384):
        target[i : i + 16384] = source[order[i : i + 16384].long(), half].transpose(2, 3)
    return out.view(len(order), ratio * PAGE, case.kv_heads, case.head_dim)


def microseconds(batch, calls, seconds):
    """Median time of one call, in a graph of 16 at least; and whether a graph held them."""
    calls = calls * -(-LAYERS_OF_A_STEP // len(calls))
    for call in calls[:2]:
        call()
    if not batch.on_gpu:
        for call in calls:
            call()
        return 0.0, False
    torch.cuda.synchronize()
    graph, in_graph = torch.cuda.CUDAGraph(), True
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        run = graph.replay
    except Exception as error:  # What cannot be captured is timed as it is, and says so.
        torch.cuda.synchronize()
        print(f"    no graph: {str(error).splitlines()[0][:120]}", flush=True)
        in_graph = False

        def run():
            for call in calls:
                call()

    def timed():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return start, end

    run()
    start, end = timed()
    torch.cuda.synchronize()
    samples = int(min(max(seconds * 1e3 / max(start.elapsed_time(end), 1e-3), 7), 100))
    events = [timed() for _ in range(samples)]
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3 / len(calls), in_graph


def run_case(case, implementation, device, kernels, seconds):
    """Yields a result per implementation: ours first, then the peers of this process."""
    batch = Batch(case if device.type == "cuda" else case.small(), device)
    reference = batch.reference()
    if batch.on_gpu:
        torch.cuda.empty_cache()
    own = None
    makers = [lambda: ours(batch, kernels)]
    if implementation != "ours":
        makers.append(lambda: {"flashinfer": flashinfer, "xqa": xqa, "fa3": fa3}[implementation](batch))
    for make in makers:
        try:
            made = make()
        except Exception as error:
            yield {"case": case.name, "name": "hybridkv" if own is None else implementation, "note": note_of(error)}
            if own is None:
                return
            continue
        for name, (calls, outputs, kept) in made.items():
            result = {"case": case.name, "name": name}
            try:
                result["us"], result["graph"] = microseconds(batch, calls, seconds)
                result["error"] = batch.error(outputs[0], reference)
                if name == "hybridkv":
                    own = outputs
                else:
                    far = [(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(outputs, own)]
                    result["from_ours"] = torch.stack(far).max().item()
            except Exception as error:
                result["note"] = note_of(error)
            yield result
            del kept
        if own is None:
            return
        del made


def note_of(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def child(options, names):
    """The process of one implementation: a line of JSON per result."""
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if options.implementation == "fa3":
        torch.ops.load_library(str(options.fa3))
    kernels = hkv.Kernels(hkv.Device(options.device))
    with open(options.results, "a", encoding="utf-8") as file:
        for name in names:
            print(json.dumps({"begins": name}), file=file, flush=True)
            start = time.perf_counter()
            try:
                for result in run_case(Case.parse(name), options.implementation, device, kernels, options.seconds):
                    print(json.dumps(result), file=file, flush=True)
                    show(result)
            except Exception as error:
                traceback.print_exc()
                print(json.dumps({"case": name, "name": options.implementation, "note": note_of(error)}), file=file, flush=True)
                if device.type == "cuda":
                    torch.cuda.synchronize()  # A broken context ends the process.
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if time.perf_counter() - start > 20:
                print(f"    {name} took {time.perf_counter() - start:.0f} s", flush=True)


def show(result):
    figures = f"{result['us']:10.1f} us  error {result['error']:.2e}" if "error" in result else ""
    if "from_ours" in result:
        figures += f"  from ours {result['from_ours']:.1e}"
    if result.get("graph") is False:
        figures += "  (no graph)"
    print(f"  {result['case']:<34} {result['name']:<12} {figures} {result.get('note', '')}", flush=True)


def run_children(options, names):
    """All results, from one process per implementation; one that dies begins again after the case it died of."""
    results = []
    for implementation in options.implementations:
        if implementation == "fa3" and not (options.fa3 and options.fa3.is_file()):
            print("fa3: its library is not here (--fa3), left out", flush=True)
            continue
        print(f"{implementation}:", flush=True)
        left, deadline = list(names), time.monotonic() + options.patience
        while left and time.monotonic() < deadline:
            path = options.results.with_name(options.results.name + f".{implementation}")
            path.unlink(missing_ok=True)
            command = [sys.executable, "-u", __file__, "--implementation", implementation, "--results", str(path)]
            command += ["--device", options.device, "--seconds", str(options.seconds), "--cases", ",".join(left)]
            command += ["--fa3", str(options.fa3)] if options.fa3 else []
            try:
                code = subprocess.run(command, timeout=max(5.0, deadline - time.monotonic())).returncode
            except subprocess.TimeoutExpired:
                code = "a time-out"
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
            path.unlink(missing_ok=True)
            begun = [line["begins"] for line in lines if "begins" in line]
            results += [dict(line, process=implementation) for line in lines if "case" in line]
            if code == 0:
                break
            print(f"{implementation}: ended with {code} in {begun[-1] if begun else 'its start'}", flush=True)
            if not begun:
                break
            left = left[left.index(begun[-1]) + 1 :]
    return results


def merge(report, results):
    """Puts the figures that count into the rows. Returns the lines of a table, how many rows fail, and in how
    many our error is larger than FlashInfer's."""
    rows = {row["case"]: row for row in report["rows"]}
    table, failed, larger = [], 0, 0
    for name, row in rows.items():
        mine = [r for r in results if r["case"] == name]
        case = Case.parse(name)
        errors = [r["error"] for r in mine if r["name"] == "hybridkv" and "error" in r]
        if not errors:
            continue
        beside = [r["us"] for r in mine if r["name"] == "hybridkv" and "us" in r]
        row.setdefault("error", {})["rel_fro"] = max(errors)
        right = max(errors) <= TOLERANCE[case.kv]
        row.setdefault("peers", {}).clear()
        notes = []
        for result in mine:
            peer = result["name"]
            if peer == "hybridkv":
                continue
            if "from_ours" not in result or not result["error"] <= PEER_TOLERANCE[case.kv]:
                wrong = f"wrong by {result['error']:.1e}" if "error" in result else result.get("note", "no result")
                notes.append(f"{peer}: {wrong}")
                continue
            row["peers"][peer if result["graph"] else peer + " (no graph)"] = result["us"]
            row["error"]["rel_fro_" + peer] = result["error"]
        theirs = row["error"].get("rel_fro_flashinfer")
        best = min(row["peers"].items(), key=lambda item: item[1], default=None)
        if not right:
            failed += 1
            row["pass"], row["note"] = False, f"wrong by {max(errors):.1e}"
        less_exact = bool(theirs) and max(errors) > theirs
        row["error"].pop("times_flashinfer", None)
        if theirs:
            row["error"]["times_flashinfer"] = max(errors) / theirs
        larger += less_exact
        table.append(
            f"{name:<34} {row['ours']:9.1f} {statistics.median(beside):9.1f} "
            + (f"{best[0]:<12} {best[1]:9.1f} {best[1] / row['ours']:6.2f}x " if best else f"{'-':<12} {'-':>9} {'-':>7} ")
            + f"{max(errors):9.2e} "
            + (f"{theirs:9.2e} {max(errors) / theirs:6.3f}" if theirs else f"{'-':>9} {'-':>6}")
            + (" SLOWER" if best and best[1] < row["ours"] else "")
            + (" WRONG" if not right else "")
            + (" LESS EXACT" if less_exact else "")
            + ("  " + "; ".join(notes) if notes else "")
        )
        if not row["peers"]:
            del row["peers"]
    return table, failed, larger


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", type=pathlib.Path, help="the report of `hybridkv bench decode`: read, and written again")
    parser.add_argument("--json", type=pathlib.Path, help="write it here instead")
    parser.add_argument("--fa3", type=pathlib.Path, help="the library of FA3 out of vLLM's wheel")
    parser.add_argument("--filter", default="", help="only the cases whose name holds this")
    parser.add_argument("--only", default=",".join(IMPLEMENTATIONS), help="implementations, separated by commas")
    parser.add_argument("--seconds", type=float, default=0.1, help="of timing, per case and implementation")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for every implementation")
    parser.add_argument("--implementation", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.implementation:
        child(options, options.cases.split(","))
        return 0
    if options.report is None:
        parser.error("--report is needed")

    report = json.loads(options.report.read_text(encoding="utf-8"))
    names = [row["case"] for row in report["rows"] if row["ours"] > 0 and Case.parse(row["case"])]
    names = [name for name in names if options.filter in name]
    options.implementations = options.only.split(",")
    options.results = (options.json or options.report).resolve().with_suffix(".part")
    results = run_children(options, names)
    table, failed, larger = merge(report, results)
    print(
        f"\n{'case':<34} {'ours us':>9} {'beside':>9} {'best peer':<12} {'us':>9} {'':>7} {'error':>9} "
        f"{'FlashInf.':>9} {'ratio':>6}"
    )
    print("\n".join(table))
    report["command"] = report["command"].split(" + ")[0] + " + " + " ".join(["compare_decode.py", *sys.argv[1:]])
    write(report, options.json or options.report)
    print(f"{len(table)} cases, {failed} of ours wrong, {larger} less exact than FlashInfer")
    return 1 if failed or not table else 0


if __name__ == "__main__":
    sys.exit(main())
