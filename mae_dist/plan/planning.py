"""Plans of a run for hardware that is not here: what a step needs there, and its least time.

A plan is plain values under names, ready for JSON. Sizes are bytes on one chip, times are seconds of one step.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from mae_dist import errors, hardware
from mae_dist.data import DescribedDataset, is_prepared, known_sizes
from mae_dist.data.from_config import Data, open_data
from mae_dist.model.build import param_count
from mae_dist.model.flops import attention_forward_flops
from mae_dist.model.parameters import Parameter, parameter_rows
from mae_dist.optim.muon import orthogonalisation_flops
from mae_dist.optim.train_state import split_frozen
from mae_dist.parallel.shardings import bytes_per_device, with_shardings
from mae_dist.plan import hlo, roofline, topology
from mae_dist.training import job, saved_program

Report = dict[str, Any]
_SWEEP_COMPILATIONS = 3  # at most, for each mesh that is wanted compiled


def described_data(config: ConfigDict) -> Data:
    """Describes the splits of a config, or opens them if their sizes are not known, without download or decoding.

    Raises:
      ConfigError: neither is the size known nor the data set here.
    """
    data = config.data
    if data.source != "tfds" or (known_sizes(data.name) is None and is_prepared(data.name, data.data_dir)):
        config = config.copy_and_resolve_references()
        config.data.update(stage=False, cache="stream")
        return open_data(config)
    return open_data(config, lambda config, split: DescribedDataset(config.data.name, split))


def examine(
    config: ConfigDict,
    place: topology.Topology,
    data: Data,
    when_compiled: Callable[[saved_program.Compilation], None] = lambda step: None,
) -> Report:
    """Compiles the step of `config` for the devices of `place`; returns everything the tables show.

    `when_compiled` gets the step, unless the compiler refuses it.
    """
    built = job.build(config, place.devices, data)
    started = time.monotonic()
    state = with_shardings(built.abstract_state, built.shardings)  # as training gives it
    compiled = topology.compile_step(built.train_step, built.mesh, state, built.abstract_batch)
    compile_secs, memory = time.monotonic() - started, _memory(built, compiled, place)
    if compiled.stages is not None:
        when_compiled(saved_program.Compilation(built, *compiled.stages, compiled.secs))
    fits = not compiled.refusal and memory["total"] <= (memory["chip"] or math.inf)
    report = _outline(built, place) | {
        "compile_secs": compile_secs,
        "memory": memory,
        "fits": fits,
        "refusal": compiled.refusal,
        "reasons": [] if fits else _reasons(built, memory, place.chips_per_slice),
        "collectives": None,
    }
    if not compiled.refusal:
        program = hlo.Program(compiled.text, place.chips_per_slice, place.num_slices)
        found = program.collectives()
        report["collectives"] = roofline.sum_by_kind(found)
        report["uncounted_loops"] = len(program.uncounted_loops)
        moved = 2 * (_state_bytes(memory) + memory["temporaries"])
        hbm = {"hbm": moved / place.chip.hbm_bytes_per_sec if place.chip else None}
        links = roofline.link_secs(found, place, built.mesh.devices.flat)
        _time(report, report["secs"] | hbm | links)
    return report


def _outline(built: job.Job, place: topology.Topology) -> Report:
    """Returns what is known before anything is compiled."""
    config, device = built.config, place.devices[0]
    peak = hardware.peak_flops(device.device_kind, config.model.dtype)
    recomputed = {"none": 1.0, "dots": 1.0, "blocks": 1.0}
    if built.encoder_passes == 3:  # a frozen encoder goes forward once
        attention = attention_forward_flops(config, built.num_kept)  # its matmuls are not kept by "dots"
        recomputed |= {"dots": 1 + attention / built.flops_per_image, "blocks": 4 / 3}  # a forward pass more
    flops = built.flops_per_image * config.global_batch_size * recomputed[config.model.remat]
    return {
        "config": config.name,
        "topology": place.name,
        "num_slices": place.num_slices,
        "chips": len(place.devices),  # of which two are one chip where devices_per_chip is 2
        "devices_per_chip": place.chip.devices if place.chip else 1,
        "device_kind": device.device_kind,
        "mesh": dict(built.mesh.shape),
        "global_batch_size": config.global_batch_size,
        "accum_steps": config.accum_steps,
        "remat": config.model.remat,
        "shard_state": config.optim.shard_state,
        "grad_exchange": config.optim.grad_exchange,
        "dtype": config.model.dtype,
        "parameters": param_count(built.abstract_state.params),
        "flops_per_image": built.flops_per_image,
        "recomputed": recomputed,
        "peak_flops": peak,
        "num_examples": built.data.train.num_examples,
        "total_epochs": built.schedule.total_steps * config.global_batch_size / built.data.train.num_examples,
        "expected": roofline.expected_exchange(built, place.num_slices),
        "secs": {"compute": (flops / len(place.devices) + _update_flops(built)) / peak if peak else None},
    }


def _update_flops(built: job.Job) -> float:
    """Estimates the FLOPs of the update on one chip: of Muon's matrices as many parts as the chip holds of them."""
    if built.config.optim.name != "muon":
        return 0.0
    trained, _ = split_frozen(built.abstract_state.params, built.task.frozen)
    held, _ = split_frozen(built.shardings.params, built.task.frozen)

    def count(row: Parameter, leaf: Any, sharding: NamedSharding) -> float:
        return orthogonalisation_flops(row, leaf.shape) * math.prod(sharding.shard_shape(leaf.shape)) / leaf.size

    return sum(jax.tree.leaves(jax.tree.map(count, parameter_rows(trained), trained, held)))


