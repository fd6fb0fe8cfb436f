"""Which version of this package runs."""

import functools
import subprocess
from pathlib import Path

import mae_dist


@functools.cache
def commit() -> str:
    """Returns the commit of the clone that this package is in, "-dirty" with changes; "" where it is installed."""
    git = ["git", "-C", str(Path(mae_dist.__file__).parent)]
    commands = (
        ["ls-files", "--error-unmatch", "__init__.py"],  # fails in another project's clone
        ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    )
    try:
        done = [
            subprocess.run([*git, *command], capture_output=True, text=True, check=True, timeout=10)
            for command in commands
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return done[-1].stdout.strip()


def described() -> str:
    """Returns the version, and the commit where it is known."""
    return f"{mae_dist.__version__}, commit {found}" if (found := commit()) else mae_dist.__version__
