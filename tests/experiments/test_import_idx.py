"""IDX files: reading, refusing damaged ones, and their way into a TFDS data set."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import import_idx
from experiments.data import augment, idx, load

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


BAD_IDX = {
    "magic": ({"train_images": b"\x00\x01\x08\x03" + bytes(40)}, "must start with the IDX magic"),
    "empty": ({"train_images": b""}, "given nothing"),
    "type": ({"train_images": b"\0\0\x0d\x03" + bytes(40)}, "type 0x0d"),
    "axes": ({"test_labels": b"\0\0\x08\x09" + bytes(40)}, "1 to 4 axes, given 9"),
    "header": ({"test_labels": b"\0\0\x08\x01\0"}, "truncated"),
    "truncated": ({"train_images": idx_bytes(np.zeros((NUM_TRAIN, 28, 28)))[:-5]}, "given 39195, truncated"),
    "too long": ({"test_labels": idx_bytes(np.zeros(NUM_TEST)) + b"x"}, "given more"),
    "huge": ({"test_labels": b"\0\0\x08\x04" + b"\xff" * 16 + bytes(9)}, "given 9, truncated"),
    "count": ({"train_labels": idx_bytes(np.zeros(NUM_TRAIN - 1))}, r"must be \[50\], a label for each"),
    "rank": ({"train_images": idx_bytes(np.zeros(NUM_TRAIN))}, r"must be \[N, H, W\]"),
    "shapes": ({"test_images": idx_bytes(np.zeros((NUM_TEST, 14, 14)))}, "must have one shape"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_files_are_refused(case, tmp_path):
    replaced, message = BAD_IDX[case]
    write_idx(tmp_path, **replaced)
    with pytest.raises(ValueError, match=message):
        idx.read_folder(tmp_path)


def test_damaged_gzip_and_missing_files_are_refused(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="must be a whole gzip file"):
        idx.read_folder(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"one file train-images-idx3-ubyte\[.gz\], given none"):
        idx.read_folder(tmp_path)
    with pytest.raises(ValueError, match="must be a folder"):
        idx.read_folder(tmp_path / "absent")


def test_data_that_does_not_fit_the_official_set_is_refused(tmp_path):
    write_idx(tmp_path, size=6)
    with pytest.raises(ValueError, match=r"must have images \(28, 28, 1\)"):
        idx.import_folder("mnist", tmp_path, str(tmp_path / "data"))
    with pytest.raises(ValueError, match="choose another name"):
        idx.import_folder("cifar10", tmp_path, str(tmp_path / "data"))
    with pytest.raises(ValueError, match="lower-case letters"):
        idx.import_folder("../MNIST", tmp_path, str(tmp_path / "data"))
