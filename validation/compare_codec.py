#!/usr/bin/env python3
"""Lossless codecs beside nvCOMP's, on the same keys and values, in the same run on the same GPU.

    hybridkv bench codec --json codec.json
    python3 validation/compare_codec.py --report codec.json --kv smollm2_135m_qkv.safetensors

A pool of blocks like that of the benchmark, `[block][layer][K|V][head][token][dim]` of bf16, is filled with captured
keys and values (`--kv`, of the form that `hybridkv codec` reads: planes of 16 tokens from random places) or, without,
from the distribution of real ones in tests/fixtures/kv. nvCOMP gets the pool as one buffer, as bytes and, where an
algorithm knows types, as numbers of 16 bits. `planes` is the pool with the high bytes of all elements before the low
ones, each half by itself, and as it is where it does not shrink; taking them apart is not timed, to nvCOMP's advantage.
A figure counts only if decoding gave back every byte. Every implementation runs in a process of its own; so do ours,
whose rates are printed beside those of the report.

Rates and ratios are of uncompressed bytes. They go into the rows of the report (`peers`): rates into
`<codec>/{encode,decode}/full` of the lossless codecs, ratios into rows of their own, `<codec>/ratio`, where ours is that
of all blocks, those that a codec does not hold counted as they are.

Versions: nvidia-nvcomp-cu13 6.0.0.12 and nvidia-libnvcomp-cu13 6.0.0.12; any torch with CUDA.
"""

import argparse
import array
import json
import math
import pathlib
import random
import statistics
import struct
import subprocess
import sys
import time

from report_file import write

ROOT = pathlib.Path(__file__).resolve().parent.parent
# As in `hybridkv bench codec`: a block of a full-attention group of Llama-4-Scout on one of 8 ranks.
LAYERS, HEADS, TOKENS, DIM = 12, 1, 16, 128
BLOCK_ELEMENTS = LAYERS * 2 * HEADS * TOKENS * DIM
# Rows of `head_dim` elements that are different; the pool is made of them at random.
SAMPLES = 1 << 14
FIXTURE_CHANNELS, FIXTURE_QUANTILES = 192, 128
# Ours that give back every bit, as far as the library has them.
LOSSLESS = ["lx4", "lxe"]
# nvCOMP's algorithm, its options, and whether high and low bytes are taken apart.
PEERS = {
    "nvCOMP ANS": ("ANS", {}, False),
    "nvCOMP ANS 16-bit": ("ANS", {"data_type": "<f2"}, False),
    "nvCOMP ANS planes": ("ANS", {}, True),
    "nvCOMP LZ4": ("LZ4", {}, False),
    "nvCOMP Cascaded": ("Cascaded", {"data_type": "<u2"}, False),
    "nvCOMP Bitcomp": ("Bitcomp", {"data_type": "<u2"}, False),
}
# Bytes that nvCOMP compresses independently of each other.
CHUNK = 1 << 16


