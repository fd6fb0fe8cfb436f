"""The speed of a config's training steps or features, by turns with Hugging Face's model in PyTorch."""

import contextlib
import math
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mae_dist import hardware, platforms
from mae_dist.benchmark.turns import Child, Result, Subject, comparator, compare
from mae_dist.cpu import cores
from mae_dist.cpu.microbatches import num_pieces
from mae_dist.data import local_rows, to_global
from mae_dist.data.batches import HostBatch
from mae_dist.data.from_config import open_data, train_batches
from mae_dist.errors import ConfigError, DataFault
from mae_dist.evaluation.encode import make_feature_step
from mae_dist.model import flops, patches
from mae_dist.training import job
from mae_dist.weights import hugging_face


def measure(
    config: ConfigDict, what: str, *, against_hf: bool, repeats: int, secs: float, reads: bool = True
) -> Result:
    """Returns the figures of `what`, "train" or "features", by turns of about `secs` seconds.

    `reads` is as for `Ours`. Hugging Face's model runs on one GPU or on the CPU, and ours then too.
    """
    if against_hf and what == "train" and config.model.decoder != "full":
        raise ConfigError(
            f"--against hf: ViTMAE has no decoder like model.decoder={config.model.decoder!r}; compare with "
            "--config.model.decoder=full, or by --what features"
        )
    program = comparator("hugging_face") if against_hf else ""
    if against_hf and jax.default_backend() not in ("cpu", "gpu"):
        raise ConfigError(f"--against hf: PyTorch does not run on {jax.devices()[0].device_kind}; measure without it")
    with contextlib.ExitStack() as stack:
        one_gpu = against_hf and jax.default_backend() == "gpu"
        ours = Ours(config, what, jax.devices()[:1] if one_gpu else jax.devices(), reads=reads)
        stack.callback(ours.close)
        subjects: dict[str, Subject] = {"mae_dist": ours}
        faults = {}
        for name in ("hf_eager", "hf_compiled") if against_hf else ():
            options = _hf_options(config, what, name == "hf_compiled", ours.job.num_kept)
            try:
                subjects[name] = stack.enter_context(contextlib.closing(Child(name, (program,), options)))
            except DataFault as fault:
                faults[name] = f"does not run here: {fault}"
        summary = compare(subjects, ours.batch_size, repeats, secs)
    rate = summary["images_per_sec"]
    peak, source = ours.peak_flops()
    return {
        "what": what,
        **summary,
        "step_secs": ours.batch_size / rate,
        **{f"{part}_share": statistics.median(values[-repeats:]) for part, values in ours.parts.items()},
        "mfu": rate * ours.flops_per_image / peak,
        "peak_gflops": peak / 1e9,
        "peak_from": source,
        "compile_secs": ours.compile_secs,
        "peak_memory_mib": ours.peak_bytes() / 2**20,
        **ours.choices,
        **faults,
    }


def _hf_options(config: ConfigDict, what: str, compiled: bool, num_kept: int) -> Result:
    model, on_gpu = config.model, jax.default_backend() == "gpu"
    length = math.prod(patches.grid_size(model.image_size, model.patch_size))
    # Its masks are random: it keeps as many patches as ours do, whatever mask says so; it rounds down.
    mask_ratio = max(0.0, 1 - (num_kept + 0.5) / length) if what == "train" else 0.0
    return {
        "what": what,
        "compiled": compiled,
        "device": "cuda" if on_gpu else "cpu",
        "bfloat16": on_gpu and model.dtype == "bfloat16",
        "threads": cores.num_cores(),
        "batch_size": config.global_batch_size,
        "image_shape": [model.channels, *model.image_size],
        "config": {**hugging_face.describe(config, has_decoder=True), "mask_ratio": mask_ratio},
    }


