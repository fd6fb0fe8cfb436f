"""Manifests of checkpoints (SHA-256 of every file that was written), and the quarantine for corrupted ones.

Layout, beside `<workdir>/checkpoints/<step>/`: its manifest `<workdir>/seals/<step>.json`, written when the checkpoint
is complete (the directory's name is older than the word), and for a corrupted one
`<workdir>/quarantine/<step>_<time>/` with the reason in `<step>_<time>.txt`.
"""

import datetime
import json
import re
from collections.abc import Iterable

from absl import logging
from etils import epath

from mae_dist.checkpoint import digests
from mae_dist.storage import children_of, write_text_atomically

# Orbax's names of what one process alone writes; its checkpoint as a whole is put together by process 0.
_WRITER = re.compile(r"(?:^|/)(?:ocdbt\.|array_metadatas/)process_(\d+)(?:/|$)")


class Manifests:
    """The manifests and the quarantine of one workdir; process 0 alone writes them."""

    def __init__(self, workdir: epath.Path):
        self._checkpoints = workdir / "checkpoints"
        self._manifests = workdir / "seals"
        self._quarantine = workdir / "quarantine"

    def digest_files(self, step: int, process: int = 0, num_processes: int = 1) -> dict[str, str]:
        """Returns the digests of those files of a complete checkpoint that one of the processes wrote."""

        def is_own(name: str) -> bool:
            found = _WRITER.search(name)
            return process == (int(found[1]) if found and int(found[1]) < num_processes else 0)

        return digests.file_digests(self._checkpoints / str(step), is_own)

    def write(self, step: int, parts: Iterable[dict[str, str]]) -> None:
        """Writes the manifest of a checkpoint from what each process digested; removes those of deleted checkpoints."""
        found = {name: digest for part in parts for name, digest in part.items()}
        self._manifests.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self._path(step), json.dumps(dict(sorted(found.items())), indent=0) + "\n")
        for known in self.steps():
            if not (self._checkpoints / str(known)).exists():
                self._path(known).unlink(missing_ok=True)

    def has(self, step: int) -> bool:
        """True if this checkpoint has a manifest."""
        return self._path(step).exists()

    def steps(self) -> list[int]:
        """Returns the steps that have a manifest, ascending, whether or not their checkpoints are still there."""
        files = children_of(self._manifests)  # not by a glob, to which the whole path would be a pattern
        return sorted(int(path.stem) for path in files if path.suffix == ".json" and path.stem.isdigit())

    def faults(self, step: int, process: int = 0, num_processes: int = 1) -> list[str] | None:
        """Returns a line for each file that is not as it was written, or None for a checkpoint without a manifest.

        A process that was killed between the end of a save and its manifest leaves none. Several processes each read a
        fraction of the files, whichever wrote them, and find all faults together.
        """
        try:
            meant = dict(json.loads(self._path(step).read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            logging.warning("%s is corrupted: the digests in the checkpoint decide", self._path(step))
            return None
        mine = {name: meant[name] for name in sorted(meant)[process::num_processes]}

        def is_mine(name: str) -> bool:
            return name in mine or (process == 0 and name not in meant)

        return digests.differences(mine, digests.file_digests(self._checkpoints / str(step), is_mine))

    def quarantine(self, step: int, reason: str) -> epath.Path:
        """Moves a corrupted checkpoint away, where it is never read again; returns the place."""
        now = datetime.datetime.now(tz=datetime.UTC).strftime("%Y%m%dT%H%M%S")
        place = self._quarantine / f"{step}_{now}"
        self._quarantine.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self._quarantine / f"{place.name}.txt", reason + "\n")
        (self._checkpoints / str(step)).rename(place)
        self._path(step).unlink(missing_ok=True)
        return place

    def quarantined(self) -> dict[str, str]:
        """Returns the reasons of the checkpoints in quarantine, by name."""
        reasons = (path for path in children_of(self._quarantine) if path.suffix == ".txt")
        return {path.stem: path.read_text().strip() for path in reasons}

    def empty_quarantine(self) -> int:
        """Deletes what is in quarantine; returns how many checkpoints that were."""
        count = len(self.quarantined())
        if count:
            self._quarantine.rmtree()
        return count

    def _path(self, step: int) -> epath.Path:
        return self._manifests / f"{step}.json"
