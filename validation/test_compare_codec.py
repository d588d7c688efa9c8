#!/usr/bin/env python3
"""What compare_codec.py does without a GPU: the keys and values it makes, its arithmetic, and what it writes back."""

import array
import contextlib
import io
import json
import pathlib
import random
import struct
import tempfile
import unittest

import compare_codec as compare

# Fewer are enough here.
compare.SAMPLES = 64 * compare.TOKENS


def capture(layers, tokens, heads, dim, dtype="U16"):
    """A safetensors file whose elements say where they are: token, head, dim."""
    data, header = b"", {}
    for layer in range(layers):
        for kind in "kvq":
            bits = array.array(
                "H", [(t * heads + h) * dim + d for t in range(tokens) for h in range(heads) for d in range(dim)]
            )
            header[f"layer{layer}.{kind}"] = {
                "dtype": dtype, "shape": [tokens, heads, dim], "data_offsets": [len(data), len(data) + 2 * len(bits)],
            }
            data += bits.tobytes()
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def report(*cases):
    rows = [{"case": case, "ours": 1000.0, "unit": "GB/s", "pass": True, "peers": {"old": 1.0}} for case in cases]
    return {"schema": 1, "command": "hybridkv bench codec + compare_codec.py --old", "limits": {}, "rows": rows}


OURS = {"name": "lx4", "exact": True, "ratio": 1.31, "encode": 900.0, "decode": 950.0}
ANS = {"name": "nvCOMP ANS", "exact": True, "ratio": 1.19, "encode": 126.0, "decode": 196.0}


class Data(unittest.TestCase):
    def test_planes_of_a_capture_are_tokens_in_a_row(self):
        keys, values = compare.read_capture(capture(2, 40, 3, 64))
        self.assertEqual([len(keys), len(values)], [2, 2])
        self.assertEqual(keys[0][:3], (40, 3, 64))
        planes = compare.planes_of_capture(keys, 5, random.Random(3))
        self.assertEqual(len(planes), 5 * compare.TOKENS * compare.DIM)
        for begin in range(0, len(planes), compare.DIM):
            for half in (planes[begin:][:64], planes[begin + 64 :][:64]):
                self.assertEqual(list(half), list(range(half[0], half[0] + 64)))
                self.assertEqual(half[0] % 64, 0)
        rows = [planes[begin] for begin in range(0, compare.TOKENS * compare.DIM, compare.DIM)]
        self.assertEqual(rows, list(range(rows[0], rows[0] + 3 * 64 * compare.TOKENS, 3 * 64)))

    def test_wide_heads_are_cut(self):
        keys, _ = compare.read_capture(capture(1, 16, 1, 256))
        planes = compare.planes_of_capture(keys, 1, random.Random(1))
        self.assertEqual(list(planes[: compare.DIM]), list(range(compare.DIM)))
        self.assertEqual(planes[compare.DIM], 256)

    def test_what_is_no_capture_is_refused(self):
        with self.assertRaisesRegex(ValueError, "layer0.k is F32"):
            compare.read_capture(capture(1, 16, 1, 64, dtype="F32"))
        head = b'{"weights": {}}'
        with self.assertRaisesRegex(ValueError, "no layerN.k"):
            compare.read_capture(struct.pack("<Q", len(head)) + head)

    def test_planes_of_the_fixture_have_its_channels(self):
        keys, values = compare.samples(None)
        self.assertEqual(len(keys), compare.SAMPLES * compare.DIM)
        table = array.array("H", (compare.ROOT / "tests/fixtures/kv/quantiles.bin").read_bytes())
        for kind, planes in enumerate((keys, values)):
            for channel in (0, 77):
                # One of the fixture's channels holds all elements of a channel of a plane.
                seen = {planes[token * compare.DIM + channel] for token in range(compare.TOKENS)}
                quantiles = compare.FIXTURE_QUANTILES
                channels = range(kind * compare.FIXTURE_CHANNELS, (kind + 1) * compare.FIXTURE_CHANNELS)
                self.assertTrue(any(seen <= set(table[c * quantiles :][:quantiles]) for c in channels))
        self.assertEqual(compare.samples(None), [keys, values])


