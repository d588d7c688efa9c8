"""Reports as `hybridkv bench` writes them: JSON, one line per row."""

import json


def write(report, path):
    """Writes a report whose rows are dictionaries; makes the folder."""
    head = json.dumps(dict(report, rows=[]), indent=2)
    lines = ",\n    ".join(json.dumps(row) for row in report["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head.replace('"rows": []', f'"rows": [\n    {lines}\n  ]') + "\n", encoding="utf-8")
