"""Masked autoencoders in JAX, from one CPU to a TPU pod: sharded, resumable, measured.

    config = mae_dist.get_config("smoke")             # or default_config(): every field with its default
    result = mae_dist.train(config, "runs/smoke")     # the same call again continues, or returns at once
    run = mae_dist.open_run("runs/smoke")             # its records, weights, reconstructions, evaluations
    features = run.encoder().features(images)         # load_encoder(path): other weights too

`build(config)` gives the parts of a training to a loop of one's own. User faults raise the exceptions of
`mae_dist.errors`.
"""

from importlib import metadata

from etils import epy

from mae_dist import errors
from mae_dist.config.default import get_config as default_config
from mae_dist.config.named import get_config

# Imported when first used, for JAX comes with them: a typo on a command line is reported before that.
with epy.lazy_api_imports(globals()):
    from mae_dist.evaluation.encoder import Encoder, load_encoder
    from mae_dist.model import masking
    from mae_dist.training.job import Job
    from mae_dist.training.opened import Run, open_run
    from mae_dist.training.session import build, train
    from mae_dist.training.summary import Result

__all__ = [
    "Encoder",
    "Job",
    "Result",
    "Run",
    "__version__",
    "build",
    "default_config",
    "errors",
    "get_config",
    "load_encoder",
    "masking",
    "open_run",
    "train",
]

try:
    __version__ = metadata.version("mae_dist")
except metadata.PackageNotFoundError:  # files that were put on the path without an installation
    __version__ = "unknown"
