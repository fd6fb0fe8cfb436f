"""The launchers, each run for real against a cloud, a Slurm or a machine that is played by `tests/cloud_stub.py`."""

import contextlib
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from mae_dist import errors, hardware
from tests import commands
from tests.cloud_stub import Cloud, verb_of
from tests.runs import ONLY_UPDATES, end_of, free_port, records

ROOT = Path(__file__).resolve().parent.parent
SHELL_FILES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("launch/*.sh", "launch/*.sbatch", "tests/*.sh", ".ci/run")
    for path in ROOT.glob(pattern)
)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
GCP_SCRIPTS = ["launch/gcp_tpu.sh", "launch/gcp_gpu.sh", "launch/gcp_cpu.sh"]
# On PATH besides the stubs: nothing here may find a real gcloud.
TOOLS = (
    *("bash", "basename", "cat", "cut", "dirname", "env", "grep", "gzip", "head", "mkdir", "mktemp", "ps", "rm"),
    *("sed", "sh", "sleep", "tar", "tr"),
)
STOPPING = (errors.EXIT_CONFIG, errors.EXIT_DATA, errors.EXIT_DIVERGED, errors.EXIT_STORAGE)
CONTINUING = (75, 76, 77)  # preempted, stalled, a peer lost
WHERE = ("--project=p", "--zone=us-west4-a", "--poll_secs=0")
WORKDIR = ("--workdir", "gs://bucket/runs/My_Run")
TRAINER = ("--", "--config", "configs/x.py", "--config.name=a b")
VM_STATES = [["PROVISIONING", "STAGING", "RUNNING"]]


@pytest.fixture
def binaries(tmp_path: Path) -> Path:
    """A directory that stands for PATH: the few tools the scripts need, and room for stubs."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for tool in TOOLS:
        (directory / tool).symlink_to(shutil.which(tool) or "")
    return directory


@pytest.fixture
def cloud(binaries: Path) -> Cloud:
    return Cloud(binaries)


@pytest.fixture
def start(tmp_path: Path, binaries: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start(script, *arguments, **environment)`: in a process group of its own, as from a terminal."""
    started: list[subprocess.Popen[str]] = []
    # Ignored where these tests run in a shell's background or under nohup, the scripts would ignore them too, and
    # cannot undo that.
    ignored = (signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in ignored}

    def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        env = {"PATH": str(binaries), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)} | environment
        process = subprocess.Popen(
            ["bash", str(ROOT / script), *arguments],
            env=env,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        # Also what a script has left in its group: it holds the output open, so that nobody would see its end.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(start) -> Callable[..., tuple[int, str]]:
    """`run(script, *arguments, **environment)` → (exit code, everything printed)."""

    def run(script: str, *arguments: str, **environment: str) -> tuple[int, str]:
        process = start(script, *arguments, **environment)
        printed = process.communicate(timeout=60)[0]
        return process.returncode, printed

    return run


def _executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# --- a TPU slice ------------------------------------------------------------------------------------------------------


def test_tpu_from_creation_to_deletion(cloud: Cloud, run):
    states = [["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]]
    cloud.play([{"codes": [0, 0], "lines": ["step 1"]}], states=states)
    token = {"CLOUDSDK_AUTH_ACCESS_TOKEN": "a secret"}
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *TRAINER, **token)
    assert code == 0, printed
    assert "a secret" not in printed + str(cloud.calls())
    assert cloud.verbs() == ["upload", "create", "ssh", "delete"]
    upload, create, ssh, delete = (call for call in cloud.calls() if verb_of(call) not in ("describe", "probe"))
    resources = ["compute", "tpus", "queued-resources"]
    assert upload == ["storage", "cp", "-", "gs://bucket/runs/My_Run/code.tar.gz", "--project=p"]
    assert create == [
        *[*resources, "create", "mae-tpu-my-run", "--node-id=mae-tpu-my-run", "--accelerator-type=v5litepod-16"],
        *["--runtime-version=v2-alpha-tpuv5-lite", "--project=p", "--zone=us-west4-a", "--quiet", "--spot"],
    ]
    assert ssh[:6] == ["compute", "tpus", "tpu-vm", "ssh", "mae-tpu-my-run", "--worker=all"]
    assert "--ssh-flag=-oServerAliveInterval=30" in ssh
    assert delete[:6] == [*resources, "delete", "mae-tpu-my-run", "--force"]
    trainer = r"--config configs/x.py --config.name=a\ b --workdir gs://bucket/runs/My_Run"
    assert cloud.commands()[0].endswith(f"/launch/worker.sh tpu,gcs {trainer}")
    for said in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "step 1", "done: gs://bucket/runs/My_Run"):
        assert said in printed
    # By hand it can always be deleted: the very command is printed.
    assert " ".join(["gcloud", *delete]) in printed
    with tarfile.open(cloud.directory / "archive.tar.gz") as archive:
        names = archive.getnames()
    assert {"pyproject.toml", "mae_dist/main.py", "configs/default.py", "launch/worker.sh"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests", ".git", "runs"))]


def test_tpu_preempted_twice_and_then_done(cloud: Cloud, run):
    saved_and_taken = {"codes": [75, 75, 77], "state": "SUSPENDED"}
    taken_without_a_word = {"connection": 255, "state": ["SUSPENDING", "SUSPENDED"]}
    cloud.play([saved_and_taken, taken_without_a_word, 0])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *TRAINER)
    assert code == 0, printed
    assert cloud.verbs() == ["upload", *["create", "ssh", "delete"] * 3]
    assert len(set(cloud.commands())) == 1  # the same line each time: it continues the run
    assert printed.count("was taken away") == 2
    assert "restart 1" not in printed  # no preemption is counted


@pytest.mark.parametrize(
    "reply",
    [
        {"codes": [75]},  # told of a preemption that has not happened yet
        {"codes": [77], "state": None},  # gone altogether
        {"codes": [137, 77], "state": "FAILED"},
        {"codes": [76, 77]},  # stalled: perhaps its machines are what is wrong
    ],
)
def test_tpu_is_made_anew(cloud: Cloud, run, reply: dict):
    cloud.play([reply, 0])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *TRAINER, "--x")
    assert code == 0, printed
    between = [] if reply.get("state", "") is None else ["delete"]
    assert cloud.verbs() == ["upload", "create", "ssh", *between, "create", "ssh", "delete"]


