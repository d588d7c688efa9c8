#!/usr/bin/env python3
"""What compare_movement.py does without a GPU: which rows it compares, how many blocks they are, what it writes back.

HYBRIDKV_MOVEMENT_REPORT may name a report of `hybridkv bench movement`, whose rows then have to be known."""

import contextlib
import io
import json
import os
import pathlib
import tempfile
import unittest

import compare_movement as compare
from compare_movement import Case

# Rows that are about something else than one move.
OURS_ALONE = ("arena/", "restore/scout", "restore+", "prefill+", "submit/", "interference/")


def report(*rows):
    rows = [dict({"unit": "GB/s", "pass": True}, case=case, ours=ours, **more) for case, ours, more in rows]
    return {"schema": 1, "command": "hybridkv bench movement", "limits": {}, "rows": rows}


class Cases(unittest.TestCase):
    def test_rows_are_what_their_names_say(self):
        fragments = Case.parse("h2d/256")
        self.assertEqual((fragments.row, fragments.rows, fragments.blocks, fragments.bytes), (256, 1, 65536, 16 << 20))
        layers = Case.parse("scout48/d2h")
        self.assertEqual((layers.ways, layers.row, layers.rows, layers.blocks), (("d2h",), 4096, 96, 1365))
        both = Case.parse("duplex/1K")
        self.assertEqual((both.ways, both.row, both.rows), (("h2d", "d2h"), 1024, 96))
        restore = [Case.parse(f"restore/128K/{layout}") for layout in ("BlockFirst", "LayerFirst")]
        self.assertEqual([case.bytes for case in restore], [956_301_312] * 2)
        self.assertEqual([case.row for case in restore], [96 << 10, 4096])
        self.assertTrue(all(case.row * case.rows * case.blocks <= compare.SIDE for case in restore))

    def test_what_nobody_else_does_is_left_out(self):
        for name in ("arena/2GiB", "h2d/4K/8ctas", "interference/p99", "submit/10000", "restore/scout-tp8/128K"):
            self.assertIsNone(Case.parse(name), name)

    def test_every_row_of_a_report_is_known(self):
        path = os.environ.get("HYBRIDKV_MOVEMENT_REPORT")
        if path is None:
            self.skipTest("HYBRIDKV_MOVEMENT_REPORT is not set")
        names = [row["case"] for row in json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["rows"]]
        unknown = [name for name in names if not (Case.parse(name) or name.startswith(OURS_ALONE) or "ctas" in name)]
        self.assertEqual(unknown, [])
        self.assertGreater(sum(Case.parse(name) is not None for name in names), 10)

    def test_figures_are_in_the_unit_of_the_row(self):
        self.assertEqual(Case.parse("block96K/h2d").figure(10_000.0, "GB/s"), 5461 * (96 << 10) / 1e7)
        inside = Case.parse("d2d/1M")
        self.assertEqual(inside.figure(1_000.0, "GB/s"), 2 * (512 << 20) / 1e6, "read and written")
        self.assertEqual(Case.parse("restore/128K/BlockFirst").figure(18_500.0, "ms"), 18.5)


class Reports(unittest.TestCase):
    def test_only_what_arrived_counts(self):
        rows = report(("h2d/1M", 54.0, {"peers": {"old": 1.0}}), ("d2h/1M", 50.0, {}), ("arena/2GiB", 120.0, {"peers": {"x": 2.0}}))
        bytes_moved = 512 << 20
        table, slower = compare.merge(rows, [
            {"case": "h2d/1M", "peer": "kvbm", "us": bytes_moved / 50e3, "right": True},
            {"case": "h2d/1M", "peer": "sglang/4ctas", "us": bytes_moved / 90e3, "right": False},
            {"case": "h2d/1M", "peer": "cuMemcpyBatchAsync", "note": "RuntimeError: 1"},
            {"case": "d2h/1M", "peer": "kvbm", "us": bytes_moved / 55e3, "right": True},
        ])
        up, down, arena = rows["rows"]
        self.assertEqual(list(up["peers"]), ["kvbm"])
        self.assertAlmostEqual(up["peers"]["kvbm"], 50.0)
        self.assertEqual((slower, len(table)), (1, 2))
        self.assertIn("sglang/4ctas: what it moved is wrong; cuMemcpyBatchAsync: RuntimeError: 1", table[0])
        self.assertNotIn("SLOWER", table[0])
        self.assertIn("SLOWER", table[1])
        self.assertEqual(arena["peers"], {"x": 2.0}, "rows that are not compared are left alone")

    def test_of_times_less_is_better(self):
        rows = report(("restore/128K/BlockFirst", 19.0, {"unit": "ms"}))
        _, slower = compare.merge(rows, [
            {"case": "restore/128K/BlockFirst", "peer": "a", "us": 30_000.0, "right": True},
            {"case": "restore/128K/BlockFirst", "peer": "b", "us": 18_000.0, "right": True},
        ])
        self.assertEqual((slower, rows["rows"][0]["peers"]), (1, {"a": 30.0, "b": 18.0}))

    def test_the_command(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "movement.json"
            compare.write(report(("h2d/4K", 50.0, {}), ("d2h/4K", 0.0, {}), ("submit/10000", 0.03, {})), path)
            before = path.read_text(encoding="utf-8")

            def run(*arguments):
                said = io.StringIO()
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    try:
                        return compare.main(["--report", str(path), *arguments]), said.getvalue()
                    except SystemExit as exit:
                        return exit.code, said.getvalue()

            code, said = run("--dry-run")
            self.assertEqual(code, 0)
            self.assertIn("1 cases, cuMemcpyBatchAsync, kvbm, sglang", said)
            self.assertEqual(run("--dry-run", "--filter", "duplex")[0], 1)
            self.assertIn("--only takes", run("--only", "sgl")[1])
            self.assertEqual(path.read_text(encoding="utf-8"), before)
            # Without any library there is nothing to compare with, which is no success.
            code, said = run("--only", "kvbm,sglang")
            self.assertEqual(code, 1)
            self.assertIn("its library is not here (--kvbm)", said)
            self.assertEqual(json.loads(path.read_text(encoding="utf-8"))["rows"], json.loads(before)["rows"])


if __name__ == "__main__":
    unittest.main()
