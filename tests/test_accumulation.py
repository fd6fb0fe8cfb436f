"""Microbatches by the memory of a device."""

from importlib.util import find_spec
from typing import Any

import pytest

from configs import imagenet_vit_b16
from mae_dist.errors import ConfigError
from mae_dist.plan import planning, topology
from mae_dist.training import job
from mae_dist.training.accumulation import activation_bytes, choose_accum_steps, choose_remat
from tests.runs import smoke_config


class Device:
    """An accelerator with its memory, as JAX describes one."""

    device_kind = "a chip"

    def __init__(self, memory: int | None):
        self.memory = memory

    def memory_stats(self) -> dict[str, Any] | None:
        return None if self.memory is None else {"bytes_limit": self.memory}


def test_the_fewest_microbatches_that_fit() -> None:
    """Half the room means twice as many, on more devices fewer; a device that tells nothing, as a CPU, means one."""
    config = smoke_config(global_batch_size=64, accum_steps=0)
    image = activation_bytes(config, num_kept=4)
    room = int(64 * image / 0.8) + 1
    assert choose_accum_steps(config, 4, 0, 1, Device(room)) == 1
    assert choose_accum_steps(config, 4, 0, 1, Device(room // 2 + 1)) == 2
    assert choose_accum_steps(config, 4, 0, 2, Device(room // 2 + 1)) == 1
    assert choose_accum_steps(config, 4, 0, 1, Device(int(room / 2.9))) == 4  # 3 does not divide the batch
    assert choose_accum_steps(config, 4, int(image), 1, Device(room)) == 2
    assert choose_accum_steps(config, 4, 0, 1, Device(None)) == 1
    with pytest.raises(ConfigError, match=r"accum_steps=0: one image.*a chip has"):
        choose_accum_steps(config, 4, 0, 1, Device(int(image)))


def test_what_blocks_keep_grows_with_their_number_and_the_type() -> None:
    """By hand for one block of each: 34 bytes per token and width and 5 per score in 16 bits, threefold."""
    config = smoke_config(model__depth=1, model__decoder_depth=1, model__dtype="bfloat16")
    model, length = config.model, 16
    tokens = (4 + 1, length + 1)
    heads = (model.num_heads, model.decoder_num_heads)
    widths = (model.embed_dim, model.decoder_embed_dim)
    expected = sum(34 * t * w + 5 * h * t**2 for t, w, h in zip(tokens, widths, heads, strict=True))
    assert activation_bytes(config, 4) == 3 * expected
    assert activation_bytes(smoke_config(model__depth=1, model__decoder_depth=1), 4) == 6 * expected


def test_what_a_cross_decoder_keeps() -> None:
    """Of 12 removed patches it predicts 6; keys and values, 4 bytes each, are of the encoder's 5 tokens."""
    cross = {"model__decoder": "cross", "model__predict_ratio": 0.5, "model__dtype": "bfloat16"}
    config = smoke_config(model__depth=1, model__decoder_depth=2, **cross)
    model = config.model
    encoder = 34 * 5 * model.embed_dim + 5 * model.num_heads * 5**2
    decoder = 34 * 6 * model.decoder_embed_dim + 5 * model.decoder_num_heads * 6 * 5 + 4 * 5 * model.decoder_embed_dim
    assert activation_bytes(config, 4) == 3 * (encoder + 2 * decoder)
    fused = smoke_config(model__depth=1, model__decoder_depth=2, model__fuse_blocks=True, **cross)
    assert activation_bytes(fused, 4) == 3 * (encoder + 2 * (decoder + 4 * 5 * model.embed_dim))


def test_what_is_recomputed_follows_from_the_memory() -> None:
    """No more than must be: each further way keeps less. A device that tells nothing, as a CPU, recomputes nothing."""
    config = smoke_config(global_batch_size=64, model__depth=12)
    needed = {remat: 64 * activation_bytes(config, 4, remat) / 0.8 for remat in ("none", "dots", "blocks")}
    assert needed["blocks"] < needed["dots"] < needed["none"]
    for remat, memory in (("none", needed["none"]), ("dots", needed["dots"]), ("blocks", 1)):
        assert choose_remat(config, 4, 0, 1, Device(int(memory) + 1)) == remat
    assert choose_remat(config, 4, 0, 1, Device(None)) == "none"


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
@pytest.mark.parametrize(
    ("images", "accum_steps", "chosen"), [(2048, 1, ("dots", 1)), (2048, 0, ("none", 4)), (256, 1, ("none", 1))]
)
def test_a_described_chip(images: int, accum_steps: int, chosen: tuple[str, int]) -> None:
    """A TPU that is not here tells its memory by its published figures; microbatches come before recomputing."""
    topology.use_no_accelerator()
    config = imagenet_vit_b16.get_config()
    config.update(global_batch_size=images, accum_steps=accum_steps)
    place = topology.describe("v5e:4x4", 1)
    built = job.build(config, place.devices, planning.described_data(config))
    assert (built.config.model.remat, built.config.accum_steps) == chosen