@pytest.mark.parametrize(
    ("codes", "code"),
    [([2], 2), ([77, 2, 75], 2), ([75, 3], 3), ([77, 4, 77], 4), ([0, 1, 5], 5)],
)
def test_tpu_faults_that_would_come_again_stop(cloud: Cloud, run, codes: list[int], code: int):
    cloud.play([{"codes": codes, "state": "SUSPENDED"}])
    ended, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *TRAINER)
    assert ended == code, printed
    assert cloud.verbs() == ["upload", "create", "ssh", "delete"]
    assert "would not help" in printed


def test_tpu_restarts_that_no_preemption_explains_are_counted(cloud: Cloud, run):
    # A lost connection, an unexpected error with what its peers saw of it, one worker that could not be reached.
    lost = {"connection": 255, "lines": ["half a line of progress"]}
    cloud.play([lost, [77, 1, 77], {"codes": [0], "connection": 255}, 0])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, "--max_restarts=3", *TRAINER)
    assert code == 0, printed
    assert cloud.verbs() == ["upload", "create", "ssh", "ssh", "ssh", "ssh", "delete"]
    assert "restart 3 of at most 3" in printed

    cloud.play([lost])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, "--max_restarts=2", *TRAINER)
    assert code == 255
    assert cloud.verbs() == ["upload", "create", "ssh", "ssh", "ssh", "delete"]
    assert "That is all of --max_restarts=2" in printed


def test_tpu_waits_for_capacity(cloud: Cloud, run):
    no_capacity = 'RESOURCE_EXHAUSTED: There is no more capacity in the zone "us-west4-a"; you can try in another zone'
    cloud.play(create=[no_capacity, no_capacity, ""])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *TRAINER)
    assert code == 0, printed
    assert cloud.verbs() == ["upload", "create", "create", "create", "ssh", "delete"]
    assert "no capacity in us-west4-a now" in printed

    # The same, said later: the request was taken, waited and failed.
    cloud.play(states=[["WAITING_FOR_RESOURCES", "FAILED"], ["ACTIVE"]], reason=no_capacity)
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *TRAINER)
    assert code == 0, printed
    assert cloud.verbs() == ["upload", "create", "delete", "create", "ssh", "delete"]


@pytest.mark.parametrize("later", [False, True])
def test_tpu_quota_stops_with_the_cure(cloud: Cloud, run, later: bool):
    quota = "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZone' has been exceeded. Limit: 0."
    cloud.play(states=[["FAILED"]], reason=quota) if later else cloud.play(create=[quota])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *TRAINER)
    assert code == 1
    assert cloud.verbs() == ["upload", "create", *["delete"] * later]
    assert "https://console.cloud.google.com/iam-admin/quotas?project=p" in printed
    assert "nothing is left that costs money" in printed


def test_tpu_other_refusals(cloud: Cloud, run):
    denied = "PERMISSION_DENIED: Cloud TPU API has not been used in project p before or it is disabled."
    cloud.play(create=[denied])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *TRAINER)
    assert (code, cloud.verbs()) == (1, ["upload", "create"])
    assert "gcloud services enable tpu.googleapis.com --project=p" in printed

    # A passing fault, too many requests, and a state that cannot be asked, each once.
    cloud.play(create=["UNAVAILABLE: try again", "Quota exceeded: requests per minute", ""], describe=["", "reset", ""])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *TRAINER)
    assert code == 0, printed
    assert cloud.verbs() == ["upload", "create", "create", "create", "ssh", "delete"]
    assert "restart 2 of at most 10" in printed

    cloud.play(states=[["FAILED"]])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, "--max_restarts=1", *TRAINER)
    assert (code, cloud.verbs()) == (1, ["upload", *["create", "delete"] * 2])


def test_tpu_that_is_there_already_is_used_and_may_be_kept(cloud: Cloud, run):
    cloud.play(state="ACTIVE")
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, "--keep", *TRAINER)
    assert code == 0, printed
    assert cloud.verbs() == ["upload", "ssh"]
    assert "is kept and costs money until:\ngcloud compute tpus queued-resources delete mae-tpu-my-run" in printed


def test_tpu_that_cannot_be_deleted_is_said(cloud: Cloud, run):
    cloud.play(delete=["INTERNAL: no"])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *TRAINER)
    assert code == 0
    assert cloud.verbs() == ["upload", "create", "ssh", "delete", "delete", "delete"]
    assert "could not be deleted (see above) and may go on costing money" in printed


