"""The least time of a step and what it must exchange: arithmetic on shapes and published figures.

Each part of the chip is assumed to work at its peak and all at the same time, so that the slowest one decides. Payload
and ring bytes are as in `hlo.Collective`.
"""

import collections
import math
from collections.abc import Iterable
from typing import Any

import jax

from mae_dist import hardware
from mae_dist.model import flops, layers
from mae_dist.model.parameters import parameter_rows
from mae_dist.parallel.shardings import param_shardings, state_dimension
from mae_dist.plan import hlo, topology
from mae_dist.task_kinds import kind_of
from mae_dist.training import job

_WIDTHS = {"float32": 4, "bfloat16": 2}  # bytes
_SUMS = {3: 4, 1: 2, 0: 0}  # encoder_passes -> sums of a block's activations: after attention and MLP, back likewise


def expected_exchange(built: job.Job, num_slices: int) -> dict[str, Any]:
    """Derives what a step must exchange from how its parameters are sharded.

    - Whole on every chip (data parallelism): the gradients are summed over all n chips once a step, in the type
      `optim.grad_exchange`, which in a ring costs 2 (n - 1) / n of their bytes.
    - With `optim.shard_state` the sum is scattered over the data axis instead, (n - 1) / n of those bytes, and the new
      parameters are gathered once a step in the type of the matmuls, (n - 1) / n of theirs. Arrays that no dimension
      splits evenly stay whole. Among all chips of one TPU slice the compiler may make the sum whole, 2 (n - 1) / n, and
      let each chip keep its part; both ends are given.
    - Split over fsdp: the weights are gathered for the forward and for the backward pass and their gradients summed and
      scattered, each (n - 1) / n of their bytes in the type of the matmuls, in each microbatch of the accumulation; and
      over data the part that a chip then has is summed. The TPU's compiler may instead exchange a weight in the loop
      of its matmul, where n + 1 messages of 1/n go round: (n + 1) / n. Which weights it does so with is not known
      beforehand; both ends are given.
    - On a mesh that is not data-parallel the compiler sums gradients in every microbatch of the accumulation.
    - Over tensor: sums of activations, two a block in either direction; a frozen encoder has the one only.
    - Where features are cached the encoder does not run, and its weights stay where they are.

    Returns:
      Bytes that leave a chip in a step: `ICI` within its slice; `ICI_in_loops` instead, if every split weight were
      exchanged in the loop of its matmul, `ICI_summed_whole`, if every scattered sum were made whole; `DCN` across
      `num_slices` slices, which the data axis spans; `why`.
    """
    mesh, config, encoder_passes = built.mesh, built.config, built.encoder_passes
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    data_within, width = data // num_slices, _WIDTHS[config.model.dtype]
    summed_width = _WIDTHS[config.optim.grad_exchange]
    rounds = 1 if built.task.statistics is not None else config.accum_steps  # gradients of all examples at once
    within = across = exchanged = scattered = 0.0
    params = built.abstract_state.params
    table = (parameter_rows(params), params, param_shardings(mesh, params), built.shardings.params)
    for row, leaf, sharding, of_state in zip(*map(jax.tree.leaves, table), strict=True):
        trained = row.path.split("/")[0] not in built.task.frozen
        if not trained and not encoder_passes:
            continue
        held = math.prod(sharding.shard_shape(leaf.shape))
        over_fsdp = any(entry == "fsdp" for entry in sharding.spec) and fsdp > 1
        if over_fsdp:
            passes = 3 * rounds if trained else config.accum_steps
            exchanged += passes * held * width  # by each other chip, or in each turn of a loop
        if not trained:
            continue
        grad = held * summed_width if fsdp == tensor == 1 else held * width * rounds
        if state_dimension(of_state) is None:
            group = data_within if over_fsdp else data_within * fsdp
            within += 2 * (group - 1) / group * grad
            across += 2 * (num_slices - 1) / num_slices * grad / group
            continue
        gathered = held * (4 if row.is_float32 else width)
        within += (data_within - 1) / data_within * (grad + gathered)
        if num_slices == 1 and mesh.devices.flat[0].platform == "tpu":
            scattered += (data_within - 1) / data_within * grad
        across += (num_slices - 1) / num_slices * (grad + gathered) / data_within
        if not over_fsdp:  # each of the copies along fsdp sums the part that it then has
            within += 2 * (fsdp - 1) / fsdp * grad / data
    images = config.global_batch_size // (data * fsdp)
    summed = _SUMS[encoder_passes] * _activations_per_image(built) + _gradients_of_memory(built)
    within += 2 * (tensor - 1) / tensor * images * summed * width
    parts = [
        f"{config.optim.grad_exchange} gradients summed once"
        if fsdp == tensor == 1
        else f"gradients summed in the matmuls' type{f', {rounds} times' if rounds > 1 else ''}",
        f"the sums scattered over {data} and parameters gathered once" if config.optim.shard_state and data > 1 else "",
        f"weights gathered over {fsdp} twice and their gradients scattered" if fsdp > 1 else "",
        f"activations of every block summed over {tensor} {_SUMS[encoder_passes]} times" if tensor > 1 else "",
    ]
    return {
        "ICI": within + (fsdp - 1) * exchanged,
        "ICI_in_loops": within + (fsdp + 1) * exchanged,
        "ICI_summed_whole": within + scattered,
        "DCN": across,
        "why": "; ".join(part for part in parts if part),
    }


