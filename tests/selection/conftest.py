"""Signals made from logits by the definitions, the other way round from how any code here computes."""

from __future__ import annotations

import numpy as np
import pytest


def watched(logits, labels):
    """All signals of the vocabulary, in double precision, from logits (S, E, N, C) and labels (N,)."""
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    p = exp / exp.sum(-1, keepdims=True)
    onehot = np.eye(logits.shape[-1])[labels]
    p_label = (p * onehot).sum(-1)
    rival = np.where(onehot == 1, -np.inf, logits).max(-1)
    z_label = (logits * onehot).sum(-1)
    steps = np.abs(p[:, 1:] * np.log(p[:, 1:] / p[:, :-1])).sum(-1)
    run_in = (np.arange(len(labels)) + np.arange(4)[:, None]) % 2 == 0
    return {
        "labels": labels,
        "p_label": p_label,
        "p_other": np.where(onehot == 1, 0, p).max(-1),
        "error_norm": np.sqrt(((p - onehot) ** 2).sum(-1)),
        "loss": -np.log(p_label),
        "entropy": -(p * np.log(p)).sum(-1),
        "margin": z_label - rival,
        "correct": z_label > rival,
        "kl_step": np.concatenate([np.zeros_like(p_label[:, :1]), steps], axis=1),
        "embeddings": logits[0, -1],
        "errors": p[0, -1] - onehot,
        "run_in": run_in,
        "run_p_label": np.where(run_in, p_label[0, -1], p_label[0, -1] ** 2),
        "given": -p_label[0, -1],
    }


@pytest.fixture(scope="session")
def watch():
    """(logits, labels) -> arrays."""
    return watched


@pytest.fixture(scope="session")
def make_arrays():
    """(images, classes, seeds, epochs, seed) -> arrays of images that are learned more or less quickly."""

    def make(images=60, classes=4, seeds=2, epochs=7, seed=0):
        rng = np.random.default_rng(seed)
        labels = np.concatenate([np.arange(classes), rng.integers(0, classes, images - classes)])
        onehot = np.eye(classes)[labels]
        learned = rng.normal(2.5, 2, images)[:, None] * np.linspace(0.2, 1, epochs)[:, None, None] * onehot
        return watched(learned + rng.normal(size=(seeds, epochs, images, classes)), labels)

    return make


@pytest.fixture(scope="session")
def odd_one():
    """Arrays of 20 images of which all are learned at once, but row 7 as ``kind`` says."""

    def make(kind):
        labels = np.arange(20) % 4
        onehot = np.eye(4)[labels]
        # (S, E, N): how far the label's logit is above the others
        ahead = np.broadcast_to(np.linspace(6, 8, 6)[:, None], (2, 6, 20)).copy()
        if kind == "wavers":  # known, forgotten, known, forgotten, and in the end nearly even
            ahead[:, :, 7] = [1.5, -1.5, 1.5, -1.5, 1.5, -0.1]
        elif kind == "never learned":
            ahead[:, :, 7] = -5
        else:
            raise AssertionError(kind)
        return watched(ahead[..., None] * onehot, labels)

    return make
