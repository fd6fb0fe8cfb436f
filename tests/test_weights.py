"""Files of named tensors: against PyTorch and safetensors themselves, corrupted at every byte, and meant to do harm."""

import argparse
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mae_dist.errors import ConfigError, DataFault, StorageFault
from mae_dist.weights import files
from mae_dist.weights.files import read_tensors, write_tensors

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.bool]
DTYPES += [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read(path: Path) -> dict[str, np.ndarray]:
    return read_tensors(epath.Path(path))


def fault(path: Path, *words: str) -> str:
    """The message of the one kind of fault that reading may end with."""
    with pytest.raises(DataFault) as caught:
        read(path)
    message = str(caught.value)
    for word in (str(path.name), *words):
        assert word in message, message
    assert len(message) < 1500
    assert message.isprintable()
    return message


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        array = found[name]
        expected = (tensor.float() if tensor.dtype in FLOATS else tensor).detach().numpy()
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        np.testing.assert_array_equal(array, expected)


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# --- what others write


def test_whole_checkpoint(tmp_path):
    """As training programs write them: the model among much else, of which nothing is looked at."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(lr=1e-3, name="vit", nested={"a": [1, None]}, dtype=torch.float32)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 800,
        "scaler": {"scale": 65536.0, "big": 2**100},
        "args": arguments,
        "rng": torch.get_rng_state(),
    }
    assert_same(read(saved(tmp_path / "a.pth", content)), dict(model.state_dict()))


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", None])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_where_tensors_stand(tmp_path, key, suffix):
    tensors = {"module.a": torch.ones(2), "module.module.b": torch.zeros(3)}
    content = tensors if key is None else {"arch": "vit", key: tensors}
    found = read(saved(tmp_path / f"a{suffix}", content))
    assert_same(found, tensors)
    assert list(read(saved(tmp_path / "b.pth", {**tensors, "c": torch.ones(1)}))) == [*tensors, "c"]


def test_wrappers_in_order(tmp_path):
    """A tensor that is called "model" is one of the tensors."""
    content = {"state_dict": {"b": torch.ones(1)}, "model": {"a": torch.zeros(1)}}
    assert list(read(saved(tmp_path / "a.pth", content))) == ["a"]
    assert list(read(saved(tmp_path / "b.pth", {**content, "model": "vit_b_16"}))) == ["b"]
    assert list(read(saved(tmp_path / "c.pth", {"model": torch.ones(1)}))) == ["model"]


def test_kinds_of_tensors(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "plain": base,
        "transposed": base.T,
        "sliced": base[1::2, 2:5],
        "parameter": torch.nn.Parameter(base.half()),
        "scalar": torch.tensor(3),
        "empty": base[:0],
        "end": base[4:],
        "expanded": torch.arange(5)[None].expand(3, 5),
        "huge": torch.tensor([1e300, -1e300, float("nan"), 0.1], dtype=torch.float64),
        "tiny": torch.tensor([6e-8, 65504.0], dtype=torch.float16),
        "negative": torch.tensor([-3.0, float("inf")], dtype=torch.bfloat16),
    }
    path = saved(tmp_path / "a.pth", {"model": tensors})
    found = read(path)
    assert_same(found, tensors)
    found["plain"][:] = 7  # the storage is shared in the file, and not here
    assert_same({"transposed": found["transposed"]}, {"transposed": base.T})
    assert found["huge"][0] == np.inf


def test_parameter_with_attributes(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.lr_scale = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    assert_same(read(saved(tmp_path / "a.pth", {"a": parameter})), {"a": torch.ones(2)})


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1),
    suffix=st.sampled_from([".safetensors", ".pth"]),
)
def test_round_trip(tmp_path, shapes, suffix):
    """Both libraries read what is written, and so do we."""
    wanted = {f"t{index}": torch.arange(float(np.prod(shape))).reshape(shape) for index, shape in enumerate(shapes)}
    path = tmp_path / f"a{suffix}"
    write_tensors(epath.Path(path), {name: tensor.numpy() for name, tensor in wanted.items()})
    others = torch.load(path, weights_only=True)["model"] if suffix == ".pth" else safetensors.torch.load_file(path)
    assert others.keys() == wanted.keys()
    assert all(torch.equal(others[name], tensor) for name, tensor in wanted.items())
    found = read(path)
    assert_same({name: found[name] for name in wanted}, wanted)


def test_safetensors(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {str(dtype): base.to(dtype) for dtype in DTYPES if not dtype.is_complex}
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    found = read(path)
    assert_same({name: found[name] for name in tensors}, tensors)


# --- what we write


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_writing_is_deterministic(tmp_path, suffix):
    """Of the names and values alone: not of order, memory layout, time or the file's name."""
    base = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "other").mkdir()
    first, second = epath.Path(tmp_path / f"a{suffix}"), epath.Path(tmp_path / "other" / f"longer{suffix}")
    write_tensors(first, {"a": base, "b": base.T, "c": np.array(2)})
    frozen = np.asfortranarray(base)
    frozen.flags.writeable = False
    write_tensors(second, {"c": np.array(2), "b": np.ascontiguousarray(base.T), "a": frozen})
    assert first.read_bytes() == second.read_bytes()
    found = read_tensors(first)
    np.testing.assert_array_equal(found["b"], base.T)
    assert found["c"].shape == ()
    write_tensors(first, {"z": base})  # replaces
    assert list(read_tensors(first)) == ["z"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == [f"a{suffix}"]
    (tmp_path / "plain").touch()
    assert os.stat(first).st_mode == os.stat(tmp_path / "plain").st_mode


def test_metadata_says_pytorch(tmp_path):
    """transformers refuses safetensors without it."""
    write_tensors(epath.Path(tmp_path / "a.safetensors"), {"a": np.ones(2, np.float32)})
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", ["a.bin", "a.ckpt", "a.npz", "a"])
def test_other_extensions_are_not_written(tmp_path, name):
    with pytest.raises(ConfigError, match=r"\.safetensors, \.pth or \.pt"):
        write_tensors(epath.Path(tmp_path / name), {"a": np.ones(2)})
    assert not list(tmp_path.iterdir())


def test_writing_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"name a \.safetensors file"):
        write_tensors(epath.Path(tmp_path / "a.pth"), {"a": np.ones(2)})
    assert not list(tmp_path.iterdir())
    write_tensors(epath.Path(tmp_path / "a.safetensors"), {"a": np.ones(2)})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_unwritable(tmp_path, suffix):
    with pytest.raises(StorageFault, match="mkdir -p"):
        write_tensors(epath.Path(tmp_path / "none" / f"a{suffix}"), {"a": np.ones(2)})
    (tmp_path / f"a{suffix}").mkdir()
    with pytest.raises(StorageFault):
        write_tensors(epath.Path(tmp_path / f"a{suffix}"), {"a": np.ones(2)})
    assert len(list(tmp_path.iterdir())) == 1


