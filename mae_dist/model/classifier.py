"""A classifier: the encoder of a masked autoencoder, a pooling and a head.

Shapes: B batch, H W C image, D encoder width, Y classes.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Key

from mae_dist.model.autoencoder import MaskedAutoencoder
from mae_dist.model.heads import BatchNorm, Head
from mae_dist.model.hooks import PLAIN, Hooks


class Classifier(nnx.Module):
    """The encoder of a masked autoencoder on all patches, a pooling and a head.

    The last LayerNorm is the encoder's and acts on tokens, or, with `norm_after_pool`, the head's and acts on pooled
    features, as in the paper's fine-tuning. With `batch_norm` a BatchNorm normalises features before the head.
    """

    def __init__(
        self,
        model: dict[str, Any],
        *,
        num_classes: int,
        kind: str,
        hidden_dim: int,
        pool: str,
        norm_after_pool: bool,
        batch_norm: bool,
        hooks: Hooks = PLAIN,
        rngs: nnx.Rngs,
    ):
        autoencoder = MaskedAutoencoder(**model, final_norm=not norm_after_pool, hooks=hooks, rngs=rngs)
        self.encoder = autoencoder.encoder
        norm_eps = model["norm_eps"] if norm_after_pool else 0.0
        self.head = Head(
            model["embed_dim"],
            num_classes,
            kind=kind,
            hidden_dim=hidden_dim,
            norm_eps=norm_eps,
            # As in the paper's code. Near zero, so that the first steps do not disturb the encoder; a probe's encoder
            # is frozen, and LARS would grow a tiny matrix only by tiny steps.
            init_std=0.01 if batch_norm else 2e-5,
            rngs=rngs,
        )
        self.batch_norm = BatchNorm(model["embed_dim"]) if batch_norm else None
        self.pool = pool

    def features(self, images: Float[Array, "B H W C"], keys: Key[Array, "B"] | None) -> Float[Array, "B D"]:
        """Returns the pooled features of all patches of scaled images."""
        return self.encoder.features(images, (self.pool,), keys)[self.pool]

    def logits(self, features: Float[Array, "B D"], *, whole_batch: bool = False) -> Float[Array, "B Y"]:
        """Returns logits of pooled features; `whole_batch` is BatchNorm's."""
        if self.batch_norm is not None:
            features = self.batch_norm(features, whole_batch=whole_batch)
        return self.head(features)

    def __call__(self, images: Float[Array, "B H W C"], keys: Key[Array, "B"] | None) -> Float[Array, "B Y"]:
        """Returns logits of scaled images."""
        return self.logits(self.features(images, keys))
