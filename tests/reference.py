"""A masked autoencoder in float64 NumPy, written from the papers' equations with loops where they read plainly.

It shares nothing with mae_dist but the names of the parameters, and is what the JAX model is compared with.
Shapes: B batch, H W C image, L patches, K kept patches, P values of one patch, N tokens, D width, A attention heads.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import scipy.special

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """The model's options that its parameters do not show already."""

    patch_size: tuple[int, int]
    cls_token: str  # learned | zero | none
    pos_embed: str  # sincos2d | sincos1d | learned
    gelu: str  # exact | tanh
    norm_pix_loss: bool


@dataclasses.dataclass(frozen=True)
class Output:
    """latent (B, N, D); pred and target (B, L, P); mask (B, L); loss of each example (B,)."""

    latent: np.ndarray
    pred: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    loss: np.ndarray


def cut(images: np.ndarray, patch_size: tuple[int, int]) -> np.ndarray:
    """(B, H, W, C) -> (B, L, P): left to right, then top to bottom; a patch's values as (row, column, channel)."""
    height, width = patch_size
    patches = [
        images[:, top : top + height, left : left + width].reshape(len(images), -1)
        for top in range(0, images.shape[1], height)
        for left in range(0, images.shape[2], width)
    ]
    return np.stack(patches, axis=1)


