"""Prints plans as tables."""

from mae_dist.plan import planning, topology

_ASSUMPTIONS = """assumed: each part of the chip at its published peak and all at once, so that the slowest decides
  memory: temporaries are activations, gradients and all else that lives within a step: the compiler's sum
  compute: analytic FLOPs of matmuls, with remat=blocks a third more, with dots attention once more, and of muon's
    iterations (hardware.py: peaks)
  hbm: state and temporaries read and written once
  ici: a chip's ring bytes over two links along every side its group spans, one where that side is no ring; of a
    chip with two devices they are shared by both
  dcn: a chip's bytes to other slices over its part of the host's network card
  bytes: payload is the whole array exchanged (of permutations what one chip sends), ring what leaves one chip"""

_WAYS = {
    "in_loops": "every weight in the loop of its matmul",
    "summed_whole": "every sum made whole, of which each chip keeps its part",
}


def gib(size: float | None) -> str:
    """Returns bytes in GiB, small ones in MiB."""
    if size is None:
        return "unknown"
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def _secs(value: float | None) -> str:
    return "unknown" if value is None else f"{value * 1e3:.1f} ms"


def _mesh(report: planning.Report) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())


def text(report: planning.Report, place: topology.Topology) -> str:
    """Returns the tables of one plan."""
    slices = f"{report['num_slices']} slices of " if report["num_slices"] > 1 else ""
    across = ", data across slices" if slices else ""
    lines = [
        f"{report['config']} on {slices}{report['topology']}: {report['chips']} x {report['device_kind']}, "
        f"mesh {_mesh(report)}{across}",
        f"{report['parameters']:,} parameters, global batch {report['global_batch_size']}, accum_steps "
        f"{report['accum_steps']}, {report['dtype']}, remat {report['remat']}; compiled in "
        f"{report['compile_secs']:.0f} s",
        *_devices_lines(report),
        "",
        "memory of one chip",
    ]
    memory = report["memory"]
    lines += [f"  {name.replace('_', ' '):<18}{gib(size):>12}" for name, size in memory.items()]
    lines += ["", *_exchange_lines(report), *_time_lines(report)]
    source = f"source: {place.chip.source}" if place.chip else "no published figures for this device"
    lines += ["", _ASSUMPTIONS, f"  {source}", ""]
    if not report["fits"]:
        lines.append(f"it does not fit: {gib(memory['total'])} needed, {gib(memory['chip'])} there")
        lines += [f"  {why}" for why in report["reasons"]]
        lines += [f"  the compiler: {report['refusal']}"] if report["refusal"] else []
    elif memory["chip"]:
        lines.append("it fits")
    else:
        lines.append("the memory of this device is not known: whether it fits is not said")
    return "\n".join(lines)


def _devices_lines(report: planning.Report) -> list[str]:
    """Returns the meaning of "chip" where it is not the whole one."""
    each = report["devices_per_chip"]
    if each == 1:
        return []
    return [f"a chip has {each} devices here ({report['chips'] // each} chips); below, a chip means one of its devices"]


def _exchange_lines(report: planning.Report) -> list[str]:
    """Returns the table of collectives, and theory beside it."""
    if report["collectives"] is None:
        return ["exchanges: not known, there is no program"]
    lines = [f"{'exchanges of a step':<22}{'network':>8}{'chips':>7}{'count':>8}{'payload':>15}{'ring':>15}  bytes"]
    for row in report["collectives"]:
        lines.append(
            f"  {row['kind']:<20}{row['network']:>8}{row['chips']:>7}{row['count']:>8}{row['payload_bytes']:>15,}"
            f"{row['ring_bytes']:>15,.0f}"
        )
    for network in ("ICI", "DCN"):
        found = sum(row["ring_bytes"] for row in report["collectives"] if row["network"] == network)
        theory = report["expected"][network]
        if found or theory:
            ratio = f", {found / theory:.3f} of it" if theory else ""
            lines.append(f"  ring bytes over {network}: theory {theory:,.0f}, found {found:,.0f}{ratio}")
            for way, meaning in _WAYS.items():
                other = report["expected"].get(f"{network}_{way}", theory)
                if other != theory:
                    lines.append(f"    theory with {meaning}: {other:,.0f}, found {found / other:.3f} of it")
    lines.append(f"  theory: {report['expected']['why']}")
    if report["uncounted_loops"]:
        lines.append(f"  {report['uncounted_loops']} loops of unknown length counted as one turn")
    return lines


