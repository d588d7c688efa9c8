#!/usr/bin/env python3
"""Makes tests/fixtures/kv/quantiles.bin, the value distribution of the synthetic keys, values and queries.

    python3 validation/make_kv_fixture.py smollm2_135m_qkv.safetensors

The input holds bf16 bit patterns (stored as U16) of `layerN.{q,k,v}`, shape [token, head, head_dim], of
SmolLM2-135M-Instruct; see tests/fixtures/kv/README.md. The output is little-endian u16 bf16,
[K|V|Q][192 channels][128 quantiles], ascending in value: channel = head * 64 + dim of layer 9, for queries
of the first query head of every KV head. Needs nothing but Python.
"""

import array
import json
import pathlib
import struct
import sys

LAYER = 9
QUANTILES = 128


def load(path):
    data = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "U16":
            sys.exit(f"{path}: {name} is {entry['dtype']}, U16 (bf16 bit patterns) is needed")
        begin, end = entry["data_offsets"]
        values = array.array("H")
        values.frombytes(data[8 + length + begin : 8 + length + end])
        if sys.byteorder == "big":
            values.byteswap()
        tensors[name] = (entry["shape"], values)
    return tensors


def value(bits):
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def quantiles(samples):
    ordered = sorted(samples, key=value)
    return [ordered[(2 * i + 1) * len(ordered) // (2 * QUANTILES)] for i in range(QUANTILES)]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    tensors = load(sys.argv[1])
    kv_heads = tensors[f"layer{LAYER}.k"][0][1]
    table = array.array("H")
    for kind in "kvq":
        (tokens, heads, dim), values = tensors[f"layer{LAYER}.{kind}"]
        for head in range(0, heads, heads // kv_heads):
            for d in range(dim):
                table.extend(quantiles(values[head * dim + d :: heads * dim]))
        assert tokens * heads * dim == len(values)
    if sys.byteorder == "big":
        table.byteswap()
    out = pathlib.Path(__file__).parent.parent / "tests/fixtures/kv/quantiles.bin"
    out.write_bytes(table.tobytes())
    print(f"{out}: {len(table) * 2} bytes")


if __name__ == "__main__":
    main()
