"""Files of named tensors as other programs write them: safetensors, and PyTorch's checkpoints.

A PyTorch checkpoint holds a pickle, which is a program: it is read by PyTorch's own loader of weights alone, which
refuses whatever is not a tensor or a plain container. PyTorch is an extra; everything else does without it.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath

from mae_dist.errors import ConfigError, DataFault
from mae_dist.storage import is_local, storage_errors, write_bytes_atomically

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
WEIGHT_FILES = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
_WRAPPERS = ("model", "state_dict", "model_state_dict")

_SPARE = 2**26  # bytes that tensors may take beyond four times their file: small ones repeated along an axis
_AGAIN = "download or copy it again"
_ALONE = "If you trust it, save its tensors alone in PyTorch, as torch.save({'model': state_dict}, 'weights.pth')"

_FLOATS = tuple(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))
_SAFE_DTYPES = ("F16", "BF16", "F32", "F64", "BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")


def read_tensors(path: epath.Path, name: str = "") -> dict[str, np.ndarray]:
    """Reads named tensors of a file, or of a directory as Hugging Face's libraries write it; runs no code of the file.

    In a PyTorch checkpoint they stand below "model", "state_dict" or "model_state_dict", the first that is there, or
    else at its top, or below the one other name that holds tensors. What else could have been meant is logged.

    Args:
      path: a .safetensors, .pth, .pt, .bin or .ckpt file, or a directory with model.safetensors or pytorch_model.bin
        or the .index.json of one and its shards.
      name: below which name of a PyTorch checkpoint to look, as "model_ema"; "": as above.

    Returns:
      Arrays of any shape by name, each with memory of its own: float32 where they are float16, bfloat16, float32 or
      float64 in the file (not checked for NaN and infinity), else of the file's dtype.

    Raises:
      DataFault: missing, corrupted, of another format, or asking for more than tensors.
    """
    return _read_directory(path) if path.is_dir() else _read_file(path, name)


def read_json(path: epath.Path) -> dict[str, Any] | None:
    """Reads the object in a JSON file; None if there is no such file."""
    if not path.exists():
        return None
    with storage_errors(path):
        data = path.read_bytes()
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError(f"a JSON object is expected, found {type(value).__name__}")
    except (ValueError, RecursionError) as error:
        raise DataFault(f"{path} is corrupted: {error}; {_AGAIN}") from error
    return value


def extract(source: str, out: str, *, name: str = "", prefix: str = "") -> None:
    """Writes the tensors of `source` below `name` that begin with `prefix`; a `ConfigError` if there are none."""
    tensors = read_tensors(epath.Path(source), name)
    chosen = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if not chosen:
        raise ConfigError(f"{source}: no name begins with {prefix!r}; there are {some(tensors)}")
    write_tensors(epath.Path(out), chosen)


def how_to_extract(path: epath.Path, **part: str) -> str:
    """Returns a shell command that extracts one of several sets of weights; `part` is an example of one."""
    arguments = [json.dumps(os.fspath(path)), '"OUT.safetensors"']
    arguments += [f"{key}={json.dumps(value if len(value) <= 100 else '…')}" for key, value in part.items()]
    command = f"from mae_dist.weights import files; files.extract({', '.join(arguments)})"
    return f"one of them is saved alone by python -c {shlex.quote(command)}"


def write_tensors(path: epath.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes named tensors, whole or not at all; the same tensors give the same bytes.

    Args:
      path: .safetensors; or .pth or .pt, which hold {"model": tensors} and take PyTorch to write.
      tensors: arrays of any shape and of a dtype that `read_tensors` knows; it is kept.

    Raises:
      ConfigError: another extension, or PyTorch is not installed.
      StorageFault: the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pth", ".pt"):
        raise ConfigError(f"cannot write {path}: weights are written as .safetensors, .pth or .pt; name it so")
    # Both libraries write memory as it lies, and PyTorch warns of memory that it may not change.
    arrays = {name: np.require(tensors[name], requirements=["C", "W"]) for name in sorted(tensors)}
    if suffix == ".safetensors":
        data = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    else:
        torch, buffer = _torch("writing .pth and .pt", "name a .safetensors file"), io.BytesIO()
        torch.save({"model": {name: torch.from_numpy(array) for name, array in arrays.items()}}, buffer)
        data = buffer.getvalue()
    with storage_errors(path):
        write_bytes_atomically(path, data)


def _torch(what: str, instead: str) -> Any:
    """Imports PyTorch; raises a `ConfigError` with the cure if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f"{what} needs PyTorch: pip install -e .[torch] in the clone, or {instead}") from error
    return torch


