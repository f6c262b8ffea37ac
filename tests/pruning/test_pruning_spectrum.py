"""DVBP with OB2C (2608.17657) against its algorithms 3 to 5, written anew with scipy and plain inverses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, optimize
from tiny_vits import batches, tiny

import lotus.pruning
from lotus.config import as_request
from lotus.pruning import criteria, spectrum
from lotus.pruning.compensate import Moments, fold
from lotus.vit import cost


def by_quadrature(ratio: float) -> float:
    """Equation 16, of the density of equation 13 and as much of its mass as is not at 0."""
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2

    def density(t: float) -> float:
        return float(np.sqrt(max((high - t) * (t - low), 0)) / (2 * np.pi * ratio * t))

    whole = integrate.quad(density, low, high, limit=200)[0]
    assert whole == pytest.approx(min(1, 1 / ratio), rel=1e-4)
    return float(
        optimize.brentq(lambda x: integrate.quad(density, low, x, limit=200)[0] - whole / 2, low + 1e-9, high - 1e-9)
    )


@pytest.mark.parametrize("ratio", [0.02, 0.375, 0.9, 1.5, 3.0])
def test_the_median_of_noise(ratio: float) -> None:
    assert spectrum.median_of_noise(ratio) == pytest.approx(by_quadrature(ratio), rel=1e-4)


def test_chance_alone_is_all_noise_and_a_signal_stays() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4000, 60))
    assert np.trace(spectrum.denoised(np.cov(noise.T, bias=True), 4000)) < 0.1 * 60  # an eigenvalue may be at the edge
    strong = np.outer(rng.normal(size=4000) * 5, np.r_[np.ones(6), np.zeros(54)])
    found = np.diag(spectrum.denoised(np.cov((noise + strong).T, bias=True), 4000))
    assert (found[:6] > 20).all()
    assert (found[6:] < 1).all()
    assert not spectrum.denoised(np.zeros((3, 3)), 10).any()


def published(covariance: np.ndarray, images: int, p: float, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """Hybrid scores, and the inverse that the weights are updated by: algorithm 3."""
    values, vectors = np.linalg.eig(covariance)
    ratio = len(covariance) / images
    sigma = np.sqrt(np.median(values) / by_quadrature(ratio))
    keep = values > sigma**2 * (1 + np.sqrt(ratio)) ** 2
    clean = sum(value * np.outer(v, v) for value, v, stays in zip(values, vectors.T, keep, strict=True) if stays)
    scores = (1 - p) * np.diag(covariance) + p * np.diag(clean)
    return scores, np.linalg.inv(clean + delta * np.trace(clean) / len(clean) * np.eye(len(clean)))


def test_scores_and_weights_are_those_of_the_algorithm() -> None:
    rng = np.random.default_rng(1)
    drawn = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 24)) + 0.3 * rng.normal(size=(300, 24)) + 2
    moments = Moments()
    moments.add(torch.from_numpy(drawn))
    covariance = moments.covariance.numpy()
    scores, inverse = published(covariance, 300, 0.4, 1e-4)
    ours = criteria.denoised_variance(covariance, np.ones(24), 300, ratio=0.4, weighted=False)
    np.testing.assert_allclose(ours, scores, rtol=1e-6)

    gone = np.sort(np.argsort(scores)[:10])
    kept = np.setdiff1d(np.arange(24), gone)
    weight, bias = rng.normal(size=(5, 24)), rng.normal(size=5)
    change = -weight[:, gone] @ np.linalg.inv(inverse[np.ix_(gone, gone)]) @ inverse[gone]  # algorithm 5
    small, shifted = fold(torch.from_numpy(weight), torch.from_numpy(bias), kept.tolist(), moments, "denoised")
    np.testing.assert_allclose((weight + change)[:, gone], 0, atol=1e-8)
    np.testing.assert_allclose(small.numpy(), (weight + change)[:, kept], rtol=1e-4, atol=1e-6)
    assert shifted is not None
    np.testing.assert_allclose(shifted.numpy(), bias - change @ drawn.mean(0), rtol=1e-4, atol=1e-6)


def test_the_least_of_all_mlp_units_go_and_attention_stays() -> None:
    """The preset as configs/papers/dvbp.yaml has it: one ranking of all MLPs."""
    model = tiny("vit")
    settings = {
        "criterion": {"name": "denoised_variance", "ratio": 0.5, "weighted": False}, "compensate": "denoised",
        "rotate": False, "embed_dim": None, "exclude": ["*.attn"], "round": 1,
    }  # fmt: skip
    studied = lotus.pruning.study(model, batches(), as_request(settings))
    block = studied.draw(as_request({**settings, "keep": {"macs": 1.0}})).plan.blocks[0].of
    tokens, dim = 17, 48
    units = 2 * block.hidden
    share = (units // 2) * 2 * tokens * dim / cost.outline(studied.model).cost().macs
    drawn = studied.draw(as_request({**settings, "keep": {"macs": 1 - share + 1e-9}}))
    stay = [set(one.units) for one in drawn.plan.blocks]
    scores = np.concatenate([studied.scores[f"blocks.{row}.mlp"] for row in range(2)])
    lowest = set(np.argsort(scores, kind="stable")[: units // 2].tolist())
    found = {row * block.hidden + unit for row in range(2) for unit in range(block.hidden) if unit not in stay[row]}
    assert len(found) == units // 2
    assert found == lowest
    assert all((one.dims.heads, one.dims.qk_dim, one.dims.v_dim) == tuple(block[:3]) for one in drawn.plan.blocks)
