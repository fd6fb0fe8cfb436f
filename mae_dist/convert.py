"""Converts trained weights to another layout: `python -m mae_dist.convert --source S --out O --to hf`.

S is the workdir of a run, a directory in Hugging Face's layout (ViTMAE, Pixio, or ViT for a classifier), a `.pth` or
`.safetensors` file in timm's, which the paper's own code extends by a decoder, or one of these on the Hugging Face hub,
as `hf://OWNER/NAME`. Layouts are hf, pixio, timm and mae_dist. O is written completely or not at all; hf and pixio
write a model card too, O/README.md.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from mae_dist import cli, errors
from mae_dist.metrics.recorder import read_metrics
from mae_dist.metrics.summary import last_values, read_summary
from mae_dist.parallel import processes
from mae_dist.weights import pretrained
from mae_dist.weights.convert import LAYOUTS, OF_TRANSFORMERS, convert_weights

_SOURCE = flags.DEFINE_string(
    "source", None, "Workdir, Hugging Face directory, file in timm's layout, or hf://OWNER/NAME."
)
_OUT = flags.DEFINE_string("out", None, "A directory, for timm a file.", allow_override=True)
_TO = flags.DEFINE_enum("to", None, LAYOUTS, "The layout to write.")
_IMAGE_SIZE = flags.DEFINE_list("image_size", None, "Height,width to interpolate positions for.")
_CHANNELS = flags.DEFINE_integer("channels", None, "Adapt the patch embedding to this number of channels.")
_ENCODER_ONLY = flags.DEFINE_bool("encoder_only", False, "Leave out the decoder or the head.")


def convert(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    del argv
    processes.quiet_unless_primary()
    path, to = cli.required(_SOURCE), cli.required(_TO)
    out = cli.new_local_path(cli.required(_OUT))
    source = pretrained.open_source(path, cli.given_config())
    summary = _summary_of(source) if to in OF_TRANSFORMERS else None
    groups, count = convert_weights(
        source,
        out,
        to,
        image_size=_sizes(_IMAGE_SIZE.value) if _IMAGE_SIZE.value is not None else None,
        channels=_CHANNELS.value,
        encoder_only=_ENCODER_ONLY.value,
        summary=summary,
    )
    if to in OF_TRANSFORMERS:
        logging.info(
            "%s is the model card; state the licence of the weights there before you publish them", out / "README.md"
        )
    print(f"{source.origin} -> {out}: {' and '.join(groups)}, {count:,} parameters ({to} layout)")
    return errors.EXIT_DONE


def _summary_of(source: pretrained.Pretrained) -> dict[str, Any]:
    """Returns summary.json of a run that is finished, else the last metrics up to its checkpoint; {} for no run."""
    if source.run is None:
        return {}
    summary = read_summary(source.run)
    if summary.get("step") == source.step:
        return summary
    return last_values(record for record in read_metrics(source.run) if record["step"] <= source.step)


def _sizes(values: Sequence[str]) -> tuple[int, int]:
    if len(values) not in (1, 2) or not all(value.isdecimal() and int(value) for value in values):
        raise errors.ConfigError(f"--image_size={','.join(values)}: give one whole number above 0, or height,width")
    return int(values[0]), int(values[-1])


if __name__ == "__main__":
    cli.run(convert)