def _read_directory(path: epath.Path) -> dict[str, np.ndarray]:
    there = [name for name in WEIGHT_FILES if (path / name).is_file()]
    if not there:
        raise DataFault(
            f"the directory {path} holds none of {', '.join(WEIGHT_FILES)}; it holds "
            f"{some(sorted(entry.name for entry in path.iterdir()))}. Name the directory or the file of the weights"
        )
    if len(there) > 1:
        logging.warning("%s holds %s: reading the first; move it away to have the next", path, ", ".join(there))
    found = path / there[0]
    return _read_index(found) if found.suffix == ".json" else _read_file(found)


def shards_of(index: epath.Path) -> dict[str, str]:
    """Returns for each tensor that an .index.json names the name of its file, which is beside the index."""
    shards = (read_json(index) or {}).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise DataFault(f'{index} has no "weight_map" from names of tensors to names of files; {_AGAIN}')
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for shard in shards.values():
        if not re.fullmatch(rf"[^/\\\0]+{re.escape(suffix)}", shard):
            raise DataFault(f"{index} names the shard {_shown(shard)}, no {suffix} file beside it; {_AGAIN}")
    return shards


def _read_index(index: epath.Path) -> dict[str, np.ndarray]:
    """Reads the tensors of an index's shards, in its order."""
    names = shards_of(index)
    shards: dict[str, set[str]] = {}
    for name, shard in names.items():
        shards.setdefault(shard, set()).add(name)
    merged = {}
    for shard, expected in shards.items():
        tensors = _read_file(index.parent / shard)
        if tensors.keys() != expected:
            raise DataFault(
                f"{index.parent / shard} does not fit {index.name}: missing {some(expected - tensors.keys())}, "
                f"unexpected {some(tensors.keys() - expected)}; download or copy the whole directory again"
            )
        merged.update(tensors)
    return {name: merged[name] for name in names}


def _read_file(path: epath.Path, name: str = "") -> dict[str, np.ndarray]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataFault(
            f"{path} is neither a directory nor a file named as weights are ({', '.join(SUFFIXES)}); name one of these"
        )
    if not path.is_file():
        raise DataFault(f"there is no file {path}; correct the path, or download it")
    try:
        with _local_copy(path) as file:
            if not os.path.getsize(file):
                raise DataFault(f"{path} is empty; {_AGAIN}")
            return _read_safetensors(file, path) if suffix == ".safetensors" else _read_pytorch(file, path, name)
    except OSError as error:
        raise DataFault(f"{path} cannot be read: {error}; make it readable, or {_AGAIN}") from error


@contextlib.contextmanager
def _local_copy(path: epath.Path) -> Generator[str]:
    """Holds a local file with the content of `path`, which may be `path` itself; readers take one tensor at a time."""
    if is_local(path):
        yield os.fspath(path)
        return
    with tempfile.NamedTemporaryFile() as file:
        with path.open("rb") as remote:
            shutil.copyfileobj(remote, file)
        file.flush()
        yield file.name


def _read_safetensors(file: str, path: epath.Path) -> dict[str, np.ndarray]:
    tensors = {}
    try:
        with safetensors.safe_open(file, framework="numpy") as content:
            for name in content.keys():  # noqa: SIM118 (no dict)
                dtype = content.get_slice(name).get_dtype()
                if dtype not in _SAFE_DTYPES:
                    raise ValueError(f"{_shown(name)} is of dtype {dtype}; known are {', '.join(_SAFE_DTYPES)}")
                tensors[name] = _plain(content.get_tensor(name))
    except (safetensors.SafetensorError, ValueError) as error:
        size = os.path.getsize(file)
        raise DataFault(
            f"{path} ({size} bytes) is corrupted or no safetensors file: {_cause(error)}; {_AGAIN}"
        ) from error
    if not tensors:
        raise DataFault(f"{path} holds no tensors; name the file of the weights")
    return tensors


