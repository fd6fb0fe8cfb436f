"""Pictures of a model: what they may know of removed patches, and that they say so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_dist.evaluation import pictures
from mae_dist.model.hooks import PLAIN
from mae_dist.tasks import losses
from mae_dist.tasks.make import make_task
from tests import QUICK, trained
from tests.runs import smoke_config


@pytest.mark.parametrize("pix_stats", ["true", "visible"])
def test_only_true_moments_show_removed_pixels(pix_stats: str) -> None:
    """A reconstruction that follows changed removed pixels has seen them: so does one with their true moments."""
    source = trained.in_memory(pretrain__norm_pix_loss=True, pictures__pix_stats=pix_stats)
    model = source.config.model
    task = make_task(source.config, 0, PLAIN)
    assert task.reconstruct is not None
    reconstruct, params = jax.jit(task.reconstruct, compiler_options=QUICK), source.load_whole()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, *model.image_size, model.channels), np.uint8)
    index = np.arange(3, dtype=np.int32)
    before = reconstruct(params, {"image": images, "index": index})
    removed = np.asarray(before["masked"] != before["original"]).any(axis=-1, keepdims=True)
    assert 0 < removed.mean() < 1
    after = reconstruct(params, {"image": np.where(removed, images // 3, images), "index": index})
    for column in ("reconstruction", "with_visible"):
        if pix_stats == "visible":
            np.testing.assert_array_equal(before[column], after[column])
        else:
            assert np.abs(before[column] - after[column]).mean() > 0.05


def test_moments_of_removed_patches_are_those_of_the_nearest_visible_ones() -> None:
    rng = np.random.default_rng(0)
    patches = jnp.asarray(rng.random((1, 6, 4), np.float32))  # a row of six
    mask = jnp.array([[0, 1, 1, 1, 1, 0]], jnp.float32)
    for found, own in zip(losses.visible_moments(patches, mask, (1, 6)), losses.patch_moments(patches), strict=True):
        first, last = own[0, 0, 0], own[0, 5, 0]
        expected = [(first / d**2 + last / (5 - d) ** 2) / (1 / d**2 + 1 / (5 - d) ** 2) for d in range(1, 5)]
        np.testing.assert_allclose(found[0, :, 0], [first, *expected, last], rtol=1e-5)


def test_titles_say_what_pictures_know() -> None:
    notes = {
        (norm, stats): pictures.note_on_moments(smoke_config(pretrain__norm_pix_loss=norm, pictures__pix_stats=stats))
        for norm in (False, True)
        for stats in ("true", "visible")
    }
    assert notes[False, "true"] == notes[False, "visible"] == ""
    assert "true mean and deviation of removed patches" in notes[True, "true"]
    assert "estimated from the visible ones" in notes[True, "visible"]
