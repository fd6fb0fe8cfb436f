"""Changes a trained model for other image sizes and channels, and folds what other layouts do not have."""

from typing import Any

import numpy as np
from absl import logging
from flax import traverse_util
from ml_collections import ConfigDict

from mae_dist import errors
from mae_dist.model import heads, patches, positions

Params = dict[str, Any]


def resize_positions(params: Params, config: ConfigDict, image_size: tuple[int, int]) -> Params:
    """Interpolates position embeddings to the grid of `image_size` (height, width) and sets it in `config.model`.

    Bicubic with a = -0.75 and half-pixel centres, as the paper's code does it for fine-tuning at another size. Fixed
    positions become learned ones: an interpolated table is none of the fixed ones.
    """
    model = config.model
    old = patches.grid_size(model.image_size, model.patch_size)
    new = patches.grid_size(image_size, model.patch_size)
    model.image_size = image_size
    if old == new:
        return params
    result = {group: dict(tree) for group, tree in params.items()}
    for group, dim in (("encoder", model.embed_dim), ("decoder", model.decoder_embed_dim)):
        if group in result:
            learned = result[group].get("positions")
            table = learned["embedding"] if learned else positions.fixed_positions(model.pos_embed, old, dim)
            result[group]["positions"] = {"embedding": _interpolate(table.reshape(*old, dim), new).reshape(-1, dim)}
    model.pos_embed = "learned"
    return result


def fold_layer_scale(params: Params, config: ConfigDict) -> Params:
    """Multiplies LayerScale into the matmuls before it, for layouts without: the same function, up to rounding."""
    if config.model.layer_scale_init == 0:
        return params
    config.model.layer_scale_init = 0.0
    flat: Params = traverse_util.flatten_dict(params, sep="/")
    for path in [path for path in flat if path.endswith(("/scale1", "/scale2"))]:
        blocks, name = path.rsplit("/", 1)
        layer = f"{blocks}/{'attn/out' if name == 'scale1' else 'mlp/fc2'}"
        scale, kernel = flat.pop(path), flat[f"{layer}/kernel"]  # (layers, D), (layers, …, D)
        flat[f"{layer}/kernel"] = kernel * scale.reshape(len(scale), *[1] * (kernel.ndim - 2), -1)
        flat[f"{layer}/bias"] = flat[f"{layer}/bias"] * scale
    logging.info("LayerScale is multiplied into the matmuls before it: this layout has none")
    return traverse_util.unflatten_dict(flat, sep="/")


def fold_batch_norm(params: Params, config: ConfigDict) -> Params:
    """Multiplies a probe's BatchNorm into the matmul after it, for layouts without: the same function of features."""
    if "batch_norm" not in params:
        return params
    config.classify.batch_norm = False
    first = "hidden" if "hidden" in params["head"] else "linear"
    layer, statistics = params["head"][first], params["batch_norm"]
    kernel = layer["kernel"] / np.sqrt(statistics["var"] + heads.EPS)[:, None]
    bias = layer["bias"] - statistics["mean"] @ kernel
    logging.info("BatchNorm is multiplied into the matmul after it: this layout has none")
    rest = {group: tree for group, tree in params.items() if group != "batch_norm"}
    return {**rest, "head": {**params["head"], first: {"kernel": kernel, "bias": bias}}}


