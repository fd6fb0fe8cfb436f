"""Checks that trained weights fit a config."""

import shlex
from collections.abc import Sequence

from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist import names
from mae_dist.errors import StorageFault

# The fields that parameters depend on, by group; all must be equal to start from them.
_SHARED = (
    "image_size",
    "channels",
    "patch_size",
    "cls_token",
    "cls_tokens",
    "pos_embed",
    "qkv_bias",
    "gelu",
    "norm_eps",
)
FIELDS = {
    "encoder": (
        *(f"model.{name}" for name in (*_SHARED, "embed_dim", "depth", "num_heads", "mlp_ratio", "layer_scale_init")),
        "data.mean",
        "data.std",
    ),
    "decoder": (
        "model.decoder",
        "model.fuse_blocks",
        *(f"model.decoder_{name}" for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")),
        "model.mask_token",
        "pretrain.norm_pix_loss",
    ),
}


def check_fits(source: ConfigDict, config: ConfigDict, groups: Sequence[str]) -> None:
    """Raises `StorageFault` naming every field in which these groups of `source` differ from those of `config`."""
    lines = []
    for field in (field for group in groups for field in FIELDS[group]):
        old, new = config_lib.get(source, field), config_lib.get(config, field)
        if field == "model.layer_scale_init":  # weights depend on whether there is a LayerScale, not on where it began
            old, new = old > 0, new > 0
        elif field.startswith("data.") and len(old) != len(new):  # one value stands for all channels
            old, new = (value * config.model.channels if len(value) == 1 else value for value in (old, new))
        if old != new:
            lines.append(f"{field}: {old!r} -> {new!r}")
    if lines:
        cures = f"{_conversion(config, lines)}{_inflation(config, lines)}{_without_decoder(config, lines)}"
        raise StorageFault(
            f"the {' and '.join(groups)} of init_from={config.init_from!r} do not fit this config:\n  - "
            + "\n  - ".join(lines)
            + f"\nSet these as they were{cures}."
        )


def _without_decoder(config: ConfigDict, lines: Sequence[str]) -> str:
    """Returns how the encoder begins a model that differs only in its decoder, or ""."""
    if not {line.partition(":")[0] for line in lines} <= set(FIELDS["decoder"]):
        return ""
    out = f"{_place(config)}_encoder"
    return (
        "; or begin with a new decoder: "
        f"python -m mae_dist.convert {shlex.join([f'--source={config.init_from}', f'--out={out}', '--to=mae_dist'])} "
        f"--encoder_only and train with {shlex.join([f'--config.init_from={out}'])}"
    )


def _place(config: ConfigDict) -> str:
    """Returns how the names of what is converted from `init_from` begin."""
    is_hub = config.init_from.startswith(names.HUB)
    return config_lib.last_name(config.init_from) if is_hub else config.init_from.rstrip("/")


def _inflation(config: ConfigDict, lines: Sequence[str]) -> str:
    """Returns how weights begin a model that differs only in the channels and their scaling, or ""."""
    fields = {line.partition(":")[0] for line in lines}
    if "model.channels" not in fields or not fields <= {"model.channels", "data.mean", "data.std"}:
        return ""
    return "; or begin with the encoder's patch embedding spread over the new channels: --config.init_inflate=True"


def _conversion(config: ConfigDict, lines: Sequence[str]) -> str:
    """Returns how `convert` makes weights fit that differ only in the images' size and channels, or ""."""
    model, fields = config.model, {line.partition(":")[0] for line in lines}
    if not fields <= {"model.image_size", "model.channels"} or model.channels not in (1, 3, 4):
        return ""
    flags = [f"--image_size={model.image_size[0]},{model.image_size[1]}"] if "model.image_size" in fields else []
    flags += [f"--channels={model.channels}"] if "model.channels" in fields else []
    out = f"{_place(config)}_converted"
    learned = " --config.model.pos_embed=learned" if "model.image_size" in fields else ""
    return (
        f", or convert the weights first: python -m mae_dist.convert {shlex.join([f'--source={config.init_from}'])} "
        f"{shlex.join([f'--out={out}', '--to=mae_dist', *flags])} and train with "
        f"{shlex.join([f'--config.init_from={out}'])}{learned}"
    )
