"""Products by oneDNN: equal to those by XLA, called where they should be, and only where they are known to work."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_dist import platforms
from mae_dist.cpu import kernels, onednn
from mae_dist.parallel.mesh import make_mesh
from tests import QUICK
from tests.runs import smoke_config

CALL = "__onednn$matmul"


@pytest.fixture
def unknown():
    """Whether there is one is found out anew, before and after."""
    onednn.has_onednn.cache_clear()
    yield
    onednn.has_onednn.cache_clear()


needs_onednn = pytest.mark.skipif(not onednn.has_onednn(), reason="another architecture, system or version of jaxlib")


@given(
    sizes=st.tuples(*(st.integers(1, 70),) * 3),
    batch=st.sampled_from([(), (3,), (2, 3)]),
    transposed=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=30, deadline=None)
def test_equals_numpy(sizes, batch, transposed):
    """Any sizes, batches and transpositions, by whatever computes them here."""
    m, k, n = sizes
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(*batch, *shape)).astype(np.float32) for shape in ((m, k), (k, n)))
    wanted = a.astype(np.float64) @ b
    given_a, given_b = (x.swapaxes(-1, -2) if t else x for x, t in zip((a, b), transposed, strict=True))
    for backend in onednn.BACKENDS:
        if backend == "xla" or onednn.has_onednn():
            matmul = functools.partial(onednn.matmul, transposed=transposed, by_onednn=backend == "onednn")
            got = jax.jit(matmul, compiler_options=QUICK)(given_a, given_b)
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.sqrt(k))


@needs_onednn
@pytest.mark.parametrize(("dtype", "calls"), [(jnp.float32, (3, 8)), (jnp.bfloat16, (0, 0))])
def test_called_for_float32(dtype, calls):
    """Two matmuls of attention and one affine; in the gradient four and two more, without the last one's value."""
    q, kernel = jnp.ones((2, 5, 3, 8), dtype), jnp.ones((3, 8, 24), dtype)

    def loss(q: Any, kernel: Any, by_onednn: bool) -> Any:
        hooks = kernels.make_hooks(by_onednn)
        return hooks.affine(hooks.attention(q, q, q), kernel, None, 2).astype(jnp.float32).sum()

    for fn, count in zip((loss, jax.grad(loss, argnums=(0, 1))), calls, strict=True):
        for by_onednn in (True, False):
            text = jax.jit(fn, static_argnums=2).lower(q, kernel, by_onednn).as_text()
            assert text.count(CALL) == (count if by_onednn else 0)


def test_only_where_each_device_computes_its_own_examples():
    """An array that is split over devices is none that another library could see."""
    config = smoke_config(cpu__products="onednn")
    for mesh, by_onednn in (({"data": 8, "fsdp": 1, "tensor": 1}, True), ({"data": 4, "fsdp": 2, "tensor": 1}, False)):
        chosen = platforms.choose_matmul(config, make_mesh(mesh, jax.devices()), 1e12)
        assert chosen == ("onednn" if by_onednn and onednn.has_onednn() else "xla")


@pytest.mark.parametrize("what", ["version", "system", "machine"])
def test_not_where_it_is_unknown(monkeypatch, unknown, what):
    """A version of jaxlib that does not know the call's fields would abort, so nothing is tried there."""
    monkeypatch.setattr(onednn, "_call", lambda *args: pytest.fail("it was called"))
    if what == "version":
        monkeypatch.setattr(jaxlib.version, "__version__", "0.99.1")
    else:
        monkeypatch.setattr(
            *(
                (onednn.sys, "platform", "darwin")
                if what == "system"
                else (onednn.platform, "machine", lambda: "aarch64")
            )
        )
    assert not onednn.has_onednn()
    assert onednn.choose(1e12) == "xla"


def test_a_fault_is_no_crash(monkeypatch, unknown):
    """A library without it raises where the one matmul is tried; matmuls are XLA's then."""

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such call")

    monkeypatch.setattr(onednn, "_call", missing)
    assert not onednn.has_onednn()


@pytest.mark.parametrize(
    ("flags", "faster"),
    [
        ("fpu avx2 avx512f", (False, True, True)),
        ("fpu avx2", (False, False, True)),
        ("fpu", 3 * (False,)),
        (None, 3 * (False,)),
    ],
)
def test_chosen_where_it_is_faster(monkeypatch, tmp_path, flags, faster):
    """For updates as large as those of cifar_small (a start that finds its programs compiled is worth more there),
    cifar_medium and cifar_vit_tiny."""
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(onednn, "_CPUINFO", cpuinfo)
    for flops_per_image, by_onednn in zip((6e7, 3e8, 6e9), faster, strict=True):
        assert onednn.choose(flops_per_image) == ("onednn" if by_onednn and onednn.has_onednn() else "xla")
