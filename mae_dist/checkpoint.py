"""Checkpoints of a run: saved asynchronously by steps and minutes, resumed from the newest, read for an encoder.

Layout: `<workdir>/checkpoints/<step>/state` (Orbax) and `…/meta` (JSON: the config and the data set's fingerprint).
"""

import contextlib
import datetime
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mae_dist import config as config_lib
from mae_dist.errors import StorageFault, UserError
from mae_dist.state import TrainState
from mae_dist.storage import naming_faults, write_text_atomically

_policy = ocp.checkpoint_managers
# In the meta of converted weights: where they came from.
WEIGHTS_ONLY = "weights_of"


@contextlib.contextmanager
def _naming_damage(path: epath.Path) -> Iterator[None]:
    """As `naming_faults`, and for what Orbax and tensorstore raise when files are short, missing or not writable."""
    try:
        with naming_faults(path):
            yield
    except UserError:
        raise
    except (ValueError, KeyError, jax.errors.JaxRuntimeError) as error:
        raise StorageFault(
            f"checkpoint {path} cannot be written or read: {error}\nIf the disk is full, free some space; if the "
            "checkpoint is damaged, move its directory away: the same command then continues from the one before."
        ) from error


class _EveryMinutes:
    """Saves when the last checkpoint, or without one this process's start, is long enough ago.

    All processes must decide alike although their clocks differ, so the first one decides for all; that costs a
    message, and is asked at log steps only.
    """

    def __init__(self, minutes: float, ask_every_steps: int):
        self._ask_every_steps = ask_every_steps
        self._policy = _policy.ContinuousCheckpointingPolicy(minimum_interval_secs=max(1, round(60 * minutes)))
        self._start = types.SimpleNamespace(time=datetime.datetime.now(tz=datetime.UTC))

    def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
        if step.step % self._ask_every_steps:
            return False
        return self._policy.should_save(step, previous_steps or [self._start], context=context)


class Checkpoints:
    """The checkpoints of one workdir; a context manager that waits for the last save when it closes."""

    def __init__(
        self,
        workdir: epath.Path,
        *,
        every_steps: int,
        every_minutes: float,
        keep_latest: int,
        keep_every_steps: int,
        keep_best: str,
        log_every_steps: int,
        total_steps: int,
    ):
        save: list[Any] = [
            # Listed, or a preemption notice would not lead to a save; the last step is saved whatever the interval.
            _policy.PreemptionCheckpointingPolicy(),
            _policy.SpecificStepsPolicy({total_steps}),
        ]
        if every_steps:
            save.append(_policy.FixedIntervalPolicy(every_steps))
        if every_minutes:
            save.append(_EveryMinutes(every_minutes, log_every_steps))
        keep: list[Any] = [_policy.LatestN(keep_latest)]
        if keep_every_steps:
            keep.append(_policy.EveryNSteps(keep_every_steps))
        lowest = keep_best.endswith("loss")  # a loss is best when lowest, an accuracy when highest

        def metric(metrics: dict[str, float]) -> float:
            return metrics[keep_best]

        if keep_best:
            keep.append(
                _policy.BestN(get_metric_fn=metric, reverse=lowest, n=1, keep_checkpoints_without_metrics=False),
            )
        self.directory = workdir / "checkpoints"
        with _naming_damage(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    save_decision_policy=_policy.AnySavePolicy(save),
                    preservation_policy=_policy.AnyPreservationPolicy(keep),
                    # The policy above decides; without this Orbax would not store the metric for the next process.
                    best_fn=metric if keep_best else None,
                    best_mode="min" if lowest else "max",
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=True,
                ),
            )
        self._keep_best = keep_best

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            with _naming_damage(self.directory):
                self._manager.close()
        except StorageFault as fault:
            if error is None:
                raise
            logging.error("%s", fault)  # what ended the run is the error to report

    def latest_step(self) -> int | None:
        """The newest saved step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, meta: dict[str, Any], metrics: dict[str, float]) -> None:
        """Called after every update; saves where a policy says so, in the background.

        `metrics` are those of an evaluation after this very update, or empty. With `keep_best` each evaluated step is
        saved, for the best is kept among what was evaluated. A failure of an earlier background save surfaces here, as
        a `StorageFault`.
        """
        best = {name: value for name, value in metrics.items() if name == self._keep_best and math.isfinite(value)}
        with _naming_damage(self.directory):
            self._manager.check_for_errors()
            if not best and not self._manager.should_save(step):
                return
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
            self._manager.save(step, args=args, metrics=best or None, force=True)

    def preempted(self, step: int) -> bool:
        """Whether a preemption notice has reached this run; the save of this step has begun then."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Blocks until what was begun is on disk; a failed save is a `StorageFault`."""
        with _naming_damage(self.directory):
            self._manager.wait_until_finished()

    def restore(
        self, abstract: TrainState, shardings: TrainState, config: ConfigDict, fingerprint: str, default: ConfigDict
    ) -> TrainState:
        """The newest state, laid out by `shardings` whatever mesh saved it.

        Fields that `config` has and the checkpoint lacks count as `default` for it.

        Raises:
          StorageFault: the checkpoint belongs to another configuration or other data, and every field that differs is
            named; or it cannot be read.
        """
        step = self.latest_step()
        assert step is not None
        path = self.directory / str(step)
        with _naming_damage(path):
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            stored = config_lib.from_json(meta["config"], default)
        if WEIGHTS_ONLY in meta:
            raise StorageFault(
                f"{path} holds converted weights ({meta[WEIGHTS_ONLY]}), not a run to continue; start one from them in "
                f"another --workdir with --config.init_from={self.directory.parent}"
            )
        lines = config_lib.differences(stored, config)
        if meta["data_fingerprint"] != fingerprint:
            lines.append(f"training data (fingerprint): {meta['data_fingerprint']} -> {fingerprint}")
        if lines:
            raise StorageFault(
                f"{path} was saved by another configuration:\n  - " + "\n  - ".join(lines) + "\n"
                "Set these back to continue the run, or choose another --workdir (or --config.name) for a new one."
            )
        for line in config_lib.differences(stored, config, ignore=()):
            logging.info("Continuing with a changed field: %s", line)
        with _naming_damage(path):
            return _restore(self._manager, step, abstract, shardings)


