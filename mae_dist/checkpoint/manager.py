"""Checkpoints of a run: saved in the background by steps and minutes, verified, resumed from the newest good one.

What lies where: `mae_dist/checkpoint/reader.py`. `python -m mae_dist.checkpoint verify|list|rm-quarantine W` looks
after those of a workdir.
"""

import concurrent.futures
import contextlib
import json
import math
import shlex
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.checkpoint import digests as integrity
from mae_dist.checkpoint import reader
from mae_dist.checkpoint.manifests import Seals
from mae_dist.errors import StorageFault, UserError
from mae_dist.optim.train_state import TrainState
from mae_dist.parallel import processes
from mae_dist.parallel import shardings as sharding
from mae_dist.storage import storage_errors

_policy = ocp.checkpoint_managers
_POLL_SECS = 0.05
_MANIFEST_SECS = 1200.0  # as long as Orbax waits for the other processes


class _EveryMinutes:
    """Saves when this process's start, or what it saved since, is long enough ago, by a clock that cannot be set.

    All processes must decide alike although their clocks differ, so the first one decides for all; that costs a
    message, and is asked at log steps only.
    """

    def __init__(self, minutes: float, ask_every_steps: int):
        self._secs, self._ask_every_steps = 60 * minutes, ask_every_steps
        self._latest: int | None = None
        self._since = time.monotonic()

    def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
        del context
        if step.step % self._ask_every_steps:
            return False
        latest = previous_steps[-1].step if previous_steps else None
        if latest != self._latest:
            self._latest, self._since = latest, time.monotonic()
        return bool(_from_first([int(time.monotonic() - self._since >= self._secs)])[0])


