"""Compiles a run's update in a thread, beside what else a start does."""

import threading

import jax

from mae_dist.parallel import shardings
from mae_dist.training.job import Job
from mae_dist.training.train_step import TrainStep


class Compilation:
    """The update of a job, being compiled since this was made.

    Tracing is done when the constructor returns: it would only take turns with that of what creates the state. The
    thread is a daemon: a run that ends early does not wait for the compiler.
    """

    def __init__(self, job: Job):
        self._step = job.train_step
        self._compiled: TrainStep | None = None
        self._error: Exception | None = None
        lowered = self._step.lower(shardings.with_shardings(job.abstract_state, job.shardings), job.abstract_batch)
        self._thread = threading.Thread(target=self._compile, args=(lowered,), daemon=True)
        self._thread.start()

    def _compile(self, lowered: jax.stages.Lowered) -> None:
        try:
            self._compiled = self._step.compiled(lowered)
        except Exception as error:  # raised where the result is asked for
            self._error = error

    def result(self) -> TrainStep:
        """Returns the update by its executable, when that is done; raises what the compiler raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._compiled is not None
        return self._compiled
