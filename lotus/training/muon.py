"""Muon: momentum whose matrices are orthogonalized, and AdamW for everything else, under any ZeRO stage.

Keller Jordan's optimizer (kellerjordan.github.io/posts/muon), with the scale of 2502.16982 (section 2.2), so that its rates are
AdamW's. What is a matrix moves by the nearest semi-orthogonal matrix to its momentum; head, position embeddings, tokens,
norms and biases are AdamW's. A fused qkv is three matrices, and each is orthogonalized apart. The patch embedding is a matrix
like any other: its authors give the first layer to AdamW, and here that costs 3 to 5 points (docs/cheaper.md).

ZeRO 1 to 3 lay parameters end to end in vectors and give each rank a part. Momentum is number by number, so each rank
keeps that of its part; for the orthogonalization the parts are gathered, each rank takes a share of the matrices, and the
results are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lotus.training.distributed import World
from lotus.training.precision import faster_in_bf16
from selection.errors import Refused

QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""a, b, c of x -> a x + b x^3 + c x^5, one row an iteration (leloykun.github.io/ponder/muon-opt-coeffs). Singular values from
0.003 of the Frobenius norm up end between 0.97 and 1.15; smaller ones grow by a factor of 494 at most."""
_TINY = 1e-7  # least Frobenius norm that is divided by

Buffers = Callable[[str, tuple[int, ...]], Tensor]


class Matrix(NamedTuple):
    """What Muon knows of a parameter, however it lies in memory."""

    shape: tuple[int, int]
    """(out, in); of a convolution, in is channels times the kernel's area."""
    rows: tuple[int, ...]
    """Of the matrices that are orthogonalized apart; they sum to out."""
    lr_scale: float = 1.0
    """Layer decay."""


class Place(NamedTuple):
    """Where a parameter lies in the vectors of ZeRO."""

    flat: Tensor
    """(n,) this rank's part of the vector that holds it."""
    start: int
    """Where it begins: in all ranks' parts end to end (ZeRO 1 and 2), or, in shards, in each rank's (ZeRO 3)."""
    length: int
    """Numbers of it there: all of them, or those of one shard, the last of which is padded."""


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Name -> matrix of the weights that Muon moves: linear layers and convolutions without groups.

    Not the head, which is told by timm's name of it, and by ``head``.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    named = config.get("classifier") or ()
    outside = {"head", "head_dist", *((named,) if isinstance(named, str) else named)}
    found: dict[str, Matrix] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) > 1:
            continue
        if outside & {prefix, *prefix.split(".")} or any(prefix.startswith(f"{name}.") for name in outside):
            continue
        shape = (module.weight.shape[0], math.prod(module.weight.shape[1:]))
        rows = _rows(model, prefix, shape[0])
        if min(*rows, shape[1]) > 1:
            found[f"{prefix}.weight"] = Matrix(shape, rows)
    return found


