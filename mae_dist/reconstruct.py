"""Draws reconstructions of a pretraining: `python -m mae_dist.reconstruct --workdir runs/cifar_small`.

Each row of the picture is an image: original, masked, reconstruction, reconstruction with visible patches.
"""

from collections.abc import Sequence

import jax
from absl import flags

from mae_dist import cli, errors
from mae_dist import config as config_lib
from mae_dist.checkpoint import reader
from mae_dist.data.from_config import open_data
from mae_dist.evaluation import pictures
from mae_dist.parallel import processes
from mae_dist.storage import absolute
from mae_dist.task_kinds import kind_of
from mae_dist.training import job
from mae_dist.training.run import draw_reconstructions

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a pretraining.", allow_override=True)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 8, "The number of images, the first of the split.", lower_bound=1)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "val", "test"], "A split of the run.", allow_override=True)
_OUT = flags.DEFINE_string(
    "out", None, "Where to write the PNG (default <workdir>/pictures/<split>_<step>.png).", allow_override=True
)
_PIX_STATS = flags.DEFINE_enum(
    "pix_stats",
    None,
    list(config_lib.CHOICES["pictures.pix_stats"]),
    "For a model trained with pretrain.norm_pix_loss: takes mean and deviation of removed patches from themselves or "
    "from the visible patches (default: as the run has it).",
    allow_override=True,
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS keeps data sets, if not where the run had it.", allow_override=True
)


def reconstruct(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    del argv
    workdir = absolute(cli.required(_WORKDIR))
    processes.quiet_unless_primary()
    config = reader.read_config(workdir)
    with config.unlocked():
        config.mesh.update(data=-1, fsdp=1, tensor=1)
        config.accum_steps = config.cpu.pieces = 1
        # Only the pictures are computed: any batch size that splits over the devices will do.
        config.global_batch_size = config.eval.batch_size = jax.device_count()
        config.data.data_dir = _DATA_DIR.value or config.data.data_dir
        config.pictures.pix_stats = _PIX_STATS.value or config.pictures.pix_stats
    if not kind_of(config).has_decoder:
        raise errors.ConfigError(
            f"{workdir} is a {config.task}: it has no decoder; give the workdir of its pretraining"
        )
    config_lib.validate(config)
    built = job.build(config, jax.devices(), open_data(config))
    dataset = getattr(built.data, _SPLIT.value)
    if dataset is None:
        raise errors.ConfigError(f"--split={_SPLIT.value}: the run has no such split (data.{_SPLIT.value}_split is '')")
    step, params = reader.load_params(workdir, built.abstract_state.params, built.shardings.params)
    with jax.set_mesh(built.mesh):
        grid = draw_reconstructions(built, params, dataset, step, _NUM_IMAGES.value)
    out = absolute(_OUT.value) if _OUT.value else workdir / "pictures" / f"{_SPLIT.value}_{step:08d}.png"
    pictures.write_png(out, grid)
    print(f"{config.name}: step {step}, {min(_NUM_IMAGES.value, dataset.num_examples)} {_SPLIT.value} images in {out}")
    return errors.EXIT_DONE


if __name__ == "__main__":
    cli.run(reconstruct)
