"""Whole commands as a user types them, and what they leave behind."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import cv2
import pytest
from absl.testing import flagsaver

from mae_dist import cli, errors, main
from tests.runs import ONLY_UPDATES, ROOT, kill_at_step, last_step, records, run, start

SLOWER = ("--config.optim.base_lr=2e-3", "--config.log_every_steps=50")
SHORT = ("--config.total_epochs=12", "--config.optim.warmup_epochs=1")
SHORTER = ("--config.total_epochs=3", "--config.optim.warmup_epochs=1")  # where no accuracy is asked for


@pytest.fixture(scope="module")
def quickstart(child_env, tmp_path_factory):
    """The quick start's pretraining, shortened."""
    workdir = tmp_path_factory.mktemp("quickstart") / "run"
    code, output = run(child_env(), "--config=configs/quickstart.py", *SHORT, f"--workdir={workdir}")
    assert code == 0, output
    return workdir, output


def assert_picture(path):
    """A PNG of some size that is not of one colour."""
    picture = cv2.imread(str(path))
    assert picture is not None
    assert picture.shape[0] > 200
    assert picture.std() > 20


@pytest.mark.long
def test_pretraining_learns_and_reports(quickstart):
    """The files others rely on, a loss that falls, one line of result, what comes next."""
    workdir, output = quickstart
    result, following = output.rstrip().split("\nnext:\n")
    assert result.splitlines()[-1].startswith("quickstart: step 121 of 121, loss ")
    assert [line.partition(" -m ")[2] for line in following.splitlines()] == [
        f"mae_dist.reconstruct --workdir {workdir}",
        f"mae_dist.main --config quickstart_probe --config.init_from={workdir}",
        f"mae_dist.report {workdir} --out report.html",
    ]
    assert "mesh data=1 x fsdp=1 x tensor=1" in output
    found = records(workdir)
    val = [record["val_loss"] for record in found if "val_loss" in record]
    assert len(val) == 2
    assert val[-1] < val[0] < 1  # the pixels' variance
    summary = json.loads((workdir / "summary.json").read_text())
    assert {"step", "loss", "val_loss", "test_loss", "images_per_sec", "environment"} <= summary.keys()
    assert json.loads((workdir / "config.json").read_text())["name"] == "quickstart"
    assert (workdir / "checkpoints" / "121").is_dir()
    assert list((workdir / "tensorboard").iterdir())
    assert_picture(workdir / "pictures" / "step_00000121.png")


