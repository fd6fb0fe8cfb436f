"""Steps or features of a config, by turns with Hugging Face's in PyTorch."""

import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_dist import hardware, platforms
from mae_dist.cpu import cores
from mae_dist.cpu.microbatches import num_pieces
from mae_dist.data import local_rows, to_global
from mae_dist.data.from_config import open_data
from mae_dist.evaluation.encode import make_feature_step
from mae_dist.model import flops, patches
from mae_dist.training import job
from mae_dist.weights import hugging_face

Result = dict[str, Any]


def measure(ours: "Ours", others: dict[str, "Theirs"], *, repeats: int, secs: float) -> Result:
    """Takes turns; every figure is the median over the repeats."""
    subjects: dict[str, Any] = {"mae_dist": ours, **{name: other for name, other in others.items() if other.works}}
    counts = {name: max(1, round(secs / subject.run(2) * 2)) for name, subject in subjects.items()}
    ours.parts.clear()
    rates: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(repeats):
        for name, subject in subjects.items():
            rates[name].append(counts[name] * ours.batch_size / subject.run(counts[name]))
    own = rates.pop("mae_dist")
    rate = statistics.median(own)
    peak, source = ours.peak_flops()
    result: Result = {
        "what": ours.what,
        "images_per_sec": rate,
        "spread": (max(own) - min(own)) / rate,
        "repeats": repeats,
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


class Ours:
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
            self._state: Any = jax.jit(built.init, out_shardings=built.shardings)(np.uint32(config.seed))
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
        self.choices["products"] = platforms.choose_matmul(config, built.mesh, self.flops_per_image)
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


class Theirs:
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
            [sys.executable, "-m", "mae_dist.benchmark.hugging_face", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
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
