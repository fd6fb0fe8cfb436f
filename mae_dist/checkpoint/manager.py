"""Checkpoints of a run: saved in the background by steps and minutes, verified, resumed from the newest good one.

What lies where: `mae_dist/checkpoint/reader.py`. `python -m mae_dist.checkpoint verify|list|rm-quarantine W` verifies,
lists and cleans up those of a workdir.
"""

import concurrent.futures
import contextlib
import json
import math
import shlex
import time
from collections.abc import Callable, Collection, Generator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.checkpoint import digests, reader
from mae_dist.checkpoint.manifests import Manifests
from mae_dist.errors import StorageFault, UserError
from mae_dist.optim.train_state import TrainState
from mae_dist.parallel import processes
from mae_dist.parallel.shardings import with_shardings
from mae_dist.storage import storage_errors

_policy = ocp.checkpoint_managers
_POLL_SECS = 0.05
_MANIFEST_SECS = 1200.0  # as long as Orbax waits for the other processes


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
        self._workdir, self._directory = workdir, workdir / "checkpoints"
        self._every_steps, self._total_steps = every_steps, total_steps
        self._every_secs, self._log_every_steps = 60 * every_minutes, log_every_steps
        self._keep_best = keep_best
        self._manifests = Manifests(workdir)
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Collection[str]] = (0, ())  # step and names of the arrays of the latest save
        self._saved_at = time.monotonic()  # the beginning, then the end of that save; or the start
        self._manifest: concurrent.futures.Future[None] | None = None  # of that save, until its outcome is known
        self._retries = retries
        self._failures = 0  # in a row
        self._retry_at = math.inf
        keep: list[Any] = [_policy.LatestN(keep_latest)]
        if keep_every_steps:
            keep.append(_policy.EveryNSteps(keep_every_steps))
        lowest = keep_best.endswith("loss")  # a loss is best when lowest, an accuracy when highest

        def metric(metrics: dict[str, float]) -> float:
            """Returns the worst for a checkpoint that was saved for another metric, before `keep_best` was changed."""
            return metrics.get(keep_best, math.inf if lowest else -math.inf)

        if keep_best:
            keep.append(
                _policy.BestN(get_metric_fn=metric, reverse=lowest, n=1, keep_checkpoints_without_metrics=False)
            )
        with self._errors():
            self._manager = reader.open_manager(
                self._directory,
                # In the background: a checkpoint must be readable before it is committed and old ones are deleted.
                lambda: reader.check_readable(self._directory, *self._saving),
                preservation_policy=_policy.AnyPreservationPolicy(keep),
                # The policy above decides; without this Orbax would not store the metric for the next process.
                best_fn=metric if keep_best else None,
                cleanup_tmp_directories=True,
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            with self._errors():
                try:
                    self.wait()
                finally:
                    self._manager.close()  # completely only after a failed save has been reported
        except StorageFault as fault:
            if error is None:
                raise
            logging.error("%s", fault)  # what ended the run is the error to report
        finally:
            self._background.shutdown()

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return reader.checkpoint_errors(self._workdir)

    def _write_manifest(self, step: int) -> None:
        """Waits in the background for the end of a save and digests its files, each process those that it wrote."""
        while self._manager.is_saving_in_progress():
            time.sleep(_POLL_SECS)
        own = None
        try:
            if step in reader.steps(self._workdir):  # if not, the save failed, and the manager raises why
                own = self._manifests.digest_files(step, jax.process_index(), jax.process_count())
        finally:  # process 0 waits for something from each
            texts = processes.send_to_first(f"mae_dist/manifest/{step}", json.dumps(own), _MANIFEST_SECS)
        parts = [json.loads(text) for text in texts or ()]
        if parts and None not in parts:
            self._manifests.write(step, parts)

    def latest_step(self) -> int | None:
        """Returns the newest saved step, or None."""
        return self._manager.latest_step()

    def is_due(self, step: int, metrics: dict[str, float]) -> bool:
        """Returns True if this step is to be saved; called after every step, by all processes.

        `metrics` are those of an evaluation after this very step, or empty: with `keep_best` each evaluated step is
        saved. A failed background save surfaces here or in `save`, is tried again, and in the end a `StorageFault`.
        """
        try:
            if self._manifest is not None and self._manifest.done():
                self.wait()
        except StorageFault as fault:
            self._count_failure(fault)
            return False
        if step == self._total_steps or (self._every_steps and step % self._every_steps == 0) or self._best(metrics):
            return True
        if (now := time.monotonic()) >= self._retry_at:
            return True
        if not self._every_secs or step % self._log_every_steps:
            return False
        # Clocks differ, so the first process decides for all; that costs a message, so it is asked at log steps only.
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(now - self._saved_at >= self._every_secs)))

    def _best(self, metrics: dict[str, float]) -> dict[str, float]:
        """Returns the metric of `keep_best`, where it is known."""
        return {name: value for name, value in metrics.items() if name == self._keep_best and math.isfinite(value)}

    def save(
        self, step: int, state: TrainState, meta: dict[str, Any], metrics: dict[str, float], *, wait: bool = False
    ) -> None:
        """Saves, whether or not `is_due`; returns at once, or when all that was begun is on disk (`wait`).

        `metrics` are as for `is_due`.
        """
        while True:
            try:
                self._attempt(step, state, meta, metrics)
                if wait:
                    self.wait()
                return
            except StorageFault as fault:
                self._count_failure(fault)
                if not wait:
                    return
                time.sleep(max(0.0, self._retry_at - time.monotonic()))

    def wait(self) -> None:
        """Blocks until what was begun is on disk; a `StorageFault` if the save or its manifest has failed."""
        if self._manifest is not None:
            self._manifest, manifest = None, self._manifest
            with self._errors():
                self._manager.wait_until_finished()
                manifest.result()
            self._failures, self._saved_at = 0, time.monotonic()

    def _attempt(self, step: int, state: TrainState, meta: dict[str, Any], metrics: dict[str, float]) -> None:
        self.wait()  # for the save before, which this one may delete
        if self.latest_step() == step:
            return
        with self._errors():
            arrays = state.to_dict()
            found = digests.digests(arrays)
            args = ocp.args.Composite(
                state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave({**meta, "digests": found})
            )
            self._saving, self._saved_at, self._retry_at = (step, found), time.monotonic(), math.inf
            self._manager.save(step, args=args, metrics=self._best(metrics) or None, force=True)
            self._manifest = self._background.submit(self._write_manifest, step)

    def _count_failure(self, fault: StorageFault) -> None:
        """Plans another attempt; raises the fault when there were enough.

        Of several processes one alone cannot: they save together, and begin anew together.
        """
        self._failures += 1
        if jax.process_count() > 1 or self._failures > self._retries:
            raise fault
        delay = 4 ** (self._failures - 1)
        self._retry_at, self._manifest = time.monotonic() + delay, None
        attempt = f"{self._failures} of {self._retries}"
        logging.error("A SAVE FAILED: %s\nAnother attempt (%s) in %d s", fault, attempt, delay)
        for path in self._directory.iterdir():  # what is not complete: its room is needed
            with contextlib.suppress(OSError):
                if ocp.utils.is_tmp_checkpoint(path):
                    path.rmtree()
        self._manager.reload()

    def restore(
        self,
        abstract: TrainState,
        shardings: TrainState,
        config: ConfigDict,
        fingerprint: str,
        changes: Callable[[str], str] = lambda fingerprint: "",
    ) -> tuple[TrainState, int, dict[str, Any]] | None:
        """Returns the newest good state, its step and its meta; None before any save.

        The state is laid out by `shardings`, whatever mesh saved it.

        `changes` says how the training data differ from those of another fingerprint, where that is known.

        Corrupted checkpoints go to quarantine, for all processes alike. Fields that `config` has and the checkpoint
        lacks count as their defaults.

        Raises:
          StorageFault: the checkpoint belongs to another configuration or other data, and every field that differs is
            named; or it cannot be read although its files are as they were written; or none is good.
        """
        while (step := self.latest_step()) is not None:
            try:
                state, meta = self._restore_verified(step, abstract, shardings, config, fingerprint, changes)
                return state, step, meta
            except reader.Corrupted as fault:
                if processes.is_primary():
                    with storage_errors(self._directory / str(step)):
                        place = self._manifests.quarantine(step, str(fault))
                    logging.error(
                        "CORRUPTED CHECKPOINT: step %d (%s). It is put in %s, never to be read again.",
                        *(step, fault, place),
                    )
                multihost_utils.sync_global_devices(f"quarantine {step}")
                self._manager.reload()
        reasons = self._manifests.quarantined()
        if reasons:
            raise StorageFault(
                f"{self._directory} holds no good checkpoint any more; in quarantine beside it: {', '.join(reasons)}. "
                "Restore the workdir from a copy and repeat the command, or choose another --workdir to begin anew; "
                f"python -m mae_dist.checkpoint rm-quarantine {shlex.quote(str(self._workdir))} gives these up"
            )
        return None

    def _restore_verified(
        self,
        step: int,
        abstract: TrainState,
        shardings: TrainState,
        config: ConfigDict,
        fingerprint: str,
        changes: Callable[[str], str],
    ) -> tuple[TrainState, dict[str, Any]]:
        is_intact = self._check_files(step)
        with self._reading(step, is_intact):
            meta = reader.read_meta(self._directory / str(step))
            self._check_same_run(step, meta, config, fingerprint, changes)
            target = with_shardings(abstract.to_dict(), shardings.to_dict())
            arrays = reader.restore(self._manager, step, target)
        reader.check_values(meta, arrays)
        return TrainState(**arrays), meta

    def _check_same_run(
        self, step: int, meta: dict[str, Any], config: ConfigDict, fingerprint: str, changes: Callable[[str], str]
    ) -> None:
        path = self._directory / str(step)
        if reader.WEIGHTS_ONLY in meta:
            raise StorageFault(
                f"{path} holds converted weights ({meta[reader.WEIGHTS_ONLY]}), not a run to continue; "
                "start one from them in another --workdir with "
                f"--config.init_from={shlex.quote(str(self._workdir))}"
            )
        stored = config_lib.from_json(meta["config"], for_use=False)
        lines = config_lib.differences(stored, config)
        if (old := meta["data_fingerprint"]) != fingerprint:
            named = changes(old) or f"{old} -> {fingerprint}"
            if config.data.accept_changes:
                logging.warning("The training data have changed, and are accepted: %s", named)
            else:
                lines.append(
                    f"training data (fingerprint): {named}; --config.data.accept_changes=True goes on with these, from "
                    "the next epoch"
                )
        if lines:
            raise StorageFault(
                f"{path} was saved by another configuration:\n  - " + "\n  - ".join(lines) + "\n"
                "Set these back to continue the run, or choose another --workdir (or --config.name) for a new one."
            )
        for line in config_lib.differences(stored, config, ignore=()):
            logging.info("Continuing with a changed field: %s", line)

    def _check_files(self, step: int) -> bool:
        """Returns True if the files are known to be as they were written; each process reads a fraction of them.

        Raises `reader.Corrupted`, in all processes, if they are not.
        """
        with storage_errors(self._directory / str(step)):
            faults = self._manifests.faults(step, jax.process_index(), jax.process_count())
        text = "; ".join((faults or [])[:5]).encode()[:1024]
        sent = np.frombuffer(bytes([faults is not None]) + text.ljust(1024, b"\0"), np.uint8)
        received = multihost_utils.process_allgather(sent)  # (processes, 1025)
        texts = [row[1:].tobytes().rstrip(b"\0").decode(errors="replace") for row in received]
        if any(texts):
            raise reader.Corrupted("; ".join(filter(None, texts)))
        return bool(received[:, 0].all())

    @contextlib.contextmanager
    def _reading(self, step: int, is_intact: bool) -> Generator[None]:
        """Raises `reader.Corrupted` for what cannot be read, unless the files are intact: then this version cannot."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        except Exception as error:
            # Of an operating system's errors most are not the checkpoint's fault: permissions, a disk that is away.
            if is_intact or (isinstance(error, OSError) and not isinstance(error, reader.UNREADABLE)):
                with reader.checkpoint_errors(self._workdir, step):
                    raise
            raise reader.Corrupted(f"it cannot be read: {reader.first_line(error)}") from error