def _time_lines(report: planning.Report) -> list[str]:
    if "step_secs" not in report:
        return []
    lines = ["", "a step at best"]
    lines += [f"  {part:<18}{_secs(value):>12}" for part, value in report["secs"].items()]
    lines.append(f"  {'step':<18}{_secs(report['step_secs']):>12}  bound by {report['bound_by'] or 'unknown'}")
    if report["step_secs"] is not None:
        lines += [
            f"  {'images/s':<18}{report['images_per_sec']:>12,.0f}",
            f"  {'MFU ceiling':<18}{report['mfu_ceiling']:>12.2f}",
            f"  {'epochs a day':<18}{report['epochs_per_day']:>12.1f}",
            f"  {'days':<18}{report['days']:>12.2f}  for {report['total_epochs']:g} epochs",
        ]
    return lines


FIT_HEADER = (
    f"{'mesh':<24}{'remat':<7}{'state':<9}{'exchange':<9}{'batch':>6}{'total':>10}{'hbm':>9}{'ici':>9}{'dcn':>9}"
    f"{'step':>9}{'MFU':>6}"
)


def fit_line(report: planning.Report) -> str:
    """Returns the line of one setting under `FIT_HEADER`."""
    fields = report["settings"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
    state, exchange = "sharded" if fields["optim.shard_state"] else "whole", fields["optim.grad_exchange"]
    line = (
        f"{mesh:<24}{fields['model.remat']:<7}{state:<9}{exchange:<9}{fields['global_batch_size']:>6}"
        f"{gib(report['memory']['total']):>10}"
    )
    if not report["fits"]:
        return f"{line}  does not fit in {gib(report['memory']['chip'])}"
    secs = report["secs"]
    for part in ("hbm", "ici", "dcn"):
        line += f"{_secs(secs[part]) if part in secs else '-':>9}"
    ceiling = report["mfu_ceiling"]
    return f"{line}{_secs(report['step_secs']):>9}{f'{ceiling:.2f}' if ceiling else '?':>6}"


def proposal(found: list[planning.Report], chosen: planning.Report | None) -> str:
    """Returns the settings to set, as flags, of the first of `found` on."""
    if chosen is None:
        return "nothing fits; take a larger slice"
    given = found[0]["settings"]
    changes = [f"--config.{field}={value}" for field, value in chosen["settings"].items() if value != given[field]]
    return f"proposed: {' '.join(changes)}" if changes else "proposed: the config as it is"


def sweep_text(report: planning.Report) -> str:
    """Returns the ranking of meshes."""
    lines = [f"{'mesh':<34}{'state':>11}{'total':>11}{'step':>11}{'bound by':>10}{'images/s':>10}{'MFU':>6}"]
    for row in report["sweep"]:
        rate, ceiling = row.get("images_per_sec"), row.get("mfu_ceiling")
        total = gib(row["memory"]["total"]) if row["compiled"] else "?"
        fits = "" if row["fits"] else "  does not fit"
        lines.append(
            f"{_mesh(row):<34}{gib(row['state_bytes']):>11}{total:>11}{_secs(row.get('step_secs')):>11}"
            f"{row.get('bound_by') or '?':>10}{f'{rate:,.0f}' if rate else '?':>10}"
            f"{f'{ceiling:.2f}' if ceiling else '?':>6}{fits}{'' if row['compiled'] else '  (theory)'}"
        )
    lines.append(
        "theory: not compiled; fits if its state does, the time of its memory unknown, exchanges over all links"
    )
    if not report["fits"]:
        compiled = any(row["compiled"] for row in report["sweep"])
        lines.append("none of those that were compiled fits" if compiled else "none fits")
    return "\n".join(lines)