@pytest.mark.long
def test_reconstruct(quickstart, child_env, tmp_path):
    """A picture of any split and size, where asked; other devices and pieces than in training."""
    workdir = tmp_path / "run"
    shutil.copytree(quickstart[0], workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["cpu"]["pieces"] = 4  # as a larger batch would have it
    (workdir / "config.json").write_text(json.dumps(config))
    out = tmp_path / "a" / "picture.png"
    code, output = run(
        child_env(8), f"--workdir={workdir}", f"--out={out}", "--num_images=3", "--split=train", module="reconstruct"
    )
    assert code == 0, output
    assert str(out) in output
    assert_picture(out)
    flags = (f"--workdir={workdir}", "--num_images=2", "--over_steps")
    code, output = run(child_env(), *flags, f"--out={tmp_path / 'steps.png'}", module="reconstruct")
    assert code == 0, output
    shown = cv2.imread(str(tmp_path / "steps.png"))
    assert shown is not None
    steps = len(list((workdir / "checkpoints").iterdir()))
    assert shown.shape[1] == pytest.approx(135 * (2 + steps) * 2, abs=2)  # two images, a column for each step


@pytest.mark.long
def test_reconstruct_beside_others(quickstart, child_env, tmp_path):
    """Three columns more for each other pretraining, of the same images; what cannot be compared is refused."""
    first, second, wider = tmp_path / "a", tmp_path / "b", tmp_path / "wider"
    for workdir, change in ((first, {}), (second, {"masking": "grid"}), (wider, {"image_size": [16, 16]})):
        shutil.copytree(quickstart[0], workdir)
        config = json.loads((workdir / "config.json").read_text())
        config["model"].update(change)
        (workdir / "config.json").write_text(json.dumps(config))
    flags = (f"--workdir={first}", "--num_images=2", f"--out={tmp_path / 'beside.png'}")
    code, output = run(child_env(), *flags, f"--beside={second}", module="reconstruct")
    assert code == 0, output
    shown = cv2.imread(str(tmp_path / "beside.png"))
    assert shown is not None
    assert shown.shape[1] == pytest.approx(135 * (1 + 3 + 3), abs=2)
    code, output = run(child_env(), *flags, f"--beside={second},{wider}", module="reconstruct")
    assert code == 2
    assert "its model.image_size is (16, 16)" in output
    code, output = run(child_env(), *flags, f"--beside={second}", "--pca", module="reconstruct")
    assert code == 2
    assert "neither --pca nor --over_steps" in output


@pytest.mark.long
@pytest.mark.parametrize("task", ["probe", "finetune", "scratch"])
def test_three_ways_to_an_accuracy(quickstart, child_env, tmp_path, task):
    """A probe computes its features once; an encoder says whence it came; even from scratch, digits are learnt."""
    workdir, _ = quickstart
    extra = {
        "probe": (f"--config.init_from={workdir}", "--config.total_epochs=30"),
        "finetune": ("--config.task=finetune", f"--config.init_from={workdir}", *SHORTER, *SLOWER),
        "scratch": ("--config.task=finetune", "--config.init_from=", *SHORT, *SLOWER),
    }[task]
    target = tmp_path / task
    code, output = run(child_env(), "--config=configs/quickstart_probe.py", *extra, f"--workdir={target}")
    assert code == 0, output
    assert ("Features of the frozen encoder computed once" in output) == (task == "probe")
    assert ("encoder from" in output) == (task != "scratch")
    summary = json.loads((target / "summary.json").read_text())
    assert {"val_top1", "test_top1", "test_top5", "test_top1/0", "test_top1/9", "top1"} <= summary.keys()
    right = summary["train_top1"] * 1294  # images of the training split, all of which were looked at
    assert right == pytest.approx(round(right), abs=1e-2)
    if task == "scratch":
        assert summary["test_top1"] > 0.5  # chance: 0.1


@pytest.mark.long
def test_eight_devices_print_their_layout(child_env, tmp_path):
    """overview.txt, and with --verbose the log: mesh, spec and bytes of every parameter, what is whole and why."""
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    workdir = tmp_path / "run"
    code, output = run(child_env(8), "--config=configs/smoke.py", *mesh, "--verbose", f"--workdir={workdir}")
    assert code == 0, output
    written = (workdir / "overview.txt").read_text()
    assert written in output
    assert "mesh: data=2 x fsdp=2 x tensor=2 (8 devices)" in written
    assert "encoder/stack/blocks/attn/qkv/kernel" in written
    assert "whole on every device, small: its rule leaves it whole" in written


@pytest.fixture
def run_here(monkeypatch, capfd):
    """`run_here(*args)`: (exit code, output) of a training in this process, which ends before it computes."""

    def run_main(*args):
        argv = ["main", *args]
        monkeypatch.setattr(sys, "argv", argv)  # config_flags looks for overrides there
        monkeypatch.chdir(ROOT)
        with flagsaver.flagsaver():
            code = errors.exit_code_of(lambda: main.main(cli.parse_flags(argv)))
        return code, "".join(capfd.readouterr())

    return run_main


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of config_flags
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--config.model.mask_ration=0.5",), "mask_ratio"),
        (("--config.model.depth=two",), "depth"),
        (("--config.model.patch_size=(5,5)",), "does not divide the image height 16"),
        (("--config.model.masking=grid", "--config.model.mask_ratio=0.6"), "ratios it can give"),
        (("--config.data.source=digit",), "Did you mean 'digits'?"),
        (("--confg.seed=1",), "confg"),
        (("surplus",), "unexpected arguments"),
    ],
)
def test_bad_config_is_one_clear_error(run_here, tmp_path, args, expected):
    """Exit code 2, the cure, no traceback, nothing written."""
    workdir = tmp_path / "run"
    code, output = run_here("--config=configs/smoke.py", *args, f"--workdir={workdir}")
    assert code == 2, output
    assert expected in output
    assert "Traceback" not in output
    assert not workdir.exists()


