"""The masked autoencoder (He et al. 2021): encoder on kept patches, a decoder that predicts the removed ones.

Shapes: B batch, H W C image, L patches, K kept patches, P values of one patch, N tokens (class tokens, then K or L), D
encoder width.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from mae_dist.model import masking as model_masking
from mae_dist.model import patches
from mae_dist.model.cross_decoder import CrossDecoder
from mae_dist.model.decoder import Decoder
from mae_dist.model.encoder import Encoder
from mae_dist.model.functional import fold_in
from mae_dist.model.layers import count_cls_tokens


class MaskedAutoencoder(nnx.Module):
    """Encoder on kept patches and a decoder; the keyword arguments are the fields of `config.model`.

    Those that encoder and decoder take alike are `shared`, with the hooks and the initial random numbers.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        channels: int,
        patch_size: tuple[int, int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        decoder_mlp_ratio: float,
        decoder: str,
        fuse_blocks: bool,
        predict_ratio: float,
        mask_ratio: float,
        masking: str,
        mask_file: str,
        mask_block: int,
        cls_token: str,
        cls_tokens: int,
        mask_token: str,
        drop_path: float,
        dtype: str,
        final_norm: bool = True,  # False where a classifier normalises after pooling instead
        **shared: Any,
    ):
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.grid = patches.grid_size(image_size, patch_size)
        self.masking: dict[str, Any] = {
            "strategy": masking,
            "mask_ratio": mask_ratio,
            "mask_file": mask_file,
            "mask_block": mask_block,
        }
        self.predict_ratio, self.fuse_blocks = predict_ratio, fuse_blocks
        shared["grid"], shared["dtype"] = self.grid, jnp.dtype(dtype)
        shared["num_cls"] = count_cls_tokens(cls_token, cls_tokens)
        shared["patch_dim"] = patch_size[0] * patch_size[1] * channels
        self.encoder = Encoder(
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            cls_token=cls_token,
            drop_path=drop_path,
            final_norm=final_norm,
            **shared,
        )
        shared |= {
            "in_dim": embed_dim,
            "embed_dim": decoder_embed_dim,
            "depth": decoder_depth,
            "num_heads": decoder_num_heads,
            "mlp_ratio": decoder_mlp_ratio,
            "mask_token": mask_token,
            "drop_path": 0.0,
        }
        if decoder == "cross":
            self.decoder = CrossDecoder(num_inputs=depth + 1 if fuse_blocks else 1, **shared)
        else:
            assert not fuse_blocks  # `config.checks` refuses these
            assert predict_ratio == 1
            self.decoder = Decoder(**shared)

    def draw_ids_shuffle(self, keys: Key[Array, "B"]) -> tuple[Int[Array, "B L"], int]:
        """Draws one mask per example with the configured strategy; returns ids_shuffle and K."""
        return model_masking.draw_ids_shuffle(keys, grid=self.grid, **self.masking)

    def __call__(
        self,
        images: Float[Array, "B H W C"],
        ids_shuffle: Int[Array, "B L"],
        kept: int,
        keys: Key[Array, "B"] | None,
    ) -> tuple[Float[Array, "B L P"], Float[Array, "B L P"], Float[Array, "B L"]]:
        """Reconstructs images from their kept patches.

        Args:
          images: scaled pixels, float32.
          ids_shuffle: the kept patches first.
          kept: K.
          keys: for dropout and DropPath; None for neither.

        Returns:
          The predicted and the true patches, float32, and the mask.
        """
        x = patches.patchify(images, self.patch_size)  # (B, L, P)
        ids_restore = model_masking.restore_ids(ids_shuffle)
        latent = self.encoder(x, ids_shuffle[:, :kept], keys, every_block=self.fuse_blocks)  # (B, N, D)
        pred = self.decoder(latent, ids_restore, fold_in(keys, 1 << 16))  # beyond the encoder's layer indices
        return pred, x, model_masking.mask_from_ids(ids_restore, kept)

    def removed_patches(
        self,
        images: Float[Array, "B H W C"],
        ids_shuffle: Int[Array, "B L"],
        kept: int,
        keys: Key[Array, "B"] | None,
    ) -> tuple[Float[Array, "B predicted P"], Float[Array, "B predicted P"]]:
        """Reconstructs what a training loss needs: the removed patches, or a random `predict_ratio` of them.

        Arguments are as of `__call__`; the keys also choose the patches.

        Returns:
          The predicted and the true patches, float32, in shuffled order.
        """
        x = patches.patchify(images, self.patch_size)  # (B, L, P)
        latent = self.encoder(x, ids_shuffle[:, :kept], keys, every_block=self.fuse_blocks)  # (B, N, D)
        if self.predict_ratio < 1:
            choice = fold_in(keys, 1 << 17)
            assert choice is not None
            count = model_masking.count_predicted(x.shape[1] - kept, self.predict_ratio)
            ids_shuffle = model_masking.keep_predicted(choice, ids_shuffle, kept, count)
        pred = self.decoder.predict_removed(latent, ids_shuffle, fold_in(keys, 1 << 16))
        return pred, patches.take_patches(x, ids_shuffle[:, kept:])
