"""Runs whose workdir is in a bucket: killed, preempted, corrupted, read. Real processes, an emulated Cloud Storage."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] (made when imported)

from mae_dist import storage
from mae_dist.errors import EXIT_CONFIG, EXIT_PREEMPTED, EXIT_STORAGE, ConfigError, StorageFault
from tests.gcs_emulator import GcsEmulator, Refused
from tests.runs import checkpoint_arrays, records, run, start

BUCKET, RUN = "bucket", "some/run"
WORKDIR = f"gs://{BUCKET}/{RUN}"
ARGS = (
    "--config=configs/smoke.py",
    "--config.log_every_steps=1",
    "--config.data.augment=crop_flip",
    "--config.model.drop_path=0.1",
    "--config.model.depth=1",
    "--config.data.num_examples=128",
    "--config.pictures.num_images=2",
    "--config.eval.every_epochs=0",
    "--config.eval.every_steps=0",
    "--config.eval.test_at_end=False",
    "--config.checkpoint.keep_latest=2",
)


@pytest.fixture(scope="module")
def emulator():
    with GcsEmulator([BUCKET], forbidden=["forbidden"]) as emulator:
        yield emulator


@pytest.fixture(scope="module")
def env(emulator, child_env, tmp_path_factory):
    """Of children for whom the emulator is Cloud Storage; whoever imports TensorFlow there fails."""
    tensorflow = tmp_path_factory.mktemp("no") / "tensorflow"
    tensorflow.mkdir()
    (tensorflow / "__init__.py").write_text("raise ImportError('this run is to do without TensorFlow')\n")
    env = child_env()
    return {
        **env,
        "PYTHONPATH": os.pathsep.join((env["PYTHONPATH"], str(tensorflow.parent))),
        "STORAGE_EMULATOR_HOST": emulator.url,
        "TENSORSTORE_GCS_HTTP_URL": emulator.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of a bucket by gRPC, which is not emulated
    }


@pytest.fixture(scope="module")
def uninterrupted(env, tmp_path_factory):
    """The run on a disk."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, output = run(env, *ARGS, f"--workdir={workdir}")
    assert code == 0, output
    return workdir


@pytest.fixture(scope="module")
def interrupted(emulator, env):
    """The same run in a bucket: killed in the midst of its second save, preempted, then finished. The outputs."""
    outputs = []

    def train(code, signal_at="nothing", content=b"", number=signal.SIGKILL, busy=()):
        """Starts the run anew, and sends it a signal just before it writes an object, or one with this content.

        Objects that are `busy` are refused once, as Cloud Storage may at any time.
        """
        process, busy = start(env, *ARGS, f"--workdir={WORKDIR}"), {f"{RUN}/{name}" for name in busy}

        def before_write(name, data):
            if name == f"{RUN}/{signal_at}" and content in data:
                process.send_signal(number)
            if name in busy:
                busy.remove(name)
                raise Refused(503, "try again later")

        emulator.before_write = before_write
        outputs.append(process.communicate(timeout=120)[0])
        assert process.returncode == code, outputs[-1]
        assert not busy

    lease = f"{RUN}/.lock"
    train(-signal.SIGKILL, "checkpoints/10/state/manifest.ocdbt")
    del emulator.buckets[BUCKET][lease]  # or the next one would watch it for half a minute
    code, output = run(env, "list", WORKDIR, module="checkpoint")
    assert (code, output.count("MiB")) == (0, 1), output  # what is incomplete is no checkpoint
    train(EXIT_PREEMPTED, "metrics.jsonl", b'"step": 12,', signal.SIGTERM)
    assert lease not in emulator.buckets[BUCKET]
    train(0, busy=("metrics.jsonl", "checkpoints/15/state/manifest.ocdbt", "checkpoints/15/meta/metadata"))
    return outputs


