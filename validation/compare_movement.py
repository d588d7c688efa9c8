#!/usr/bin/env python3
"""Moves of blocks beside others: SGLang's transfer kernels, kvbm-kernels and the driver's cuMemcpyBatchAsync, on the
cases of `hybridkv bench movement`, in the same run on the same GPU.

    hybridkv bench movement --json movement.json
    python3 validation/compare_movement.py --report movement.json --sglang common_ops.abi3.so --kvbm libkvbm_kernels.so

The cases are the rows of the report: as many bytes, in blocks and rows of the same sizes, at random addresses of memory
that is laid out as ours. Times are those of the host, from the first call until all streams are done, as ours.

- `sglang/<n>ctas`: the kernels that one buffer per layer goes by (`transfer_kv_*_mla*`; those of separate keys and
  values are the same ones, called for both), a row being one item, with every quota of CTAs of QUOTAS. To the device rows of
  many layers go by one launch per layer, to the host by one launch in all, as SGLang does it.
- `kvbm`: `kvbm_kernels_launch_vectorized_copy`, a pair of addresses per row.
- `cuMemcpyBatchAsync`: a descriptor per row, BATCH of them a call, so that the engines work while the host submits; both
  ways, by turns of TURN bytes.

A figure counts only when what it moved has been compared, byte by byte. Every implementation runs in a process of its
own, whose end ends nothing else. The figures go into the rows of the report (`peers`). `--dry-run` says what would
run; it needs neither torch nor a GPU.

Versions, and where the libraries come from (neither is needed by hybridkv):
- SGLang: sgl_kernel/sm90/common_ops.abi3.so (20 MB, kernels of sm_90 alone), out of the wheel of sglang-kernel
  0.4.2.post2; it needs torch 2.11. Nothing else of the wheel is used:
  `pip download --no-deps sglang-kernel==0.4.2.post2 && unzip -j sglang_kernel-*.whl 'sgl_kernel/sm90/common_ops.abi3.so'`
- kvbm-kernels 1.6.1 (a crate): its one CUDA file as a library (1.2 MB), from the folder of the unpacked crate:
  `nvcc -O3 -std=c++17 -shared -Xcompiler -fPIC -arch=sm_90 -cudart static -o libkvbm_kernels.so cuda/tensor_kernels.cu`
"""

import argparse
import ctypes
import json
import pathlib
import re
import statistics
import subprocess
import sys
import time
import zlib
from array import array
from dataclasses import dataclass

from report_file import write

IMPLEMENTATIONS = ["cuMemcpyBatchAsync", "kvbm", "sglang"]
# Bytes of a side of the link, and of a move over it.
SIDE = 1 << 30
MOST = 512 << 20
# Rows of a move at most: what is submitted one by one takes seconds else.
MAX_ROWS = 1 << 18
# Descriptors of one call, and bytes of one direction before the other one has its turn.
BATCH = 1024
TURN = 8 << 20
# CTAs, and warps of each, that SGLang's kernels are given; 2 and 32 are its defaults.
QUOTAS = [2, 4, 8, 16]
WARPS = 32
# A block of 12 layers of Llama-4-Scout on one of 8 ranks, and those of a prefix of 128K tokens.
SCOUT_BLOCK = 96 << 10
SCOUT_BLOCKS = 8192 + 3 * 512
# Seconds that the process of one implementation may take.
PATIENCE = 120


def size(text):
    """`4K` as the benchmark writes it."""
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1])
    return int(text[:-1]) * unit if unit else int(text)


