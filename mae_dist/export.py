"""Writes a model as StableHLO that runs without this package: `python -m mae_dist.export --workdir W --out F`.

W is a workdir, or another source that `features` takes. The file holds program and weights, and
`jax.export.deserialize(bytes).call(…)` runs it for any number of images:

  --what encoder          images (b, H, W, C) -> {"mean": (b, D), "cls": (b, D), "patches": (b, gh, gw, D)}
  --what reconstruction   images, noise (b, L) -> {"original", "masked", "reconstruction", "with_visible": (b, H, W, C)
                          in 0..1, "mask": (b, L), 1 where a patch was removed}; the patches of lowest noise are kept

Images are uint8 in 0..255, or with --input float32 in 0..1.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from etils import epath

from mae_dist import cli, errors
from mae_dist.evaluation.encode import KINDS, make_encode, needed_shapes, scale
from mae_dist.model import layers, patches
from mae_dist.model.autoencoder import MaskedAutoencoder
from mae_dist.model.build import functional
from mae_dist.parallel import processes
from mae_dist.storage import appearing, storage_errors, write_bytes_atomically
from mae_dist.tasks.pretrain import make_pictures
from mae_dist.weights import pretrained

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the model is.", allow_override=True)
_OUT = flags.DEFINE_string("out", None, "The file to write.", allow_override=True)
_WHAT = flags.DEFINE_enum("what", "encoder", ["encoder", "reconstruction"], "The function to write.")
_INPUT = flags.DEFINE_enum("input", "uint8", ["uint8", "float32"], "The type of the images.")
_PLATFORMS = flags.DEFINE_list("platforms", ["cpu", "cuda", "tpu"], "The platforms it will run on.")

Function = Callable[..., dict[str, jax.Array]]


def export(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    del argv
    processes.quiet_unless_primary()
    workdir, out_value = cli.required(_WORKDIR), cli.required(_OUT)
    unknown = set(_PLATFORMS.value) - {"cpu", "cuda", "rocm", "tpu"}
    if unknown or not _PLATFORMS.value:
        raise errors.ConfigError(f"--platforms={','.join(_PLATFORMS.value)}: choose of cpu, cuda, rocm and tpu")
    out = cli.new_local_path(out_value)
    source = pretrained.open_source(workdir, cli.given_config())
    function, arguments = make_function(source, _WHAT.value, _INPUT.value)
    exported = jax.export.export(jax.jit(function), platforms=_PLATFORMS.value)(*arguments.values())
    with appearing(out) as temporary, storage_errors(out):
        write_bytes_atomically(temporary, bytes(exported.serialize()))
        _check(temporary, function, arguments)
        size = temporary.stat().length / 2**20
    print(f"{source.origin}: {_WHAT.value} for {', '.join(_PLATFORMS.value)} in {out} ({size:.1f} MiB)")
    for word, values in (("takes", arguments), ("gives", jax.eval_shape(function, *arguments.values()))):
        for name, value in values.items():
            print(f"  {word} {name}: {value.dtype} ({', '.join(map(str, value.shape))})")
    return errors.EXIT_DONE


def make_function(
    source: pretrained.Pretrained, what: str, dtype: str
) -> tuple[Function, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the function with its weights inside, and the shapes of its arguments for a symbolic number of images."""
    config, model = source.config, source.config.model
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *model.image_size, model.channels), jnp.dtype(dtype))
    if what == "reconstruction" and "decoder" not in source.abstract:
        raise errors.ConfigError(f"{source.origin} has no decoder, so it cannot reconstruct; use --what=encoder")
    shapes = needed_shapes(source) if what == "encoder" else source.abstract
    params = source.load_here(shapes)
    if what == "encoder":
        kinds = [kind for kind in KINDS if kind != "cls" or layers.count_cls_tokens(model.cls_token, model.cls_tokens)]
        encode = make_encode(config, kinds)
        return lambda x: encode(params, x), {"images": images}
    rows, columns = patches.grid_size(model.image_size, model.patch_size)
    bind = functional(lambda rngs: MaskedAutoencoder(**model.to_dict(), rngs=rngs)).bind

    def reconstruct(images: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        bound = bind(params)
        _, kept = bound.draw_ids_shuffle(jax.random.split(jax.random.key(0), 1))  # only how many are kept
        ids_shuffle = jnp.argsort(noise, axis=1, stable=True).astype(jnp.int32)
        pred, true, mask = bound(scale(images, config), ids_shuffle, kept, None)
        return {**make_pictures(config, pred, true, mask), "mask": mask}

    noise = jax.ShapeDtypeStruct((batch, rows * columns), jnp.float32)
    return reconstruct, {"images": images, "noise": noise}


def _check(path: epath.Path, function: Function, arguments: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Runs the written file for one image and for three, and compares the results with the function's own."""
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    here = jax.export.default_export_platform()  # cuda or rocm, where the backend is called gpu
    if here not in exported.platforms:
        logging.warning("written for %s and not run: this is %s", ", ".join(exported.platforms), here)
        return
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        drawn = []
        for shape in arguments.values():
            scale = 255 if shape.dtype == np.uint8 else 1
            drawn.append((scale * rng.random((batch, *shape.shape[1:]), np.float32)).astype(shape.dtype))
        ours, written = jax.jit(function)(*drawn), exported.call(*drawn)
        for name, value in ours.items():
            difference = float(jnp.abs(value - written[name]).max())
            assert difference <= 1e-4 * float(jnp.abs(value).max()), f"{path}: {name} differs by {difference}"


if __name__ == "__main__":
    cli.run(export)
