"""Evaluation: every example once, chance for a head that knows nothing, features computed once."""

import functools

import jax
import numpy as np
import pytest

from mae_dist.data import ArrayDataset
from mae_dist.data.from_config import open_data
from mae_dist.evaluation import evaluate
from mae_dist.training import job
from tests.runs import smoke_config


@functools.cache
def build(devices=8, **overrides):
    """A job on smoke.py and its state, which no test changes."""
    config = smoke_config(**{"data__num_examples": 510, "eval__batch_size": 32, **overrides})
    built = job.build(config, jax.devices()[:devices], open_data(config))
    return built, jax.jit(built.init, out_shardings=built.shardings)(np.uint32(built.config.seed))


def split_of(built):
    """Its test split of 102 examples: no multiple of anything here."""
    assert built.data.test is not None
    assert built.data.test.num_examples == 102
    return built.data.test


def evaluate_test(built, state, dataset=None):
    """All metrics of the test split."""
    dataset = dataset or split_of(built)
    batches = evaluate.global_batches(dataset, built.batch_sharding, built.eval_batch_size)
    return evaluate.evaluate(built.eval_step, state.params, batches, "test_", dataset.class_names)


def test_loss_is_the_mean_over_single_examples():
    """Padding, batch size and devices leave no trace: 8 devices x 32 equals 1 device x 1 example."""
    built, state = build()
    alone, alone_state = build(devices=1, eval__batch_size=1)
    np.testing.assert_allclose(
        evaluate_test(built, state)["test_loss"], evaluate_test(alone, alone_state)["test_loss"], rtol=1e-5
    )


def test_every_example_counts_exactly_once():
    """The counts behind the means add up to the split, class by class."""
    built, state = build(task="finetune")
    total = np.zeros(10)
    for batch in evaluate.global_batches(split_of(built), built.batch_sharding, built.eval_batch_size):
        total += np.asarray(built.eval_step(state.params, batch)["per_class"].count)
    labels = split_of(built).examples(np.arange(102))["label"]
    np.testing.assert_array_equal(total, np.bincount(labels, minlength=10))


def test_a_random_head_is_at_chance():
    """Ten classes: 10 %, not the 82 % that element-wise accuracy on one-hot labels would show."""
    built, state = build(task="finetune")
    rng = np.random.default_rng(0)
    count = 4000
    images = rng.integers(0, 256, (count, 16, 16, 3), np.uint8)
    noise = ArrayDataset({"image": images, "label": rng.integers(0, 10, count).astype(np.int32)}, num_classes=10)
    result = evaluate_test(built, state, noise)
    assert 0.08 < result["test_top1"] < 0.12
    assert 0.46 < result["test_top5"] < 0.54


def test_per_class_accuracies_have_the_mean_of_top1():
    """Weighted by their counts, the classes give the whole."""
    built, state = build(task="finetune")
    result = evaluate_test(built, state)
    labels = split_of(built).examples(np.arange(102))["label"]
    per_class = np.array([result[f"test_top1/{name}"] for name in split_of(built).class_names])
    counts = np.bincount(labels, minlength=10)
    assert np.nansum(per_class * counts) / 102 == pytest.approx(result["test_top1"], abs=1e-6)


@pytest.mark.parametrize("count", [20, 21])
def test_of_many_classes_the_lowest_are_named(count):
    """Up to twenty all; of more the five lowest among those with examples, the least and the median."""
    accuracies = np.random.default_rng(count).permutation(count) / count
    accuracies[3] = np.nan
    names = [f"class {number}" for number in range(count)]
    result = evaluate._by_class(accuracies, "val_top1", names)
    assert all(isinstance(value, float) for value in result.values())
    if count == 20:
        assert list(result) == [f"val_top1/{name}" for name in names]
        np.testing.assert_array_equal(list(result.values()), accuracies)
        return
    known = np.sort(np.delete(accuracies, 3))
    assert result.pop("val_top1_min") == known[0]
    assert result.pop("val_top1_median") == (known[9] + known[10]) / 2
    lowest = [number for number in np.argsort(accuracies) if number != 3][:5]
    assert result == {f"val_top1/class {number}": accuracies[number] for number in lowest}


def test_a_split_state_is_gathered_once_for_all_batches():
    """The compiled evaluation exchanges no parameters, and its metrics are those of a whole state."""
    whole, whole_state = build()
    built, state = build(optim__shard_state=True)
    params = built.gather(state.params)
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
    batch = next(iter(evaluate.global_batches(split_of(built), built.batch_sharding, built.eval_batch_size)))
    assert "all-gather" not in (built.eval_step.lower(params, batch).compile().as_text() or "all-gather")
    assert evaluate_test(built, state.replace(params=params)) == evaluate_test(whole, whole_state)
    leaves = zip(jax.tree.leaves(whole.gather(whole_state.params)), jax.tree.leaves(whole_state.params), strict=True)
    assert all(ours is theirs for ours, theirs in leaves), "nothing to gather, nothing copied"


def test_cached_features_give_the_result_of_images():
    """A probe on features is the probe on images, in the order of the split."""
    built, state = build(task="probe", init_from="unused", classify__head="mlp")
    arrays = evaluate.collect(built.features_of(split_of(built), state.params))
    assert arrays["features"].shape == (102, 32)
    np.testing.assert_array_equal(arrays["label"], split_of(built).examples(np.arange(102))["label"])
    cached = ArrayDataset(arrays, num_classes=10, class_names=split_of(built).class_names)
    ours, theirs = evaluate_test(built, state, cached), evaluate_test(built, state)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5)
