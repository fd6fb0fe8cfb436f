"""What a person sees of a training: on a terminal of 80 columns, and in a log file."""

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

import mae_dist
from mae_dist import readable
from mae_dist.training.text import next_commands
from tests.runs import ROOT, records, run

COLUMNS = 80
ARGS = (
    "--config=smoke",
    "--config.task=finetune",
    "--config.model.depth=1",
    "--config.total_steps=8",
    "--config.log_every_steps=2",
    "--config.eval.every_steps=4",
)
GARBAGE = re.compile(r"[IWE]\d{4} |\w\.py:\d+|Setting work unit|Got images|val_top1/|grad_norm|encoder/norm")


def run_on_terminal(env: dict[str, str], directory: Path, *args: str) -> tuple[int, str]:
    """Runs a training in `directory` on a pseudo-terminal: (exit code, all that it received)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    command = [sys.executable, "-m", "mae_dist.main", *args]
    process = subprocess.Popen(command, cwd=directory, env={**env, "PYTHONPATH": str(ROOT)}, **streams)
    os.close(theirs)
    try:
        received = b"".join(_chunks(ours))
        return process.wait(timeout=60), received.decode()
    finally:
        process.kill()
        os.close(ours)


def _chunks(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            yield os.read(terminal, 65_536)
        except OSError:  # nobody has it open any more
            return


@pytest.fixture(scope="module")
def shown(child_env, tmp_path_factory) -> tuple[Path, str]:
    """A short training on a terminal, with a preemption: its directory, and what the terminal received."""
    directory = tmp_path_factory.mktemp("terminal")
    code, received = run_on_terminal(child_env(), directory, *ARGS, "--simulate_preemption_at_step=6")
    assert code == 75, received
    return directory, received


def test_a_terminal(shown):
    """A short start; the bar, with lines above it that it does not tear; nothing is wider than the terminal."""
    _, received = shown
    lines = received.replace("\r\n", "\n").split("\n")
    # What stands between two carriage returns was on the screen at once.
    seen = [text.removeprefix("\033[K").rstrip() for line in lines for text in line.split("\r")]
    assert max(map(len, seen)) <= COLUMNS
    assert not GARBAGE.search(received)
    left = [line.rsplit("\r", 1)[-1].removeprefix("\033[K").rstrip() for line in lines]
    start, rest = left[: left.index("Beginning a new run")], left[left.index("Beginning a new run") + 1 :]
    assert [line.split()[0] for line in start] == ["smoke:", "devices:", "data:", "model:", "schedule:"]
    assert start[0] == "smoke: finetune in runs/smoke"
    assert "410 train, 102 val, 102 test images of 16x16x3, 10 classes" in start[2]
    assert "compiling the training step …" in seen
    patterns = (
        r"Compiled; the first step was done after [\d.]+ s",
        r"step 4  val_loss \d\.\d+  val_top1 \d\.\d+  val_top5 \d\.\d+",
        r"preempted \(SIGTERM\): saving after this step",
        r" ?\d+ %\|.*\| step \d of 8, loss \d\.\d+, [\d,.]+ images/s, ETA [\d.]+ s",
        r"warning: Preempted: saved step 6; the same command continues from it.",
        "",
    )
    assert len(rest) == len(patterns), rest
    for line, pattern in zip(rest, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_a_log_file(shown, child_env):
    """The same command continues, into a pipe: one line per log step with the time of day, no bar; what comes next."""
    directory, _ = shown
    workdir = directory / "runs" / "smoke"
    code, output = run(child_env(), *ARGS, f"--workdir={workdir}")
    assert code == 0, output
    assert not GARBAGE.search(output)
    assert "\r" not in output
    figures = r"loss \d\.\d+  [\d,.]+ images/s  data wait [\d.]+ %"
    patterns = (
        rf"[\d:]{{8}} smoke: finetune in {re.escape(str(workdir))}",
        *(rf"[\d:]{{8}}   {name}: .*" for name in ("devices", "data", "model", "schedule")),
        r"[\d:]{8} Compiling the training step",
        r"[\d:]{8} Continuing from step 6 \(restored in [\d.]+ s\)",
        r"[\d:]{8} Compiled; the first step was done after [\d.]+ s",
        rf"[\d:]{{8}} step 8 of 8  {figures}",
        r"[\d:]{8} step 8  val_loss \d\.\d+  val_top1 \d\.\d+  val_top5 \d\.\d+",
        r"[\d:]{8} step 8  test_loss \d\.\d+  test_top1 \d\.\d+  test_top5 \d\.\d+",
        r"smoke: step 8 of 8, loss \d\.\d+, test_loss \d\.\d+, test_top1 \d\.\d+, [\d,.]+ images/s",
        "next:",
        rf"  \S+ -m mae_dist\.predict --workdir {re.escape(str(workdir))} --images DIRECTORY --out classes\.csv",
        rf"  \S+ -m mae_dist\.report {re.escape(str(workdir))} --out report\.html",
    )
    lines = output.splitlines()
    assert len(lines) == len(patterns), output
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    assert sum(name.startswith("val_top1/") for name in records(workdir)[-1]) == 10
    assert (workdir / "overview.txt").read_text().startswith("mesh: data=1 x fsdp=1 x tensor=1 (1 devices)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (readable.number(0.242337), "0.2423"),
        (readable.number(0.5), "0.5000"),
        (readable.number(42_213.0), "42,210"),
        (readable.number(999.96), "1,000"),
        (readable.number(float("nan")), "nan"),
        (readable.count(1_213), "1,213"),
        (readable.percent(0.0312), "3.1 %"),
        (readable.duration(0.26), "0.3 s"),
        (readable.duration(59.6), "1 min 00 s"),
        (readable.duration(3_900), "1 h 05 min"),
        (readable.duration(183_600), "2 d 03 h"),
        (readable.num_bytes(556_048), "543 KiB"),
        (readable.path(os.path.join(os.getcwd(), "runs", "a")), "runs/a"),
        (readable.path("/elsewhere/runs"), "/elsewhere/runs"),
        (readable.path("gs://bucket/run"), "gs://bucket/run"),
        (readable.wrapped(["step 1", "loss 0.5", "top1 0.25"], "  ", 16), "step 1  loss 0.5\n  top1 0.25"),
        (readable.command(["python", "-m", "a", "'two words'"], 16), "python -m a \\\n    'two words'"),
    ],
)
def test_figures(text: str, expected: str) -> None:
    assert text == expected


def test_messages_of_other_modules(tmp_path: Path) -> None:
    """Users' modules are heard, and libraries' warnings; not libraries' INFO, and nothing twice."""
    library = tmp_path / "site-packages" / "a_library.py"
    library.parent.mkdir()
    library.write_text(
        "import logging\nlogging.info('set up')  # adds a handler\n\ndef log(level): logging.log(level, 'library')"
    )
    program = """if True:
        import logging
        import warnings
        import a_library
        from mae_dist import cli

        def entry(argv):
            logging.getLogger("mine").info("mine")
            a_library.log(logging.INFO)
            a_library.log(logging.WARNING)
            warnings.warn("take care")
            return 0

        cli.run(entry)
    """
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{library.parent}"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True)
    found = [re.sub(r"^[\d:]{8} ", "", line) for line in done.stderr.splitlines()]
    assert found == ["mine", "warning: library", "warning: <string>:11: UserWarning: take care"]