@dataclass(frozen=True)
class Case:
    """A case by its name, as `hybridkv bench movement` names it."""

    name: str
    ways: tuple  # h2d, d2h, d2d; two of them at once
    row: int  # bytes that are contiguous on both sides
    rows: int  # of a block, which is contiguous on the host
    blocks: int  # one way

    @classmethod
    def parse(cls, name):
        """None for what is no move that the others can do as well."""
        both = ("h2d", "d2h")
        forms = [
            (r"(h2d|d2h|d2d)/(\d+[KM]?)", lambda way, row: ((way,), size(row), 1)),
            (r"block96K/(h2d|d2h|d2d)", lambda way: ((way,), SCOUT_BLOCK, 1)),
            (r"scout48/(h2d|d2h)", lambda way: ((way,), 4096, 96)),
            (r"pages/(\d+)/(h2d|d2h)", lambda row, way: ((way,), int(row), SCOUT_BLOCK // int(row))),
            (r"restore/128K/BlockFirst", lambda: (("h2d",), SCOUT_BLOCK, 1)),
            (r"restore/128K/LayerFirst", lambda: (("h2d",), 4096, SCOUT_BLOCK // 4096)),
            (r"duplex/(512|1K|4K)", lambda row: (both, size(row), SCOUT_BLOCK // size(row))),
            (r"duplex/1M", lambda: (both, 1 << 20, 1)),
            (r"block96K/duplex", lambda: (both, SCOUT_BLOCK, 1)),
            (r"scout48/duplex", lambda: (both, 4096, 96)),
        ]
        for pattern, make in forms:
            found = re.fullmatch(pattern, name)
            if found:
                ways, row, rows = make(*found.groups())
                break
        else:
            return None
        if name.startswith("restore"):
            return cls(name, ways, row, rows, SCOUT_BLOCKS)
        most = min(MOST // len(ways), MAX_ROWS // len(ways) * row)
        most = min(most, row << 16) if rows == 1 else most
        return cls(name, ways, row, rows, max(most // (row * rows), 1))

    @property
    def bytes(self):
        """Of all directions."""
        return self.row * self.rows * self.blocks * len(self.ways)

    def figure(self, microseconds, unit):
        """The time as the row of the report has it."""
        if unit == "ms":
            return microseconds / 1e3
        touched = 2 if self.ways == ("d2d",) else 1
        return touched * self.bytes / microseconds / 1e3


class Move:
    """Blocks of one direction, in random order, between two sides: `near` has the rows of all blocks together, row by
    row, `far` has every block in one piece."""

    def __init__(self, case, way, near, far, seed):
        import torch

        self.way, self.near, self.far, self.row, self.rows = way, near, far, case.row, case.rows
        block = case.row * case.rows
        self.places = min(len(near), len(far)) // block
        if case.blocks > self.places:
            raise ValueError(f"{case.blocks} blocks, and room for {self.places}")
        generator = torch.Generator().manual_seed(seed)
        ids = lambda: torch.randperm(self.places, generator=generator)[: case.blocks]  # noqa: E731
        self.near_ids, self.far_ids = ids(), ids()
        row = torch.arange(self.rows)
        # Which rows of either side, [blocks, rows].
        self.near_rows = row * self.places + self.near_ids[:, None]
        self.far_rows = self.far_ids[:, None] * self.rows + row

    @property
    def to_near(self):
        return self.way == "h2d"

    def sides(self):
        """Source and target: memory, ids of blocks, rows."""
        near, far = (self.near, self.near_ids, self.near_rows), (self.far, self.far_ids, self.far_rows)
        return (far, near) if self.to_near else (near, far)

    def addresses(self):
        """[rows] of every row, block by block, at source and target."""
        return [(memory.data_ptr() + rows * self.row).flatten() for memory, _, rows in self.sides()]

    def check(self):
        """Whether every row has arrived."""
        def rows(memory, index):
            return memory[: len(memory) // self.row * self.row].view(-1, self.row)[index.to(memory.device)].cuda()

        (src, _, src_rows), (dst, _, dst_rows) = self.sides()
        step = max(1, (256 << 20) // (self.row * self.rows))
        return all(
            rows(src, src_rows[i : i + step].flatten()).equal(rows(dst, dst_rows[i : i + step].flatten()))
            for i in range(0, len(src_rows), step)
        )


def by_driver(_options):
    """cuMemcpyBatchAsync, as the driver has it: since 13.0 without the index of what failed."""
    driver = ctypes.CDLL("libcuda.so.1")
    newer = hasattr(driver, "cuMemcpyBatchAsync_v2")
    call = driver.cuMemcpyBatchAsync_v2 if newer else driver.cuMemcpyBatchAsync
    # srcAccessOrder (1: that of the stream), type and id of both places (0: not given), flags.
    attributes = (ctypes.c_uint32 * 6)(1, 0, 0, 0, 0, 0)
    first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)

    def make(move):
        src, dst = (array("Q", side.tolist()) for side in move.addresses())
        sizes = array("Q", [move.row]) * len(src)
        at = [data.buffer_info()[0] for data in (dst, src, sizes)]
        calls = []

        def batch(start, count):
            arrays = [ctypes.c_void_p(address + 8 * start) for address in at]

            def run(stream):
                tail = [ctypes.byref(attributes), ctypes.byref(first), ctypes.c_size_t(1)]
                tail += [] if newer else [ctypes.byref(failed)]
                code = call(*arrays, ctypes.c_size_t(count), *tail, ctypes.c_void_p(stream))
                if code:
                    raise RuntimeError(f"cuMemcpyBatchAsync: {code}")

            return run

        turn = max(1, TURN // move.row)
        for start in range(0, len(src), turn):
            end = min(start + turn, len(src))
            calls.append([batch(i, min(BATCH, end - i)) for i in range(start, end, BATCH)])
        return calls, (src, dst, sizes)

    yield "cuMemcpyBatchAsync", make


def by_kvbm(options):
    library = ctypes.CDLL(str(options.kvbm))
    call = library.kvbm_kernels_launch_vectorized_copy

    def make(move):
        src, dst = (side.cuda() for side in move.addresses())
        pointers = [ctypes.c_void_p(side.data_ptr()) for side in (src, dst)]

        def run(stream):
            code = call(*pointers, ctypes.c_size_t(move.row), ctypes.c_int(len(src)), ctypes.c_void_p(stream))
            if code:
                raise RuntimeError(f"kvbm_kernels_launch_vectorized_copy: {code}")

        return [[run]], (src, dst)

    yield "kvbm", make


def by_sglang(options):
    import torch

    torch.ops.load_library(str(options.sglang))
    ops = torch.ops.sgl_kernel

    def maker(quota):
        def make(move):
            (src, src_ids, _), (dst, dst_ids, _) = move.sides()
            indices = src_ids.cuda(), dst_ids.cuda()
            shape, block = (quota, WARPS), move.row * move.rows
            layer = move.places * move.row
            if move.rows == 1:
                return [[lambda _: ops.transfer_kv_per_layer_mla(src, dst, *indices, move.row, *shape)]], indices
            if move.to_near:
                layers = [dst[i * layer : (i + 1) * layer] for i in range(move.rows)]
                call = ops.transfer_kv_per_layer_mla_pf_lf

                def run(_):
                    for i, to in enumerate(layers):
                        call(src, to, *indices, i, move.row, block, *shape)

                return [[run]], (indices, layers)
            layers = [src.data_ptr() + i * layer for i in range(move.rows)]
            layers = torch.tensor(layers, dtype=torch.uint64, device="cuda")
            call = ops.transfer_kv_all_layer_mla_lf_pf
            return [[lambda _: call(layers, dst, *indices, move.row, block, move.rows, *shape)]], (indices, layers)

        return make

    for quota in QUOTAS:
        yield f"sglang/{quota}ctas", maker(quota)


MAKERS = dict(zip(IMPLEMENTATIONS, (by_driver, by_kvbm, by_sglang)))


def moves_of(case, memory, seed):
    """The moves of a case, each within its part of the memory."""
    near, far, other = memory
    if case.ways == ("d2d",):
        return [Move(case, "d2d", near, other, seed)]
    count = len(case.ways)
    part = lambda side, i: side[i * (len(side) // count) :][: len(side) // count]  # noqa: E731
    return [Move(case, way, part(near, i), part(far, i), seed + i) for i, way in enumerate(case.ways)]


def measure(case, make, memory, seed, seconds):
    """Microseconds of a case, and whether all of it arrived."""
    import torch

    moves = moves_of(case, memory, seed)
    made = [make(move) for move in moves]
    streams = [torch.cuda.Stream() for _ in moves]
    turns = max(len(calls) for calls, _ in made)
    torch.cuda.synchronize()

    def run():
        begin = time.perf_counter()
        for turn in range(turns):
            for (calls, _), stream in zip(made, streams):
                with torch.cuda.stream(stream):
                    for call in calls[turn] if turn < len(calls) else ():
                        call(stream.cuda_stream)
        for stream in streams:
            stream.synchronize()
        return (time.perf_counter() - begin) * 1e6

    run()
    right = all(move.check() for move in moves)
    samples, begin = [], time.perf_counter()
    while len(samples) < 3 or (len(samples) < 100 and time.perf_counter() - begin < seconds):
        samples.append(run())
    return statistics.median(samples), right


def child(options, names):
    """The process of one implementation: a line of JSON per result."""
    import torch

    torch.cuda.set_device(torch.device(options.device))
    generator = torch.Generator(device="cuda").manual_seed(1)
    noise = lambda: torch.randint(0, 256, (SIDE,), dtype=torch.uint8, device="cuda", generator=generator)  # noqa: E731
    far = torch.empty(SIDE, dtype=torch.uint8, pin_memory=True)
    far.copy_(noise())
    memory = noise(), far, noise()
    makers = list(MAKERS[options.implementation](options))
    with open(options.results, "a", encoding="utf-8") as file:
        for name in names:
            case = Case.parse(name)
            for peer, make in makers:
                result = {"case": name, "peer": peer}
                try:
                    # Other addresses every time: what an earlier move left there is then wrong.
                    seed = zlib.crc32(f"{name} {peer}".encode())
                    result["us"], result["right"] = measure(case, make, memory, seed, options.seconds)
                except Exception as error:
                    text = str(error).strip().splitlines() or [""]
                    result["note"] = f"{type(error).__name__}: {text[0][:160]}"
                print(json.dumps(result), file=file, flush=True)
                if "note" in result:
                    torch.cuda.synchronize()  # A broken context ends the process.


def run_children(options, names):
    """All results, from one process per implementation."""
    results = []
    for implementation in options.implementations:
        library = {"kvbm": options.kvbm, "sglang": options.sglang}.get(implementation)
        if implementation in ("kvbm", "sglang") and not (library and library.is_file()):
            print(f"{implementation}: its library is not here (--{implementation}), left out", flush=True)
            continue
        path = options.results.with_name(f"{options.results.name}.{implementation}")
        path.unlink(missing_ok=True)
        command = [sys.executable, "-u", __file__, "--implementation", implementation, "--results", str(path)]
        command += ["--device", options.device, "--seconds", str(options.seconds), "--cases", ",".join(names)]
        for name in ("kvbm", "sglang"):
            library = getattr(options, name)
            command += [f"--{name}", str(library)] if library else []
        try:
            code = subprocess.run(command, timeout=options.patience).returncode
        except subprocess.TimeoutExpired:
            code = "a time-out"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        path.unlink(missing_ok=True)
        results += lines
        if code != 0:
            last = lines[-1]["case"] if lines else "nothing"
            print(f"{implementation}: ended with {code}; the last result is of {last}", flush=True)
    return results


def merge(report, results):
    """Puts the figures that count into the rows. Returns the lines of a table, and how many rows are slower than a peer."""
    table, slower = [], 0
    for row in report["rows"]:
        mine = [result for result in results if result["case"] == row["case"]]
        if not mine:
            continue
        case, notes = Case.parse(row["case"]), []
        peers = {}
        for result in mine:
            if result.get("right"):
                peers[result["peer"]] = case.figure(result["us"], row["unit"])
            else:
                notes.append(f"{result['peer']}: {result.get('note', 'what it moved is wrong')}")
        row.pop("peers", None)
        line = f"{row['case']:<26} {row['ours']:9.1f} {row['unit']:<5}"
        if peers:
            row["peers"] = peers
            less_is_better = row["unit"] == "ms"
            best = (min if less_is_better else max)(peers, key=peers.get)
            ratio = peers[best] / row["ours"] if less_is_better else row["ours"] / peers[best]
            slower += ratio < 1
            line += f" {best:<20} {peers[best]:9.1f} {ratio:6.2f}x" + (" SLOWER" if ratio < 1 else "")
        table.append(line + ("  " + "; ".join(notes) if notes else ""))
    return table, slower


def selected(report, only):
    """The names of the rows that are compared: those that were measured, and that others can do as well."""
    names = [row["case"] for row in report["rows"] if row["ours"] > 0]
    return [name for name in names if Case.parse(name) and only in name]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--report", type=pathlib.Path, help="the report of `hybridkv bench movement`: read, and written again")
    parser.add_argument("--json", type=pathlib.Path, help="write it here instead")
    parser.add_argument("--sglang", type=pathlib.Path, help="common_ops.abi3.so of SGLang's wheel")
    parser.add_argument("--kvbm", type=pathlib.Path, help="the CUDA file of kvbm-kernels as a library")
    parser.add_argument("--filter", default="", help="only the cases whose name holds this")
    parser.add_argument("--only", default=",".join(IMPLEMENTATIONS), help="implementations, separated by commas")
    parser.add_argument("--seconds", type=float, default=0.1, help="of timing, per case and peer")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for every implementation")
    parser.add_argument("--dry-run", action="store_true", help="say which cases would run, and end")
    parser.add_argument("--implementation", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.implementation:
        child(options, options.cases.split(","))
        return 0
    if options.report is None:
        parser.error("--report is needed")
    options.implementations = options.only.split(",")
    unknown = set(options.implementations) - set(IMPLEMENTATIONS)
    if unknown:
        parser.error(f"--only takes {', '.join(IMPLEMENTATIONS)}, not {', '.join(sorted(unknown))}")

    report = json.loads(options.report.read_text(encoding="utf-8"))
    names = selected(report, options.filter)
    if options.dry_run:
        for case in map(Case.parse, names):
            print(f"{case.name:<26} {'+'.join(case.ways):<8} {case.blocks:6} blocks of {case.rows:3} x {case.row:7} bytes")
        print(f"{len(names)} cases, {', '.join(options.implementations)}")
        return 0 if names else 1
    options.results = (options.json or options.report).resolve().with_suffix(".part")
    table, slower = merge(report, run_children(options, names))
    print(f"\n{'case':<26} {'ours':>9} {'':<5} {'best peer':<20} {'':>9}")
    print("\n".join(table))
    command = ["compare_movement.py", *(arguments or sys.argv[1:])]
    report["command"] = report["command"].split(" + ")[0] + " + " + " ".join(command)
    write(report, options.json or options.report)
    print(f"{len(table)} cases, {slower} of ours slower than a peer")
    return 0 if table else 1


if __name__ == "__main__":
    sys.exit(main())
