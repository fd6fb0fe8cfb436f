"""The batch at step t is a pure function of (seed, t); evaluation counts every example once; sources and splits."""

import pickle
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mae_dist.data import (
    ArrayDataset,
    Dataset,
    RandAugment,
    draws,
    eval_batches,
    local_rows,
    num_readers,
    open_split,
    to_global,
    train_batches,
)
from mae_dist.data.batches import stream_indices
from mae_dist.data.splits import Span, parse_split
from mae_dist.data.transforms import RandomCrops
from mae_dist.errors import ConfigError, DataFault

ALL_KINDS = ["none", "flip", "crop_flip"]
RANDAUGMENT = RandAugment(2, 9.0, 0.5, (128, 0, 255))


def _images(count: int, size: int = 8) -> ArrayDataset:
    pixels = np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return ArrayDataset({"image": pixels, "label": np.arange(count, dtype=np.int32)}, num_classes=count)


def _open(split: str = "train", **changes: object) -> Dataset:
    arguments: dict[str, object] = {
        "image_size": (8, 8),
        "channels": 3,
        "source": "synthetic",
        "name": "",
        "data_dir": "",
        "cache": "auto",
        "cache_dir": "",
        "stage": False,
        "max_bad_share": 0.0,
        "num_examples": 50,
        "num_classes": 10,
    }
    return open_split(split, **(arguments | changes))  # type: ignore[arg-type]


def _train(
    dataset: Dataset,
    rows: np.ndarray,
    *,
    batch: int = 8,
    start: int = 0,
    stop: int = 6,
    kind: str = "crop_flip",
    workers: int = 0,
    randaugment: RandAugment | None = None,
    repeats: int = 1,
) -> list[dict[str, np.ndarray]]:
    with train_batches(
        dataset,
        augment=kind,
        randaugment=randaugment,
        repeats=repeats,
        seed=7,
        global_batch_size=batch,
        start_step=start,
        total_steps=stop,
        rows=rows,
        num_workers=workers,
    ) as batches:
        return list(batches)


def _assert_same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


