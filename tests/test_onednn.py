"""Products by oneDNN: equal to those by XLA, called where they should be, and only where they are known to work."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from mae_dist.model import functional, onednn
from mae_dist.model.attention import attention
from tests import QUICK

CALL = "__onednn$matmul"


def per_device(fn: Any, backend: str = "onednn") -> Any:
    """`fn` as a device computes it for itself, with products by `backend`."""
    fn = onednn.using(backend, fn)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False), compiler_options=QUICK)


def product(x: Any) -> Any:
    return onednn.matmul(x, x, (False, False), onednn.in_use())


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
            got = per_device(lambda a, b: onednn.matmul(a, b, transposed, onednn.in_use()), backend)(given_a, given_b)
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.sqrt(k))


@needs_onednn
def test_called_only_per_device_and_for_float32():
    """An array that is split over devices is none that another library could see."""
    x = jnp.ones((4, 4))
    assert CALL in per_device(lambda x: product(x)).lower(x).as_text()
    assert CALL not in per_device(lambda x: product(x), "xla").lower(x).as_text()
    assert CALL not in jax.jit(onednn.using("onednn", lambda x: product(x))).lower(x).as_text()
    half = x.astype(jnp.bfloat16)
    assert CALL not in per_device(lambda x: product(x)).lower(half).as_text()


@needs_onednn
@pytest.mark.parametrize("first", onednn.BACKENDS)
def test_traces_are_not_mixed_up(first):
    """JAX knows a function that it traced before by its identity and shapes; not by what computes its products."""
    q, kernel = jnp.ones((2, 5, 3, 8)), jnp.ones((3, 8, 24))

    def loss(q: Any, kernel: Any) -> Any:
        affine: Any = functional.affine
        return affine(attention(q, q, q), kernel, None, 2).sum()

    gradient = jax.grad(loss, argnums=(0, 1))
    backends = (first, *(backend for backend in onednn.BACKENDS if backend != first))
    for fn, calls in ((loss, 3), (gradient, 8)):
        for backend in backends:
            text = per_device(fn, backend).lower(q, kernel).as_text()
            # Forward: two of attention, one affine; in the gradient four and two more, without the last one's value.
            assert text.count(CALL) == (calls if backend == "onednn" else 0)


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
    """A library without it raises where the one product is tried; products are XLA's then."""

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such call")

    monkeypatch.setattr(onednn, "_call", missing)
    x = jnp.ones((4, 4))
    assert CALL not in per_device(lambda x: product(x)).lower(x).as_text()


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