def read_capture(data):
    """K and V of all layers of a safetensors file: two lists of (tokens, heads, dim, bit patterns of bf16)."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    found = {"k": [], "v": []}
    for name in sorted(name for name in header if name.startswith("layer") and name[-2:] in (".k", ".v")):
        entry = header[name]
        if entry["dtype"] not in ("BF16", "U16"):
            raise ValueError(f"{name} is {entry['dtype']}; BF16 or U16, the bit patterns of bf16, are read")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        bits = array.array("H", data[begin:end])
        if sys.byteorder == "big":
            bits.byteswap()
        found[name[-1]].append((*entry["shape"], bits))
    if not found["k"] or len(found["k"]) != len(found["v"]):
        raise ValueError("there is no layerN.k and layerN.v")
    return found["k"], found["v"]


def planes_of_capture(tensors, count, draw):
    """`count` planes of TOKENS consecutive tokens of DIM channels: a head of a layer, or as many small heads side by
    side as make DIM channels."""
    planes = array.array("H")
    for _ in range(count):
        tokens, heads, dim, bits = draw.choice(tensors)
        side_by_side = [draw.randrange(heads) for _ in range(-(-DIM // dim))]
        first = draw.randrange(tokens - TOKENS + 1)
        for token in range(first, first + TOKENS):
            row = [bits[(token * heads + head) * dim :][:dim] for head in side_by_side]
            planes.extend(element for part in row for element in part[: DIM // len(row)])
    return planes


def planes_of_fixture(table, kind, count, draw):
    """`count` planes whose channels are those of the fixture, every element one of its quantiles. `kind`: 0 K, 1 V."""
    planes = array.array("H")
    for _ in range(count):
        first = draw.randrange(FIXTURE_CHANNELS // 64) * 64
        channels = [(kind * FIXTURE_CHANNELS + (first + d) % FIXTURE_CHANNELS) * FIXTURE_QUANTILES for d in range(DIM)]
        for _ in range(TOKENS):
            planes.extend(table[channel + draw.randrange(FIXTURE_QUANTILES)] for channel in channels)
    return planes


def samples(kv, seed=1):
    """(planes of K, planes of V): as many as hold SAMPLES rows."""
    draw, count = random.Random(seed), SAMPLES // TOKENS
    if kv:
        return [planes_of_capture(tensors, count, draw) for tensors in read_capture(kv.read_bytes())]
    table = array.array("H", (ROOT / "tests/fixtures/kv/quantiles.bin").read_bytes())
    if sys.byteorder == "big":
        table.byteswap()
    return [planes_of_fixture(table, kind, count, draw) for kind in range(2)]


def make_pool(options):
    """The pool on the GPU, [block, layer, K|V, head, token, dim] of int16."""
    import torch

    blocks = max((options.mib << 20) // (2 * BLOCK_ELEMENTS), 2)
    generator = torch.Generator().manual_seed(2)
    pool = torch.empty((blocks, LAYERS, 2, HEADS, TOKENS, DIM), dtype=torch.int16, device="cuda")
    for kind, planes in enumerate(samples(options.kv)):
        planes = torch.frombuffer(planes, dtype=torch.int16).reshape(-1, TOKENS, DIM).cuda()
        index = torch.randint(len(planes), (blocks, LAYERS, HEADS), generator=generator).cuda()
        pool[:, :, kind] = planes[index]
    return pool


def seconds_of(run, limit):
    """Median time of a run by the wall, launches and the wait for them included, after one that is not counted."""
    import torch

    run()
    torch.cuda.synchronize()
    times, end = [], time.perf_counter() + limit
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure_peer(name, options):
    """The figures of one of nvCOMP's codecs."""
    import torch
    from nvidia import nvcomp

    algorithm, kinds, planes = PEERS[name]
    pool = make_pool(options).view(torch.uint8).reshape(-1)
    parts = [pool.reshape(-1, 2)[:, byte].contiguous() for byte in (1, 0)] if planes else [pool]
    codec = nvcomp.Codec(algorithm=algorithm, uncomp_chunk_size=CHUNK, **kinds)
    done = []
    for part in parts:
        source, packing = nvcomp.as_array(part), codec.compression_config(part.numel())
        unpacking = codec.decompression_config(packing)
        encoded = codec.encode(source, compression_config=packing)
        decoded = codec.decode(encoded, decompression_config=unpacking)
        torch.cuda.synchronize()
        restored = torch.as_tensor(decoded, device="cuda").reshape(-1).view(torch.uint8)
        # With memory and configurations at hand, nothing waits but for the end.
        again = codec.encode(source, compression_config=packing)
        encode = lambda: codec.encode(source, out=again, compression_config=packing)
        decode = lambda: codec.decode(encoded, out=decoded, decompression_config=unpacking)
        done.append({
            "bytes": part.numel(), "encoded": encoded.buffer_size, "exact": torch.equal(restored, part),
            "encode": seconds_of(encode, options.seconds), "decode": seconds_of(decode, options.seconds),
        })
    return [dict(figures(done), name=name)]


