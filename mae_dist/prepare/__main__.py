"""Prepares a data set once: `python -m mae_dist.prepare imagenet2012 --manual_dir D`, `… cifar10`, or
`python -m mae_dist.prepare --from_folder DIR --name my_set`.

It becomes array_record files in --data_dir as TFDS has them, without TensorFlow, and the command prints how to train on
them. Killed, the same line goes on where it stopped, after it has looked through the archives, or decoded the folder's
files, once more.

With --stats and --config it measures the mean and standard deviation of the training images.
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from mae_dist import cli, errors
from mae_dist.data.image_files import MAX_PIXELS
from mae_dist.data.sources import cifar
from mae_dist.data.sources import listing as listings
from mae_dist.prepare import archives, examine, folders
from mae_dist.prepare.tfds_writer import Image, is_prepared, stored_order, write_dataset
from mae_dist.storage import local

_MANUAL_DIR = flags.DEFINE_string("manual_dir", None, "Where the archives of ImageNet are.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Where TFDS keeps data sets (default $TFDS_DATA_DIR or its own).")
_FROM_FOLDER = flags.DEFINE_string(
    "from_folder", None, "A directory of images in any layout; train/, val/ (validation/) and test/ are its splits."
)
_NAME = flags.DEFINE_string("name", None, "With --from_folder: the data set's name.")
_LABELS = flags.DEFINE_string(
    "labels",
    None,
    "With --from_folder: none, folders (the directories, in train/ if there is one) or csv:FILE of path,label[,split] "
    "(default: folders if most images of train/ are in directories there, else none).",
)
_VAL_FRACTION = flags.DEFINE_float(
    "val_fraction",
    0.0,
    "With --from_folder without val/: the fraction of the images that becomes the split validation.",
    lower_bound=0.0,
    upper_bound=0.99,
)
_SHORT_SIDE = flags.DEFINE_integer(
    "short_side", 0, "With --from_folder: shrink larger images to this short side; 0: store files as they are.", 0
)
_QUALITY = flags.DEFINE_integer("quality", 90, "With --short_side: of the JPEGs.", 1, 100)
_MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", MAX_PIXELS, "With --from_folder: refuse images that are larger by their headers.", 1
)
_STATS = flags.DEFINE_bool("stats", False, "Measure data.mean and data.std, of the training split of the config.")
_LIMIT = flags.DEFINE_integer(
    "limit", 0, "The most images of each split; with --stats of the training split (default 10000).", lower_bound=0
)
_ALLOW_INCOMPLETE = flags.DEFINE_bool("allow_incomplete", False, "Accept archives that hold not all of ImageNet.")
_SKIP_UNDECODABLE = flags.DEFINE_bool(
    "skip_undecodable", False, "With --from_folder: leave out what does not decode, or is of another type than most."
)

_CONFIG = "configs/folder.py"  # in the command that is printed
_FILES = "files.npz"  # beside a data set: the listing of the folder


def prepare(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    names = argv[1:]
    if len(names) + bool(_FROM_FOLDER.value) + bool(_STATS.value) != 1:
        raise errors.ConfigError(
            f"got {names}; name one data set (imagenet2012, cifar10, cifar100), or give --from_folder and --name, or "
            "--stats and --config"
        )
    if _STATS.value:
        return _print_stats()
    root = None
    if _DATA_DIR.value:
        root = os.fspath(local(_DATA_DIR.value, "--data_dir", "prepare on a disk, then copy the directory there"))
    if _FROM_FOLDER.value:
        builder = _prepare_folder(os.fspath(_source(_FROM_FOLDER)), cli.required(_NAME), root)
    elif names[0] == "imagenet2012":
        builder = _prepare_imagenet(root)
    elif names[0] in cifar.BUILDERS:
        if _LIMIT.value:
            raise errors.ConfigError(f"--limit is not for {names[0]}: choose a part by a split, as train[:1000]")
        builder = cifar.BUILDERS[names[0]](data_dir=root)
        cifar.prepare(builder)
        builder = cifar.BUILDERS[names[0]](data_dir=root)
    else:
        raise errors.ConfigError(
            f"{names[0]!r} is not one of imagenet2012, {', '.join(cifar.BUILDERS)}; other sets: tfds build {names[0]} "
            "--file_format=array_record (needs the extra `tensorflow`)"
        )
    counts = ", ".join(f"{name} {split.num_examples}" for name, split in builder.info.splits.items())
    print(f"{builder.data_path}: {counts}")
    config = _CONFIG if os.path.exists(_CONFIG) else Path(_CONFIG).stem  # outside a clone its name finds it too
    print(shlex.join(["python", "-m", "mae_dist.main", "--config", config, *_flags_of(builder)]))
    return errors.EXIT_DONE


def _flags_of(builder: Any) -> list[str]:
    """Returns the flags by which a config trains on this data set, with the splits that it has."""
    import tensorflow_datasets as tfds

    splits, features = builder.info.splits, builder.info.features
    has_validation = "validation" in splits
    fields = {
        "data.source": "tfds",
        "data.name": builder.name,
        "data.data_dir": Path(builder.data_path).parent.parent,  # of name and version
        "data.train_split": "train" if has_validation else "train[:80%]",
        "data.val_split": "validation" if has_validation else "train[80%:]",
        "data.test_split": "test" if "test" in splits else "",
    }
    channels = features["image"].shape[-1]
    if channels != 3 and not (channels == 4 and isinstance(features["image"], tfds.features.Image)):  # that is RGBA
        fields["model.channels"] = channels
    return [f"--config.{field}={value}" for field, value in fields.items()]


def _print_stats() -> int:
    """Measures the pixels of a config's training split; prints and stores the result."""
    from mae_dist.data import statistics
    from mae_dist.data.from_config import open_dataset

    config = cli.needed_config()
    dataset = open_dataset(config, config.data.train_split)
    stats = statistics.measure(dataset, limit=_LIMIT.value or 10_000, max_value=config.data.max_value)
    statistics.store_stats(dataset.fingerprint, stats, config.data.cache_dir)
    fields = (f"{value:.4g}" for value in stats[0]), (f"{value:.4g}" for value in stats[1])
    mean, std = (f"({','.join(values)},)" for values in fields)
    print(shlex.join([f"--config.data.mean={mean}", f"--config.data.std={std}"]))
    return errors.EXIT_DONE