def _memory(built: job.Job, compiled: topology.Compiled, place: topology.Topology) -> dict[str, Any]:
    """Returns the bytes on one chip, by what they are for."""
    state, shardings, batch = built.abstract_state, built.shardings, built.abstract_batch
    params = bytes_per_device(state.params, shardings.params)
    optimizer = bytes_per_device(state.opt_state, shardings.opt_state)
    averages = bytes_per_device(state.ema, shardings.ema)
    images = bytes_per_device(batch, jax.tree.map(lambda _: built.batch_sharding, batch))
    known = params + optimizer + averages + images
    temporaries = compiled.temporaries + compiled.outputs
    if compiled.refusal and not compiled.arguments:  # they are in the compiler's one sum
        temporaries = max(0, temporaries - known)
    return {
        "parameters": params,
        "optimizer_state": optimizer,
        "averages": averages,
        "batch": images,
        "padding": max(0, compiled.arguments - known),
        "temporaries": temporaries,
        "program": compiled.program,
        "total": max(compiled.arguments, known) + temporaries + compiled.program,
        "chip": (compiled.limit or place.chip.hbm_bytes) if place.chip else None,
    }


def _state_bytes(memory: dict[str, Any]) -> int:
    return memory["parameters"] + memory["optimizer_state"] + memory["averages"]


def _reasons(built: job.Job, memory: dict[str, Any], per_slice: int) -> list[str]:
    """Returns why the plan does not fit, the largest consumer of memory first, each with its cure."""
    config, shape = built.config, built.mesh.shape
    state, split = _state_bytes(memory), shape["fsdp"] * shape["tensor"]
    also = ""
    if split == 1:
        trained, _ = split_frozen(built.abstract_state.params, built.task.frozen)
        also = f" ({_gib(4 * param_count(trained))} of it float32 gradients, which mesh.fsdp splits too)"
    parts_of_state = split * (shape["data"] if config.optim.shard_state else 1)
    lies = f"split over {parts_of_state}" if parts_of_state > 1 else "whole on every chip"
    named = f"parameters + optimizer state{' + averages' if memory['averages'] else ''} {_gib(state)}"
    more = f"set optim.shard_state=True or raise mesh.fsdp ({_gib(state * split / per_slice)} over a whole slice)"
    if parts_of_state >= per_slice:
        more = "take a larger slice"
    images = config.global_batch_size // (shape["data"] * shape["fsdp"] * config.accum_steps)
    remat = {"none": ", model.remat=dots or blocks", "dots": ", model.remat=blocks"}.get(config.model.remat, "")
    temporaries = memory["temporaries"]
    parts = {
        f"{named} are {lies}: {more}": state,
        f"activations and other temporaries of {images} images at once {_gib(temporaries)}{also}: lower "
        f"global_batch_size, raise accum_steps{remat}": temporaries,
    }
    return sorted(parts, key=lambda why: parts[why], reverse=True)


