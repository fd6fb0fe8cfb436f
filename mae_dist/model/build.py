"""Makes the module that a config describes, and splits modules into pure functions of their parameters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from mae_dist.model.autoencoder import MaskedAutoencoder
from mae_dist.model.classifier import Classifier
from mae_dist.model.hooks import PLAIN, Hooks
from mae_dist.task_kinds import kind_of

Params = dict[str, Any]


def param_count(params: Params) -> int:
    """Counts the values in a parameter tree (arrays or their shapes)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


class Functional(NamedTuple):
    """A module as functions of its parameters.

    abstract: the parameters' shapes, a nested dict.
    init: key -> parameters.
    bind: parameters -> the module to call.
    """

    abstract: Params
    init: Callable[[jax.Array], Params]
    bind: Callable[[Params], Any]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Splits the module that `make` would make, without allocating it."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)), nnx.Param)[1])

    return Functional(nnx.to_pure_dict(abstract), init, functools.partial(nnx.merge, graphdef))


def make_model(config: ConfigDict, num_classes: int, hooks: Hooks, rngs: nnx.Rngs) -> MaskedAutoencoder | Classifier:
    """Makes the module that `config` describes: a `MaskedAutoencoder`, or a `Classifier` for `num_classes`."""
    fields, options = config.model.to_dict(), config.classify
    if kind_of(config).has_decoder:
        return MaskedAutoencoder(**fields, hooks=hooks, rngs=rngs)
    return Classifier(
        fields,
        num_classes=num_classes,
        kind=options.head,
        hidden_dim=options.hidden_dim,
        pool=options.pool,
        norm_after_pool=options.norm_after_pool,
        batch_norm=options.batch_norm,
        hooks=hooks,
        rngs=rngs,
    )


def abstract_params(config: ConfigDict, num_classes: int) -> Params:
    """Returns the parameters' shapes of `config`'s model, by group."""
    return functional(functools.partial(make_model, config, num_classes, PLAIN)).abstract
