"""What users add from a module of their own: every kind of extension, in one run."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

import mae_dist
from mae_dist import config as config_lib
from mae_dist.checkpoint import reader
from mae_dist.data.from_config import open_data
from mae_dist.errors import ConfigError
from mae_dist.model import masking
from mae_dist.registry import Registry, named_arguments
from mae_dist.report import runs as report_runs
from mae_dist.resilience.preemption import PreemptionSignals
from mae_dist.resilience.watchdog import Watchdog
from mae_dist.training import job, loop
from tests.runs import checkpoint_arrays, records, smoke_config

MODULE = '''
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mae_dist.data
import mae_dist.optim
import mae_dist.tasks
from mae_dist.tasks import make_pretrain


def half(grid):
    return grid[0] * grid[1] // 2


@mae_dist.masking.register("rows", count=half)
def rows(key, grid, num_keep):
    """Keeps neighbouring rows of patches, from a random one on."""
    return (jnp.arange(grid[0] * grid[1]) + grid[1] * jax.random.randint(key, (), 0, grid[0])) % (grid[0] * grid[1])


@mae_dist.tasks.register("l1_pretrain", like="pretrain")
def l1_pretrain(config, num_classes, constrain):
    return make_pretrain(config, constrain, error=lambda pred, target: jnp.abs(pred - target))


@mae_dist.optim.register("lion")
def lion(*, b1, b2):
    return optax.scale_by_lion(b1, b2)


@mae_dist.data.register_source("ramps")
def ramps(split, *, image_size, channels, num_examples):
    labels = np.arange(num_examples, dtype=np.int32) % 4
    slopes = np.linspace(0, 200, image_size[1])[:, None] * np.ones(channels)
    images = (slopes + 10 * labels[:, None, None, None] + np.zeros((1, image_size[0], 1, 1))).astype(np.uint8)
    return mae_dist.data.ArrayDataset({"image": images, "label": labels}, num_classes=4)


@mae_dist.data.register_augmentation("dim", num_uniforms=1, flip=True)
def dim(image, uniforms):
    return (image * (0.5 + 0.5 * uniforms[0])).astype(np.uint8)
'''
FIELDS = {
    "imports": ("my_parts",),
    "task": "l1_pretrain",
    "model__masking": "rows",
    "model__depth": 1,
    "optim__name": "lion",
    "data__source": "ramps",
    "data__augment": "dim",
    "data__num_examples": 64,
    "data__val_split": "",
    "eval__test_at_end": False,
    "total_steps": 4,
    "log_every_steps": 1,
    "pictures__every_steps": 4,
    "checkpoint__every_steps": 2,
}


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a user's `my_parts`, importable here as where a user starts."""
    directory = tmp_path_factory.mktemp("user")
    (directory / "my_parts.py").write_text(MODULE)
    sys.path.append(str(directory))
    return directory


def train(built: job.Job, workdir: Path, preemption: PreemptionSignals) -> str:
    """Returns how the run ended."""
    with Watchdog(**built.config.deadlines) as watchdog, preemption.handling(""):
        return loop.train(built, epath.Path(workdir), watchdog, preemption).status


@pytest.mark.long
def test_a_run_of_nothing_but_a_users_parts(module, tmp_path):
    """Trained at once, or stopped and continued with workers: bit-equal; and what it learned can be used."""
    del module
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = smoke_config(**FIELDS)
    built = job.build(config, jax.devices()[:1], open_data(config))
    assert train(built, whole, PreemptionSignals()) == "done"
    assert train(built, parts, PreemptionSignals(2)) == "preempted"
    with built.config.unlocked():
        built.config.data.num_workers = 1  # a process that has to import the module too
    assert train(built, parts, PreemptionSignals()) == "done"
    wholly, partly = ([r["loss"] for r in records(path) if "loss" in r] for path in (whole, parts))
    assert len(wholly) == 4
    assert partly == wholly
    for a, b in zip(checkpoint_arrays(whole), checkpoint_arrays(parts), strict=True):
        np.testing.assert_array_equal(a, b)

    assert any((whole / "pictures").iterdir())
    assert mae_dist.load_encoder(whole).features(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 32)
    (found,), unreadable = report_runs.collect([epath.Path(whole)])
    assert unreadable == []
    assert found.masking == report_runs.Masking("rows", 0.75, "")
    smoke_config(task="probe", init_from=str(whole))


def test_names_of_users_are_choices(module):
    """Suggested, and counted as they say."""
    del module
    with pytest.raises(ConfigError) as refused:
        smoke_config(imports=("my_parts",), model__masking="row", task="l1_pretrian", optim__name="loin")
    for name in ("rows", "l1_pretrain", "lion"):
        assert f"Did you mean {name!r}?" in str(refused.value)
    assert masking.count_kept(strategy="rows", grid=(4, 4), mask_ratio=0.75) == 8


def test_modules_that_cannot_be_imported(tmp_path, monkeypatch):
    """The field, the module and the cure; of a stored run too, which a report lists."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match=r"imports names 'my_part_s', and there is no module .* PYTHONPATH"):
        smoke_config(imports=("my_part_s",))
    (tmp_path / "my_broken_parts.py").write_text("import math\nmath.nothing\n")
    with pytest.raises(ConfigError, match=r"fails at .*my_broken_parts.py, line 2: AttributeError"):
        smoke_config(imports=("my_broken_parts",))
    stored = json.loads(config_lib.to_json(smoke_config())) | {"imports": ["my_part_s"]}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"config.json: imports names 'my_part_s'"):
        reader.read_config(epath.Path(tmp_path))
    found, (unreadable,) = report_runs.collect([epath.Path(tmp_path)])
    assert found == []
    assert "imports names 'my_part_s'" in unreadable
    (tmp_path / "config.json").write_text(json.dumps(stored | {"imports": [], "task": "theirs"}))
    with pytest.raises(ConfigError, match=r"task='theirs' is not one of .* name that module in imports"):
        reader.read_config(epath.Path(tmp_path))


def test_a_name_has_one_owner():
    """Two functions under one name would be a run that nobody can repeat; the same again is a notebook's cell."""
    registry: Registry[int] = Registry("model.masking")
    registry.add("one", 1, test_a_name_has_one_owner)
    registry.add("one", 2, test_a_name_has_one_owner)
    assert registry.get("one") == 2
    with pytest.raises(ConfigError, match=r"model.masking='one' is registered by tests.test_registry.test_a_name"):
        registry.add("one", 3, smoke_config)
    with pytest.raises(ConfigError, match="Did you mean 'one'"):
        registry.get("on")


def test_a_function_is_given_what_it_names():
    """A field that does not exist is a typo of the user's."""

    def function(split: str, *, channels: int, extra: int = 0) -> None: ...

    assert named_arguments(function, {"channels": 3, "name": ""}, "it") == {"channels": 3}
    with pytest.raises(ConfigError, match=r"it asks for 'channels'.*Did you mean 'channel'"):
        named_arguments(function, {"channel": 3}, "it")


def test_a_strategy_returns_all_patches(monkeypatch):
    """Said before a gather of wrong indices trains on something else."""
    monkeypatch.setattr(masking, "STRATEGIES", Registry("model.masking"))

    @masking.register("half_of_them")
    def half_of_them(key, grid, num_keep):
        del key, grid
        return np.arange(num_keep)

    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ConfigError, match=r"model.masking='half_of_them' returns int\d+ of shape \(4,\)"):
        masking.draw_ids_shuffle(keys, strategy="half_of_them", grid=(4, 4), mask_ratio=0.75)
