"""The compiled training step as a file: `plan` writes it (`--save`), and a run loads it where `compiled_step` names it.

The first line is a manifest in JSON, the rest is what JAX has serialized. A run traces and lowers its own step, which
takes seconds, and loads the file only if that is the same program for the same devices, compiled by the same versions.

The file is code. JAX unpickles it and calls the machine code in it, so whoever can write it can do anything that the
run may do. No checksum inside it changes that: it must come from the user.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import time
from typing import Any

import jax
import jaxlib.version
from absl import logging
from etils import epath
from jax.experimental import serialize_executable

from mae_dist import __version__, readable, storage
from mae_dist import config as config_lib
from mae_dist.cpu import cores
from mae_dist.errors import ConfigError, UserError
from mae_dist.parallel import processes
from mae_dist.training.job import Job

# What must be equal between plan and run, in the order in which differences are named.
_NAMES = {
    "jax": "jax version",
    "jaxlib": "jaxlib version",
    "backend": "compiler",
    "device_kind": "kind of devices",
    "mesh": "mesh",
    "processes": "number of processes",
    "devices": "",
    "cpu": "",
    "flags": "XLA_FLAGS and LIBTPU_INIT_ARGS",
    "compiler_options": "list of compiler options",
    "program": "",
}
_WITHOUT_VALUES = {  # digests, whose values say nothing
    "devices": "its devices have other numbers or lie elsewhere in the mesh",
    "cpu": "it was compiled on a CPU with other instruction sets",
    "program": "it is another program",
}
# Fields that the step's program does not depend on.
_OF_NO_PROGRAM = ("name", "compiled_step", "cpu.devices", "checkpoint", "deadlines", "eval", "online", "pictures")
_loads = itertools.count()


class _Unusable(Exception):
    """A file that this run does not load, and why."""


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A training step that was compiled for the devices of its job, and the seconds that this took."""

    job: Job
    lowered: jax.stages.Lowered
    compiled: jax.stages.Compiled
    secs: float


def check_exists(config: Any) -> None:
    """Raises a `ConfigError` if `config.compiled_step` names a file that does not exist."""
    name = config.compiled_step
    if not name:
        return
    path = storage.absolute(name)
    with storage.storage_errors(path):
        found = path.exists() and not path.is_dir()
    if not found:
        raise ConfigError(
            f"compiled_step={name}: there is no such file; write it by python -m mae_dist.plan with this config, "
            "--topology and --save, or set compiled_step='' to compile the step here"
        )


def write(path: epath.Path, step: Compilation) -> int:
    """Writes a compiled step, which on a disk only its owner may read; returns the bytes of the file.

    The step must be compiled in this process: one that JAX took from its compilation cache lacks functions when it is
    serialized again, and fails when it is called (jaxlib 0.10.2 on a CPU).

    Raises:
      ConfigError: JAX cannot serialize this program.
      StorageFault: the file cannot be written.
    """
    try:
        # The trees are left out: they are those of the step that the run lowers.
        program, _, _ = serialize_executable.serialize(step.compiled)
    except Exception as error:  # of JAX, XLA and C++ alike
        raise ConfigError(
            f"{path} is not written: JAX cannot serialize this program ({_line(error)}). If its matmuls are oneDNN's, "
            "plan and train with --config.cpu.products=xla; otherwise leave out --save"
        ) from error
    manifest = {
        "sha256": hashlib.sha256(program).hexdigest(),
        "compile_secs": round(step.secs, 3),
        "mae_dist": __version__,
        "needs": _needs(step.job, step.lowered),
        "config": step.job.config.to_dict(),
    }
    content = json.dumps(manifest).encode() + b"\n" + program
    with storage.storage_errors(path):
        storage.write_bytes_atomically(path, content)
        if storage.is_local(path):
            os.chmod(path, 0o600)
    return len(content)


