"""CLU's metric writers without TensorFlow, and the TensorBoard writer that CLU needs it for.

CLU imports TensorFlow for one class, its own TensorBoard writer. A placeholder replaces that module before anything is
imported, even where TensorFlow is installed: importing it costs seconds at every start. So do PyTorch and the cloud
clients, which tensorboardX imports if it can: it gets no tensors, and `epath` writes to buckets.

    from mae_dist.metrics.tensorboard import metric_writers
"""

import os
import sys
import time
import types
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from etils import epath

_hidden = [name for name in ("torch", "google.cloud.storage", "boto3") if name not in sys.modules]
for _name in _hidden:
    sys.modules[_name] = None  # pyright: ignore[reportArgumentType] (None: importing it raises ImportError)

from tensorboardX import record_writer  # noqa: E402
from tensorboardX import summary as tb_summary  # noqa: E402
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import (  # noqa: E402 (protobuf makes these names when it is imported)
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)

for _name in _hidden:
    del sys.modules[_name]


def _no_summary_writer(*args: object, **kwargs: object) -> NoReturn:
    raise NotImplementedError(
        "clu.metric_writers.SummaryWriter needs TensorFlow, which mae_dist does not load: "
        "use mae_dist.metrics.tensorboard.TensorBoardWriter."
    )


if "clu.metric_writers" not in sys.modules:
    _placeholder = types.ModuleType("clu.metric_writers.summary_writer")
    vars(_placeholder)["SummaryWriter"] = _no_summary_writer
    sys.modules["clu.metric_writers.summary_writer"] = _placeholder

from clu import metric_writers  # noqa: E402 (after the placeholder)

__all__ = ["TensorBoardWriter", "metric_writers"]

_FLUSH_SECS = 10.0


class _ObjectFile:
    """Keeps tensorboardX's events of a bucket's object, which cannot be appended to: each flush replaces it."""

    def __init__(self, path: str):
        self._path = epath.Path(path)
        self._content, self._written = bytearray(), 0

    def write(self, data: bytes) -> None:
        self._content += data

    def flush(self) -> None:
        if len(self._content) > self._written:
            self._path.write_bytes(bytes(self._content))
            self._written = len(self._content)

    def close(self) -> None:
        self.flush()


record_writer.register_writer_factory("gs", types.SimpleNamespace(open=_ObjectFile))


class TensorBoardWriter(metric_writers.MetricWriter):
    """Writes scalars and images as TensorBoard events, without TensorFlow, in the caller's thread.

    tensorboardX's SummaryWriter writes in a thread of its own, and hangs once that has died of a full disk.

    Args:
      logdir: directory of the event files, made if it does not exist; a new file is begun.
      purge_step: TensorBoard discards this step and later ones of earlier event files.
    """

    def __init__(self, logdir: epath.Path, *, purge_step: int):
        # tensorboardX's names have only seconds in them: two runs begun in the same second would share a file.
        suffix = f".{os.getpid()}.{time.time_ns()}"
        logdir.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(os.path.join(os.fspath(logdir), "events"), suffix)
        self._next_flush = 0.0
        self._write(purge_step, Event(session_log=SessionLog(status=SessionLog.START)))

    def _write(self, step: int, event: Event) -> None:
        event.step, event.wall_time = step, time.time()
        self._events.write_event(event)
        if time.monotonic() >= self._next_flush:
            self.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            self._write(step, Event(summary=tb_summary.scalar(name, np.asarray(value, np.float64))))

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes uint8 images (N, H, W, C) of 1, 3 or 4 channels."""
        for name, batch in images.items():
            for i, image in enumerate(batch):
                tag = name if len(batch) == 1 else f"{name}/{i}"
                self._write(step, Event(summary=tb_summary.image(tag, image, dataformats="HWC")))

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError("TensorBoardWriter writes scalars and images only.")

    write_texts = write_hparams = write_summaries = write_videos = write_audios = write_histograms = _refuse

    def flush(self) -> None:
        self._events.flush()
        self._next_flush = time.monotonic() + _FLUSH_SECS

    def close(self) -> None:
        self._events.close()
