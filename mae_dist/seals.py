"""Seals of checkpoints: what was written, file by file, and the quarantine for what is not as it was.

Layout, beside `<workdir>/checkpoints/<step>/`: `<workdir>/seals/<step>.json` (SHA-256 of each file, written when the
checkpoint is complete) and `<workdir>/quarantine/<step>_<time>/` with `<step>_<time>.txt`, which says why.
"""

import datetime
import json

from absl import logging
from etils import epath

from mae_dist import integrity
from mae_dist.storage import write_text_atomically


class Seals:
    """The seals and the quarantine of one workdir; one process at a time writes them."""

    def __init__(self, workdir: epath.Path):
        self._checkpoints = workdir / "checkpoints"
        self._seals = workdir / "seals"
        self._quarantine = workdir / "quarantine"

    def seal(self, step: int) -> None:
        """Notes the files of a complete checkpoint, forgets those of ones that are gone; an `OSError` if it cannot."""
        checkpoint = self._checkpoints / str(step)
        try:
            found = integrity.file_digests(checkpoint)
        except FileNotFoundError:
            if checkpoint.exists():
                raise
            found = {}
        if not found:
            return  # superseded and deleted meanwhile
        self._seals.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self._path(step), json.dumps(found, indent=0) + "\n")
        for path in self._seals.glob("*.json"):
            if not (self._checkpoints / path.stem).exists():
                path.unlink(missing_ok=True)

    def has(self, step: int) -> bool:
        """Whether there is a seal of this checkpoint."""
        return self._path(step).exists()

    def steps(self) -> list[int]:
        """The sealed steps, ascending, whether or not their checkpoints are still there."""
        return sorted(int(path.stem) for path in self._seals.glob("*.json") if path.stem.isdigit())

    def damage(self, step: int) -> list[str] | None:
        """What is not as it was written: nothing for a good checkpoint, None for one without a seal.

        One has none if the process was killed between the end of the save and the seal.
        """
        try:
            meant = dict(json.loads(self._path(step).read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            logging.warning("%s is damaged: the checkpoint's own digests decide", self._path(step))
            return None
        return integrity.differences(meant, integrity.file_digests(self._checkpoints / str(step)))

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