def test_imports_are_light(child_env):
    """Neither JAX nor PyTorch: a directory of weights is looked at before JAX starts."""
    program = "import sys, mae_dist.weights.files; assert not {'jax', 'torch', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], env=child_env(), check=True, timeout=60)


# --- directories


def shards(path: Path, suffix: str, stem: str, **changes: str | None) -> dict[str, torch.Tensor]:
    """A model in two files and their index, as transformers' save_pretrained(max_shard_size=...) writes them."""
    tensors = {"vit.b": torch.ones(3), "vit.a": torch.arange(4.0).bfloat16(), "decoder": torch.zeros(2, 2)}
    names = {key: f"{stem}-0000{1 + (key == 'decoder')}-of-00002{suffix}" for key in tensors}
    for shard in set(names.values()):
        part = {key: tensor for key, tensor in tensors.items() if names[key] == shard}
        if suffix == ".bin":
            torch.save(part, path / shard)
        else:
            safetensors.torch.save_file(part, path / shard, metadata={"format": "pt"})
    table = {key: shard for key, shard in {**names, **changes}.items() if shard is not None}
    index = {"metadata": {"total_size": 36}, "weight_map": table}
    (path / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2))
    return tensors


BOTH = pytest.mark.parametrize(("suffix", "stem"), [(".safetensors", "model"), (".bin", "pytorch_model")])


@BOTH
def test_directory(tmp_path, suffix, stem):
    tensors = shards(tmp_path, suffix, stem)
    assert_same(read(tmp_path), tensors)
    whole = {"a": torch.ones(3)}
    if suffix == ".bin":
        torch.save(whole, tmp_path / f"{stem}{suffix}")
    else:
        safetensors.torch.save_file(whole, tmp_path / f"{stem}{suffix}")
    assert_same(read(tmp_path), whole)  # one file is what a later save leaves beside old shards