def _rows(model: nn.Module, name: str, out: int) -> tuple[int, ...]:
    """Of q, k and v in a fused projection, whose heads' values may be of another width than their queries; else ``out``."""
    parent, _, last = name.rpartition(".")
    if last == "kv" and out % 2 == 0:
        return (out // 2, out // 2)
    proj = getattr(model.get_submodule(parent), "proj", None) if last == "qkv" else None
    values = proj.in_features if isinstance(proj, nn.Linear) else out // 3
    if last == "qkv" and 0 < values < out and (out - values) % 2 == 0:
        return ((out - values) // 2, (out - values) // 2, values)
    return (out,)


def make(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    *,
    lr: float,
    adamw_lr: float | None,
    place: str,
    fused: bool = True,
    half: bool = False,
) -> Muon:
    """Muon over ``groups``: what is a matrix and decays is Muon's, the rest stays in its group, which is AdamW's.

    Args:
        model: whose matrices are moved
        groups: timm's, with ``weight_decay``, which is zero or the same for all, and ``lr_scale``; used up
        lr: Muon's peak rate
        adamw_lr: AdamW's peak rate; None for ``lr``
        place: of the recipe, as in "train"
        fused: AdamW by torch's fused kernel
        half: the model computes in bf16

    Raises:
        Refused: a model without matrices.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    known = {id(named[name]): matrix for name, matrix in matrices(model).items()}
    mine: list[tuple[nn.Parameter, Matrix]] = []
    decay = max((group["weight_decay"] for group in groups), default=0.0)
    for group in groups:
        scale = group.get("lr_scale", 1.0)
        moved = [p for p in group["params"] if id(p) in known and group["weight_decay"] == decay]
        mine += [(p, known[id(p)]._replace(lr_scale=scale)) for p in moved]
        taken = {id(p) for p in moved}
        group["params"] = [p for p in group["params"] if id(p) not in taken]
        group["lr_scale"] = scale * (1.0 if adamw_lr is None else adamw_lr / lr)
    if not mine:
        raise Refused(
            f"{place}.optimizer: muon moves matrices, and {type(model).__name__} has none to train. Take adamw."
        )
    return Muon(mine, [group for group in groups if group["params"]], lr=lr, weight_decay=decay, fused=fused, half=half)


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the rest.

    The state of a matrix, or of a rank's part of many, is ``momentum_buffer``, which is linear in the gradients.

    Args:
        mine: parameters of two or more dimensions, and how each is read as a matrix
        others: AdamW's groups
        lr: peak rate of both; a group's ``lr_scale`` multiplies it
        weight_decay: decoupled, of the matrices
        momentum: Nesterov's
        fused: AdamW in one kernel
        half: matrices are orthogonalized in bf16 on a CPU that is faster in it, as they are on a GPU always; else in fp32
    """

    def __init__(
        self,
        mine: Sequence[tuple[nn.Parameter, Matrix]],
        others: Sequence[dict[str, Any]] = (),
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        fused: bool = True,
        half: bool = False,
    ) -> None:
        self._adamw = torch.optim.AdamW(list(others), lr=lr, weight_decay=0.0, fused=fused) if others else None
        first = {
            "params": [p for p, _ in mine], "matrices": tuple(matrix for _, matrix in mine), "momentum": momentum,
        }  # fmt: skip
        groups = [first, *(self._adamw.param_groups if self._adamw else ())]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self._step_supports_amp_scaling = self._adamw is None or fused  # it can be told to leave a step out
        self.found_inf: Tensor | None = None
        """() 1 for a step that is to be none, 0 for one that is one; None: each is."""
        self._mine, self._half = list(mine), half
        self._flat: dict[int, list[tuple[Matrix, Place]]] = {}
        self._in_shards = False
        self._world = World()
        self._memory: dict[tuple[Any, ...], Tensor] = {}

    def join(self, world: World, places: Mapping[int, Place], *, in_shards: bool) -> None:
        """Share the work with the other ranks from now on, which all have to step together.

        Args:
            world: the ranks
            places: id of a parameter -> where it lies, if ZeRO has laid the parameters into vectors; else empty
            in_shards: every rank has a shard of every parameter (ZeRO 3), and not a part of their sequence (ZeRO 1 and 2)
        """
        self._world, self._flat, self._in_shards = world, {}, in_shards
        for parameter, matrix in self._mine if places else ():
            place = places[id(parameter)]
            self._flat.setdefault(id(place.flat), []).append((matrix, place))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move everything that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "matrices" in group:
                self._move(group)
        others = [group for group in self.param_groups if "matrices" not in group and group["params"]]
        if others and self._adamw is not None:  # DeepSpeed steps group by group
            self._adamw.param_groups, self._adamw.state = others, self.state
            vars(self._adamw).update(grad_scale=None, found_inf=self.found_inf)
            self._adamw.step()
        return loss

    def _move(self, group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        moved = [(at, p) for at, p in enumerate(group["params"]) if p.grad is not None]
        if not moved:
            return
        parameters = [p for _, p in moved]
        grads, buffers = [p.grad for p in parameters], [self._momentum(p) for p in parameters]
        decay, blend = lr * group["weight_decay"], 1 - momentum
        if self.found_inf is not None:  # a step that is none: nothing decays, and nothing is added
            for grad in grads:
                grad.masked_fill_(self.found_inf > 0, 0.0)
            decay, blend = decay * (1 - self.found_inf), [blend * (1 - self.found_inf)] * len(grads)
        torch._foreach_lerp_(buffers, grads, blend)
        updates = [update.contiguous() for update in torch._foreach_lerp(grads, buffers, momentum)]
        if id(parameters[0]) in self._flat:
            for p, update in zip(parameters, updates, strict=True):
                for part, scale in self._parts(p):
                    part.mul_(1 - decay * scale)
                p.add_(self._if_moved(self._orthogonal_part(p, update)), alpha=-lr)
            return
        known = [group["matrices"][at] for at, _ in moved]
        torch._foreach_mul_(parameters, [1 - decay * matrix.lr_scale for matrix in known])
        torch._foreach_add_(parameters, [self._if_moved(one) for one in self._orthogonal(updates, known)], alpha=-lr)

    def _if_moved(self, update: Tensor) -> Tensor:
        return update if self.found_inf is None else update.mul_(1 - self.found_inf)

    def _orthogonal(self, updates: list[Tensor], known: Sequence[Matrix]) -> list[Tensor]:
        """The orthogonalized, scaled updates of all ranks, which share the work; the given ones are used up."""
        alone = self._world.size == 1
        if not alone:  # one message, not one a matrix
            whole = torch.cat([update.reshape(-1) for update in updates])
            parts = whole.split([update.numel() for update in updates])
            updates = [part.view_as(update) for part, update in zip(parts, updates, strict=True)]
        self._orthogonalize_([update.view(matrix.shape) for update, matrix in zip(updates, known, strict=True)], known)
        if not alone:
            self._world.sum_(whole)
        return updates

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    def _parts(self, flat: Tensor) -> Iterator[tuple[Tensor, float]]:
        """Of this rank's part of a vector the pieces of one learning rate each, and how it is scaled."""
        held = self._flat[id(flat)]
        if all(matrix.lr_scale == 1 for matrix, _ in held):
            yield flat, 1.0
            return
        first = 0 if self._in_shards else self._world.rank * flat.numel()
        for matrix, place in held:
            low, high = max(place.start - first, 0), min(place.start + place.length - first, flat.numel())
            if low < high:
                yield flat[low:high], matrix.lr_scale

    def _orthogonal_part(self, flat: Tensor, update: Tensor) -> Tensor:
        """This rank's part of the orthogonalized, scaled updates: (n,) of all ranks -> (n,)."""
        ranks = self._world.size
        whole = self._buffer("whole", (ranks * update.numel(),), update)
        if ranks > 1:
            dist.all_gather(list(whole.chunk(ranks)), update)
        else:
            whole.copy_(update)
        table = whole.view(ranks if self._in_shards else 1, -1)
        held = self._flat[id(flat)]
        views = [
            table[:, place.start : place.start + place.length].reshape(-1)[: math.prod(matrix.shape)].view(matrix.shape)
            for matrix, place in held
        ]
        self._orthogonalize_(views, [matrix for matrix, _ in held])
        if len(table) > 1:  # those views were copies
            for view, (_, place) in zip(views, held, strict=True):
                padded = F.pad(view.reshape(-1), (0, len(table) * place.length - view.numel()))
                table[:, place.start : place.start + place.length] = padded.view(len(table), -1)
        if ranks > 1:
            self._world.sum_(whole)
        return whole.chunk(ranks)[self._world.rank]

    def _orthogonalize_(self, updates: Sequence[Tensor], known: Sequence[Matrix]) -> None:
        """In place and scaled, this rank's share of the matrices; zeros for the others, so that ranks can be added up."""
        alike: dict[tuple[int, int], list[tuple[Tensor, float]]] = {}
        for update, matrix in zip(updates, known, strict=True):
            for piece in update.split(matrix.rows):
                wide = piece if piece.shape[0] <= piece.shape[1] else piece.mT
                scale = 0.2 * math.sqrt(wide.shape[1]) * matrix.lr_scale
                alike.setdefault((wide.shape[0], wide.shape[1]), []).append((wide, scale))
        for shape, members in alike.items():
            share = members[self._world.rank :: self._world.size]
            if share:
                like = share[0][0]
                half = like.is_cuda or (self._half and faster_in_bf16(like.device))
                dtype = torch.bfloat16 if half else torch.float32

                def buffer(name: str, size: tuple[int, ...], like: Tensor = like, dtype: torch.dtype = dtype) -> Tensor:
                    return self._buffer(name, size, like, dtype)

                batch = buffer("x", (len(share), *shape))
                torch._foreach_copy_(list(batch.unbind()), [wide for wide, _ in share])
                for one, (wide, scale) in zip(newton_schulz(batch, buffer), share, strict=True):
                    wide.copy_(one).mul_(scale)
            for at, (wide, _) in enumerate(members):
                if at % self._world.size != self._world.rank:
                    wide.zero_()

    def _buffer(self, name: str, size: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The same memory every step."""
        key = (name, size, like.device, dtype)
        if key not in self._memory:
            self._memory[key] = torch.empty(size, device=like.device, dtype=dtype or like.dtype)
        return self._memory[key]


def newton_schulz(x: Tensor, buffer: Buffers | None = None) -> Tensor:
    """Move the singular values of matrices toward 1 and leave their vectors: U S V^T -> about U V^T.

    In float32, a matrix at least twice as wide as it is high is iterated on by its Gram matrix, X X^T, which is smaller
    (tridao.me/blog/2026/gram-newton-schulz, without its restart, which half precision alone needs): 34 n^3 + 4 n^2 m
    operations in place of 10 n^3 + 20 n^2 m.

    Args:
        x: (K, n, m) with n <= m, used up
        buffer: gives memory of a name and a size; None for new

    Returns:
        (K, n, m), which lies in a buffer, or in ``x``
    """
    buffer = buffer or (lambda _, size: x.new_empty(size))
    count, rows, columns = x.shape
    x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp_(min=_TINY))
    small = (count, rows, rows)
    a_, b_, other = buffer("a", small), buffer("b", small), buffer("y", (count, rows, columns))
    if x.dtype == torch.float32 and columns >= 2 * rows:
        gram = torch.bmm(x, x.mT, out=a_)
        return torch.bmm(_polynomial(gram, b_, buffer), x, out=other)
    for a, b, c in QUINTIC:
        torch.bmm(x, x.mT, out=a_)
        torch.baddbmm(a_, a_, a_, beta=b, alpha=c, out=b_)
        torch.baddbmm(x, b_, x, beta=a, out=other)
        x, other = other, x
    return x


def _polynomial(gram: Tensor, z: Tensor, buffer: Buffers) -> Tensor:
    """(K, n, n) R = X X^T -> Q such that Q X is what the iterations make of X. All of these matrices commute."""
    size = (gram.shape[0], gram.shape[1], gram.shape[2])
    q, other, between = buffer("q", size), buffer("p", size), buffer("r", size)
    for number, (a, b, c) in enumerate(QUINTIC):
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=z)  # the iteration multiplies X by a I + Z
        if number == 0:
            q.copy_(z).diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            torch.baddbmm(q, z, q, beta=a, out=other)
            q, other = other, q
        if number + 1 < len(QUINTIC):
            torch.baddbmm(gram, z, gram, beta=a, out=between)
            torch.baddbmm(between, z, between, beta=a, out=gram)
    return q