class Ours:
    """Runs a config's training steps on its own data, or its encoder on whole images, on `devices`.

    Without `reads` one batch of random images, which lies on the devices, stands for all data.
    """

    def __init__(self, config: ConfigDict, what: str, devices: Sequence[Any], *, reads: bool = True):
        self.job = built = job.build(config, devices, open_data(config))
        self.batch_size = config.global_batch_size
        self.parts: dict[str, list[float]] = {}
        device = built.mesh.devices.flat[0]
        self.choices = {
            "device_kind": device.device_kind,
            "devices": built.mesh.size,
            "pieces": built.config.cpu.pieces,
            "products": built.config.cpu.products,
        }
        self.flops_per_image = built.flops_per_image
        self._feature_step = None
        if what == "features":
            self.flops_per_image = flops.forward_flops(config)
            self.choices["pieces"] = num_pieces(config, built.mesh, self.batch_size)
            self.choices["products"] = platforms.choose_matmul(config, built.mesh, self.flops_per_image)
            params = built.eval_shardings
            self._feature_step = make_feature_step(config, built.mesh, params, self.batch_size, ("mean",))
        self._rows = local_rows(built.batch_sharding, self.batch_size)
        # More than a training takes: a short one would end within a turn.
        self._batches = None
        if reads:
            self._batches = train_batches(
                built.config, built.data.train, start_step=0, total_steps=1 << 40, rows=self._rows
            )
        with jax.set_mesh(built.mesh):
            self._fixed = {} if reads else _random_batch(built)
            self._state: Any = jax.jit(built.init, out_shardings=built.shardings)(np.uint32(config.seed))
            if self._feature_step is not None:
                self._state = self._state.replace(params=built.gather(self._state.params))
            began = time.monotonic()
            jax.block_until_ready(self._compute(self._read()))
            self.compile_secs = time.monotonic() - began

    def _read(self) -> HostBatch:
        """Returns the next batch on the host, {} where one that lies on the devices stands for all."""
        return next(self._batches) if self._batches else {}

    def _compute(self, host_batch: HostBatch) -> PyTree:
        """Returns metrics of a training step, or features, which can be waited for."""
        batch = self._fixed or to_global(host_batch, self.job.batch_sharding, self.batch_size, self._rows)
        if self._feature_step is not None:
            return self._feature_step(self._state.params, batch)
        self._state, metrics = self.job.train_step(self._state, batch)
        return metrics

    def run(self, count: int) -> float:
        """Returns the seconds that `count` batches take; notes the fractions spent waiting for data and on the host."""
        data = host = 0.0
        out = None
        began = time.monotonic()
        with jax.set_mesh(self.job.mesh):
            for _ in range(count):
                start = time.monotonic()
                host_batch = self._read()
                read = time.monotonic()
                out = self._compute(host_batch)
                data, host = data + read - start, host + time.monotonic() - read
            jax.block_until_ready(out)
        total = time.monotonic() - began
        for part, value in (("data_wait", data), ("host", host)):
            self.parts.setdefault(part, []).append(value / total)
        return total

    def peak_flops(self) -> tuple[float, str]:
        """Returns the peak FLOP/s of all devices and its source: published, or the best of large matmuls now."""
        mesh, dtype = self.job.mesh, self.job.config.model.dtype
        known = hardware.peak_flops(mesh.devices.flat[0].device_kind, dtype)
        if known:
            return known * mesh.size, "published"
        size = 1536
        x = jnp.ones((mesh.size, size, size), dtype)
        x = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names)))
        matmul = jax.jit(lambda x: jnp.einsum("dij,djk->dik", x, x))
        secs = []
        for _ in range(6):
            began = time.monotonic()
            jax.block_until_ready(matmul(x))
            secs.append(time.monotonic() - began)
        return 2 * size**3 * mesh.size / min(secs), f"a matmul of {size}x{size} matrices, measured"

    def peak_bytes(self) -> float:
        """Returns the most memory that one device has used; of a CPU, that this process has used."""
        used = (self.job.mesh.devices.flat[0].memory_stats() or {}).get("peak_bytes_in_use")
        return used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10

    def close(self) -> None:
        if self._batches:
            self._batches.close()


def _random_batch(built: job.Job) -> dict[str, jax.Array]:
    """Returns random pixels in the shapes of a training batch, made on the devices."""

    def make() -> dict[str, jax.Array]:
        images = built.abstract_batch["image"]
        pixels = jax.random.randint(jax.random.key(0), images.shape, 0, 256, jnp.int32).astype(images.dtype)
        return {"image": pixels, "label": jnp.zeros(images.shape[0], jnp.int32)}

    return jax.jit(make, out_shardings=built.batch_sharding)()
