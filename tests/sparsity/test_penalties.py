"""What each penalty does to a vector of gates, by closed form."""

import torch

from lotus.sparsity import penalties
from selection import methods

VALUES = torch.tensor([0.5, -0.5, 0.02, -0.02, 0.0, 1.0])


def sgd(lr):
    return lambda gradient: VALUES - lr * gradient


def test_proximal_is_the_soft_threshold_after_the_step():
    moved = penalties.proximal(VALUES, torch.zeros(6), sgd(0.1), 0.1, 1.0)
    torch.testing.assert_close(moved, torch.tensor([0.4, -0.4, 0.0, 0.0, 0.0, 0.9]))
    assert (moved[2:5] == 0).all()


def test_proximal_solves_its_minimisation():
    """softshrink is argmin_x (x - y)^2 / 2 + t |x|, checked on a grid."""
    grid = torch.linspace(-1.5, 1.5, 3001)
    moved = penalties.proximal(VALUES, torch.ones(6), sgd(0.1), 0.1, 2.0)
    y = VALUES - 0.1
    best = grid[((grid - y[:, None]) ** 2 / 2 + 0.2 * grid.abs()).argmin(1)]
    torch.testing.assert_close(moved, best, atol=1e-3, rtol=0)


def test_subgradient_is_the_gradient_of_l1_in_the_loss():
    values = VALUES.clone().requires_grad_()
    (3 * values.abs().sum() + 2 * values.sum()).backward()
    moved = penalties.subgradient(VALUES, torch.full((6,), 2.0), sgd(0.1), 0.1, 3.0)
    torch.testing.assert_close(moved, VALUES - 0.1 * values.grad)


def test_strength_may_differ_by_gate_and_zero_is_no_penalty():
    for name in methods.names(penalties):
        penalty = getattr(penalties, name)
        assert methods.reads(penalty) == ["values", "gradient", "descend", "lr", "strength"]
        gradient = torch.randn(6)
        assert torch.equal(penalty(VALUES, gradient, sgd(0.1), 0.1, 0.0), sgd(0.1)(gradient))
        each = penalty(VALUES, gradient, sgd(0.1), 0.1, torch.full((6,), 0.7))
        torch.testing.assert_close(each, penalty(VALUES, gradient, sgd(0.1), 0.1, 0.7))


def test_proximal_reaches_zero_and_subgradient_does_not():
    for name, zero in (("proximal", True), ("subgradient", False)):
        values = torch.full((4,), 0.9503)
        for _ in range(200):
            values = getattr(penalties, name)(values, torch.zeros(4), lambda g, v=values: v - 0.01 * g, 0.01, 1.0)
        assert bool((values == 0).all()) is zero
        assert values.abs().max() <= 0.011
