"""Runs a command by its name: `mae-dist COMMAND …`."""

import runpy
import sys

from mae_dist import errors

# Name -> its module, imported only when it is chosen, and what it does.
COMMANDS = {
    "train": ("mae_dist.main", "Trains what a config describes, or continues it."),
    "main": ("mae_dist.main", "The same, by its module's name."),
    "reconstruct": ("mae_dist.reconstruct", "Draws what a pretraining has learned to restore."),
    "features": ("mae_dist.features", "Computes the features of images by a trained encoder."),
    "predict": ("mae_dist.predict", "Classifies images by a fine-tuned model or a probe."),
    "knn": ("mae_dist.knn", "Finds the images most like others; measures features by nearest neighbours and ridge."),
    "convert": ("mae_dist.convert", "Converts weights from and to the layouts of others."),
    "export": ("mae_dist.export", "Writes an encoder as a file that runs without this package."),
    "report": ("mae_dist.report", "Writes a page about runs: curves, tables, pictures."),
    "sweep": ("mae_dist.sweep", "Trains a grid of configs and seeds, and tabulates the results."),
    "plan": ("mae_dist.plan", "Computes memory and time of a training on chips that are not here."),
    "benchmark": ("mae_dist.benchmark", "Measures the speed of a training's step, or of its input."),
    "prepare": ("mae_dist.prepare", "Turns archives and folders of images into TFDS data sets."),
    "checkpoint": ("mae_dist.checkpoint", "Lists, verifies and cleans the checkpoints of a run."),
}


def main() -> None:
    """Runs the command that the command line names, as `python -m` runs its module."""
    given = sys.argv[1] if len(sys.argv) > 1 else ""
    if given not in COMMANDS:
        sys.exit(errors.exit_code_of(lambda: _answer(given)))
    del sys.argv[1]
    runpy.run_module(COMMANDS[given][0], run_name="__main__", alter_sys=True)


def _answer(given: str) -> int:
    """Lists the commands; for what is none a `ConfigError`."""
    if given and given not in ("--help", "-h", "help"):
        raise errors.ConfigError(
            f"there is no command {given!r}.{errors.nearest(given, COMMANDS)} The commands: {', '.join(COMMANDS)}"
        )
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    print("usage: mae-dist COMMAND …     (or python -m mae_dist COMMAND …)\n", *lines, sep="\n")
    print("\nmae-dist COMMAND --help shows the flags of a command.")
    return errors.EXIT_DONE if given else errors.EXIT_CONFIG


if __name__ == "__main__":
    main()
