import base64
import json
import math
import re
import statistics

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from experiments import report
from experiments.report import drawing, methods
from experiments.report.figures import FIGURES
from experiments.report.main import main
from tests.errors import refused

LEAVES = ("Dense_0/kernel", "Dense_1/kernel")


def picture(step, mask):
    packed = base64.b64encode(np.packbits(mask)).decode()
    return {"step": step, "kind": "first_layer", "leaf": LEAVES[0], "shape": list(mask.shape), "rows_packed": packed}


def masks_line(step, moved, explored):
    return {
        "step": step,
        "kind": "masks",
        "sparsity": 0.75,
        "dropped_fraction": moved,
        "grown_fraction": moved,
        "explored": explored,
        "density": dict(zip(LEAVES, (0.2, 0.6), strict=True)),
        "dropped": dict.fromkeys(LEAVES, moved),
        "dead_units": dict.fromkeys(LEAVES, 0),
    }


def write_run(root, method, seed, accuracy, *, sparsity=0.75, finished=True, dataset="digits", **config):
    """A run directory by hand, as `experiments.io` would write it."""
    folder = root / f"{dataset}-{method}-{sparsity}-s{seed}{''.join(map(str, config.values()))}"
    folder.mkdir(parents=True)
    dense = method == "dense"
    lines = [
        {"step": s, "kind": "eval", "split": "test", "loss": 1.0, "accuracy": accuracy - 0.3 / s} for s in (1, 2, 4)
    ]
    if not dense:
        start = np.arange(16 * 5).reshape(16, 5) % 4 == 0
        lines = [masks_line(0, 0.0, 0.25), picture(0, start), *lines]
        if method != "static":
            lines += [masks_line(2, 0.3, 0.3), masks_line(4, 0.1, 0.32)]
        lines.append(picture(4, start if method == "static" else np.arange(16 * 5).reshape(16, 5) < 20))
    settings = {"seed": seed, "steps": 4, "log_every": 1, "sparsity": sparsity, "method": {"name": method}} | config
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "env.json").write_text(json.dumps({"python": "3.11", "jax": "0.10.2", "git_commit": None}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "test_accuracy": accuracy,
        "best_accuracy": 1.0,
        "seed": seed,
        "method": method,
        "sparsity": sparsity,
        "distribution": None if dense else "erk",
        "dataset": dataset,
        "model": "mlp",
        "active_params": 1000 if dense else 250 + 2 * seed,
        "final_sparsity": 0.0 if dense else sparsity,
        "flops_inference_x_dense": 1.0 if dense else 0.3,
        "flops_training_x_dense": 1.0 if dense else 0.35,
    }
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def runs_dir(tmp_path):
    root = tmp_path / "runs"
    write_run(root, "dense", 0, 0.95)
    for seed, accuracy in enumerate((0.90, 0.92, 0.97)):
        write_run(root, "rigl", seed, accuracy)
    for seed, accuracy in enumerate((0.80, 0.82)):
        write_run(root, "static", seed, accuracy)
    write_run(root, "set", 0, 0.5, finished=False)
    return root


# --- reading -----------------------------------------------------------------------------------------------------


def test_reads_what_is_there(runs_dir):
    runs = report.read(runs_dir)
    assert len(runs) == 7
    assert [run.name for run in runs] == sorted(run.name for run in runs)
    [unfinished] = report.split(runs)[1]
    assert (unfinished.name, unfinished.last_step) == ("digits-set-0.75-s0", 4)
    assert report.read(runs_dir / "digits-dense-0.75-s0")[0].name == "digits-dense-0.75-s0"


def test_damaged_line_names_file_and_line(runs_dir):
    path = runs_dir / "digits-rigl-0.75-s1" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:20], *lines[3:]]) + "\n")
    with refused(f"{path} line 3"):
        report.read(runs_dir)
    path.write_text('{"step": 1}\n')
    with refused(f"{path} line 1"):
        report.read(runs_dir)


