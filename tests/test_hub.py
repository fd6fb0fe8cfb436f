"""Weights by hf://OWNER/NAME: downloaded, cached, refused. Real processes and huggingface_hub, an emulated hub."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import pytest
import yaml
from etils import epath

import mae_dist
from mae_dist import convert as convert_command
from mae_dist import names
from mae_dist.config import stored
from mae_dist.errors import ConfigError
from mae_dist.weights import convert, model_card, pretrained
from tests import NO_PARITY, commands
from tests.hub_emulator import TOKEN, HubEmulator
from tests.runs import ONLY_UPDATES, ROOT, end_of, smoke_config, start_processes
from tests.trained import in_memory, save

NOWHERE = "http://127.0.0.1:9"  # nothing listens
MODEL = {"model__layer_scale_init": 0.0, "model__depth": 1, "model__decoder_depth": 1}
ASK = """
import sys
from mae_dist.weights import hub
from mae_dist import errors
for name in sys.argv[1:]:
    try:
        found = hub.download(name)
        print("found", found.path, found.origin, sep="|")
    except errors.UserError as error:
        print(error.exit_code, error, sep="|")
assert not {"jax", "torch"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def emulator():
    with HubEmulator() as emulator:
        yield emulator


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with random weights as `convert --to hf` writes it."""
    out = tmp_path_factory.mktemp("model") / "hf"
    convert.convert_weights(in_memory(**MODEL), epath.Path(out), "hf")
    return out


def _env(emulator, child_env, path):
    return {**child_env(), "HF_HOME": str(path / "hf_home"), "HF_ENDPOINT": emulator.url}


@pytest.fixture
def env(emulator, child_env, tmp_path):
    """Of children for whom the emulator is the hub, with an empty cache."""
    return _env(emulator, child_env, tmp_path)


def python(env, program, *arguments):
    """What a program prints, which must succeed and draw no progress bar."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "Fetching" not in done.stderr
    return done.stdout


def ask(env, *places):
    """[what `hub.download` returns or raises, its fields separated by |] in a new process."""
    return [line.split("|") for line in python(env, ASK, *places).splitlines()]


# --- names


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("hf:/owner/name", "hf://owner/name"),
        ("hf:owner/name", "hf://owner/name"),
        ("HF://owner/name/sub", "hf://owner/name/sub"),
        ("hf://owner", "hf://OWNER/NAME"),
        ("hf:///owner/name", "hf://OWNER/NAME"),
        ("hf://owner/name@", "@REVISION"),
        ("hf://owner/name/../other", "hf://OWNER/NAME"),
        ("hf://datasets/owner/name", "no model"),
        ("huggingface.co/owner/name", "hf://owner/name"),
        ("https://huggingface.co/owner/name", "hf://owner/name"),
        ("https://huggingface.co/owner/name/tree/main", "hf://owner/name"),
        ("https://hf.co/owner/name/tree/v2/sub", "hf://owner/name@v2/sub"),
        ("https://huggingface.co/owner/name/resolve/main/a.pth?download=true", "hf://owner/name/a.pth"),
        ("https://huggingface.co/", "hf://OWNER/NAME"),
    ],
)
def test_mistyped(given, right):
    """Refused with the right form, where weights are opened and when a config is checked."""
    with pytest.raises(ConfigError) as fault:
        pretrained.open_source(given)
    assert re.search(rf"{re.escape(right)}(?![\w/@])", str(fault.value))
    with pytest.raises(ConfigError, match="init_from: "):
        smoke_config(init_from=given)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("owner/name", ("owner/name", "", "")),
        ("owner/name@v1.0/", ("owner/name", "v1.0", "")),
        ("timm/vit_base.mae@refs/pr/3/sub/a.pth", ("timm/vit_base.mae", "refs/pr/3", "sub/a.pth")),
        ("owner/name@a%2Fb/sub", ("owner/name", "a/b", "sub")),
    ],
)
def test_parts(given, parts):
    assert names.hub_fault(f"hf://{given}") == ""
    assert names.hub_parts(f"hf://{given}") == parts
    smoke_config(init_from=f"hf://{given}")


