"""Draws reconstructions of a pretraining: `python -m mae_dist.reconstruct --workdir runs/cifar_small`.

Each row of the picture is an image: original, masked, reconstruction, reconstruction with visible patches; with --pca
also its patches, coloured by the first three principal components of their features. The images are the first of a
split of the run, or your own:

python -m mae_dist.reconstruct --workdir W --images photos --pca --out F.png

--over_steps draws the images as each checkpoint that the run has kept (`checkpoint.keep_every_steps`) restores them;
--beside V,W draws them by those pretrainings too, in columns beside those of --workdir, to compare masks or models.
With --images or --pca, W may be whatever `features` takes; without a decoder there are the images and their patches.
"""

import contextlib
from collections.abc import Sequence

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from mae_dist import cli, errors, names, readable
from mae_dist import config as config_lib
from mae_dist.checkpoint import reader
from mae_dist.data import Dataset, FirstExamples
from mae_dist.data.from_config import open_dataset
from mae_dist.evaluation import evaluate, extract, own_images, pictures
from mae_dist.evaluation.encoder import Encoder
from mae_dist.evaluation.patch_colours import patch_colours
from mae_dist.parallel import processes
from mae_dist.storage import absolute
from mae_dist.task_kinds import kind_of
from mae_dist.weights import pretrained

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a pretraining.", allow_override=True)
_IMAGES = flags.DEFINE_string("images", None, own_images.HELP, allow_override=True)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 8, "The number of images, the first of all.", lower_bound=1)
_PCA = flags.DEFINE_bool("pca", False, "Also draw the principal components of the patches' features.")
_OVER_STEPS = flags.DEFINE_bool("over_steps", False, "Draw each image at every checkpoint that the run has kept.")
_BESIDE = flags.DEFINE_list("beside", [], "Further pretrainings that draw the same images, by commas.")
_SPLIT = flags.DEFINE_enum(
    "split",
    None,
    ["train", "val", "test"],
    "A split of the run (default: test, or val without one).",
    allow_override=True,
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Where to write the PNG (default, of a split: <workdir>/pictures/<split>_<step>.png).",
    allow_override=True,
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
    cli.refuse_arguments(argv)
    workdir = cli.required(_WORKDIR)
    processes.quiet_unless_primary()
    source = pretrained.open_source(workdir, cli.given_config())
    has_decoder = _has_decoder(source)
    if _OVER_STEPS.value and (source.run is None or not has_decoder or _PCA.value):
        raise errors.ConfigError("--over_steps: give the workdir of a pretraining by mae_dist, without --pca")
    others = [pretrained.open_source(place) for place in _BESIDE.value]
    if others and (_PCA.value or _OVER_STEPS.value or not has_decoder):
        raise errors.ConfigError("--beside: give --workdir a pretraining too, and neither --pca nor --over_steps")
    for other in others:
        _check_comparable(source, other)
    if not (has_decoder or _PCA.value):
        what = f"is a {source.config.task}: it has" if not kind_of(source.config).has_decoder else "has"
        raise errors.ConfigError(
            f"{workdir} {what} no decoder; give the workdir of its pretraining, or draw its features, by --pca"
        )
    place = _IMAGES.value or _SPLIT.value or extract.last_split(cli.given_config() or source.config)
    if _IMAGES.value:
        out = absolute(cli.required(_OUT))
        config = extract.with_devices(source, cli.given_config())
        dataset = own_images.open_images(_IMAGES.value, config)
    else:
        own = not workdir.startswith(names.HUB)  # a directory to write to
        out = cli.required(_OUT) if _OUT.value or not own else f"{workdir}/pictures/{place}_{source.step:08d}.png"
        out = absolute(out)
        config = extract.with_data(source, cli.given_config(), _DATA_DIR.value)
        if not (split := config.data[f"{place}_split"]):
            raise errors.ConfigError(f"--split={place}: the run has no such split (data.{place}_split is '')")
        dataset = open_dataset(config, split)
    count = min(_NUM_IMAGES.value, dataset.num_examples)
    with config.unlocked():
        config.eval.batch_size = count
        config.pictures.pix_stats = _PIX_STATS.value or config.pictures.pix_stats

    found = _compute(source, config, dataset, count)
    index = found["index"].tolist()
    looked_at = FirstExamples(dataset, index[-1] + 1) if len(index) == count else dataset
    own_images.report_skipped(looked_at, index)
    images = dataset.examples(found["index"])["image"]
    drawn = {"original": pictures.fractions(images, config)}
    if _OVER_STEPS.value:
        drawn = {name: found[name] for name in pictures.COLUMNS[:2]} | _over_steps(source, config, dataset, count)
    elif others:
        columns = [found, *(_compute_as(config, other, dataset, count) for other in others)]
        drawn |= _side_by_side([source, *others], columns)
    elif has_decoder:
        drawn = {name: found[name] for name in pictures.COLUMNS}
    shown = pictures.as_shown(drawn, config)
    if _PCA.value:
        features = found["patches"] if "patches" in found else Encoder(source).features(images, "patches")
        shown["patches"] = patch_colours(features, config.model.patch_size)
    title = f"{config.name}, step {source.step}"
    if has_decoder:
        title = "\n".join(pictures.title(one.config, one.step) for one in (source, *others))
    pictures.write_png(out, pictures.draw_grid(shown, pictures.names_of(dataset, found), title))
    drawn = f"{len(index)} of {dataset.num_examples} images of {place}"
    print(f"{readable.path(source.origin)}: {drawn} in {readable.path(out)}")
    return errors.EXIT_DONE


def _has_decoder(source: pretrained.Pretrained) -> bool:
    return kind_of(source.config).has_decoder and "decoder" in source.abstract


def _compute(source: pretrained.Pretrained, config: ConfigDict, dataset: Dataset, count: int) -> dict[str, np.ndarray]:
    """Returns the columns of the first `count` images that decode."""
    compute = (
        pictures.prepare(source, config) if _has_decoder(source) else extract.prepare(source, config, ("patches",))
    )
    with contextlib.closing(compute(dataset)) as batches:
        return evaluate.first_rows(batches, count)


def _over_steps(
    source: pretrained.Pretrained, config: ConfigDict, dataset: Dataset, count: int
) -> dict[str, np.ndarray]:
    """Returns the images with their visible patches as each kept checkpoint restores them, by titles."""
    assert source.run is not None
    at = {step: pretrained.open_workdir(source.run, step) for step in reader.steps(source.run)}
    return {f"step {step:,}": _compute(one, config, dataset, count)["with_visible"] for step, one in at.items()}


def _check_comparable(source: pretrained.Pretrained, other: pretrained.Pretrained) -> None:
    """Refuses a model that cannot draw the images of another."""
    if not _has_decoder(other):
        raise errors.ConfigError(f"--beside={other.origin} has no decoder; give the workdir of a pretraining")
    for field in ("image_size", "channels"):
        ours, theirs = source.config.model[field], other.config.model[field]
        if ours != theirs:
            raise errors.ConfigError(
                f"--beside={other.origin}: its model.{field} is {theirs}, that of {source.origin} {ours}; "
                "compare models of the same images"
            )


def _compute_as(
    config: ConfigDict, source: pretrained.Pretrained, dataset: Dataset, count: int
) -> dict[str, np.ndarray]:
    """Returns the columns of another model, computed and drawn as `config` says."""
    with source.config.unlocked():
        source.config.update(mesh=config.mesh, eval=config.eval, pictures=config.pictures)
    return _compute(source, source.config, dataset, count)


def _side_by_side(
    sources: Sequence[pretrained.Pretrained], columns: Sequence[dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the masked and the restored images of each model, by titles."""
    drawn = {}
    for number, (source, found) in enumerate(zip(sources, columns, strict=True)):
        name = config_lib.last_name(str(source.origin))
        if f"{name}\nmasked" in drawn:
            name = f"{name} ({number})"
        drawn |= {f"{name}\n{pictures.TITLES[kind].splitlines()[-1]}": found[kind] for kind in pictures.COLUMNS[1:]}
    return drawn


if __name__ == "__main__":
    cli.run(reconstruct)
