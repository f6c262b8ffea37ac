"""Distillation against closed forms."""

import pytest
import torch
from torch import nn

from lotus.config import Finetune
from lotus.training import distill
from lotus.training.distill import Distiller, Shown
from selection.errors import Refused


class Fixed(nn.Module):
    """A teacher that says what it was told, whatever it sees."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.drop = nn.Dropout(0.9)
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return self.drop(self.logits)


STUDENT = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
TEACHER = torch.tensor([[0.2, 1.5, -0.5], [2.0, 0.0, 1.0]])
IMAGES = torch.zeros(2, 3, 4, 4)
BASE = torch.tensor([0.7, 1.9])


def test_soft_is_temperature_squared_times_kl():
    for heat in (1.0, 2.0, 5.0):
        p, q = (TEACHER / heat).softmax(1), (STUDENT / heat).softmax(1)
        expected = heat**2 * (p * (p.log() - q.log())).sum(1)
        torch.testing.assert_close(distill.soft(STUDENT, TEACHER, heat), expected)
        blended = Distiller(Fixed(TEACHER), "soft", heat, 0.7).losses(STUDENT, IMAGES, BASE)
        torch.testing.assert_close(blended, 0.3 * BASE + 0.7 * expected)


def test_soft_gradient_is_the_difference_of_softmaxes():
    """T^2 KL has the gradient T (q - p) in the student's logits."""
    student = STUDENT.clone().requires_grad_()
    distill.soft(student, TEACHER, 3.0).sum().backward()
    torch.testing.assert_close(student.grad, 3 * ((STUDENT / 3).softmax(1) - (TEACHER / 3).softmax(1)))


def test_soft_of_equals_is_zero_and_shift_invariant():
    assert distill.soft(STUDENT, STUDENT + 5, 2.0).abs().max() < 1e-6
    assert (distill.soft(STUDENT, TEACHER, 2.0) > 0).all()


def test_hard_is_the_loss_of_the_teachers_decision():
    expected = -STUDENT.log_softmax(1)[torch.arange(2), torch.tensor([1, 0])]
    blended = Distiller(Fixed(TEACHER), "hard", 2.0, 0.5).losses(STUDENT, IMAGES, BASE)
    torch.testing.assert_close(blended, 0.5 * BASE + 0.5 * expected)


def test_the_teacher_is_frozen_still_and_in_the_students_precision():
    teacher = Fixed(TEACHER).train()
    student = STUDENT.clone().requires_grad_()
    losses = Distiller(teacher, "soft", 2.0, 1.0, dtype=torch.bfloat16).losses(student.bfloat16(), IMAGES, BASE)
    losses.sum().backward()
    assert not teacher.training
    assert not teacher.logits.requires_grad
    assert teacher.logits.grad is None
    assert teacher.seen[0].dtype == torch.bfloat16
    assert losses.dtype == torch.float32
    assert student.grad is not None


def test_weight_zero_asks_no_teacher():
    teacher = Fixed(TEACHER)
    assert Distiller(teacher, "soft", 2.0, 0.0).losses(STUDENT, IMAGES, BASE) is BASE
    assert not teacher.seen
    assert distill.make_distiller(teacher, Finetune(distill="none"), "cpu") is None
    assert distill.make_distiller(teacher, Finetune(distill="hard"), "cpu").mode == "hard"


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(Refused, match=r"teacher tells 3 classes.*student 2"):
        Distiller(Fixed(TEACHER), "soft", 2.0, 0.5).losses(STUDENT[:, :2], IMAGES, BASE)


def test_a_teacher_sees_images_normalized_and_sized_as_it_wants_them():
    """The oracle begins with the pixels: normalized for the teacher directly, and resized by torch after that."""
    pixels = torch.rand(2, 3, 12, 12)
    given, own = (([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])), ([0.5, 0.45, 0.4], [0.2, 0.25, 0.3])

    def normalized(numbers):
        mean, std = (torch.tensor(one).view(3, 1, 1) for one in numbers)
        return (pixels - mean) / std

    class Whole(torch.nn.Module):
        def forward(self, images):
            return images

    torch.testing.assert_close(Shown(Whole(), given, own)(normalized(given)), normalized(own))
    smaller = torch.nn.functional.interpolate(normalized(own), 8, mode="bilinear", antialias=True)
    torch.testing.assert_close(Shown(Whole(), given, own, 8)(normalized(given)), smaller)
    same = normalized(given)
    assert Shown(Whole(), given, given, 12)(same) is same
    mixed = torch.lerp(same[0], same[1], 0.3)[None]  # as mixup does
    one = Shown(Whole(), given, own)
    torch.testing.assert_close(one(mixed)[0], torch.lerp(one(same)[0], one(same)[1], 0.3))


@pytest.mark.parametrize("side", [None, 2], ids=["own", "resized"])
def test_the_same_images_are_shown_in_half_precision(side):
    given, own = ([0.5] * 3, [0.5] * 3), ([0.4] * 3, [0.2] * 3)
    teacher = Fixed(TEACHER)
    Distiller(Shown(teacher, given, own, side), "soft", 2.0, 1.0, dtype=torch.bfloat16).losses(
        STUDENT.bfloat16(), IMAGES, BASE
    )
    assert teacher.seen[0].dtype == torch.bfloat16
    assert teacher.seen[0].shape[-1] == (side or 4)