def test_only_weights_are_read_from_there(tmp_path):
    """What is written, or is data, cannot be there; and a commit is of something there."""
    with pytest.raises(ConfigError, match="from which only weights are read"):
        mae_dist.train(smoke_config(), "hf://owner/name")
    for fields in ({"init_commit": "0" * 40}, {"init_commit": "main", "init_from": "hf://owner/name"}):
        with pytest.raises(ConfigError, match="init_commit"):
            smoke_config(**fields)


def test_which_weights_a_run_may_continue_with():
    """Those of the same place; the commit is found by the run, and another one that is asked for is refused."""

    def differences(old, new):
        before, after = (smoke_config(init_from=place, init_commit=commit) for place, commit in (old, new))
        return [line.partition(":")[0] for line in stored.differences(before, after)]

    a, b = "a" * 40, "b" * 40
    assert differences(("hf://o/n", a), ("hf://o/n", "")) == []
    assert differences(("hf://o/n", a), ("hf://o/n", b)) == ["init_commit"]
    assert differences(("hf://o/n@v1", a), ("hf://o/n@v2", "")) == ["init_from"]
    assert differences(("hf://o/n", a), ("hf://p/n", "")) == ["init_from"]
    assert differences(("hf://o/n@v1", a), ("/copies/n", "")) == []


# --- downloads


def test_downloads_what_is_needed(emulator, env):
    """The files of one model at one commit, once, and from the cache when there is no connection."""
    config = b'{"model_type": "vit_mae"}'
    whole = {"config.json": config, "model.safetensors": b"1", "pytorch_model.bin": b"2", "README.md": b"3"}
    shard = "pytorch_model-00001-of-00001.bin"
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    sharded = {"config.json": config, "preprocessor_config.json": b"{}", "pytorch_model.bin.index.json": index}
    files = {**whole, "a.pth": b"4", **{f"sub/{name}": data for name, data in {**sharded, shard: b"5"}.items()}}
    first = emulator.commit("o/needed", files)
    second = emulator.commit("o/needed", {**files, "model.safetensors": b"other"}, branch="v2")
    emulator.requests.clear()
    places = ("hf://o/needed", "hf://o/needed@v2", "hf://o/needed/sub", "hf://o/needed/a.pth", f"hf://o/needed@{first}")
    found = ask(env, *places)
    assert [line[0] for line in found] == ["found"] * 5, found
    origins = [f"hf://o/needed@{commit}" for commit in (first, second, first, first, first)]
    assert [line[2] for line in found] == [
        origins[0],
        origins[1],
        f"{origins[0]}/sub",
        f"{origins[0]}/a.pth",
        origins[0],
    ]
    assert (epath.Path(found[0][1]) / "model.safetensors").read_bytes() == b"1"
    assert (epath.Path(found[1][1]) / "model.safetensors").read_bytes() == b"other"
    assert (epath.Path(found[2][1]) / shard).read_bytes() == b"5"
    assert epath.Path(found[3][1]).read_bytes() == b"4"
    asked = {line.rpartition("/")[2] for line in emulator.requests if "/resolve/" in line and "/sub/" not in line}
    assert asked == {"config.json", "preprocessor_config.json", "model.safetensors", "a.pth"}
    gets = [line for line in emulator.requests if line.startswith("GET /large/")]
    assert len(gets) == len(set(gets)) == 4
    emulator.requests.clear()
    assert ask({**env, "HF_HUB_OFFLINE": "1"}, *places) == found
    assert ask({**env, "HF_ENDPOINT": NOWHERE}, *places) == found
    assert emulator.requests == []


