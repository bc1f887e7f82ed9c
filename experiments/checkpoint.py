"""Checkpoints: asynchronous, atomic, the latest few and the best, checked when read.

Orbax writes a checkpoint beside the run and renames it when it is whole, so a run that is killed leaves whole
checkpoints or none. What a disk does to a file later is found before anything else is read: each checkpoint lists the
sizes and checksums of its files, and every process of a run compares them by itself, so that none is left alone in a
collective by another that failed. What goes wrong between the devices and the disk is found by a digest, computed on
the devices over the bits of the state and saved with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from experiments import digests, sharding
from rigl_jax.base import PyTree

SUMS = "sums.json"
"""The file of a checkpoint that lists its other ones: `{"state/manifest.ocdbt": [bytes, CRC-32]}`."""

UNKNOWN = -1.0
"""Stands for an accuracy that was not measured: below all that are. Without a metric, orbax warns of a checkpoint."""

Say = Callable[[str], None]


class Checkpoints(NamedTuple):
    """The checkpoints of one run.

    Attributes:
      save: `(step, state, facts, accuracy)` starts writing and returns; the state may be donated at once. `facts` is
        JSON data kept along, `accuracy` (None: unknown) ranks the checkpoint.
      restore: `abstract state -> (state, facts)` of the newest checkpoint that is whole, or None where there is none.
      close: waits until everything is on disk.
    """

    save: Callable[[int, PyTree, Mapping[str, Any], float | None], None]
    restore: Callable[[PyTree], tuple[PyTree, dict[str, Any]] | None]
    close: Callable[[], None]


def open_checkpoints(directory: Path, *, keep: int, say: Say = logging.warning) -> Checkpoints:
    """Opens (or makes) a run's checkpoint folder.

    Args:
      directory: where; made if missing.
      keep: how many of the latest are kept; the best by accuracy is kept besides.
      say: told when a checkpoint turns out to be damaged.

    Raises:
      OSError: here, or from `save` and `close`: the folder cannot be written. What was there before is intact.
    """
    with _told(directory):
        directory.mkdir(parents=True, exist_ok=True)  # orbax does not notice a file of that name
        _check_metrics(directory, say)
        manager = _manager(directory, keep, lambda: _write_sums(directory))

    def save(step: int, state: PyTree, facts: Mapping[str, Any], accuracy: float | None) -> None:
        if step in manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave({"state": state, "digest": digests.digest(state)}),
            facts=ocp.args.JsonSave(dict(facts)),
        )
        with _told(directory):  # also what went wrong with the one before, which was still being written
            manager.save(step, args=args, metrics={"accuracy": UNKNOWN if accuracy is None else accuracy})

    def restore(abstract: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        manager.wait_until_finished()
        for step in sorted(manager.all_steps(), reverse=True):
            flaw = _flaw(directory / str(step))
            if sharding.all_agree(not flaw):
                if found := _read(manager, step, abstract):
                    return found
                flaw = "its digest does not fit its content"
            _set_aside(directory / str(step), flaw or "another process cannot read it", say)
            sharding.all_agree(True)  # the first process has renamed it: all look again
            manager.reload()
        return None

    def close() -> None:
        with _told(directory):
            manager.close()

    return Checkpoints(save, restore, close)


@contextlib.contextmanager
def _told(directory: Path) -> Iterator[None]:
    """Turns whatever orbax and tensorstore raise where a disk is full or closed into one line.

    Raises:
      OSError: in place of theirs.
    """
    try:
        yield
    except Exception as error:
        folders = [path.name for path in directory.glob("[0-9]*") if path.is_dir()]
        steps = sorted((name for name in folders if name.isdigit()), key=int)
        left = f"those of steps {', '.join(steps)} are intact" if steps else "there is none yet"
        raise OSError(f"checkpoint: cannot write to {directory}: {_reason(error)}; of earlier ones {left}") from error


def _reason(error: BaseException) -> str:
    """The first line of an error, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _manager(directory: Path, keep: int, written: Callable[[], None]) -> ocp.CheckpointManager:
    """Orbax's own; the first process calls `written` when a checkpoint's files are all there, not yet renamed."""

    def accuracy(metrics: Mapping[str, float]) -> float:
        return metrics["accuracy"]

    policy = AnyPreservationPolicy(
        [LatestN(keep), BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)]
    )
    # best_fn besides the policy: without it orbax does not read the metrics of earlier checkpoints back.
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=accuracy,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=written),
    )
    return ocp.CheckpointManager(directory.absolute(), options=options)


