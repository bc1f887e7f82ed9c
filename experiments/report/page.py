"""Runs to one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence

from experiments import own, texts
from experiments.report.drawing import png
from experiments.report.figures import FIGURES
from experiments.report.runs import Run, config_text, split
from experiments.report.tables import Grid, grids, key, rows, unfinished_text

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2.5rem auto;
  padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
.lead { color: #555; margin-top: 0; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; margin: .8rem 0; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #e4e4e4; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid #888; } .n { text-align: right; } td.wrap { white-space: normal; }
figure { margin: 1.8rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .92rem; }
.note { background: #fff6e0; border-left: 4px solid #e69f00; padding: .5rem .9rem; }
summary { cursor: pointer; font-weight: 600; margin-top: 1rem; }
"""


def draw(runs: Iterable[Run]) -> dict[str, tuple[bytes, str]]:
    """Every figure that the runs have data for.

    Args:
      runs: any runs; the unfinished are not drawn.

    Returns:
      `{name: (PNG bytes, caption)}`. The name is that of the figure, with dataset and model before it if the runs
      have several: `"digits-lenet_300_100-accuracy"`.
    """
    parts: dict[tuple[str, str], list[Run]] = {}
    for run in split(runs)[0]:
        parts.setdefault(key(run)[:2], []).append(run)
    out = {}
    for names, members in sorted(parts.items()):
        dataset, model = map(own.label, names)
        for name, (figure_of, caption) in FIGURES.items():
            if (figure := figure_of(members)) is not None:
                alone = len(parts) == 1
                where = name if alone else texts.file_name(f"{dataset}-{model}-{name}")
                while where in out:  # names that differ in a sign alone
                    where += "_"
                out[where] = (png(figure), caption if alone else f"{dataset}, {model}. {caption}")
    return out


def _table(grid: Grid) -> str:
    kinds = ['class="n"' if grid.right(header) else "" for header in grid.headers]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(f"<{tag} {kind}>{texts.html(c)}</{tag}>" for c, kind in zip(cells, kinds, strict=True))

    body = "\n".join(f"<tr>{line('td', cells)}</tr>" for cells in grid.cells)
    head = f"<thead><tr>{line('th', grid.headers)}</tr></thead>"
    return f'<h2>{texts.html(grid.title)}</h2>\n<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _values(records: Mapping[str, Mapping[str, str]]) -> str:
    """Settings of all runs: one line where they agree, else each value with the number of runs that have it."""
    lines = []
    for name in sorted(set().union(*records.values())):
        counts: dict[str, int] = {}
        for record in records.values():
            value = record.get(name, "(absent)")
            counts[value] = counts.get(value, 0) + 1
        text = ", ".join(f"{value} ({n} runs)" if len(counts) > 1 else value for value, n in counts.items())
        lines.append(f'<tr><td>{texts.html(name)}</td><td class="wrap">{texts.html(text)}</td></tr>')
    return f"<table><tbody>{''.join(lines)}</tbody></table>"


def page(runs: Iterable[Run], title: str, figures: Mapping[str, tuple[bytes, str]] | None = None) -> str:
    """One self-contained HTML page: tables, figures, unfinished runs, config and environment.

    Args:
      runs: what `read` gave.
      title: the heading.
      figures: what `draw` gave for the same runs; drawn here if not given.

    Returns:
      The HTML text. Pictures are inside as base64; nothing is loaded from elsewhere.
    """
    runs = list(runs)
    finished, unfinished = split(runs)
    figures = draw(runs) if figures is None else figures
    body = [f"<h1>{texts.html(title)}</h1>"]
    body.append(f'<p class="lead">{len(finished)} finished runs, {len(unfinished)} unfinished.</p>')
    if unfinished:
        names = texts.html(unfinished_text(runs))
        body.append(f'<p class="note"><b>Unfinished, in no table or figure:</b> {names}</p>')
    body += [_table(grid) for grid in grids(rows(runs))]
    body.append(
        "<p>Test accuracy at the last step, mean ± sample standard deviation over seeds. FLOPs are multiples of "
        "training or running the same model dense.</p>"
    )
    for name, (data, caption) in figures.items():
        source = base64.b64encode(data).decode()
        image = f'<img alt="{texts.html(name)}" src="data:image/png;base64,{source}">'
        body.append(f"<figure>{image}<figcaption>{texts.html(caption)}</figcaption></figure>")
    for heading, records in (
        ("Config", {run.name: config_text(run.config) for run in runs}),
        ("Environment", {run.name: config_text(run.env) for run in runs}),
    ):
        body.append(f"<details><summary>{heading} of the {len(runs)} runs</summary>{_values(records)}</details>")
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"<head>{meta}<title>{texts.html(title)}</title><style>{_CSS}</style></head>"
    text = "\n".join(body)
    return f'<!doctype html>\n<html lang="en">{head}\n<body>\n{text}\n</body></html>\n'
