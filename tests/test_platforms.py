"""Which function is traced, by what the mesh says and by what a program is lowered for."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mae_dist.model.by_platform import by_platform


def choose(x):
    return by_platform(x, cpu=jnp.sin, cuda=jnp.tan, default=jnp.cos)


def mesh_of(platform):
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    return AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=device)


@pytest.mark.parametrize(("platform", "expected"), [("cpu", {"sin"}), ("tpu", {"cos"})])
def test_a_mesh_decides_while_tracing(platform, expected):
    """Of three functions one is traced, and nothing is left to be decided."""
    with jax.sharding.use_abstract_mesh(mesh_of(platform)):
        jaxpr = jax.make_jaxpr(choose)(jnp.ones(3))
    assert {str(equation.primitive) for equation in jaxpr.eqns} == expected


@pytest.mark.parametrize("mesh", [None, mesh_of("gpu")])
@pytest.mark.parametrize(("platform", "expected"), [("cpu", "sine"), ("cuda", "tan"), ("tpu", "cosine")])
def test_lowering_decides_elsewhere(mesh, platform, expected):
    """Without a mesh, and for GPUs, whose kind a device does not tell."""
    with jax.sharding.use_abstract_mesh(mesh or AbstractMesh((), ())):
        text = jax.jit(choose).trace(jnp.ones(3)).lower(lowering_platforms=(platform,)).as_text()
    assert [name for name in ("sine", "tan", "cosine") if f".{name} " in text] == [expected]
