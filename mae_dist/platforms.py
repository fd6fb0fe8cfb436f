"""Chooses what each platform computes differently from plain JAX: matmuls, attention, microbatches."""

import dataclasses
import warnings

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_dist.cpu import kernels, onednn
from mae_dist.model.attention import cudnn_attention, has_fused_kernel
from mae_dist.model.hooks import Hooks
from mae_dist.parallel import shardings


def choose_matmul(config: ConfigDict, mesh: Mesh, flops_per_image: float) -> str:
    """Returns the backend of a program's matmuls on `mesh`, of `onednn.BACKENDS`: the config's, or the fastest.

    Args:
      config: validated.
      mesh: the devices it runs on.
      flops_per_image: of the program: small ones do not repay oneDNN's cost at start.
    """
    if not shardings.is_by_cores(mesh) or config.model.dtype != "float32":
        return "xla"
    wanted = config.cpu.products
    if wanted == "auto":
        return onednn.choose(flops_per_image)
    if wanted == "onednn" and not onednn.has_onednn():
        logging.warning("This machine or this jaxlib has no oneDNN: XLA computes matmuls, to other last bits.")
        return "xla"
    return wanted


def make_hooks(mesh: Mesh, matmul: str = "xla") -> Hooks:
    """Returns the model's hooks for `mesh`, with matmuls on a CPU by `matmul`, of `onednn.BACKENDS`."""
    if shardings.is_by_cores(mesh):
        if matmul == "onednn":  # JAX still tries to store programs with such calls
            warnings.filterwarnings("ignore", onednn.NOT_STORED, UserWarning)
        return kernels.make_hooks(matmul == "onednn")
    hooks = Hooks(constrain=shardings.make_constrain(mesh))
    if mesh.devices.flat[0].platform == "gpu" and has_fused_kernel():
        return dataclasses.replace(hooks, attention=cudnn_attention)
    return hooks