def test_too_few_devices_are_one_clear_error(child_env, tmp_path):
    """As above, from the process itself."""
    workdir = tmp_path / "run"
    code, output = run(child_env(), "--config=configs/smoke.py", "--config.mesh.data=3", f"--workdir={workdir}")
    assert code == 2, output
    assert "needs 3 devices and there are 1" in output
    assert "Traceback" not in output
    assert not workdir.exists()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of config_flags
def test_no_config_and_no_such_config(run_here):
    """The two commonest mistakes."""
    code, output = run_here()
    assert code == 2
    assert "configs/smoke.py" in output
    code, output = run_here("--config=configs/no_such.py")
    assert code == 2
    assert "no_such.py" in output
    assert "Traceback" not in output


def test_divergence_stops_the_run(child_env, tmp_path):
    """Non-finite updates are skipped, counted, and end the run with its own code; what was saved stays."""
    code, output = run(
        child_env(),
        "--config=configs/smoke.py",
        "--config.data.std=(1e-38,)",  # inputs overflow, gradients are NaN
        "--config.max_skipped_steps=5",
        f"--workdir={tmp_path / 'run'}",
    )
    assert code == 4, output
    assert "updates in a row, the last by step 5, had a non-finite gradient" in output
    assert [record["skipped_run"] for record in records(tmp_path / "run")] == [5]


def test_unwritable_workdir_is_one_clear_error(child_env, tmp_path):
    """A file where the workdir should be: works for root, too, for whom no directory is read-only."""
    (tmp_path / "file").write_text("")
    code, output = run(child_env(), "--config=configs/smoke.py", f"--workdir={tmp_path / 'file' / 'run'}")
    assert code == 5, output
    assert str(tmp_path / "file" / "run") in output
    assert "Traceback" not in output


FORTY_STEPS = ("--config=configs/smoke.py", "--config.total_steps=40", "--config.log_every_steps=1")


@pytest.fixture(scope="module")
def begun(child_env, tmp_path_factory):
    """A run killed a few steps after its first checkpoint."""
    workdir = tmp_path_factory.mktemp("begun") / "run"
    kill_at_step(start(child_env(), *FORTY_STEPS, f"--workdir={workdir}"), workdir, 11)
    return workdir


@pytest.mark.parametrize(("limit_kib", "named"), [(5, "metrics.jsonl"), (40, "checkpoints")])
@pytest.mark.long
def test_full_disk_ends_with_its_code_and_harms_nothing(begun, child_env, tmp_path, limit_kib, named):
    """A limit on the size of a file stands for the disk: the last good checkpoint continues afterwards."""
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    args = (*FORTY_STEPS, f"--workdir={workdir}")
    env = child_env()
    # The files of the compilation cache would be too large as well: it is read only.
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
    every_steps = "--config.checkpoint.every_steps=" + ("5" if named == "checkpoints" else "1000")
    limited = start(env, *args, every_steps, "--config.checkpoint.retries=0", file_limit_kib=limit_kib)
    output, _ = limited.communicate(timeout=240)
    assert limited.returncode == 5, output
    assert f"error: {'checkpoint' if named == 'checkpoints' else 'cannot'}" in output
    assert str(workdir / named) in output
    code, output = run(child_env(), *args)
    assert code == 0, output
    assert [record["step"] for record in records(workdir)] == list(range(1, 41))


@pytest.mark.long
def test_failed_save_is_tried_again(child_env, tmp_path):
    """The disk is full for a while, within a background save: it is told, and nothing is lost in the end."""
    workdir = tmp_path / "run"
    env = child_env()
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
    args = ("--config.total_steps=20000", "--config.checkpoint.every_steps=20")
    process = start(env, "--config=configs/smoke.py", *ONLY_UPDATES, *args, f"--workdir={workdir}", file_limit_kib=40)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "A SAVE FAILED" in line:
            break
    assert process.poll() is None, "".join(lines)
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)  # somebody made room
    deadline = time.monotonic() + 60
    while not (list(workdir.glob("seals/*.json")) and last_step(workdir) > 200):
        assert time.monotonic() < deadline, "no save succeeded"
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    code, output = run(child_env(), "verify", str(workdir), module="checkpoint")
    assert code == 0, output


