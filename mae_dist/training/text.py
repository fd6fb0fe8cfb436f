"""What a person reads when a training starts and when it is done."""

import os
import shlex
import shutil
import sys

import jax
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import console, readable
from mae_dist.config import named
from mae_dist.errors import UserError
from mae_dist.parallel.overview import count_parameters, describe_mesh
from mae_dist.parallel.shardings import bytes_per_device
from mae_dist.task_kinds import kind_of
from mae_dist.training.job import Job
from mae_dist.training.summary import Result
from mae_dist.weights.compatible import check_fits


def start_lines(job: Job, *, verbose: bool) -> list[str]:
    """Returns lines about devices, data, model and schedule; with `verbose` the table of parameters too."""
    config, data = job.config, job.data
    device, num_processes = job.mesh.devices.flat[0], jax.process_count()
    processes = f" in {num_processes} processes" if num_processes > 1 else ""
    splits = [("train", data.train), ("val", data.val), ("test", data.test)]
    counts = ", ".join(f"{readable.count(split.num_examples)} {name}" for name, split in splits if split is not None)
    size = "x".join(map(str, (*config.model.image_size, config.model.channels)))
    classes = f"{data.train.num_classes} classes" if data.train.num_classes > 1 else "no labels"
    state, shardings = job.abstract_state, job.shardings
    in_memory = bytes_per_device(state.params, shardings.params), bytes_per_device(state.opt_state, shardings.opt_state)
    steps = readable.count(job.schedule.total_steps)
    epochs = job.schedule.total_steps * config.global_batch_size / data.train.num_examples
    return [
        f"  devices:  {job.mesh.size} x {device.device_kind}{processes}, mesh {describe_mesh(job.mesh)}",
        f"  data:     {_name_of_data(config)}, {counts} images of {size}, {classes}",
        f"  model:    {readable.count(count_parameters(state.params))} parameters; on each device "
        f"{readable.num_bytes(in_memory[0])}, optimizer {readable.num_bytes(in_memory[1])}",
        f"  schedule: {steps} steps of {readable.count(config.global_batch_size)} images, {epochs:,.4g} epochs",
        *(_table(job) if verbose else ()),
    ]


def _table(job: Job) -> list[str]:
    """Returns the table of parameters, or where it is if the terminal is too narrow for it."""
    table, columns = job.overview(), console.width(sys.stderr)
    needed = max(map(len, table.split("\n")))
    if columns is None or needed <= columns:
        return [table]
    return [
        f"The table of parameters has {needed} columns and this terminal {columns}: see overview.txt in the workdir"
    ]


def _name_of_data(config: ConfigDict) -> str:
    has_name = config.data.source in ("tfds", "synthetic", "digits")
    return config.data.name if has_name else readable.path(config.data.data_dir or config.data.source)


def result_text(config: ConfigDict, result: Result, workdir: str, width: int | None) -> str:
    """Returns the result of a finished run, and the commands that a person may want next.

    Args:
      config: of the run.
      result: its end.
      workdir: its directory.
      width: columns of the terminal, None for the result in one line.
    """
    steps = readable.count(result.step)
    accuracies = ("top1", "knn_top1", "ridge_top1")
    shown = ["loss", *(_last(result, name) for name in ("loss", *accuracies))]
    parts = [f"step {steps} of {steps}"]
    parts += [f"{name} {readable.number(result.metrics[name])}" for name in shown if name in result.metrics]
    rate = result.metrics.get("images_per_sec", float("nan"))
    if rate == rate:  # not NaN: of a first step alone, which is not timed
        parts.append(f"{readable.number(rate)} images/s")
    line = readable.wrapped([f"{config.name}: {parts[0]}", *parts[1:]], ", ", width)
    commands = ["  " + readable.command(words, width) for words in next_commands(config, workdir)]
    return "\n".join((line, "next:", *commands))


def _last(result: Result, name: str) -> str:
    """Returns the name of a metric of the test split, or where there is none of the validation split."""
    return f"test_{name}" if f"test_{name}" in result.metrics else f"val_{name}"


def next_commands(config: ConfigDict, workdir: str) -> list[list[str]]:
    """Returns the words of the commands that show what a finished run has learned, and use it."""
    python, place = _python(), shlex.quote(readable.path(workdir))
    origin = config.init_from if os.path.isfile(os.path.join(config.init_from, "config.json")) else ""
    report = [python, "-m", "mae_dist.report", *([shlex.quote(readable.path(origin))] if origin else []), place]
    report += ["--out", "report.html"]
    if not kind_of(config).has_decoder:
        out = ["--images", "DIRECTORY", "--out", "classes.csv"]
        return [[python, "-m", "mae_dist.predict", "--workdir", place, *out], report]
    reconstruct = [python, "-m", "mae_dist.reconstruct", "--workdir", place]
    train = [[python, "-m", "mae_dist.main", *arguments] for arguments in _classifier(config, workdir)]
    return [reconstruct, *train, report]


def _python() -> str:
    """Returns the Python of this process, as it is called in the shell."""
    found = shutil.which("python")
    return "python" if found == sys.executable or not sys.executable else shlex.quote(readable.path(sys.executable))


def _classifier(config: ConfigDict, workdir: str) -> list[list[str]]:
    """Returns the arguments of the training that measures a pretrained encoder, if a config for it comes with us."""
    for suffix in ("probe", "linear", "finetune"):
        name = f"{config.name}_{suffix}"
        if name not in named.names() or (config.data.source == "folder" and config.data.labels == "none"):
            continue
        chosen = named.get_config(name)
        try:
            check_fits(config, chosen, ["encoder"])
        except UserError:  # the run's own model, for which such a config must be written
            continue
        fields = ("source", "name", "data_dir", "labels")
        needed = {"init_from": readable.path(workdir)} | {f"data.{field}": config.data[field] for field in fields}
        changed = [
            shlex.quote(f"--config.{field}={value}")
            for field, value in needed.items()
            if config_lib.get(chosen, field) != value
        ]
        return [["--config", name, *changed]]
    return []
