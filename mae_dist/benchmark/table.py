"""The accelerator's table in Markdown, from what accelerator.json holds."""

from collections.abc import Iterator, Mapping, Sequence

from mae_dist.benchmark.turns import Result

_NOT_SHOWN = ("faults", "steps")


def markdown(result: Result) -> str:
    """Returns the whole table; a row that did not run is there with its reason."""
    device, rows = result["device"], result["rows"]
    about = {name: value for name, value in device.items() if value not in (None, "")}
    lines = [
        f"# mae_dist {result['version']} on {device['num_devices']} x {device['device_kind']}",
        "",
        f"{result['started']}; " + ", ".join(f"{name} {_text(value)}" for name, value in about.items()) + ".",
    ]
    if result["tiny"]:
        lines += ["", "**Tiny models: they show that everything runs, and no speed.**"]
    checks = {name: row for name, row in rows.items() if row["checks"]}
    speeds = {name: row for name, row in rows.items() if not row["checks"]}
    lines += _section("Correctness", ("row", "shows", "result", "s", "figures"), _checks(checks))
    heads = ("model", "remat", "batch", "images/s", "spread", "ms a step", "MFU", "GiB", "first step s")
    lines += _section("Training steps without input, bfloat16, one device", heads, _steps(speeds))
    others = {name: row for name, row in speeds.items() if "steps" not in row["figures"]}
    lines += _section("Other speeds", ("row", "shows", "result", "s", "figures"), _checks(others))
    notes = [
        f"- {name}: {text}" for name, row in rows.items() if (text := row["reason"] or row["figures"].get("stopped"))
    ]
    return "\n".join([*lines, *(["", "## Reasons", "", *notes] if notes else [])]) + "\n"


def _section(title: str, heads: Sequence[str], cells: Iterator[Sequence[str]]) -> list[str]:
    body = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells]
    return ["", f"## {title}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *body] if body else []


def _checks(rows: Mapping[str, Result]) -> Iterator[Sequence[str]]:
    for name, row in rows.items():
        figures = (f"{key} {_text(value)}" for key, value in row["figures"].items() if key not in _NOT_SHOWN)
        yield name, row["title"], row["status"], f"{row['secs']:.0f}", ", ".join(figures)


def _steps(rows: Mapping[str, Result]) -> Iterator[Sequence[str]]:
    for name, row in rows.items():
        for key, found in row["figures"].get("steps", {}).items():
            remat, batch = (word.partition("=")[2] for word in key.split())
            if found.get("full"):
                yield name, remat, batch, "does not fit", "", "", "", "", ""
                continue
            yield (
                *(name, remat, batch, f"{found['images_per_sec']:.0f}", f"{found['spread']:.1%}"),
                *(f"{1000 * found['step_secs']:.1f}", f"{found['mfu']:.1%}"),
                *("" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}",),
                f"{found['first_step_secs']:.0f}",
            )


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
