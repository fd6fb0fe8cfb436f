"""The options of a row of the accelerator's table, and the models that it computes."""

import dataclasses

from ml_collections import ConfigDict

import mae_dist


class NotHere(Exception):
    """A row of the accelerator's table has no meaning on this machine; the message says why."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The request for a row of the accelerator's table.

    Attributes:
      name: of the row.
      platform: JAX's name of the devices: "cpu", "gpu" or "tpu"; "" before it is known.
      tiny: True for models that a CPU computes in seconds.
      secs: after which its process is ended.
      scratch: a directory for anything, removed at the end.
    """

    name: str
    platform: str
    tiny: bool
    secs: float
    scratch: str


def shape_of(name: str, tiny: bool) -> ConfigDict:
    """Returns the config of a model by its short name, "s16", "b16", "l16" or "h14", on synthetic data.

    A tiny one has the same parts and lengths as odd.
    """
    config = mae_dist.get_config("imagenet_vit_b16" if name == "s16" else f"imagenet_vit_{name}")
    if name == "s16":
        config.model.update(embed_dim=384, num_heads=6)
    config.data.update(source="synthetic", name="shapes", num_examples=512, train_split="train", val_split="")
    if tiny:
        config.model.update(
            image_size=(32, 32), patch_size=(8, 8), embed_dim=32, depth=2, num_heads=2,
            decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2,
        )  # fmt: skip
    return config
