"""What each penalty does to a vector of gates, by closed form."""

import functools
import types

import pytest
import torch

from lotus.config import Method
from lotus.sparsity import penalties
from lotus.sparsity.gates import pressing, reaches_zero
from selection import methods
from selection.errors import Refused

VALUES = torch.tensor([0.5, -0.5, 0.02, -0.02, 0.0, 1.0])


def sgd(lr):
    return lambda gradient: VALUES - lr * gradient


def test_proximal_is_the_soft_threshold_after_the_step():
    moved = penalties.proximal(VALUES, torch.zeros(6), sgd(0.1), 0.1, 1.0)
    torch.testing.assert_close(moved, torch.tensor([0.4, -0.4, 0.0, 0.0, 0.0, 0.9]))
    assert (moved[2:5] == 0).all()


def test_proximal_solves_its_minimization():
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
            values = getattr(penalties, name)(
                values, torch.zeros(4), functools.partial(torch.sub, values, alpha=0.01), 0.01, 1.0
            )
        assert bool((values == 0).all()) is zero
        assert values.abs().max() <= 0.011


@pytest.mark.parametrize("name", methods.names(penalties))
def test_whether_it_reaches_zero_is_what_the_gates_find_out(name):
    """By hand: gates that nothing but the penalty moves, for long."""
    press = pressing(Method(name=name))
    values = torch.full((4,), 0.9503)
    for _ in range(200):

        def descend(gradient: torch.Tensor, before: torch.Tensor = values) -> torch.Tensor:
            return before - 0.01 * gradient

        values = press(values, torch.zeros(4), descend, 0.01, 1.0)
    assert reaches_zero(press) is bool((values == 0).all())


def test_one_of_ones_own_is_found_and_what_is_none_is_refused():
    mine = types.ModuleType("mine")
    exec(
        "def clipped(gradient, descend, *, floor: float = 0.5):\n    return descend(gradient).clamp(min=floor)\n\n"
        "def nothing(values):\n    return None\n",
        vars(mine),
    )
    press = pressing(Method(name="clipped", floor=0.7), [mine])
    moved = press(VALUES, torch.zeros(6), sgd(0.1), 0.1, 1.0)
    torch.testing.assert_close(moved, VALUES.clamp(min=0.7))
    for settings, says in (
        ({"name": "proximl"}, r"train\.sparsity\.penalty: there is no 'proximl'.*'proximal'"),
        ({"name": "clipped", "flor": 1}, r"train\.sparsity\.penalty\.flor.*floor"),
        ({"name": "nothing"}, r"train\.sparsity\.penalty: 'nothing' gives no gates"),
    ):
        with pytest.raises(Refused, match=says):
            pressing(Method(**settings), [mine])
