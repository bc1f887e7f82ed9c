"""Records with names, types and bytes that no run of ours writes: shown as they are, or one clear error."""

import json
import os

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from experiments import launch, report, texts
from experiments.io import export, files, metrics, run_directory
from experiments.report.main import main
from tests.errors import refused
from tests.experiments.test_report import masks_line, picture, write_run

NAMES = {
    "[/] [bold]x $\\x$ a|b<i> \x1b[31m \udcff": "[/] [bold]x $\\x$ a|b<i> \\x1b[31m \\udcff",
    "_hidden\n": "_hidden\\n",
}
"""Names, and how they must be shown."""


@pytest.mark.parametrize("name", NAMES, ids=["signs", "hidden"])
def test_a_name_of_any_signs_is_shown_as_it_is(name, tmp_path, capsys):
    shown, folder = NAMES[name], write_run(tmp_path, "rigl", 0, 0.9)
    masks, first = masks_line(0, 0.0, 0.25) | {"density": {name: 0.5}}, picture(0, np.ones((16, 5), bool))
    lines = [masks, first | {"leaf": name}, {"step": 4, "kind": "eval", "accuracy": 0.9}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"seed": 0, name: name}))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= dict.fromkeys(("dataset", "model", "method", "distribution"), name)
    (folder / "summary.json").write_text(json.dumps(summary))
    assert main([str(tmp_path), "--out", str(tmp_path / "out"), "--title", name]) == 0
    told = capsys.readouterr()
    assert f"{shown}, {shown}" in told.out
    assert "\x1b" not in told.out + told.err
    page = (tmp_path / "out" / "index.html").read_text()
    assert f"<title>{texts.html(name)}</title>" in page
    assert f"<td >{texts.html(name)}</td>" in page
    assert "<i>" not in page
    assert texts.markdown(name) in (tmp_path / "out" / "tables.md").read_text()
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


def test_figures_of_names_that_differ_in_signs_alone_are_all_kept(tmp_path):
    for seed, dataset in enumerate(("a/b", "a:b", "../c", "x" * 300)):
        folder = write_run(tmp_path / str(seed), "dense", 0, 0.9)
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"dataset": dataset}))
    paths = report.write(report.read(tmp_path), tmp_path / "out", "t")
    figures = [path for name, path in paths.items() if name.endswith(("accuracy", "accuracy_"))]
    assert len({path.name for path in figures}) == 4
    assert all(path.parent == tmp_path / "out" and path.exists() for path in figures)