def test_last_line_may_be_half_written_only_while_a_run_goes_on(runs_dir):
    for name in ("digits-set-0.75-s0", "digits-static-0.75-s0"):
        path = runs_dir / name / "metrics.jsonl"
        path.write_text(path.read_text() + '{"step": 5, "ki')
    assert report.read_run(runs_dir / "digits-set-0.75-s0").last_step == 4
    with refused("JSON"):
        report.read_run(runs_dir / "digits-static-0.75-s0")


def test_wrong_folders_are_told(tmp_path, runs_dir):
    with refused("folder"):
        report.read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with refused("config.json"):
        report.read(tmp_path / "empty")
    (runs_dir / "digits-rigl-0.75-s0" / "summary.json").write_text('{"method": "rigl"}')
    with refused("summary.json", "dataset", "model", "sparsity"):
        report.rows(report.read(runs_dir))


# --- tables ------------------------------------------------------------------------------------------------------


def test_numbers_by_hand(runs_dir):
    dense, static, rigl = report.rows(report.read(runs_dir))
    assert [row.key.method for row in (dense, static, rigl)] == ["dense", "static", "rigl"]
    assert rigl.accuracy == pytest.approx((0.90 + 0.92 + 0.97) / 3)
    # Squared deviations from 0.93: 0.0009 + 0.0001 + 0.0016, over n - 1 = 2.
    assert rigl.accuracy_std == pytest.approx(math.sqrt(0.0026 / 2))
    assert (rigl.n_seeds, rigl.weights, rigl.inference, rigl.training) == (
        3,
        252,
        pytest.approx(0.3),
        pytest.approx(0.35),
    )
    assert dense.n_seeds == 1
    assert math.isnan(dense.accuracy_std)
    assert (dense.key.sparsity, dense.key.distribution) == (0.0, "")


def test_markdown(runs_dir):
    assert report.markdown(report.read(runs_dir)) == (
        "**digits, mlp**\n\n"
        "| Method | Sparsity | Test accuracy, % | Seeds | Weights in use | Inference FLOPs | Training FLOPs |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| Dense | 0 % | 95.00 | 1 | 1,000 | 1.000x | 1.000x |\n"
        "| Static | 75 %, ERK | 81.00 ± 1.41 | 2 | 251 | 0.300x | 0.350x |\n"
        "| RigL | 75 %, ERK | 93.00 ± 3.61 | 3 | 252 | 0.300x | 0.350x |\n\n"
        "Unfinished, not in the table: digits-set-0.75-s0 (step 4).\n"
    )


def test_terminal_table_fits_80_columns(runs_dir):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.show(report.read(runs_dir), console)
    console.file.close()
    text = console.export_text()
    assert "93.00 ± 3.61" in text
    assert "…" not in text
    assert "digits-set-0.75-s0 (step 4)" in text


def test_only_seeds_are_averaged(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "rigl", seed, 0.9, log_every=seed + 1)  # how often it logs is no part of what it learns
        write_run(tmp_path, "rigl", seed, 0.8, steps=8)
    four, eight = report.rows(report.read(tmp_path))
    assert (four.settings, four.n_seeds, four.accuracy) == ("steps=4", 2, pytest.approx(0.9))
    assert (eight.settings, eight.n_seeds, eight.accuracy) == ("steps=8", 2, pytest.approx(0.8))
    assert "| steps=8 |" in report.markdown(report.read(tmp_path))


def test_dense_runs_ignore_settings_of_masks(tmp_path):
    write_run(tmp_path, "dense", 0, 0.9, sparsity=0.5)
    write_run(tmp_path, "dense", 1, 0.9, sparsity=0.98)
    [row] = report.rows(report.read(tmp_path))
    assert (row.n_seeds, row.settings) == (2, "")


def test_the_same_seed_twice_is_an_error(tmp_path):
    write_run(tmp_path / "a", "rigl", 0, 0.9)
    write_run(tmp_path / "b", "rigl", 0, 0.9)
    with refused("a/digits", "b/digits"):
        report.rows(report.read(tmp_path))


