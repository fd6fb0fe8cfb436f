"""Label-free figures of features."""

import logging

import numpy as np
import pytest

from mae_dist.evaluation.health import health

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("count", [500, 20])
def test_the_rank_is_that_of_the_singular_values(count: int, caplog: pytest.LogCaptureFixture) -> None:
    """Against NumPy's decomposition; orthogonal features of one length have full rank."""
    features = (RNG.standard_normal((count, 32)) @ RNG.standard_normal((32, 32))).astype(np.float32)
    singular = np.linalg.svd(features, compute_uv=False)
    p = singular / singular.sum()
    found = health(features)
    assert found["rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert found["feature_std"] == pytest.approx(features.std(axis=0).mean(), rel=1e-5)
    assert found["dead_share"] == 0
    assert health(np.eye(32, dtype=np.float32))["rank"] == pytest.approx(32)
    assert not caplog.records


def test_a_collapsed_encoder_is_flagged(caplog: pytest.LogCaptureFixture) -> None:
    """All images alike, or nearly all dimensions constant; half of them alone is no collapse."""
    half = np.concatenate([RNG.standard_normal((50, 16)), np.ones((50, 16))], axis=1)
    with caplog.at_level(logging.WARNING):
        assert health(half)["dead_share"] == 0.5
        assert not caplog.records
        one = np.broadcast_to(RNG.standard_normal(32), (50, 32)) + 1e-4 * RNG.standard_normal((50, 32))
        assert health(one) == pytest.approx({"rank": 1.0, "feature_std": 1e-4, "dead_share": 1.0}, rel=0.1)
        assert "THE ENCODER HAS COLLAPSED" in caplog.text
        assert health(np.zeros((5, 8)))["dead_share"] == 1.0
