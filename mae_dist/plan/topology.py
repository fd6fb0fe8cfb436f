"""Devices that are not here, as descriptions, and the compilation of a step for them.

The TPU's compiler comes with libtpu (extra `tpu`) and needs no TPU.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from jaxtyping import PyTree

from mae_dist.cpu.cores import NUM_DEVICES_FLAG
from mae_dist.errors import ConfigError
from mae_dist.hardware import CHIPS, Chip
from mae_dist.training.train_step import TrainStep

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices with a name: `v5e:4x4` is a TPU slice of 16 chips, `cpu:8` eight devices of this machine's CPU.

    A chip of tpu7x is two devices, which plans count as chips.
    """

    name: str
    generation: str
    shape: tuple[int, ...]  # of one slice, in chips
    num_slices: int
    devices: tuple[Any, ...]

    @property
    def chips_per_slice(self) -> int:
        return len(self.devices) // self.num_slices

    @property
    def chip(self) -> Chip | None:
        """Returns the published figures of one chip, if there are any."""
        return CHIPS.get(self.generation)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step: its text, and bytes on one chip. `refusal` is the compiler's reason if it refuses.

    arguments: state and batch. outputs: beyond the arguments' memory, which the new state takes over. temporaries:
    activations, gradients and whatever else lives during the step; the arguments too, where a refusal gives one sum and
    so `arguments` is 0. program: the code itself. limit: the most that the compiler may use; 0 if it did not say.
    stages: the step itself, None if the compiler refuses it. secs: that the compiler took.
    """

    text: str
    arguments: int
    outputs: int
    temporaries: int
    program: int
    limit: int = 0
    refusal: str = ""
    stages: tuple[jax.stages.Lowered, jax.stages.Compiled] | None = None
    secs: float = 0.0


def use_no_accelerator() -> None:
    """Keeps JAX and libtpu from looking for hardware and from warning that there is none; call before either starts."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_MIN_LOG_LEVEL="3",
        TPU_STDERR_LOG_LEVEL="3",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-4",  # any will do: the topology is given by name
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # there is no chip that two processes could dispute
    )
    jax.config.update("jax_platforms", "cpu")


def describe(name: str, num_slices: int) -> Topology:
    """Returns the devices of a topology; TPUs need the extra `tpu`, and no TPU."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    known = ", ".join((*CHIPS, "cpu"))
    if not found or found[1] not in (*CHIPS, "cpu") or "0" in re.findall(r"\d+", found[2]):
        raise ConfigError(f"--topology={name}: write generation:shape, as v5e:4x4 or cpu:8; generations: {known}")
    generation = found[1]
    shape: tuple[int, ...] = tuple(int(size) for size in found[2].split("x"))
    if num_slices < 1 or (generation == "cpu" and (num_slices > 1 or len(shape) > 1)):
        raise ConfigError(f"--topology={name} --num_slices={num_slices}: only TPUs have slices, from 1; a CPU is cpu:N")
    devices = _cpu_devices(math.prod(shape)) if generation == "cpu" else _tpu_devices(name, shape, num_slices)
    return Topology(name, generation, shape, num_slices, tuple(devices))


def _cpu_devices(count: int) -> Sequence[Any]:
    if NUM_DEVICES_FLAG not in os.environ.get("XLA_FLAGS", ""):  # read when JAX makes its CPU client
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{NUM_DEVICES_FLAG}={count}".strip()
    devices = jax.devices("cpu")
    if count > len(devices):
        raise ConfigError(
            f"--topology=cpu:{count} and JAX has {len(devices)} CPU devices here, set by XLA_FLAGS: unset it, or plan "
            f"cpu:{len(devices)}"
        )
    return devices[:count]


def _tpu_devices(name: str, shape: tuple[int, ...], num_slices: int) -> Sequence[Any]:
    generation = name.split(":")[0]
    chip, count = CHIPS[generation], math.prod(shape)
    if len(shape) != chip.sides:
        like = "x".join(["4"] * chip.sides)
        raise ConfigError(f"--topology={name}: a slice of {generation} has {chip.sides} sides, as {generation}:{like}")
    if count > chip.max_chips:
        smaller = sorted(shape)
        while math.prod(smaller) > chip.max_chips:
            smaller = sorted([*smaller[:-1], smaller[-1] // 2])
        slices = math.ceil(count / math.prod(smaller)) * num_slices
        raise ConfigError(
            f"--topology={name}: {count} chips, and a slice of {generation} has at most {chip.max_chips}; plan several "
            f"smaller ones: --topology={generation}:{'x'.join(map(str, smaller))} --num_slices={slices}"
        )
    if find_spec("libtpu") is None:
        raise ConfigError(f"--topology={name} needs the TPU's compiler, no TPU: pip install -e .[tpu]")
    # On v4 a device is one of two cores unless told otherwise; on tpu7x it always is, and everywhere else it is a chip.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if count == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # a host has four by default
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=num_slices, **options
        ).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(
            f"--topology={name} --num_slices={num_slices}: libtpu knows no such slice: {said}; which there are: "
            f"https://cloud.google.com/tpu/docs/{generation}"
        ) from error


def compile_step(step: jax.stages.Wrapped | TrainStep, mesh: Mesh, *args: PyTree) -> Compiled:
    """Compiles `step`, which is jitted or a `TrainStep`, for the devices of `mesh` and these shapes; nothing runs."""
    with jax.set_mesh(mesh):
        lowered = step.lower(*args)
        started = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _refused(str(error))
    secs = time.monotonic() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None  # what the backends say that have no such figures
    assert text is not None
    return Compiled(
        text=text,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        program=memory.generated_code_size_in_bytes,
        stages=(lowered, compiled),
        secs=secs,
    )


def _refused(message: str) -> Compiled:
    """Parses the compiler's figures of a program that does not fit, where it gives them.

    It says either "the total memory required for HLO temporaries (24.52G) exceeds available HBM (15.75G)", which is
    with the arguments whatever it says (of 10 GiB of state and 6 of temporaries it says 16), or "Used 20.5G of 15.75G
    hbm", with a line "arguments 3.67G" among others.
    """

    def size(pattern: str) -> int:
        found = re.search(pattern + r"\s*\(?([\d.]+)([KMGT]?)", message)
        return int(float(found[1]) * _UNITS[found[2]]) if found else 0

    temporaries, limit = size("HLO temporaries"), size("available HBM")
    used, arguments = size(r"\bUsed"), size(r"\barguments")
    if not temporaries:
        temporaries, limit = max(0, used - arguments), size(r"\bUsed [\d.]+[KMGT]? of")
    first = next((line for line in message.splitlines() if "RESOURCE_EXHAUSTED" in line), message)
    return Compiled("", arguments, 0, temporaries, 0, limit, refusal=first.strip())
