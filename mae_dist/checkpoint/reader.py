"""What saved checkpoints hold: read, judged and written without the run that they are of.

Layout: `<workdir>/checkpoints/<step>/state` (Orbax) and `…/meta` (JSON: the config, the data set's fingerprint and the
digests of the arrays); `mae_dist/checkpoint/manifests.py` adds the files' digests.
"""

import contextlib
import itertools
import json
import shlex
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import os_errors
from mae_dist.checkpoint import digests
from mae_dist.checkpoint.manifests import Seals
from mae_dist.errors import ConfigError, StorageFault, UserError
from mae_dist.parallel.shardings import with_shardings
from mae_dist.storage import check_checkpoints, is_local, storage_errors, write_text_atomically

# In the meta of converted weights: where they came from.
WEIGHTS_ONLY = "weights_of"

# What Orbax, tensorstore and json raise when files are short, missing or not what they should be.
UNREADABLE = (ValueError, KeyError, TypeError, FileNotFoundError, NotADirectoryError, jax.errors.JaxRuntimeError)

# Replicas share the writing of an array only where each of them has so much of it to write.
_MIN_SLICE_BYTES = 2**20


class Damaged(Exception):
    """A checkpoint is not what was saved; the arguments say in which way."""


@contextlib.contextmanager
def naming_damage(path: epath.Path, workdir: epath.Path) -> Iterator[None]:
    """As `storage_errors`, and for what Orbax and tensorstore raise when files are short, missing or not writable."""
    try:
        with storage_errors(path):
            yield
    except UserError:
        raise
    except UNREADABLE as error:
        verify = f"python -m mae_dist.checkpoint verify {shlex.quote(str(workdir))}"
        cure = os_errors.cure(error) or (
            f"If it is damaged ({verify}), the training command puts it in quarantine and continues from the one before"
        )
        raise StorageFault(f"checkpoint {path} cannot be written or read: {error}\n{cure}.") from error


def first_line(error: Exception) -> str:
    """What an error says, for a list of faults."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_values(meant: dict[str, str], tree: Any) -> None:
    """Raises `Damaged` if an array is not what was meant when it was saved; older checkpoints do not say."""
    if meant:
        found = digests.digests(tree)
        lines = digests.differences({name: value for name, value in meant.items() if name in found}, found)
        if lines:
            raise Damaged("; ".join(lines[:5]))


def open_manager(
    directory: epath.Path, before_commit: Callable[[], None] | None = None, **options: Any
) -> ocp.CheckpointManager:
    """Opens Orbax's manager of the checkpoints in a directory.

    Args:
      directory: of the checkpoints.
      before_commit: is called in process 0, in the background, when all processes have written a checkpoint but it has
        not got its name yet. If it raises, that save has failed.
      options: fields of Orbax's CheckpointManagerOptions.
    """
    types = ocp.type_handlers
    # Orbax compiles a program to slice each array of which every replica writes a part: not worth it in one process.
    arrays = types.ArrayHandler(
        use_replica_parallel=jax.process_count() > 1, min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES
    )
    others = ((kind, types.get_type_handler(kind)) for kind in types.supported_types() if kind is not jax.Array)
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=types.create_type_handler_registry(*others, (jax.Array, arrays))
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave, handler)
    registry.add("state", ocp.args.PyTreeRestore, handler)
    asynchronously = ocp.AsyncOptions(
        # Made in the background, a directory that cannot be made leaves threads that wait five minutes for it.
        create_directories_asynchronously=False,
        post_finalization_callback=before_commit,
    )
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(async_options=asynchronously, **options),
        handler_registry=registry,
    )


def written(directory: epath.Path, step: int) -> epath.Path:
    """Returns where a checkpoint lies that has been written but not committed: in a bucket it has its name already."""
    temporary = directory / f"{step}{ocp.utils.TMP_DIR_SUFFIX}"
    return temporary if temporary.exists() else directory / str(step)


def check_readable(path: epath.Path, names: Collection[str]) -> None:
    """Raises `StorageFault` unless a checkpoint has its meta and, whole, the arrays with these names.

    Opens every array and reads the last byte of every chunk: so a chunk is there, and not cut short. What the bytes
    are, the digests say.
    """
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
    json.loads((path / "meta" / "metadata").read_text())
    arrays = {array.name: array for array in jax.tree.leaves(_stored_tree(path))}
    lines = [f"array {name} is missing" for name in sorted(set(names) - arrays.keys())]
    store = ts.KvStore.open({"driver": "ocdbt", "base": _tensorstore_spec(path / "state")}).result()
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


def _tensorstore_spec(directory: epath.Path) -> dict[str, str]:
    """Returns how tensorstore calls a directory on a disk or in a bucket; not by a URL, which would need escapes."""
    if is_local(directory):
        return {"driver": "file", "path": f"{directory}/"}
    bucket, _, path = str(directory).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def restore(manager: ocp.CheckpointManager, step: int, abstract: Any, shardings: Any, partial: bool = False) -> Any:
    """A checkpoint's arrays, each in its sharding; of a `partial` tree only what it names is read."""
    target = with_shardings(abstract, shardings)
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=partial
    )
    return manager.restore(step, args=ocp.args.Composite(state=args))["state"]


def read_config(workdir: epath.Path) -> ConfigDict:
    """The config of the run in `workdir`."""
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
            f"{path} is damaged: {first_line(error)}. Restore it from a copy, or "
            "continue the run: its command writes it again"
        ) from error