@pytest.mark.parametrize(
    ("name", "data", "workdir", "expected"),
    [
        ("quickstart", {}, "runs/quickstart", ["--config quickstart_probe"]),
        ("imagenet_vit_b16", {}, "gs://b/r", ["--config imagenet_vit_b16_linear --config.init_from=gs://b/r"]),
        ("cifar_small", {}, "/a b", ["--config cifar_small_probe '--config.init_from=/a b'"]),
        ("folder", {"data_dir": "/photos"}, "runs/folder", []),  # no labels
        (
            "folder",
            {"data_dir": "/photos", "labels": "csv:/l.csv"},
            "runs/folder",
            ["--config folder_finetune --config.data.data_dir=/photos --config.data.labels=csv:/l.csv"],
        ),
        ("smoke", {}, "runs/smoke", []),  # no such config comes with us
    ],
)
def test_the_classifier_that_fits_a_pretraining(
    name: str, data: dict[str, str], workdir: str, expected: list[str]
) -> None:
    config = mae_dist.get_config(name)
    with config.unlocked():
        config.data.update(data)
    reconstruct, *found, report = (" ".join(words[1:]) for words in next_commands(config, workdir))
    quoted = shlex.quote(workdir)
    assert reconstruct == f"-m mae_dist.reconstruct --workdir {quoted}"
    assert found == [f"-m mae_dist.main {arguments}" for arguments in expected]
    assert report == f"-m mae_dist.report {quoted} --out report.html"


def test_no_classifier_of_another_model() -> None:
    """The probe that comes with us would refuse its weights."""
    config = mae_dist.get_config("quickstart")
    with config.unlocked():
        config.model.depth += 1
    assert len(next_commands(config, "runs/quickstart")) == 2