@BOTH
def test_file_that_the_index_does_not_name(tmp_path, suffix, stem):
    shards(tmp_path, suffix, stem, decoder=None)
    assert set(read(tmp_path)) == {"vit.a", "vit.b"}


@BOTH
@pytest.mark.parametrize(
    ("key", "shard", "word"),
    [
        ("vit.a", None, "unexpected 'vit.a'"),
        ("new", "{stem}-00001-of-00002{suffix}", "missing 'new'"),
        ("decoder", "{stem}-00001-of-00002{suffix}", "missing 'decoder'"),
        ("new", "../x{suffix}", "'../x"),
        ("new", "/etc/x{suffix}", "'/etc/x"),
        ("new", "a/../x{suffix}", "a/../x"),
        ("new", "..\\x{suffix}", "no "),
        ("new", "{stem}-00003-of-00002{suffix}", "there is no file"),
        ("new", "config.json", "no "),
        ("new", "..", "no "),
        ("new", "", "no "),
    ],
)
def test_index_that_does_not_fit(tmp_path, suffix, stem, key, shard, word):
    shards(tmp_path, suffix, stem, **{key: shard and shard.format(suffix=suffix, stem=stem)})
    with pytest.raises(DataFault) as caught:
        read(tmp_path)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": {"b": "c"}}}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataFault, match=r"index\.json"):
        read(tmp_path)


def test_directory_without_weights(tmp_path):
    (tmp_path / "config.json").touch()
    fault(tmp_path, "model.safetensors", "pytorch_model.bin.index.json", "'config.json'")


# --- no weights at all


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".ckpt"])
def test_missing_empty_or_something_else(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    fault(path, "there is no file")
    path.touch()
    fault(path, "is empty")
    for content in (
        b"x",
        b"version https://git-lfs.github.com/spec/v1\noid",
        b"PK\3\4",
        b"\0" * 100,
        b"<!DOCTYPE html>",
    ):
        path.write_bytes(content)
        fault(path, "download or copy it again")


def test_wrong_extension(tmp_path):
    for name in ("a.npz", "a.pkl", "a", "model.safetensors.index.json"):
        (tmp_path / name).touch()
        fault(tmp_path / name, ".safetensors", ".ckpt")


@pytest.mark.parametrize(
    "content", [{}, {"model": {}}, {"model": None}, {"epoch": 3}, [torch.ones(1)], torch.ones(1), 3]
)
def test_no_tensors(tmp_path, content):
    assert "save its tensors alone" in fault(saved(tmp_path / "a.pth", content))


def test_values_that_are_no_tensors(tmp_path):
    content = {"a": torch.ones(1), "steps": 3, 7: torch.ones(1), "options": argparse.Namespace(), "\033[2J": None}
    fault(saved(tmp_path / "a.pth", {"model": content}), "below 'model'", "'steps', '7', 'options'")
    fault(saved(tmp_path / "a.pth", content), "at its top")
    fault(saved(tmp_path / "a.pth", {"model": {"a": {"b": torch.ones(1)}}}), "'a'")
    fault(saved(tmp_path / "a.pth", {"a": torch.ones(2, 2).to_sparse()}), "'a'")
    fault(saved(tmp_path / "a.pth", {"a": torch.ones(2, device="meta")}), "'a'")


def test_older_format(tmp_path):
    """Of PyTorch before 1.6."""
    path = saved(tmp_path / "a.pth", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert_same(read(path), {"a": torch.ones(2)})


def test_tensor_that_takes_all_memory(tmp_path):
    """One value repeated along an axis takes nothing in its file."""
    fault(saved(tmp_path / "a.pth", {"a": torch.ones(1).expand(2**40)}), "bytes of memory")


def test_float8_of_safetensors(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2).to(torch.float8_e5m2)}, tmp_path / "a.safetensors")
    fault(tmp_path / "a.safetensors", "'a'", "F8_E5M2")


def test_through_a_bucket(tmp_path, monkeypatch):
    """A path with a scheme goes through a local copy, and leaves none."""
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()

    class Bucket(type(epath.Path(tmp_path))):
        def __fspath__(self) -> str:
            return f"gs://{super().__fspath__()}"

        def read_bytes(self) -> bytes:
            return Path(str(self)).read_bytes()

        def write_bytes(self, data: bytes) -> int:
            return Path(str(self)).write_bytes(data)

        def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            return Path(str(self)).open(mode)

        def is_file(self) -> bool:
            return Path(str(self)).is_file()

        def is_dir(self) -> bool:
            return Path(str(self)).is_dir()

    for suffix in (".safetensors", ".pth"):
        path = Bucket(tmp_path / f"a{suffix}")
        write_tensors(path, {"a": np.ones(3, np.float32)})
        assert_same(read_tensors(path), {"a": torch.ones(3)})
        assert_same(read(tmp_path / f"a{suffix}"), {"a": torch.ones(3)})
    assert not list((tmp_path / "tmp").iterdir())


