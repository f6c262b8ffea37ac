"""The unpruned model teaches the pruned one.

Legend: B batch, C classes, S side of an image in pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotus.config import Finetune
from lotus.training.guests import Guest, Seen, Turn
from selection.errors import Refused


class Distiller:
    """Blends what the labels ask for with what a teacher says.

    The teacher is taken over: put in eval mode, frozen, and moved to ``device`` and ``dtype``. It sees the very images
    that the student sees, mixed ones too, as in DeiT.
    """

    def __init__(
        self,
        teacher: nn.Module,
        mode: Literal["soft", "hard"],
        temperature: float,
        weight: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            mode: "soft" for the teacher's softened probabilities, "hard" for its decisions
            temperature: softening of both sides; not read by "hard"
            weight: fraction of the loss that is the teacher's, in [0, 1]
            device, dtype: the student's; None leaves the teacher's as they are
        """
        if mode not in ("soft", "hard"):
            raise Refused(f"finetune.distill: there is no {mode!r}. Here: none, soft, hard.")
        self.teacher = teacher.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.mode = mode
        self.temperature = temperature
        self.weight = weight
        self.dtype = next((p.dtype for p in teacher.parameters()), torch.float32)

    def losses(self, student_logits: Tensor, images: Tensor, base_losses: Tensor) -> Tensor:
        """(1 - weight) * base + weight * teacher's part, an image each.

        Args:
            student_logits: (B, C)
            images: (B, 3, S, S) as the student saw them
            base_losses: (B,) from the labels

        Returns:
            (B,) float32

        Raises:
            Refused: the teacher knows another number of classes.
        """
        if self.weight == 0:
            return base_losses
        with torch.no_grad():
            teacher_logits = self.teacher(images.to(self.dtype))  # (B, C)
        if teacher_logits.shape != student_logits.shape:
            raise Refused(
                f"finetune.distill: the teacher tells {teacher_logits.shape[-1]} classes apart and the student "
                f"{student_logits.shape[-1]}. Take a teacher trained on the same data."
            )
        if self.mode == "soft":
            taught = soft(student_logits, teacher_logits, self.temperature)
        else:
            taught = hard(student_logits, teacher_logits)
        return torch.lerp(base_losses.float(), taught, self.weight)


class Taught(Guest):
    """Lets a teacher have its fraction of each image's loss."""

    name = "teacher"
    turn = Turn.TEACH

    def __init__(self, distiller: Distiller) -> None:
        self._distiller = distiller

    def losses(self, losses: Tensor, seen: Seen) -> Tensor:
        return self._distiller.losses(seen.logits, seen.images, losses)


def soft(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher_T || student_T) -> (B,) float32 (Hinton et al., 1503.02531, section 2; DeiT, 2012.12877, eq. 2).

    T^2 keeps the gradient's size whatever T is, as the softened logits' gradients fall with 1 / T^2.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def hard(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy against the teacher's decision -> (B,) float32 (DeiT, 2012.12877, eq. 3)."""
    return F.cross_entropy(student_logits.float(), teacher_logits.argmax(-1), reduction="none")


def make_distiller(teacher: nn.Module, recipe: Finetune, device: torch.device | str) -> Distiller | None:
    """The teacher that ``recipe`` asks for, in the student's precision; None where it asks for none."""
    if recipe.distill == "none" or recipe.teacher_weight == 0:
        return None
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    return Distiller(teacher, recipe.distill, recipe.temperature, recipe.teacher_weight, device=device, dtype=dtype)
