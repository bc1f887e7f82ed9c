"""Measured numbers in documents: each is generated from records, or its source is given here, with the same text."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "experiments" / "records"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = re.compile(r"\b[Gg]enerated by `python -m ([\w.]+)")
MEASURED = re.compile(r"(?<![\w.])\d[\d,]*\.\d+ ?(?:%|x\b|times|ms|µs|s\b|[kMG]i?B|points|minutes|hours)")


def written_by_hand(text):
    """A page without its generated parts, code, and text in backticks; empty where all of it is generated."""
    if GENERATED.search(text[:600]):
        return ""
    for part in (r"<!-- (\w+):[^>]*-->.*?<!-- /\1 -->", r"```.*?```", r"`[^`\n]*`"):
        text = re.sub(part, "", text, flags=re.DOTALL)
    return text


def record(path):
    return json.loads((RECORDS / path).read_text())


def sources():
    """What stands in pages beside generated tables, from where it comes."""
    network = next(row for row in record("benchmarks/channels.json")["rows"] if row["model"] == "resnet18")
    dense, half = network["macs"]
    sizes = record("benchmarks/scaling.json")["computed"]
    largest = sizes[-1]
    bytes_of = [row[name] / 1e9 for row in sizes for name in ("state_bytes", "gradient_bytes")]
    weights = 25_502_912  # of ResNet-50, see tests/experiments/test_models.py
    return {
        "channels.md": {f"{dense / half:.2f} times", f"{network['ratio']:.1f} times"},
        "scaling.md": {
            *(f"{size:.2f} GB" for size in bytes_of),
            f"{largest['score_bytes_read'] / 1e9:.1f} GB",
            f"{largest['rewiring_count'] * 20e-6:.1f} s",
        },
        "tpu.md": {f"{4 * weights / 1e9:.1f} GB", "75.1 %"},  # of the paper: RigL (ERK), 80 %
    }


def test_a_number_that_was_measured_has_a_record():
    found = {path.name: set(MEASURED.findall(written_by_hand(path.read_text()))) for path in PAGES}
    assert {name: numbers for name, numbers in found.items() if numbers} == sources()


def test_pages_of_results_are_generated_by_commands_of_make_figures():
    commands = (ROOT / "Makefile").read_text()
    results = [path for path in PAGES if path.stem.endswith("results")]
    assert len(results) > 5
    for path in results:
        assert GENERATED.search(path.read_text())[1] in commands, path.name
    assert written_by_hand("3.5 % by hand, `4.5 %` <!-- a:b -->5.5 %<!-- /a -->").split() == ["3.5", "%", "by", "hand,"]