def test_tpu_slices(cloud: Cloud, run):
    # The slices end in any order, the second one with the code that says most.
    cloud.play([{"codes": [77], "state": "SUSPENDED"}, {"codes": [75], "state": "SUSPENDED"}, 0, 0])
    slices = ("--name=pod", "--num_slices=2", "--accelerator_type=v6e-8", "--on_demand")
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *slices, *TRAINER)
    assert code == 0, printed
    assert cloud.verbs() == ["upload", *["create", "ssh", "ssh", "delete"] * 2]
    create = next(call for call in cloud.calls() if verb_of(call) == "create")
    assert {"--node-count=2", "--node-prefix=pod", "--runtime-version=v2-alpha-tpuv6e"} <= set(create)
    assert not {"--spot", "--node-id=pod"} & set(create)
    assert sorted(call[4] for call in cloud.calls() if verb_of(call) == "ssh") == ["pod-0", "pod-0", "pod-1", "pod-1"]
    assert "exit code 75, preempted and saved" in printed
    assert "[pod-1] mae_dist exit code: 0" in printed


def test_tpu_answers_late_or_not_at_all(cloud: Cloud, run):
    cloud.play(probe=[255, 255, 0])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *TRAINER)
    assert (code, cloud.verbs()) == (0, ["upload", "create", "ssh", "delete"]), printed

    cloud.play(probe=[255])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, "--max_restarts=0", *TRAINER)
    assert (code, cloud.verbs()) == (255, ["upload", "create", "delete"])
    assert "gcloud compute firewall-rules create allow-ssh" in printed


@pytest.mark.parametrize(
    ("script", "sent"),
    [
        ("launch/gcp_tpu.sh", signal.SIGINT),
        ("launch/gcp_tpu.sh", signal.SIGHUP),
        ("launch/gcp_gpu.sh", signal.SIGINT),
        ("launch/gcp_cpu.sh", signal.SIGTERM),
    ],
)
def test_ctrl_c_deletes_the_machines(cloud: Cloud, start, script: str, sent: signal.Signals):
    ready = "ACTIVE" if "tpu" in script else "RUNNING"
    cloud.play([{"lines": ["training"], "secs": 60}], states=[[ready]])
    process = start(script, *WORKDIR, *WHERE, *TRAINER)
    for line in process.stdout:
        if line == "training\n":
            break
    os.killpg(process.pid, sent)
    printed = process.communicate(timeout=20)[0]
    assert process.returncode == 128 + sent, printed
    assert cloud.verbs() == ["upload", "create", "ssh", "delete"]


def test_ctrl_c_while_waiting(cloud: Cloud, start):
    cloud.play(states=[["WAITING_FOR_RESOURCES"]])
    process = start("launch/gcp_tpu.sh", *WORKDIR, "--project=p", "--zone=z-a", "--poll_secs=60", *TRAINER)
    for line in process.stdout:
        if "WAITING_FOR_RESOURCES" in line:
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # to the script alone
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert cloud.verbs() == ["upload", "create", "delete"]


# --- one machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "extras"), [("launch/gcp_gpu.sh", "cuda12,gcs"), ("launch/gcp_cpu.sh", "gcs")])
def test_machine_preempted_twice_and_then_done(cloud: Cloud, run, script: str, extras: str):
    stopped = {"codes": [75], "state": ["STOPPING", "TERMINATED"]}
    deleted = {"connection": 255, "state": None}
    cloud.play([stopped, deleted, 0], states=VM_STATES, probe=[255, 0])
    code, printed = run(script, *WORKDIR, *WHERE, *TRAINER)
    assert code == 0, printed
    assert cloud.verbs() == ["upload", "create", "ssh", "start", "ssh", "create", "ssh", "delete"]
    assert len(set(cloud.commands())) == 1
    assert f"/launch/worker.sh {extras} --config configs/x.py" in cloud.commands()[0]
    create = next(call for call in cloud.calls() if verb_of(call) == "create")
    assert create[:3] == ["compute", "instances", "create"]
    spot = {"--provisioning-model=SPOT", "--instance-termination-action=STOP", "--scopes=cloud-platform"}
    assert spot <= set(create)
    assert ("--maintenance-policy=TERMINATE" in create) == ("gpu" in script)