def test_refused(emulator, env):
    """One message with the cure, and the code of a wrong config or of missing data."""
    config = b'{"model_type": "vit_mae"}'
    emulator.commit("o/there", {"config.json": config, "model.onnx": b"1"})
    emulator.commit("o/gated", {"config.json": config, "model.safetensors": b"1"}, access="gated")
    emulator.commit("o/private", {"config.json": config, "model.safetensors": b"1"}, access="private")
    emulator.commit("o/other", {"config.json": b"{}"})
    expected = {
        "hf://o/none": ("2", "there is no repository"),
        "hf://o/private": ("2", "HF_TOKEN"),
        "hf://o/gated": ("3", "accept its conditions at"),
        "hf://o/there@v9": ("2", "no revision 'v9'"),
        "hf://o/there/sub": ("2", "no file sub/config.json"),
        "hf://o/there/sub/a.pth": ("2", "no file sub/a.pth"),
        "hf://o/there": ("3", "has none of model.safetensors"),
        "hf://o/other": ("3", "describes no model"),
        "hf://o/a--b": ("2", "hf://OWNER/NAME"),
    }
    for line, (place, (code, words)) in zip(ask(env, *expected), expected.items(), strict=True):
        assert (line[0], place in line[1], words in line[1]) == (code, True, True), line
    found = ask({**env, "HF_TOKEN": TOKEN}, "hf://o/private", "hf://o/gated")
    assert [line[0] for line in found] == ["found", "found"], found
    ((code, message),) = ask({**env, "HF_HUB_OFFLINE": "1"}, "hf://o/there@v9")
    assert (code, "HF_HUB_OFFLINE is set" in message, "hf download o/there" in message) == ("3", True, True), message


def test_cache_that_cannot_be_written(emulator, env, tmp_path):
    """A fault of storage, by its place."""
    emulator.commit("o/there", {"config.json": b"{}"})
    (tmp_path / "file").write_text("")
    ((code, message),) = ask({**env, "HF_HOME": str(tmp_path / "file")}, "hf://o/there")
    assert (code, str(tmp_path / "file") in message, "HF_HOME" in message) == ("5", True, True), message


@pytest.mark.long
def test_no_connection(emulator, env):
    """Nothing listens, which the client tries for 20 s; a download breaks off, and the next one succeeds."""
    emulator.commit("o/broken", {"config.json": b'{"model_type": "vit"}', "model.safetensors": b"1" * 1000})
    ((code, message),) = ask({**env, "HF_ENDPOINT": NOWHERE}, "hf://o/broken")
    assert (code, "Connection refused" in message, "HTTPS_PROXY" in message) == ("3", True, True), message
    emulator.breaks_off = True
    ((code, message),) = ask(env, "hf://o/broken")
    emulator.breaks_off = False
    assert (code, "repeat the command" in message) == ("3", True), message
    assert ask(env, "hf://o/broken")[0][0] == "found"


def test_without_the_package(env, tmp_path):
    """The command that installs it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'huggingface_hub' else find(name, package)\n"
    )
    ((code, message),) = ask({**env, "PYTHONPATH": f"{tmp_path}:{env['PYTHONPATH']}"}, "hf://o/n")
    assert (code, "pip install -e '.[hub]'" in message) == ("2", True), message


# --- models and runs

READ = """
import os, shutil, sys
import jax, numpy as np
import mae_dist
from etils import epath
from mae_dist.report import runs
from mae_dist.weights import pretrained
source, workdir = sys.argv[1:]
ours = pretrained.open_source(source)
params = ours.load_whole()
for place in ("hf://o/hf", "hf://o/timm", "hf://o/run"):
    found = pretrained.open_source(place, ours.config)
    jax.tree.map(np.testing.assert_array_equal, params, found.load_whole())
    print(found.origin, found.config.data.mean, sorted(found.abstract))
print(mae_dist.load_encoder("hf://o/hf"))
print(mae_dist.open_run("hf://o/run").load_params().keys() == ours.abstract.keys())
try:
    mae_dist.open_run("hf://o/hf")
except mae_dist.errors.StorageFault as fault:
    print(fault)

config = ours.config.copy_and_resolve_references().unlock()
config.update(init_from="hf://o/hf", data={"mean": (), "std": ()}, total_steps=1)
for section in ("eval", "online", "pictures"):
    config[section].update(every_epochs=0.0, every_steps=0)
