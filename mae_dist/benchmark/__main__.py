"""Measures a config here: `python -m mae_dist.benchmark --config F [--against hf] [--what features] [--scaling]`.

Repeats of several steps with the real data pipeline; medians, and the spread as (largest - smallest) / median.
`--against hf` takes turns with Hugging Face's ViTMAE of the same shape in PyTorch, eager and compiled, on as many
threads (in a clone with the extra `parity`). `--scaling` measures one change after another, each in a process of its
own. `--what input` measures the training input alone, by turns with a DataLoader of PyTorch if `--against torch`, or
once a minute for `--minutes`.

`--accelerator --out D` needs no config: it checks what a GPU or TPU computes against the CPU, and measures ViT-S to
ViT-H on it, within `--minutes` (default 9). It ends with code 1 if a check fails.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from mae_dist import cli, errors, storage
from mae_dist.benchmark import accelerator, inputs, steps
from mae_dist.benchmark.turns import Result
from mae_dist.cpu import cores
from mae_dist.cpu.start import use_cores

_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of lines.")
_AGAINST = flags.DEFINE_enum("against", None, ["hf", "torch"], "Take turns with another: torch for --what input.")
_WHAT = flags.DEFINE_enum(
    "what",
    "train",
    ["train", "features", "input"],
    "Steps, features of whole images, or the training input alone.",
    allow_override=True,
)
_SCALING = flags.DEFINE_bool("scaling", False, "A table over batch sizes, image sizes, model sizes and CPU devices.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "How often each is measured.", lower_bound=1)
_MINUTES = flags.DEFINE_float(
    "minutes", 0.0, "With --what input: a line each minute, for so long. With --accelerator: for all.", lower_bound=0.0
)
_SECS = flags.DEFINE_float("secs", 3.0, "About how long a repeat takes.", lower_bound=0.01)
_ACCELERATOR = flags.DEFINE_bool("accelerator", False, "A table of what works on this GPU or TPU, and how fast it is.")
_OUT = flags.DEFINE_string("out", None, "With --accelerator: the directory for accelerator.json, .md and logs.")
_TINY = flags.DEFINE_bool("tiny", None, "With --accelerator: tiny models (default: on a CPU only).")
_ROWS = flags.DEFINE_list("rows", [], "With --accelerator: only these rows, separated by commas.")
_LIMITS = flags.DEFINE_list("limits", [], "With --accelerator: ROW=SECONDS,…: other time limits of rows.")
_ACCELERATOR_MINUTES = 9.0


def benchmark(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    del argv
    _check_flags()
    if _ACCELERATOR.value:
        return _accelerator()
    config = cli.needed_config()
    if _SCALING.value:
        return _scaling(config)
    if _WHAT.value == "input":
        return _input(config)
    use_cores(config, None)
    against_hf = _AGAINST.value == "hf"
    if against_hf:  # the others need memory of the same GPU
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    _show(steps.measure(config, _WHAT.value, against_hf=against_hf, repeats=_REPEATS.value, secs=_SECS.value))
    return errors.EXIT_DONE


def _check_flags() -> None:
    is_input = _WHAT.value == "input"
    if _AGAINST.value and is_input != (_AGAINST.value == "torch"):
        raise errors.ConfigError(
            f"--against {_AGAINST.value} does not do --what {_WHAT.value}: torch is for input, hf for all else"
        )
    if _MINUTES.value and (not is_input or _AGAINST.value) and not _ACCELERATOR.value:
        raise errors.ConfigError("--minutes is for --what input without --against; leave it out, or the other")
    only = {"out": _OUT.value, "tiny": _TINY.value, "rows": _ROWS.value, "limits": _LIMITS.value}
    for name, value in only.items():
        if value and not _ACCELERATOR.value:
            raise errors.ConfigError(f"--{name} is for --accelerator; leave it out, or add that")
    if _SCALING.value and is_input:
        raise errors.ConfigError("--scaling measures models, and --what input has none; leave one out")


def _accelerator() -> int:
    """Checks and measures this accelerator."""
    if _AGAINST.value or _SCALING.value or cli.given_config() is not None:
        raise errors.ConfigError("--accelerator chooses its models itself: leave --config, --against and --scaling out")
    known = [row.name for row in accelerator.ROWS]
    limits = {}
    for word in _LIMITS.value:
        name, _, secs = word.partition("=")
        try:
            limits[name] = float(secs)
        except ValueError:
            raise errors.ConfigError(f"--limits has {word!r}; write ROW=SECONDS, as {known[0]}=30") from None
    for flag, names in (("rows", _ROWS.value), ("limits", limits)):
        for name in names:
            if name not in known:
                cure = f"{errors.nearest(name, known)} The rows: {', '.join(known)}"
                raise errors.ConfigError(f"--{flag}: there is no row {name!r}.{cure}")
    out = storage.local(cli.required(_OUT), "--out", "write to a local path and copy the result to the bucket")
    minutes = _MINUTES.value or _ACCELERATOR_MINUTES
    return accelerator.measure(Path(out), minutes=minutes, tiny=_TINY.value, names=_ROWS.value, limits=limits)


def _show(result: Result) -> None:
    if _JSON.value:
        print(json.dumps(result), flush=True)
        return
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:{width}}  {value:.4g}" if isinstance(value, float) else f"{name:{width}}  {value}", flush=True)


def _input(config: ConfigDict) -> int:
    """Measures the training input without a model."""
    if _MINUTES.value:
        for line in inputs.watch(config, _MINUTES.value):
            print(json.dumps(line), flush=True)
    else:
        against_torch = _AGAINST.value == "torch"
        _show(inputs.measure(config, against_torch=against_torch, repeats=_REPEATS.value, secs=_SECS.value))
    return errors.EXIT_DONE


def _variations(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """Yields what is changed, and field=value."""
    model, batch = config.model, config.global_batch_size
    height, width = model.image_size
    yield "as configured", f"global_batch_size={batch}"
    for size in (int(batch * 0.25), batch * 4):
        yield f"batch {size}", f"global_batch_size={size}"
    yield f"images {2 * height}x{2 * width}", f"model.image_size=({2 * height}, {2 * width})"
    yield f"width {2 * model.embed_dim}", f"model.embed_dim={2 * model.embed_dim}"
    yield f"depth {2 * model.depth}", f"model.depth={2 * model.depth}"
    for devices in sorted({1, cores.num_cores()}):
        yield f"{devices} CPU devices", f"cpu.devices={devices}"
    yield "in one microbatch", "cpu.pieces=1"


def _scaling(config: ConfigDict) -> int:
    """Prints a line for each variation."""
    given = [value for value in sys.argv[1:] if not value.startswith(("--scaling", "--json", "--against"))]
    first = None
    heads = f"{'images/s':>9} {'relative':>9} {'MFU':>6} {'memory MiB':>11} {'compile s':>10}  devices x microbatches"
    print(f"{'':18} {heads}")
    for name, change in _variations(config):
        command = [sys.executable, "-m", "mae_dist.benchmark", *given, f"--config.{change}", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name:18} {(done.stderr.strip().splitlines() or ['failed'])[-1]}", flush=True)
            continue
        r = json.loads(done.stdout.strip().splitlines()[-1])
        first = first or r["images_per_sec"]
        print(
            f"{name:18} {r['images_per_sec']:9.0f} {r['images_per_sec'] / first:9.2f} {r['mfu']:6.2f} "
            f"{r['peak_memory_mib']:11.0f} {r['compile_secs']:10.1f}  {r['devices']} x {r['pieces']}",
            flush=True,
        )
    return errors.EXIT_DONE


if __name__ == "__main__":
    cli.run(benchmark)
