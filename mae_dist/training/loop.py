"""The one training loop: restore or begin, update, log, evaluate, draw, save."""

import contextlib
import functools
import json
import os
import time
from concurrent.futures import Future

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import readable
from mae_dist.checkpoint.manager import Checkpoints
from mae_dist.data.from_config import Data
from mae_dist.metrics import history
from mae_dist.metrics.recorder import METRICS_FILE, OnRecord, Recorder
from mae_dist.metrics.summary import SUMMARY_FILE
from mae_dist.optim.train_state import TrainState
from mae_dist.parallel import processes
from mae_dist.parallel.shardings import with_shardings
from mae_dist.resilience.interrupt import interrupted_between_steps
from mae_dist.resilience.lock import Held, workdir_lock
from mae_dist.resilience.preemption import Preempted, PreemptionSignals
from mae_dist.resilience.watchdog import Watchdog
from mae_dist.storage import read_text, set_aside, storage_errors, write_text_atomically
from mae_dist.trackers.tracking import Tracking
from mae_dist.training import saved_program
from mae_dist.training.job import Job
from mae_dist.training.progress import Progress
from mae_dist.training.run import Run
from mae_dist.training.summary import Result, finish
from mae_dist.training.text import start_lines
from mae_dist.training.train_step import TrainStep


def train(
    job: Job,
    workdir: epath.Path,
    watchdog: Watchdog,
    preemption: PreemptionSignals,
    *,
    profile_on_signal: bool = False,
    on_record: OnRecord | None = None,
    verbose: bool = False,
) -> Result:
    """Trains to `job.schedule.total_steps`, continuing from the newest good checkpoint in `workdir`.

    `watchdog` accounts for the run's time by phase. After a signal of `preemption` the state is saved and the run ends,
    its result without metrics. With `profile_on_signal` SIGUSR1 requests a profiler trace while the loop runs.
    `on_record` is called on process 0 with each record of metrics.jsonl. With `verbose` the table of parameters is
    logged; overview.txt has it always.

    Raises:
      StorageFault: the workdir cannot be used, or its checkpoint belongs to another configuration.
      DataFault: an example cannot be read.
      Diverged: `config.max_skipped_steps` steps in a row had a non-finite gradient.
      Preempted: a signal came before there was anything to save.
    """
    with _tracking(job.config, workdir, watchdog) as tracking:
        options = {"profile_on_signal": profile_on_signal, "on_record": on_record, "verbose": verbose}
        try:
            result = _train(job, workdir, watchdog, preemption, tracking, **options)
        except Preempted:
            tracking.status = "preempted"
            raise
        tracking.status = result.status
    return result


def _train(
    job: Job,
    workdir: epath.Path,
    watchdog: Watchdog,
    preemption: PreemptionSignals,
    tracking: Tracking,
    *,
    profile_on_signal: bool,
    on_record: OnRecord | None,
    verbose: bool,
) -> Result:
    def when_recorded(record: dict[str, float]) -> None:
        tracking.wake()
        if on_record is not None:
            on_record(record)

    _warn_of_bad_records(job.data)
    if job.schedule.online_every_steps and job.data.train.num_classes < 2:
        logging.info(
            "There are no labels of two classes: kNN and ridge accuracy are off; val_rank, val_feature_std and "
            "val_dead_share say whether the features tell images apart"
        )
    total_steps = job.schedule.total_steps
    with (
        workdir_lock(workdir) if processes.is_primary() else contextlib.nullcontext(Held()) as held,
        interrupted_between_steps() as stop_if_interrupted,
        _checkpoints(job, workdir) as checkpoints,
        Progress(total_steps) as progress,
        jax.set_mesh(job.mesh),
    ):
        for line in start_lines(job, verbose=verbose):
            logging.info("%s", line)
        compilation = _compile_ahead(job, checkpoints, watchdog, progress)
        with watchdog.during("restore"), preemption.interrupting():
            job, state, start, unfinished = _restore_or_begin(job, checkpoints)
        if processes.is_primary():
            history.check_start(workdir, job.config, start, total_steps)
            _repair_config(job, workdir)
        if start >= total_steps and unfinished is None:
            logging.info("The run is finished")
            tracking.start(finished=True)
            return finish(job, workdir, start)
        primary = processes.is_primary()
        with Recorder(workdir, start_step=start, is_primary=primary, on_record=when_recorded) as recorder:
            _write_description(job, workdir)
            tracking.start()
            preemption.check()
            parts = (watchdog, preemption, start, compilation, progress, profile_on_signal)
            run = Run(job, workdir, recorder, state.params, *parts)
            with run, run.profiler, watchdog.during("step"):
                if unfinished is not None and run.conclude(start, state, unfinished) is not None:
                    return run.preempted(start)
                for step, batch in run.batches(start):
                    held.check()
                    state, on_device = run.update(step, state, batch)
                    run.log(step, on_device)
                    pending = run.conclude(step, state)
                    run.stop_if_diverged(step)
                    ending = pending is not None or preemption.poll()
                    run.save(checkpoints, step, state, pending, last=ending or step == total_steps)
                    stop_if_interrupted()
                    if (ending and step < total_steps) or pending is not None:
                        return run.preempted(step)
                if run.step < total_steps:  # preempted while it waited for a batch
                    if run.step == 0:
                        raise Preempted
                    run.save(checkpoints, run.step, state, None, last=True)
                    return run.preempted(run.step)
                run.ended = "done"
    return finish(job, workdir, total_steps)