def _interpolate(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Interpolates (gh, gw, D) to (*grid, D)."""
    import cv2

    # One value of D at a time: OpenCV's images have at most four channels where it interpolates exactly.
    planes = np.ascontiguousarray(np.moveaxis(table, -1, 0))  # (D, gh, gw)
    return np.stack([cv2.resize(plane, grid[::-1], interpolation=cv2.INTER_CUBIC) for plane in planes], axis=-1)


def adapt_channels(params: Params, config: ConfigDict, channels: int) -> Params:
    """Makes the matmuls with patches those of `channels`, and sets these and the scaling of pixels in `config`.

    An opaque image whose colours are equal, gray, gives the same tokens as before. Beyond that: a gray model sees the
    mean of red, green and blue; alpha that a model did not know is ignored, and alpha that it loses is taken to be 255
    everywhere. The decoder predicts the same pixels, red, green and blue their mean for a gray model, and alpha 255;
    but with `norm_pix_loss` it predicts in units of the deviation of a whole patch, whose channels are others now: red,
    green and blue then are as the old channels or their mean, alpha as the patch's mean, and none of it is exact.
    """
    model, data, old = config.model, config.data, config.model.channels
    if channels == old:
        return params
    if not {old, channels} <= {1, 3, 4}:
        raise errors.ConfigError(f"--channels={channels} from {old}: there can be 1 (gray), 3 (RGB) or 4 (RGBA)")
    old_mean, old_std = (np.array(per_channel(values, old)) for values in (data.mean, data.std))
    data.mean, data.std = _adapt(data.mean, channels, alpha=0.0), _adapt(data.std, channels, alpha=1.0)
    mean, std = (np.array(per_channel(values, channels)) for values in (data.mean, data.std))
    model.channels = channels
    result = {group: dict(tree) for group, tree in params.items()}
    # With x' the new channels' scaled pixels, the old ones are x = x' @ matrix + shift.
    mix, opaque = _mix_channels(channels, old)
    matrix, shift = std[:, None] * mix / old_std, (mean @ mix + opaque - old_mean) / old_std
    embed = result["encoder"]["patch_embed"]
    kernel = embed["kernel"].reshape(-1, old, embed["kernel"].shape[-1]).astype(np.float64)  # (ph * pw, C, D)
    result["encoder"]["patch_embed"] = {
        "kernel": (matrix @ kernel).reshape(-1, kernel.shape[-1]).astype(embed["kernel"].dtype),
        "bias": (embed["bias"] + np.einsum("c,pcd->d", shift, kernel)).astype(embed["bias"].dtype),
    }
    if "decoder" in result:
        mix, opaque = _mix_channels(old, channels)
        matrix, shift = old_std[:, None] * mix / std, (old_mean @ mix + opaque - mean) / std
        if config.pretrain.norm_pix_loss:
            matrix, shift = mix, np.zeros(channels)
            logging.warning(
                "pretrain.norm_pix_loss: the decoder predicts in units of the deviation of a patch over all channels, "
                "which are others now; its predictions are near the old ones, not equal"
            )

        def columns(x: np.ndarray, shift: Any) -> np.ndarray:
            """Maps (…, ph * pw * C) to the same of the new channels."""
            y = x.reshape(*x.shape[:-1], -1, old) @ matrix + shift
            return y.reshape(*y.shape[:-2], -1).astype(x.dtype)

        pred = result["decoder"]["pred"]
        result["decoder"]["pred"] = {"kernel": columns(pred["kernel"], 0), "bias": columns(pred["bias"], shift)}
    logging.info(
        "%d channels for %d: pixels are scaled by data.mean=%s and data.std=%s now, which a config that begins from "
        "these weights has to say too",
        channels,
        old,
        data.mean,
        data.std,
    )
    return result


def per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Returns a mean or std of pixels with one value per channel."""
    return values * channels if len(values) == 1 else values


def _adapt(values: tuple[float, ...], channels: int, alpha: float) -> tuple[float, ...]:
    """Returns a mean or std of pixels for other channels; that of gray is the colours' mean."""
    if len(values) == 1:
        return values
    if channels == 1:
        return (sum(values[:3]) / 3,)
    return (*values[:3], *[alpha] * (channels - 3))


def _mix_channels(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns mix (source, target) and opaque (target,): pixels x in 0..1 become x @ mix + opaque in other channels."""
    colors = min(source, 3), min(target, 3)
    mix, opaque = np.zeros((source, target)), np.zeros(target)
    mix[: colors[0], : colors[1]] = np.eye(colors[0]) if colors[0] == colors[1] else 1 / colors[0]
    opaque[3:] = 1.0
    return mix, opaque
