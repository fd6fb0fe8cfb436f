"""Seals of checkpoints: what was written, file by file, and the quarantine for what is not as it was.

Layout, beside `<workdir>/checkpoints/<step>/`: its manifest `<workdir>/seals/<step>.json` (SHA-256 of each file,
written when the checkpoint is complete), and for a corrupted one `<workdir>/quarantine/<step>_<time>/` with
`<step>_<time>.txt`, which says why.
"""

import datetime
import json
import re
from collections.abc import Sequence

from absl import logging
from etils import epath

from mae_dist.checkpoint import digests
from mae_dist.storage import children_of, write_text_atomically

# Orbax's names of what one process alone writes; its checkpoint as a whole is put together by process 0.
_WRITER = re.compile(r"(?:^|/)(?:ocdbt\.|array_metadatas/)process_(\d+)(?:/|$)")


def _writer(name: str, num_processes: int) -> int:
    """Returns which of so many processes wrote a file of a checkpoint."""
    found = _WRITER.search(name)
    return int(found[1]) if found and int(found[1]) < num_processes else 0


class Seals:
    """The seals and the quarantine of one workdir; process 0 alone writes them."""

    def __init__(self, workdir: epath.Path):
        self._checkpoints = workdir / "checkpoints"
        self._seals = workdir / "seals"
        self._quarantine = workdir / "quarantine"

    def seal(self, step: int) -> None:
        """Writes the manifest of a complete checkpoint, all files digested here; an `OSError` if it cannot."""
        self.write(step, [self.digest_share(step, 0, 1)])

    def digest_share(self, step: int, process: int, num_processes: int) -> dict[str, str] | None:
        """Digests those files of a complete checkpoint that one of the processes wrote; None if it is gone."""
        checkpoint = self._checkpoints / str(step)
        try:
            return digests.file_digests(checkpoint, lambda name: _writer(name, num_processes) == process)
        except FileNotFoundError:
            if checkpoint.exists():
                raise
            return None

    def write(self, step: int, shares: Sequence[dict[str, str] | None]) -> None:
        """Writes the manifest of a checkpoint, put together from what all processes digested.

        Nothing is written for one that is gone: superseded and deleted meanwhile. Manifests of such are removed.
        """
        found = {name: digest for share in shares for name, digest in (share or {}).items()}
        if not found or None in shares:
            return
        self._seals.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self._path(step), json.dumps(dict(sorted(found.items())), indent=0) + "\n")
        for known in self.steps():
            if not (self._checkpoints / str(known)).exists():
                self._path(known).unlink(missing_ok=True)

    def has(self, step: int) -> bool:
        """Whether there is a seal of this checkpoint."""
        return self._path(step).exists()

    def steps(self) -> list[int]:
        """The sealed steps, ascending, whether or not their checkpoints are still there."""
        files = children_of(self._seals)  # not by a glob, to which the whole path would be a pattern
        return sorted(int(path.stem) for path in files if path.suffix == ".json" and path.stem.isdigit())

    def damage(self, step: int, process: int = 0, num_processes: int = 1) -> list[str] | None:
        """What is not as it was written: nothing for a good checkpoint, None for one without a seal.

        One has none if the process was killed between the end of the save and the seal. Several processes that share
        the reading find it together, whichever wrote the files.
        """
        try:
            meant = dict(json.loads(self._path(step).read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            logging.warning("%s is damaged: the checkpoint's own digests decide", self._path(step))
            return None
        shares = {name: index % num_processes for index, name in enumerate(sorted(meant))}

        def is_mine(name: str) -> bool:
            return shares.get(name, 0) == process  # process 0 finds what should not be there

        found = digests.file_digests(self._checkpoints / str(step), is_mine)
        return digests.differences({name: value for name, value in meant.items() if is_mine(name)}, found)

    def quarantine(self, step: int, reason: str) -> epath.Path:
        """Moves a damaged checkpoint away, where it is never read again; returns the place."""
        now = datetime.datetime.now(tz=datetime.UTC).strftime("%Y%m%dT%H%M%S")
        place = self._quarantine / f"{step}_{now}"
        self._quarantine.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self._quarantine / f"{place.name}.txt", reason + "\n")
        (self._checkpoints / str(step)).rename(place)
        self._path(step).unlink(missing_ok=True)
        return place

    def quarantined(self) -> dict[str, str]:
        """Why, by name."""
        if not self._quarantine.exists():
            return {}
        reasons = (path for path in sorted(self._quarantine.iterdir()) if path.suffix == ".txt")
        return {path.stem: path.read_text().strip() for path in reasons}

    def empty_quarantine(self) -> int:
        """Deletes what is in quarantine; returns how many checkpoints that were."""
        count = len(self.quarantined())
        if count:
            self._quarantine.rmtree()
        return count

    def _path(self, step: int) -> epath.Path:
        return self._seals / f"{step}.json"
