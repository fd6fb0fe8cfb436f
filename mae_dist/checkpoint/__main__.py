"""Verifies and lists the checkpoints of a run: `python -m mae_dist.checkpoint verify|list|rm-quarantine WORKDIR`."""

import argparse
import sys
from collections.abc import Sequence

from mae_dist import console, errors
from mae_dist.checkpoint import digests, reader
from mae_dist.checkpoint.manifests import Manifests
from mae_dist.errors import StorageFault
from mae_dist.storage import absolute, check_checkpoints


def command(argv: Sequence[str]) -> int:
    """Runs `verify`, `list` or `rm-quarantine`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mae_dist.checkpoint", description="Looks after checkpoints.")
    parser.add_argument("what", choices=("verify", "list", "rm-quarantine"))
    parser.add_argument("workdir", help="of the run; its processes may be running")
    console.check_arguments(argv)
    given = parser.parse_args(argv)
    workdir = absolute(given.workdir)
    check_checkpoints(workdir, saving=False)
    manifests, directory = Manifests(workdir), workdir / "checkpoints"
    if not (directory.exists() or (given.what == "rm-quarantine" and manifests.quarantined())):
        raise StorageFault(
            f"{directory} does not exist: {workdir} is not the workdir of a run that has saved; correct it"
        )
    if given.what == "rm-quarantine":
        print(f"{manifests.empty_quarantine()} checkpoints deleted from quarantine")
        return errors.EXIT_DONE
    steps, are_good = reader.steps(workdir), True
    for step in steps:
        sizes = [file.stat().length for file in digests.files(directory / str(step))]
        manifest = "with manifest" if manifests.has(step) else "no manifest"
        line = f"{step:>10}  {sum(sizes) / 2**20:8.1f} MiB  {len(sizes):4} files  {manifest}"
        if given.what == "verify":
            faults = reader.condition(workdir, step)
            are_good &= not faults
            line += "  CORRUPTED: " + "; ".join(faults[:5]) if faults else "  good"
        print(line, flush=True)
    for name, reason in manifests.quarantined().items():
        print(f"{name:>10}  in quarantine: {reason}")
    if not steps:
        print(f"{directory} is empty")
    return errors.EXIT_DONE if are_good else errors.EXIT_STORAGE


if __name__ == "__main__":
    errors.open_closed_streams()
    console.set_up()
    sys.exit(errors.exit_code_of(lambda: command(sys.argv[1:])))
