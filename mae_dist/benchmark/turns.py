"""Measurement by turns: each subject runs while the others are stopped, and every figure is a median over the turns."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mae_dist.errors import ConfigError, DataFault

Result = dict[str, Any]


class Subject(Protocol):
    def run(self, count: int) -> float:
        """Returns the seconds that `count` batches take."""
        ...

    def close(self) -> None: ...


class Child:
    """A subject in a process group of its own, which is stopped except during its turns.

    The program reads its options as a line of JSON and prints `ready` after its first batch. For each further line, a
    number of batches, it prints the seconds that they took.
    """

    def __init__(self, name: str, program: Sequence[str], options: Mapping[str, object]):
        """Starts `python <program>`.

        Raises:
          DataFault: it ended before its first batch.
        """
        self.name = name
        # If this process dies, the kernel continues the stopped group and hangs up.
        self.process = subprocess.Popen(
            [sys.executable, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        # Options are not an argument, which holds 128 KiB: ImageNet's files have long names.
        if not self._ask(json.dumps(options)).startswith("ready"):
            raise DataFault(f"{name} ended with code {self.process.wait()} before its first batch; it said why above")
        self._signal(signal.SIGSTOP)

    def run(self, count: int) -> float:
        self._signal(signal.SIGCONT)
        secs = self._ask(str(count))
        self._signal(signal.SIGSTOP)
        if not secs:
            raise DataFault(f"{self.name} ended with code {self.process.wait()}; it said why above")
        return float(secs)

    def memory_mib(self) -> Result:
        """Returns the largest peak of a process and of a worker, and the memory of all, counting shared pages once."""
        peaks, total = {}, 0.0
        for process in processes_of(self.process.pid):
            with contextlib.suppress(OSError):  # it ended meanwhile
                peaks[process] = _kib(process, "status", "VmHWM") / 2**10
                total += _kib(process, "smaps_rollup", "Pss") / 2**10
        main = peaks.pop(self.process.pid, 0.0)
        return {"main_peak_mib": main, "worker_peak_mib": max(peaks.values(), default=0.0), "total_mib": total}

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self.process.communicate()

    def _ask(self, line: str) -> str:
        """Returns the answer to a line; "" if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        return self.process.stdout.readline()

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


def processes_of(number: int, number_of: Callable[[int], int] = os.getpgid) -> Iterator[int]:
    """Yields the processes of a group, or by `os.getsid` of a session, where the system has /proc."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if number_of(int(path.name)) == number:
                yield int(path.name)


def _kib(process: int, file: str, field: str) -> int:
    lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def comparator(name: str) -> str:
    """Returns the file of a program in PyTorch to compare with; a `ConfigError` where it is not installed."""
    file = Path(__file__).parents[2] / "tests" / "comparators" / f"{name}.py"
    if not file.exists():
        raise ConfigError(
            f"--against needs {file}, which is in a clone and not in the installed package: clone the repository, "
            "install it there (pip install -e .[parity]), and run the same command"
        )
    return str(file)


def num_batches(subject: Subject, secs: float) -> int:
    """Returns how many batches take about `secs` seconds."""
    return max(1, round(secs / subject.run(2) * 2))


def compare(subjects: Mapping[str, Subject], batch_size: int, repeats: int, secs: float) -> Result:
    """Returns medians of the images per second of each subject, and the first one's ratio to the fastest other.

    The subjects take `repeats` turns of about `secs` seconds; ratios are those of each turn.
    """
    counts = {name: num_batches(subject, secs) for name, subject in subjects.items()}
    rates: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(repeats):
        for name, subject in subjects.items():
            rates[name].append(counts[name] * batch_size / subject.run(counts[name]))
    (_, own), *others = rates.items()
    rate = statistics.median(own)
    result = {"images_per_sec": rate, "spread": (max(own) - min(own)) / rate, "repeats": repeats}
    for name, values in others:
        result[f"{name}_images_per_sec"] = statistics.median(values)
    if others:
        ratios = [mine / max(theirs) for mine, *theirs in zip(*rates.values(), strict=True)]
        result |= {"ratio": statistics.median(ratios), "ratio_spread": f"{min(ratios):.3g} to {max(ratios):.3g}"}
    return result