def _restore(manager: ocp.CheckpointManager, step: int, abstract: Any, shardings: Any, partial: bool = False) -> Any:
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=partial
    )
    return manager.restore(step, args=ocp.args.Composite(state=args))["state"]


def read_config(workdir: epath.Path, default: ConfigDict) -> ConfigDict:
    """The config of the run in `workdir`."""
    path = workdir / "config.json"
    if not path.exists():
        raise StorageFault(
            f"{workdir} is not the workdir of a run: it has no config.json; check --workdir or init_from"
        )
    with _naming_damage(path):
        return config_lib.from_json(path.read_text(), default)


@contextlib.contextmanager
def _newest(workdir: epath.Path) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """The manager of an existing run's checkpoints and its newest step."""
    directory = workdir / "checkpoints"
    if not directory.exists():
        raise StorageFault(f"{directory} does not exist; train that run first, or correct init_from or --workdir")
    with _naming_damage(directory):
        manager = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(create=False))
    try:
        step = manager.latest_step()
        if step is None:
            raise StorageFault(
                f"{directory} holds no checkpoint; train that run first, or correct init_from or --workdir"
            )
        with _naming_damage(directory / str(step)):
            yield manager, step
    finally:
        manager.close()


def param_shapes(workdir: epath.Path) -> tuple[int, dict[str, Any]]:
    """(step, shapes of the parameters by group) of the newest checkpoint in `workdir`; nothing of them is read."""
    with _newest(workdir) as (_, step):
        handler = ocp.PyTreeCheckpointHandler()
        try:
            return step, handler.metadata(workdir / "checkpoints" / str(step) / "state").tree["params"]
        finally:
            handler.close()


def load_params(workdir: epath.Path, abstract: dict[str, Any], shardings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(step, parameters) of the newest checkpoint in `workdir`: only the groups that `abstract` names are read."""
    with _newest(workdir) as (manager, step):
        state = _restore(manager, step, {"params": abstract}, {"params": shardings}, partial=True)
        return step, state["params"]


def save_params(workdir: epath.Path, config: ConfigDict, params: dict[str, Any], origin: str) -> None:
    """Writes trained parameters as a workdir of their own, at step 0 and without the state of an optimizer."""
    directory = workdir / "checkpoints"
    with _naming_damage(directory), ocp.CheckpointManager(directory) as manager:
        meta = {"config": config_lib.to_json(config), WEIGHTS_ONLY: origin}
        args = ocp.args.Composite(state=ocp.args.PyTreeSave({"params": params}), meta=ocp.args.JsonSave(meta))
        manager.save(0, args=args)
        manager.wait_until_finished()
    with naming_faults(workdir):
        write_text_atomically(workdir / "config.json", config_lib.to_json(config) + "\n")


# The fields that parameters depend on, by group; all must be equal to start from them.
_SHARED = ("image_size", "channels", "patch_size", "cls_token", "pos_embed", "qkv_bias", "gelu", "norm_eps")
FIELDS = {
    "encoder": (
        *(f"model.{name}" for name in (*_SHARED, "embed_dim", "depth", "num_heads", "mlp_ratio", "layer_scale_init")),
        "data.mean",
        "data.std",
    ),
    "decoder": (
        *(f"model.decoder_{name}" for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")),
        "model.mask_token",
        "pretrain.norm_pix_loss",
    ),
}


def check_fits(source: ConfigDict, config: ConfigDict, groups: Sequence[str]) -> None:
    """Raises `StorageFault` naming every field in which these groups of `source` differ from those of `config`."""
    lines = []
    for field in (field for group in groups for field in FIELDS[group]):
        old, new = config_lib.get(source, field), config_lib.get(config, field)
        if field == "model.layer_scale_init":  # the value is only where training starts; whether there is one matters
            old, new = old > 0, new > 0
        elif field.startswith("data.") and len(old) != len(new):  # one value stands for all channels
            old, new = (value * config.model.channels if len(value) == 1 else value for value in (old, new))
        if old != new:
            lines.append(f"{field}: {old!r} -> {new!r}")
    if lines:
        raise StorageFault(
            f"the {' and '.join(groups)} of init_from={config.init_from!r} do not fit this config:\n  - "
            + "\n  - ".join(lines)
            + "\nSet these as they were, or convert the weights to another size first (python -m mae_dist.convert)."
        )
