"""The decoder of CrossMAE: what a training predicts, what it shares with the full one, and what may not depend on it.

Its equations are compared with the float64 reference in `test_models`.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mae_dist.cpu import kernels
from mae_dist.errors import StorageFault
from mae_dist.model import masking, patches
from mae_dist.model.build import functional, make_model
from mae_dist.model.hooks import PLAIN, Hooks
from mae_dist.tasks.make import make_task
from mae_dist.weights import compatible, convert, pretrained
from tests import QUICK
from tests.runs import ONLY_UPDATES, checkpoint_arrays, records, run, smoke_config
from tests.trained import in_memory, save

BATCH = 4
CROSS = {"model__decoder": "cross", "model__decoder_depth": 2}
MASKS: dict[str, dict[str, Any]] = {
    "random": {},
    "grid": {"model__masking": "grid"},
    "block": {"model__masking": "block"},
    "user": {"model__masking": "user"},
}


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory) -> str:
    """Keeps 4 of 4 x 4 patches, as the other masks of the smoke test do."""
    path = tmp_path_factory.mktemp("mask") / "mask.npy"
    np.save(path, 1 - np.eye(4, dtype=np.int32))
    return str(path)


@functools.cache
def weights() -> Any:
    """Random values for every parameter that a cross decoder may have."""
    return in_memory(**CROSS, model__fuse_blocks=True, model__layer_scale_init=0.1).load_whole()


def params_of(config: Any) -> Any:
    """Those of `weights` that a model has."""

    def select(shapes: Any, values: Any) -> Any:
        return {k: select(v, values[k]) if isinstance(v, dict) else jnp.asarray(values[k]) for k, v in shapes.items()}

    return select(functional(functools.partial(make_model, config, 0, PLAIN)).abstract, weights())


def batch_of(config: Any) -> dict[str, jax.Array]:
    """Images, and where they are in their split."""
    images = np.random.default_rng(0).integers(0, 256, (BATCH, *config.model.image_size, config.model.channels))
    rows = np.arange(BATCH, dtype=np.int32)
    return {"image": jnp.asarray(images, jnp.uint8), "index": jnp.asarray(rows), "weight": jnp.ones(BATCH)}


def keys_of(seed: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), BATCH)


@pytest.mark.parametrize("masks", MASKS)
def test_predicts_some_of_the_removed_patches(mask_file, masks):
    """Exactly so many, each once, none that is kept, as all would be predicted, and of every removed place in turn."""
    options = {**CROSS, **MASKS[masks], "model__mask_file": mask_file if masks == "user" else ""}
    few, every = (smoke_config(**options, model__predict_ratio=ratio) for ratio in (0.34, 1.0))
    params = params_of(few)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run_both(keys: jax.Array, images: jax.Array) -> Any:
        models = [functional(functools.partial(make_model, c, 0, PLAIN)).bind(params) for c in (few, every)]
        ids_shuffle, kept = models[0].draw_ids_shuffle(keys)
        chosen = masking.keep_predicted(keys, ids_shuffle, kept, 4)
        some = models[0].removed_patches(images, ids_shuffle, kept, keys)
        return ids_shuffle, chosen, some, models[1].removed_patches(images, ids_shuffle, kept, keys)

    # Each image is numbered: a patch's pixels say which it is.
    numbers = np.arange(16.0).reshape(1, 4, 1, 4, 1, 1) / 16
    images = jnp.asarray(np.broadcast_to(numbers, (BATCH, 4, 4, 4, 4, 3)).reshape(BATCH, 16, 16, 3), jnp.float32)
    seen = set()
    for seed in range(12):
        ids_shuffle, chosen, (pred, true), (all_pred, all_true) = run_both(keys_of(seed), images)
        assert pred.shape == true.shape == (BATCH, 4, 48)  # round(0.34 * 12)
        assert all_pred.shape == (BATCH, 12, 48)
        np.testing.assert_array_equal(chosen[:, :4], ids_shuffle[:, :4])
        for b in range(BATCH):
            removed = list(np.asarray(ids_shuffle[b, 4:]))
            for one in (list(np.asarray(chosen[b, 4:])), list(np.round(np.asarray(true[b, :, 0]) * 16).astype(int))):
                assert len(set(one)) == 4
                assert set(one) <= set(removed)
            places = [removed.index(patch) for patch in one]
            np.testing.assert_allclose(pred[b], all_pred[b][jnp.array(places)], atol=1e-5)
            np.testing.assert_array_equal(true[b], all_true[b][jnp.array(places)])
            seen |= set(places)
    assert seen == set(range(12))  # 48 draws of a third miss a place once in 10^7


def test_which_are_predicted_depends_on_the_example_alone():
    """Or a run would change with its devices."""
    ids_shuffle = jnp.broadcast_to(jnp.arange(16), (BATCH, 16))
    chosen = masking.keep_predicted(keys_of(0), ids_shuffle, 4, 5)
    assert len({tuple(row) for row in np.asarray(chosen)}) == BATCH
    np.testing.assert_array_equal(masking.keep_predicted(keys_of(0)[2:], ids_shuffle[2:], 4, 5), chosen[2:])


@pytest.mark.parametrize(("removed", "ratio", "count"), [(12, 0.34, 4), (48, 1 / 3, 16), (147, 0.33, 49), (3, 1.0, 3)])
def test_count_predicted(removed, ratio, count):
    assert masking.count_predicted(removed, ratio) == count


def test_evaluations_and_pictures_are_of_all_removed_patches():
    """So that their losses can be compared with those of any other training."""
    results = []
    for ratio in (0.34, 1.0):
        config = smoke_config(**CROSS, model__predict_ratio=ratio)
        task, params, batch = make_task(config, 10, PLAIN), params_of(config), batch_of(config)
        assert task.reconstruct is not None
        evaluate = jax.jit(task.evaluate, compiler_options=QUICK)
        pictures = jax.jit(task.reconstruct, compiler_options=QUICK)(params, batch)
        results.append((evaluate(params, batch)["loss"].total, pictures))
    jax.tree.map(np.testing.assert_array_equal, *results)
    pictures = results[0][1]
    assert all(picture.shape == (BATCH, 16, 16, 3) for picture in pictures.values())
    shown = {name: np.asarray(patches.patchify(x, (4, 4))) for name, x in pictures.items()}
    hidden = (shown["masked"] != shown["original"]).any(-1)
    assert hidden.sum() == BATCH * 12
    np.testing.assert_array_equal(shown["with_visible"][~hidden], shown["original"][~hidden])
    np.testing.assert_array_equal(shown["with_visible"][hidden], shown["reconstruction"][hidden])


def loss_and_gradients(hooks: Hooks = PLAIN, **options: Any) -> tuple[jax.Array, Any]:
    random = {"model__predict_ratio": 0.5, "model__dropout": 0.2, "model__drop_path": 0.2}
    config = smoke_config(**CROSS, **random, model__layer_scale_init=0.1, **options)
    task, batch = make_task(config, 10, hooks), batch_of(config)

    def loss(params: Any) -> jax.Array:
        return task.loss(params, batch, keys_of(1))[0].mean()

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params_of(config))


@pytest.fixture(scope="module")
def unrolled() -> Any:
    return loss_and_gradients(model__fuse_blocks=True)


@pytest.mark.parametrize(
    ("scan", "remat", "hooks"),
    [
        (False, "blocks", PLAIN),
        (True, "none", PLAIN),
        (True, "dots", PLAIN),
        (False, "none", kernels.make_hooks(False)),
    ],
)
def test_how_it_is_computed_changes_nothing(unrolled, scan, remat, hooks):
    """With a sum of all blocks, whose gradient reaches every block of the encoder, and with dropout."""
    value, grads = loss_and_gradients(hooks, model__fuse_blocks=True, model__scan=scan, model__remat=remat)
    np.testing.assert_allclose(value, unrolled[0], rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(unrolled[1]), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * scale + 1e-9, err_msg=jax.tree_util.keystr(path))


def test_every_parameter_is_trained(unrolled):
    """Also the encoder's last norm and its embedding, which a sum of blocks could leave out."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(unrolled[1]):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 1e-9, jax.tree_util.keystr(path)