class _SomeUnreadable(Dataset):
    """Wraps a dataset: the examples in `unreadable` behave as records that do not decode."""

    in_memory = False

    def __init__(self, inner: Dataset, unreadable: list[int], max_bad_share: float):
        self.inner = inner
        self.unreadable = unreadable
        self.num_examples, self.num_classes = inner.num_examples, inner.num_classes
        self.class_names, self.fingerprint = inner.class_names, inner.fingerprint
        self.max_bad_share = max_bad_share

    def read(
        self, indices: np.ndarray, crops: RandomCrops | None = None, evaluation: bool = True
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        columns, _ = self.inner.read(indices, crops, evaluation)
        bad = np.isin(indices, self.unreadable)
        columns["image"][bad] = 0
        return columns, bad


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 2**40))
def test_the_stream_holds_every_example_once_an_epoch(num_examples: int, batch: int, seed: int) -> None:
    steps = -(-3 * num_examples // batch)
    rows = np.arange(batch)
    stream = np.concatenate([stream_indices(seed, step, batch, rows, num_examples) for step in range(steps)])
    for epoch in range(3):
        seen = stream[epoch * num_examples : (epoch + 1) * num_examples]
        np.testing.assert_array_equal(np.sort(seen), np.arange(num_examples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    rows = np.arange(100)
    orders = [tuple(stream_indices(seed, step, 100, rows, 100)) for seed in (0, 1) for step in (0, 1)]
    assert len(set(orders)) == 4
    assert all(order != tuple(range(100)) for order in orders)


def test_the_order_never_changes() -> None:
    # A resumed run must see the order it started with, also under a newer NumPy.
    assert stream_indices(3, 1, 8, np.arange(8), 12).tolist() == [5, 6, 9, 10, 6, 2, 11, 1]


@settings(max_examples=settings().max_examples // 5)
@given(
    st.integers(5, 30),
    st.sampled_from([4, 8, 12]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 5),
    st.sampled_from(ALL_KINDS),
)
def test_batches_do_not_depend_on_hosts_or_start_step(
    num_examples: int, batch: int, hosts: int, start: int, kind: str
) -> None:
    dataset = _images(num_examples)
    whole = _train(dataset, np.arange(batch), batch=batch, kind=kind)
    shares = [_train(dataset, rows, batch=batch, start=start, kind=kind) for rows in np.split(np.arange(batch), hosts)]
    joined = [
        {name: np.concatenate([b[name] for b in parts]) for name in parts[0]} for parts in zip(*shares, strict=True)
    ]
    _assert_same(joined, whole[start:])


@pytest.mark.parametrize("cache", ["stream", "memory"])
def test_batches_do_not_depend_on_workers(cache: str) -> None:
    dataset = _open(cache=cache)
    rows = np.array([1, 2, 5])
    workers, alone = (
        _train(dataset, rows, start=start, workers=workers, randaugment=RANDAUGMENT, repeats=2)
        for start, workers in ((2, 2), (0, 0))
    )
    _assert_same(workers, alone[2:])


_IS_LARGE_BLOCK_MAPPED = """
import ctypes, sys
import numpy as np
from mae_dist.data import workers

class Info(ctypes.Structure):  # mallinfo2 of glibc's malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
if sys.argv[1] == "worker":
    workers.keep_memory_level()
np.empty(20 * 2**20, np.uint8)  # freed at once, whereupon glibc would take such blocks from its heap
before = libc.mallinfo2().hblks
block = np.empty(4 * 2**20, np.uint8)
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.33"), reason="mallinfo2 is of glibc 2.33")
@pytest.mark.parametrize(("process", "mapped"), [("worker", 1), ("other", 0)])
def test_large_blocks_of_a_worker_are_not_of_its_heap(process: str, mapped: int) -> None:
    """Else photographs of all sizes break the heap up, and the worker grows for as long as it lives."""
    command = [sys.executable, "-c", _IS_LARGE_BLOCK_MAPPED, process]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) == mapped


def test_a_worker_reads_a_mapped_file_by_its_path(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    columns = {"features": np.load(tmp_path / "features.npy", mmap_mode="r"), "label": np.zeros(2000, np.int32)}
    dataset = ArrayDataset(columns, num_classes=1, paths={"features": tmp_path / "features.npy"})
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 10_000
    again = pickle.loads(pickled)
    np.testing.assert_array_equal(again.examples(np.array([5, 3]))["features"], features[[5, 3]])
    assert again.fingerprint == dataset.fingerprint


def test_augmentation_changes_images_and_never_labels() -> None:
    dataset = _images(16)
    rows = np.arange(16)
    plain, flipped, cropped = (_train(dataset, rows, batch=16, stop=1, kind=kind)[0] for kind in ALL_KINDS)
    np.testing.assert_array_equal(plain["label"], flipped["label"])
    np.testing.assert_array_equal(plain["label"], cropped["label"])
    mirrored = (flipped["image"] == plain["image"][:, :, ::-1]).all(axis=(1, 2, 3))
    same = (flipped["image"] == plain["image"]).all(axis=(1, 2, 3))
    assert (mirrored | same).all()
    assert mirrored.any()
    assert same.any()
    assert (cropped["image"] != plain["image"]).any(axis=(1, 2, 3)).sum() > 8


def test_randaugment_comes_after_crop_and_flip_and_leaves_their_numbers() -> None:
    dataset, rows = _images(16), np.arange(16)
    cropped, both = (
        _train(dataset, rows, batch=16, stop=1, randaugment=randaugment)[0] for randaugment in (None, RANDAUGMENT)
    )
    np.testing.assert_array_equal(cropped["label"], both["label"])
    numbers = draws.uniforms(draws.RANDAUGMENT, 7, 0, (16, RANDAUGMENT.num_uniforms))
    np.testing.assert_array_equal(both["image"], RANDAUGMENT(cropped["image"].copy(), numbers))
    assert 8 <= (both["image"] != cropped["image"]).any(axis=(1, 2, 3)).sum() < 16


@pytest.mark.parametrize("cache", ["stream", "memory"])
def test_the_whole_augmentation_does_not_depend_on_rows_or_where_data_lies(cache: str) -> None:
    arguments: dict[str, Any] = {"batch": 12, "randaugment": RANDAUGMENT, "repeats": 3}
    whole = _train(_open(), np.arange(12), **arguments)
    rows = np.array([1, 2, 5, 9])
    part = _train(_open(cache=cache), rows, start=2, **arguments)
    _assert_same(part, [{name: column[rows] for name, column in batch.items()} for batch in whole[2:]])


@settings(max_examples=settings().max_examples // 5)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 4))
def test_repeats_stand_apart_and_see_every_example_in_turn(num_examples: int, num_unique: int, repeats: int) -> None:
    """Rows r and r + U hold the same example; the first U rows are the stream without repeats."""
    dataset, batch = _images(num_examples, size=1), num_unique * repeats
    arguments: dict[str, Any] = {"stop": -(-num_examples // num_unique), "kind": "none"}
    once = _train(dataset, np.arange(num_unique), batch=num_unique, **arguments)
    repeated = _train(dataset, np.arange(batch), batch=batch, repeats=repeats, **arguments)
    for one, many in zip(once, repeated, strict=True):
        np.testing.assert_array_equal(many["label"], np.tile(one["label"], repeats))


def test_each_copy_is_augmented_otherwise() -> None:
    (batch,) = _train(_images(4), np.arange(12), batch=12, stop=1, repeats=3)
    assert len({image.tobytes() for image in batch["image"]}) == 12
    assert sorted(batch["label"]) == sorted([*range(4)] * 3)


def test_features_train_through_the_same_pipeline() -> None:
    columns = {"features": np.eye(6, dtype=np.float32), "label": np.arange(6, dtype=np.int32)}
    batches = _train(ArrayDataset(columns, num_classes=6), np.arange(6), batch=6, stop=2, kind="none")
    for batch in batches:
        assert batch.keys() == {"features", "label"}
        np.testing.assert_array_equal(batch["features"], np.eye(6, dtype=np.float32)[batch["label"]])


@settings(max_examples=settings().max_examples // 5)
@given(st.integers(1, 40), st.sampled_from([4, 8, 12]), st.sampled_from([1, 2, 4]))
def test_evaluation_counts_every_example_once(num_examples: int, batch: int, hosts: int) -> None:
    dataset = _images(num_examples)
    seen, lengths = [], set()
    for rows in np.split(np.arange(batch), hosts):
        with eval_batches(dataset, global_batch_size=batch, rows=rows) as batches:
            host = list(batches)
        lengths.add(len(host))
        for one in host:
            assert one["image"].shape == (len(rows), 8, 8, 3)
            assert one["index"].dtype == np.int32
            assert one["weight"].dtype == np.float32
            real = one["weight"] == 1
            assert (one["index"][~real] == -1).all()
            np.testing.assert_array_equal(one["label"][real], one["index"][real])
            seen.append(one["index"][real])
    assert lengths == {-(-num_examples // batch)}
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(num_examples))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_records_are_replaced_counted_and_listed(workers: int) -> None:
    dataset = _SomeUnreadable(_images(20), [3, 4], max_bad_share=0.2)
    rows = np.arange(20)
    arguments: dict[str, Any] = {
        "seed": 0,
        "global_batch_size": 20,
        "start_step": 0,
        "total_steps": 2,
        "num_workers": workers,
    }
    with train_batches(dataset, augment="flip", rows=rows, **arguments) as batches:
        first = next(batches)
        assert len(batches._workers._found) == workers, "grain names its processes otherwise: none would be killed"
        got = [first, *batches]
        assert batches.bad_records == ["example 3", "example 4"]
    for batch in got:
        # 3 and 4 are both replaced by 5, the next one that can be read.
        assert sorted(batch["label"]) == sorted([*range(3), 5, 5, *range(5, 20)])
    arguments["num_workers"] = 0
    with train_batches(dataset, augment="flip", rows=rows[5:9], **arguments) as batches:
        _assert_same(list(batches), [{name: column[5:9] for name, column in batch.items()} for batch in got])


def test_unreadable_records_weigh_nothing_in_evaluation(caplog: pytest.LogCaptureFixture) -> None:
    """They are listed by every evaluation, and named in the log by the first one only."""
    dataset = _SomeUnreadable(_images(20), [3, 4], max_bad_share=0.1)
    for _ in range(2):
        with eval_batches(dataset, global_batch_size=8, rows=np.arange(8)) as batches:
            weights = np.concatenate([batch["weight"] for batch in batches])
            assert batches.bad_records == ["example 3", "example 4"]
        assert np.flatnonzero(weights == 0).tolist() == [3, 4, 20, 21, 22, 23]
    assert caplog.text.count("passed over 2 records that do not decode: example 3, example 4") == 1


@pytest.mark.parametrize(("max_bad_share", "workers"), [(0.0, 0), (0.05, 0), (0.05, 1)])
def test_too_many_unreadable_records_are_a_fault(max_bad_share: float, workers: int) -> None:
    dataset = _SomeUnreadable(_images(20), [3, 4], max_bad_share)
    with pytest.raises(DataFault, match=r"example [34].*max_bad_share"):
        _train(dataset, np.arange(20), batch=20, workers=workers)
    with (
        pytest.raises(DataFault, match=r"example 3.*max_bad_share"),
        eval_batches(dataset, global_batch_size=20, rows=np.arange(20)) as batches,
    ):
        list(batches)


class _Together(_SomeUnreadable):
    """A dataset of which two batches have to be read at the same time."""

    def __init__(self, inner: Dataset):
        super().__init__(inner, [], 0.0)
        self.barrier = threading.Barrier(2, timeout=20)

    def read(
        self, indices: np.ndarray, crops: RandomCrops | None = None, evaluation: bool = True
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        self.barrier.wait()
        return super().read(indices, crops, evaluation)


def test_evaluation_reads_several_batches_at_once() -> None:
    if num_readers(_Together(_images(1)), 0) < 2:
        pytest.skip("one core: one thread")
    with eval_batches(_Together(_images(16)), global_batch_size=4, rows=np.arange(4)) as batches:
        assert np.concatenate([batch["index"] for batch in batches]).tolist() == list(range(16))


def test_batches_without_room_in_shared_memory_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=64 * 2**20)  # what Docker gives
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"num_workers=2 need 12\d MiB .* batches of 15 MiB, and /dev/shm has 64 MiB"):
        _train(_images(1, size=512), np.arange(20), batch=20, workers=2)


def test_closed_batches_say_so() -> None:
    batches = eval_batches(_images(4), global_batch_size=4, rows=np.arange(4))
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


@pytest.mark.parametrize(
    ("shape", "spec"), [((8,), ("data",)), ((4, 2), ("data",)), ((2, 4), (("data", "model"),)), ((8,), ())]
)
def test_global_arrays_hold_each_row_where_it_belongs(shape: tuple[int, ...], spec: tuple[object, ...]) -> None:
    mesh = jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    rows = local_rows(sharding, 16)
    np.testing.assert_array_equal(rows, np.arange(16))  # one process holds every device
    batch = {"image": np.arange(16 * 12, dtype=np.uint8).reshape(16, 2, 2, 3), "label": np.arange(16, dtype=np.int32)}
    with jax.transfer_guard("disallow"):
        arrays = to_global(batch, sharding, 16, rows)
    for name, column in batch.items():
        assert arrays[name].sharding.is_equivalent_to(sharding, column.ndim)
        np.testing.assert_array_equal(np.asarray(arrays[name]), column)


def test_rows_follow_the_devices_of_a_process() -> None:
    """Half of the devices, as if the other half belonged to another process."""
    mesh = jax.make_mesh((4, 2), ("model", "data"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    here = set(mesh.devices[:, 1].flat)

    class HalfHere:
        def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
            return {d: i for d, i in sharding.devices_indices_map(shape).items() if d in here}

    np.testing.assert_array_equal(local_rows(HalfHere(), 16), np.arange(8, 16))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", [("train", 0, 10)]),
        ("train[:80%]", [("train", 0, 8)]),
        ("train[80%:]", [("train", 8, 10)]),
        ("train[-3:]+test[1:2]", [("train", 7, 10), ("test", 1, 2)]),
        ("test[:100]", [("test", 0, 4)]),
        ("train[2:2]+test", [("test", 0, 4)]),
        ("train[:-20%]", [("train", 0, 8)]),
    ],
)
def test_split_expressions(split: str, expected: list[tuple[str, int, int]]) -> None:
    assert parse_split(split, {"train": 10, "test": 4}) == [Span(*span) for span in expected]


@pytest.mark.parametrize("split", ["valid", "train[", "train[:x]", "", "train[5:2]"])
def test_split_expressions_that_select_nothing_are_refused(split: str) -> None:
    with pytest.raises(ConfigError, match="split"):
        parse_split(split, {"train": 10, "test": 4})


def test_digits_are_real_stratified_and_disjoint() -> None:
    train, test = (_open(split, source="digits", channels=1) for split in ("train", "test"))
    assert train.num_examples + test.num_examples == 1797
    assert train.class_names == tuple("0123456789")
    counts = np.bincount(test.examples(np.arange(test.num_examples))["label"])
    assert counts.min() >= 34
    images = {image.tobytes() for image in train.examples(np.arange(train.num_examples))["image"]}
    both = images & {image.tobytes() for image in test.examples(np.arange(test.num_examples))["image"]}
    assert not both
    assert max(max(image) for image in images) == 255
    first = _open("train[:10%]", source="digits", channels=3, image_size=(16, 16)).examples(np.arange(5))
    np.testing.assert_array_equal(first["label"], train.examples(np.arange(5))["label"])
    assert first["image"].shape == (5, 16, 16, 3)


def test_synthetic_examples_depend_on_seed_split_and_index_only() -> None:
    train, test = _open("train"), _open("test")
    indices = np.array([4, 49, 4])
    three = train.examples(indices)
    np.testing.assert_array_equal(three["image"][0], three["image"][2])
    np.testing.assert_array_equal(train.examples(indices[1:2])["image"][0], three["image"][1])
    part = _open("test+train[40:]")
    assert part.num_examples == 20
    np.testing.assert_array_equal(part.examples(np.array([19]))["image"][0], three["image"][1])
    np.testing.assert_array_equal(part.examples(np.array([3]))["image"], test.examples(np.array([3]))["image"])
    assert (test.examples(np.array([4]))["image"] != three["image"][:1]).any()
    assert (_open("train", seed=1).examples(indices)["image"] != three["image"]).any()
    memory = _open("train", cache="memory")
    assert memory.in_memory
    assert memory.fingerprint == train.fingerprint
    np.testing.assert_array_equal(memory.examples(indices)["image"], three["image"])


@pytest.mark.parametrize("channels", [1, 3])
def test_synthetic_classes_can_be_seen(channels: int) -> None:
    dataset = _open(channels=channels, num_examples=6000, image_size=(12, 12))
    data = dataset.examples(np.arange(6000))
    pixels = data["image"].reshape(6000, -1).astype(np.float32)
    known, asked = pixels[:5700], pixels[5700:]
    squares = (asked**2).sum(1)[:, None] + (known**2).sum(1) - 2 * asked @ known.T
    guess = data["label"][np.argmin(squares, axis=1)]
    assert (guess == data["label"][5700:]).mean() > 0.4  # by the nearest image; chance is 0.1


def test_fingerprints_tell_datasets_apart() -> None:
    datasets = [
        _open(),
        _open("test"),
        _open(seed=1),
        _open(num_classes=5),
        _open(image_size=(9, 9)),
        _open(source="digits", channels=1),
        _open(source="digits", channels=3),
        _images(5),
        _images(6),
    ]
    assert len({dataset.fingerprint for dataset in datasets}) == len(datasets)
    assert _open().fingerprint == datasets[0].fingerprint


def test_labels_outside_the_classes_are_a_fault() -> None:
    columns = {"features": np.zeros((3, 2), np.float32), "label": np.array([0, 5, 1], np.int32)}
    with pytest.raises(DataFault, match=r"example 1 has label 5.*0 \.\. 1"):
        ArrayDataset(columns, num_classes=2)
    with pytest.raises(DataFault, match="one length"):
        ArrayDataset(columns | {"label": np.zeros(2, np.int32)}, num_classes=2)


def test_channels_that_a_source_has_not_are_refused() -> None:
    for source in ("synthetic", "digits"):
        with pytest.raises(ConfigError, match="channels"):
            _open(source=source, channels=2)
