"""Reads, verifies and writes saved checkpoints without the run that they are of.

Layout: `<workdir>/checkpoints/<step>/state` (Orbax) and `…/meta` (JSON: the config, the data set's fingerprint and the
digests of the arrays); `mae_dist/checkpoint/manifests.py` adds the files' digests.
"""

import contextlib
import itertools
import json
import shlex
from collections.abc import Callable, Collection, Generator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import os_errors
from mae_dist.checkpoint import digests
from mae_dist.checkpoint.manifests import Manifests
from mae_dist.errors import ConfigError, StorageFault, UserError
from mae_dist.parallel.shardings import with_shardings
from mae_dist.storage import check_checkpoints, is_local, storage_errors, write_text_atomically

# In the meta of converted weights: where they came from.
WEIGHTS_ONLY = "weights_of"

# What Orbax, tensorstore and json raise when files are short, missing or not what they should be.
UNREADABLE = (ValueError, KeyError, TypeError, FileNotFoundError, NotADirectoryError, jax.errors.JaxRuntimeError)

# Replicas share the writing of an array only where each of them has so much of it to write.
_MIN_SLICE_BYTES = 2**20
_TRAIN_FIRST = "train that run first, or correct --workdir, --source or init_from"


class Corrupted(Exception):
    """A checkpoint is not what was saved; the message says in which way."""


@contextlib.contextmanager
def checkpoint_errors(workdir: epath.Path, step: int | None = None) -> Generator[None]:
    """Turns what Orbax and tensorstore raise about a run's checkpoints, or about one of them, into `StorageFault`s."""
    path = workdir / "checkpoints" / ("" if step is None else str(step))
    try:
        with storage_errors(path):
            yield
    except UserError:
        raise
    except UNREADABLE as error:
        verify = f"python -m mae_dist.checkpoint verify {shlex.quote(str(workdir))}"
        cure = os_errors.cure(error) or (
            f"If it is corrupted ({verify}), the training command puts it in quarantine and continues from the one "
            "before"
        )
        raise StorageFault(f"checkpoint {path} cannot be written or read: {error}\n{cure}.") from error


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, for a list of faults."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_values(meta: dict[str, Any], tree: PyTree) -> None:
    """Raises `Corrupted` if an array is not what a checkpoint's meta says; those of older versions do not say."""
    if meant := meta.get("digests"):
        found = digests.digests(tree)
        lines = digests.differences({name: value for name, value in meant.items() if name in found}, found)
        if lines:
            raise Corrupted("; ".join(lines[:5]))


def open_manager(
    directory: epath.Path, before_commit: Callable[[], None] | None = None, **options: Any
) -> ocp.CheckpointManager:
    """Opens Orbax's manager of the checkpoints in a directory.

    Args:
      directory: where the checkpoints are.
      before_commit: is called in process 0, in the background, when all processes have written a checkpoint but it has
        not got its name yet. If it raises, that save has failed.
      options: fields of Orbax's CheckpointManagerOptions.
    """
    types = ocp.type_handlers
    # Orbax compiles a program to slice each array of which every replica writes a part: not worth it in one process.
    arrays = types.ArrayHandler(
        use_replica_parallel=jax.process_count() > 1, min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES
    )
    handlers = types.create_type_handler_registry((jax.Array, arrays), (np.ndarray, types.NumpyHandler()))
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)
    asynchronously = ocp.AsyncOptions(
        # Made in the background, a directory that cannot be made leaves threads that wait five minutes for it.
        create_directories_asynchronously=False,
        post_finalization_callback=before_commit,
    )
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(async_options=asynchronously, **options),
        item_handlers={"state": state, "meta": ocp.JsonCheckpointHandler()},
    )


def check_readable(directory: epath.Path, step: int, names: Collection[str]) -> None:
    """Raises `StorageFault` unless a checkpoint, committed or not, has its meta and the named arrays as a whole.

    Opens every array and reads the last byte of every chunk: so a chunk is there, and not cut short. The digests say
    whether the bytes are right.
    """
    temporary = directory / f"{step}{ocp.utils.TMP_DIR_SUFFIX}"  # in a bucket it has its name from the beginning
    path = temporary if temporary.exists() else directory / str(step)
    try:
        lines = _missing(path, names)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever a parser makes of garbage
        lines = [first_line(error)]
    if lines:
        raise StorageFault(f"checkpoint {path} was written but cannot be read back: {'; '.join(lines[:5])}")


