"""Weights of the Hugging Face hub, `hf://OWNER/NAME[@REVISION][/PATH]`, downloaded into the hub's own cache.

The cache is shared by the processes of a host, and with Hugging Face's programs; HF_HOME says where it is, and with
HF_HUB_OFFLINE=1 only what it holds is used. Once a commit is known, what the cache has of it is not asked for again.
huggingface_hub is an extra, and only imported for such a name.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import logging as python_logging
from collections.abc import Generator
from typing import Any

from absl import logging
from etils import epath
from tqdm import tqdm

from mae_dist import names, os_errors
from mae_dist.errors import ConfigError, DataFault, StorageFault
from mae_dist.weights import files, hugging_face

# Of a run's workdir: what `open_run` reads, and what reads weights.
_OF_A_RUN = ("config.json", "metrics.jsonl", "summary.json", "checkpoints/*", "seals/*")
_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "hf_xet")  # have exceptions of their own


@dataclasses.dataclass(frozen=True)
class Download:
    """What was downloaded of one commit.

    path: the directory or file that was asked for, in the cache. commit: 40 hexadecimal digits. origin: the place on
    the hub with this commit as its revision. is_run: True if it is the workdir of a run of mae_dist.
    """

    path: epath.Path
    commit: str
    origin: str
    is_run: bool


def download(name: str, commit: str = "") -> Download:
    """Downloads the weights at a place on the hub and what describes them, as far as the cache does not have them.

    Of a directory that is config.json, preprocessor_config.json and the first of `files.WEIGHT_FILES` that is there;
    or the whole run, if config.json is that of a run of mae_dist.

    Args:
      name: `hf://OWNER/NAME`, if needed with @REVISION and a directory of the repository or a file of weights.
      commit: of which commit; "": of the one that the revision is now.

    Raises:
      ConfigError: a malformed name, no such repository, revision or file, or huggingface_hub is not installed.
      DataFault: no access, no connection, or a repository without weights that can be read.
      StorageFault: the cache cannot be written.
    """
    if fault := names.hub_fault(name):
        raise ConfigError(fault)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(
            f"{name}: the Hugging Face hub needs the extra `hub`: pip install 'mae_dist[hub]', or in a "
            "clone: pip install -e '.[hub]'"
        )
    for library in ("httpx", "httpx2"):  # they log every request
        python_logging.getLogger(library).setLevel(python_logging.WARNING)
    repository = _Repository(name, commit)
    with _hub_errors(name, commit):
        path = repository.download()
    if not commit:
        logging.info("%s is commit %s, in %s", name, repository.commit, path)
    origin = names.with_revision(name, repository.commit)
    return Download(path, repository.commit, origin, repository.is_run)


def cached(name: str, commit: str = "") -> epath.Path | None:
    """Returns where the cache has the directory or file of a place on the hub, None if it does not; asks no server."""
    if names.hub_fault(name) or importlib.util.find_spec("huggingface_hub") is None:
        return None
    import huggingface_hub

    repo, revision, path = names.hub_parts(name)
    is_file = path.endswith(files.SUFFIXES)
    wanted = path if is_file else f"{path}/config.json".lstrip("/")
    found = huggingface_hub.try_to_load_from_cache(repo, wanted, revision=commit or revision or None)
    if not isinstance(found, str):
        return None
    return epath.Path(found) if is_file else epath.Path(found).parent


class _Repository:
    """Files of a repository, all of one commit: of that which the first file is found to have."""

    def __init__(self, name: str, commit: str):
        self.commit, self.is_run = commit, False
        self._name = name
        self._repo, self._revision, self._inside = names.hub_parts(name)

    def download(self) -> epath.Path:
        """Downloads what is needed; returns the path of what was asked for."""
        if self._inside.endswith(files.SUFFIXES):
            return self._needed(self._inside)
        config = self._needed(self._beside("config.json"))
        stored = files.read_json(config) or {}
        if stored.get("model_type") in hugging_face.MODEL_TYPES:
            self._file(self._beside("preprocessor_config.json"))
            self._weights()
        elif "architecture" in stored:  # of timm
            self._weights()
        elif "task" in stored and "init_from" in stored:
            self._run()
        elif "model_type" not in stored:  # which is reported with its value by the reader
            raise DataFault(
                f"{self._name}: its config.json describes no model that can be read, of transformers (ViTMAE, ViT), "
                "timm or mae_dist; if the repository has a file of weights, name that"
            )
        return config.parent

    def _beside(self, name: str) -> str:
        return f"{self._inside}/{name}" if self._inside else name

    def _weights(self) -> None:
        for name in files.WEIGHT_FILES:
            found = self._file(self._beside(name))
            if found is not None:
                for shard in sorted(set(files.shards_of(found).values())) if found.suffix == ".json" else ():
                    self._needed(self._beside(shard))
                return
        raise DataFault(
            f"{self._name} has none of {', '.join(files.WEIGHT_FILES)}, which are what can be read; name the directory "
            f"or the file that holds the weights: {names.HUB}{self._repo}/DIRECTORY"
        )

    def _run(self) -> None:
        import huggingface_hub

        self.is_run = True
        patterns = [glob.escape(self._beside("")) + pattern for pattern in _OF_A_RUN]
        options = {"allow_patterns": patterns, "tqdm_class": _OnTerminal, "library_name": "mae_dist"}
        huggingface_hub.snapshot_download(self._repo, revision=self.commit, **options)

    def _needed(self, name: str) -> epath.Path:
        found = self._file(name)
        if found is None:
            of_file = "" if name == self._inside else "; if the weights are one file, name that"
            raise ConfigError(
                f"{self._name}: the repository has no file {name}; give the directory of a model or the file of its "
                f"weights as its page lists them: {names.HUB}{self._repo}/PATH{of_file}"
            )
        return found

    def _file(self, name: str) -> epath.Path | None:
        """Returns a file's place in the cache, None if the repository has no such file."""
        import huggingface_hub
        from huggingface_hub import errors

        if self.commit:  # whose files never change
            known = huggingface_hub.try_to_load_from_cache(self._repo, name, revision=self.commit)
            if known is not None:
                return epath.Path(known) if isinstance(known, str) else None
        revision = self.commit or self._revision or None
        try:
            found = huggingface_hub.hf_hub_download(self._repo, name, revision=revision, library_name="mae_dist")
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            return None
        path = epath.Path(found)  # …/snapshots/<commit>/<name>
        self.commit = path.parents[name.count("/")].name
        return path


