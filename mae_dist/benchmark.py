"""Measures a config here: `python -m mae_dist.benchmark --config F [--against hf] [--what features] [--scaling]`.

`--what input` measures the training input alone, by turns with a DataLoader of PyTorch if `--against torch`, or once a
minute for `--minutes`.

Repeats of several updates with the real data pipeline; medians, and the spread as (largest - smallest) / median.
`--against hf` takes turns with Hugging Face's ViTMAE of the same shape in PyTorch, eager and compiled, on as many
threads (extra `parity`). `--scaling` measures one change after another, each in a process of its own.
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from mae_dist import cli, errors, hardware, input_speed
from mae_dist.cpu import cores
from mae_dist.cpu.microbatches import choose_products, num_pieces
from mae_dist.cpu.start import use_cores
from mae_dist.data import local_rows, to_global
from mae_dist.data.from_config import open_data
from mae_dist.evaluation.encode import make_feature_step
from mae_dist.model import flops, patches
from mae_dist.training import job
from mae_dist.weights import hugging_face

_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of lines.")
_AGAINST = flags.DEFINE_enum("against", None, ["hf", "torch"], "Take turns with another: torch for --what input.")
_WHAT = flags.DEFINE_enum(
    "what",
    "train",
    ["train", "features", "input"],
    "Updates, features of whole images, or the training input alone.",
    allow_override=True,
)
_SCALING = flags.DEFINE_bool("scaling", False, "A table over batch sizes, image sizes, model sizes and CPU devices.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "How often each is measured.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 0.0, "With --what input: a line each minute, for so long.", lower_bound=0.0)
_SECS = flags.DEFINE_float("secs", 3.0, "About how long a repeat takes.", lower_bound=0.01)

Result = dict[str, Any]


def benchmark(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    del argv
    _check_flags()
    config = cli.needed_config()
    if _SCALING.value:
        return _scaling(config)
    if _WHAT.value == "input":
        return _input(config)
    use_cores(config, "")
    ours = _Ours(config, _WHAT.value)
    others = {}
    if _AGAINST.value:
        others = {
            name: _Theirs(config, _WHAT.value, name == "compiled", ours.job.num_kept) for name in ("eager", "compiled")
        }
    _show(_measure(ours, others))
    return errors.EXIT_DONE


def _check_flags() -> None:
    is_input = _WHAT.value == "input"
    if _AGAINST.value and is_input != (_AGAINST.value == "torch"):
        raise errors.ConfigError(
            f"--against {_AGAINST.value} does not do --what {_WHAT.value}: torch is for input, hf for all else"
        )
    if _MINUTES.value and (not is_input or _AGAINST.value):
        raise errors.ConfigError("--minutes is for --what input without --against; leave it out, or the other")
    if _SCALING.value and is_input:
        raise errors.ConfigError("--scaling is of models, and --what input has none; leave one out")


def _show(result: Result) -> None:
    if _JSON.value:
        print(json.dumps(result), flush=True)
        return
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:{width}}  {value:.4g}" if isinstance(value, float) else f"{name:{width}}  {value}", flush=True)


def _input(config: ConfigDict) -> int:
    """Measures the training input without a model."""
    if _MINUTES.value:
        for line in input_speed.watch(config, _MINUTES.value):
            print(json.dumps(line), flush=True)
        return errors.EXIT_DONE
    against_torch = _AGAINST.value == "torch"
    _show(input_speed.measure(config, against_torch=against_torch, repeats=_REPEATS.value, secs=_SECS.value))
    return errors.EXIT_DONE


def _measure(ours: "_Ours", others: dict[str, "_Theirs"]) -> Result:
    """Takes turns; every figure is the median over the repeats."""
    subjects: dict[str, Any] = {"mae_dist": ours, **{name: other for name, other in others.items() if other.works}}
    counts = {name: max(1, round(_SECS.value / subject.run(2) * 2)) for name, subject in subjects.items()}
    ours.parts.clear()
    rates: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(_REPEATS.value):
        for name, subject in subjects.items():
            rates[name].append(counts[name] * ours.batch_size / subject.run(counts[name]))
    own = rates.pop("mae_dist")
    rate = statistics.median(own)
    peak, source = ours.peak_flops()
    result: Result = {
        "what": ours.what,
        "images_per_sec": rate,
        "spread": (max(own) - min(own)) / rate,
        "repeats": _REPEATS.value,
        "step_secs": ours.batch_size / rate,
        **{f"{part}_share": statistics.median(values) for part, values in ours.parts.items()},
        "mfu": rate * ours.flops_per_image / peak,
        "peak_gflops": peak / 1e9,
        "peak_from": source,
        "compile_secs": ours.compile_secs,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        **ours.choices,
    }
    for name, values in rates.items():
        result[f"hf_{name}_images_per_sec"] = statistics.median(values)
    if rates:
        pairs = [mine / max(theirs) for mine, *theirs in zip(own, *rates.values(), strict=True)]
        result["ratio"] = statistics.median(pairs)
        result["ratio_spread"] = f"{min(pairs):.3g} to {max(pairs):.3g}"
    for name, other in others.items():
        if not other.works:
            result[f"hf_{name}"] = f"does not run here: {other.fault}"
        other.close()
    ours.close()
    return result


class _Ours:
    """A config's updates on its own data, or its encoder on whole images."""

    def __init__(self, config: ConfigDict, what: str):
        self.what = what
        self.job = built = job.build(config, jax.devices(), open_data(config))
        self.batch_size = config.global_batch_size
        self.parts: dict[str, list[float]] = {}
        device = built.mesh.devices.flat[0]
        self.choices = {
            "device_kind": device.device_kind,
            "devices": built.mesh.size,
            "pieces": built.config.cpu.pieces,
            "products": built.config.cpu.products,
        }
        self._rows = local_rows(built.batch_sharding, self.batch_size)
        self._batches = built.train_batches(built.data.train, 0, self._rows)
        with jax.set_mesh(built.mesh):
            self._state: Any = jax.jit(built.init, out_shardings=built.shardings)()
        self.flops_per_image = built.flops_per_image
        self._function = self._make_function()
        began = time.monotonic()
        with jax.set_mesh(built.mesh):
            jax.block_until_ready(self._function(self._place(next(self._batches))))
        self.compile_secs = time.monotonic() - began

    def _make_function(self) -> Callable[[Any], Any]:
        """batch -> something to wait for."""
        built, config = self.job, self.job.config
        if self.what == "train":

            def update(batch: Any) -> Any:
                self._state, metrics = built.train_step(self._state, batch)
                return metrics

            return update
        self.flops_per_image = flops.forward_flops(config)
        self.choices["pieces"] = num_pieces(config, built.mesh, self.batch_size)
        self.choices["products"] = choose_products(config, built.mesh, self.flops_per_image)
        step = make_feature_step(config, built.mesh, built.shardings.params, self.batch_size, ("mean",))
        return lambda batch: step(self._state.params, batch)

    def _place(self, host_batch: Any) -> Any:
        return to_global(host_batch, self.job.batch_sharding, self.batch_size, self._rows)

    def run(self, count: int) -> float:
        """Seconds for `count` batches; notes which shares of them went to waiting for data and to the host."""
        data = host = 0.0
        out = None
        began = time.monotonic()
        with jax.set_mesh(self.job.mesh):
            for _ in range(count):
                start = time.monotonic()
                host_batch = next(self._batches)
                read = time.monotonic()
                out = self._function(self._place(host_batch))
                data, host = data + read - start, host + time.monotonic() - read
            jax.block_until_ready(out)
        total = time.monotonic() - began
        for part, value in (("data_wait", data), ("host", host)):
            self.parts.setdefault(part, []).append(value / total)
        return total

    def peak_flops(self) -> tuple[float, str]:
        """FLOP/s of all devices at most: published, or the best of large matrix products measured now."""
        mesh, dtype = self.job.mesh, self.job.config.model.dtype
        known = hardware.peak_flops(mesh.devices.flat[0].device_kind, dtype)
        if known:
            return known * mesh.size, "published"
        size = 1536
        x = jnp.ones((mesh.size, size, size), dtype)
        x = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names)))
        product = jax.jit(lambda x: jnp.einsum("dij,djk->dik", x, x))
        secs = []
        for _ in range(6):
            began = time.monotonic()
            jax.block_until_ready(product(x))
            secs.append(time.monotonic() - began)
        return 2 * size**3 * mesh.size / min(secs), f"a product of {size}x{size} matrices, measured"

    def close(self) -> None:
        self._batches.close()


