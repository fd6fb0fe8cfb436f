"""Each way a command can end: its exit code, its message, what is saved.

Peers, deadlines and SIGTERM: test_preemption, test_watch. Ctrl-C and full disks: test_end_to_end.
"""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from absl.testing import flagsaver

from mae_dist import cli, errors
from mae_dist.resilience.preemption import Preempted, PreemptionSignals
from tests.runs import ONLY_UPDATES, ROOT, last_step, run

PROGRAM = "from mae_dist import cli\ndef entry(argv):\n    {}\ncli.run(entry)"
FAULT = "from mae_dist import errors; raise errors.{}('what is wrong')"


def outcome(body: str, redirect: str = "", **env: str) -> tuple[int, str]:
    """(exit code as of `subprocess`, all that was printed) of a command of ours with this body."""
    # Signals may be ignored where these tests run, as under nohup, and bash cannot undo that.
    command = [
        "env",
        "--default-signal",
        "bash",
        "-c",
        f'exec "$@" {redirect}',
        "bash",
        sys.executable,
        "-c",
        PROGRAM.format(body),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("return 0", errors.EXIT_DONE, ""),
        ("raise RuntimeError('a bug')", errors.EXIT_INTERNAL, "Traceback .*RuntimeError: a bug"),
        ("raise OSError(28, 'full')", errors.EXIT_INTERNAL, "Traceback .*full"),  # of no output: ours to tell of
        (FAULT.format("ConfigError"), errors.EXIT_CONFIG, "^error: what is wrong$"),
        (FAULT.format("DataFault"), errors.EXIT_DATA, "^error: what is wrong$"),
        (FAULT.format("Diverged"), errors.EXIT_DIVERGED, "^error: what is wrong$"),
        (FAULT.format("StorageFault"), errors.EXIT_STORAGE, "^error: what is wrong$"),
        *[
            (f"import os; cli.exit_on_signal(); os.kill(os.getpid(), {int(number)})", errors.EXIT_PREEMPTED, "nothing")
            for number in (signal.SIGTERM, signal.SIGHUP)  # to a training before and after it listens
        ],
        ("raise KeyboardInterrupt", errors.EXIT_INTERRUPTED, "^interrupted: the same command continues"),
        *[
            (f"import os; os.kill(os.getpid(), {int(number)}); import time; time.sleep(9)", -number, "")
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGABRT)
        ],
    ],
)
def test_codes_of_a_command(body, code, words):
    """The table of the guide: a fault is one line, a bug its traceback; a signal kills what has nothing to save."""
    found, output = outcome(body)
    assert found == code, output
    assert re.search(words, output.strip(), re.DOTALL), output


def test_done_while_a_thread_compiles():
    """As the online evaluation's does after a short run: Python's way to end aborted the process (134)."""
    body = (
        "import threading, time, jax, jax.numpy as jnp; "
        "layers = lambda x: [x := jnp.sin(x @ x) + i for i in range(300)][-1]; "
        "lowered = jax.jit(layers).lower(jnp.ones((16, 16))); "
        "threading.Thread(target=lowered.compile, daemon=True).start(); time.sleep(0.3); print('done'); return 0"
    )
    assert outcome(body) == (errors.EXIT_DONE, "done\n")


@pytest.mark.parametrize(
    ("redirect", "code", "printed"),
    [
        (">&-", 75, "err\n"),
        ("2>&-", 75, "out\n"),
        ("<&-", 75, "out\nerr\n"),
        ("<&- >&- 2>&-", 75, ""),
        (">/dev/full", errors.EXIT_STORAGE, "the output cannot be written: [Errno 28] No space left"),
        ("2>/dev/full", 75, "out\n"),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.long)])
def test_streams_that_are_closed_or_full(redirect, code, printed, unbuffered):
    """Closed ones are no fault: the command's own code; nothing else is opened under their numbers."""
    body = "import sys; from mae_dist.errors import say; print('out', flush=True); say('err'); return 75"
    found, output = outcome(body, redirect, PYTHONUNBUFFERED=unbuffered)
    assert found == code, output
    assert (printed in output) if code == errors.EXIT_STORAGE else (printed == output), output


# --- the config's own file