config.eval.test_at_end = False
mae_dist.train(config, workdir)
commit = mae_dist.open_run(workdir).config.init_commit
(reported,), _ = runs.collect([epath.Path(workdir)])
print(reported.origins[0].place == pretrained.hub.download("hf://o/hf").path, reported.masking.ratio)
shutil.rmtree(os.environ["HF_HOME"])
config.total_steps = 2
print(mae_dist.train(config, workdir).step, os.path.exists(os.environ["HF_HOME"]))
print(commit, mae_dist.open_run(workdir).config.init_commit, mae_dist.open_run(workdir).config.data.mean)
"""


@pytest.fixture(scope="module")
def begun(emulator, child_env, model, tmp_path_factory):
    """(what READ prints, the commits of the repositories, the workdir of its training)."""
    path = tmp_path_factory.mktemp("begun")
    source = save(path / "run", in_memory(**MODEL))
    convert.convert_weights(in_memory(**MODEL), epath.Path(path / "timm" / "model.safetensors"), "timm")
    scaling = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    (path / "timm" / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": scaling}))
    commits = [emulator.upload(f"o/{directory.name}", directory) for directory in (model, path / "timm", source)]
    output = python(_env(emulator, child_env, path), READ, source, path / "trained")
    return output.splitlines(), commits, path / "trained"


def test_reads_every_layout(begun):
    """What `convert` wrote, timm's own directory, a run; and a training from there.

    Its config says which commit, and a restart needs neither connection nor cache.
    """
    lines, commits, _ = begun
    assert lines == [
        f"hf://o/hf@{commits[0]} (0.0, 0.0, 0.0) ['decoder', 'encoder']",
        f"hf://o/timm@{commits[1]} (0.5, 0.4, 0.3) ['decoder', 'encoder']",
        f"hf://o/run@{commits[2]} (0.0,) ['decoder', 'encoder']",
        f"Encoder(hf://o/hf@{commits[0]}: 16x16x3 -> 32, 1 blocks)",
        "True",
        "hf://o/hf is no run of mae_dist; read its weights by mae_dist.load_encoder",
        "True 0.75",
        "2 False",
        f"{commits[0]} {commits[0]} (0.0, 0.0, 0.0)",
    ]


@pytest.mark.long
def test_processes_begin_from_one_commit(emulator, env, model, tmp_path):
    """Process 0 says which, though the branch moves on as soon as it has asked; a restart needs no connection."""
    commit = emulator.upload("o/moves", model)
    other = {**emulator.repositories["o/moves"].commits[commit], "config.json": b"{}"}
    emulator.when_asked = lambda: emulator.commit("o/moves", other)
    arguments = ["--config=configs/smoke.py", *ONLY_UPDATES, f"--workdir={tmp_path}/run"]
    fields = {"init_from": "hf://o/moves", "model.layer_scale_init": 0.0, "model.depth": 1, "model.decoder_depth": 1}
    arguments += [f"--config.{field}={value}" for field, value in fields.items()]
    ends = end_of(start_processes(env, 2, *arguments, "--config.total_steps=1"))
    assert [code for code, _ in ends] == [0, 0], ends
    asked = [line for line in emulator.requests if line.startswith("HEAD /o/moves/resolve/main/")]
    assert asked == ["HEAD /o/moves/resolve/main/config.json"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_commit"] == commit
    assert f"encoder and decoder from hf://o/moves@{commit}" in ends[0][1]
    shutil.rmtree(env["HF_HOME"])
    ends = end_of(start_processes({**env, "HF_ENDPOINT": NOWHERE}, 2, *arguments, "--config.total_steps=2"))
    assert [code for code, _ in ends] == [0, 0], ends
    assert "Continuing from step 1 " in ends[0][1]


# --- the model card


def card_of(path):
    """(text, head) of the card in a directory, as huggingface_hub reads it."""
    card = huggingface_hub.ModelCard.load(path / "README.md")
    assert isinstance(card.data, huggingface_hub.ModelCardData)
    assert yaml.safe_load(card.data.to_yaml()) == card.data.to_dict()
    return card.text, card.data.to_dict()


def test_card_of_a_run(begun, tmp_path):
    """Its data, a command that trains the same, its scores; nobody's directories."""
    _, commits, workdir = begun
    source = pretrained.open_source(workdir)
    trained = source.config.copy_and_resolve_references()
    summary = {**convert_command._summary_of(source), "val_loss": 1.25, "val_knn_top1": 0.5, "test_loss": None}
    convert.convert_weights(source, epath.Path(tmp_path / "my model"), "hf", summary=summary)
    card, head = card_of(tmp_path / "my model")
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["mae_dist", "masked-autoencoder", "vision"],
        "base_model": "o/hf",
    }
    text = " ".join(card.split())
    for words in (
        "`ViTMAEForPreTraining`",
        f"from `hf://o/hf@{commits[0]}`. The weights are those of step 2 of 2",
        "410 images for training (split `train[:80%]`;",
        f"JAX {jax.__version__}",
        "| loss | val | 1.25 | | top-1 accuracy of k nearest neighbours of features | val | 0.5 | ## Use",
        "hf upload OWNER/my-model DIRECTORY",
        "to be stated by their owner",
    ):
        assert words in text
    assert str(tmp_path.parent) not in text
    command = re.search(r"```sh\npython -m mae_dist\.main (.*?)```", card, re.DOTALL)
    assert command is not None
    config = commands.parse("main", shlex.split(command[1]))
    assert config is not None
    assert stored.differences(trained, config) == [f"init_from: 'hf://o/hf' -> 'hf://o/hf@{commits[0]}'"]