def test_the_forms_of_a_name():
    assert texts.figure("$x$") == r"\$x\$"
    assert texts.markdown("a|b\\") == "a\\|b\\\\"
    assert texts.html("<'\"&\x00") == "&lt;&#x27;&quot;&amp;\\x00"
    assert texts.file_name("../a b/\n$") == ".._a b___"
    long = [texts.file_name(f"{i}{'é' * 500}-accuracy") for i in (1, 2)]
    assert all(len(name.encode()) < 200 and name.endswith("-accuracy") for name in long)
    assert long[0] != long[1]
    figure = Figure()
    figure.text(0, 0, texts.figure("$\\x$ and $")).get_window_extent(FigureCanvasAgg(figure).get_renderer())
    axes = figure.subplots()
    axes.plot([0, 1], label=texts.figure("_x"))
    assert [text.get_text() for text in axes.legend().get_texts()] == [" _x"]
    console = Console(record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(texts.terminal("[/] [red]x"))
    console.file.close()
    assert console.export_text() == "[/] [red]x\n"


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("config.json", b'{"a": ' + DEEP.encode(), ""),
        ("config.json", b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}", ""),
        ("env.json", b"\xff\xfe{}", ""),
        ("summary.json", b'{"seed": 1e999}', "1e999"),
        ("summary.json", b'{"seed": NaN}', "NaN"),
        ("summary.json", b'{"seed": ' + b"9" * 5000 + b"}", ""),
        ("metrics.jsonl", DEEP.encode() + b"\n", "1"),
        ("metrics.jsonl", b'{"step": 0, "kind": "eval"}\n\xff\xff\n', "2"),
        *(
            ("metrics.jsonl", b'{"step": 1, "kind": ' + rest + b"}\n", f"1 {named}")
            for named, rest in (
                ("step", b'"eval", "step": true'),
                ("kind", b'["eval"]'),
                ("step", b'"eval", "step": 1e3'),
                ("step", b'"eval", "step": 99999999999999999999'),
                ("accuracy", b'"eval", "accuracy": "high"'),
                ("accuracy", b'"eval", "accuracy": 1e300'),
                ("density", b'"masks", "density": [1]'),
                ("density", b'"masks", "density": {"a": "x"}'),
                ("shape", b'"first_layer", "leaf": "a", "shape": [0], "rows_packed": ""'),
                ("leaf", b'"first_layer", "leaf": 3, "shape": [8], "rows_packed": "/w=="'),
            )
        ),
    ],
)
def test_damaged_content_is_one_line(file, content, named, tmp_path, capsys):
    run = write_run(tmp_path / "runs", "rigl", 0, 0.9)
    (run / file).write_bytes(content)
    with refused(file, *named.split()):
        report.read(tmp_path / "runs")
    assert main([str(tmp_path / "runs")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert len(line) < 500


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", [1]), ("method", {}), ("dataset", 3), ("sparsity", True), ("test_accuracy", "x"), ("active_params", [])],
)
def test_a_summary_of_wrong_types_is_one_line(name, value, tmp_path, capsys):
    run = write_run(tmp_path, "rigl", 0, 0.9)
    summary = json.loads((run / "summary.json").read_text()) | {"steps": 4, "seconds": 1.0}
    (run / "summary.json").write_text(json.dumps(summary | {name: value}))
    assert main([str(tmp_path)]) == 2
    assert f"summary.json: {name} must be a" in capsys.readouterr().err
    if name in ("seed", "test_accuracy"):
        assert export.main([str(tmp_path), str(tmp_path / "out")]) == 2
        assert f"{name} must be a number" in capsys.readouterr().err


@pytest.mark.parametrize("rest", [b'{"step', b"\xff\xff", b"\0\0\0\0", DEEP.encode(), b'{"step": 2'])
def test_a_last_line_without_its_end_is_left_out_while_a_run_goes_on(rest, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "kind": "eval"}\n' + rest)
    assert files.read_lines(path) == [{"step": 1, "kind": "eval"}]
    with refused("metrics.jsonl line 2"):
        files.read_lines(path, growing=False)


def test_a_run_can_be_read_at_any_moment_of_its_writing(tmp_path):
    run = write_run(tmp_path, "set", 0, 0.5, finished=False)
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl.part").write_bytes(b"{")
    for size in range(0, len(whole), 7):
        (run / "metrics.jsonl").write_bytes(whole[:size])
        lines = report.read_run(run).metrics
        assert len(lines) - whole[:size].count(b"\n") in (0, 1)  # 1: all but the end of the line is there


# --- planted links -----------------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def test_files_are_not_written_through_a_link(victim, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl.part", "config.json.part", "env.json.part", "index.html.part", "index.html"):
        (run / name).symlink_to(victim)
    run_directory.begin(run, {"seed": 0})
    (run / "metrics.jsonl").write_text('{"step": 1, "kind": "eval"}\n')
    metrics.open_writer(run, 1, tensorboard=False).close()
    files.write_atomically(run / "index.html", "new")
    assert (run / "index.html").read_text() == "new"
    assert {path.name for path in run.iterdir()} == {"config.json", "env.json", "metrics.jsonl", "index.html"}
    assert not any(path.is_symlink() for path in run.iterdir())


def test_lines_are_not_appended_through_a_link(victim, tmp_path):
    for name in ("metrics.jsonl", "log.txt"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with refused("metrics.jsonl", error=OSError):
        metrics.open_writer(tmp_path, -1, tensorboard=False)
    with refused("log.txt", error=OSError):
        launch.start(launch.Job("a", tmp_path, ["true"]), 0, 1)
    assert not (tmp_path / "nowhere").exists()
