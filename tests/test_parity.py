"""Against Hugging Face's ViTMAE and ViT in PyTorch: the same weights, images and masks give the same numbers.

Every model is random and small, goes through the layouts' tables like published weights do, and is compared in float32.
`python -m tests.test_parity` prints the differences as a table.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from etils import epath
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from configs import default
from mae_dist.model import autoencoder
from mae_dist.model.build import functional
from mae_dist.model.parameters import parameter_rows
from mae_dist.optim.optimizer import decay_mask, make_optimizer
from mae_dist.tasks import losses
from mae_dist.weights import aliases, layouts, pretrained
from tests import QUICK

torch.set_num_threads(1)  # its threads and XLA's would wait for each other
BATCH = 3
STEPS = 10


@dataclasses.dataclass(frozen=True)
class Shape:
    image: int = 16
    patch: int = 4
    channels: int = 3
    dim: int = 32
    depth: int = 2
    heads: int = 4
    mlp: int = 64
    decoder: tuple[int, int, int, int] = (16, 1, 2, 32)  # width, depth, heads, mlp
    ratio: float = 0.75
    norm_pix: bool = False
    eps: float = 1e-6
    qkv_bias: bool = True
    act: str = "gelu"
    positions: str = "sincos2d"


SHAPES = {
    "small": Shape(),
    "norm_pix": Shape(norm_pix=True),
    "deep": Shape(depth=6, heads=2, decoder=(24, 3, 4, 40), norm_pix=True),
    "gray": Shape(image=12, patch=3, channels=1, dim=20, heads=5, mlp=50, ratio=0.6),
    "rgba": Shape(image=24, patch=8, channels=4, dim=48, heads=3, mlp=96, ratio=0.5, norm_pix=True),
    "eps, tanh, no qkv bias": Shape(eps=1e-12, act="gelu_pytorch_tanh", qkv_bias=False),
    "learned positions": Shape(positions="learned", ratio=0.9),
}
SHORT = ("norm_pix", "rgba", "learned positions")  # the others are run by --long


def fixed_positions(grid: int, dim: int) -> torch.Tensor:
    """Hugging Face's own table in the order of the published weights: (1, 1 + grid^2, dim)."""
    table = build_2d_sinusoidal_position_embedding(grid, grid, dim, cls_token=True)
    return torch.cat([table[:, dim // 2 :], table[:, : dim // 2]], dim=1)[None]


def randomize(model: torch.nn.Module) -> None:
    """Every parameter random, also those that start at zero or one and would hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pos_embed") or name.endswith("position_embeddings"):
                continue
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(offset + torch.randn(parameter.shape) * (0.2 if parameter.ndim < 2 else 0.15))


def hugging_face(shape: Shape) -> ViTMAEForPreTraining:
    dim, depth, heads, mlp = shape.decoder
    config = ViTMAEConfig(
        image_size=shape.image,
        patch_size=shape.patch,
        num_channels=shape.channels,
        hidden_size=shape.dim,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=shape.mlp,
        decoder_hidden_size=dim,
        decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=mlp,
        mask_ratio=shape.ratio,
        norm_pix_loss=shape.norm_pix,
        layer_norm_eps=shape.eps,
        qkv_bias=shape.qkv_bias,
        hidden_act=shape.act,
    )
    model = ViTMAEForPreTraining(config)
    randomize(model)
    grid = shape.image // shape.patch
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        fixed = fixed_positions(grid, table.shape[-1])
        if shape.positions == "learned":
            table.requires_grad_(True)
            fixed[:, 1:] = torch.randn(fixed[:, 1:].shape)
        table.data.copy_(fixed)
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Pair:
    """A PyTorch model, what we read from the directory it saved, and our loss with its gradient."""

    shape: Shape
    theirs: ViTMAEForPreTraining
    ours: pretrained.Pretrained
    params: Any
    value_and_grad: Any


def make_pair(shape: Shape, path: Path) -> Pair:
    theirs = hugging_face(shape)
    theirs.save_pretrained(path)
    ours = pretrained.open_pretrained(epath.Path(path))
    params = jax.tree.map(jnp.asarray, ours.load_whole())
    value_and_grad = jax.jit(jax.value_and_grad(make_forward(ours.config), has_aux=True), compiler_options=QUICK)
    return Pair(shape, theirs, ours, params, value_and_grad)


@pytest.fixture(
    scope="module",
    params=[name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in SHAPES],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(SHAPES[request.param], tmp_path_factory.mktemp("hf"))


def draw(shape: Shape, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, H, W, C) as models see them and mask noise (B, L)."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(BATCH, shape.image, shape.image, shape.channels)).astype(np.float32)
    return images, rng.random((BATCH, (shape.image // shape.patch) ** 2), np.float32)


def their_output(theirs: ViTMAEForPreTraining, images: np.ndarray, noise: np.ndarray) -> tuple[Any, torch.Tensor]:
    """(output, latent) of the PyTorch model."""
    pixels, noise_tensor = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(noise)
    latent = theirs.vit(pixels, noise=noise_tensor).last_hidden_state
    return theirs(pixels, noise=noise_tensor), latent


def make_forward(config: Any) -> Any:
    """(params, images, noise) -> (loss of the batch, (latent, pred, mask)) of our model."""
    model_fields = {**config.model.to_dict(), "scan": True}  # compiles faster
    bind = functional(lambda rngs: autoencoder.MaskedAutoencoder(**model_fields, rngs=rngs)).bind

    def forward(params: Any, images: jax.Array, noise: jax.Array) -> Any:
        model = bind(params)
        ids_shuffle = jnp.argsort(noise, axis=1).astype(jnp.int32)
        kept = int(noise.shape[1] * (1 - config.model.mask_ratio))
        pred, true, mask = model(images, ids_shuffle, kept, None)
        latent = model.encoder(true, ids_shuffle[:, :kept], None)
        target = losses.normalize_patches(true) if config.pretrain.norm_pix_loss else true
        return losses.masked_pixel_loss(pred, target, mask).mean(), (latent, pred, mask)

    return forward


def relative(ours: Any, theirs: Any) -> float:
    """Largest difference, as a share of the largest value."""
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def compare_outputs(pair: Pair) -> dict[str, float]:
    """Relative differences of latent, prediction and loss, the worst of all gradients; the masks must be equal."""
    theirs, model = pair.theirs, pair.ours.config.model
    images, noise = draw(pair.shape, seed=1)
    output, latent = their_output(theirs, images, noise)
    theirs.zero_grad()
    output.loss.backward()
    (loss, (our_latent, pred, mask)), grads = pair.value_and_grad(pair.params, images, noise)
    np.testing.assert_array_equal(mask, output.mask.numpy())
    their_grads = {
        name: p.grad.numpy() if p.grad is not None else np.zeros(p.shape, np.float32)
        for name, p in theirs.named_parameters()
    }
    for name in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
        their_grads[name][:, 0] = 0  # of a class token's position, which the token itself has too
    standard = aliases.with_standard_names(their_grads)
    wanted = layouts.from_layout(standard, pair.ours.abstract, model, "hf")
    return {
        "latent": relative(our_latent, latent.detach()),
        "pred": relative(pred, output.logits.detach()),
        "loss": relative(loss, output.loss.detach()),
        "gradients": max(jax.tree.leaves(jax.tree.map(relative, grads, wanted))),
    }


def compare_steps(pair: Pair) -> float:
    """Largest relative difference of the losses of ten AdamW steps, weight decay on the same parameters."""
    theirs, params = pair.theirs, pair.params
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    rows = parameter_rows(pair.ours.abstract)
    settings: dict[str, Any] = dict(default.get_config().optim)
    for name in ("schedule", "base_lr", "final_lr", "warmup_epochs", "shard_state", "grad_exchange"):
        del settings[name]
    tx = make_optimizer(rows, **settings)
    decayed = jax.tree.map(
        lambda is_decayed, p: np.full(p.shape, float(is_decayed), np.float32), decay_mask(rows), params
    )
    tensors = layouts.to_layout(decayed, pair.ours.config.model, "hf")
    placeholder = np.zeros(0)
    trained = [
        (next(iter(aliases.with_standard_names({name: placeholder}))), p)
        for name, p in theirs.named_parameters()
        if p.requires_grad
    ]
    decays = {name: p.ndim > 1 and not name.endswith(".bias") for name, p in trained}  # as the paper's code has it
    for name, wanted in decays.items():
        assert tensors[name].any() == wanted, name  # "any": positions have a row for the class token, which is not ours
    groups = [
        {"params": [p for name, p in trained if decays[name] == decay], "weight_decay": 0.05 * decay}
        for decay in (True, False)
    ]
    assert all(group["params"] for group in groups)
    adamw = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), eps=1e-8)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def update(params: Any, opt_state: Any, grads: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, opt_state, params, learning_rate=jnp.float32(2e-3))
        return optax.apply_updates(params, updates), opt_state

    opt_state, differences = jax.jit(tx.init, compiler_options=QUICK)(params), []
    for step in range(STEPS):
        images, noise = draw(pair.shape, seed=100 + step)
        output, _ = their_output(theirs, images, noise)
        adamw.zero_grad()
        output.loss.backward()
        for table in (theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed):
            if table.grad is not None:
                table.grad[:, 0] = 0
        adamw.step()
        (loss, _), grads = pair.value_and_grad(params, images, noise)
        params, opt_state = update(params, opt_state, grads)
        differences.append(relative(loss, output.loss.detach()))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(before[name])
    return max(differences)


def test_outputs_and_gradients(pair):
    """He et al.'s model, as PyTorch computes it."""
    found = compare_outputs(pair)
    assert max(found[name] for name in ("latent", "pred", "loss")) < 1e-5, found
    assert found["gradients"] < 1e-4, found


def test_ten_steps(pair):
    """Optimiser, decay and gradients together."""
    assert compare_steps(pair) < 1e-4


def test_comparison_can_fail(pair):
    """A scale that is off by one part in a thousand is seen."""
    norm = {**pair.params["encoder"]["norm"], "scale": pair.params["encoder"]["norm"]["scale"] * 1.001}
    wrong = {**pair.params, "encoder": {**pair.params["encoder"], "norm": norm}}
    found = compare_outputs(dataclasses.replace(pair, params=wrong))
    assert found["latent"] > 1e-4
    assert found["gradients"] > 1e-4


def print_table() -> None:
    """The table of all shapes."""
    print(f"{'shape':24} {'latent':>9} {'pred':>9} {'loss':>9} {'gradients':>9} {'ten steps':>9}")
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as path:
            pair = make_pair(shape, Path(path))
        found = {**compare_outputs(pair), "ten steps": compare_steps(pair)}
        print(f"{name:24} " + " ".join(f"{value:9.1e}" for value in found.values()), flush=True)


if __name__ == "__main__":
    print_table()