def test_one_table_for_each_dataset(tmp_path):
    write_run(tmp_path, "dense", 0, 0.9)
    write_run(tmp_path, "dense", 0, 0.8, dataset="fashion_mnist")
    runs = report.read(tmp_path)
    assert [grid.title for grid in report.grids(report.rows(runs))] == ["digits, mlp", "fashion_mnist, mlp"]
    assert {"digits-mlp-accuracy", "fashion_mnist-mlp-accuracy"} == set(report.draw(runs))


def test_measured_sparsity_is_shown_where_it_differs(tmp_path):
    folder = write_run(tmp_path, "rigl", 0, 0.9)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"final_sparsity": 0.7}))
    assert "75 %, ERK (70.0 % measured)" in report.markdown(report.read(tmp_path))


# --- figures and page --------------------------------------------------------------------------------------------


def test_mean_and_std_at_common_steps():
    steps, mean, std = drawing.mean_and_std([{1: 0.2, 2: 0.4, 3: 1.0}, {1: 0.4, 2: 0.8}])
    assert steps.tolist() == [1, 2]
    np.testing.assert_allclose(mean, [0.3, 0.6])
    np.testing.assert_allclose(std, [statistics.stdev([0.2, 0.4]), statistics.stdev([0.4, 0.8])])
    assert drawing.mean_and_std([{1: 2.0}])[2].tolist() == [0.0]
    assert len(drawing.mean_and_std([{1: 2.0}, {2: 2.0}])[0]) == 0


def test_accuracy_figure_draws_the_means(runs_dir):
    figure = report.accuracy(report.read(runs_dir))
    [axes] = figure.axes
    assert [line.get_label() for line in axes.lines] == ["Dense", "Static", "RigL"]
    np.testing.assert_allclose(axes.lines[2].get_ydata(), 0.93 - 0.3 / np.array([1, 2, 4]))
    assert axes.lines[2].get_color() == methods.style("rigl").colour


def test_tradeoff_figure_draws_means_over_sparsity_where_there_are_several(tmp_path):
    for sparsity, base in ((0.5, 0.8), (0.9, 0.6)):
        for seed in (0, 1):
            write_run(tmp_path, "rigl", seed, base + 0.1 * seed, sparsity=sparsity)
    write_run(tmp_path, "set", 0, 0.7, sparsity=0.9)
    write_run(tmp_path, "dense", 0, 0.95, sparsity=0.0)
    runs = report.read(tmp_path)
    [axes] = FIGURES["tradeoff"][0](runs).axes
    drawn = {bars.get_label(): bars[0].get_xydata().tolist() for bars in axes.containers}
    assert drawn == {"RigL": [[0.0, pytest.approx(0.85)], [1.0, pytest.approx(0.65)]], "SET": [[1.0, 0.7]]}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["50 %", "90 %"]
    assert axes.get_lines()[-1].get_ydata()[0] == 0.95
    assert FIGURES["tradeoff"][0]([run for run in runs if run.summary["sparsity"] != 0.5]) is None


def test_churn_figure_leaves_out_the_first_masks_and_ends_with_the_run(runs_dir):
    above, below = report.churn(report.read(runs_dir)).axes
    assert above.lines[0].get_xdata().tolist() == [2, 4]
    np.testing.assert_allclose(above.lines[0].get_ydata(), [0.3, 0.1])
    static = below.lines[0]
    assert (static.get_label(), static.get_xdata().tolist(), static.get_ydata().tolist()) == (
        "Static",
        [0, 4],
        [0.25] * 2,
    )


def test_density_figure_has_planned_and_measured(runs_dir):
    [axes] = report.density(report.read(runs_dir)).axes
    heights = [[round(bar.get_height(), 6) for bar in bars] for bars in axes.containers]
    assert heights == [[0.2, 0.6]] * 3  # planned, static, RigL
    assert [text.get_text() for text in axes.get_xticklabels()] == ["Dense_0", "Dense_1"]