def test_card_says_only_what_is_known(model, tmp_path):
    """Nothing of the training of weights that others trained; a data set's id on the hub, if that is known."""
    text, _ = card_of(model)
    for words in ("## Data", "## Training", "## Scores", "step"):
        assert words not in text
    assert "(a test)" in text
    source = pretrained.open_source(save(tmp_path / "run", in_memory(**MODEL)))
    assert source.run is None
    groups, source = source.load_whole(), dataclasses.replace(source, run=epath.Path(tmp_path / "run"))
    for name, wanted in {"cifar10": ["uoft-cs/cifar10"], "theirs/`own`": None}.items():
        config = smoke_config(**MODEL, data__source="tfds", data__name=name, data__data_dir=str(tmp_path))
        path = tmp_path / "README.md"
        path.write_text(model_card.make(source, config, config, groups, "n", {}, "ViTMAEModel"))
        card, head = card_of(tmp_path)
        assert head.get("datasets") == wanted
        assert str(tmp_path) not in card
        assert f"`{name}` of TensorFlow Datasets".replace("`own`", "'own'") in card


RUN_BLOCKS = r"""
import re, sys
import numpy as np
theirs, ours = re.findall(r"```python\n(.*?)```", open(sys.argv[1]).read(), re.DOTALL)
a, b = {}, {}
exec(theirs, a)
exec(ours, b)
if "classes" in a:
    assert a["classes"].shape == (1,), a["classes"]
else:
    np.testing.assert_allclose(a["features"].numpy(), b["features"], rtol=1e-4, atol=1e-5)
print(b["features"].shape)
"""
CARDS = {
    "pretraining": {},
    "gray": {"model__channels": 1},
    "classifier": {"task": "finetune", "classify__pool": "cls"},
}


@pytest.mark.parametrize(
    "kind", [name if name == "pretraining" else pytest.param(name, marks=pytest.mark.long) for name in CARDS]
)
def test_snippets_run(emulator, env, tmp_path, kind):
    """As they stand, from the hub: the features in transformers are ours."""
    pytest.importorskip("torch", reason=NO_PARITY)
    pytest.importorskip("transformers", reason=NO_PARITY)
    source = dataclasses.replace(in_memory(**MODEL, **CARDS[kind]), class_names=tuple("abcdefghij"))
    convert.convert_weights(source, epath.Path(tmp_path / kind), "hf", encoder_only=kind == "gray")
    emulator.upload(f"OWNER/{kind}", tmp_path / kind)
    assert python(env, RUN_BLOCKS, tmp_path / kind / "README.md") == "(1, 32)\n"
    assert card_of(tmp_path / kind)[1]["pipeline_tag"] == (
        "image-classification" if kind == "classifier" else "image-feature-extraction"
    )
    if kind == "classifier":
        assert pretrained.open_source(tmp_path / kind).class_names == source.class_names
