"""Another model teaches the one that is trained: the model before the cut, or any that knows the same classes.

Legend: B batch, C classes, S side of an image in pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotus.config import Taught as TaughtBy
from lotus.training.guests import Guest, Seen, Training, Turn
from lotus.training.precision import settled
from lotus.vit import cost
from lotus.vit.attention import unfuse
from selection.errors import Refused

Numbers = tuple[Sequence[float], Sequence[float]]
"""Mean and deviation of each channel that images are normalized by."""


class Shown(nn.Module):
    """A model that is shown images as it wants them, given as another one sees them."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, given: Numbers, own: Numbers, side: int | None = None) -> None:
        """
        Args:
            given: what the images are normalized by; a mix of two, or a fill, is in the same numbers
            own: what ``model`` wants them normalized by
            side: S of the square images that it reads; None for any
        """
        super().__init__()
        (mean, std), (own_mean, own_std) = (
            tuple(torch.tensor(list(numbers), dtype=torch.float64) for numbers in pair) for pair in (given, own)
        )
        self.model, self.side, self._same = model, side, given == own
        self.register_buffer("scale", (std / own_std).float().view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).float().view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C)."""
        if not self._same:
            images = images * self.scale + self.shift
        if self.side is not None and images.shape[-1] != self.side:
            # in fp32: in bf16 torch does not do it on a CPU
            images = F.interpolate(images.float(), self.side, mode="bilinear", antialias=True).to(images.dtype)
        return self.model(images)  # type: ignore[no-any-return]

    def macs(self, side: int) -> int:
        """Of an image of ``side`` pixels, as it is given."""
        return cost.macs(self.model, self.side or side, place="teacher")


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
        place: str = "finetune",
    ) -> None:
        """
        Args:
            mode: "soft" for the teacher's softened probabilities, "hard" for its decisions
            temperature: softening of both sides; not read by "hard"
            weight: fraction of the loss that is the teacher's, in [0, 1]
            device, dtype: the student's; None leaves the teacher's as they are
            place: of the recipe, as in "train"
        """
        if mode not in ("soft", "hard"):
            raise Refused(f"{place}.distill: there is no {mode!r}. Here: none, soft, hard.")
        self.teacher = teacher.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.mode = mode
        self.temperature = temperature
        self.weight = weight
        self.dtype = next((p.dtype for p in teacher.parameters()), torch.float32)
        self._place = place

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
                f"{self._place}.distill: the teacher tells {teacher_logits.shape[-1]} classes apart and the student "
                f"{student_logits.shape[-1]}. Take a teacher trained on the same data."
            )
        if self.mode == "soft":
            taught = soft(student_logits, teacher_logits, self.temperature)
        else:
            # DeiT, 2012.12877, eq. 3
            taught = F.cross_entropy(student_logits.float(), teacher_logits.argmax(-1), reduction="none")
        return torch.lerp(base_losses.float(), taught, self.weight)


Make = Callable[[nn.Module], Distiller]
"""Lets a model teach."""
_SPENT = "spent"
_TEACHER = "teacher/"


class Taught(Guest):
    """Lets a teacher have its fraction of each image's loss, and counts what its passes cost."""

    name = "teacher"
    turn = Turn.TEACH

    def __init__(self, distiller: Distiller | None) -> None:
        """
        Args:
            distiller: None: nobody teaches yet
        """
        self._distiller, self._spent = distiller, [0.0, 0.0]
        self._macs: dict[int, int] = {}
        self._ranks = 1

    def attach(self, training: Training) -> None:
        self._ranks = training.world.size

    def losses(self, losses: Tensor, seen: Seen) -> Tensor:
        if self._distiller is None:
            return losses
        images = len(losses) * self._ranks
        self._spent = [self._spent[0] + images, self._spent[1] + images * self._each(seen.images.shape[-1])]
        return self._distiller.losses(seen.logits, seen.images, losses)

    def bill(self) -> tuple[float, float]:
        return self._spent[0], self._spent[1]

    def state(self) -> dict[str, Tensor]:
        return {_SPENT: torch.tensor(self._spent, dtype=torch.float64)} if any(self._spent) else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._spent = state[_SPENT].tolist()

    def _each(self, side: int) -> int:
        """MACs of the teacher's pass over an image of so many pixels."""
        if side not in self._macs:
            teacher: Any = self._distiller.teacher  # type: ignore[union-attr]
            counted = teacher.macs if isinstance(teacher, Shown) else lambda side: cost.macs(teacher, side)
            self._macs[side] = int(counted(side))
        return self._macs[side]


class TaughtByUncut(Taught):
    """The model before the first cut of a training teaches what is left of it from then on."""

    def __init__(self, make: Make) -> None:
        super().__init__(None)
        self._make, self._uncut = make, nn.Module()

    def handed_over(self, old: nn.Module, new: nn.Module) -> None:
        if new is not old and self._distiller is None:
            self._distiller, self._uncut = self._make(old), old

    def rebuilt(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        weights = {name.removeprefix(_TEACHER): value for name, value in state.items() if name.startswith(_TEACHER)}
        if weights:
            uncut = copy.deepcopy(model)
            uncut.load_state_dict(weights)
            self._distiller, self._uncut = self._make(uncut), uncut
        return model

    def state(self) -> dict[str, Tensor]:
        if self._distiller is None:
            return super().state()
        weights = self._uncut.state_dict()  # frozen, so that nobody needs a copy
        kept = {f"{_TEACHER}{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
        return {_SPENT: torch.tensor(self._spent, dtype=torch.float64), **kept}


def soft(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher_T || student_T) -> (B,) float32 (Hinton et al., 1503.02531, section 2; DeiT, 2012.12877, eq. 2).

    T^2 keeps the gradient's size whatever T is, as the softened logits' gradients fall with 1 / T^2.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def make_distiller(
    teacher: nn.Module, recipe: TaughtBy, device: torch.device | str, *, place: str = "finetune"
) -> Distiller | None:
    """The teacher that ``recipe`` asks for, in the student's precision; None where it asks for none."""
    if recipe.taught_by is None or recipe.distill == "none":
        return None
    dtype = torch.bfloat16 if settled(recipe, teacher, device).precision == "bf16" else torch.float32
    if dtype == torch.bfloat16 and torch.device(device).type == "cpu":
        unfuse(teacher)
    return Distiller(
        teacher, recipe.distill, recipe.temperature, recipe.teacher_weight, device=device, dtype=dtype, place=place
    )