def test_pixels():
    mask = np.zeros((4, 3), bool)
    mask[1] = True
    mask[2, 0] = True
    assert report.pixel_counts(mask).tolist() == [[0, 3], [1, 0]]
    assert report.unpack_mask(picture(0, mask)).tolist() == mask.tolist()
    colour = np.zeros((12, 2), bool)  # 2x2 pixels of 3 channels
    colour[3:6, 0] = True
    assert report.pixel_counts(colour).tolist() == [[0, 3], [0, 0]]
    assert report.pixel_counts(np.ones((3, 3, 2, 5), bool)).tolist() == [[10] * 3] * 3
    assert report.pixel_counts(np.ones((6, 2), bool)).shape == (1, 6)
    with refused("shape"):
        report.unpack_mask(picture(0, mask[:2]) | {"shape": [4, 4]})


def test_first_layer_picture(runs_dir):
    axes = report.first_layer(report.read(runs_dir)).axes[:6]
    rigl_end = np.asarray(axes[4].images[0].get_array())
    assert rigl_end.tolist() == [[5, 5, 5, 5]] + [[0] * 4] * 3
    assert not np.asarray(axes[2].images[0].get_array()).any(), "a static mask does not change"


def test_dense_runs_alone_have_one_figure(tmp_path):
    write_run(tmp_path, "dense", 0, 0.9)
    assert set(report.draw(report.read(tmp_path))) == {"accuracy"}


def test_files_and_a_page_that_needs_nothing_else(runs_dir, tmp_path):
    assert main([str(runs_dir), "--out", str(tmp_path / "out"), "--title", "A <title>"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"index.html", "tables.md", "accuracy.png", "density.png", "churn.png", "first_layer.png"}
    for name in names:
        if name.endswith(".png"):
            assert min(imread(tmp_path / "out" / name).shape[:2]) > 200
            assert (tmp_path / "out" / name).stat().st_size < 100_000
    text = (tmp_path / "out" / "index.html").read_text()
    assert "A &lt;title&gt;" in text
    assert not re.search(r"https?:|<script|<link|url\(", text)
    sources = re.findall(r'src="([^"]{0,30})', text)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "93.00 ± 3.61" in text
    assert "digits-set-0.75-s0 (step 4)" in text
    assert "0.10.2" in text, "the environment"
    assert text.count("method.name") == 1, "the config"


def test_the_same_runs_give_the_same_bytes(runs_dir):
    runs = report.read(runs_dir)
    assert report.png(report.accuracy(runs)) == report.png(report.accuracy(runs))


# --- README ------------------------------------------------------------------------------------------------------


@pytest.fixture
def readme(tmp_path, runs_dir):
    runs_dir.rename(tmp_path / "demo")
    path = tmp_path / "README.md"
    path.write_text("Before.\n\n<!-- table:demo -->\nold\n<!-- /table -->\n\nAfter.\n")
    return path


def test_readme_is_written_and_checked(readme, capsys):
    options = ["--readme-file", str(readme), "--records", str(readme.parent)]
    old = readme.read_text()
    assert main(["--check", *options]) == 1
    assert "-old" in capsys.readouterr().out
    assert readme.read_text() == old
    assert main(["--readme", *options]) == 0
    assert main(["--readme", "--check", *options]) == 0
    text = readme.read_text()
    assert text.startswith("Before.\n\n<!-- table:demo -->\n\n**digits, mlp**\n\n| Method |")
    assert text.endswith("(step 4).\n\n<!-- /table -->\n\nAfter.\n")


def test_readme_mistakes(readme):
    with refused("dmo", "demo"):
        report.fill("<!-- table:dmo -->\n<!-- /table -->", readme.parent)
    with refused("demo"):
        report.fill("<!-- table:demo -->\n<!-- table:demo -->\n<!-- /table -->", readme.parent)
    assert report.fill("no tables\n", readme.parent) == "no tables\n"


def test_command_reports_bad_input_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_methods_have_a_style_of_their_own():
    assert methods.label("set_") == methods.label("set") == "SET"
    assert methods.style("my_method") == methods.style("my_method")
    assert sorted(["rigl", "my_method", "dense"], key=methods.rank) == ["dense", "rigl", "my_method"]
