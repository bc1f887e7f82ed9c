"""What studies with cells of all seeds share: facts of records, differences, and whether a claim came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import pages
from experiments.studies.method_page import LEVEL, paired, verdict


def facts(records: Mapping[Any, Mapping[str, Any]], cell: Any, *path: Any) -> np.ndarray | None:
    """A fact of every seed, float64[seeds]; None where the cell was not run."""
    if cell not in records:
        return None
    found: Any = records[cell]["found"]
    for key in path:
        found = found[key]
    return np.asarray(found, np.float64)


def percent(values: np.ndarray | None, digits: int = 1) -> str:
    """Mean and deviation of shares, in percent."""
    return pages.spread(None if values is None else 100 * values, digits)


def against(ours: np.ndarray | None, theirs: np.ndarray | None) -> str:
    """The difference of shares in percentage points, and its p-value; nothing for a row against itself."""
    if ours is not None and theirs is not None and np.array_equal(ours, theirs):
        return ""
    return verdict(paired(*(None if v is None else 100 * v for v in (ours, theirs))))


class Claim(NamedTuple):
    """What a paper says of two facts.

    Attributes:
      text: one line of a table.
      ours: float64[seeds], None where it was not run.
      theirs: the same; ours is said to be higher.
      lower: ours is said to be lower.
      at: where, if the line has several places.
    """

    text: str
    ours: np.ndarray | None
    theirs: np.ndarray | None
    lower: bool = False
    at: str = ""


def outcome(claim: Claim) -> str:
    """Whether a claim came out."""
    if claim.ours is None or claim.theirs is None:
        return "not run"
    if np.array_equal(claim.ours, claim.theirs):
        return "not told apart"  # a t-test of no differences is no number
    pair = paired(claim.ours, claim.theirs)
    if pair is None or not pair[1] < LEVEL:
        return "not told apart"
    return "yes" if (pair[0] < 0) == claim.lower else "the opposite"


def claimed(claims: Sequence[Claim]) -> str:
    """A table, one line a text."""
    found: dict[str, dict[str, list[str]]] = {}
    for claim in claims:
        found.setdefault(claim.text, {}).setdefault(outcome(claim), []).append(claim.at)
    told = {
        text: "; ".join(f"{what} ({', '.join(at)})" if any(at) else what for what, at in outcomes.items())
        for text, outcomes in found.items()
    }
    return pages.table(["claim", "came out"], [list(row) for row in told.items()], left=[True, True])