def waves(position: int, dim: int) -> np.ndarray:
    """PE(pos, i) = sin(pos / 10000^(2i / dim)) for i < dim / 2, then the cosines (Vaswani et al. 2017): (dim,)."""
    half = dim // 2
    angles = [position / 10000 ** (2 * i / dim) for i in range(half)]
    return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def fixed_positions(kind: str, grid: tuple[int, int], dim: int) -> np.ndarray:
    """(L, D); `sincos2d` gives the first half of D to the column and the second to the row."""
    rows = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            if kind == "sincos1d":
                rows.append(waves(row * grid[1] + column, dim))
            else:
                rows.append(np.concatenate([waves(column, dim // 2), waves(row, dim // 2)]))
    return np.stack(rows)


def _layer_norm(x: np.ndarray, p: Params) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def _gelu(x: np.ndarray, kind: str) -> np.ndarray:
    """x Phi(x), or its tanh approximation (Hendrycks & Gimpel 2016)."""
    if kind == "exact":
        return x * 0.5 * (1 + scipy.special.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _cross_attention(x: np.ndarray, outputs: list[np.ndarray], p: Params) -> np.ndarray:
    """Queries (B, Q, E) look at the encoder's last tokens (B, N, D), or at a sum of all outputs, normalised."""
    memory = outputs[-1]
    if "block_weights" in p:
        memory = np.zeros_like(memory)
        for weight, output in zip(p["block_weights"], outputs, strict=True):
            memory = memory + weight * output
        memory = _layer_norm(memory, p["norm_kv"])
    kernels = p["q"]["kernel"], p["kv"]["kernel"]  # (E, A, hd), (D, 2, A, hd)
    biases = (p[name].get("bias", np.zeros(k.shape[1:])) for name, k in zip(("q", "kv"), kernels, strict=True))
    q_bias, kv_bias = biases
    out = np.zeros_like(x) + p["out"]["bias"]
    for head in range(kernels[0].shape[1]):
        query = x @ kernels[0][:, head] + q_bias[head]
        key, value = (memory @ kernels[1][:, i, head] + kv_bias[i, head] for i in (0, 1))
        for b, q in np.ndindex(x.shape[:2]):  # a query on its own
            weights = np.exp(key[b] @ query[b, q] / math.sqrt(len(query[b, q])))
            out[b, q] += (weights / weights.sum()) @ value[b] @ p["out"]["kernel"][head]
    return out


def _attention(x: np.ndarray, p: Params) -> np.ndarray:
    """Multi-head self-attention (B, N, D) -> (B, N, D), head after head and product after product."""
    kernel = p["qkv"]["kernel"]  # (D, 3, A, hd)
    bias = p["qkv"].get("bias", np.zeros(kernel.shape[1:]))
    out = np.zeros_like(x) + p["out"]["bias"]
    for head in range(kernel.shape[2]):
        query, key, value = (x @ kernel[:, i, head] + bias[i, head] for i in range(3))  # (B, N, hd)
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(kernel.shape[3])  # (B, N, N)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = out + (weights @ value) @ p["out"]["kernel"][head]
    return out


def _linear(x: np.ndarray, p: Params) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def _layer(p: Any, index: int) -> Any:
    """One block's parameters out of the stacked ones."""
    return {name: _layer(value, index) for name, value in p.items()} if isinstance(p, dict) else p[index]


def _transformer(x: np.ndarray, p: Params, gelu: str, num_blocks: int | None = None) -> np.ndarray:
    """Pre-norm blocks x + s1 * attention(norm(x)), x + s2 * MLP(norm(x)), where s is LayerScale, and a last norm.

    With `num_blocks` the first so many of them, and no last norm.
    """
    blocks = p["stack"]["blocks"]
    for index in range(len(blocks["norm1"]["scale"]) if num_blocks is None else num_blocks):
        block = _layer(blocks, index)
        x = x + block.get("scale1", 1.0) * _attention(_layer_norm(x, block["norm1"]), block["attn"])
        hidden = _gelu(_linear(_layer_norm(x, block["norm2"]), block["mlp"]["fc1"]), gelu)
        x = x + block.get("scale2", 1.0) * _linear(hidden, block["mlp"]["fc2"])
    return x if num_blocks is not None else _layer_norm(x, p["norm"])


def _positions(p: Params, kind: str, grid: tuple[int, int], dim: int) -> np.ndarray:
    return p["positions"]["embedding"] if kind == "learned" else fixed_positions(kind, grid, dim)


def encode(params: Params, images: np.ndarray, options: Options, num_blocks: int | None = None) -> np.ndarray:
    """Tokens (B, N, D) of all patches of scaled images (B, H, W, C), after so many blocks or all of them and a norm."""
    encoder = params["encoder"]
    grid = images.shape[1] // options.patch_size[0], images.shape[2] // options.patch_size[1]
    tokens = _linear(cut(images.astype(np.float64), options.patch_size), encoder["patch_embed"])
    tokens = tokens + _positions(encoder, options.pos_embed, grid, tokens.shape[-1])
    if options.cls_token != "none":
        cls = encoder.get("cls_token", np.zeros((1, 1, tokens.shape[-1])))
        tokens = np.concatenate([np.repeat(cls, len(images), axis=0), tokens], axis=1)
    return _transformer(tokens, encoder, options.gelu, num_blocks)


def _read_patches(decoder: Params, outputs: list[np.ndarray], positions: np.ndarray, gelu: str) -> np.ndarray:
    """CrossMAE's decoder (Fu et al. 2024, section 4): (B, L, E), one query for each position (L, E)."""
    x = np.stack([positions + decoder.get("mask_token", np.zeros((1, 1, 1)))[0, 0]] * len(outputs[0]))
    blocks = decoder["stack"]["blocks"]
    for index in range(len(blocks["norm1"]["scale"])):
        block = _layer(blocks, index)
        x = x + block.get("scale1", 1.0) * _cross_attention(_layer_norm(x, block["norm1"]), outputs, block["attn"])
        hidden = _gelu(_linear(_layer_norm(x, block["norm2"]), block["mlp"]["fc1"]), gelu)
        x = x + block.get("scale2", 1.0) * _linear(hidden, block["mlp"]["fc2"])
    return _layer_norm(x, decoder["norm"])


def autoencoder(params: Params, images: np.ndarray, ids_shuffle: np.ndarray, kept: int, options: Options) -> Output:
    """He et al. 2021, section 3, for scaled images (B, H, W, C) whose kept patches are ids_shuffle[:, :kept]."""
    encoder, decoder = params["encoder"], params["decoder"]
    images = images.astype(np.float64)
    target = cut(images, options.patch_size)
    batch, length, _ = target.shape
    grid = images.shape[1] // options.patch_size[0], images.shape[2] // options.patch_size[1]
    num_cls = 0

    tokens = _linear(target, encoder["patch_embed"])  # all of them; the removed are thrown away below
    tokens = tokens + _positions(encoder, options.pos_embed, grid, tokens.shape[-1])
    tokens = np.stack([tokens[b, ids_shuffle[b, :kept]] for b in range(batch)])  # (B, K, D)
    if options.cls_token != "none":
        cls = encoder.get("cls_token", np.zeros((1, 1, tokens.shape[-1])))
        num_cls = cls.shape[1]
        tokens = np.concatenate([np.repeat(cls, batch, axis=0), tokens], axis=1)
    latent = _transformer(tokens, encoder, options.gelu)

    mask = np.ones((batch, length))
    for b in range(batch):
        mask[b, ids_shuffle[b, :kept]] = 0
    dim = decoder["norm"]["scale"].shape[0]
    positions = _positions(decoder, options.pos_embed, grid, dim)
    if "kv" in decoder["stack"]["blocks"]["attn"]:
        depth = len(encoder["stack"]["blocks"]["norm1"]["scale"])
        earlier = [_transformer(tokens, encoder, options.gelu, num_blocks) for num_blocks in range(depth)]
        decoded = _read_patches(decoder, [*earlier, latent], positions, options.gelu)
    else:
        embedded = _linear(latent, decoder["embed"])
        removed = decoder.get("mask_token", np.zeros((1, 1, dim)))[0, 0]
        full = np.empty((batch, length, dim))
        for b in range(batch):
            full[b] = removed
            for place, patch in enumerate(ids_shuffle[b, :kept]):
                full[b, patch] = embedded[b, num_cls + place]
        full = full + positions
        full = np.concatenate([embedded[:, :num_cls], full], axis=1)
        decoded = _transformer(full, decoder, options.gelu)[:, num_cls:]
    pred = _linear(decoded, decoder["pred"])

    if options.norm_pix_loss:
        mean = target.mean(-1, keepdims=True)
        variance = ((target - mean) ** 2).sum(-1, keepdims=True) / (target.shape[-1] - 1)
        target = (target - mean) / np.sqrt(variance + 1e-6)
    loss = np.array([((pred[b] - target[b]) ** 2).mean(-1)[mask[b] == 1].mean() for b in range(batch)])
    return Output(latent=latent, pred=pred, target=target, mask=mask, loss=loss)


def float64(params: Any) -> Any:
    """A parameter tree of JAX arrays as float64 NumPy arrays."""
    if isinstance(params, dict):
        return {name: float64(value) for name, value in params.items()}
    return np.asarray(params, np.float64)