def test_machine_waits_for_capacity_when_it_is_started_again(cloud: Cloud, run):
    exhausted = "The zone does not have enough resources available (ZONE_RESOURCE_POOL_EXHAUSTED)"
    cloud.play([{"codes": [75], "state": "TERMINATED"}, 0], states=VM_STATES, start=[exhausted, ""])
    code, printed = run("launch/gcp_gpu.sh", *WORKDIR, *WHERE, "--machine_type=a2-highgpu-1g", *TRAINER)
    assert code == 0, printed
    assert cloud.verbs() == ["upload", "create", "ssh", "start", "start", "ssh", "delete"]

    cloud.play(states=VM_STATES, create=["Quota 'NVIDIA_L4_GPUS' exceeded. Limit: 0.0 in region us-west4."])
    code, printed = run("launch/gcp_gpu.sh", *WORKDIR, *WHERE, *TRAINER)
    assert (code, cloud.verbs()) == (1, ["upload", "create"])
    assert "GPUS-ALL-REGIONS" in printed


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", GCP_SCRIPTS)
def test_what_is_missing_is_named_with_its_cure(cloud: Cloud, run, script: str):
    for arguments, code, cure in [
        ([*WORKDIR, "--zone=z-a", *TRAINER], 2, "gcloud config set project"),
        ([*WORKDIR, "--project=p", *TRAINER], 2, "gcloud config set compute/zone"),
        ([*WHERE, *TRAINER], 2, "gcloud storage buckets create gs://BUCKET --project=p --location=us-west4"),
        ([*WHERE, "--workdir=runs/x", *TRAINER], 2, "--workdir=gs://BUCKET/RUN"),
        ([*WHERE, "--workdir=gs://bucket", *TRAINER], 2, "--workdir=gs://BUCKET/RUN"),
        ([*WHERE, *WORKDIR], 2, "-- --config configs/"),
        ([*WHERE, *WORKDIR, *TRAINER, "--workdir=x"], 2, "before the --"),
        ([*WHERE, *WORKDIR, "--frobnicate", *TRAINER], 2, "unknown option --frobnicate; there are --name"),
        ([*WHERE, *WORKDIR, "--name"], 2, "--name needs a value"),
        ([*WHERE, *WORKDIR, "stray"], 2, "come after --"),
        ([*WHERE, *WORKDIR, "--name=Mine_", *TRAINER], 2, "small letters"),
        ([*WHERE, *WORKDIR, "--max_restarts=many", *TRAINER], 2, "is not a number"),
        (["delete", *WHERE], 2, "--name=NAME"),
    ]:
        ended, printed = run(script, *arguments)
        assert (ended, cure in printed) == (code, True), printed
    assert {verb_of(call) for call in cloud.calls()} == {"config"}

    cloud.play(upload=["HTTPError 404: The specified bucket does not exist."])
    code, printed = run(script, *WORKDIR, *WHERE, *TRAINER)
    assert (code, cloud.verbs()) == (1, ["upload"])
    assert "gcloud storage buckets create gs://bucket --project=p --location=us-west4" in printed

    (cloud.directory / "gcloud").unlink()
    code, printed = run(script, *WORKDIR, *WHERE, *TRAINER)
    assert code == 1
    assert "gcloud is not on PATH. Install it (https://cloud.google.com/sdk/docs/install)" in printed


def test_accelerators_have_their_runtimes(cloud: Cloud, run):
    for accelerator, runtime in {
        "v2-8": "tpu-ubuntu2204-base",
        "v4-16": "tpu-ubuntu2204-base",
        "v5litepod-8": "v2-alpha-tpuv5-lite",
        "v5p-8": "v2-alpha-tpuv5",
        "v6e-256": "v2-alpha-tpuv6e",
    }.items():
        _, printed = run(
            "launch/gcp_tpu.sh", *WORKDIR, *WHERE, "--dry_run", "--accelerator_type", accelerator, *TRAINER
        )
        assert f"--accelerator-type={accelerator} --runtime-version={runtime} " in printed
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, "--accelerator_type=v9-8", *TRAINER)
    assert (code, "--runtime_version" in printed) == (2, True)
    for name in ("v7x-8", "tpu7x-8", "v7-16"):  # also with a runtime: there is no such queued resource
        given = (f"--accelerator_type={name}", "--runtime_version=v2")
        code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *given, *TRAINER)
        assert (code, f"{name}: TPU7x" in printed, "launch/gke_jobset.yaml" in printed) == (2, True, True)
    assert cloud.calls() == []
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, "--num_slices=0", *TRAINER)
    assert (code, "--num_slices=0" in printed) == (2, True)
    code, printed = run("launch/gcp_cpu.sh", *WORKDIR, *WHERE, "--disk_gb=big", *TRAINER)
    assert (code, "--disk_gb=big" in printed) == (2, True)


def test_project_and_zone_of_gcloud_and_of_the_environment(cloud: Cloud, run):
    cloud.play(state="RUNNING", settings={"core/project": "mine", "compute/zone": "here-b"})
    code, printed = run("launch/gcp_cpu.sh", "status", "--name=x")
    assert code == 0, printed
    assert {"--project=mine", "--zone=here-b"} <= set(cloud.calls()[-1])
    environment = {"CLOUDSDK_CORE_PROJECT": "other", "CLOUDSDK_COMPUTE_ZONE": "there-c"}
    run("launch/gcp_cpu.sh", "status", "--name=x", **environment)
    assert {"--project=other", "--zone=there-c"} <= set(cloud.calls()[-1])


@pytest.mark.parametrize("script", GCP_SCRIPTS)
def test_dry_run_help_status_and_delete(cloud: Cloud, run, script: str):
    code, printed = run(script, *WORKDIR, *WHERE, "--dry_run", *TRAINER)
    assert code == 0
    assert cloud.calls() == []
    steps = [" cp - ", " create ", " describe ", "launch/worker.sh", " delete "]
    assert [step in line for step, line in zip(steps, printed.splitlines(), strict=True)] == [True] * len(steps)
    assert run(script, "delete", *WORKDIR, *WHERE, "--dry_run")[1] == printed.splitlines(keepends=True)[-1]

    code, printed = run(script, "--help")
    assert (code, cloud.calls()) == (0, [])
    assert f"bash {script} --workdir gs://BUCKET/RUN" in printed
    assert "set -euo" not in printed
    documented = set(re.findall(r"--(\w+)", printed))
    options = run(script, *WORKDIR, *WHERE, "--frobnicate", *TRAINER)[1]
    assert set(re.findall(r"--(\w+)", options.split("there are")[1].split("The trainer")[0])) <= documented | {"help"}

    ready = "ACTIVE" if "tpu" in script else "RUNNING"
    cloud.play(state=ready)
    assert run(script, "status", *WORKDIR, *WHERE) == (0, f"{ready}\n")
    assert run(script, "delete", *WORKDIR, *WHERE)[0] == 0
    assert [verb_of(call) for call in cloud.calls()] == ["describe", "delete"]