def test_another_decoder_to_begin_from_is_refused_with_the_cure(tmp_path: Path):
    """What the message says works: the encoder alone begins any decoder."""
    full = in_memory()
    config = smoke_config(**CROSS, init_from=str(save(tmp_path / "full", full)))
    source = pretrained.open_source(config.init_from, config)
    with pytest.raises(StorageFault, match=r"model.decoder: 'full' -> 'cross'") as caught:
        compatible.check_fits(source.config, config, ["encoder", "decoder"])
    out = f"{config.init_from}_encoder"
    assert f"python -m mae_dist.convert --source={config.init_from} --out={out}" in str(caught.value)
    assert f"--encoder_only and train with --config.init_from={out}" in str(caught.value)
    convert.convert_weights(source, epath.Path(out), "mae_dist", encoder_only=True)
    encoder = pretrained.open_source(out, config)
    assert set(encoder.abstract) == {"encoder"}
    compatible.check_fits(encoder.config, config, ["encoder"])


@pytest.mark.parametrize("to", ["hf", "timm"])
def test_weights_of_other_layouts_have_a_full_decoder(tmp_path: Path, to):
    """Whatever decoder the training has that reads them; without theirs they begin any."""
    config = smoke_config(**CROSS, model__fuse_blocks=True)
    for encoder_only in (False, True):
        path = tmp_path / f"{encoder_only}{'.safetensors' if to == 'timm' else ''}"
        convert.convert_weights(in_memory(), epath.Path(path), to, encoder_only=encoder_only)
        source = pretrained.open_source(path, config)
        groups = list(source.abstract)
        assert groups == ["encoder"] if encoder_only else ["encoder", "decoder"]
        if encoder_only:
            compatible.check_fits(source.config, config, groups)
            continue
        with pytest.raises(StorageFault, match=r"model.decoder: 'full' -> 'cross'(.|\n)*--encoder_only"):
            compatible.check_fits(source.config, config, groups)