BASE = "from configs import smoke\ndef get_config():\n    config = smoke.get_config()\n    {}\n    return config\n"
FILES = {
    "an extra field": (
        BASE.format("with config.unlocked(): config.model.detph = 3"),
        r"line 4\)",
        r"model.detph does not exist. Did you mean 'depth'\?",
    ),
    "an extra field of a locked one": (BASE.format("config.model.detph = 3"), "line 4: ", "model.detph = 3"),
    "a missing field": (
        BASE.format("with config.unlocked(): del config.model.depth"),
        r"line 4\)",
        "model.depth is missing; its default is 3",
    ),
    "another type": (
        BASE.format("with config.ignore_type(): config.model.depth = 'two'"),
        r"line 4\)",
        "model.depth='two' is of type str, not int",
    ),
    "syntax": ("def get_config(:\n    pass\n", "line 1: ", "SyntaxError: invalid syntax"),
    "import": ("import no_such_module\n", "line 1: ", "No module named 'no_such_module'"),
    "an exception": (BASE.format("raise RuntimeError('no luck')"), "line 4: ", "RuntimeError: no luck"),
    "a value": (BASE.format("int('two')"), "line 4: ", "ValueError: invalid literal"),
    "no such file": (BASE.format("open('no such file')"), "line 4: ", "No such file or directory: 'no such file'"),
    "exit": (BASE.format("raise SystemExit(0)"), "line 4: ", "SystemExit: 0"),
    "no get_config": ("x = 1\n", "", "has no function get_config"),
    "no ConfigDict": ("def get_config():\n    return 3\n", "", "returns 3; it must be a ConfigDict"),
    "devices": (
        "import jax\n" + BASE.format("config.global_batch_size = 8 * jax.device_count()"),
        "line 5: ",
        "has used JAX's devices",
    ),
}


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of config_flags
def test_fault_in_a_config_file(tmp_path, monkeypatch, capfd, name):
    """Code 2 and one message with the file and the line: a launcher stops at once."""
    text, line, words = FILES[name]
    path = tmp_path / "mine.py"
    path.write_text(text)
    argv = ["main", f"--config={path}"]
    monkeypatch.setattr(sys, "argv", argv)  # config_flags looks for overrides there
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # else it is loaded over the one before

    def command() -> int:
        cli.parse_flags(argv)
        cli.join_processes()  # in this process JAX has its devices, as after such a config
        return 0

    with flagsaver.flagsaver():
        assert errors.exit_code_of(command) == errors.EXIT_CONFIG
    printed = capfd.readouterr().err
    assert re.search(f"mine.py.*{line}", printed, re.DOTALL), printed
    assert re.search(words, printed), printed
    assert "Traceback" not in printed


# --- a training

LONG = (
    "--config=configs/smoke.py",
    *ONLY_UPDATES,
    "--config.total_steps=100000",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=0",
)


@pytest.mark.long
def test_a_closed_terminal(child_env, tmp_path):
    """It takes SIGHUP as a preemption signal, although nothing can be printed any more: all is saved."""
    workdir = tmp_path / "run"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            "setsid",
            "--ctty",
            "env",
            "--default-signal",
            sys.executable,
            "-m",
            "mae_dist.main",
            *LONG,
            f"--workdir={workdir}",
        ],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        cwd=ROOT,
        env=child_env(),
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    deadline = time.monotonic() + 120
    try:
        while last_step(workdir) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            try:
                os.read(ours, 100_000)  # a full terminal holds the process up
            except BlockingIOError:
                time.sleep(0.01)
        os.close(ours)
        assert process.wait(timeout=60) == errors.EXIT_PREEMPTED
    finally:
        process.kill()
    assert (workdir / "checkpoints" / str(last_step(workdir))).is_dir()


