"""Records of runs to keep, without checkpoints and without places on the machine where they ran."""

import json
from collections.abc import Iterable

from etils import epath

from mae_dist import config as config_lib
from mae_dist import names
from mae_dist.metrics.recorder import METRICS_FILE, without_nan
from mae_dist.metrics.summary import write_summary
from mae_dist.report.runs import Run
from mae_dist.storage import storage_errors, write_text_atomically

_SPLITS = ("train_", "val_", "test_")


def keep(runs: Iterable[Run], out: epath.Path) -> list[epath.Path]:
    """Writes `out/<name of the workdir>` for each finished run; returns these.

    Each has config.json, summary.json and, of metrics.jsonl, the evaluations, but for single classes, and the last
    record: what tables of results and curves of evaluations need.
    """
    kept = []
    for run in runs:
        if not run.finished:
            continue
        config = run.config.copy_and_resolve_references().unlock()
        config.data.data_dir = config.data.cache_dir = config.compiled_step = ""
        if not config.init_from.startswith(names.HUB):
            config.init_from = config_lib.last_name(config.init_from)
        records = [
            {name: value for name, value in without_nan(record).items() if "/" not in name}
            for record in run.records
            if record is run.records[-1] or any(name.startswith(_SPLITS) for name in record)
        ]
        place = out / run.workdir.name
        with storage_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            write_text_atomically(place / "config.json", config_lib.to_json(config))
            write_text_atomically(place / METRICS_FILE, "".join(f"{json.dumps(record)}\n" for record in records))
        write_summary(place, run.summary)
        kept.append(place)
    return kept
