"""Checkpoints in folders of any name; a checkpoint that is empty, renamed, of another run or unreadable is told."""

import errno
import shutil

import pytest

from experiments.io import checkpoint, sums
from rigl_jax.messages import printable
from tests.errors import refused
from tests.experiments.runs import assert_equal
from tests.experiments.test_checkpoint import abstract, state

CONFIG = {"seed": 0, "keep": 1, "method": {"name": "rigl"}}


def opened(path, said=None, config=None):
    say = (said if said is not None else []).append
    return checkpoint.open_checkpoints(path, keep=2, config=config, step_of=lambda s: int(s["step"]), warn=say)


def filled(path, steps=(1,), config=None):
    store = opened(path, config=config)
    for step in steps:
        store.save(step, state(step), {"seconds": float(step)}, 0.5)
    store.close()


def restored(path, said=None, config=None):
    """The step of what is found."""
    store = opened(path, said, config)
    try:
        found = store.restore(abstract())
    finally:
        store.close()
    if found is None:
        return None
    assert_equal(found[0], state(int(found[0]["step"])))
    assert found[1] == {"seconds": float(found[0]["step"])}
    return int(found[0]["step"])


NAMES = [
    "[ab]", "b\\s", "**", "q?", "gs:", "\udcff",  # what orbax or tensorstore read otherwise
    " sp -~$H%s{a,b}#1'\"ünï日\x1b\n", "--", "1", "x" * 255, "a.orbax-checkpoint-tmp",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_folder_of_any_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled(checkpoint.Path(name) / "c")
    assert restored(checkpoint.Path(name) / "c") == 1
    assert {path.name for path in tmp_path.iterdir()} == {name}  # and nothing was written beside it


def test_a_pattern_does_not_reach_into_another_run(tmp_path):
    filled(tmp_path / "a1", steps=(1, 2))
    filled(tmp_path / "a*", steps=(3,))
    assert (restored(tmp_path / "a1"), restored(tmp_path / "a*")) == (2, 3)


def test_a_name_that_orbax_misreads_is_refused_where_there_is_no_other_way(tmp_path, monkeypatch):
    real = checkpoint.Path.is_dir
    monkeypatch.setattr(checkpoint.Path, "is_dir", lambda path: str(path) != "/proc/self/fd" and real(path))
    with refused("lr[0.1]"):
        opened(tmp_path / "lr[0.1]")


def test_a_checkpoint_without_its_arrays_does_not_count_as_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_orbax_path", lambda path: (path, lambda: None))  # the fault that was
    folder = tmp_path / "lr[0.1]"
    with refused("checkpoint", error=OSError):
        filled(folder)
    assert not (folder / "1").exists()


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        ({"2": "999"}, "checkpoint 999 is that of step 2 and gets its number back"),
        ({"1": "5"}, "checkpoint 5 is that of step 1 and gets its number back"),
    ],
    ids=str,
)
def test_a_renamed_checkpoint_gets_its_number_back(renamed, message, tmp_path):
    filled(tmp_path, steps=(1, 2))
    for old, new in renamed.items():
        (tmp_path / old).rename(tmp_path / new)
    said = []
    assert restored(tmp_path, said) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
    assert said[0].startswith(message)
    store = opened(tmp_path)
    store.save(6, state(6), {"seconds": 6.0}, 0.5)  # is kept, and found again
    store.close()
    assert restored(tmp_path) == 6


@pytest.mark.parametrize("name", ["009", "ckpt_9", "1_2", "９", "2 \n(copy)"], ids=ascii)
def test_a_checkpoint_whose_name_is_no_step_is_told_in_one_line(name, tmp_path):
    filled(tmp_path, steps=(1, 2))
    (tmp_path / "2").rename(tmp_path / name)
    (tmp_path / "damaged-7" / "state").mkdir(parents=True)  # was told when it was set aside
    said = []
    assert restored(tmp_path, said) == 1
    assert said == [
        f"checkpoint: {tmp_path} holds {printable(name)}, not read: a checkpoint's folder is named by its step"
    ]
    assert (tmp_path / name / "state").is_dir()


def test_a_copy_under_another_number_is_set_aside(tmp_path):
    filled(tmp_path)
    shutil.copytree(tmp_path / "1", tmp_path / "4")
    said = []
    assert restored(tmp_path, said) == 1
    assert said[0].startswith("checkpoint 4 is that of step 1 and set aside")
    assert {path.name for path in tmp_path.iterdir()} == {"1", "damaged-4"}


def test_a_checkpoint_of_another_run_is_refused_and_stays(tmp_path):
    filled(tmp_path, config=CONFIG)
    for changed, named in (
        ({"seed": 7}, "seed 0 7"),
        ({"method": {"name": "set"}}, "method.name rigl set"),
        ({"sparsity": 0.5}, "sparsity 0.5"),
    ):
        with refused("checkpoint 1", *named.split()):
            restored(tmp_path, config=CONFIG | changed)
    assert {path.name for path in tmp_path.iterdir()} == {"1"}
    assert restored(tmp_path, config=CONFIG | {"keep": 9}) == 1  # decides nothing that is learned
    assert restored(tmp_path) == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("where", ["content", "listing", "metrics"])
def test_a_file_that_cannot_be_read_is_no_damage(number, where, tmp_path, monkeypatch):
    filled(tmp_path, steps=(1, 2))
    said = []

    def refuse(*arguments, **_):
        raise OSError(number, "no", "state/d/part")

    with monkeypatch.context() as patched:
        target = {"content": (sums, "_crc"), "listing": (sums, "_files"), "metrics": (checkpoint.files, "read_json")}
        patched.setattr(*target[where], refuse)
        with refused("state/d/part", error=OSError):
            restored(tmp_path, said)
    assert said == []
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
    assert restored(tmp_path) == 2


def test_metrics_that_orbax_would_stumble_over_are_set_aside(tmp_path):
    filled(tmp_path, steps=(1, 2))
    for content in ('{"accuracy": "high"}', "[1]", '{"accuracy": NaN}', "[" * 10_000, "\udcff"):
        (tmp_path / "2" / "metrics" / "metrics").write_text(content, errors="surrogateescape")
        said = []
        assert restored(tmp_path, said) == 1
        assert "checkpoint 2 is damaged and set aside" in said[0]
        next(tmp_path.glob("damaged-2*")).rename(tmp_path / "2")