def _source(flag: flags.FlagHolder[str | None]) -> Path:
    """Returns the directory of images that a flag names."""
    value = cli.required(flag)
    local(value, f"--{flag.name}", "copy it to a disk first")
    return Path(value).expanduser()


def _prepare_imagenet(root: str | None) -> Any:
    import tensorflow_datasets as tfds

    builder = tfds.builder("imagenet2012", data_dir=root, try_gcs=False)
    if builder.is_prepared():
        counts = {name: split.num_examples for name, split in builder.info.splits.items()}
        wanted = {name: min(_LIMIT.value or n, n) for name, n in archives.IMAGENET_COUNTS.items()}
        if counts != wanted and not _ALLOW_INCOMPLETE.value:
            raise errors.DataFault(
                f"{builder.data_path} was prepared with a part of ImageNet ({counts}), and {wanted} are asked for; "
                "delete it to prepare these, or give --allow_incomplete to use it as it is"
            )
        logging.info("%s is prepared already", builder.data_path)
        return builder
    allow_incomplete = _ALLOW_INCOMPLETE.value or _LIMIT.value > 0  # a limit is as explicit as that
    splits = archives.imagenet_images(_source(_MANUAL_DIR), allow_incomplete)
    write_dataset(builder.info, Path(builder.data_path), _limited(splits), archives.to_rgb_jpeg)
    return tfds.builder("imagenet2012", data_dir=root, try_gcs=False)


def _prepare_folder(root: str, name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants, dataset_info

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or _is_known(name):
        raise errors.ConfigError(
            f"--name={name!r} must be lower case letters, digits and _, and no name that TFDS has already"
        )
    if _LABELS.value and not re.fullmatch("none|folders|csv:.+", _LABELS.value):
        raise errors.ConfigError(f"--labels={_LABELS.value!r} is not one of none, folders, csv:FILE")
    directory = Path(data_dir or constants.DATA_DIR) / name / "1.0.0"
    folder = folders.find_folder(root, _LABELS.value, _VAL_FRACTION.value or 0.0)
    short_side, quality = _SHORT_SIDE.value or 0, _QUALITY.value or 90
    changes = f", at most {_LIMIT.value} of a split" if _LIMIT.value else ""
    if short_side:
        changes += f", short side {short_side}, quality {quality}"
    of_older = f"Images of {Path(root).absolute()}{changes}."  # versions that did not record the files
    description = f"Images of {Path(root).absolute()}{changes}: {folder.contents()}."
    if is_prepared(directory):
        builder = tfds.builder_from_directory(str(directory))
        stored = builder.info.description
        if stored not in (description, of_older):
            changed = listings.changes_since(directory / _FILES, folder.listing)
            raise errors.DataFault(
                f"{directory} was prepared from something else: {stored!r}, which is now {description!r}"
                f"{f' ({changed})' if changed else ''}; delete it and repeat the command to prepare that, or choose "
                "another --name"
            )
        if stored == of_older:
            logging.warning("%s does not record its files: if they have changed since, delete it", directory)
        logging.info("%s is prepared already, from the same files", directory)
        return builder
    splits, storage = examine.examine(
        folder,
        skip_undecodable=bool(_SKIP_UNDECODABLE.value),
        short_side=short_side,
        quality=quality,
        max_pixels=_MAX_PIXELS.value or MAX_PIXELS,
    )
    identity = dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name=""
    )
    label = {"label": tfds.features.ClassLabel(names=list(folder.class_names))} if folder.class_names else {}
    features = {"image": storage.feature(), **label, "file_name": tfds.features.Text()}
    info = tfds.core.DatasetInfo(
        builder=identity, features=tfds.features.FeaturesDict(features), description=description
    )
    if storage.num_turned:
        logging.info("%d images are turned by their EXIF orientation and stored anew", storage.num_turned)
    write_dataset(
        info,
        directory,
        _limited(splits),
        storage,
        conversion=repr(storage),
        shrinks=bool(short_side),
        write_beside=lambda incomplete: listings.save(folder.listing, incomplete / _FILES),
    )
    return tfds.builder_from_directory(str(directory))


def _is_known(name: str) -> bool:
    """True if TFDS has a data set of this name, and would open that one instead."""
    import tensorflow_datasets as tfds

    try:
        tfds.builder_cls(name)
    except tfds.core.DatasetNotFoundError:
        return False
    return True


def _limited(splits: dict[str, list[Image]]) -> dict[str, list[Image]]:
    """Returns the --limit images of each split that would be stored first, which are of all classes."""
    if not _LIMIT.value:
        return splits
    return {
        name: [images[row] for row in sorted(stored_order(len(images))[: _LIMIT.value])]
        for name, images in splits.items()
    }


if __name__ == "__main__":
    cli.run(prepare)