def _read_pytorch(file: str, path: epath.Path, name: str) -> dict[str, np.ndarray]:
    torch = _torch(f"reading {path}", "take the .safetensors file of the same weights")
    size = os.path.getsize(file)
    try:
        # The paper's checkpoints carry their command line beside the model.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a corrupted or hostile file leads to: the loader has no error of its own
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise DataFault(
                f"{path} asks for {_shown(asked[1])}, which is no tensor: refused, and nothing of it was run. {_ALONE}"
            ) from error
        # The loader's own advice is to read the file without its protection.
        cause = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        raise DataFault(f"{path} ({size} bytes) cannot be read as PyTorch's: {_cause(cause)}; {_AGAIN}") from error
    tensors = _state_dict(content, path, name, torch)
    taken = sum(tensor.numel() * max(tensor.element_size(), 4) for tensor in tensors.values())
    if taken > 4 * size + _SPARE:
        raise DataFault(f"{path}: its tensors would take {taken} bytes of memory, out of a file of {size}; {_AGAIN}")
    return {name: _plain(_to_numpy(tensor)) for name, tensor in tensors.items()}


def _state_dict(content: Any, path: epath.Path, name: str, torch: Any) -> dict[str, Any]:
    """Finds the tensors of a checkpoint, as `read_tensors` describes."""

    def is_plain(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"

    def is_set(value: Any) -> bool:
        return isinstance(value, dict) and bool(value) and all(isinstance(k, str) and is_plain(value[k]) for k in value)

    entries = content if isinstance(content, dict) else {}
    sets = [key for key, value in entries.items() if isinstance(key, str) and is_set(value)]
    key = name or next((key for key in _WRAPPERS if isinstance(entries.get(key), dict)), "")
    if not key and sets and not any(is_plain(value) for value in entries.values()):
        if len(sets) > 1:
            raise DataFault(f"{path} holds several sets of weights, {some(sets)}; {how_to_extract(path, name=sets[0])}")
        (key,) = sets
    others = [other for other in sets if other != key]
    if key and not name and (others or key not in _WRAPPERS):
        other = f", not {some(others)}; {how_to_extract(path, name=others[0])}" if others else ""
        logging.warning("%s: taking the weights below %s%s", path, _shown(key), other)
    place, found = (f"below {_shown(key)}", entries.get(key)) if key else ("at its top", content)
    if not isinstance(found, dict) or not found:
        raise DataFault(f"{path} holds no named tensors {place}. {_ALONE}")
    bad = [str(name) for name, value in found.items() if not isinstance(name, str) or not is_plain(value)]
    if bad:
        raise DataFault(f"{path}: {some(bad)} {place} are no plain tensors. {_ALONE}")
    return found


def _to_numpy(tensor: Any) -> np.ndarray:
    """Copies a tensor, in float32 if it is floating-point."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy().copy()


def _plain(array: np.ndarray) -> np.ndarray:
    """Returns a contiguous array: float32 for any floating dtype, bools of 0 and 1."""
    if array.dtype in _FLOATS:
        with np.errstate(over="ignore", invalid="ignore"):  # beyond float32: infinity, for the caller to find
            return array.astype(np.float32, order="C", copy=False)
    if array.dtype == np.bool_:
        return np.asarray(array.view(np.uint8) != 0)
    return array.astype(array.dtype, order="C", copy=False)


def _cause(error: Exception | str) -> str:
    """Returns an error's message in one line; a library's may hold names from the file."""
    text = str(error) or repr(error)
    return "".join(letter if letter.isprintable() else "?" for letter in text[:300])


def _shown(text: str) -> str:
    """Returns a name from a file, quoted: it may be long, or control a terminal."""
    return repr(text if len(text) <= 100 else text[:100] + "…")


def some(texts: Iterable[str]) -> str:
    """Returns the first few, quoted."""
    texts = list(texts)
    return ", ".join(map(_shown, texts[:5])) + (f", … ({len(texts)} in all)" if len(texts) > 5 else "") or "nothing"
