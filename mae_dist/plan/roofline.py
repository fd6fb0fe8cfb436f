"""How fast a step could be at best, and what it must exchange: arithmetic on shapes and published figures.

Every part of the chip is taken to work at its peak and all at the same time, so that the slowest one decides. Legend: P
parameters, n chips that share, payload and ring bytes as in `hlo.Collective`.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_dist import hardware
from mae_dist.model import patches
from mae_dist.model.parameters import path_name
from mae_dist.plan import hlo
from mae_dist.task_kinds import kind_of


@dataclasses.dataclass(frozen=True)
class Expected:
    """Bytes that leave a chip in a step by theory, within its slice and across slices.

    within_in_loops: instead of `within`, if the compiler exchanged every split weight in the loops of its products.
    """

    within: float
    within_in_loops: float
    across: float
    why: str


def expected_exchange(
    params: Any,
    shardings: Any,
    mesh: Mesh,
    config: ConfigDict,
    num_slices: int,
    *,
    num_kept: int,
    frozen: tuple[str, ...] = (),
    encoder_passes: int = 3,
    at_once: bool = False,
) -> Expected:
    """What a step must exchange, derived from how its parameters lie.

    - Whole on every chip (data parallelism): the float32 gradients are summed over all n chips once a step, which in a
      ring costs 2 (n - 1) / n of their bytes.
    - Split over fsdp: the weights are gathered for the forward and for the backward pass and their gradients summed and
      scattered, each (n - 1) / n of their bytes in the type of the products, in each of the accumulation's pieces; and
      over data the part that a chip then has is summed. The TPU's compiler may instead exchange a weight in the loop
      of its product, where n + 1 messages of 1/n go round: (n + 1) / n. Which weights it does so with is not known
      beforehand; both ends are given.
    - On a mesh that is not data-parallel the compiler sums gradients in every one of the accumulation's pieces.
    - Over tensor: sums of activations, two a block in either direction; a frozen encoder has the one only.
    - Where features are cached the encoder does not run, and its weights stay where they are.

    Args:
      params: shapes of the parameters.
      shardings: where they lie, the same tree.
      mesh: of the job.
      config: validated.
      num_slices: that the data axis spans.
      num_kept: see `job.Job`.
      frozen: parameter groups without gradients.
      encoder_passes: see `job.Job`.
      at_once: whether gradients are made of all examples at once, whatever config.accum_steps (`Task.statistics`).
    """
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    data_within, width = data // num_slices, 2 if config.model.dtype == "bfloat16" else 4
    rounds = 1 if at_once else config.accum_steps
    within = across = exchanged = 0.0
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        trained = path_name(path).split("/")[0] not in frozen
        if not trained and not encoder_passes:
            continue
        held = math.prod(sharding.shard_shape(leaf.shape))
        over_fsdp = any(entry == "fsdp" for entry in sharding.spec) and fsdp > 1
        if over_fsdp:
            passes = 3 * rounds if trained else config.accum_steps
            exchanged += passes * held * width  # by each other chip, or in each turn of a loop
        if not trained:
            continue
        grad = held * 4 if fsdp == tensor == 1 else held * width * rounds
        group = data_within if over_fsdp else data_within * fsdp
        within += 2 * (group - 1) / group * grad
        across += 2 * (num_slices - 1) / num_slices * grad / group
    images = config.global_batch_size // (data * fsdp)
    within += _tensor_bytes(config, tensor, images, num_kept, width, encoder_passes)
    parts = [
        "float32 gradients summed once"
        if fsdp == tensor == 1
        else f"gradients summed in the products' type{f', {rounds} times' if rounds > 1 else ''}",
        f"weights gathered over {fsdp} twice and their gradients scattered" if fsdp > 1 else "",
        f"activations of every block summed over {tensor} {_SUMS[encoder_passes]} times" if tensor > 1 else "",
    ]
    at_least, in_loops = (within + times * exchanged for times in (fsdp - 1, fsdp + 1))
    return Expected(at_least, in_loops, across, "; ".join(part for part in parts if part))


_SUMS = {3: 4, 1: 2, 0: 0}  # encoder_passes -> sums of a block's activations: after attention and MLP, back likewise


def _tensor_bytes(
    config: ConfigDict, tensor: int, images: int, num_kept: int, width: int, encoder_passes: int
) -> float:
    model = config.model
    patches_in = math.prod(patches.grid_size(model.image_size, model.patch_size))
    cls = int(model.cls_token != "none")
    tokens = model.depth * (num_kept + cls) * model.embed_dim
    tokens += model.decoder_depth * (patches_in + cls) * model.decoder_embed_dim if kind_of(config).has_decoder else 0
    return _SUMS[encoder_passes] * 2 * (tensor - 1) / tensor * images * tokens * width


def sum_by_kind(found: Iterable[hlo.Collective]) -> list[dict[str, Any]]:
    """One row for each kind, network and size of group: how many, and bytes."""
    rows: dict[tuple[str, bool, int], list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
    for item in found:
        row = rows[item.kind, item.across_slices, len(item.group)]
        row[0] += item.count
        row[1] += item.count * item.payload
        row[2] += item.count * item.ring_bytes
    return [
        {
            "kind": kind,
            "network": "DCN" if across else "ICI",
            "chips": size,
            "count": int(count),
            "payload_bytes": int(payload),
            "ring_bytes": ring,
        }
        for (kind, across, size), (count, payload, ring) in sorted(rows.items())
        if size > 1
    ]


def link_secs(
    found: Iterable[hlo.Collective], generation: str, shape: tuple[int, ...], coords: Mapping[int, tuple[int, ...]]
) -> dict[str, float | None]:
    """Seconds a step's exchanges take on the links of a chip: `ici`, and `dcn` where bytes go there.

    Args:
      found: the exchanges.
      generation: key of `hardware.CHIPS`; anything else has no figures.
      shape: of a slice.
      coords: place in the mesh -> coordinates in its slice.
    """
    chip = hardware.CHIPS.get(generation)
    if chip is None:
        return {"ici": None}
    ici, dcn = 0.0, 0.0
    for item in found:
        if item.across_slices:
            dcn += item.count * item.ring_bytes
        elif len(item.group) > 1:
            speed = hardware.ici_bytes_per_sec(chip, [coords[i] for i in item.group], shape)
            ici += item.count * item.ring_bytes / speed
    secs: dict[str, float | None] = {"ici": ici}
    if dcn:
        secs["dcn"] = dcn / chip.dcn_bytes_per_sec if chip.dcn_bytes_per_sec else None
    return secs


def theory_secs(
    within: float, across: float, generation: str, shape: tuple[int, ...], coords: Iterable[tuple[int, ...]]
) -> dict[str, float | None]:
    """`link_secs` of bytes known by theory only: within a slice all its chips, at `coords`, exchange together."""
    chip = hardware.CHIPS.get(generation)
    if chip is None:
        return {"ici": None}
    secs: dict[str, float | None] = {"ici": within / hardware.ici_bytes_per_sec(chip, coords, shape)}
    if across:
        secs["dcn"] = across / chip.dcn_bytes_per_sec if chip.dcn_bytes_per_sec else None
    return secs


def compute_secs(flops_per_step: float, num_chips: int, device_kind: str, dtype: str, recomputes: bool) -> float | None:
    """Seconds of a step's matrix products at their peak; recomputing whole blocks adds a forward pass, a third."""
    peak = hardware.peak_flops(device_kind, dtype)
    if peak is None:
        return None
    return flops_per_step * (4 / 3 if recomputes else 1) / (num_chips * peak)


def hbm_secs(moved_bytes: float, generation: str) -> float | None:
    """Seconds to move so many bytes between a chip and its memory."""
    chip = hardware.CHIPS.get(generation)
    return moved_bytes / chip.hbm_bytes_per_sec if chip else None
