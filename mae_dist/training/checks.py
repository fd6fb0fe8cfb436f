"""Checks of a config against the devices and the data that it is given."""

import math

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.data.from_config import Data
from mae_dist.errors import ConfigError
from mae_dist.parallel.mesh import AXES, mesh_shape
from mae_dist.parallel.shardings import is_data_parallel
from mae_dist.task_kinds import kind_of


def check_mesh(config: ConfigDict, num_devices: int) -> None:
    """Raises `ConfigError` if the mesh, a batch or the heads cannot be split over the devices."""
    shape = dict(zip(AXES, mesh_shape(config.mesh.to_dict(), num_devices), strict=True))
    split = (("mesh.data", shape["data"]), ("mesh.fsdp", shape["fsdp"]))
    divisors = [("accum_steps", max(1, config.accum_steps))]
    if config.cpu.pieces > 1:
        divisors.append(("cpu.pieces", config.cpu.pieces))
    if config_lib.rows_together(config) > 1:
        divisors.append(("pairs to mix", config_lib.rows_together(config)))
    for field, factors in (
        ("global_batch_size", (*split, *divisors)),
        ("eval.batch_size", split),
    ):
        needed = math.prod(factor for _, factor in factors)
        size = config_lib.get(config, field)
        if size % needed:
            raise ConfigError(
                f"{field}={size} does not divide by {' x '.join(name for name, _ in factors)} = "
                f"{' x '.join(str(factor) for _, factor in factors)} = {needed}; nearest that does: "
                f"{max(needed, round(size / needed) * needed)}"
            )
    for prefix in ("", "decoder_") if kind_of(config).has_decoder else ("",):
        heads = config.model[f"{prefix}num_heads"]
        if heads % shape["tensor"]:
            raise ConfigError(
                f"model.{prefix}num_heads={heads} does not divide by mesh.tensor={shape['tensor']}; choose "
                f"a mesh.tensor that divides {heads}, or a multiple of {shape['tensor']} heads"
            )


def check_exchange(config: ConfigDict, mesh: Mesh) -> None:
    """Warns of an `optim.grad_exchange` that this mesh does not follow."""
    wanted = config.optim.grad_exchange
    if not is_data_parallel(mesh) and wanted not in ("float32", config.model.dtype):
        logging.warning(
            "optim.grad_exchange=%s has no effect with mesh.fsdp or mesh.tensor above 1, where gradients are exchanged "
            "in the type of matmuls, model.dtype=%s",
            *(wanted, config.model.dtype),
        )


def check_data(config: ConfigDict, data: Data) -> None:
    """Raises `ConfigError` if the splits lack what the config asks of them."""
    for name, dataset in (("train", data.train), ("val", data.val), ("test", data.test)):
        if dataset is None:
            continue
        if not kind_of(config).has_decoder:
            dataset.require_labels()
        if dataset.dtype != data.train.dtype:
            raise ConfigError(
                f"the {name} images are {dataset.dtype} and the training images {data.train.dtype}; set data.dtype"
            )
    if data.train.dtype != "uint8" and config.data.randaug_magnitude:
        raise ConfigError(
            f"data.randaug_magnitude={config.data.randaug_magnitude} and images of {data.train.dtype}: RandAugment is "
            "for 8-bit images; set it to 0, or data.dtype='uint8'"
        )
    if config.checkpoint.keep_best in config_lib.ONLINE and data.train.num_classes < 2:
        raise ConfigError(
            f"checkpoint.keep_best={config.checkpoint.keep_best!r} needs labels of two classes; use 'val_loss'"
        )