def _time(report: Report, secs: dict[str, float | None]) -> None:
    """Adds the step's least time and what follows from it; an unknown part leaves it unknown."""
    report["secs"] = secs
    report.update(dict.fromkeys(("step_secs", "bound_by", "images_per_sec", "mfu_ceiling", "epochs_per_day", "days")))
    known = {part: value for part, value in secs.items() if value is not None}
    if len(known) < len(secs):
        return
    report["bound_by"] = max(known, key=lambda part: known[part])
    report["step_secs"] = step = known[report["bound_by"]]
    report["images_per_sec"] = rate = report["global_batch_size"] / step
    report["mfu_ceiling"] = rate * report["flops_per_image"] / (report["peak_flops"] * report["chips"])
    report["epochs_per_day"] = rate * 86_400 / report["num_examples"]
    report["days"] = report["total_epochs"] / report["epochs_per_day"]


def meshes(config: ConfigDict, place: topology.Topology) -> Iterator[ConfigDict]:
    """Yields `config` on every mesh data x fsdp x tensor of the devices whose data axis spans the slices."""
    count = len(place.devices)
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for tensor, fsdp in itertools.product(divisors, divisors):
        if count % (tensor * fsdp * place.num_slices) == 0:
            changed = config.copy_and_resolve_references()
            changed.mesh.update(data=count // (tensor * fsdp), fsdp=fsdp, tensor=tensor)
            yield changed


def foresee(config: ConfigDict, place: topology.Topology, data: Data) -> Report | None:
    """Returns what is known of a config without compiling it; None if it cannot run on these devices.

    It fits if its state does, and its times are those of FLOPs and exchanges.
    """
    try:
        built = job.build(config, place.devices, data)
    except errors.ConfigError:
        return None  # batch, heads or a width do not divide
    row: Report = _outline(built, place) | {"compiled": False}
    row["state_bytes"] = bytes_per_device(built.abstract_state, built.shardings)
    row["fits"] = place.chip is None or row["state_bytes"] < place.chip.hbm_bytes
    # All chips exchange together; of a permutation the ring bytes are the payload.
    one_slice = tuple(range(place.chips_per_slice))
    within = hlo.Collective("collective-permute", row["expected"]["ICI"], one_slice, 1)
    across = hlo.Collective("collective-permute", row["expected"]["DCN"], (), 1, across_slices=True)
    row["secs"] |= roofline.link_secs([within, across], place, place.devices)
    return row


def sweep(config: ConfigDict, place: topology.Topology, data: Data, num_compiled: int) -> Report:
    """Ranks the valid meshes: what fits first, then what was compiled, then by the time of a step at best.

    Meshes are compiled in the order that theory gives, until `num_compiled` of them fit, at most three times as many.
    Of the others theory knows the state's memory only and no time for moving it: they stand behind the compiled ones,
    and where any was compiled those alone say whether anything fits.
    """
    rows = []
    for changed in meshes(config, place):
        row = foresee(changed, place, data)
        if row is not None:
            _time(row, row["secs"])
            rows.append((row, changed))
    if not rows:
        raise errors.ConfigError(
            f"no mesh of {len(place.devices)} devices divides global_batch_size={config.global_batch_size}, heads and "
            "widths; choose another batch"
        )
    rows.sort(key=lambda entry: _rank(entry[0]))
    done: list[Report] = []
    for row, changed in rows[: _SWEEP_COMPILATIONS * num_compiled]:
        if not row["fits"] or sum(report["fits"] for report in done) == num_compiled:
            break
        done.append(examine(changed, place, data) | {"state_bytes": row["state_bytes"], "compiled": True})
    ranked = sorted([*done, *(row for row, _ in rows[len(done) :])], key=_rank)
    return {"sweep": ranked, "fits": any(row["fits"] for row in done or ranked)}


def _rank(row: Report) -> tuple[bool, bool, bool, float, float]:
    """Returns the key that sorts a sweep's meshes; one that the compiler refused has no time."""
    secs, expected = row.get("step_secs"), row["expected"]
    return not row["fits"], not row["compiled"], secs is None, secs or 0.0, expected["ICI"] + expected["DCN"]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
