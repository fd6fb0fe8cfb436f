"""Checks this accelerator and measures its speed: `mae_dist.benchmark --accelerator`.

Each row is a process of its own with a time limit: one that fails, hangs or crashes is a row with its reason and ends
no other. Correctness is checked first, then speeds are measured, the most important rows first; what the time does not
allow is left out and named. Both files are written after every figure, because the machine may be taken away.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mae_dist
from mae_dist import errors
from mae_dist.benchmark import table
from mae_dist.benchmark.turns import Result, processes_of
from mae_dist.cpu.cores import num_cores


@dataclasses.dataclass(frozen=True)
class Row:
    """One process.

    Attributes:
      name: of the row, for `row.ROWS`.
      secs: about what it takes; it is ended after twice that, and not begun where less time is left.
      title: what it shows.
      checks: True if it checks results, False if it measures speed.
    """

    name: str
    secs: float
    title: str
    checks: bool = False


DEVICE = Row("device", 30, "the machine")
ROWS = (
    Row("gradients", 60, "ViT-B/16: loss and gradients as on a CPU, in float32, default precision and bfloat16", True),
    Row("attention", 40, "fused attention, forward and backward, as plain attention", True),
    Row("resume", 60, "a training killed (SIGKILL) and resumed, against an undisturbed one", True),
    Row("to_cpu", 60, "a checkpoint of the accelerator, evaluated and continued on the CPU", True),
    Row("training", 40, "20 steps give the losses of a CPU; several devices those of one", True),
    Row("remat", 60, "remat none, dots and blocks, with and without scan, give the same gradients", True),
    Row("resume_deterministic", 60, "as resume, with XLA's deterministic operations of GPUs", True),
    Row("vit_b16", 60, "ViT-B/16, training steps by batch size"),
    Row("hf_b16", 90, "ViT-B/16, by turns with Hugging Face's ViTMAE in PyTorch"),
    Row("vit_l16", 60, "ViT-L/16, training steps by batch size"),
    Row("vit_h14", 70, "ViT-H/14, training steps by batch size"),
    Row("vit_s16", 50, "ViT-S/16, training steps by batch size"),
    Row("input_b16", 60, "ViT-B/16, training steps fed with JPEGs, and the input alone"),
    Row("hf_l16", 90, "ViT-L/16, by turns with Hugging Face's ViTMAE in PyTorch"),
)


def measure(out: Path, *, minutes: float, tiny: bool | None, names: Sequence[str], limits: Mapping[str, float]) -> int:
    """Fills `out` with accelerator.json, accelerator.md and the logs of all rows; returns the exit code.

    Args:
      out: a directory, made if it does not exist.
      minutes: for all rows together.
      tiny: True for tiny models, None for tiny ones on a CPU only.
      names: of the rows to run; none for all.
      limits: seconds after which rows of these names are ended.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends what was started
    rows = [row for row in ROWS if not names or row.name in names]
    interrupted = False
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mae_dist_") as scratch:
        runner = _Runner(out, Path(scratch), time.monotonic() + 60 * minutes, limits)
        try:
            runner.run_device(tiny)
            workers = 1
            if runner.result["device"].get("platform") == "gpu":  # a TPU has one process at a time
                workers = max(1, min(3, num_cores() // 4))
            # Results do not depend on what else runs, and speeds do.
            runner.run_all([row for row in rows if row.checks], workers)
            runner.run_all([row for row in rows if not row.checks], 1)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            runner.end_all()
    if not runner.result["device"]:
        return errors.EXIT_INTERRUPTED
    print(f"\n{table.markdown(runner.result)}", flush=True)
    failed = [name for name, row in runner.result["rows"].items() if row["checks"] and row["status"] == "failed"]
    if failed:
        errors.say(f"error: {', '.join(failed)} failed on this accelerator: see {out / 'logs'}, and please report it")
    if interrupted:
        return errors.EXIT_INTERRUPTED
    return errors.EXIT_INTERNAL if failed else errors.EXIT_DONE


class _Runner:
    """Runs rows, and keeps accelerator.json."""

    def __init__(self, out: Path, scratch: Path, end: float, limits: Mapping[str, float]):
        self.out, self.scratch, self.end, self.limits = out, scratch, end, limits
        self.lock = threading.Lock()
        self.running: list[subprocess.Popen[str]] = []
        self.result: Result = {
            "version": mae_dist.__version__,
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "device": {},
            "rows": {},
        }

    def run_device(self, tiny: bool | None) -> None:
        """Finds out what the machine is, and so whether the models are tiny."""
        self.result["tiny"] = bool(tiny)
        found = self._run(DEVICE, min(self.limits.get("device", 120.0), self.end - time.monotonic()))
        if found["status"] == "failed":
            raise errors.DataFault(f"JAX finds no device: {found['reason']} ({self.out / 'logs' / 'device.log'})")
        del self.result["rows"]["device"]
        self.result["device"] = found["figures"]
        self.result["tiny"] = tiny if tiny is not None else found["figures"]["platform"] == "cpu"
        self._write()

    def run_all(self, rows: Sequence[Row], workers: int) -> None:
        """Runs rows in order, at most `workers` at a time."""
        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(self._run_in_time, rows))
            except BaseException:
                self.end_all()  # the pool waits for what runs
                raise

    def _run_in_time(self, row: Row) -> None:
        """Runs a row if there is time for it."""
        left = self.end - time.monotonic()
        limit = self.limits.get(row.name, 2 * row.secs)
        if left < min(row.secs, limit):
            reason = f"{max(0.0, left):.0f} s were left, and it takes about {row.secs:.0f}: give more --minutes"
            found = self._update(row, status="not run", reason=reason)
        else:
            found = self._run(row, min(limit, left))
        print(f"{row.name:20} {found['status']:8} {found['secs']:4.0f} s  {found['reason']}", flush=True)

    def _run(self, row: Row, limit: float) -> Result:
        """Runs a row's process to its end or to the limit."""
        began = time.monotonic()
        self._update(row, status="running")
        options = {
            "name": row.name,
            "platform": self.result["device"].get("platform", ""),
            "tiny": self.result["tiny"],
            "secs": limit,
            "scratch": str(self.scratch),
        }
        log = self.out / "logs" / f"{row.name}.log"
        figures: Result = {}
        last: Result = {}
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "mae_dist.benchmark.row"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=self._env(row),
                start_new_session=True,
            )
            with self.lock:
                self.running.append(process)
            too_long = threading.Timer(limit, _end, [process])
            too_long.start()
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(options) + "\n")
                process.stdin.close()
                for line in process.stdout:
                    last = json.loads(line)
                    figures.update(last.get("figures", {}))
                    self._update(row, status="running", figures=figures, secs=time.monotonic() - began)
            except BrokenPipeError:  # it was ended before it read its options
                pass
            finally:
                code = process.wait()
                too_long.cancel()
                _end(process)  # what it has started
        status, reason = last.get("status"), last.get("reason", "")
        secs = time.monotonic() - began
        if status is None:
            status, reason = "failed", f"ended with code {code}: {_last_line(log)}"
            if secs >= limit:
                reason = f"stopped after its limit of {limit:g} s"
            elif not self.end:
                status, reason = "not run", "interrupted"
        elif status == "done":
            status = "failed" if figures.get("faults") else "passed" if row.checks else "measured"
            reason = "; ".join(figures.get("faults", []))
        return self._update(row, status=status, reason=reason, figures=figures, secs=secs)

    def _env(self, row: Row) -> dict[str, str]:
        """Returns the environment of a row's process; what the user has set stays."""
        env = dict(os.environ)
        env.setdefault("JAX_COMPILATION_CACHE_DIR", str(self.scratch / "compiled"))
        env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        if self.result["tiny"] and self.result["device"].get("platform") == "cpu":  # compiling is all that takes time
            env["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {env.get('XLA_FLAGS', '')}".strip()
            env.setdefault("TORCHDYNAMO_DISABLE", "1")
        # A sweep over batch sizes takes the memory at once. Others share it with processes beside them.
        if not row.name.startswith("vit_"):
            env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
        platforms = env.get("JAX_PLATFORMS", "")
        if platforms and "cpu" not in platforms.split(","):
            env["JAX_PLATFORMS"] = f"{platforms},cpu"  # what results are compared with
        return env

    def _update(self, row: Row, **fields: Any) -> Result:
        with self.lock:
            found = {"title": row.title, "checks": row.checks, "secs": 0.0, "reason": "", "figures": {}, **fields}
            self.result["rows"][row.name] = found
        self._write()
        return found

    def _write(self) -> None:
        with self.lock:
            path = self.out / "accelerator.json"
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.result, indent=1), encoding="utf-8")
            temporary.replace(path)
            if self.result["device"]:
                (self.out / "accelerator.md").write_text(table.markdown(self.result), encoding="utf-8")

    def end_all(self) -> None:
        """Ends every process that still runs, and lets none begin."""
        self.end = 0.0
        with self.lock:
            running, self.running = self.running, []
        for process in running:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Kills a row's process and all that it has started, which are its session."""
    for number in {process.pid, *processes_of(process.pid, os.getsid)}:
        if number != process.pid or process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"
