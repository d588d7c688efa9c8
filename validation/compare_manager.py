#!/usr/bin/env python3
"""The manager beside others on one core: vLLM's `KVCacheManager` on the same trace and the same operations, and
kvbm-logical on the operations (its criterion benchmark is in validation/kvbm).

    hybridkv bench manager --trace mooncake_conversation.jsonl --json manager.json
    cargo bench --bench manager
    (cd validation/kvbm && cargo bench)
    PYTHONPATH=<vllm> python3 validation/compare_manager.py --trace mooncake_conversation.jsonl --report manager.json --runs 3

The figures go into the rows of the report (`peers`); operations that only criterion times become rows of their own.
Hits are exact: `hybridkv replay` also runs with vLLM's policies, where its hits must be equal to vLLM's (`as_vllm`
in the row), and with the crate's own, the figure of the row, they must not be fewer.

vLLM 0.33.0 runs without a GPU and unmodified: its wheel, unpacked, torch, and what vLLM imports. Each of its
measurements has a process of its own. A pool of X tokens is X / 16 block ids, whatever an id holds; vLLM's null
block comes on top. Per request: hash the prompt; look it up and allocate; append the output; free.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from report_file import write

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = 16
MASK = (1 << 64) - 1
# Groups as `hybridkv replay` takes them.
MIXES = {"full": "full", "sw1024": "full,sliding:1024", "scout": "full,chunked:8192*3"}
POOLS = {"1M": 1 << 20, "4M": 4 << 20}
# The time of the whole trace belongs to one pool of each mix.
TRACE_POOLS = {"trace/conversation": ("full", "1M"), "trace/conversation/scout": ("scout", "4M")}
# Rows of operations that only criterion times, and their goals in microseconds.
CRITERION_ROWS = {
    "allocate-free-cached/8192": 300.0, "allocate-free-cached/8192/scout": None, "cold/8192": 800.0,
    "cold/8192/scout": 2000.0,
}


def splitmix64(x):
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def requests(path, limit):
    """(prompt, output) tokens of every request, as `hybridkv replay` expands them."""
    blocks = {}
    with open(path, encoding="utf-8") as file:
        for index, line in enumerate(file):
            if index == limit:
                return
            entry = json.loads(line)
            prompt = []
            for block in entry["hash_ids"]:
                if block not in blocks:
                    blocks[block] = [splitmix64(block * 512 + p) % 100_000 for p in range(512)]
                prompt += blocks[block]
            output = [100_000 + splitmix64((1 << 40) + index * 65_536 + j) % 50_000 for j in range(entry["output_length"])]
            yield prompt[: entry["input_length"]], output


class Vllm:
    """vLLM's manager of a mix, with its default retention."""

    def __init__(self, mix, pool_tokens, max_model_len=10_000_000):
        import torch
        from vllm.sampling_params import SamplingParams
        from vllm.utils.gc_utils import freeze_gc_heap
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
        from vllm.v1.kv_cache_interface import (
            ChunkedLocalAttentionSpec, FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec,
        )
        from vllm.v1.request import Request

        self.Request, self.parameters = Request, SamplingParams(max_tokens=1 << 20)
        register_all_kvcache_specs(None)
        sha256 = get_hash_fn_by_name("sha256")
        kv_cache_utils.init_none_hash(sha256)
        self.hasher = kv_cache_utils.get_request_block_hasher(BLOCK, sha256)
        shape = {"block_size": BLOCK, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16}
        full = FullAttentionSpec(**shape)
        if mix == "scout":
            from vllm.v1.core.kv_cache_planning import _get_kv_cache_groups_uniform_page_size

            local = ChunkedLocalAttentionSpec(attention_chunk_size=8192, **shape)
            layers = {f"l{i}": full if (i + 1) % 4 == 0 else local for i in range(48)}
            groups = _get_kv_cache_groups_uniform_page_size(layers)
        else:
            specs = [full] + [SlidingWindowSpec(sliding_window=1024, **shape)] * (mix == "sw1024")
            groups = [KVCacheGroupSpec([f"l{i}"], spec) for i, spec in enumerate(specs)]
        config = KVCacheConfig(
            num_blocks=pool_tokens // BLOCK + 1, kv_cache_tensors=[], kv_cache_groups=groups,
            prefix_cache_retention_interval=0,
        )
        self.manager = KVCacheManager(
            config, max_model_len=max_model_len, scheduler_block_size=BLOCK, hash_block_size=BLOCK,
            max_in_flight_tokens=16384,
        )
        self.groups = len(groups)
        freeze_gc_heap()

    def request(self, name, prompt):
        """Hashes the prompt, too."""
        return self.Request(name, prompt, self.parameters, None, block_hasher=self.hasher)

    def allocate(self, request):
        """Lookup and allocation of the prompt. Returns its hit tokens."""
        blocks, hit, request.shared_prefix_boundary = self.manager.get_computed_blocks(request)
        tokens = request.num_tokens
        if self.manager.allocate_slots(request, tokens - hit, hit, blocks) is None:
            raise RuntimeError("the pool is too small for a request")
        request.num_computed_tokens = tokens
        return hit

    def append(self, request, output):
        tokens = request.num_tokens
        request.append_output_token_ids(output)
        if self.manager.allocate_slots(request, len(output)) is None:
            raise RuntimeError("the pool is too small for an output")
        request.num_computed_tokens = tokens + len(output)