def _missing(path: epath.Path, names: Collection[str]) -> list[str]:
    """Returns a line for every array that is not there, and for every chunk of those that are."""
    read_meta(path)  # which raises if that cannot be read
    arrays = {array.name: array for array in jax.tree.leaves(_stored_tree(path))}
    lines = [f"array {name} is missing" for name in sorted(set(names) - arrays.keys())]
    base = {"driver": "file", "path": f"{path / 'state'}/"}  # a URL would need escapes
    if not is_local(path):
        bucket, _, name = str(path / "state").removeprefix("gs://").partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    last_bytes = {}
    for name, array in arrays.items():
        counts = [-(-size // chunk) for size, chunk in zip(array.shape, array.storage.chunk_shape, strict=True)]
        for index in itertools.product(*map(range, counts)):
            key = f"{name}/{'.'.join(map(str, index)) or 0}"
            last_bytes[key] = store.read(key, byte_range=slice(-1, None))
    for key, reading in last_bytes.items():
        try:
            if len(reading.result().value) != 1:  # none: the chunk is not known, or its file is gone
                lines.append(f"chunk {key} is missing")
        except ValueError as error:
            lines.append(f"chunk {key}: {first_line(error)}")
    return lines


def _stored_tree(path: epath.Path) -> dict[str, Any]:
    """Returns the shapes of all that a checkpoint holds, without reading its arrays."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.metadata(path / "state").tree


def read_meta(path: epath.Path) -> dict[str, Any]:
    """Returns a checkpoint's meta: the config, the data set's fingerprint and the arrays' digests."""
    return json.loads((path / "meta" / "metadata").read_text())


def restore(manager: ocp.CheckpointManager, step: int, target: PyTree, *, partial: bool = False) -> PyTree:
    """Returns a checkpoint's arrays in the shapes and shardings of `target`, which if `partial` need not name all."""
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=partial
    )
    return manager.restore(step, args=ocp.args.Composite(state=args))["state"]


def read_config(workdir: epath.Path) -> ConfigDict:
    """Returns the config of the run in `workdir`."""
    path = workdir / "config.json"
    if not path.exists():
        raise StorageFault(
            f"{workdir} is not the workdir of a run: it has no config.json; correct --workdir, --source or init_from"
        )
    check_checkpoints(workdir, saving=False)
    with storage_errors(path):
        text = path.read_bytes()
    try:
        return config_lib.from_json(text.decode())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageFault(
            f"{path} is corrupted: {first_line(error)}. Restore it from a copy, or "
            "continue the run: its command writes it again"
        ) from error


def _good_step(workdir: epath.Path, step: int | None) -> int:
    """Returns the newest step whose files are as they were written, or `step` if that is one."""
    directory = workdir / "checkpoints"
    if not directory.exists():
        raise StorageFault(f"{directory} does not exist; {_TRAIN_FIRST}")
    with storage_errors(directory):
        saved = steps(workdir)
        if step is not None and step not in saved:
            raise StorageFault(f"{directory} has no step {step}; it has {', '.join(map(str, saved)) or 'none'}")
        for found in saved[::-1] if step is None else [step]:
            faults = Manifests(workdir).faults(found)
            if not faults:
                return found
            if step is not None:
                raise StorageFault(f"checkpoint {directory / str(step)} is corrupted: {faults[0]}. Choose another step")
            logging.error("CORRUPTED CHECKPOINT: %s (%s); reading the one before", directory / str(found), faults[0])
    raise StorageFault(f"{directory} holds no {'good ' if saved else ''}checkpoint; {_TRAIN_FIRST}")


def param_shapes(workdir: epath.Path, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """Returns (step, shapes of the parameters by group) of the newest good checkpoint, or of that of `step`."""
    step = _good_step(workdir, step)
    with checkpoint_errors(workdir, step):
        return step, _stored_tree(workdir / "checkpoints" / str(step))["params"]


def load_params(
    workdir: epath.Path, abstract: dict[str, Any], shardings: dict[str, Any], step: int | None = None
) -> tuple[int, dict[str, Any]]:
    """Returns (step, parameters) of the newest good checkpoint in `workdir`, or of that of `step`.

    Reads only the groups that `abstract` names, and their averages (`ema_decay`) where there are some: a frozen group
    has none.
    """
    step = _good_step(workdir, step)
    path = workdir / "checkpoints" / str(step)
    with checkpoint_errors(workdir, step), open_manager(path.parent, create=False) as manager:
        averaged = _stored_tree(path).get("ema", {})
        target: dict[str, dict[str, Any]] = {}
        for group, value in with_shardings(abstract, shardings).items():
            target.setdefault("ema" if group in averaged else "params", {})[group] = value
        state, meta = restore(manager, step, target, partial=True), read_meta(path)
    try:
        check_values(meta, state)
    except Corrupted as fault:
        cure = "Repeat the command that trained it: it puts it in quarantine and continues from the one before"
        if WEIGHTS_ONLY in meta:
            cure = f"Delete {workdir} and convert {meta[WEIGHTS_ONLY]} again"
        raise StorageFault(f"checkpoint {path} is corrupted: {fault}. {cure}") from fault
    return step, {**state.get("params", {}), **state.get("ema", {})}


def save_params(workdir: epath.Path, config: ConfigDict, params: dict[str, Any], origin: str) -> None:
    """Writes trained parameters as a workdir of their own, at step 0 and without the state of an optimizer."""
    directory, state, manifests = workdir / "checkpoints", {"params": params}, Manifests(workdir)
    found = digests.digests(state)
    meta = {"config": config_lib.to_json(config), WEIGHTS_ONLY: origin, "digests": found}
    with (
        checkpoint_errors(workdir),
        open_manager(directory, lambda: check_readable(directory, 0, found)) as manager,
    ):
        manager.save(0, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)))
        manager.wait_until_finished()
    with storage_errors(workdir):
        manifests.write(0, [manifests.digest_files(0)])
        write_text_atomically(workdir / "config.json", config_lib.to_json(config) + "\n")


def steps(workdir: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `workdir`, ascending."""
    directory = workdir / "checkpoints"
    if not directory.exists():
        return []
    # In a bucket a save under way, or cut short, has the name already; only a last object says that it is complete.
    complete = (path for path in directory.iterdir() if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path))
    return sorted(int(path.name) for path in complete)


def condition(workdir: epath.Path, step: int) -> list[str]:
    """Returns a line for each fault: of the files against their manifest, or of the arrays against their digests."""
    path = workdir / "checkpoints" / str(step)
    if faults := Manifests(workdir).faults(step):
        return faults
    try:
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _stored_tree(path))
        with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer:
            check_values(read_meta(path), checkpointer.restore(path / "state", restore_args=as_numpy))
    except Corrupted as fault:
        return [str(fault)]
    except Exception as error:  # whatever a parser makes of garbage
        return [f"it cannot be read: {first_line(error)}"]
    return []
