"""Masked autoencoders in JAX, from one CPU to a TPU pod: sharded, resumable, measured.

    config = mae_dist.get_config("smoke")             # or default_config(): every field with its default
    result = mae_dist.train(config, "runs/smoke")     # the same call again continues, or returns at once
    run = mae_dist.open_run("runs/smoke")             # its records, weights, reconstructions, evaluations
    features = run.encoder().features(images)         # load_encoder(path): other weights too
    features = run.encoder().features(mae_dist.find_images("photos"))  # files of any size

`build(config)` gives the parts of a training to a loop of one's own. User faults raise the exceptions of
`mae_dist.errors`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mae_dist import errors
from mae_dist.config.default import get_config as default_config
from mae_dist.config.named import get_config

if TYPE_CHECKING:
    from mae_dist.evaluation.encoder import Encoder, load_encoder
    from mae_dist.evaluation.knn_ridge import neighbours
    from mae_dist.evaluation.own_images import find_broken, find_images, read_images
    from mae_dist.evaluation.patch_colours import patch_colours
    from mae_dist.model import masking
    from mae_dist.training.job import Job
    from mae_dist.training.opened import Run, open_run
    from mae_dist.training.session import build, train
    from mae_dist.training.summary import Result

    __version__: str

__all__ = [
    "Encoder",
    "Job",
    "Result",
    "Run",
    "__version__",
    "build",
    "default_config",
    "errors",
    "find_broken",
    "find_images",
    "get_config",
    "load_encoder",
    "masking",
    "neighbours",
    "open_run",
    "patch_colours",
    "read_images",
    "train",
]

# Imported when first used, for JAX comes with them: a typo on a command line is reported earlier. A value is a module
# (`package.module`) or something in one (`package.module:name`).
_LAZY = {
    "Encoder": "mae_dist.evaluation.encoder:Encoder",
    "Job": "mae_dist.training.job:Job",
    "Result": "mae_dist.training.summary:Result",
    "Run": "mae_dist.training.opened:Run",
    "build": "mae_dist.training.session:build",
    "find_broken": "mae_dist.evaluation.own_images:find_broken",
    "find_images": "mae_dist.evaluation.own_images:find_images",
    "load_encoder": "mae_dist.evaluation.encoder:load_encoder",
    "masking": "mae_dist.model.masking",
    "neighbours": "mae_dist.evaluation.knn_ridge:neighbours",
    "open_run": "mae_dist.training.opened:open_run",
    "patch_colours": "mae_dist.evaluation.patch_colours:patch_colours",
    "read_images": "mae_dist.evaluation.own_images:read_images",
    "train": "mae_dist.training.session:train",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _LAZY:
        raise AttributeError(f"module 'mae_dist' has no attribute {name!r}; it offers {', '.join(__all__)}")
    module, _, attribute = _LAZY[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Returns the installed version; of files that were put on the path without an installation it is unknown."""
    from importlib import metadata

    try:
        return metadata.version("mae_dist")
    except metadata.PackageNotFoundError:
        return "unknown"