def vllm_trace(mix, pool, path, limit):
    """Hits, and microseconds per request by phase."""
    vllm = Vllm(mix, pool)
    spent, hits, count = [0.0] * 4, 0, 0
    now = time.perf_counter
    for index, (prompt, output) in enumerate(requests(path, limit)):
        times = [now()]
        request = vllm.request(str(index), prompt)
        times.append(now())
        hits += vllm.allocate(request)
        times.append(now())
        if output:
            vllm.append(request, output)
        times.append(now())
        vllm.manager.free(request)
        times.append(now())
        for i in range(4):
            spent[i] += times[i + 1] - times[i]
        count += 1
        if index % 2000 == 1999:
            print(f"  vllm {mix} {pool}: {index + 1} requests, {hits} hit tokens", file=sys.stderr, flush=True)
    phases = dict(zip(("hash", "allocate", "append", "free"), (s / count * 1e6 for s in spent)))
    return {"hits": hits, "requests": count, "groups": vllm.groups, **phases}


def vllm_operations(mix):
    """Microseconds of the operations of benches/manager.rs: 8,192 blocks, 256 sequences."""
    now, results = time.perf_counter, {}
    suffix = "" if mix == "full" else f"/{mix}"

    def median(act, repeats):
        return statistics.median(act() for _ in range(repeats)) * 1e6

    tokens = BLOCK * 8192 + 1
    prompt = lambda number: [(number * 0x9E3779B9 + i) & 0xFFFFFFFF for i in range(tokens)]  # noqa: E731
    vllm = Vllm(mix, 1 << 20)
    first = prompt(0)

    def hashing():
        start = now()
        vllm.request("h", first)
        return now() - start

    def lookup():
        request = vllm.request("l", first)
        start = now()
        _, hit, _ = vllm.manager.get_computed_blocks(request)
        spent = now() - start
        assert hit == tokens - 1, hit
        return spent

    def cached():
        request = vllm.request("c", first)
        start = now()
        assert vllm.allocate(request) == tokens - 1
        vllm.manager.free(request)
        return now() - start

    fresh = iter(range(1, 1000))

    def cold():
        number = next(fresh)
        request = vllm.request(str(number), prompt(number))
        start = now()
        assert vllm.allocate(request) == 0
        vllm.manager.free(request)
        return now() - start

    cold()
    request = vllm.request("0", first)
    vllm.allocate(request)
    vllm.manager.free(request)
    if mix == "full":
        results["lookup-hash/8192"] = median(hashing, 9)
    results["lookup/8192" + suffix] = median(lookup, 15)
    results["allocate-free-cached/8192" + suffix] = median(cached, 15)
    # The pool is full by then, so that every block taken drops what it cached.
    for _ in range(9):
        cold()
    results["cold/8192" + suffix] = median(cold, 7)

    vllm = Vllm(mix, 16 << 20)
    running = []
    for number in range(256):
        request = vllm.request(f"s{number}", prompt(number)[: 4096 + number % BLOCK])
        vllm.allocate(request)
        running.append(request)

    def step():
        start = now()
        for request in running:
            request.append_output_token_ids(7)
            vllm.manager.allocate_slots(request, 1)
            request.num_computed_tokens += 1
        return now() - start

    results["step/256" + suffix] = median(step, 64)
    return results


def least(known, new):
    """Of the same measurement, taken twice, the least of each time; counts have to be equal."""
    for name in ("hits", "requests", "groups"):
        if known.get(name) != new.get(name):
            raise RuntimeError(f"{name}: {known.get(name)} in one run, {new.get(name)} in another")
    return {name: min(figure, new[name]) for name, figure in known.items()}


def in_a_process(options, *arguments):
    """What this script prints for these arguments, as JSON; None, and a word, when it fails."""
    key = " ".join(arguments)
    if key not in options.measured:
        kept = {}
        if options.vllm and options.vllm.is_file():
            kept = json.loads(options.vllm.read_text(encoding="utf-8"))
        figures = kept.get(key)
        for _ in range(options.runs):
            new = run_child(*arguments)
            figures = least(figures, new) if figures and new else figures or new
        if options.vllm and figures and options.runs:
            options.vllm.write_text(json.dumps(dict(kept, **{key: figures}), indent=1), encoding="utf-8")
        options.measured[key] = figures
    return options.measured[key]