@pytest.mark.long
def test_a_failed_save_does_not_hold_up_the_end(child_env, tmp_path):
    """One whose directory cannot be made leaves no thread that waits for it, as Orbax's would for five minutes."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    program = """if True:
        import sys, threading
        from etils import epath
        from configs import smoke
        from mae_dist import cli, errors
        from mae_dist.checkpoint import reader

        def entry(argv):
            try:
                reader.save_params(epath.Path(sys.argv.pop()), smoke.get_config(), {"encoder": {}}, "a test")
            except errors.StorageFault:
                print([thread for thread in threading.enumerate() if type(thread).__module__.startswith("orbax")])
                return 0

        cli.run(entry)
    """
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=child_env(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stdout + done.stderr


@pytest.mark.long
def test_update_is_compiled_while_the_state_is_created(child_env, tmp_path):
    """Once, in a thread of its own: compiled twice, a start would take twice as long and nobody would know."""
    env = {**child_env(devices=2), "JAX_LOG_COMPILES": "1"}
    code, output = run(
        env,
        "--config=configs/smoke.py",
        "--config.total_steps=2",
        *ONLY_UPDATES,
        "--verbose",  # names threads
        f"--workdir={tmp_path / 'run'}",
    )
    assert code == 0, output
    lines = re.findall(
        r"warning: (.+) \S+\] Finished XLA compilation of jit\((init|train_step)\)", output, re.MULTILINE
    )
    threads = {program: thread for thread, program in lines}
    assert sorted(program for _, program in lines) == ["init", "train_step"], output
    assert threads["init"] != threads["train_step"]


@pytest.mark.long
def test_a_fault_of_ours_while_the_update_is_compiled(child_env, tmp_path):
    """A traceback and code 1: an interpreter that ends beside a compilation would crash, and tell of that instead."""
    program = """if True:
        from mae_dist import cli, main
        from mae_dist.training import job

        def broken(self):
            raise RuntimeError("a bug")

        job.Job.init_state = broken
        cli.run(main.main)
    """
    command = [sys.executable, "-c", program, "--config=configs/smoke.py", f"--workdir={tmp_path / 'run'}"]
    env = {name: value for name, value in child_env().items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("RuntimeError: a bug\n"), done.stderr
    assert done.stderr.count("Traceback") == 1


def test_data_fault_has_its_own_code(child_env, tmp_path):
    """A TFDS directory that is not there, with no network to fetch it."""
    env = {**child_env(), "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    code, output = run(
        env,
        "--config=configs/cifar_small.py",
        f"--config.data.data_dir={tmp_path / 'tfds'}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert code == 3, output
    assert "configs/quickstart.py" in output
    assert "Traceback" not in output


def test_help_is_quick_and_complete():
    """--help lists the flags without importing JAX."""
    code = "import sys, runpy; sys.argv = ['main', '--help']; runpy.run_module('mae_dist.main', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    assert "--workdir" in text
    assert "--config" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("body", "is_read", "expected"),
    [
        ("print('a line', flush=True)", False, 141),
        ("print('a line'); return 0", False, 141),
        ("print('a line'); return 75", False, 75),
        ("print('a line'); return 75", True, 75),
        ("raise BrokenPipeError('to a worker')", True, 1),
    ],
)
def test_output_that_nobody_reads(body, is_read, expected):
    """Ends a command without a traceback, as other programs end; another pipe that broke is a fault."""
    program = f"from mae_dist import cli\ndef entry(argv):\n    {body}\ncli.run(entry)"
    reader, writer = os.pipe()
    if not is_read:
        os.close(reader)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    for end in (reader, writer) if is_read else (writer,):
        os.close(end)
    assert done.returncode == expected, done.stderr
    assert ("Traceback" in done.stderr, "ignored" in done.stderr) == (expected == 1, False), done.stderr


@pytest.mark.long
def test_interrupt_from_the_keyboard_can_be_continued(child_env, tmp_path):
    """Ctrl-C ends the process; the same line goes on."""
    workdir = tmp_path / "run"
    args = (
        "--config=configs/smoke.py",
        *ONLY_UPDATES,
        "--config.total_steps=200",
        "--config.log_every_steps=1",
        "--config.checkpoint.every_steps=50",
        f"--workdir={workdir}",
    )
    process = start(child_env(), *args)
    while last_step(workdir) < 50:  # when a save begins, which an interrupt must not tear apart
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    code, output = run(child_env(), *args)
    assert code == 0, output
    assert "Continuing from step" in output
    assert [record["step"] for record in records(workdir)] == list(range(1, 201))