def test_interrupted_is_bit_equal(emulator, uninterrupted, interrupted, tmp_path):
    """Parameters, moments and every metric are those of the run on a disk that nothing interrupted."""
    killed, preempted, finished = interrupted
    assert "Continuing from" not in killed
    assert "Continuing from step 5 " in preempted
    assert "Preempted: saved step 12;" in preempted
    assert "Continuing from step 12 " in finished
    workdir = emulator.download(BUCKET, RUN, tmp_path)
    assert records(workdir) == records(uninterrupted)
    for a, b in zip(checkpoint_arrays(workdir), checkpoint_arrays(uninterrupted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_missing(emulator, uninterrupted, interrupted, tmp_path):
    """What lies in the bucket is what lies on the disk, file by file."""
    workdir = emulator.download(BUCKET, RUN, tmp_path)

    def names(directory):
        return {
            path.relative_to(directory).as_posix()
            for path in directory.rglob("*")
            if path.is_file() and not {"state", "meta", "tensorboard"} & set(path.parts)
        } - {".lock", *(f"checkpoints/{step}/commit_success.txt" for step in range(21))}

    assert names(workdir) == names(uninterrupted)
    assert json.loads((workdir / "summary.json").read_text())["step"] == 20
    picture = "pictures/step_00000020.png"
    assert (workdir / picture).read_bytes() == (uninterrupted / picture).read_bytes()


def test_tensorboard_events(emulator, interrupted, tmp_path):
    """One object of events for each start, whole records, the last loss in them; the killed one's too."""
    found = sorted((emulator.download(BUCKET, RUN, tmp_path) / "tensorboard").iterdir())
    assert len(found) == 3
    tags = [{value.tag for event in events(path) for value in event.summary.value} for path in found]
    assert {"loss", "reconstruction"} <= tags[-1]
    assert max(event.step for event in events(found[-1])) == 20


def events(path):
    """The events of a file of TensorBoard's: each has its length before it and checksums around."""
    data, found = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


@pytest.mark.long
def test_corruptiond_checkpoint(emulator, env, interrupted):
    """One flipped byte: `verify` tells, the run puts it in quarantine and goes on from the checkpoint before."""
    objects = emulator.buckets[BUCKET]
    corrupted = f"{RUN}/checkpoints/20/"
    victim = max(
        (blob for name, blob in objects.items() if name.startswith(corrupted)), key=lambda blob: len(blob.data)
    )
    objects[victim.name] = dataclasses.replace(victim, data=bytes([victim.data[0] ^ 1]) + victim.data[1:])
    code, output = run(env, "verify", WORKDIR, module="checkpoint")
    assert (code, output.count("good"), output.count("CORRUPTED")) == (EXIT_STORAGE, 1, 1), output
    code, output = run(env, *ARGS, f"--workdir={WORKDIR}")
    assert code == 0, output
    assert "CORRUPTED CHECKPOINT: step 20" in output
    assert "Continuing from step 15" in output
    quarantined = {name.split("/")[3] for name in objects if name.startswith(f"{RUN}/quarantine/")}
    assert {name.partition("_")[0] for name in quarantined} == {"20"}
    assert len(quarantined) == 2  # what was saved, and why it is there
    code, output = run(env, "rm-quarantine", WORKDIR, module="checkpoint")
    assert code == 0, output
    assert output.endswith("1 checkpoints deleted from quarantine\n")
    assert not [name for name in objects if "/quarantine/" in name]


@pytest.mark.long
def test_reconstruct(emulator, env, interrupted):
    """Its picture is in the bucket by default."""
    code, output = run(env, f"--workdir={WORKDIR}", "--num_images=2", module="reconstruct")
    assert code == 0, output
    assert emulator.buckets[BUCKET][f"{RUN}/pictures/test_00000020.png"].data.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("module", "bucket", "said"),
    [("main", "nowhere", "there is no such bucket"), ("checkpoint", "forbidden", "Forbidden")],
)
@pytest.mark.long
def test_bucket_out_of_reach(env, module, bucket, said):
    """Told at once, by its name."""
    path = f"gs://{bucket}/run"
    code, output = run(env, *([*ARGS, f"--workdir={path}"] if module == "main" else ["list", path]), module=module)
    assert code == EXIT_STORAGE, output
    assert f"gs://{bucket}" in output
    assert said in output
    assert "Traceback" not in output


@pytest.mark.parametrize("module", ["gcsfs.retry", "google.api_core.exceptions", "aiohttp.client_exceptions"])
def test_faults_of_the_clients(module):
    """They are no OSErrors; for a bucket the cure is another than for a disk."""
    path = epath.Path("gs://bucket/run")
    fault = type("Fault", (Exception,), {"__module__": module})
    with pytest.raises(StorageFault, match=r"gs://bucket/run: not you\. .*credentials"), storage.storage_errors(path):
        raise fault("not you")
    with pytest.raises(ZeroDivisionError), storage.storage_errors(path):
        raise ZeroDivisionError


def test_extra_is_not_installed(monkeypatch):
    """The message says what to install."""
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e \.\[gcs\]") as error:
        storage.absolute("gs://not-installed/run")
    assert error.value.exit_code == EXIT_CONFIG