def run_child(*arguments):
    command = [sys.executable, __file__, "--child", *arguments]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=1800, check=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        print(f"vllm {' '.join(arguments)}: {error}", flush=True)
        return None


def as_vllm(options, mix, pool):
    """Hit tokens of our manager with vLLM's policies."""
    command = [str(options.hybridkv), "replay", "--trace", str(options.trace), "--pool-tokens", pool, "--json"]
    command += ["--groups", MIXES[mix], "--config", json.dumps({"retention_interval": 0})]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)["hit_tokens"]


def criterion(folders, name):
    """The least of the medians that criterion noted, in microseconds, or None."""
    paths = [folder / name.replace("/", "_") / "new" / "estimates.json" for folder in folders]
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    return min((note["median"]["point_estimate"] / 1e3 for note in notes), default=None)


def compare(row, options):
    """Puts the figures of others into a row."""
    case, peers = row["case"], {}
    if case.startswith("hits/"):
        _, mix, pool = case.split("/")
        vllm = in_a_process(options, "trace", mix, str(POOLS[pool]), str(options.trace), "0")
        if vllm:
            peers["vllm"] = float(vllm["hits"])
            row.setdefault("error", {})["as_vllm"] = float(as_vllm(options, mix, pool))
            row["pass"] = row["error"]["as_vllm"] == peers["vllm"] and row["ours"] >= peers["vllm"]
    elif case in TRACE_POOLS:
        mix, pool = TRACE_POOLS[case]
        vllm = in_a_process(options, "trace", mix, str(POOLS[pool]), str(options.trace), "0")
        if vllm:
            peers["vllm"] = vllm["requests"] * sum(vllm[phase] for phase in ("hash", "allocate", "append", "free"))
    else:
        mix = "scout" if case.endswith("/scout") else "full"
        vllm = in_a_process(options, "operations", mix) or {}
        peers = {"vllm": vllm.get(case), "kvbm-logical": criterion(options.kvbm, case)}
    if row["unit"] == "us" and any(peers.values()):
        row["note"] = f"others: the least of their runs, on one of {os.cpu_count()} cores"
    row["peers"] = {name: figure for name, figure in peers.items() if figure is not None}
    if not row["peers"]:
        del row["peers"]


def main():
    if sys.argv[1:2] == ["--child"]:
        what, mix, *rest = sys.argv[2:]
        if what == "trace":
            pool, path, limit = rest
            print(json.dumps(vllm_trace(mix, int(pool), path, int(limit) or None)))
        else:
            print(json.dumps(vllm_operations(mix)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trace", type=pathlib.Path, required=True, help="a trace in the Mooncake JSONL form")
    parser.add_argument("--report", type=pathlib.Path, required=True, help="of `hybridkv bench manager`: read, and written again")
    parser.add_argument("--hybridkv", type=pathlib.Path, default=ROOT / "target/release/hybridkv")
    parser.add_argument(
        "--criterion", type=pathlib.Path, nargs="+", default=[ROOT / "target/criterion"],
        help="of `cargo bench --bench manager`; of several runs (CRITERION_HOME) the least counts",
    )
    parser.add_argument(
        "--kvbm", type=pathlib.Path, nargs="+", default=[ROOT / "target/kvbm/criterion"], help="the same of validation/kvbm",
    )
    parser.add_argument("--vllm", type=pathlib.Path, help="keep vLLM's figures in this file")
    parser.add_argument(
        "--runs", type=int, default=1,
        help="of each of vLLM's measurements; with those kept, the least of each time counts (0: only those kept)",
    )
    parser.add_argument("--filter", default="", help="only cases whose name holds this")
    options = parser.parse_args()
    options.measured = {}

    report = json.loads(options.report.read_text(encoding="utf-8"))
    known = {row["case"] for row in report["rows"]}
    for case, goal in CRITERION_ROWS.items():
        figure = criterion(options.criterion, case)
        if case not in known and figure is not None:
            goals = {} if goal is None else {"goal": goal}
            report["rows"].append({"case": case, "ours": figure, "unit": "us", **goals, "pass": True})
    print(f"{'case':32} {'ours':>12} {'unit':7} {'goal':>12}  peers (ours is so many times better)")
    failed = 0
    for row in report["rows"]:
        if options.filter not in row["case"]:
            continue
        compare(row, options)
        failed += not row["pass"]
        better = (lambda p: row["ours"] / p) if row["unit"] == "tokens" else (lambda p: p / row["ours"])
        peers = ", ".join(f"{name} {value:.1f} ({better(value):.2f}x)" for name, value in row.get("peers", {}).items())
        verdict = "" if row["pass"] else f"  FAILED: {row.get('error')}"
        print(f"{row['case']:32} {row['ours']:12.1f} {row['unit']:7} {row.get('goal', 0):12.1f}  {peers}{verdict}", flush=True)
    report["command"] = report["command"].split(" + ")[0] + " + compare_manager.py"
    write(report, options.report)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