class _Theirs:
    """Hugging Face's model in a process of its own, idle until it is its turn."""

    def __init__(self, config: ConfigDict, what: str, compiled: bool, num_kept: int):
        model = config.model
        length = math.prod(patches.grid_size(model.image_size, model.patch_size))
        # Theirs are drawn at random: of as many patches as ours keep, whatever mask says so; it rounds down.
        mask_ratio = max(0.0, 1 - (num_kept + 0.5) / length) if what == "train" else 0.0
        options = {
            "what": what,
            "compiled": compiled,
            "threads": cores.num_cores(),
            "batch_size": config.global_batch_size,
            "image_shape": [model.channels, *model.image_size],
            "config": {
                **hugging_face.describe(model, config.pretrain.norm_pix_loss),
                "mask_ratio": mask_ratio,
            },
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mae_dist.hugging_face", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=cores.given_environment(),
        )
        assert self._process.stdout is not None
        self.works = self._process.stdout.readline().startswith("ready")
        self.fault = ""
        if not self.works:
            _, message = self._process.communicate()
            self.fault = (message.strip().splitlines() or ["it ended"])[-1]

    def run(self, count: int) -> float:
        """Seconds for `count` steps."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def _variations(config: ConfigDict) -> Iterator[tuple[str, list[str]]]:
    """(what is changed, overrides)."""
    model, batch = config.model, config.global_batch_size
    yield "as configured", []
    for factor in (0.25, 4):
        yield f"batch {int(batch * factor)}", [f"--config.global_batch_size={int(batch * factor)}"]
    height, width = model.image_size
    yield f"images {2 * height}x{2 * width}", [f"--config.model.image_size=({2 * height}, {2 * width})"]
    yield f"width {2 * model.embed_dim}", [f"--config.model.embed_dim={2 * model.embed_dim}"]
    yield f"depth {2 * model.depth}", [f"--config.model.depth={2 * model.depth}"]
    for devices in sorted({1, cores.num_cores()}):
        yield f"{devices} CPU devices", [f"--config.cpu.devices={devices}"]
    yield "in one piece", ["--config.cpu.pieces=1"]


def _scaling(config: ConfigDict) -> int:
    """Prints a line for each variation."""
    given = [value for value in sys.argv[1:] if not value.startswith(("--scaling", "--json", "--against"))]
    first = None
    print(f"{'':18} {'images/s':>9} {'relative':>9} {'MFU':>6} {'memory MiB':>11} {'compile s':>10}  devices x pieces")
    for name, overrides in _variations(config):
        command = [sys.executable, "-m", "mae_dist.benchmark", *given, *overrides, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name:18} {(done.stderr.strip().splitlines() or ['failed'])[-1]}", flush=True)
            continue
        r = json.loads(done.stdout.strip().splitlines()[-1])
        first = first or r["images_per_sec"]
        print(
            f"{name:18} {r['images_per_sec']:9.0f} {r['images_per_sec'] / first:9.2f} {r['mfu']:6.2f} "
            f"{r['peak_memory_mib']:11.0f} {r['compile_secs']:10.1f}  {r['devices']} x {r['pieces']}",
            flush=True,
        )
    return errors.EXIT_DONE


if __name__ == "__main__":
    cli.run(benchmark)