def _activations_per_image(built: job.Job) -> int:
    """Returns how many numbers of the model's width the blocks give out for one image."""
    model = built.config.model
    cls = layers.count_cls_tokens(model.cls_token, model.cls_tokens)
    encoder = model.depth * (built.num_kept + cls) * model.embed_dim
    if not kind_of(built.config).has_decoder:
        return encoder
    tokens, _ = flops.decoder_tokens(model, built.num_kept)
    return encoder + model.decoder_depth * tokens * model.decoder_embed_dim


def _gradients_of_memory(built: job.Job) -> int:
    """Returns how many numbers the gradients of what a cross decoder's blocks read have for one image.

    Each block's is summed. Without a loop and `fuse_blocks` the TPU's compiler adds them first and sums them once.
    """
    model = built.config.model
    if not kind_of(built.config).has_decoder or model.decoder != "cross":
        return 0
    _, keys = flops.decoder_tokens(model, built.num_kept)
    return keys * model.embed_dim * model.decoder_depth


def sum_by_kind(found: Iterable[hlo.Collective]) -> list[dict[str, Any]]:
    """Returns a row for each kind, network and size of group: how many, and bytes."""
    groups: dict[tuple[str, bool, int], list[hlo.Collective]] = collections.defaultdict(list)
    for item in found:
        groups[item.kind, item.across_slices, len(item.group)].append(item)
    return [
        {
            "kind": kind,
            "network": "DCN" if across else "ICI",
            "chips": size,
            "count": sum(item.count for item in items),
            "payload_bytes": sum(item.count * item.payload for item in items),
            "ring_bytes": sum((item.count * item.ring_bytes for item in items), 0.0),
        }
        for (kind, across, size), items in sorted(groups.items())
        if size > 1
    ]


def link_secs(
    found: Iterable[hlo.Collective], place: topology.Topology, devices: Iterable[Any]
) -> dict[str, float | None]:
    """Returns the seconds a step's exchanges take on the links of a chip: `ici`, and `dcn` where bytes go there.

    Args:
      found: the exchanges.
      place: without published figures of its chips `ici` is None.
      devices: of `place`, in the order of the mesh.
    """
    chip = place.chip
    if chip is None:
        return {"ici": None}
    # Replica groups number the devices of one slice.
    coords = [getattr(device, "coords", ()) for device in devices if getattr(device, "slice_index", 0) == 0]
    ici, dcn = 0.0, 0.0
    for item in found:
        if item.across_slices:
            dcn += item.count * item.ring_bytes
        elif len(item.group) > 1:
            speed = hardware.ici_bytes_per_sec(chip, [coords[i] for i in item.group], place.shape)
            ici += item.count * item.ring_bytes / speed
    secs: dict[str, float | None] = {"ici": ici}
    if dcn:
        secs["dcn"] = dcn / chip.dcn_bytes_per_sec if chip.dcn_bytes_per_sec else None
    return secs
