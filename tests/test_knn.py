"""Neighbours and ridge regression against scikit-learn's, in a run and as a command."""

import json
from typing import Any, cast

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from mae_dist import cli, knn
from mae_dist.data import FirstExamples
from mae_dist.errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError
from mae_dist.evaluation import evaluate, knn_ridge
from tests.runs import ONLY_UPDATES, end_of, records, run, start_processes
from tests.test_evaluate import build
from tests.trained import in_memory, save


@pytest.fixture(scope="module")
def clouds():
    """(features (700, 16), labels) to learn from, (1500, 16) to classify: seven classes that overlap, mean not zero."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(7, 16))

    def draw(count):
        labels = rng.integers(0, 7, count).astype(np.int32)
        features = 3 + 2 * centers[labels] + rng.normal(scale=2, size=(count, 16)) * np.linspace(0.1, 3, 16)
        return features.astype(np.float32), labels

    return draw(700), draw(1500)


# --- the functions


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 1.0), (20, 1e-3)])
def test_knn_is_scikit_learns(clouds, k, temperature):
    """Cosine similarity, exponential weights; also where exp(1 / T) would overflow."""
    (train, labels), (test, _) = clouds

    def weights(distances: np.ndarray) -> Any:
        return np.exp((distances.min(axis=1, keepdims=True) - distances) / temperature)

    theirs = KNeighborsClassifier(k, metric="cosine", weights=cast(Any, weights)).fit(train.astype(np.float64), labels)
    ours = knn_ridge.knn_predict(train, labels, test, num_classes=7, k=k, temperature=temperature)
    np.testing.assert_array_equal(ours, theirs.predict(test.astype(np.float64)))


@pytest.mark.parametrize("ridge", [1e-4, 1e-1, 10.0])
def test_ridge_is_scikit_learns(clouds, ridge):
    """Its penalty is for the sum over examples, ours for the mean; a constant feature changes nothing."""
    (train, labels), (test, true) = clouds
    scaler = StandardScaler().fit(train.astype(np.float64))
    theirs = Ridge(alpha=ridge * len(train)).fit(scaler.transform(train), np.eye(7)[labels])
    wanted = theirs.predict(scaler.transform(test)).argmax(axis=1)
    assert 0.5 < np.mean(wanted == true) < 0.99  # clouds that everything or nothing separates would show little
    for constant in (0, 1000.1):
        columns = [np.pad(x, ((0, 0), (0, 1)), constant_values=constant) for x in (train, test)]
        found = knn_ridge.ridge_predict(columns[0], labels, columns[1], num_classes=7, ridge=ridge)
        np.testing.assert_array_equal(found, wanted)


def test_few_examples_and_zeros():
    """Fewer examples than neighbours, a class without any, features that are all zero."""
    train, labels = np.array([[1, 0], [0, 1], [0, 0.9]], np.float32), np.array([2, 0, 0], np.int32)
    test = np.array([[9, 0.1], [0.1, 1], [0, 0]], np.float32)
    found = knn_ridge.knn_predict(train, labels, test, num_classes=4, k=20, temperature=0.07)
    assert found.tolist() == [2, 0, 0]  # the zeros are as near to all: the majority
    nothing = np.zeros_like(test)
    assert knn_ridge.ridge_predict(nothing, labels, nothing, num_classes=4).tolist() == [0, 0, 0]


@pytest.mark.long
def test_devices_change_nothing():
    """Eight with batches of 32 or one with 7: the same examples, each once, and the same accuracies."""
    found = []
    for options in ({}, {"devices": 1, "eval__batch_size": 7}):
        built, state = build(**options)

        def features(dataset, built=built, state=state):
            return evaluate.collect(built.features_of(dataset, state.params))

        train, test = features(FirstExamples(built.data.train, 150)), features(built.data.test)
        np.testing.assert_array_equal(train["label"], built.data.train.examples(np.arange(150))["label"])
        assert test["features"].shape == (102, 32)
        found.append((train, test, knn_ridge.top1(train, test, num_classes=10, k=20, temperature=0.07, ridge=1e-3)))
    for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
        np.testing.assert_allclose(ours["features"], theirs["features"], rtol=1e-5, atol=1e-5)
    assert found[0][2] == found[1][2]


# --- the command


@pytest.fixture
def command(monkeypatch, capsys):
    """`command(workdir=…, **flags)`: what it prints, run in this process on its eight devices."""

    def run_here(**values):
        monkeypatch.setattr(cli, "join_processes", lambda: None)
        monkeypatch.setattr(cli, "given_config", lambda: None)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        with flagsaver.flagsaver(**values):
            assert knn.knn([]) == EXIT_DONE
        return capsys.readouterr().out

    return run_here


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"workdir": ""}, "--workdir is missing"),
        ({"k": 0}, "--k=0 must be above 0"),
        ({"temperature": float("nan")}, "--temperature=nan must be above 0"),
        ({"ridge": -1.0}, "--ridge=-1.0 must be above 0"),
        ({"train_split": "val"}, "--train_split=val: data.val_split is ''"),
        ({"kind": "cls"}, "'cls' features need a class token"),
    ],
)
def test_wrong_flags_are_refused(command, tmp_path, values, words):
    """One message with the cure, before anything is computed."""
    trained = save(tmp_path / "run", in_memory(model__depth=1, model__cls_token="none", data__val_split=""))
    with pytest.raises(ConfigError, match=words):
        command(**{"workdir": str(trained), **values})


# --- in a run


@pytest.mark.long
def test_within_a_run(child_env, command, tmp_path):
    """Two processes, told within the evaluation, one that continues: nothing is missing, and the command agrees."""
    args = (
        "--config=configs/smoke.py",
        *ONLY_UPDATES,
        "--config.total_steps=10",
        "--config.model.depth=1",
        "--config.data.num_examples=200",
        "--config.eval.test_at_end=True",
        "--config.online.every_steps=5",
        "--config.online.num_train=150",
        f"--workdir={tmp_path / 'run'}",
    )
    processes = start_processes(child_env(), 2, *args, "--simulate_preemption_at_step=5")
    ended = end_of(processes)
    assert [code for code, _ in ended] == [EXIT_PREEMPTED] * 2, "\n".join(output for _, output in ended)
    assert not [record for record in records(tmp_path / "run") if "val_knn_top1" in record]
    code, output = run(child_env(), *args)
    assert code == EXIT_DONE, output
    at = {record["step"]: record for record in records(tmp_path / "run")}
    names = {"val_knn_top1", "val_ridge_top1"}
    assert {step for step, record in at.items() if names <= record.keys()} == {5, 10}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = json.loads(command(workdir=str(tmp_path / "run"), json=True, train_split="train[:150]"))
    assert (found["num_train"], found["num_test"]) == (150, 40)
    for name in ("knn_top1", "ridge_top1"):
        assert found[name] == summary[f"test_{name}"] == at[10][f"test_{name}"], name
    assert "test_knn_top1" in next(line for line in output.splitlines() if line.startswith("smoke: step 10 of 10"))
