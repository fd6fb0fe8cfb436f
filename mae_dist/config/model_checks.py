"""Checks the fields of a config's model together, and the scaling of its images."""

import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from mae_dist.errors import ConfigError, nearest_divisor
from mae_dist.model import masking, patches, positions


def model_faults(model: ConfigDict, masked: bool) -> Iterator[str]:
    """Yields what cannot be in `config.model`; `masked`: masks have to fit too."""
    for prefix in ("", "decoder_"):
        dim, heads = model[f"{prefix}embed_dim"], model[f"{prefix}num_heads"]
        multiple = math.lcm(positions.FIXED_POSITIONS.get(model.pos_embed, 1), max(1, heads))
        if dim % positions.FIXED_POSITIONS.get(model.pos_embed, 1):
            yield (
                f"model.{prefix}embed_dim={dim} is not a multiple of "
                f"{positions.FIXED_POSITIONS[model.pos_embed]}, which model.pos_embed={model.pos_embed!r} needs; "
                f"nearest that {heads} heads divide too: {max(multiple, round(dim / multiple) * multiple)}"
            )
        elif heads > 0 and dim > 0 and dim % heads:
            yield (
                f"model.{prefix}num_heads={heads} does not divide model.{prefix}embed_dim={dim}; "
                f"nearest that does: {nearest_divisor(dim, heads)}"
            )
        ratio = model[f"{prefix}mlp_ratio"]
        if dim > 0 and 0 < dim * ratio < 1:
            yield (
                f"model.{prefix}mlp_ratio={ratio} of model.{prefix}embed_dim={dim} leaves no "
                f"MLP; choose at least {math.ceil(1e5 / dim) / 1e5:g}"
            )
    for field in ("image_size", "patch_size"):
        if len(model[field]) != 2 or any(not isinstance(v, int) or v < 1 for v in model[field]):
            yield f"model.{field}={model[field]} must be two positive whole numbers, (height, width)"
            return
    if model.channels < 1:
        yield f"model.channels={model.channels} must be at least 1; 1 is gray, 3 RGB, 4 RGBA, more are bands"
    try:
        grid = patches.grid_size(model.image_size, model.patch_size)
        if masked and model.masking in masking.STRATEGIES:
            yield from _mask_faults(model, grid)
    except ConfigError as error:
        yield str(error)
    if model.cls_token != "learned" and model.cls_tokens > 1:
        yield (
            f"model.cls_tokens={model.cls_tokens} and model.cls_token={model.cls_token!r}: several differ only if they "
            "are learned; set model.cls_token='learned', or model.cls_tokens=1"
        )
    if model.decoder == "full":
        if model.predict_ratio != 1:
            yield (
                f"model.predict_ratio={model.predict_ratio} is for model.decoder='cross': the full decoder's tokens "
                "attend to each other, so all of them are needed; set it to 1.0, or choose model.decoder='cross'"
            )
        if model.fuse_blocks:
            yield "model.fuse_blocks is for model.decoder='cross'; set it to False, or choose that decoder"


def _mask_faults(model: ConfigDict, grid: tuple[int, int]) -> Iterator[str]:
    """Checks how many patches are kept; raises the strategy's own `ConfigError`."""
    length = grid[0] * grid[1]
    fields = {name: model[name] for name in ("mask_ratio", "mask_file", "mask_block")}
    kept = masking.count_kept(strategy=model.masking, grid=grid, **fields)
    if length == 1:
        yield (
            f"model.patch_size={model.patch_size} leaves one patch of model.image_size={model.image_size}, "
            "and one must be kept and one removed; choose smaller patches"
        )
    elif 0 < kept < length:
        yield from _predict_faults(model, length - kept)
    elif masking.STRATEGIES.get(model.masking).count is masking.count_by_ratio:
        squares = length // model.mask_block**2
        lowest, highest = math.ceil(1e4 / squares) / 1e4, math.floor(1e4 - 1e4 / squares) / 1e4
        smaller = f", or a smaller model.mask_block than {model.mask_block}" if model.mask_block > 1 else ""
        if squares == 1:
            yield f"model.mask_block={model.mask_block} is the whole image; choose a smaller one, 1 for single patches"
            return
        yield (
            f"model.mask_ratio={model.mask_ratio} keeps {kept} of {length} patches; at least one "
            f"must be kept and one removed: choose {lowest:g} to {highest:g}{smaller}"
        )
    else:
        yield (
            f"model.masking={model.masking!r} keeps {kept} of {length} patches by its own count; at least one must be "
            "kept and one removed: correct that function, or choose another model.masking"
        )


def _predict_faults(model: ConfigDict, num_removed: int) -> Iterator[str]:
    predicted = masking.count_predicted(num_removed, model.predict_ratio)
    if not 0 < predicted <= num_removed or not 0 < model.predict_ratio <= 1:
        lowest = math.ceil(1e4 / num_removed) / 1e4
        yield (
            f"model.predict_ratio={model.predict_ratio} predicts {predicted} of {num_removed} removed patches; it "
            f"must be at least one and at most all: choose {lowest:g} to 1"
        )


def scaling_faults(config: ConfigDict) -> Iterator[str]:
    """Yields what is wrong with `data.mean` and `data.std`."""
    for field in ("mean", "std"):
        value = config.data[field]
        if len(value) not in (0, 1, config.model.channels):
            yield (
                f"data.{field}={value} has {len(value)} values; needed: 1, or one for each of "
                f"model.channels={config.model.channels}, or () to measure them"
            )
    if bool(config.data.mean) != bool(config.data.std):
        yield f"data.mean={config.data.mean} and data.std={config.data.std}: both are () to be measured, or neither"
    if not all(math.isfinite(v) for v in config.data.mean):
        yield f"data.mean={config.data.mean} must be finite"
    if not all(0 < v < math.inf for v in config.data.std):
        yield f"data.std={config.data.std} must be above 0"
