"""IDX files: reading, refusing damaged ones, and their way into a TFDS data set."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import import_idx
from experiments.data import augment, idx, load
from tests.errors import one_line, refused

NUM_TRAIN, NUM_TEST = 50, 23


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, size: int = 28, **replaced: bytes) -> dict[str, idx.Labelled]:
    """Four IDX files, half of them gzipped; `replaced` gives the raw content of single files."""
    folder.mkdir(exist_ok=True)
    rng, parts = np.random.default_rng(7), {}
    for split, start, count in (("train", "train", NUM_TRAIN), ("test", "t10k", NUM_TEST)):
        images = rng.integers(0, 256, (count, size, size), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        parts[split] = idx.Labelled(images[..., None], labels)
        content = replaced.get(f"{split}_images", idx_bytes(images))
        (folder / f"{start}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
        (folder / f"{start}-labels-idx1-ubyte").write_bytes(replaced.get(f"{split}_labels", idx_bytes(labels)))
    return parts


def test_an_import_reads_back_equal_under_the_official_name(tmp_path):
    tfds.disable_progress_bar()
    parts, data_dir = write_idx(tmp_path / "idx"), str(tmp_path / "data")
    idx.import_folder("fashion_mnist", tmp_path / "idx", data_dir)
    builder = tfds.builder("fashion_mnist", data_dir=data_dir)
    assert builder.info.full_name == "fashion_mnist/3.0.1"
    assert builder.info.features["label"].names[0] == "T-shirt/top"
    assert builder.info.features["image"].shape == (28, 28, 1)
    for split, part in parts.items():
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        got = sorted((augment.decode(r["image"], 1).tobytes(), r["label"]) for r in source)
        assert got == sorted((x.tobytes(), int(y)) for x, y in zip(*part, strict=True))


def test_the_import_command(tmp_path, capsys):
    write_idx(tmp_path / "idx", size=6)
    arguments = ["--name", "my_set", "--source", str(tmp_path / "idx"), "--data_dir", str(tmp_path / "data")]
    assert import_idx.main(arguments) == 0
    assert "50 + 23 examples" in capsys.readouterr().out.replace("\n", "")
    data = load("my_set", 8, seed=0, data_dir=str(tmp_path / "data"))
    assert (data.num_train, data.num_classes, data.image_shape) == (NUM_TRAIN, 10, (6, 6, 1))
    assert import_idx.main(arguments) == 0
    assert "there already" in capsys.readouterr().out
    assert import_idx.main(["--name", "other_set", "--data_dir", str(tmp_path)]) == 1
    assert "--source" in capsys.readouterr().err


WHOLE = idx_bytes(np.zeros((2, 2, 2)))
BAD_IDX = {
    "axes": {"test_labels": b"\0\0\x08\x09" + bytes(40)},
    "no labels": {"test_labels": b"\0\0\x08\x01\0"},
    "too many labels": {"test_labels": idx_bytes(np.zeros(NUM_TEST)) + b"x"},
    "huge labels": {"test_labels": b"\0\0\x08\x04" + b"\xff" * 16 + bytes(9)},
    "count": {"train_labels": idx_bytes(np.zeros(NUM_TRAIN - 1))},
    "rank": {"train_images": idx_bytes(np.zeros(NUM_TRAIN))},
    "shapes": {"test_images": idx_bytes(np.zeros((NUM_TEST, 14, 14)))},
    "empty": {"train_images": b""},
    "pickle": {"train_images": b"\x80\x04magic"},
    "floats": {"train_images": b"\0\0\x0d" + WHOLE[3:]},
    "header": {"train_images": WHOLE[:9]},
    "too short": {"train_images": WHOLE[:-1]},
    "too long": {"train_images": WHOLE + b"x"},
    "no gzip": {"train_images": b"\x1f\x8b" + WHOLE},
    "huge": {"train_images": b"\0\0\x08\x03" + b"\xff" * 12},
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_files_are_refused(case, tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    write_idx(source, size=2, **BAD_IDX[case])
    assert import_idx.main(["--name", "own", "--source", str(source), "--data_dir", str(target)]) == 1
    one_line(capsys, str(source), *(["train-images-idx3-ubyte.gz"] if "train_images" in BAD_IDX[case] else []))
    assert not target.exists()


def test_damaged_gzip_and_missing_files_are_refused(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with refused("gzip"):
        idx.read_folder(tmp_path)
    path.unlink()
    with refused("train-images-idx3-ubyte"):
        idx.read_folder(tmp_path)
    with refused("folder"):
        idx.read_folder(tmp_path / "absent")


def test_data_that_does_not_fit_the_official_set_is_refused(tmp_path):
    write_idx(tmp_path, size=6)
    with refused("images"):
        idx.import_folder("mnist", tmp_path, str(tmp_path / "data"))
    with refused("name"):
        idx.import_folder("cifar10", tmp_path, str(tmp_path / "data"))
    with refused("import_idx"):
        idx.import_folder("../MNIST", tmp_path, str(tmp_path / "data"))