class Figures(unittest.TestCase):
    def test_rates_and_ratios_are_of_all_bytes(self):
        part = {"bytes": 2e9, "encoded": 1e9, "encode": 0.02, "decode": 0.01, "exact": True}
        found = compare.figures([part])
        self.assertEqual(found, {"ratio": 2.0, "encode": 100.0, "decode": 200.0, "exact": True})

    def test_a_part_that_does_not_shrink_stays_as_it_is(self):
        high = {"bytes": 1e9, "encoded": 4e8, "encode": 0.02, "decode": 0.01, "exact": True}
        low = {"bytes": 1e9, "encoded": 1.01e9, "encode": 0.03, "decode": 0.04, "exact": True}
        found = compare.figures([high, low])
        self.assertAlmostEqual(found["ratio"], 2 / 1.4)
        self.assertAlmostEqual(found["encode"], 2 / 0.05)
        self.assertAlmostEqual(found["decode"], 2 / 0.01)
        found = compare.figures([low])
        self.assertEqual((found["ratio"], found["decode"]), (1.0, 25.0))
        self.assertFalse(compare.figures([high, dict(low, exact=False)])["exact"])

    def test_only_whole_and_exact_results_count(self):
        self.assertTrue(compare.counts(ANS))
        for wrong in [{"exact": False}, {"ratio": float("nan")}, {"encode": float("inf")}, {"decode": 0.0}]:
            self.assertFalse(compare.counts(ANS | wrong), wrong)
        self.assertFalse(compare.counts({"name": "nvCOMP LZ4", "note": "ended with 1"}))


class Merging(unittest.TestCase):
    CASES = ["raw/encode/full", "lx4/encode/full", "lx4/decode/full", "lx4/decode/8", "int6/encode/full"]

    def test_peers_stand_beside_lossless_codecs_on_the_whole_gpu(self):
        made = report(*self.CASES)
        wrong = compare.merge(
            made, [OURS, ANS, dict(ANS, name="nvCOMP LZ4", exact=False), {"name": "lxe", "note": "no"}]
        )
        self.assertEqual(wrong, [])
        rows = {row["case"]: row for row in made["rows"]}
        self.assertEqual(rows["lx4/encode/full"]["peers"], {"nvCOMP ANS": 126.0})
        self.assertEqual(rows["lx4/decode/full"]["peers"], {"nvCOMP ANS": 196.0})
        for untouched in ("raw/encode/full", "lx4/decode/8", "int6/encode/full"):
            self.assertEqual(rows[untouched]["peers"], {"old": 1.0})
        self.assertEqual(rows["lx4/encode/full"]["ours"], 1000.0)
        ratio = rows["lx4/ratio"]
        self.assertEqual((ratio["ours"], ratio["unit"], ratio["pass"]), (1.31, "x", True))
        self.assertEqual(ratio["peers"], {"nvCOMP ANS": 1.19})
        self.assertNotIn("goal", ratio)
        self.assertNotIn("lxe/ratio", rows)

    def test_a_second_comparison_replaces_the_first(self):
        made = report(*self.CASES)
        compare.merge(made, [OURS, ANS])
        compare.merge(made, [OURS | {"ratio": 1.3}, OURS | {"name": "lxe", "ratio": 1.48}, ANS | {"ratio": 1.4}])
        rows = [row for row in made["rows"] if row["case"].endswith("/ratio")]
        self.assertEqual([(row["case"], row["ours"]) for row in rows], [("lx4/ratio", 1.3), ("lxe/ratio", 1.48)])
        self.assertEqual(rows[1]["goal"], 1.4)
        compare.merge(made, [])
        self.assertFalse([row for row in made["rows"] if row["case"].endswith("/ratio")])
        self.assertNotIn("peers", next(row for row in made["rows"] if row["case"] == "lx4/encode/full"))

    def test_what_does_not_come_back_fails(self):
        made = report(*self.CASES)
        self.assertEqual(compare.merge(made, [OURS | {"exact": False}]), ["lx4"])
        row = made["rows"][-1]
        self.assertEqual((row["pass"], "note" in row), (False, True))

    def test_the_report_is_written_whatever_the_processes_come_to(self):
        with tempfile.TemporaryDirectory() as folder:
            path, target = pathlib.Path(folder) / "codec.json", pathlib.Path(folder) / "out.json"
            path.write_text(json.dumps(report(*self.CASES)))
            # No implementation has this name: nothing is measured, and that is no success.
            with contextlib.redirect_stdout(io.StringIO()) as said:
                code = compare.main(["--report", str(path), "--json", str(target), "--only", "nothing"])
            self.assertEqual(code, 1)
            self.assertIn("ratio", said.getvalue())
            made = json.loads(target.read_text())
            self.assertTrue(made["command"].startswith("hybridkv bench codec + compare_codec.py --report"))
            self.assertEqual(made["command"].count(" + "), 1)
            self.assertEqual([row["case"] for row in made["rows"]], self.CASES)
            self.assertEqual(len(target.read_text().splitlines()), 5 + len(self.CASES) + 2)


if __name__ == "__main__":
    unittest.main()
