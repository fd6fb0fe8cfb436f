"""Plans a training on hardware that is not here: whether it fits, and how fast it could be.

`python -m mae_dist.plan --config F --topology v5e:16x16 [--num_slices 2] [--global_batch_size B] [--fit] [--sweep]
[--json out.json] [--save step.bin] [--config.a.b=value …]` compiles the training's step for a TPU slice (extra `tpu`,
but no TPU) or for the CPU (`cpu:8`) and reports memory, exchanges and time. Exit code 0 if it fits, 1 if it does not.

A training on such devices loads what `--save` writes, by `--config.compiled_step=step.bin`, instead of compiling. The
file is code: let a training load none that others have written or could change.
"""

import json
import shlex
from collections.abc import Sequence

import jax
from absl import flags
from etils import epath

from mae_dist import cli, errors, readable, storage
from mae_dist.plan import fit, planning, topology
from mae_dist.plan.text import FIT_HEADER, fit_line, proposal, sweep_text, text
from mae_dist.training import saved_program

_TOPOLOGY = flags.DEFINE_string("topology", None, "What to plan for, as v5e:16x16, v4:4x4x4, v5p:2x2x2 or cpu:8.")
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "How many such slices.")
_BATCH = flags.DEFINE_integer("global_batch_size", None, "The same as --config.global_batch_size.")
_JSON = flags.DEFINE_string("json", None, "Also write everything to this file.", allow_override=True)
_SAVE = flags.DEFINE_string(
    "save",
    None,
    "Also write the compiled step to this file, for --config.compiled_step; may be gs://….",
    allow_override=True,
)
_FIT = flags.DEFINE_bool(
    "fit",
    None,
    "Search the mesh, what is recomputed, sharded state and exchange (default: where the config does not fit).",
)
_SWEEP = flags.DEFINE_bool("sweep", False, "Rank all meshes, and compile the best.")
_COMPILE = flags.DEFINE_integer(
    "compile", 3, "Compile --sweep's meshes until so many fit, at most three times as many.", lower_bound=0
)

_NOT_FITTING = 1  # shared with a traceback's; a plan that does not fit has none


def plan(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    del argv
    topology.use_no_accelerator()
    config = cli.given_config()
    if config is not None and _BATCH.value is not None:
        config.global_batch_size = _BATCH.value
    config = cli.needed_config()
    out = _new_file("json", storage.local(_JSON.value, "--json", "write to a local path")) if _JSON.value else None
    save = _new_file("save", storage.absolute(_SAVE.value)) if _SAVE.value else None
    if save is not None and _SWEEP.value:
        raise errors.ConfigError(f"--save={_SAVE.value} --sweep: plan the one mesh to save, without --sweep")
    if save is not None:  # what JAX takes from its cache lacks parts when it is serialized again
        jax.config.update("jax_enable_compilation_cache", False)
    place = topology.describe(cli.required(_TOPOLOGY), _NUM_SLICES.value)
    data = planning.described_data(config)
    steps: list[saved_program.Compilation] = []
    if _SWEEP.value:
        report = planning.sweep(config, place, data, _COMPILE.value)
        print(sweep_text(report))
    else:
        report = planning.examine(config, place, data, steps.append)
        print(text(report, place), flush=True)
        if _FIT.value or (_FIT.value is None and not report["fits"]):
            report["fit"] = found = []
            print(f"\n{FIT_HEADER}")
            for row in fit.search(config, place, data, report):
                found.append(row)
                print(fit_line(row), flush=True)
            print(proposal(found, fit.best(found)))
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if save is not None:
        _save(save, steps[0] if report["fits"] else None)
    return errors.EXIT_DONE if report["fits"] else _NOT_FITTING


def _new_file(flag: str, out: epath.Path) -> epath.Path:
    """Returns the path to write to; raises a `ConfigError` before minutes of compiling if no file can be there."""
    if storage.is_local(out) and (out.is_dir() or not out.parent.is_dir()):
        raise errors.ConfigError(
            f"--{flag}={out}: a file in a directory that exists is needed; mkdir -p it, or name another"
        )
    return out


def _save(path: epath.Path, step: saved_program.Compilation | None) -> None:
    """Writes the compiled step, None if it does not fit, and prints how a training takes it."""
    name = readable.path(path)
    if step is None:
        print(f"{name} is not written, because the step does not fit")
        return
    size = readable.num_bytes(saved_program.write(path, step))
    print(f"wrote the compiled step, {size}: train with --config.compiled_step={shlex.quote(name)}")


if __name__ == "__main__":
    cli.run(plan)