def test_hangup_is_a_notice_unless_it_is_ignored():
    """Under nohup a training goes on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        preemption = PreemptionSignals()
        with preemption.handling(""), pytest.raises(Preempted), preemption.interrupting():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(5)
        assert preemption.poll()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        preemption = PreemptionSignals()
        with preemption.handling(""), preemption.interrupting():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
        assert not preemption.poll()
    finally:
        signal.signal(signal.SIGHUP, before)


WATCH = """if True:
    import os, signal, time
    from mae_dist.resilience.watchdog import Watchdog
    limits = ('start', 'step', 'data', 'checkpoint', 'evaluate', 'peer')
    with Watchdog(**{{f'{{name}}_secs': 1800.0 for name in limits}}) as watchdog:
        watchdog.expect_peers(lambda: {address!r})
        with watchdog.during({phase!r}):
            {body}
            print('went on')
"""


@pytest.mark.parametrize(
    ("address", "phase", "body", "code", "words"),
    [
        ("", "step", "os.kill(os.getpid(), signal.SIGABRT); time.sleep(5)", -signal.SIGABRT, "Fatal Python error"),
        ("", "join", "os.abort()", -signal.SIGABRT, "Fatal Python error"),  # as where devices get no memory
        ("127.0.0.1:1", "join", "os.abort()", errors.EXIT_PEER_LOST, "error: lost process 0, which coordinates"),
    ],
)
def test_abort(address, phase, body, code, words):
    """It ends the process, by that signal, unless it comes of a peer that is gone."""
    program = WATCH.format(address=address, phase=phase, body=body)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    found, output = done.returncode, done.stdout + done.stderr
    assert found == code, output
    assert words in output
    assert "went on" not in output
    assert "not all processes came" not in output


# --- the tables


@pytest.mark.parametrize("name", ["docs/preemption.md", "BUILD.md"])
def test_every_code_is_documented(name):
    """Once, and no other."""
    _, table = re.split(r"^\| (?:Exit code|Code) \| (?=Meaning|`mae)", (ROOT / name).read_text(), flags=re.MULTILINE)
    codes = [str(value) for key, value in vars(errors).items() if key.startswith("EXIT_")]
    rows = re.findall(r"^\| (\d+|128 \+ n) \|", table.partition("\n\n")[0], re.MULTILINE)
    assert sorted(rows) == sorted([*codes, "128 + n"])


def test_launchers_agree():
    """What would come again stops, what was saved continues."""
    stop = "2 | 3 | 4 | 5)"
    assert stop in (ROOT / "launch/gcp.sh").read_text()
    assert "values: [2, 3, 4, 5]" in (ROOT / "launch/gke_jobset.yaml").read_text()
    assert "75 | 76 | 77 | 143)" in (ROOT / "launch/slurm.sbatch").read_text()


# --- what is recorded stays


@pytest.mark.long
def test_nothing_recorded_is_replaced_by_less(child_env, tmp_path):
    """A finished run asked for less, or that lost records or checkpoints: refused or left alone; made longer: kept."""
    workdir = tmp_path / "run"
    args = ("--config=configs/smoke.py", *ONLY_UPDATES, "--config.log_every_steps=1", f"--workdir={workdir}")

    def contents(*left_out: str) -> dict[str, bytes]:
        files = [path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"]
        return {str(path.relative_to(workdir)): path.read_bytes() for path in files if path.name not in left_out}

    code, output = run(child_env(), *args, "--config.total_steps=6")
    assert code == 0, output
    before = contents()
    code, output = run(child_env(), *args, "--config.total_steps=4")
    assert (code, "is trained to step 6 already, beyond total_steps=4" in output) == (5, True), output
    assert contents() == before

    (workdir / "metrics.jsonl").unlink()
    code, output = run(child_env(), *args, "--config.total_steps=6")
    assert code == 0, output
    assert "smoke: step 6 of 6, loss " in output
    assert contents("metrics.jsonl") == {name: data for name, data in before.items() if name != "metrics.jsonl"}

    code, output = run(child_env(), *args, "--config.total_steps=8")
    assert code == 0, output
    assert "metrics.jsonl ends at step 0 and the checkpoint is of step 6: the records between them are lost" in output
    [kept] = workdir.glob("summary_*.json")
    assert kept.read_bytes() == before["summary.json"]
    assert f"is kept as {kept.name}" in output

    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").mkdir()
    before = contents()
    code, output = run(child_env(), *args, "--config.total_steps=8")
    assert (code, "is empty, but the run there has saved step 8 and left summary.json" in output) == (5, True), output
    assert contents() == before