class _OnTerminal(tqdm):  # pyright: ignore[reportMissingTypeArgument]
    """A progress bar that is shown on a terminal only."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{**options, "disable": None})


@contextlib.contextmanager
def _hub_errors(name: str, commit: str) -> Generator[None]:
    """Turns what huggingface_hub raises into one message with the cure."""
    from huggingface_hub import constants, errors

    repo, revision, _ = names.hub_parts(name)
    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise DataFault(
            f"{name}: the repository is gated; accept its conditions at {page}, then log in (hf auth login) or set "
            "HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{name}: there is no repository {page}, or it is private; correct the name, or for a private one log in "
            "(hf auth login) or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(
            f"{name}: the repository has no revision {commit or revision!r}; give a branch, a tag or a whole commit "
            f"that its page lists ({page})"
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{name}: {_first_line(error)}; write {names.HUB}OWNER/NAME as the hub has it") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            cause = "HF_HUB_OFFLINE is set, and the cache lacks it: unset that"
        else:
            cause = f"{constants.ENDPOINT} cannot be reached ({_cause(error)}): check the network and HTTPS_PROXY"
        raise DataFault(
            f"{name}: {cause}, or run `hf download {repo}` where there is a connection and name the directory that it "
            f"prints (or copy that host's cache to {constants.HF_HUB_CACHE})"
        ) from error
    except errors.HfHubHTTPError as error:
        raise DataFault(
            f"{name}: {constants.ENDPOINT} answered {_first_line(error)}; if that is about access, log in (hf auth "
            "login) or set HF_TOKEN; otherwise repeat the command later"
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in _CLIENTS:
            raise DataFault(
                f"{name}: the download from {constants.ENDPOINT} failed ({_first_line(error)}); check the network and "
                "repeat the command"
            ) from error
        if isinstance(error, OSError):
            cure = os_errors.cure(error) or "See whether it can be written"
            raise StorageFault(
                f"{name} cannot be stored in {constants.HF_HUB_CACHE}: {_first_line(error)}. {cure}; HF_HOME names "
                "another place"
            ) from error
        raise


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _cause(error: BaseException) -> str:
    """Returns what the system or the client reported first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)