def _check_metrics(directory: Path, say: Say) -> None:
    """Sets aside what orbax would stumble over on opening the folder: it reads all metrics at once, and trusts them."""
    for file in directory.glob("[0-9]*/metrics/metrics") if jax.process_index() == 0 else ():
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            if file.parents[1].name.isdigit():  # no half-written one, which orbax removes
                _set_aside(file.parents[1], _reason(error), say)
    sharding.all_agree(True)  # no process opens the folder while the first one renames


def _write_sums(directory: Path) -> None:
    """Lists the files of the checkpoint that is being written; there is only one at a time."""
    (path,) = directory.glob("*.orbax-checkpoint-tmp")
    sums = {name: [file.stat().st_size, _crc(file)] for name, file in _files(path).items()}
    (path / SUMS).write_text(json.dumps(sums), encoding="utf-8")


def _flaw(path: Path) -> str:
    """What is wrong with the files of a checkpoint; empty: they are as they were written.

    Every process compares all sizes, and reads its share of the contents.
    """
    try:
        sums, files = json.loads((path / SUMS).read_text(encoding="utf-8")), _files(path)
        for i, (name, (size, crc)) in enumerate(sorted(sums.items())):
            if name not in files:
                return f"{name} is missing"
            if (now := files[name].stat().st_size) != size:
                return f"{name} has {now} bytes, not {size}"
            if i % jax.process_count() == jax.process_index() and _crc(files[name]) != crc:
                return f"{name} has another content"
    except OSError as error:
        return f"{SUMS}: {_reason(error)}"
    except (ValueError, TypeError, AttributeError, RecursionError):  # no JSON, or JSON of something else
        return f"{SUMS} is not the list of its files"
    return "" if sums else f"{SUMS} lists nothing"


def _files(path: Path) -> dict[str, Path]:
    """The files that make up a checkpoint. Orbax writes to its metadata, which nothing depends on, once more later."""
    found = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {name: file for name, file in found.items() if file.name not in (SUMS, "_CHECKPOINT_METADATA")}


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            crc = zlib.crc32(part, crc)
    return crc


def _set_aside(path: Path, flaw: str, say: Say) -> None:
    say(f"checkpoint {path.name} is damaged and set aside ({flaw[:160]}); a whole one before it is used, if any")
    if jax.process_index() == 0:
        path.rename(_free(path.with_name(f"damaged-{path.name}")))


def _free(path: Path) -> Path:
    """The path, or with a number where it is taken."""
    names = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())


def _read(manager: ocp.CheckpointManager, step: int, abstract: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
    """A checkpoint whose files are whole; None where its digest does not fit, on every process alike.

    Raises:
      ValueError: it holds something else than what is asked for.
    """
    placed = jax.tree.leaves(abstract)[0].sharding
    if isinstance(placed, NamedSharding):
        placed = NamedSharding(placed.mesh, PartitionSpec())
    wanted = {"state": abstract, "digest": jax.ShapeDtypeStruct((), jnp.uint32, sharding=placed)}
    args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), facts=ocp.args.JsonRestore())
    try:
        found = manager.restore(step, args=args)
    except Exception as error:  # of whatever type orbax chooses
        raise ValueError(f"checkpoint {step} is whole but does not fit this run: {_reason(error)}") from error
    state = found["state"]["state"]
    if int(found["state"]["digest"]) != int(digests.digest(state)):
        return None
    # Copies: what orbax restored may be memory that it owns, and the training step donates its state.
    return jax.tree.map(_copied, abstract, state), found["facts"]


def _copied(wanted: Any, leaf: Any) -> Any:
    """A copy of what was restored; the data of a typed key, which older checkpoints hold, where data are wanted."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and wanted.dtype == jnp.uint32:
        return jax.device_put(jax.random.key_data(leaf), wanted.sharding)
    return jnp.copy(leaf)