@contextlib.contextmanager
def _opened(workdir: epath.Path, step: int | None) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """The manager of an existing run's checkpoints and the newest step that is good, or the one asked for."""
    directory = workdir / "checkpoints"
    if not directory.exists():
        raise StorageFault(
            f"{directory} does not exist; train that run first, or correct --workdir, --source or init_from"
        )
    with naming_damage(directory, workdir):
        manager = open_manager(directory, create=False)
    try:
        saved, damaged = sorted(manager.all_steps(), reverse=True), False
        if step is not None and step not in saved:
            raise StorageFault(f"{directory} has no step {step}; it has {', '.join(map(str, saved[::-1])) or 'none'}")
        for found in saved if step is None else (step,):
            damage = Seals(workdir).damage(found)
            if damage and step is not None:
                raise StorageFault(f"checkpoint {directory / str(step)} is damaged: {damage[0]}. Choose another step")
            if damage:
                damaged = True
                logging.error("DAMAGED CHECKPOINT: %s (%s); reading the one before", directory / str(found), damage[0])
                continue
            with naming_damage(directory / str(found), workdir):
                yield manager, found
            return
        good = "good " if damaged else ""
        raise StorageFault(
            f"{directory} holds no {good}checkpoint; train that run first, or correct --workdir, --source or init_from"
        )
    finally:
        manager.close()


def _stored_tree(path: epath.Path) -> dict[str, Any]:
    """The shapes of all that a checkpoint holds; nothing of it is read."""
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return handler.metadata(path / "state").tree
    finally:
        handler.close()


def param_shapes(workdir: epath.Path, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """(step, shapes of the parameters by group) of the newest checkpoint in `workdir`, or of that of `step`.

    Nothing of them is read.
    """
    with _opened(workdir, step) as (_, found):
        return found, _stored_tree(workdir / "checkpoints" / str(found))["params"]


def load_params(
    workdir: epath.Path, abstract: dict[str, Any], shardings: dict[str, Any], step: int | None = None
) -> tuple[int, dict[str, Any]]:
    """(step, parameters) of the newest checkpoint in `workdir`, or of that of `step`.

    Only the groups that `abstract` names are read.

    Of a run with averages (`ema_decay`) these are read, where they exist: a frozen part has none.
    """
    with _opened(workdir, step) as (manager, step):
        averaged = _stored_tree(workdir / "checkpoints" / str(step)).get("ema", {})

        def by_origin(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
            parts = {
                "ema": {group: value for group, value in tree.items() if group in averaged},
                "params": {group: value for group, value in tree.items() if group not in averaged},
            }
            return {name: part for name, part in parts.items() if part}

        state = restore(manager, step, by_origin(abstract), by_origin(shardings), partial=True)
        meta = read_meta(manager, step)
        try:
            check_values(meta.get("digests", {}), state)
        except Damaged as damage:
            cure = "Repeat the command that trained it: it puts it in quarantine and continues from the one before"
            if WEIGHTS_ONLY in meta:
                cure = f"Delete {workdir} and convert {meta[WEIGHTS_ONLY]} again"
            raise StorageFault(
                f"checkpoint {workdir / 'checkpoints' / str(step)} is damaged: {damage}. {cure}"
            ) from damage
        return step, {**state.get("params", {}), **state.get("ema", {})}


def save_params(workdir: epath.Path, config: ConfigDict, params: dict[str, Any], origin: str) -> None:
    """Writes trained parameters as a workdir of their own, at step 0 and without the state of an optimizer."""
    directory = workdir / "checkpoints"
    state = {"params": params}
    names = [digests.array_name(path) for path, _ in jax.tree.leaves_with_path(state)]

    def check() -> None:
        check_readable(written(directory, 0), names)

    with naming_damage(directory, workdir), open_manager(directory, check) as manager:
        meta = {"config": config_lib.to_json(config), WEIGHTS_ONLY: origin}
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        manager.save(0, args=args)
        manager.wait_until_finished()
    with storage_errors(workdir):
        write_text_atomically(workdir / "config.json", config_lib.to_json(config) + "\n")


def steps(workdir: epath.Path) -> list[int]:
    """The steps of the complete checkpoints in `workdir`, ascending."""
    directory = workdir / "checkpoints"
    if not directory.exists():
        return []
    # In a bucket a save under way, or cut short, has the name already; only a last object says that it is complete.
    complete = (path for path in directory.iterdir() if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path))
    return sorted(int(path.name) for path in complete)


def condition(workdir: epath.Path, step: int) -> list[str]:
    """What is wrong with a checkpoint: its files against their seal, its arrays against their digests."""
    path = workdir / "checkpoints" / str(step)
    lines = Seals(workdir).damage(step)
    if lines:
        return lines
    handler = ocp.PyTreeCheckpointer()
    try:
        meta = json.loads((path / "meta" / "metadata").read_text())
        shapes: Any = handler.metadata(path / "state").item_metadata
        shapes = shapes.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        check_values(meta.get("digests", {}), jax.device_put(handler.restore(path / "state", restore_args=as_numpy)))
    except Damaged as damage:
        return [str(damage)]
    except Exception as error:  # whatever a parser makes of garbage
        return [f"it cannot be read: {first_line(error)}"]
    finally:
        handler.close()
    return []
