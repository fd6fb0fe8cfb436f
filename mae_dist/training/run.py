"""The parts of the loop besides the step: batches, logging, evaluation, pictures, saving. Each decides if it is due."""

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future

import jax
import numpy as np
from absl import logging
from etils import epath

from mae_dist import config as config_lib
from mae_dist import errors, hardware, readable
from mae_dist.checkpoint.manager import Checkpoints
from mae_dist.data import ArrayDataset, Dataset, FirstExamples, local_rows, to_global
from mae_dist.data.from_config import Data
from mae_dist.evaluation import evaluate, knn_ridge, pictures
from mae_dist.evaluation.health import health
from mae_dist.metrics.goodput import Ledger
from mae_dist.metrics.recorder import Recorder
from mae_dist.metrics.throughput import Throughput
from mae_dist.model.build import Params
from mae_dist.optim.train_state import TrainState
from mae_dist.parallel import processes
from mae_dist.resilience.preemption import Preempted, PreemptionSignals
from mae_dist.resilience.watchdog import Watchdog
from mae_dist.storage import read_text, storage_errors, write_text_atomically
from mae_dist.tasks.base import Batch
from mae_dist.training.job import Job
from mae_dist.training.profiler import Profiler
from mae_dist.training.progress import Progress
from mae_dist.training.summary import Result
from mae_dist.training.train_step import TrainStep

BAD_FILES = "bad_files.txt"  # names of what did not decode, with the reason


