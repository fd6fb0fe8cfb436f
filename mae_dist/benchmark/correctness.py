"""Rows of the accelerator's table: what it computes, against plain JAX on the CPU.

Every row yields figures and, as `faults`, those that are beyond their limit.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import mae_dist
from mae_dist import platforms
from mae_dist.benchmark.options import Options, shape_of
from mae_dist.benchmark.turns import Result
from mae_dist.cpu.cores import num_cores
from mae_dist.data import local_rows, to_global
from mae_dist.data.from_config import open_data
from mae_dist.model import attention
from mae_dist.model.build import Params
from mae_dist.model.hooks import PLAIN, Hooks
from mae_dist.parallel.mesh import make_mesh
from mae_dist.tasks.make import make_task
from mae_dist.training import job

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers")
_SMALL_NORM = 1e-3  # arrays whose gradient is below this fraction of the whole are rounding: the biases of keys


def device(options: Options) -> Iterator[Result]:
    """Describes the machine."""
    del options
    first = jax.devices()[0]
    found: Result = {
        "platform": first.platform,
        "device_kind": first.device_kind,
        "num_devices": jax.device_count(),
        "memory_gib": (first.memory_stats() or {}).get("bytes_limit", 0) / 2**30 or None,
        "compute_capability": getattr(first, "compute_capability", None),
        "cores": num_cores(),
        "python": platform.python_version(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    yield found


def _hooks(accelerator: Any) -> Hooks:
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, [accelerator])
    return platforms.make_hooks(mesh)


def _images(config: ConfigDict, count: int) -> np.ndarray:
    shape = (count, *config.model.image_size, config.model.channels)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _compute(
    config: ConfigDict, params: Params, images: np.ndarray, on: Any, hooks: Hooks
) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the mean loss of a pretraining and its gradient, float64 by the name of the array, computed on `on`."""
    task = make_task(config, 0, hooks)

    def mean_loss(params: Params, images: jax.Array) -> jax.Array:
        batch = {"image": images, "label": jnp.zeros(len(images), jnp.int32)}
        return task.loss(params, batch, jax.random.split(jax.random.key(0), len(images)))[0].mean()

    with jax.default_device(on):
        loss, grads = jax.jit(jax.value_and_grad(mean_loss))(*jax.device_put((params, images), on))
    named = jax.tree_util.tree_leaves_with_path(grads)
    return float(loss), {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in named}


def _init(config: ConfigDict) -> Params:
    """Returns initial parameters, made on the CPU, where every bit is the same."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return jax.device_get(jax.jit(make_task(config, 0, PLAIN).init_params)(jax.random.key(0)))


def _errors(
    found: tuple[float, Mapping[str, np.ndarray]], true: tuple[float, Mapping[str, np.ndarray]]
) -> tuple[float, float]:
    """Returns the relative error of a loss, and that of the gradient's worst array, in its norm."""
    norms = {name: float(np.linalg.norm(value)) for name, value in true[1].items()}
    least = _SMALL_NORM * float(np.linalg.norm(list(norms.values())))
    worst = max(
        float(np.linalg.norm(found[1][name] - true[1][name])) / norm for name, norm in norms.items() if norm > least
    )
    return abs(found[0] - true[0]) / abs(true[0]), worst