def _tracking(config: ConfigDict, workdir: epath.Path, watchdog: Watchdog) -> Tracking:
    """Returns the trackers of a run, which the first process has."""
    about = {
        "name": workdir.name,
        "config": {**dict(config_lib.flatten(config)), "workdir": os.fspath(workdir)},
        "tags": [config.name, config.task],
        "records": METRICS_FILE,
        "pictures": "pictures",
        "summary": SUMMARY_FILE,
    }
    return Tracking(config.trackers if processes.is_primary() else (), workdir, about, watchdog.progress)


def _compile_ahead(
    job: Job, checkpoints: Checkpoints, watchdog: Watchdog, progress: Progress
) -> Future[TrainStep] | None:
    """Begins to load or compile the step, if any is left to do."""
    if (checkpoints.latest_step() or 0) >= job.schedule.total_steps:
        return None
    progress.compiling()
    with watchdog.during("compile"):
        state = with_shardings(job.abstract_state, job.shardings)
        load = functools.partial(saved_program.load, job)
        return job.train_step.compile_in_thread(state, job.abstract_batch, load)


def _warn_of_bad_records(data: Data) -> None:
    for name, dataset in (("train", data.train), ("val", data.val), ("test", data.test)):
        if dataset is not None and dataset.bad_records:
            names = ", ".join(dataset.bad_records)
            logging.warning("%s: left out %d undecodable records: %s", name, len(dataset.bad_records), names)


def _checkpoints(job: Job, workdir: epath.Path) -> Checkpoints:
    options = job.config.checkpoint.to_dict()
    return Checkpoints(
        workdir, **options, log_every_steps=job.config.log_every_steps, total_steps=job.schedule.total_steps
    )


def _restore_or_begin(job: Job, checkpoints: Checkpoints) -> tuple[Job, TrainState, int, dict[str, float] | None]:
    """Restores the newest good checkpoint, or begins: (job, state, steps done, record left `unfinished`)."""
    began = time.monotonic()
    restored = checkpoints.restore(
        job.abstract_state, job.shardings, job.config, job.fingerprint, job.data.train.changes
    )
    if restored is None:
        logging.info("Beginning a new run")
        return job, job.init_state(), 0, None
    state, step, meta = restored
    logging.info("Continuing from step %d (restored in %s)", step, readable.duration(time.monotonic() - began))
    return job.continuing(step, meta), state, step, meta.get("unfinished")


def _write_description(job: Job, workdir: epath.Path) -> None:
    """Writes config.json, and overview.txt with the table of parameters."""
    if processes.is_primary():
        path = workdir / "config.json"
        with storage_errors(path):
            workdir.mkdir(parents=True, exist_ok=True)
            set_aside(workdir / SUMMARY_FILE)  # of a run that was shorter
            write_text_atomically(path, config_lib.to_json(job.config) + "\n")
            write_text_atomically(workdir / "overview.txt", job.overview() + "\n")


def _repair_config(job: Job, workdir: epath.Path) -> None:
    """Writes a corrupted config.json again: the restored checkpoint has shown that the run is of this config."""
    path = workdir / "config.json"
    if path.exists():
        with storage_errors(path):
            try:
                json.loads(read_text(path))
            except ValueError:
                write_text_atomically(path, config_lib.to_json(job.config) + "\n")