# --- on the machine ---------------------------------------------------------------------------------------------------

PYTHON_STUB = """#!/bin/bash
# Stands for a Python: says its version is enough, makes a venv of itself, installs nothing and trains as told.
case "$*" in
    "-m venv"*) mkdir -p "$4/bin" && touch "$4/pyvenv.cfg" && cp "$0" "$4/bin/python" ;;
    "-m pip install --quiet --disable"*) echo "installs ${@: -1}" ;;
    *mae_dist.main*) echo "trains in $PWD: $*"; exec sleep_or_end "$@" ;;
    *hashlib*) echo digest ;;
    *platform*) echo 3.12.0 ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path, binaries: Path) -> Path:
    """The home directory of a machine, on whose PATH there is a Python 3.12 that `PYTHON_STUB` plays."""
    _executable(binaries / "python3.12", PYTHON_STUB)
    for tool in ("touch", "cp"):
        (binaries / tool).symlink_to(shutil.which(tool) or "")
    home = tmp_path / "home"
    home.mkdir()
    return home


def test_worker_installs_once_and_reports_the_trainers_exit_code(cloud: Cloud, run, binaries: Path, machine: Path):
    _executable(binaries / "sleep_or_end", "#!/bin/bash\n[[ -e again ]] && exit 0\ntouch again\nexit 75\n")
    cloud.play([{"run": str(machine)}])
    code, printed = run("launch/gcp_tpu.sh", *WORKDIR, *WHERE, *TRAINER)
    assert code == 0, printed
    assert cloud.verbs() == ["upload", *["create", "ssh", "download", "delete"] * 2]
    line = (
        f"trains in {machine}/mae_dist_code: -m mae_dist.main --config configs/x.py --config.name=a b --workdir gs://"
    )
    assert printed.count(line) == 2
    assert printed.count(f"installs {machine}/mae_dist_code[tpu,gcs]") == 1
    assert re.search(r"^mae_dist exit code: 75 on \S+$", printed, re.MULTILINE)


def test_worker_ends_the_trainer_of_a_lost_connection(cloud: Cloud, run, binaries: Path, machine: Path):
    # The first trainer outlives its connection; it saves when it is told to end, and only then the next one starts.
    _executable(
        binaries / "sleep_or_end",
        "#!/bin/bash\n[[ -e saved ]] && exit 0\ntrap 'touch saved; exit 75' TERM\necho up\n"
        "while :; do sleep 0.05; done >/dev/null 2>&1\n",
    )
    (machine / "mae_dist_code").mkdir()
    with subprocess.Popen(
        [binaries / "bash", binaries / "sleep_or_end", "mae_dist.main"],
        cwd=machine / "mae_dist_code",
        env={"PATH": str(binaries)},
        stdout=subprocess.PIPE,
    ) as first:
        assert first.stdout is not None
        first.stdout.readline()
        (machine / "mae_dist_code/trainer.pid").write_text(f"{first.pid}\n")
        cloud.play([{"run": str(machine)}], state="RUNNING")
        code, printed = run("launch/gcp_cpu.sh", *WORKDIR, *WHERE, *TRAINER)
        first.kill()
    assert code == 0, printed
    assert first.returncode == 75
    assert f"ending the trainer of an earlier connection (process {first.pid})" in printed


def test_worker_reports_an_install_that_fails(cloud: Cloud, run, binaries: Path, machine: Path):
    _executable(binaries / "python3.12", "#!/bin/bash\n[[ $2 != venv ]]\n")
    cloud.play([{"run": str(machine)}], state="RUNNING")
    code, printed = run("launch/gcp_cpu.sh", *WORKDIR, *WHERE, "--max_restarts=0", *TRAINER)
    assert code == 1
    assert "mae_dist exit code: 1 on" in printed


def test_worker_brings_a_python_that_is_new_enough(cloud: Cloud, run, binaries: Path, machine: Path, tmp_path: Path):
    _executable(binaries / "sleep_or_end", "#!/bin/bash\nexit 0\n")
    (binaries / "python3.12").rename(tmp_path / "python3.12")
    old = f"""#!/bin/bash
        echo "$*" >>{tmp_path}/old
        case "$*" in *"uv python find"*) echo {tmp_path}/python3.12 ;; *version_info*) exit 1 ;; esac"""
    _executable(binaries / "python3", old)
    cloud.play([{"run": str(machine)}], state="RUNNING")
    code, printed = run("launch/gcp_gpu.sh", *WORKDIR, *WHERE, *TRAINER)
    assert code == 0, printed
    assert "-m pip install --quiet --user uv\n-m uv python install --quiet 3.12\n" in (tmp_path / "old").read_text()

    # Debian's Python without ensurepip: its package is installed.
    shutil.rmtree(machine / "mae_dist_code")
    fails = '#!/bin/bash\n[[ "$*" == *"import ensurepip"* && ! -e ~/installed ]] && exit 1\n'
    says = '[[ "$*" == *version_info?:2* ]] && echo 3.12\n'
    _executable(binaries / "python3.12", fails + says + PYTHON_STUB.removeprefix("#!/bin/bash\n"))
    _executable(binaries / "sudo", '#!/bin/bash\necho "sudo $*"\ntouch ~/installed\n')
    cloud.play([{"run": str(machine)}], state="RUNNING")
    code, printed = run("launch/gcp_cpu.sh", *WORKDIR, *WHERE, *TRAINER, HOME=str(machine))
    assert code == 0, printed
    assert "sudo apt-get install -qq -y -o DPkg::Lock::Timeout=300 python3.12-venv" in printed


# --- Slurm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, binaries: Path) -> Callable[..., dict[str, str]]:
    """`slurm(trainer, state)`: a clone to submit from, and srun, squeue and scontrol; returns the job's environment."""

    def slurm(trainer: str, state: str = "RUNNING") -> dict[str, str]:
        (tmp_path / "clone/.venv/bin").mkdir(parents=True, exist_ok=True)
        _executable(tmp_path / "clone/.venv/bin/python", "")
        for name, action in {"srun": trainer, "squeue": f"echo {state}", "scontrol": ""}.items():
            _executable(binaries / name, f'#!/bin/bash\necho "{name} $*" >>{tmp_path}/calls\n{action}\n')
        (tmp_path / "calls").unlink(missing_ok=True)
        return {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(tmp_path / "clone")}

    return slurm