def _faults(figures: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """Returns a line for every figure that is not below its limit; NaN is below none."""
    return [
        f"{name} {figures[name]:.2g} is not below {limit:.2g}"
        for name, limit in limits.items()
        if not figures[name] <= limit
    ]


def gradients(options: Options) -> Iterator[Result]:
    """Compares loss and gradients of ViT-B/16 with those of plain JAX on the CPU in float32."""
    config = shape_of("b16", options.tiny)
    accelerator, cpu = jax.devices()[0], jax.devices("cpu")[0]
    images, params, hooks = _images(config, 4), _init(config), _hooks(accelerator)
    config.model.dtype = "float32"
    with jax.default_matmul_precision("highest"):
        true = _compute(config, params, images, cpu, PLAIN)
    cases = [
        ("float32", "float32", "highest", accelerator, hooks),
        ("default", "float32", None, accelerator, hooks),  # TF32 of an NVIDIA GPU, bfloat16 of a TPU
        ("bfloat16", "bfloat16", None, accelerator, hooks),
        ("cpu_bfloat16", "bfloat16", None, cpu, PLAIN),
    ]
    if options.platform == "cpu":
        del cases[1]  # the same as float32
    figures: Result = {"loss": true[0]}
    for name, config.model.dtype, precision, on, by in cases:
        with jax.default_matmul_precision(precision):
            errors = _errors(_compute(config, params, images, on, by), true)
        figures[f"{name}_loss_error"], figures[f"{name}_gradient_error"] = errors
        yield figures
    # In bfloat16 as much as a CPU is wrong in it, and twice that.
    rough = 1e-2, max(0.1, 2 * figures["cpu_bfloat16_gradient_error"])
    limits: dict[str, float] = {}
    for name, (loss, gradient) in {"float32": (1e-5, 1e-3), "default": rough, "bfloat16": rough}.items():
        if f"{name}_loss_error" in figures:
            limits |= {f"{name}_loss_error": loss, f"{name}_gradient_error": gradient}
    yield {**figures, "faults": _faults(figures, limits)}


def fused_attention(options: Options) -> Iterator[Result]:
    """Compares fused with plain attention: lengths of the paper's models, both parities, widths of their heads."""
    fused, name = attention.cudnn_attention, "cuDNN"
    if jax.default_backend() != "gpu" or not attention.has_fused_kernel():
        fused, name = _xla_attention, "the same call by XLA, for cuDNN's kernel needs an NVIDIA GPU from Ampere on"
    yield {"kernel": name}
    lengths = [(4, 6), (5, 6)] if options.tiny else [(50, 50), (196, 196), (197, 197), (257, 257), (147, 197)]
    worst = {"fused_error": 0.0, "plain_error": 0.0}
    faults = []
    for width in (32,) if options.tiny else (32, 64, 80):  # of the decoder, of ViT-B and -L, of ViT-H
        for num_q, num_k in lengths:
            shapes = ((2, num_q, 4, width), (2, num_k, 4, width), (2, num_k, 4, width))
            operands = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]
            with jax.default_matmul_precision("highest"):
                true = _attend(attention.attention, [x.astype(jnp.float32) for x in operands])
            errors = {}
            for kind, compute in (("fused_error", fused), ("plain_error", attention.attention)):
                found = _attend(compute, operands)
                errors[kind] = max(
                    float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, true, strict=True)
                )
                worst[kind] = max(worst[kind], errors[kind])
            case = f"{num_q} queries of {num_k}, head width {width}: error"
            faults += _faults({case: errors["fused_error"]}, {case: max(2e-2, 2 * errors["plain_error"])})
        yield {**worst, "faults": faults}
    if name == "cuDNN":
        config = shape_of("b16", options.tiny)
        config.global_batch_size = 8
        config.model.dtype = "bfloat16"
        built = job.build(config, jax.devices()[:1], open_data(config))
        with jax.set_mesh(built.mesh):
            text = built.train_step.lower(built.abstract_state, built.abstract_batch).compile().as_text() or ""
        calls = text.count("__cudnn$fmha")
        yield {"calls_in_a_training_step": calls, "faults": faults + ([] if calls else ["the training step has none"])}


def _xla_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention mixes types
        return attention.fused_attention("xla", q, k, v)


def _attend(compute: Callable[..., jax.Array], operands: Sequence[jax.Array]) -> list[np.ndarray]:
    """Returns the output of an attention and its gradients."""

    def loss(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = compute(*operands)
        return jnp.sin(out.astype(jnp.float32)).sum(), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*operands)
    return [np.asarray(x, np.float64) for x in (out, *grads)]


def remat(options: Options) -> Iterator[Result]:
    """Compares the gradients of every remat and scan with those of neither, in float32 and bfloat16."""
    config = shape_of("b16", options.tiny)
    config.model.update(depth=2, decoder_depth=2)
    accelerator = jax.devices()[0]
    images, params, hooks = _images(config, 4), _init(config), _hooks(accelerator)
    faults = []
    variants = [("dots", False), ("blocks", False), ("none", True), ("dots", True), ("blocks", True)]
    for dtype, limit in [("float32", 1e-3), ("bfloat16", 5e-2)][: 1 if options.tiny else 2]:
        config.model.update(dtype=dtype, remat="none", scan=False)
        with jax.default_matmul_precision("highest"):
            true = _compute(config, params, images, accelerator, hooks)
            for kind, scan in variants[:: 2 if options.tiny else 1]:
                config.model.update(remat=kind, scan=scan)
                error = _errors(_compute(config, params, images, accelerator, hooks), true)
                name = f"{dtype}_{kind}{'_scan' if scan else ''}"
                faults += _faults({name: max(error)}, {name: limit})
                yield {name: max(error), "faults": faults}


def training(options: Options) -> Iterator[Result]:
    """Compares the losses of 20 steps with those on the CPU, and those on all devices with those on one."""
    del options
    config = mae_dist.get_config("smoke")
    config.global_batch_size = 64
    with jax.default_matmul_precision("highest"):
        true = _losses(config, jax.devices("cpu")[:1])
        found = {"one_device": jax.devices()[:1]}
        if jax.device_count() > 1 and config.global_batch_size % jax.device_count() == 0:
            found["all_devices"] = jax.devices()
        figures = {
            f"{name}_loss_error": float(np.max(np.abs(_losses(config, devices) / true - 1)))
            for name, devices in found.items()
        }
    fall = float(true[-1] / true[0])
    faults = _faults({**figures, "last loss / first": fall}, {**dict.fromkeys(figures, 1e-3), "last loss / first": 0.8})
    yield {**figures, "last_by_first_loss": fall, "faults": faults}


def _losses(config: ConfigDict, devices: Sequence[Any]) -> np.ndarray:
    """Returns the loss of every step of a training."""
    built = job.build(config, devices, open_data(config))
    rows = local_rows(built.batch_sharding, config.global_batch_size)
    values = []
    with jax.set_mesh(built.mesh), built.train_batches(built.data.train, 0, rows) as batches:
        state = jax.jit(built.init, out_shardings=built.shardings)(np.uint32(config.seed))
        for batch in batches:
            placed = to_global(batch, built.batch_sharding, config.global_batch_size, rows)
            state, metrics = built.train_step(state, placed)
            values.append(float(metrics["loss"]))
    return np.array(values)
