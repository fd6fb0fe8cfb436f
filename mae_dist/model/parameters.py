"""The table of parameters: logical axes, weight decay, layer, and names in other layouts.

A parameter is identified by its path in the parameter tree, such as `encoder/stack/blocks/attn/qkv/kernel`. Each has
exactly one row here, which sharding, weight decay, layer decay and conversions read.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import PyTree

LogicalAxes = tuple[str | None, ...]
# Places for layer decay: before the encoder's first block, in one of its blocks, after the last.
EMBEDDING, BLOCK, HEAD = "embedding", "block", "head"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row: a parameter, or the same parameter of every block of a stack.

    path: in the parameter tree.
    axes: the logical axis of each dimension: `layers` for the stack, None for one that is never sharded. Vectors of
      the model width are replicated: an all-gather would cost more than they weigh.
    decays: True if weight decay and LARS's trust ratio apply.
    layer: EMBEDDING, BLOCK or HEAD.
    timm, hf: its name in timm's layout and in that of Hugging Face's transformers, `{}` for the number of a block;
      three names where queries, keys and values are apart; none where the layout has no such parameter.
    stored: how those layouts store the array: `same`; `flat`, as a vector; `patch`, as a convolution's weights;
      `positions`, with a row for the class token; or, for a matmul's weights (*in, *out), the number of axes that are
      inputs: as (out, in).
    is_float32: True if the model computes with it in float32 whatever `model.dtype` is.
    """

    path: str
    axes: LogicalAxes
    decays: bool
    layer: str
    timm: tuple[str, ...] = ()
    hf: tuple[str, ...] = ()
    stored: str | int = "same"
    is_float32: bool = False

    @property
    def is_stacked(self) -> bool:
        """True if the first axis counts blocks."""
        return "layers" in self.axes

    @property
    def matrix(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Returns the axes of inputs and of outputs of a block's matmul, None for any other parameter.

        The other axes count matrices: blocks, and queries, keys and values.
        """
        if not (self.is_stacked and isinstance(self.stored, int)):
            return None
        inputs = tuple(range(1, 1 + self.stored))
        # Of queries, keys and values each is a matrix to its heads.
        first = self.axes.index("heads") if "heads" in self.axes[1 + self.stored :] else 1 + self.stored
        return inputs, tuple(range(first, len(self.axes)))

    def names(self, layout: str) -> tuple[str, ...]:
        """Returns the names in a layout, `timm` or `hf`."""
        return {"timm": self.timm, "hf": self.hf}[layout]


def _end(names: str | tuple[str, ...], end: str) -> tuple[str, ...]:
    return tuple(f"{name}.{end}" for name in ((names,) if isinstance(names, str) else names))


def _linear(
    path: str,
    kernel: LogicalAxes,
    bias: LogicalAxes,
    layer: str,
    timm: str | tuple[str, ...] = (),
    hf: str | tuple[str, ...] = (),
    stored: str | int = 1,
    is_float32: bool = False,
) -> tuple[Parameter, Parameter]:
    """Returns the rows of a linear layer, whose names in other layouts end in weight and bias."""
    return (
        Parameter(f"{path}/kernel", kernel, True, layer, _end(timm, "weight"), _end(hf, "weight"), stored, is_float32),
        Parameter(f"{path}/bias", bias, False, layer, _end(timm, "bias"), _end(hf, "bias"), "flat", is_float32),
    )


def _norm(
    path: str, axes: LogicalAxes, layer: str, timm: str, hf: str | tuple[str, ...] = ()
) -> tuple[Parameter, Parameter]:
    """Returns the rows of a LayerNorm."""
    return (
        Parameter(f"{path}/scale", axes, False, layer, _end(timm, "weight"), _end(hf, "weight"), is_float32=True),
        Parameter(f"{path}/bias", axes, False, layer, _end(timm, "bias"), _end(hf, "bias"), is_float32=True),
    )


def _positions(group: str, layer: str, timm: str, hf: str) -> Parameter:
    """Returns the row of learned positions."""
    return Parameter(f"{group}/positions/embedding", (None, "embed"), True, layer, (timm,), (hf,), "positions")


def _cross_attention(path: str, layer: str) -> tuple[Parameter, ...]:
    """Returns the rows that cross-attention has beside those of self-attention."""
    vector, q = ("layers", None), ("layers", "embed", "heads", None)
    return (
        *_linear(f"{path}/q", q, ("layers", "heads", None), layer),
        *_linear(f"{path}/kv", ("layers", "embed", None, "heads", None), ("layers", None, "heads", None), layer),
        Parameter(f"{path}/block_weights", vector, False, layer),
        Parameter(f"{path}/norm_kv/scale", vector, False, layer, is_float32=True),
        Parameter(f"{path}/norm_kv/bias", vector, False, layer, is_float32=True),
    )


def _blocks(group: str, layer: str, timm: str, hf: str) -> tuple[Parameter, ...]:
    """Returns the rows of a stack of blocks, whose names in other layouts begin with `timm` and `hf`."""
    path, vector = f"{group}/stack/blocks", ("layers", None)
    qkv, qkv_bias = ("layers", "embed", None, "heads", None), ("layers", None, "heads", None)
    qkv_hf = tuple(f"{hf}.attention.attention.{name}" for name in ("query", "key", "value"))
    out, out_hf = ("layers", "heads", None, "embed"), f"{hf}.attention.output.dense"
    fc1, fc1_bias, fc2 = ("layers", "embed", "mlp"), ("layers", "mlp"), ("layers", "mlp", "embed")
    return (
        *_norm(f"{path}/norm1", vector, layer, f"{timm}.norm1", f"{hf}.layernorm_before"),
        *_linear(f"{path}/attn/qkv", qkv, qkv_bias, layer, f"{timm}.attn.qkv", qkv_hf),
        *_linear(f"{path}/attn/out", out, vector, layer, f"{timm}.attn.proj", out_hf, stored=2),
        *_norm(f"{path}/norm2", vector, layer, f"{timm}.norm2", f"{hf}.layernorm_after"),
        *_linear(f"{path}/mlp/fc1", fc1, fc1_bias, layer, f"{timm}.mlp.fc1", f"{hf}.intermediate.dense"),
        *_linear(f"{path}/mlp/fc2", fc2, vector, layer, f"{timm}.mlp.fc2", f"{hf}.output.dense"),
        Parameter(f"{path}/scale1", vector, False, layer, timm=(f"{timm}.ls1.gamma",)),
        Parameter(f"{path}/scale2", vector, False, layer, timm=(f"{timm}.ls2.gamma",)),
    )


_TOKEN, _TABLE = (None, None, None), (None, "embed")
_PATCH_HF = "vit.embeddings.patch_embeddings.projection"
_ROWS = (
    *_linear("encoder/patch_embed", _TABLE, (None,), EMBEDDING, "patch_embed.proj", _PATCH_HF, stored="patch"),
    Parameter("encoder/cls_token", _TOKEN, True, EMBEDDING, ("cls_token",), ("vit.embeddings.cls_token",)),
    _positions("encoder", EMBEDDING, "pos_embed", "vit.embeddings.position_embeddings"),
    *_blocks("encoder", BLOCK, "blocks.{}", "vit.encoder.layer.{}"),
    *_norm("encoder/norm", (None,), HEAD, "norm", "vit.layernorm"),
    *_linear("decoder/embed", _TABLE, (None,), HEAD, "decoder_embed", "decoder.decoder_embed"),
    Parameter("decoder/mask_token", _TOKEN, True, HEAD, ("mask_token",), ("decoder.mask_token",)),
    _positions("decoder", HEAD, "decoder_pos_embed", "decoder.decoder_pos_embed"),
    *_blocks("decoder", HEAD, "decoder_blocks.{}", "decoder.decoder_layers.{}"),
    *_cross_attention("decoder/stack/blocks/attn", HEAD),
    *_norm("decoder/norm", (None,), HEAD, "decoder_norm", "decoder.decoder_norm"),
    *_linear("decoder/pred", ("embed", None), (None,), HEAD, "decoder_pred", "decoder.decoder_pred"),
    Parameter("batch_norm/mean", (None,), False, HEAD, is_float32=True),
    Parameter("batch_norm/var", (None,), False, HEAD, is_float32=True),
    *_norm("head/norm", (None,), HEAD, "fc_norm"),
    *_linear("head/hidden", ("embed", "mlp"), ("mlp",), HEAD, is_float32=True),
    *_linear("head/linear", ("embed", None), (None,), HEAD, "head", "classifier", is_float32=True),
)
PARAMETERS = {row.path: row for row in _ROWS}
assert len(PARAMETERS) == len(_ROWS), "two rows have one path"


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a key path of a parameter tree as `encoder/stack/blocks/…`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_rows(params: PyTree) -> PyTree:
    """Returns the row of every parameter, a tree like `params` (arrays or shapes).

    Raises:
      ValueError: a parameter that has no row, or another number of axes than its row.
    """

    def find(path: Any, leaf: Any) -> Parameter:
        name = path_name(path)
        row = PARAMETERS.get(name)
        if row is None:
            raise ValueError(f"parameter {name} {leaf.shape} has no row in mae_dist/model/parameters.py; add one")
        if len(row.axes) != len(leaf.shape):
            raise ValueError(f"parameter {name} has shape {leaf.shape} and its row {len(row.axes)} axes: {row.axes}")
        return row

    return jax.tree_util.tree_map_with_path(find, params)
