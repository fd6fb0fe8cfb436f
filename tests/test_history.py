"""What would replace records by less. Whole commands: test_ends."""

import json

import pytest
from etils import epath

from mae_dist import config as config_lib
from mae_dist.errors import StorageFault
from mae_dist.metrics import history
from tests.runs import smoke_config

CONFIG = smoke_config(log_every_steps=5)


def check(workdir: epath.Path, start: int, total_steps: int = 20, **overrides: object) -> None:
    history.check_start(workdir, smoke_config(log_every_steps=5, **overrides), start, total_steps)


@pytest.fixture
def recorded(workdir: epath.Path) -> epath.Path:
    """A run that was killed at step 12, before its first save."""
    workdir.mkdir()
    (workdir / "config.json").write_text(config_lib.to_json(CONFIG))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (5, 10)))
    return workdir


def test_begins_anew_by_the_same_line(recorded, caplog):
    """After a kill before the first save, which is said; and where nothing was recorded, whatever the config."""
    check(recorded, 0)
    assert "ended at step 10, before its first save" in caplog.text
    check(recorded, 0, eval__batch_size=8)  # free to differ
    (recorded / "metrics.jsonl").unlink()
    check(recorded, 0, model__mask_ratio=0.5)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("another config", "another configuration, to step 10.*\n  - model.mask_ratio: 0.75 -> 0.5"),
        ("config.json", r"its config.json cannot be read"),
        ("checkpoints", "is empty, but the run there has saved step 10:"),
        ("checkpoints, finished", r"is empty, but the run there has left summary\.json:"),
    ],
)
def test_refuses_to_begin_anew(recorded, lost, words):
    """With what there is and the cure."""
    if lost == "config.json":
        (recorded / "config.json").write_text("{")
    if lost == "checkpoints":
        (recorded / "seals").mkdir()
        (recorded / "seals" / "10.json").write_text("{}")
    if lost == "checkpoints, finished":
        (recorded / "summary.json").write_text("{}")
    with pytest.raises(StorageFault, match=f"(?s){words}.*another --workdir.*move .* away or delete it"):
        check(recorded, 0, model__mask_ratio=0.5 if lost == "another config" else 0.75)


def test_continues(recorded, caplog):
    """Records up to the checkpoint are the rule; what lacks is said, what lies beyond total_steps is refused."""
    check(recorded, 12)
    assert not caplog.text
    check(recorded, 15)
    assert "ends at step 10 and the checkpoint is of step 15" in caplog.text
    with pytest.raises(StorageFault, match="trained to step 21 already, beyond total_steps=20: nothing is done"):
        check(recorded, 21)


def test_summary_is_read_or_made_of_records(recorded):
    """One of this step is the last word, whatever became of the records; without it they must reach the step."""
    assert history.finished_summary(recorded, 10) is None
    with pytest.raises(StorageFault, match=r"trained to step 20, but metrics\.jsonl ends at step 10"):
        history.finished_summary(recorded, 20)
    for text in ("{", '{"step": 20}', '{"step": 20, "total_steps": 30}'):
        (recorded / "summary.json").write_text(text)
        assert history.finished_summary(recorded, 10) is None
    (recorded / "summary.json").write_text('{"step": 20, "total_steps": 20, "loss": 1.0}')
    assert history.finished_summary(recorded, 20) == {"step": 20, "total_steps": 20, "loss": 1.0}