@pytest.mark.parametrize("to", ["hf", "timm", "mae_dist"])
def test_conversions(tmp_path: Path, to):
    """Its encoder goes into every layout, all of it into our own."""
    path = tmp_path / f"out{'.safetensors' if to == 'timm' else ''}"
    source = in_memory(**CROSS, model__fuse_blocks=True)
    written = source.load_whole()
    convert.convert_weights(source, epath.Path(path), to, encoder_only=to != "mae_dist")
    opened = pretrained.open_source(path, smoke_config()).load_whole()
    jax.tree.map(np.testing.assert_array_equal, opened, {group: written[group] for group in opened})
    assert ("decoder" in opened) == (to == "mae_dist")


@pytest.mark.long
def test_continues_bit_equal(child_env, tmp_path):
    """A run that is made longer is the run that was that long from the beginning."""
    options = ("--config.model.decoder=cross", "--config.model.predict_ratio=0.34", "--config.model.fuse_blocks=True")
    arguments = ("--config=configs/smoke.py", *options, *ONLY_UPDATES, "--config.optim.schedule=constant")
    workdirs = [tmp_path / name for name in ("whole", "parts")]
    for workdir, steps in ((workdirs[0], 10), (workdirs[1], 5), (workdirs[1], 10)):
        warm_up = "--config.optim.warmup_epochs=0"
        code, output = run(child_env(), *arguments, warm_up, f"--workdir={workdir}", f"--config.total_steps={steps}")
        assert code == 0, output
    assert [record for record in records(workdirs[0]) if "loss" in record][-1] == records(workdirs[1])[-1]
    for a, b in zip(*(checkpoint_arrays(workdir) for workdir in workdirs), strict=True):
        np.testing.assert_array_equal(a, b)
