"""Heads of a classifier, and the batch normalisation of the paper's linear probe.

Shapes: B examples, D features, Y classes. All arithmetic in float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# BatchNorm's, as PyTorch's default and the paper's probe; the momentum is the weight of a new batch.
_MOMENTUM, EPS = 0.1, 1e-6


class Head(nnx.Module):
    """Linear classifier, or an MLP with one hidden layer and GELU; a LayerNorm first if `norm_eps` > 0.

    The head's GELU is the tanh approximation; `model.gelu` is the encoder's.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        kind: str,
        hidden_dim: int,
        norm_eps: float,
        init_std: float,
        rngs: nnx.Rngs,
    ):
        self.norm = nnx.LayerNorm(dim, epsilon=norm_eps, rngs=rngs) if norm_eps > 0 else None
        xavier = nnx.initializers.xavier_uniform()
        self.hidden = nnx.Linear(dim, hidden_dim, kernel_init=xavier, rngs=rngs) if kind == "mlp" else None
        # The paper's `trunc_normal_(std=0.01)` cuts off at -2 and 2 themselves, 200 standard deviations away: a normal
        # distribution. JAX's `truncated_normal` cuts off at 2 standard deviations, which leaves 0.88 of the deviation.
        inputs = hidden_dim if kind == "mlp" else dim
        self.linear = nnx.Linear(inputs, num_classes, kernel_init=nnx.initializers.normal(init_std), rngs=rngs)

    def __call__(self, features: Float[Array, "B D"]) -> Float[Array, "B Y"]:
        x = features.astype(jnp.float32)
        if self.norm is not None:
            x = self.norm(x)
        return self.linear(x if self.hidden is None else jax.nn.gelu(self.hidden(x)))


class BatchNorm(nnx.Module):
    """Normalises features without scale or bias.

    Unlike `nnx.BatchNorm` it keeps the unbiased variance, as PyTorch does, and does not change itself: the running
    statistics are a parameter group that is never trained.
    """

    def __init__(self, dim: int):
        self.mean = nnx.Param(jnp.zeros((dim,), jnp.float32))
        self.var = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, features: Float[Array, "B D"], *, whole_batch: bool) -> Float[Array, "B D"]:
        """Normalises by the features' own statistics if they are a whole batch, else by the running ones."""
        x = features.astype(jnp.float32)
        mean, var = (x.mean(axis=0), x.var(axis=0)) if whole_batch else (self.mean[...], self.var[...])
        return (x - mean) * jax.lax.rsqrt(var + EPS)

    def updated(self, features: Float[Array, "B D"]) -> dict[str, Float[Array, "D"]]:
        """Returns the running statistics after a whole batch."""
        x = features.astype(jnp.float32)
        new = {"mean": x.mean(axis=0), "var": x.var(axis=0, ddof=1)}
        old = {"mean": self.mean[...], "var": self.var[...]}
        return {name: (1 - _MOMENTUM) * old[name] + _MOMENTUM * new[name] for name in new}