@pytest.mark.parametrize("code", [0, 1, *STOPPING, *CONTINUING])
def test_slurm_requeues_what_can_continue(tmp_path: Path, run, slurm, code: int):
    ended, printed = run("launch/slurm.sbatch", "--config", "a b.py", **slurm(f"exit {code}"))
    assert ended == code, printed
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "srun --kill-on-bad-exit=0 .venv/bin/python -m mae_dist.main --config a b.py"
    assert calls[2:] == ["scontrol requeue 17"] * (code in CONTINUING)


def test_slurm_leaves_a_cancelled_or_hopeless_job_alone(tmp_path: Path, run, slurm):
    run("launch/slurm.sbatch", "x", **slurm("exit 75", state="COMPLETING"))
    assert "scontrol" not in (tmp_path / "calls").read_text()
    code, printed = run("launch/slurm.sbatch", "x", **slurm("exit 77"), SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    assert (code, "after 3 requeues" in printed) == (77, True)
    assert "scontrol" not in (tmp_path / "calls").read_text()


def test_slurm_passes_the_signal_on_and_waits_for_the_save(tmp_path: Path, start, slurm):
    trainer = "trap 'told=1' TERM; echo up; while [[ -z $told ]]; do sleep 0.02; done; sleep 0.3; echo saved; exit 75"
    process = start("launch/slurm.sbatch", "x", **slurm(trainer))
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: does
    printed = process.communicate(timeout=20)[0]
    assert (process.returncode, printed.splitlines()[0]) == (75, "saved")
    assert (tmp_path / "calls").read_text().endswith("scontrol requeue 17\n")


def test_slurm_names_what_is_missing(tmp_path: Path, run, slurm):
    environment = slurm("")
    assert "sbatch launch/slurm.sbatch --config" in run("launch/slurm.sbatch", **environment)[1]
    assert "this is a batch script: sbatch launch/slurm.sbatch x" in run("launch/slurm.sbatch", "x")[1]
    (tmp_path / "clone/.venv/bin/python").unlink()
    code, printed = run("launch/slurm.sbatch", "x", **environment)
    assert (code, "python3 -m venv .venv" in printed) == (2, True)
    header = (ROOT / "launch/slurm.sbatch").read_text()
    for directive in ("--requeue", "--ntasks-per-node=1", "--signal=B:TERM@120"):
        assert f"#SBATCH {directive}\n" in header


# --- Kubernetes and Docker --------------------------------------------------------------------------------------------


def test_jobset_restarts_and_fails_on_the_trainers_exit_codes():
    text = (ROOT / "launch/gke_jobset.yaml").read_text()
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    for placeholder in ("IMAGE", "WORKDIR", "SERVICE_ACCOUNT"):
        assert re.search(rf"^# {placeholder}  ", head, re.MULTILINE)
        assert text.removeprefix(head).count(placeholder) == 1
    jobset = yaml.safe_load(text)
    assert jobset["apiVersion"].startswith("jobset.x-k8s.io/")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    fail, restart = job["podFailurePolicy"]["rules"]
    assert (fail["action"], restart["action"]) == ("FailJob", "Count")
    assert tuple(fail["onExitCodes"]["values"]) == STOPPING
    assert tuple(restart["onExitCodes"]["values"]) == CONTINUING
    assert {rule["onExitCodes"]["containerName"] for rule in (fail, restart)} == {container["name"]}
    policy = jobset["spec"]["failurePolicy"]
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert policy["maxRestarts"] > 0
    # What a pod failure policy requires, and one process a node.
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    assert job["completions"] == job["parallelism"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert "command" not in container  # the image's entry point, which gets the signals
    assert "--workdir" in container["args"]


def test_jobset_takes_the_shape_that_its_head_gives_for_tpu7x():
    """Nodes of 4 chips: what the head says of topologies is their product."""
    head = (ROOT / "launch/gke_jobset.yaml").read_text().partition("apiVersion")[0].replace("\n# ", " ")
    assert "gke-tpu-accelerator tpu7x" in head
    given = re.findall(r"(\d+x\d+x\d+) (?:is|are) (\d+)", head)
    assert len(given) == 3
    for topology, nodes in given:
        assert math.prod(map(int, topology.split("x"))) == 4 * int(nodes)
    assert f"a pod has {4 * hardware.CHIPS['tpu7x'].devices}" in head


def test_exit_codes_are_the_trainers():
    for name, code in {"EXIT_PREEMPTED": 75, "EXIT_STALLED": 76, "EXIT_PEER_LOST": 77}.items():
        assert getattr(errors, name, code) == code


def test_dockerfile_has_its_targets_and_a_user_and_passes_signals_on():
    text = (ROOT / "launch/Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(stages) == ["base", "cpu", "cuda", "tpu"]
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["mae"]
    assert re.findall(r"^ENTRYPOINT (.*)", text, re.MULTILINE) == ['["python", "-m", "mae_dist.main"]']
    assert stages["base"].index("USER") < stages["base"].index("ENTRYPOINT")
    for name in ("cpu", "cuda", "tpu"):
        assert f"docker build -f launch/Dockerfile --target {name}" in text
        (chosen,) = re.findall(r"^RUN pip install --editable \.\[(\S+)\]$", stages[name], re.MULTILINE)
        assert set(chosen.split(",")) <= set(EXTRAS)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {word for line in re.findall(r"^COPY --chown=mae (.*) \S+$", text, re.MULTILINE) for word in line.split()}
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / path).exists() for path in copied)


def test_extras_of_the_scripts_exist():
    for script in GCP_SCRIPTS:
        (chosen,) = re.findall(r"\bextras=(\S+)", (ROOT / script).read_text())
        assert set(chosen.split(",")) <= set(EXTRAS)


# --- SkyPilot ---------------------------------------------------------------------------------------------------------

SKYPILOT = ROOT / "launch/skypilot.yaml"
NO_TPU = {"BASH_FUNC_compgen%%": "() { return 1; }"}  # functions of these names hide what the machine has
TPU = {"BASH_FUNC_compgen%%": "() { [[ $2 == /dev/vfio* ]]; }"}
GPU = {"BASH_FUNC_nvidia-smi%%": "() { :; }", **TPU}  # a GPU's machine may have groups of devices there, too


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`node(script, **environment)`: a script of the task, run as SkyPilot does on a node, in the copy of a clone."""
    task = yaml.safe_load(SKYPILOT.read_text())
    place = tmp_path / "sky_workdir"
    (place / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch/venv.sh", place / "launch")
    shutil.copy(ROOT / "pyproject.toml", place)
    (place / "configs").symlink_to(ROOT / "configs")

    def node(script: str, rank: int = 0, nodes: int = 1, **environment: str) -> subprocess.Popen[str]:
        env = {name: str(value) for name, value in task["envs"].items()}
        env |= {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_NODES": str(nodes)}
        env |= {"SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * nodes)} | environment
        (tmp_path / f"{script}.sh").write_text(task[script])
        return subprocess.Popen(
            ["bash", "-i", tmp_path / f"{script}.sh"],
            cwd=place,
            env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]} | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    (place / ".venv/bin").mkdir(parents=True)
    return node


def test_skypilot_repeats_and_stops_on_the_trainers_exit_codes():
    text = SKYPILOT.read_text()
    task = yaml.safe_load(text)
    recovery = task["resources"]["job_recovery"]
    assert tuple(recovery["recover_on_exit_codes"]) == CONTINUING
    assert recovery["max_restarts_on_errors"] == 0  # it would repeat those of STOPPING, too
    assert not set(STOPPING) & set(recovery["recover_on_exit_codes"])
    assert task["resources"]["use_spot"] is True
    assert (task["num_nodes"], task["workdir"]) == (1, ".")
    assert task["envs"]["WORKDIR"] is None  # SkyPilot then asks for it
    assert (ROOT / task["envs"]["CONFIG"]).exists()
    used = set(re.findall(r"\$\{?([A-Z_]+)", task["setup"] + task["run"]))
    given = {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"}
    assert used == given | set(task["envs"]), "each variable is used, and each that is used is there"
    assert set(re.findall(r" --([a-z_]+)", task["run"])) <= commands.flag_names("main")


@pytest.mark.parametrize("script", ["setup", "run"])
def test_skypilot_scripts_pass_shellcheck(tmp_path: Path, script: str):
    (tmp_path / "script.sh").write_text(yaml.safe_load(SKYPILOT.read_text())[script])
    found = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-x", "-s", "bash", tmp_path / "script.sh"],
        cwd=ROOT,  # where launch/venv.sh is found
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize(("machine", "extras"), [(NO_TPU, "gcs"), (TPU, "tpu,gcs"), (GPU, "cuda12,gcs")])
def test_skypilot_installs_what_the_machine_needs(binaries: Path, tmp_path: Path, node, machine: dict, extras: str):
    _executable(binaries / "python3.12", PYTHON_STUB)
    for tool in ("touch", "cp"):
        (binaries / tool).symlink_to(shutil.which(tool) or "")
    (tmp_path / "sky_workdir/.venv").rename(tmp_path / "unused")
    printed = ""
    for _ in range(2):  # on a machine that is there again nothing is installed again
        process = node("setup", PATH=str(binaries), **machine)
        printed += process.communicate(timeout=60)[0]
        assert process.returncode == 0, printed
    assert re.findall(r"^installs \S+\[(\S+)\]$", printed, re.MULTILINE) == [extras]
    assert set(extras.split(",")) <= set(EXTRAS)


@pytest.mark.parametrize("code", [0, 1, *STOPPING, *CONTINUING])
def test_skypilot_ends_with_the_trainers_exit_code(tmp_path: Path, node, code: int):
    _executable(tmp_path / "sky_workdir/.venv/bin/python", f'#!/bin/bash\nprintf "%s," "$@"\nexit {code}\n')
    process = node("run", WORKDIR="gs://b/r", FLAGS="--config.seed=1 --verbose", **NO_TPU)
    printed = process.communicate(timeout=60)[0]
    expected = "-m,mae_dist.main,--config,configs/cifar_medium.py,--workdir,gs://b/r,--config.seed=1,--verbose,"
    assert (process.returncode, printed.splitlines()[-1]) == (code, expected)


@pytest.mark.parametrize(("machine", "joined"), [(GPU, True), (NO_TPU, True), (TPU, False)])
def test_skypilot_joins_nodes_and_lets_the_others_save(tmp_path: Path, node, machine: dict, joined: bool):
    _executable(tmp_path / "sky_workdir/.venv/bin/python", '#!/bin/bash\nprintf "%s," "$@"\nexit 75\n')
    begin = time.monotonic()
    process = node("run", rank=1, nodes=4, WORKDIR="gs://b/r", GRACE_SECS="0.7", **machine)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 75, printed
    assert time.monotonic() - begin > 0.7
    where = "--coordinator_address,127.0.0.1:9876,--num_processes,4,--process_id,1,"
    assert (where in printed, "--coordinator" in printed) == (joined, joined)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_skypilot_really_trains(tmp_path: Path, node, child_env, nodes: int):
    """Two nodes are preempted after the third step, and the same line continues the run."""
    _executable(tmp_path / "sky_workdir/.venv/bin/python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    flags = " ".join(["--config.total_steps=9", "--config.log_every_steps=1", *ONLY_UPDATES])
    given = child_env() | NO_TPU | {"CONFIG": "configs/smoke.py", "WORKDIR": str(tmp_path / "run"), "GRACE_SECS": "0"}

    def codes(flags: str) -> list[int]:
        port = str(free_port())
        ended = end_of([node("run", rank, nodes, **given, FLAGS=flags, PORT=port) for rank in range(nodes)])
        assert ("2 processes" in ended[0][1]) == (nodes == 2), ended[0][1]
        return [code for code, _ in ended]

    if nodes > 1:
        assert codes(f"{flags} --simulate_preemption_at_step=3") == [errors.EXIT_PREEMPTED] * nodes
    assert codes(flags) == [0] * nodes
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(1, 10))
    assert (tmp_path / "run/summary.json").exists()


SKYPILOT_PARSER = """
import copy, re, sys, yaml
import sky
from sky.client.cli import command
from sky.jobs import recovery_strategy
from sky.utils import registry

text = open(sys.argv[1]).read()
read = lambda task: sky.Task.from_yaml_config(copy.deepcopy(task), env_overrides=[("WORKDIR", "gs://b/r")])
given = yaml.safe_load(text)
(resources,) = read(given).resources
assert resources.use_spot and resources.job_recovery == given["resources"]["job_recovery"], resources
assert registry.JOBS_RECOVERY_STRATEGY_REGISTRY.from_str(resources.job_recovery["strategy"])
for wrong in ({"recover_on_exit_codes": ["x"]}, {"recover_on_exit_codes": [256]}, {"max_restarts_on_errors": "many"}):
    task = copy.deepcopy(given)
    task["resources"]["job_recovery"] |= wrong
    try:
        read(task)
    except ValueError:
        continue
    raise AssertionError(f"{wrong} is accepted")
try:
    sky.Task.from_yaml_config(copy.deepcopy(given))
except ValueError as error:
    assert "WORKDIR" in str(error), error
else:
    raise AssertionError("nothing asks for WORKDIR")
options = {option for param in command.jobs_launch.params for option in (*param.opts, *param.secondary_opts)}
named = set(re.findall(r"^#.*? (--[a-z-]+) ", text, re.MULTILINE)) | {"--env"}
assert named - {"--num_slices"} <= options, named - options
"""


def test_skypilot_reads_the_task(tmp_path: Path):
    """SkyPilot's own parser, where it is installed, here or for the Python that SKYPILOT_PYTHON names."""
    python = os.environ.get("SKYPILOT_PYTHON", "")
    if not python and find_spec("sky") is None:
        pytest.skip("SkyPilot is not installed: set SKYPILOT_PYTHON to the python of an environment that has it")
    done = subprocess.run(
        [ROOT / python if python else sys.executable, "-c", SKYPILOT_PARSER, SKYPILOT],
        cwd=tmp_path,  # it writes to the home directory
        env=os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- all of them ------------------------------------------------------------------------------------------------------


def test_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    assert shellcheck.exists(), f"{shellcheck} is not there: pip install -e .[test]"
    found = subprocess.run([shellcheck, "-x", *SHELL_FILES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    assert {"launch/gcp.sh", "launch/slurm.sbatch", "tests/run.sh", ".ci/run"} <= set(SHELL_FILES)


@pytest.mark.parametrize("script", [*GCP_SCRIPTS, "launch/worker.sh"])
def test_scripts_can_be_run(script: str):
    assert os.access(ROOT / script, os.X_OK)