class Run:
    """The parts of the loop besides the step. Each decides by itself whether it is due."""

    def __init__(
        self,
        job: Job,
        workdir: epath.Path,
        recorder: Recorder,
        params: Params,
        watchdog: Watchdog,
        preemption: PreemptionSignals,
        start: int,
        compilation: Future[TrainStep] | None,
        progress: Progress,
        profile_on_signal: bool,
    ):
        self.job, self.workdir, self.recorder = job, workdir, recorder
        self.watchdog, self.preemption = watchdog, preemption
        self.meta = job.meta  # written anew at every call of it, and needed after every update
        self.step = watchdog.step = start
        self.ended = "by a fault"  # until set otherwise
        began = time.time() - sum(watchdog.account().values())
        self.ledger = Ledger(
            workdir,
            from_step=start,
            total_steps=job.schedule.total_steps,
            began=began,
            is_primary=processes.is_primary(),
        )
        with watchdog.during("evaluate"):
            self.data = _all_with_features(job, params) if job.caches_features else job.data
        device = job.mesh.devices.flat[0]
        peak = hardware.peak_flops(device.device_kind, job.config.model.dtype)
        self.throughput = Throughput(
            images_per_step=job.config.global_batch_size,
            total_steps=job.schedule.total_steps,
            flops_per_image=job.flops_per_image,
            peak_flops=peak and peak * job.mesh.size,
            account=watchdog.account,
        )
        traces = workdir / "profile" / f"process_{jax.process_index()}"
        self.profiler = Profiler(traces, job.config.profile_steps, on_signal=profile_on_signal)
        self.evaluated: dict[str, float] = {}  # what was evaluated after the current update
        self.skipped_runs: list[jax.Array] = []  # of the steps since the last log step, still on the device
        self.longest_skipped_run = 0
        self.num_bad_named = 0  # records in bad_files.txt by this start
        # Kept, because it knows which records were named.
        self.first_examples = FirstExamples(job.data.train, job.config.online.num_train)
        self._compilation = compilation
        self._train_step: TrainStep | None = None  # once it is compiled
        self.progress = progress

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.watchdog.enter("end")
        try:
            self.ledger.note(self.step, self.watchdog.account(), self.ended)
        except errors.StorageFault:
            if error is None:
                raise

    def preempted(self, step: int) -> Result:
        """Returns the result of a preempted run whose state is saved."""
        self.ended = "preempted"
        self.progress.close(step)
        logging.warning("Preempted: saved step %d; the same command continues from it.", step)
        return Result(step, "preempted")

    def batches(self, start: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Yields (step, global batch) for every step after `start`."""
        job, total = self.job, self.job.schedule.total_steps
        rows = local_rows(job.batch_sharding, job.config.global_batch_size)
        taken = tuple(job.abstract_batch)  # the columns that the step is compiled for
        if start < total:
            self.progress.compiling()
        with job.train_batches(self.data.train, start, rows) as self.host_batches:
            for step in range(start + 1, total + 1):
                self.profiler.before(step)
                try:
                    with self.watchdog.during("data"), self.preemption.interrupting():
                        host_batch = next(self.host_batches)
                except Preempted:
                    self.host_batches.abandon()
                    return
                self.evaluated = {}
                columns = {name: host_batch[name] for name in taken}
                batch = to_global(columns, job.batch_sharding, job.config.global_batch_size, rows)
                with jax.transfer_guard("disallow"):
                    yield step, batch
                self.progress.advance()

    def update(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Dispatches one step; returns the new state, and metrics on the device."""
        with self.profiler.annotate(step):
            out = self._train_step(state, batch) if self._train_step else self._first_update(step, state, batch)
        if self.profiler.ends_with(step):
            with self._pause(out[0], "profile"):
                self.profiler.stop()
        self.step = self.watchdog.step = step
        self.preemption.after_step(step)
        return out

    def _first_update(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Waits for the compilation, and for the step: rates are measured from the step after it."""
        with self.watchdog.during("compile"):
            # There is none if the newest checkpoint was the last step's and turned out to be corrupted.
            self._train_step = self._compilation.result() if self._compilation else self.job.train_step
            out = jax.block_until_ready(self._train_step(state, batch))
        self.throughput.start(step)
        self.progress.ready(step)
        return out

    def save(
        self, checkpoints: Checkpoints, step: int, state: TrainState, pending: dict[str, float] | None, last: bool
    ) -> None:
        """Saves if that is due; the `last` time always, and waits until it is on disk."""
        with jax.transfer_guard("allow"):  # process 0 decides for all
            due = last or checkpoints.is_due(step, self.evaluated)
        if due:
            meta = {**self.meta, "unfinished": pending}
            with self._pause(state, "checkpoint"):  # which copies the state from the device, so it waits anyway
                checkpoints.save(step, state, meta, self.evaluated, wait=last)

    def conclude(
        self, step: int, state: TrainState, unfinished: dict[str, float] | None = None
    ) -> dict[str, float] | None:
        """Evaluates, draws and records what is due, before the checkpoint is saved: a resumed run goes on after it.

        Returns:
          None, or the record that is left unfinished where a preemption signal cut the evaluation short; given as
          `unfinished` to the next start, it is continued.
        """
        if unfinished:
            self.recorder.write_scalars(step, unfinished)
        try:
            self.evaluate(step, state)
        except Preempted:
            self.evaluated = {}
            return self.recorder.withdraw()
        self.draw(step, state)
        self.recorder.commit(step)
        return None

    def log(self, step: int, on_device: dict[str, jax.Array]) -> None:
        """Fetches and records the metrics of this update when they are due, and waits for the device to do so."""
        self.skipped_runs.append(on_device["skipped_run"])
        if not config_lib.is_time(step, self.job.config.log_every_steps, self.job.schedule.total_steps):
            return
        fetched, runs = jax.device_get((on_device, self.skipped_runs))
        self.ledger.note(step, self.watchdog.account())
        self.longest_skipped_run, self.skipped_runs = int(max(runs)), []
        values = {name: value.item() for name, value in fetched.items()}
        bad_records = [*self.job.data.train.bad_records, *self.host_batches.bad_records]
        if bad_records:
            values["bad_records"] = len(bad_records)
        if len(bad_records) > self.num_bad_named:  # which reads and writes a file
            name_bad_files(self.workdir, bad_records)
            self.num_bad_named = len(bad_records)
        values |= self.throughput.log(step)
        self.recorder.write_scalars(step, values)
        self.progress.log(step, values)

    def stop_if_diverged(self, step: int) -> None:
        """Raises `Diverged` after a run of non-finite updates, even one that ended before this log step."""
        limit = self.job.config.max_skipped_steps
        if self.longest_skipped_run >= limit:
            half = self.job.config.model.dtype != "float32"
            raise errors.Diverged(
                f"{self.longest_skipped_run} updates in a row, the last by step {step}, had a non-finite gradient and "
                f"were skipped (max_skipped_steps={limit}): the parameters are those before them. Lower optim.base_lr, "
                f"set optim.clip_norm{', use model.dtype=float32' if half else ''} or correct data.mean and "
                "data.std, in a new workdir."
            )

    def evaluate(self, step: int, state: TrainState) -> None:
        """Evaluates the splits that are due, after the last step all of them; raises `Preempted` after a signal."""
        schedule, options = self.job.schedule, self.job.config.eval
        ends = step == schedule.total_steps
        test = self.data.test if options.test_at_end and ends else None
        if config_lib.is_time(step, schedule.eval_every_steps, schedule.total_steps):
            self._evaluate_split(state, "val_", self.data.val)
        self._evaluate_split(state, "test_", test)
        self._evaluate_split(state, "train_", self.data.train if options.train_at_end and ends else None)
        if config_lib.is_time(step, schedule.online_every_steps, schedule.total_steps):
            self._read_out(state, {"val_": self.data.val, "test_": test})
        if self.evaluated:
            self.recorder.write_scalars(step, self.evaluated)
            self.progress.evaluated(step, self.evaluated)

    def _evaluate_split(self, state: TrainState, prefix: str, dataset: Dataset | None) -> None:
        if dataset is None:
            return
        job = self.job
        with self._pause(state, "evaluate"):
            batches = evaluate.global_batches(dataset, job.batch_sharding, job.eval_batch_size, job.config.seed)
            self.evaluated |= evaluate.evaluate(
                job.eval_step, job.gather(state.averaged), batches, prefix, dataset.class_names, self._after_batch
            )

    def _read_out(self, state: TrainState, splits: dict[str, Dataset | None]) -> None:
        """Measures the encoder's current features on these splits: health, and with labels kNN and ridge accuracy."""
        job, options = self.job, self.job.config.online

        present = {prefix: dataset for prefix, dataset in splits.items() if dataset is not None}
        if not present:
            return
        with self._pause(state, "evaluate"):
            params = job.gather(state.averaged)

            def features(dataset: Dataset) -> evaluate.Columns:
                return evaluate.collect(job.features_of(dataset, params), after_batch=self._after_batch)

            has_classes = job.data.train.num_classes > 1
            train = features(self.first_examples) if has_classes else None
            for prefix, dataset in present.items():
                seen = features(dataset)
                found = health(seen["features"])
                if train is not None:
                    found |= knn_ridge.top1(
                        train,
                        seen,
                        num_classes=job.data.train.num_classes,
                        k=options.k,
                        temperature=options.temperature,
                        ridge=options.ridge,
                    )
                self.evaluated |= {f"{prefix}{name}": value for name, value in found.items()}

    def _after_batch(self) -> None:
        """Reports progress and looks for a preemption signal, after each batch of an evaluation, on all processes."""
        self.watchdog.progress()
        # The best checkpoint is found by the metrics it is saved with: such an evaluation is finished.
        if not self.job.config.checkpoint.keep_best and self.preemption.poll():
            raise Preempted

    @contextlib.contextmanager
    def _pause(self, state: TrainState, phase: str) -> Generator[None]:
        """Runs a phase between steps. Waits first for dispatched steps, whose time would count as the phase's."""
        jax.block_until_ready(state.step)
        with self.watchdog.during(phase), jax.transfer_guard("allow"):
            yield

    def draw(self, step: int, state: TrainState) -> None:
        """Writes pictures of the first test images to pictures/ and TensorBoard, if they are due."""
        job = self.job
        dataset = job.data.test or job.data.val
        due = config_lib.is_time(step, job.schedule.pictures_every_steps, job.schedule.total_steps)
        if job.reconstruct_step is None or dataset is None or not due:
            return
        with self._pause(state, "evaluate"):
            grid = draw_reconstructions(job, job.gather(state.averaged), dataset, step, job.config.pictures.num_images)
            if processes.is_primary():
                pictures.write_png(self.workdir / "pictures" / f"step_{step:08d}.png", grid)
            self.recorder.write_images(step, {"reconstruction": grid[None]})


def name_bad_files(workdir: epath.Path, names: Sequence[str]) -> None:
    """Adds to bad_files.txt the names that it does not hold yet, of earlier starts too; each process has a file."""
    number = jax.process_index()
    path = workdir / (f"bad_files_{number}.txt" if number else BAD_FILES)
    with storage_errors(path):
        known = read_text(path).splitlines()
        if new := [line for name in names if (line := " ".join(name.splitlines())) not in known]:
            write_text_atomically(path, "\n".join((*known, *new, "")))


def draw_reconstructions(job: Job, params: Params, dataset: Dataset, step: int, num_images: int) -> np.ndarray:
    """Draws the first `num_images` of a split, uint8 (height, width, 3); all processes take part."""
    images, names = pictures.reconstruct(
        job.reconstruct_step, params, dataset, job.batch_sharding, num_images, job.config.seed
    )
    shown = pictures.as_shown(images, job.config)
    return pictures.draw_grid(shown, names, pictures.title(job.config, step))


def with_features(job: Job, params: Params, dataset: Dataset) -> Dataset:
    """Returns a split with images replaced by the frozen encoder's features."""
    arrays = evaluate.collect(job.features_of(dataset, params))
    return ArrayDataset(
        arrays,
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        fingerprint=dataset.fingerprint,
    )


def _all_with_features(job: Job, params: Params) -> Data:
    began, data, params = time.monotonic(), job.data, job.gather(params)
    val, test = (dataset and with_features(job, params, dataset) for dataset in (data.val, data.test))
    data = Data(with_features(job, params, data.train), val, test)
    logging.info("Features of the frozen encoder computed once, in %s", readable.duration(time.monotonic() - began))
    return data
