"""Checkpoints of a run: saved in the background by steps and minutes, verified, resumed from the newest good one.

What lies where: `mae_dist/saved.py`. `python -m mae_dist.checkpoint verify|list|rm-quarantine W` looks after those of a
workdir.
"""

import argparse
import concurrent.futures
import contextlib
import json
import math
import shlex
import sys
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
from mae_dist import console, distributed, errors, integrity, saved
from mae_dist.errors import StorageFault, UserError
from mae_dist.seals import Seals
from mae_dist.state import TrainState
from mae_dist.storage import absolute, check_checkpoints, naming_faults

_policy = ocp.checkpoint_managers
_MANIFEST_SECS = 600.0  # to hear from every process; one that is lost the watchdog finds before


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
        with saved.naming_damage(self.directory, self.directory.parent):
            self._manager = saved.open_manager(
                self.directory,
                self._check_readable,
                save_decision_policy=_policy.AnySavePolicy(save),
                preservation_policy=_policy.AnyPreservationPolicy(keep),
                # The policy above decides; without this Orbax would not store the metric for the next process.
                best_fn=metric if keep_best else None,
                best_mode="min" if lowest else "max",
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            )
        self._keep_best = keep_best
        self._seals = Seals(workdir)
        self._sealing = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._unsealed: int | None = None  # the step whose manifest is to be written
        self._under_way: int | None = None  # as `_unsealed`, from before Orbax begins
        self._names: Collection[str] = ()  # of its arrays
        self._sealed: concurrent.futures.Future[None] | None = None
        self._retries = retries
        self._failures = 0  # in a row
        self._retry_at: float | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        alone = error is not None and jax.process_count() > 1  # the others may never answer
        try:
            with saved.naming_damage(self.directory, self.directory.parent):
                self._manager.close()
                if not alone:
                    self._seal(wait=True)
        except StorageFault as fault:
            if error is None:
                raise
            logging.error("%s", fault)  # what ended the run is the error to report
        finally:
            self._sealing.shutdown(wait=not alone)

    def _check_readable(self) -> None:
        """Called by Orbax, in its thread, when a save is written and has not got its name yet."""
        assert self._under_way is not None
        saved.check_readable(saved.written(self.directory, self._under_way), self._names)

    def _seal(self, wait: bool = False) -> None:
        """Has the manifest of a save that has ended written in the background; a failure surfaces in the next call."""
        if self._unsealed is not None and (wait or not self._manager.is_saving_in_progress()):
            self._sealed, self._unsealed = self._sealing.submit(self._write_manifest, self._unsealed), None
        if self._sealed is not None and (wait or self._sealed.done()):
            self._sealed, sealed = None, self._sealed
            sealed.result()
            self._failures = 0

    def _write_manifest(self, step: int) -> None:
        """Digests the files that this process wrote; process 0 writes the manifest, when it has heard from all."""
        own = self._seals.digest_own(step, jax.process_index(), jax.process_count())
        texts = distributed.send_to_first(f"mae_dist/manifest/{step}", json.dumps(own), _MANIFEST_SECS)
        if texts is not None:
            self._seals.write(step, [json.loads(text) for text in texts])

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
            with saved.naming_damage(self.directory, self.directory.parent):
                self._manager.check_for_errors()
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
        with saved.naming_damage(self.directory, self.directory.parent):
            self._manager.check_for_errors()
            self._seal()
            if self.latest_step() == step:
                return
            self._manager.wait_until_finished()  # as Orbax does; then the one before can be sealed
            self._seal()
            digests = integrity.digests(state.to_dict())
            meta, self._under_way, self._names = {**meta, "digests": digests}, step, digests.keys()
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(state.to_dict()), meta=ocp.args.JsonSave(meta))
            self._manager.save(step, args=args, metrics=self._best(metrics) or None, force=True)
            self._unsealed, self._retry_at = step, None

    def _count_failure(self, fault: StorageFault) -> None:
        """Plans another attempt; raises the fault when there were enough.

        Of several processes one alone cannot: they save together, and begin anew together.
        """
        self._failures += 1
        if jax.process_count() > 1 or self._failures > self._retries:
            raise fault
        delay = 4 ** (self._failures - 1)
        self._retry_at, self._unsealed = time.monotonic() + delay, None
        attempt = f"{self._failures} of {self._retries}"
        logging.error("A SAVE FAILED: %s\nAnother attempt (%s) in %d s", fault, attempt, delay)
        for partial in self.directory.glob("*.orbax-checkpoint-tmp*"):  # its room is needed
            with contextlib.suppress(OSError):
                partial.rmtree()
        self._manager.reload()

    def wait(self) -> None:
        """Blocks until what was begun is on disk; a failed save is a `StorageFault`."""
        with saved.naming_damage(self.directory, self.directory.parent):
            self._manager.wait_until_finished()
            self._seal(wait=True)

    def restore(
        self, abstract: TrainState, shardings: TrainState, config: ConfigDict, fingerprint: str, default: ConfigDict
    ) -> tuple[TrainState, int, dict[str, float] | None] | None:
        """The newest good state, its step and the `unfinished` of its meta; None before any save.

        The state is laid out by `shardings`, whatever mesh saved it.

        Damaged checkpoints go to quarantine, for all processes alike. Fields that `config` has and the checkpoint lacks
        count as `default` for it.

        Raises:
          StorageFault: the checkpoint belongs to another configuration or other data, and every field that differs is
            named; or it cannot be read although its files are as they were written; or none is good.
        """
        while (step := self.latest_step()) is not None:
            try:
                state, meta = self._restore_verified(step, abstract, shardings, config, fingerprint, default)
                return state, step, meta.get("unfinished")
            except saved.Damaged as damage:
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
        if distributed.is_primary():
            with naming_faults(path):
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
        default: ConfigDict,
    ) -> tuple[TrainState, dict[str, Any]]:
        path = self.directory / str(step)
        sealed = _check_files(self._seals, step, path)
        with _telling_damage(path, sealed):
            meta = saved.read_meta(self._manager, step)
            stored = config_lib.from_json(meta["config"], default)
            stored_fingerprint = "" if saved.WEIGHTS_ONLY in meta else meta["data_fingerprint"]
        if saved.WEIGHTS_ONLY in meta:
            raise StorageFault(
                f"{path} holds converted weights ({meta[saved.WEIGHTS_ONLY]}), not a run to continue; "
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
            stored = saved.restore(self._manager, step, abstract.to_dict(), shardings.to_dict())
        saved.check_values(meta.get("digests", {}), stored)
        return TrainState(**stored), meta


def _check_files(seals: Seals, step: int, path: epath.Path) -> bool:
    """True if the files are known to be as they were written; `saved.Damaged`, in all processes, if they are not.

    Each process reads some of the files.
    """
    with naming_faults(path):
        lines = seals.damage(step, jax.process_index(), jax.process_count())
    known, count = _from_all([int(lines is not None), len(lines or [])]).T
    if count.any():
        raise saved.Damaged("; ".join((lines or [f"{count.sum()} files, found by another process"])[:5]))
    return bool(known.all())


def _from_all(values: list[int]) -> Any:
    """Returns what each process says, a row of numbers for each."""
    rows = np.asarray(values)[None]
    return rows if jax.process_count() == 1 else multihost_utils.process_allgather(rows[0])


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
        if sealed or (isinstance(error, OSError) and not isinstance(error, saved.UNREADABLE)):
            with saved.naming_damage(path, path.parent.parent):
                raise
        raise saved.Damaged(f"it cannot be read: {saved.first_line(error)}") from error


def _command(argv: Sequence[str]) -> int:
    """Runs `verify`, `list` or `rm-quarantine`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mae_dist.checkpoint", description="Looks after a run's checkpoints."
    )
    parser.add_argument("what", choices=("verify", "list", "rm-quarantine"))
    parser.add_argument("workdir", help="of the run; its processes may be running")
    console.check_arguments(argv)
    given = parser.parse_args(argv)
    workdir = absolute(given.workdir)
    check_checkpoints(workdir, saving=False)
    seals, directory = Seals(workdir), workdir / "checkpoints"
    if not (directory.exists() or (given.what == "rm-quarantine" and seals.quarantined())):
        raise StorageFault(
            f"{directory} does not exist: {workdir} is not the workdir of a run that has saved; correct it"
        )
    if given.what == "rm-quarantine":
        print(f"{seals.empty_quarantine()} checkpoints deleted from quarantine")
        return errors.EXIT_DONE
    steps = saved.steps(workdir)
    faults = 0
    for step in steps:
        path = directory / str(step)
        files = list(integrity.files(path))
        sealed = "sealed" if seals.has(step) else "not sealed"
        line = (
            f"{step:>10}  {sum(file.stat().length for file in files) / 2**20:8.1f} MiB  {len(files):4} files  {sealed}"
        )
        if given.what == "verify":
            lines = saved.condition(workdir, step)
            faults += bool(lines)
            line += "  DAMAGED: " + "; ".join(lines[:5]) if lines else "  good"
        print(line, flush=True)
    for name, reason in seals.quarantined().items():
        print(f"{name:>10}  in quarantine: {reason}")
    if not steps:
        print(f"{directory} is empty")
    return errors.EXIT_STORAGE if faults else errors.EXIT_DONE


if __name__ == "__main__":
    errors.open_closed_streams()
    console.set_up()
    sys.exit(errors.exit_code_of(lambda: _command(sys.argv[1:])))
