"""Data: the order of batches, resuming, both ways of reading, and what is said when a set is missing."""

import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.data import augment, batches, load, writer
from tests.errors import refused
from tests.experiments.runs import assert_equal

NUM_TRAIN, NUM_TEST = 50, 23


def encoded(rng, width, height, kind) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def fake_grey(count, seed):
    rng = np.random.default_rng(seed)
    for i in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(file, "PNG")
        yield i, {"image": file.getvalue(), "label": i % 10}


def fake_cifar10(count, seed):
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield i, {"id": f"train_{i}", "image": encoded(rng, 32, 32, "PNG"), "label": i % 10}


def fake_imagenet(count, seed):
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield i, {"file_name": f"{i}.JPEG", "image": encoded(rng, 20 + i, 30, "JPEG"), "label": i}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir with small sets in the formats of the real ones."""
    root = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    data_dir = str(root)
    writer.write("fashion_mnist", {"train": fake_grey(NUM_TRAIN, 0), "test": fake_grey(NUM_TEST, 1)}, data_dir)
    writer.write("cifar10", {"train": fake_cifar10(NUM_TRAIN, 0), "test": fake_cifar10(NUM_TEST, 1)}, data_dir)
    writer.write(
        "imagenet2012", {"train": fake_imagenet(NUM_TRAIN, 0), "validation": fake_imagenet(NUM_TEST, 1)}, data_dir
    )
    return data_dir


SETS = ("digits", "fashion_mnist", "cifar10", "imagenet2012")


def opened(name, prepared, batch_size=16, **options):
    return load(name, batch_size, **{"seed": 3, "data_dir": prepared, "image_size": 12, **options})


def take(data, count, start=0):
    iterator = data.train(start)
    result = list(itertools.islice(iterator, count))
    iterator.close()
    return result


def test_digits_are_embedded_and_stratified():
    data = load("digits", 128, seed=0)
    assert data[3:] == (1437, 360, 10, (8, 8, 1), 11)
    labels = np.concatenate([b["label"][b["weight"] > 0] for b in data.test()])
    counts = np.bincount(labels)
    assert counts.sum() == 360
    assert counts.min() >= 34
    assert counts.max() <= 37
    # Standardised by the training images: a whole epoch but for the 29 left out has about mean 0 and deviation 1.
    epoch = np.concatenate([b["image"] for b in take(data, 11)])
    assert abs(epoch.mean()) < 0.02
    assert abs(epoch.std() - 1) < 0.02


def test_digits_train_and_test_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    data = load("digits", 1, seed=0)
    batch = next(data.train(0))
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32
    train = {b["image"].tobytes() for b in take(data, 1437)}
    test = {b["image"].tobytes() for b in data.test()}
    assert not train & test
    assert len(train | test) == len({row.tobytes() for row in load_digits().data})


@pytest.mark.parametrize("name", SETS)
def test_shapes_and_types(name, prepared):
    data = opened(name, prepared)
    assert data.steps_per_epoch == data.num_train // 16
    for batch in (*take(data, 2), *data.test()):
        assert batch["image"].shape == (16, *data.image_shape)
        assert batch["image"].dtype == np.float32
        assert np.isfinite(batch["image"]).all()
        assert batch["label"].shape == (16,)
        assert batch["label"].dtype == np.int32


@pytest.mark.parametrize("name", SETS)
def test_starting_at_a_step_continues_the_run_bit_for_bit(name, prepared):
    data = opened(name, prepared)
    whole = take(data, 8)  # an epoch of the prepared sets is 3 steps
    for start in (0, 1, 3, 5):
        assert_equal(take(opened(name, prepared), 8 - start, start), whole[start:])


def test_seeking_far_does_not_replay(prepared):
    data = opened("imagenet2012", prepared)
    assert_equal(take(data, 1, 10**9), take(data, 1, 10**9))
    assert_equal(take(opened("digits", prepared), 1, 10**9), take(opened("digits", prepared), 1, 10**9))


@pytest.mark.parametrize("name", SETS)
def test_the_seed_decides(name, prepared):
    same, other = take(opened(name, prepared), 1), take(opened(name, prepared, seed=4), 1)
    assert_equal(same, take(opened(name, prepared), 1))
    assert not np.array_equal(same[0]["image"], other[0]["image"])


def test_every_epoch_is_a_new_permutation_and_no_seed_repeats_another():
    size, batch_size = 20, 6
    epochs = {}
    for seed in (0, 1, 2):
        for epoch in range(3):
            positions = [epoch * 18 + step * batch_size + np.arange(batch_size) for step in range(3)]
            order = np.concatenate([batches.indices(seed, size, batch_size, p) for p in positions])
            assert len(set(order.tolist())) == 18
            epochs[seed, epoch] = tuple(order)
    assert len(set(epochs.values())) == 9


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("batch_size", [1, 10, 23])
def test_a_test_pass_counts_every_example_once_in_order(name, batch_size, prepared):
    passes = [list(opened(name, prepared, batch_size=size).test()) for size in (batch_size, 20)]
    kept = []
    for batch_list in passes:
        weight = np.concatenate([b["weight"] for b in batch_list])
        label = np.concatenate([b["label"] for b in batch_list])
        assert set(weight.tolist()) <= {0.0, 1.0}
        assert weight.sum() == opened(name, prepared).num_test
        assert (label[weight == 0] == -1).all()
        assert (label[weight == 1] >= 0).all()
        kept.append((np.concatenate([b["image"] for b in batch_list])[weight == 1], label[weight == 1]))
    np.testing.assert_array_equal(kept[0][0], kept[1][0])
    np.testing.assert_array_equal(kept[0][1], kept[1][1])


@pytest.mark.parametrize("name", SETS)
def test_hosts_share_the_global_batch(name, prepared):
    whole = opened(name, prepared)
    parts = [opened(name, prepared, process_index=i, process_count=4) for i in range(4)]

    def joined(lists):
        return [
            {key: np.concatenate([b[key] for b in group]) for key in group[0]} for group in zip(*lists, strict=True)
        ]

    assert_equal(joined([take(part, 4, 2) for part in parts]), take(whole, 4, 2))
    assert_equal(joined([list(part.test()) for part in parts]), list(whole.test()))


def test_worker_processes_do_not_change_the_batches(prepared):
    assert_equal(take(opened("imagenet2012", prepared, workers=1), 2, 2), take(opened("imagenet2012", prepared), 2, 2))


def test_cifar10_is_cropped_mirrored_and_standardised_by_image(prepared):
    plain, augmented = opened("cifar10", prepared, augment="none"), opened("cifar10", prepared)
    left, right = take(plain, 1)[0], take(augmented, 1)[0]
    np.testing.assert_array_equal(left["label"], right["label"])
    assert not np.array_equal(left["image"], right["image"])
    for image in (*left["image"], *right["image"]):
        assert abs(image.mean()) < 1e-4
        assert abs(image.std() - 1) < 1e-4
    assert_equal(list(plain.test()), list(augmented.test()))


def test_crop_flip_equals_padding_and_slicing():
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 7, 3), np.uint8)
    indices, random = np.array([4, 0, 2, 2, 1, 3]), np.random.default_rng(1).random((6, 3))
    result = augment.crop_flip(images, indices, random, pad=2)
    for out, index, (y, x, mirror) in zip(result, indices, random, strict=True):
        padded = np.pad(images[index], ((2, 2), (2, 2), (0, 0)), mode="reflect")
        crop = padded[int(y * 5) : int(y * 5) + 9, int(x * 5) : int(x * 5) + 7]
        np.testing.assert_array_equal(out, crop[:, ::-1] if mirror < 0.5 else crop)


def test_uniforms_depend_on_seed_and_position_only():
    positions = np.arange(20_000)
    random = augment.uniforms(5, positions, 3)
    np.testing.assert_array_equal(random[[7, 3]], augment.uniforms(5, np.array([7, 3]), 3))
    assert random.min() >= 0
    assert random.max() < 1
    np.testing.assert_allclose(random.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(random.var(axis=0), 1 / 12, atol=0.01)
    neighbours = np.corrcoef(np.concatenate([random[:-1].T, random[1:].T, augment.uniforms(6, positions[1:], 3).T]))
    assert np.abs(neighbours - np.eye(9)).max() < 0.03


@pytest.mark.parametrize(("width", "height"), [(40, 30), (1, 1), (3, 200), (200, 3)])
def test_random_parts_lie_inside_the_image(width, height):
    for random in augment.uniforms(0, np.arange(200), augment.INCEPTION_RANDOM):
        left, upper, right, lower = augment._random_box(width, height, random)
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height


def test_centre_crop_takes_the_middle():
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, 32:96] = 200  # the middle square of the short side
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    assert (augment.centre_crop(file.getvalue(), 28) == 200).all()


def test_blank_images_stay_finite():
    assert (augment.standardise_image(np.full((2, 4, 4, 3), 7, np.uint8)) == 0).all()


def test_decoded_images_are_kept_and_rebuilt_when_damaged(prepared):
    fresh = take(opened("fashion_mnist", prepared), 2)
    kept = Path(prepared, "fashion_mnist", "3.0.1", "decoded", "train-images.npy")
    assert np.load(kept).shape == (NUM_TRAIN, 28, 28, 1)
    kept.write_bytes(kept.read_bytes()[:500])
    assert_equal(take(opened("fashion_mnist", prepared), 2), fresh)
    assert np.load(kept).shape == (NUM_TRAIN, 28, 28, 1)
    assert not [path for path in kept.parent.iterdir() if path.suffix != ".npy"]


def test_a_failed_import_leaves_nothing_behind(tmp_path):
    good = encoded(np.random.default_rng(0), 4, 4, "PNG")

    def stops():
        yield 0, {"id": "a", "image": good, "label": 1}
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        writer.write("cifar10", {"train": stops(), "test": stops()}, str(tmp_path))
    assert not list(tmp_path.glob("**/dataset_info.json"))
    assert not list(tmp_path.glob("**/incomplete*"))


MISSING = {
    "fashion_mnist": "apt-get install dataset-fashion-mnist && python -m experiments.import_idx --name fashion_mnist",
    "mnist": "python -m experiments.import_idx --name mnist",
    "cifar10": "tfds build cifar10 --file_format=array_record",
    "imagenet2012": "tfds build imagenet2012",
    "fashon_mnist": "'fashion_mnist'",
    "digit": "'digits'",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_set_says_what_to_type(name, tmp_path):
    with refused() as error:
        load(name, 8, seed=0, data_dir=str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert MISSING[name] in str(error.value)


def test_a_set_without_labels_is_refused(tmp_path):
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(4, 4, 3)), "mark": tfds.features.Text()})
    image = encoded(np.random.default_rng(0), 4, 4, "PNG")
    examples = [(0, {"image": image, "mark": "a"})]
    builder = writer._Builder(
        name="plain", version="1.0.0", about={"features": features}, splits={"train": examples}, data_dir=str(tmp_path)
    )
    builder.download_and_prepare(download_dir=str(tmp_path / "none"))
    with refused("image", "label", "mark"):
        load("plain", 1, seed=0, data_dir=str(tmp_path))


BAD_OPTIONS = {
    "seed": ({"seed": -1}, "seed"),
    "augment": ({"augment": "crop"}, "augment"),
    "kind": ({"augment": "inception"}, "augment"),
    "index": ({"process_index": 2, "process_count": 2}, "process_index"),
    "share": ({"process_count": 3}, "process_count"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused(case):
    options, named = BAD_OPTIONS[case]
    with refused(named):
        load(**{"dataset": "digits", "batch_size": 8, "seed": 0, **options})


def test_a_negative_step_is_refused_at_once():
    with refused("start_step"):
        load("digits", 8, seed=0).train(-1)


def test_tensorflow_is_not_needed(prepared):
    # TensorFlow can be found, which libraries ask for, but importing it fails.
    code = f"""
import importlib.machinery, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] == "tensorflow" else None
    def create_module(self, spec):
        raise ImportError("TensorFlow was imported")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Refuse())
from experiments.data import load
next(load("digits", 8, seed=0).train(0))
assert "tensorflow_datasets" not in sys.modules
for name in ("fashion_mnist", "imagenet2012"):
    data = load(name, 8, seed=0, data_dir={prepared!r}, image_size=12)
    next(data.train(0)), next(data.test())
assert "tensorflow" not in sys.modules
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root, env=os.environ)