def figures(parts):
    """Ratio and rates of parts that are encoded one after the other; one that does not shrink stays as it is."""
    total = sum(part["bytes"] for part in parts)
    smaller = [part for part in parts if part["encoded"] < part["bytes"]]
    stored = total - sum(part["bytes"] - part["encoded"] for part in smaller)
    # Whether a part shrinks is known only when it has been encoded; if none does, that is what the codec costs.
    encode = sum(part["encode"] for part in parts)
    decode = sum(part["decode"] for part in smaller or parts)
    return {
        "ratio": total / stored, "encode": total / encode / 1e9, "decode": total / decode / 1e9,
        "exact": all(part["exact"] for part in parts),
    }


def measure_ours(options):
    """Our lossless codecs: rates of those that have kernels, ratios of all."""
    import torch

    sys.path.insert(0, str(ROOT / "python"))
    import hybridkv as hkv

    pool = make_pool(options)
    blocks = len(pool)
    geometry = hkv.Geometry(LAYERS, HEADS, DIM, TOKENS, hkv.BF16)
    kernels = hkv.Kernels(hkv.Device("cuda:0"))
    done = []
    for name in LOSSLESS:
        try:
            capacity = hkv.slot_bytes(name, geometry)
        except hkv.Error as error:
            done.append({"name": name, "note": str(error)})
            continue
        found = {"name": name, "exact": True}
        # On the host, of some blocks: slots may differ in size.
        host = pool[: options.host_blocks].cpu().numpy()
        slot, decoded, stored = bytearray(capacity), array.array("H", bytes(2 * BLOCK_ELEMENTS)), 0
        for block in host:
            held = hkv.encode_slot(name, geometry, block, slot).status == hkv.SLOT_OK
            stored += hkv.inspect_slot(slot).bytes if held else 2 * BLOCK_ELEMENTS
            if held:
                hkv.decode_slot(geometry, slot, decoded)
                found["exact"] &= decoded.tobytes() == block.tobytes()
        found["ratio"] = 2 * BLOCK_ELEMENTS * len(host) / stored
        pitch = -(-capacity // 128) * 128
        slots = torch.empty(blocks * pitch, dtype=torch.uint8, device="cuda")
        rows = torch.tensor([[i, slots.data_ptr() + i * pitch] for i in range(blocks)], dtype=torch.int64).cuda()
        results = torch.zeros((blocks, 2), dtype=torch.int64, device="cuda")
        target = torch.zeros_like(pool)

        def args(memory):
            kv = hkv.KV(memory[:, :, 0], memory[:, :, 1], dtype=hkv.BF16)
            return hkv.codec_args(kv, codec=name, blocks=rows, results=results, num_blocks=blocks)

        encode, decode = args(pool), args(target)
        try:
            kernels.encode(encode)
        except hkv.Error as error:
            done.append(dict(found, note=str(error)))
            continue
        kernels.decode(decode)
        torch.cuda.synchronize()
        held = results[:, 1] >> 32 == hkv.SLOT_OK
        found["exact"] &= bool(torch.equal(target[held], pool[held]))
        total = 2 * pool.numel()
        for verb, run in (("encode", lambda: kernels.encode(encode)), ("decode", lambda: kernels.decode(decode))):
            found[verb] = total / seconds_of(run, options.seconds) / 1e9
        done.append(found)
    return done


def run_children(options):
    """Results of all implementations, each in a process whose end ends nothing else."""
    results = []
    for name in ["ours", *PEERS]:
        if options.only and options.only not in name:
            continue
        command = [sys.executable, __file__, "--child", name, "--mib", str(options.mib)]
        command += ["--seconds", str(options.seconds), "--host-blocks", str(options.host_blocks)]
        command += ["--kv", str(options.kv)] if options.kv else []
        try:
            child = subprocess.run(command, timeout=options.patience, stdout=subprocess.PIPE, text=True)
            lines = child.stdout.splitlines()
            results += [json.loads(line) for line in lines if line.startswith("{")]
            if child.returncode != 0:
                results.append({"name": name, "note": f"ended with {child.returncode}"})
        except subprocess.TimeoutExpired:
            results.append({"name": name, "note": f"took longer than {options.patience:g} s"})
    return results


def counts(result):
    """Whether a result has figures that count."""
    return "ratio" in result and result.get("exact") is True and all(
        math.isfinite(result.get(key, 1.0)) and result.get(key, 1.0) > 0 for key in ("ratio", "encode", "decode")
    )


def merge(report, results):
    """Puts the figures that count into the rows; returns those of ours that are wrong."""
    ours = {result["name"]: result for result in results if result["name"] in LOSSLESS}
    peers = [result for result in results if result["name"] in PEERS and counts(result)]
    rows = {row["case"]: row for row in report["rows"]}
    for codec in LOSSLESS:
        for verb in ("encode", "decode"):
            row = rows.get(f"{codec}/{verb}/full")
            if row is None:
                continue
            row.pop("peers", None)
            beside = {peer["name"]: peer[verb] for peer in peers}
            if beside:
                row["peers"] = beside
    report["rows"] = [row for row in report["rows"] if row["case"] not in [f"{codec}/ratio" for codec in LOSSLESS]]
    wrong = []
    for codec, result in ours.items():
        if "ratio" not in result:
            continue
        row = {"case": f"{codec}/ratio", "ours": result["ratio"], "unit": "x", "pass": result["exact"]}
        beside = {peer["name"]: peer["ratio"] for peer in peers}
        if beside:
            row["peers"] = beside
        # The codec for speed has no goal of its own; the one for size has to beat them all.
        if beside and codec == "lxe":
            row["goal"] = max(beside.values())
        if not result["exact"]:
            row["note"] = "decoding does not give back every bit"
            wrong.append(codec)
        report["rows"].append(row)
    return wrong


def table(report, results):
    """Lines that say what was found."""
    lines = [f"{'':<20} {'ratio':>7} {'encode':>9} {'decode':>9}   GB/s"]
    for result in results:
        figure = lambda key: f"{result[key]:.3f}" if key == "ratio" and key in result else (
            f"{result[key]:.0f}" if key in result else "-"
        )
        note = result.get("note") or ("" if counts(result) else "NOT EXACT")
        lines.append(f"{result['name']:<20} {figure('ratio'):>7} {figure('encode'):>9} {figure('decode'):>9}   {note}")
        for verb in ("encode", "decode"):
            row = next((row for row in report["rows"] if row["case"] == f"{result['name']}/{verb}/full"), None)
            if row and verb in result:
                lines.append(f"{'':<20} {verb} of the report: {row['ours']:.0f}")
    return lines


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--report", type=pathlib.Path, help="what `hybridkv bench codec` wrote: read, and written again")
    parser.add_argument("--json", type=pathlib.Path, help="write it here instead")
    parser.add_argument("--kv", type=pathlib.Path, help="captured keys and values, safetensors")
    parser.add_argument("--mib", type=int, default=256, help="size of the pool")
    parser.add_argument("--host-blocks", type=int, default=256, help="blocks that ratios of ours are of")
    parser.add_argument("--seconds", type=float, default=0.2, help="of timing, per figure")
    parser.add_argument("--only", default="", help="only implementations whose name holds this")
    parser.add_argument("--patience", type=float, default=60, help="seconds for every implementation")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        found = measure_ours(options) if options.child == "ours" else measure_peer(options.child, options)
        print("\n".join(json.dumps(result) for result in found))
        return 0
    if options.report is None:
        parser.error("--report is needed")

    report = json.loads(options.report.read_text(encoding="utf-8"))
    results = run_children(options)
    wrong = merge(report, results)
    print("\n".join(table(report, results)))
    ours = [result for result in results if result["name"] in LOSSLESS and "ratio" in result]
    report["command"] = report["command"].split(" + ")[0] + " + " + " ".join(
        ["compare_codec.py", *(sys.argv[1:] if arguments is None else arguments)]
    )
    write(report, options.json or options.report)
    return 1 if wrong or not ours else 0


if __name__ == "__main__":
    sys.exit(main())