# --- pickles that mean harm


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self.value = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open({!r}, 'w')",), "eval"),
        (exec, ("open({!r}, 'w')",), "exec"),
        (open, ("{}", "w"), "open"),
        (getattr, (argparse.Namespace, "__init__"), "getattr"),
        (subprocess.check_call, (["touch", "{}"],), ".check_call"),
        (torch.hub.load, ("{}", "x"), "torch.hub.load"),
        (torch.load, ("{}",), "torch.serialization.load"),
        (pickle.loads, (b"",), "pickle.loads"),
        (np.load, ("{}",), "numpy"),
    ],
)
def test_nothing_is_called(tmp_path, function, arguments, name):
    target = tmp_path / "harm"
    arguments = tuple(a.format(str(target)) if isinstance(a, str) else a for a in arguments)
    content = {"model": {"a": torch.ones(1)}, "args": Reduced(function, *arguments)}
    path = saved(tmp_path / "a.pth", content)
    fault(path, name, "nothing of it was run")
    assert not target.exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.pth"}


# --- corruption


def small(path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = {"a": torch.arange(5.0) + 1, "b": torch.ones(2, 2).half()}
    if path.suffix == ".pth":
        return saved(path, {"model": tensors, "args": argparse.Namespace(a=1)}), tensors
    safetensors.torch.save_file(tensors, path)
    return path, tensors


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_at_every_byte(tmp_path, suffix):
    path, _ = small(tmp_path / f"a{suffix}")
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        fault(path)
    path.write_bytes(data + b"\0" * 10)
    if suffix == ".safetensors":
        fault(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_changed_bytes(tmp_path, suffix, data):
    """Values have no checksum; everything else is a fault, or makes no difference to the kinds."""
    path, tensors = small(tmp_path / f"a{suffix}")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = read(path)
    except DataFault:
        return
    assert all(isinstance(array, np.ndarray) for array in found.values())
    assert len(found) <= len(tensors)


def safe(path: Path, header: Any, body: bytes = b"\0" * 8, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONE = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([2], 0, 8), "b": entry([2], 4, 12)},
        {"a": entry([2], 0, 8), "b": entry([2], 0, 8)},
        {"a": entry([1], 4, 8)},
        {"a": entry([1], 0, 4)},
        {"a": entry([3], 0, 8)},
        {"a": entry([4], 0, 16)},
        {"a": entry([-2], 0, 8)},
        {"a": entry([2**62, 2**62], 0, 8)},
        {"a": entry([2], 0, 8), "z": entry([0, 2**62], 8, 8)},
        {"a": entry([2], 0, 8), "z": entry([0, 2**63], 8, 8)},
        {"a": entry([2] + [1] * 100, 0, 8)},
        {"a": entry([2], 0, 8, "F128")},
        {"a": entry([8], 0, 8, "F8_E4M3")},
        {"a": 3},
        {},
        [],
        b"{" + ONE + b"," + ONE.replace(b"[2]", b"[1]").replace(b"[0,8]", b"[4,8]") + b"}",
        b"{{{",
        b"\xff",
        b"[" * 100_000,
        b"",
    ],
)
def test_safetensors_header_lies(tmp_path, header):
    fault(safe(tmp_path / "a.safetensors", header, b"" if header == {} else b"\0" * 8))


@pytest.mark.parametrize("length", [0, 1, 55, 10**6, 10**8, 2**31, 2**62, 2**64 - 1])
def test_safetensors_header_length(tmp_path, length):
    fault(safe(tmp_path / "a.safetensors", {"a": entry([2], 0, 8)}, length=length))


def test_bools_are_bools(tmp_path):
    """A byte of 2 is neither of NumPy's two."""
    found = read(safe(tmp_path / "a.safetensors", {"a": entry([8], 0, 8, "BOOL")}, b"\0\1\2\xff\0\0\0\0"))
    assert found["a"].view(np.uint8).tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
