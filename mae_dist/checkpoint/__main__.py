"""Looks after the checkpoints of a run: `python -m mae_dist.checkpoint verify|list|rm-quarantine WORKDIR`."""

import argparse
import sys
from collections.abc import Sequence

from mae_dist import console, errors
from mae_dist.checkpoint import digests as integrity
from mae_dist.checkpoint import reader
from mae_dist.checkpoint.manifests import Seals
from mae_dist.errors import StorageFault
from mae_dist.storage import absolute, check_checkpoints


def command(argv: Sequence[str]) -> int:
    """Runs `verify`, `list` or `rm-quarantine`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mae_dist.checkpoint", description="Looks after a run's checkpoints."
    )
    parser.add_argument("what", choices=("verify", "list", "rm-quarantine"))
    parser.add_argument("workdir", help="of the run; its processes may be running")
    console.check_arguments(argv)
    given = parser.parse_args(argv)
    workdir = absolute(given.workdir)
    check_checkpoints(workdir, saving=False)
    seals, directory = Seals(workdir), workdir / "checkpoints"
    if not (directory.exists() or (given.what == "rm-quarantine" and seals.quarantined())):
        raise StorageFault(
            f"{directory} does not exist: {workdir} is not the workdir of a run that has saved; correct it"
        )
    if given.what == "rm-quarantine":
        print(f"{seals.empty_quarantine()} checkpoints deleted from quarantine")
        return errors.EXIT_DONE
    steps = reader.steps(workdir)
    faults = 0
    for step in steps:
        path = directory / str(step)
        files = list(integrity.files(path))
        sealed = "sealed" if seals.has(step) else "not sealed"
        line = (
            f"{step:>10}  {sum(file.stat().length for file in files) / 2**20:8.1f} MiB  {len(files):4} files  {sealed}"
        )
        if given.what == "verify":
            lines = reader.condition(workdir, step)
            faults += bool(lines)
            line += "  DAMAGED: " + "; ".join(lines[:5]) if lines else "  good"
        print(line, flush=True)
    for name, reason in seals.quarantined().items():
        print(f"{name:>10}  in quarantine: {reason}")
    if not steps:
        print(f"{directory} is empty")
    return errors.EXIT_STORAGE if faults else errors.EXIT_DONE


if __name__ == "__main__":
    errors.open_closed_streams()
    console.set_up()
    sys.exit(errors.exit_code_of(lambda: command(sys.argv[1:])))