def load(job: Job, lowered: jax.stages.Lowered) -> jax.stages.Compiled | None:
    """Loads the step that `job.config.compiled_step` names, or returns None after a line of log that says why not.

    All processes of a run load their file or none does: programs that two of them have compiled apart need not agree
    on how to exchange.

    Args:
      job: the run.
      lowered: its training step, for the devices of `job.mesh`.
    """
    name = job.config.compiled_step
    if not name:
        return None
    began = time.monotonic()
    compiled, manifest, reason = None, {}, ""
    try:
        manifest, program = _read(storage.absolute(name))
        _check(manifest, job, lowered)
        compiled = _deserialize(program, job, lowered)
    except (_Unusable, UserError) as error:
        reason = str(error)
    reason = _of_all_processes(reason, job.config.deadlines.start_secs or 86400.0)
    shown = readable.path(storage.absolute_name(name))
    if not reason:
        logging.info(
            "Loaded the compiled step from %s in %s; compiling it took %s",
            *(shown, readable.duration(time.monotonic() - began), readable.duration(manifest["compile_secs"])),
        )
        return compiled
    if processes.is_primary():
        logging.warning("%s is not used, and the step is compiled here: %s", shown, reason)
    return None


def _read(path: epath.Path) -> tuple[dict[str, Any], bytes]:
    """Returns the manifest and the program of a file that is as it was written."""
    with storage.storage_errors(path), path.open("rb") as file:
        if storage.is_local(path):
            found = os.fstat(file.fileno())
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise _Unusable("it is code, and belongs to others or is open to them; write it anew by plan --save")
        head, _, program = file.read().partition(b"\n")
    try:
        manifest = json.loads(head)
        digest, _, _, _ = (manifest[name] for name in ("sha256", "compile_secs", "needs", "config"))
    except (ValueError, KeyError, TypeError) as error:
        raise _Unusable("it is not a file of plan --save, or it is corrupted") from error
    if hashlib.sha256(program).hexdigest() != digest:
        raise _Unusable("it is truncated or corrupted: its SHA-256 is not that of its manifest")
    return manifest, program


def _needs(job: Job, lowered: jax.stages.Lowered) -> dict[str, Any]:
    """Returns what a compiled step depends on, as JSON has it."""
    devices = list(job.mesh.devices.flat)
    places = [(each.id, getattr(each, "coords", None), getattr(each, "slice_index", None)) for each in devices]
    given = " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")).split()
    values = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "backend": " ".join(devices[0].client.platform_version.split()),
        "device_kind": devices[0].device_kind,
        "mesh": dict(job.mesh.shape),
        "processes": len({each.process_index for each in devices}),
        "devices": _digest(json.dumps(places)),
        "cpu": _digest(cores.instruction_sets()) if devices[0].platform == "cpu" else "",
        "flags": sorted(flag for flag in given if cores.NUM_DEVICES_FLAG not in flag),
        "compiler_options": job.train_step.compiler_options,
        "program": _digest(lowered.as_text()),  # has no locations in the source
    }
    assert values.keys() == _NAMES.keys()
    return json.loads(json.dumps(values))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check(manifest: dict[str, Any], job: Job, lowered: jax.stages.Lowered) -> None:
    """Raises `_Unusable` with the first difference between what a file needs and this run."""
    needs, found = manifest["needs"], _needs(job, lowered)
    for key, name in _NAMES.items():
        if needs.get(key) == found[key]:
            continue
        if name:
            raise _Unusable(f"its {name} is {needs.get(key)!r}, and here it is {found[key]!r}")
        changed = []
        if key == "program":
            changed = config_lib.differences(manifest["config"], job.config.to_dict(), _OF_NO_PROGRAM)
        # Without a changed field the code has changed, or what the data has told: classes, mean and deviation.
        why = f" ({', '.join(changed[:3])})" if changed else ""
        raise _Unusable(f"{_WITHOUT_VALUES[key]}{why}; write it anew by plan --save")


def _deserialize(program: bytes, job: Job, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    devices = list(job.mesh.devices.flat)
    in_tree = jax.tree.structure(lowered.args_info)
    try:
        return serialize_executable.deserialize_and_load(
            program, in_tree, lowered.out_tree, backend=devices[0].client, execution_devices=devices
        )
    except Exception as error:  # of pickle, JAX, XLA and C++ alike
        raise _Unusable(f"JAX cannot load it: {_line(error)}") from error


def _line(error: Exception) -> str:
    """Returns the type and the first line of an exception."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _of_all_processes(reason: str, secs: float) -> str:
    """Returns in every process the reason of the first process that has one, "" if none has."""
    key = f"compiled_step/{next(_loads)}"  # each process asks equally often
    reasons = processes.send_to_first(f"{key}/each", reason, secs)

    def first() -> str:
        assert reasons is not None
        texts = [text if index == 0 else f"process {index}: {text}" for index, text in enumerate(reasons) if text]
        return texts[0] if texts else ""

    return processes.from_first(f"{key}/all", first, secs)
