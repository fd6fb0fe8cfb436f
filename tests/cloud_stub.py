"""A small Google Cloud behind a `gcloud` first in PATH: every call is recorded, the answers are scripted.

`Cloud(directory)` makes the executable; `cloud.play(…)` says what is to happen; `cloud.calls()` says what did.
A launcher calls gcloud a dozen times and a test is mostly such calls, so only what starts fast is imported; not json.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

EXECUTABLE = """#!{python} -IS
import sys
sys.path.insert(0, {tests!r})
from cloud_stub import gcloud
sys.exit(gcloud({directory!r}, sys.argv[1:]))
"""


class Cloud:
    """The scripted cloud whose `gcloud` lies in `directory`."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(exist_ok=True)
        executable = directory / "gcloud"
        tests = os.path.dirname(os.path.abspath(__file__))
        executable.write_text(EXECUTABLE.format(python=sys.executable, tests=tests, directory=str(directory)))
        executable.chmod(0o755)
        self.play()

    def play(self, ssh: list[Any] | None = None, **script: Any) -> None:
        """Replaces the script. Of every list one item is taken by each call, the last again and again.

        Args:
          ssh: what the remote command does: exit codes the workers print, or a dict with `codes`, and
            `lines` (printed before), `connection` (ssh's own exit code), `state` (the resource's, afterwards; a list:
            one at each look; None: gone), `secs` (how long it takes), `run` (a home directory: the command is run for
            real there).
          script: `state` (None: no resource yet), `states` (a list of lists: each creation's or start's states),
            `create`, `start`, `delete`, `upload` (lists of error texts, "" for success), `probe` (ssh's exit codes for
            the command `true`), `describe` (errors), `reason` (of a FAILED state), `settings` (of `gcloud config`).
        """
        defaults: dict[str, Any] = {"states": [["WAITING_FOR_RESOURCES", "ACTIVE"]], "state": None}
        script = defaults | script | {"ssh": [0] if ssh is None else ssh}
        script["current"] = _states(script["state"])
        (self.directory / "script").write_bytes(marshal.dumps(script))
        (self.directory / "calls").write_bytes(b"")

    def calls(self) -> list[list[str]]:
        """The arguments of every call so far, in order."""
        calls = []
        with (self.directory / "calls").open("rb") as file:
            while file.peek(1):
                calls.append(marshal.load(file))
        return calls

    def verbs(self) -> list[str]:
        """What was done, in a word each; looks at the state and `ssh true` left out."""
        verbs = [verb_of(call) for call in self.calls()]
        return [verb for verb in verbs if verb not in ("describe", "probe", "reason", "config")]

    def commands(self) -> list[str]:
        """What was run on the workers."""
        return [option(call, "--command") for call in self.calls() if verb_of(call) == "ssh"]


def option(call: list[str], name: str) -> str:
    """The value of an option of a call; "" without it."""
    return next((part.removeprefix(f"{name}=") for part in call if part.startswith(f"{name}=")), "")


def verb_of(call: list[str]) -> str:
    if call[0] == "config":
        return "config"
    if call[:2] == ["storage", "cp"]:
        return "upload" if call[2] == "-" else "download"
    if "ssh" in call:
        return "probe" if option(call, "--command") == "true" else "ssh"
    verb = call[call.index("queued-resources" if "tpus" in call else "instances") + 1]
    return "reason" if verb == "describe" and "failedData" in option(call, "--format") else verb


def _next(script: dict[str, Any], name: str, default: Any) -> Any:
    items = script.get(name) or [default]
    return items.pop(0) if len(items) > 1 else items[0]


def _states(state: Any) -> list[str] | None:
    return state if state is None or isinstance(state, list) else [state]


def gcloud(directory: str, call: list[str]) -> int:
    """One call of gcloud; returns its exit code."""
    verb = verb_of(call)
    archive = os.path.join(directory, "archive.tar.gz")
    if verb == "upload":
        with open(archive, "wb") as file:
            file.write(sys.stdin.buffer.read())
    with open(os.path.join(directory, "script"), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several slices are reached at once
        script = marshal.load(file)
        with open(os.path.join(directory, "calls"), "ab") as calls:
            marshal.dump(call, calls)
        reply = _reply(script, verb, call)
        file.seek(0)
        marshal.dump(script, file)
        file.truncate()
    if verb == "download":
        with open(archive, "rb") as packed:
            sys.stdout.buffer.write(packed.read())
    return _ssh(reply, option(call, "--command")) if isinstance(reply, dict) else reply


def _reply(script: dict[str, Any], verb: str, call: list[str]) -> Any:
    """Does to the scripted cloud what the call asks; its exit code, or what a worker is to do."""
    if verb == "ssh":
        reply = _next(script, "ssh", 0)
        reply = reply if isinstance(reply, dict) else {"codes": reply if isinstance(reply, list) else [reply]}
        if "state" in reply:
            script["current"] = _states(reply["state"])
        return reply
    if verb == "probe":
        return _next(script, "probe", 0)
    error = _next(script, verb, "") if verb not in ("config", "reason") else ""
    if verb == "describe" and not error and script["current"] is None:
        error = "NOT_FOUND: Resource 'projects/p/…' was not found"
    if error:
        sys.stderr.write(f"ERROR: (gcloud) {error}\n")
        return 1
    if verb in ("create", "start"):
        script["current"] = _next(script, "states", None)
    elif verb == "delete":
        script["current"] = None
    elif verb == "describe":
        print(_next(script, "current", None))
    elif verb == "reason":
        print(script.get("reason", ""))
    elif verb == "config":
        print(script.get("settings", {}).get(call[2], ""))
    return 0


def _ssh(reply: dict[str, Any], command: str) -> int:
    if "run" in reply:
        os.chdir(reply["run"])
        os.execvp("bash", ["bash", "-c", command])
    for line in reply.get("lines", []):
        print(line, flush=True)
    time.sleep(reply.get("secs", 0))
    for worker, code in enumerate(reply.get("codes", [])):
        print(f"\nmae_dist exit code: {code} on worker-{worker}")
    return reply.get("connection", 0)
