#!/usr/bin/env python3
"""What bounds the decode kernels: cases of `hybridkv bench decode` under Nsight Compute.

One launch of every kernel of a case is profiled, on a cold cache and with the clocks as they are:

    python3 validation/profile_decode.py --hybridkv target/release/hybridkv --json profile.json

Per kernel: its time, what it reads from DRAM and how fast, which part of the peak that is, the warps that are
resident on a multiprocessor and the bytes that their rings of copies have room for (128 KB when all are there;
docs/performance.md), how often the schedulers issue, and what warps wait for: the share of their time in
every state, the largest first. Profiling serialises kernels: what overlaps in a step does not overlap here.
"""

import argparse
import csv
import json
import pathlib
import re
import shutil
import subprocess
import sys

CASES = [
    "read_blocks/b16", "64x8K/32-8/bf16", "16x32K/5-1/bf16", "1x8K/5-1/bf16", "64x8K/32-8/fp8", "256x512/32-8/fp8",
]
KERNELS = "regex:hkv_(attention|read_blocks|merge_states|plan)"
# Kernels of a case that are profiled: the launch and what belongs to it.
LAUNCHES = 2
SECTIONS = ["SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "SchedulerStats", "Occupancy", "LaunchStats"]
METRICS = ["dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum", "lts__t_sector_hit_rate.pct"]
RING_BYTES = 128 << 10  # of a multiprocessor that is full
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
# Seconds that a case may take.
PATIENCE = 60


def profile(ncu, hybridkv, case, device):
    """The metrics of every kernel of a case that was profiled, by name."""
    command = [ncu, "--clock-control", "none", "--kernel-name", KERNELS, "--launch-count", str(LAUNCHES)]
    command += ["--kill", "yes", "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS)]
    for section in SECTIONS:
        command += ["--section", section]
    command += [hybridkv, "bench", "decode", "--device", device, "--filter", case, "--seconds", "0.001"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    kernels = parse(run.stdout)
    if not kernels:
        said = (run.stdout + run.stderr).strip().splitlines()
        raise RuntimeError(f"ncu gave no figures: {' / '.join(said[-3:])}")
    return kernels


def parse(text):
    """Rows of `--page raw --csv`: a header, a row of units, then a row per kernel; other lines stand before."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    return [dict(row, name=row["Kernel Name"].split("(")[0]) for row in rows if row.get("ID", "").isdigit()]


def number(row, metric):
    """A metric, or None where this GPU or this version of ncu has none of that name."""
    try:
        return float(row[metric].replace(",", ""))
    except (KeyError, ValueError):
        return None


def account(row):
    """The figures of one kernel."""
    ns, read = number(row, "gpu__time_duration.sum"), number(row, "dram__bytes_read.sum")
    warps = number(row, "sm__warps_active.avg.per_cycle_active")
    full, issued = warps_when_full(row), number(row, "smsp__issue_active.avg.per_cycle_active")
    stalls = {}
    for metric in row:
        found = STALL.fullmatch(metric)
        if found and (value := number(row, metric)) is not None:
            stalls[found[1]] = value
    total = sum(stalls.values())
    return {
        "us": ns and ns / 1e3,
        "dram_read_bytes": read,
        "dram_read_gbps": read / ns if read and ns else None,
        "dram_percent_of_peak": number(row, "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed")
        or number(row, "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
        "l2_hit_percent": number(row, "lts__t_sector_hit_rate.pct"),
        "warps_per_multiprocessor": warps,
        "bytes_in_flight": RING_BYTES * min(warps / full, 1.0) if warps and full else None,
        "registers": number(row, "launch__registers_per_thread"),
        "issue_active_percent": issued and 100 * issued,
        "stalls": {name: value / total for name, value in sorted(stalls.items(), key=lambda item: -item[1])} if total else {},
    }


def warps_when_full(row):
    """Warps of a multiprocessor that holds as many CTAs as it can, by registers, shared memory and warps."""
    limits = ["registers", "shared_mem", "warps", "blocks"]
    limits = [number(row, f"launch__occupancy_limit_{limit}") for limit in limits]
    threads = number(row, "launch__block_size")
    ctas = min((limit for limit in limits if limit), default=None)
    return ctas * threads / 32 if ctas and threads else None


def line(case, name, figures):
    def show(key, form):
        value = figures[key]
        return format(value, form) if value is not None else "-".rjust(int(form.split(".")[0]))

    stalls = ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(figures["stalls"].items())[:5])
    flight = figures["bytes_in_flight"]
    return (
        f"{case:<22} {name:<36} {show('us', '9.2f')} {show('dram_read_gbps', '8.0f')} "
        f"{show('dram_percent_of_peak', '6.1f')} {show('l2_hit_percent', '6.1f')} "
        f"{show('warps_per_multiprocessor', '6.1f')} {'-' if flight is None else f'{flight / 1024:.0f}':>6} "
        f"{show('issue_active_percent', '6.1f')}  {stalls}"
    )


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hybridkv", default=str(root / "target/release/hybridkv"), help="the program")
    parser.add_argument("--ncu", default=shutil.which("ncu") or "ncu")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas; every one is a filter")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    print(
        f"{'case':<22} {'kernel':<36} {'us':>9} {'GB/s':>8} {'% peak':>6} {'L2 hit':>6} {'warps':>6} "
        f"{'KB fl.':>6} {'issue':>6}  what warps wait for"
    )
    accounts, failed = {}, 0
    for case in options.cases.split(","):
        try:
            kernels = profile(options.ncu, options.hybridkv, case, options.device)
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"{case:<22} {error}", flush=True)
            failed += 1
            continue
        for row in kernels:
            figures = account(row)
            accounts.setdefault(case, []).append(dict(figures, kernel=row["name"]))
            print(line(case, row["name"], figures), flush=True)
    if options.json:
        options.json.write_text(json.dumps(accounts, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