class Checkpoints:
    """The checkpoints of one workdir; a context manager that waits for the last save when it closes."""

    def __init__(
        self,
        workdir: epath.Path,
        *,
        every_steps: int,
        every_minutes: float,
        keep_latest: int,
        keep_every_steps: int,
        keep_best: str,
        retries: int,
        log_every_steps: int,
        total_steps: int,
    ):
        save: list[Any] = [
            _policy.SpecificStepsPolicy({total_steps}),  # the last step is saved whatever the interval
        ]
        if every_steps:
            save.append(_policy.FixedIntervalPolicy(every_steps))
        if every_minutes:
            save.append(_EveryMinutes(every_minutes, log_every_steps))
        keep: list[Any] = [_policy.LatestN(keep_latest)]
        if keep_every_steps:
            keep.append(_policy.EveryNSteps(keep_every_steps))
        lowest = keep_best.endswith("loss")  # a loss is best when lowest, an accuracy when highest

        def metric(metrics: dict[str, float]) -> float:
            """Of a checkpoint that was saved for another metric, before `keep_best` was changed: the worst."""
            return metrics.get(keep_best, math.inf if lowest else -math.inf)

        if keep_best:
            keep.append(
                _policy.BestN(get_metric_fn=metric, reverse=lowest, n=1, keep_checkpoints_without_metrics=False),
            )
        self.directory = workdir / "checkpoints"
        with reader.naming_damage(self.directory, self.directory.parent):
            self._manager = reader.open_manager(
                self.directory,
                self._check_written,
                save_decision_policy=_policy.AnySavePolicy(save),
                preservation_policy=_policy.AnyPreservationPolicy(keep),
                # The policy above decides; without this Orbax would not store the metric for the next process.
                best_fn=metric if keep_best else None,
                best_mode="min" if lowest else "max",
                cleanup_tmp_directories=True,
            )
        self._keep_best = keep_best
        self._seals = Seals(workdir)
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Collection[str]] = (0, ())  # step and names of the arrays of the latest save
        self._sealed: concurrent.futures.Future[None] | None = None  # of that save, until its outcome is known
        self._retries = retries
        self._failures = 0  # in a row
        self._retry_at: float | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            with reader.naming_damage(self.directory, self.directory.parent):
                try:
                    self._seal(wait=True)
                finally:
                    self._manager.close()  # completely only after a failed save has been reported
        except StorageFault as fault:
            if error is None:
                raise
            logging.error("%s", fault)  # what ended the run is the error to report
        finally:
            self._background.shutdown()

    def _check_written(self) -> None:
        """In the background, before a checkpoint gets its name and old ones are deleted: can it be read back?"""
        step, names = self._saving
        reader.check_readable(reader.written(self.directory, step), names)

    def _write_manifest(self, step: int) -> None:
        """In the background, when a save has ended: digests its files, each process those that it wrote.

        All processes send what they have, even if that is nothing or a fault: process 0 waits for it.
        """
        while self._manager.is_saving_in_progress():
            time.sleep(_POLL_SECS)
        share, fault = None, ""
        try:
            if step in reader.steps(self.directory.parent):  # if not, the save failed, and the manager says so
                share = self._seals.digest_share(step, jax.process_index(), jax.process_count())
        except Exception as error:  # a bucket's client has faults of its own
            fault = f"process {jax.process_index()}: {error}"
        sent = processes.send_to_first(f"mae_dist/manifest/{step}", json.dumps([share, fault]), _MANIFEST_SECS)
        received = [json.loads(text) for text in sent or ()]
        faults = [said for said in (fault, *(said for _, said in received)) if said]
        if faults:
            raise OSError(faults[0])
        if received:
            self._seals.write(step, [share for share, _ in received])

    def _seal(self, wait: bool = False) -> None:
        """Raises why the latest save or its manifest failed, if it has; may wait for them to end."""
        if self._sealed is not None and (wait or self._sealed.done()):
            self._sealed, sealed = None, self._sealed
            self._manager.wait_until_finished()
            sealed.result()
            self._failures = 0

    def latest_step(self) -> int | None:
        """The newest saved step, or None."""
        return self._manager.latest_step()

    def is_due(self, step: int, metrics: dict[str, float]) -> bool:
        """True if this step is to be saved; called after every update, by all processes.

        `metrics` are those of an evaluation after this very update, or empty. With `keep_best` each evaluated step is
        saved, for the best is kept among what was evaluated. A failure of an earlier background save surfaces here or
        in `save`; it is tried again after a while, in the end a `StorageFault`.
        """
        try:
            with reader.naming_damage(self.directory, self.directory.parent):
                self._seal()
                again = self._retry_at is not None and time.monotonic() >= self._retry_at
                return bool(self._best(metrics)) or again or self._manager.should_save(step)
        except StorageFault as fault:
            self._count_failure(fault)
            return False

    def _best(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metric of `keep_best`, where it is known."""
        return {name: value for name, value in metrics.items() if name == self._keep_best and math.isfinite(value)}

    def save(self, step: int, state: TrainState, meta: dict[str, Any], metrics: dict[str, float]) -> None:
        """Saves in the background, whether or not `is_due`; `metrics` as there."""
        try:
            self._attempt(step, state, meta, metrics)
        except StorageFault as fault:
            self._count_failure(fault)

    def save_and_wait(self, step: int, state: TrainState, meta: dict[str, Any], metrics: dict[str, float]) -> None:
        """Saves, and returns when all that was begun is on disk."""
        while True:
            try:
                self._attempt(step, state, meta, metrics)
                return self.wait()
            except StorageFault as fault:
                self._count_failure(fault)
                time.sleep(max(0.0, (self._retry_at or 0.0) - time.monotonic()))

    def _attempt(self, step: int, state: TrainState, meta: dict[str, Any], metrics: dict[str, float]) -> None:
        with reader.naming_damage(self.directory, self.directory.parent):
            self._seal(wait=True)  # of the one before, which this one may delete
            if self.latest_step() == step:
                return
            digests = integrity.digests(state.to_dict())
            args = ocp.args.Composite(
                state=ocp.args.PyTreeSave(state.to_dict()), meta=ocp.args.JsonSave({**meta, "digests": digests})
            )
            self._saving, self._retry_at = (step, digests.keys()), None
            self._manager.save(step, args=args, metrics=self._best(metrics) or None, force=True)
            self._sealed = self._background.submit(self._write_manifest, step)

    def _count_failure(self, fault: StorageFault) -> None:
        """Plans another attempt; raises the fault when there were enough.

        Of several processes one alone cannot: they save together, and begin anew together.
        """
        self._failures += 1
        if jax.process_count() > 1 or self._failures > self._retries:
            raise fault
        delay = 4 ** (self._failures - 1)
        self._retry_at, self._sealed = time.monotonic() + delay, None
        attempt = f"{self._failures} of {self._retries}"
        logging.error("A SAVE FAILED: %s\nAnother attempt (%s) in %d s", fault, attempt, delay)
        for path in self.directory.iterdir():  # what is not complete: its room is needed
            with contextlib.suppress(OSError):
                if ocp.utils.is_tmp_checkpoint(path):
                    path.rmtree()
        self._manager.reload()

    def wait(self) -> None:
        """Blocks until what was begun is on disk; a failed save is a `StorageFault`."""
        with reader.naming_damage(self.directory, self.directory.parent):
            self._seal(wait=True)

    def restore(
        self, abstract: TrainState, shardings: TrainState, config: ConfigDict, fingerprint: str
    ) -> tuple[TrainState, int, dict[str, float] | None] | None:
        """The newest good state, its step and the `unfinished` of its meta; None before any save.

        The state is laid out by `shardings`, whatever mesh saved it.

        Damaged checkpoints go to quarantine, for all processes alike. Fields that `config` has and the checkpoint lacks
        count as their defaults.

        Raises:
          StorageFault: the checkpoint belongs to another configuration or other data, and every field that differs is
            named; or it cannot be read although its files are as they were written; or none is good.
        """
        placed = sharding.with_shardings(abstract, shardings)
        self._background.submit(integrity.programs, placed.to_dict())  # before digests need them
        while (step := self.latest_step()) is not None:
            try:
                state, meta = self._restore_verified(step, abstract, shardings, config, fingerprint)
                return state, step, meta.get("unfinished")
            except reader.Damaged as damage:
                self._put_away(step, str(damage))
        reasons = self._seals.quarantined()
        if reasons:
            raise StorageFault(
                f"{self.directory} holds no good checkpoint any more; in quarantine beside it: {', '.join(reasons)}. "
                "Restore the workdir from a copy and repeat the command, or choose another --workdir to begin anew; "
                f"python -m mae_dist.checkpoint rm-quarantine {shlex.quote(str(self.directory.parent))} gives these up"
            )
        return None

    def _put_away(self, step: int, reason: str) -> None:
        """Quarantines a checkpoint, for all processes."""
        path = self.directory / str(step)
        if processes.is_primary():
            with storage_errors(path):
                place = self._seals.quarantine(step, reason)
            logging.error(
                "DAMAGED CHECKPOINT: step %d (%s). It is put in %s, never to be read again.", step, reason, place
            )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"quarantine {step}")
        self._manager.reload()

    def _restore_verified(
        self,
        step: int,
        abstract: TrainState,
        shardings: TrainState,
        config: ConfigDict,
        fingerprint: str,
    ) -> tuple[TrainState, dict[str, Any]]:
        path = self.directory / str(step)
        sealed = _check_files(self._seals, step, path)
        with _telling_damage(path, sealed):
            meta = reader.read_meta(self._manager, step)
            stored = config_lib.from_json(meta["config"], for_use=False)
            stored_fingerprint = "" if reader.WEIGHTS_ONLY in meta else meta["data_fingerprint"]
        if reader.WEIGHTS_ONLY in meta:
            raise StorageFault(
                f"{path} holds converted weights ({meta[reader.WEIGHTS_ONLY]}), not a run to continue; "
                "start one from them in another --workdir with "
                f"--config.init_from={shlex.quote(str(self.directory.parent))}"
            )
        lines = config_lib.differences(stored, config)
        if stored_fingerprint != fingerprint:
            lines.append(f"training data (fingerprint): {stored_fingerprint} -> {fingerprint}")
        if lines:
            raise StorageFault(
                f"{path} was saved by another configuration:\n  - " + "\n  - ".join(lines) + "\n"
                "Set these back to continue the run, or choose another --workdir (or --config.name) for a new one."
            )
        for line in config_lib.differences(stored, config, ignore=()):
            logging.info("Continuing with a changed field: %s", line)
        with _telling_damage(path, sealed):
            stored = reader.restore(self._manager, step, abstract.to_dict(), shardings.to_dict())
        reader.check_values(meta.get("digests", {}), stored)
        return TrainState(**stored), meta


def _check_files(seals: Seals, step: int, path: epath.Path) -> bool:
    """True if the files are known to be as they were written; each process reads its fraction of them.

    Raises `reader.Damaged`, in all processes, if they are not.
    """
    with storage_errors(path):
        lines = seals.damage(step, jax.process_index(), jax.process_count())
    known, lines = _from_all(lines is not None, lines or [])
    if lines:
        raise reader.Damaged("; ".join(lines[:5]))
    return known


def _from_all(known: bool, lines: list[str]) -> tuple[bool, list[str]]:
    """Returns whether all processes know, and the lines of all, of each no more than a kB."""
    if jax.process_count() == 1:
        return known, lines
    text = "\n".join(lines).encode()[:1024]
    sent = np.frombuffer(bytes([known]) + text.ljust(1024, b"\0"), np.uint8)
    received = [row.tobytes() for row in multihost_utils.process_allgather(sent)]
    texts = [row[1:].rstrip(b"\0").decode(errors="replace") for row in received]
    return all(row[0] for row in received), [line for text in texts for line in text.splitlines()]


def _from_first(values: list[int]) -> Any:
    """What process 0 says, for all."""
    values_array = np.asarray(values)
    return values_array if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(values_array)


@contextlib.contextmanager
def _telling_damage(path: epath.Path, sealed: bool) -> Iterator[None]:
    """A failure to read is damage, unless the files are as they were written: then this version cannot read them."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # Of an operating system's errors most are not the checkpoint's fault: permissions, a disk that is away.
        if sealed or (isinstance(error, OSError) and not isinstance(error, reader.UNREADABLE)):
            with reader.naming_damage(path, path.parent.parent):
                raise
        raise reader.Damaged(f"it cannot be read: {reader.first_line(error)}") from error
