"""Fewer tokens inside a ViT: patches that do not enter, that leave on the way, or that are merged.

Tokens of EVA's kin and BEiT may leave before the first block alone: each takes its rotary angles, or the relative positions to
the others, along. The model stays timm's: its names, its weights and its ``state_dict`` are what they were. Patches are dropped where ``patch_drop``
stands (after the position embedding) or between a block's attention and its MLP, by hooks and by a ``forward`` on the
blocks' instances, all of which :meth:`Tokens.remove` takes off. What attention says is read from the output of ``qkv``,
one row of the matrix, so that fused attention stays on. Every image of a batch keeps equally many patches.

Shapes: B batch, P prefix tokens (class, distillation, registers; they always stay), n patches, K kept ones, N = P + n,
D width, H heads, Q query/key dimensions a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lotus.config import Patches
from lotus.vit import anatomy, attention, cost
from lotus.vit.anatomy import Dims
from lotus.vit.token_ops import evit, keep_bias, keep_rows, match, merge, received, top, top_by_chance
from lotus.vit.token_plan import Passed, keep_at, kept, passed, places, shares
from selection.errors import Refused


def _process(block: Any, x: Tensor) -> Tensor:
    """The MLP's half of timm's own block."""
    norm_after = type(block).__name__ == "ResPostBlock"
    processed = block.mlp(x if norm_after else block.norm2(x))
    found: Tensor = x + block.drop_path2(block.norm2(processed) if norm_after else block.ls2(processed))
    return found


def _refuse_unfit(model: Any, mode: str, place: str) -> None:
    """Refuse a model whose tokens cannot leave in this mode, that drops patches by itself, or lost what ``mode`` works between."""
    if anatomy.family(model) not in ("Eva", "Beit"):
        anatomy.plain(model, place)
    elif mode not in ("input", "dropout"):
        raise Refused(
            f"{place}.mode: {mode} is for timm's plain ViTs, and this model is {type(model).__name__}. Take "
            "input or dropout, by which tokens leave before the first block."
        )
    if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
        raise Refused(
            f"{place}: the model drops patches by itself, by its argument patch_drop_rate. Set one of the two."
        )
    halved = [block.name for block in anatomy.blocks(model) if not (block.has_attn and block.has_mlp)]
    if halved and mode in ("evit", "tome", "cumulative"):
        raise Refused(
            f"{place}.mode: {mode} works between attention and MLP, and {halved[0]} lost one of them. "
            "Take input or dropout, or none."
        )


class Tokens:
    """Puts a model on fewer tokens, until :meth:`remove`; a context manager.

    In training mode always; in evaluation mode with ``evaluate: sparse``, by the final keep.

    Attributes:
        keep: what stays in training now; :meth:`schedule` moves it
        shares: of a joint budget: what an image of each bucket keeps; empty without
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Patches,
        score: Callable[[Tensor, tuple[int, int]], Tensor] | None = None,
        *,
        place: str = "train.patches",
    ) -> None:
        """
        Args:
            score: mode input: (B, 3, S, S) images and the patch's (height, width) -> (B, n), higher = keep first. None
                where :meth:`choose` will be told for each batch.
            place: where the settings stand

        Raises:
            Refused: a model that is not supported or drops patches by itself; a place or a keep that does not fit it.
        """
        self.settings, self.keep, self._score, self._place = settings, settings.keep, score, place
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._model: Any = None
        self.put_on(model)

    def put_on(self, model: nn.Module) -> None:
        """Put ``model`` on fewer tokens, in place of the one before; nothing to do where it is already.

        Raises:
            Refused: as for the first one.
        """
        if model is self._model and self._handles:
            return
        if self._handles:
            self.remove()
        settings, vit = self.settings, model  # type: Any, Any
        self._model = vit
        self._blocks = anatomy.blocks(model)
        _refuse_unfit(vit, settings.mode, self._place)
        self._outline = cost.outline(model)
        self._prefix = int(vit.num_prefix_tokens)
        self._rows: Tensor | None = None  # (B, K) patches that entered, where positions are told in each block
        self._count = self._outline.tokens - self._prefix
        self._scores: Tensor | None = None  # (B, n) of the batch under way
        self._qkv: Tensor | None = None
        self._sizes: Tensor | None = None  # (B, n) patches that each token stands for; None: one each
        self._received: Tensor | None = None  # (B, n) attention that each patch had so far, in cumulative mode
        self._passed = functools.lru_cache(64)(
            functools.partial(passed, self._count, len(self._blocks), settings, place=self._place)
        )
        self._now = self._passed(settings.keep).patches  # refuses here what would fail at the first step
        self.shares: list[float] = []
        if settings.joint is not None:
            self.shares = shares(self._count, settings)
            for share in self.shares:
                self._passed(share)
        if settings.keep < 1 and all(seen == (self._count,) * 2 for seen in self._now):
            raise Refused(
                f"{self._place}.keep: {settings.keep:g} of {self._count} patches keeps them all, rounded up"
                f"{' and with the fused token' if settings.mode == 'evit' and settings.fuse else ''}. Keep less."
            )
        self._places = places(settings, len(self._blocks), self._place) if settings.mode == "evit" else ()
        self._mean = vit.global_pool == "avg" and getattr(vit, "attn_pool", None) is None
        self._handles = self._attach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.remove()

    @property
    def patches(self) -> int:
        """n, of the whole image."""
        return self._count

    @property
    def side(self) -> int:
        """Of the images, in pixels."""
        return int(self._model.patch_embed.img_size[0])

    def schedule(self, progress: float, keep: float | None = None) -> None:
        """Set :attr:`keep` to what it is when ``progress`` (0 to 1) of the training is done.

        Args:
            keep: what stays in the end of the images that come next; None: what the settings say
        """
        self.keep = keep_at(self.settings, progress, keep)

    def choose(self, scores: Tensor) -> None:
        """Mode input: what the patches of the next forward pass score, (B, n); higher = keep first."""
        self._scores = scores

    def passed(self, *, training: bool = True) -> Passed:
        """What a forward pass goes through now."""
        return self._passed(self._keep_in(training))

    def macs(self, *, training: bool = True, dims: Sequence[Dims] | None = None) -> int:
        """Multiply-accumulates of one image's forward pass now, choosing and merging included.

        Args:
            training: as in a training step; else as in evaluation
            dims: widths of the blocks, where they are to be others than the model's
        """
        seen, dims = self.passed(training=training), self._outline.dims if dims is None else dims
        prefix, width = self._prefix, self._outline.width
        spent = self._outline.cost(dims, [(prefix + a, prefix + b) for a, b in seen.patches]).macs
        for (before, after), block in zip(seen.patches, dims, strict=True):
            if self.settings.mode == "evit" and after < before:
                spent += block.heads * block.qk_dim * (prefix + before)  # the class token's row
                spent += before * width if self.settings.fuse else 0
            if self.settings.mode == "tome" and after < before:
                spent += (before // 2) * (before - before // 2) * block.qk_dim  # similarities
        return spent

    def share(self, *, training: bool = True) -> float:
        """Tokens beside the prefix that the average block's MLP sees, as a fraction of the patches."""
        seen = [after for _, after in self.passed(training=training).patches]
        return sum(seen) / (self._count * len(seen))

    def remove(self) -> None:
        """Take all of it off the model."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            block.module.__dict__.pop("forward", None)
            if block.has_attn:
                block.attn.__dict__.pop("_get_rel_pos_bias", None)
        self._handles = []
        self._rows = self._scores = self._qkv = self._sizes = self._received = None

    # ----------------------------------------------------------------------------------------------- in the forward

    def _attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        mode, model = self.settings.mode, self._model
        if mode in ("input", "dropout"):
            door = {"Eva": "norm_pre", "Beit": "pos_drop"}.get(anatomy.family(model), "patch_drop")
            handles = [getattr(model, door).register_forward_hook(self._enter)]
            if self._score is not None:
                handles.append(model.patch_embed.register_forward_pre_hook(self._look))
            for block in self._blocks:
                if block.rotary:
                    handles.append(block.module.register_forward_pre_hook(self._turn, with_kwargs=True))
                if block.table is not None:
                    whole = block.attn._get_rel_pos_bias
                    block.attn._get_rel_pos_bias = functools.partial(self._bias, whole)
            return handles
        handles = [model.patch_drop.register_forward_hook(self._begin)]
        for number, block in enumerate(self._blocks):
            if mode == "evit" and number not in self._places:
                continue
            block.module.forward = functools.partial(self._block, number)
            if mode == "cumulative":
                continue  # reads the whole matrix, not qkv
            handles.append(block.qkv.register_forward_hook(self._saw_qkv))
        if mode == "tome" and self._mean:
            handles.append(model.norm.register_forward_hook(self._weigh))
        return handles

    def _keep_in(self, training: bool) -> float:
        if training:
            return self.keep
        return self.settings.keep if self.settings.evaluate == "sparse" else 1.0

    def _look(self, embed: nn.Module, inputs: tuple[Tensor]) -> None:
        assert self._score is not None
        if self._scores is None and self._keep_in(self._model.training) < 1:
            patch: Any = embed.patch_size
            with torch.no_grad():
                self._scores = self._score(inputs[0], tuple(patch))

    def _enter(self, module: nn.Module, inputs: tuple[Tensor], x: Tensor) -> Tensor | None:
        """Keep what enters the model."""
        scores, self._scores, self._rows = self._scores, None, None
        keep = self._keep_in(self._model.training)
        if keep >= 1:
            return None
        count = kept(self._count, keep)
        if self.settings.mode == "dropout":
            scores = torch.rand(len(x), self._count, device=x.device)  # seeded with all other dropout, step by step
            self._rows = top(scores, count)
            return keep_rows(x, self._rows, self._prefix)
        if scores is None:
            raise RuntimeError("nobody said which patches are to be kept: call choose before the forward pass")
        # Ties fall as dropout does while training; a model that is measured twice is measured alike.
        ties = None if self._model.training else torch.Generator(scores.device).manual_seed(0)
        self._rows = top_by_chance(scores, count, ties)
        return keep_rows(x, self._rows, self._prefix)

    def _turn(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Rotary positions: a patch that entered keeps the angles of its place, (n, 2 Q) -> (B, 1, K, 2 Q)."""
        if self._rows is None:
            return args, kwargs
        return args, {**kwargs, "rope": kwargs["rope"][self._rows][:, None]}

    def _bias(self, whole: Callable[[], Tensor]) -> Tensor:
        """Relative positions: pairs that entered keep the bias of their distance."""
        return whole() if self._rows is None else keep_bias(whole(), self._rows, self._prefix)

    def _begin(self, module: nn.Module, inputs: tuple[Tensor], x: Tensor) -> None:
        self._sizes = self._received = None
        self._now = self.passed(training=self._model.training).patches

    def _saw_qkv(self, module: nn.Module, inputs: tuple[Tensor], qkv: Tensor) -> None:
        self._qkv = qkv

    @torch.compiler.disable(recursive=False)
    def _block(self, number: int, x: Tensor) -> Tensor:
        """timm's own block, with tokens leaving between attention and MLP.

        Of a compiled block the halves are compiled, and what is between them is not: how many tokens leave differs from block to
        block and as the keep falls, and each number would be a graph more, until torch gives up compiling (after eight).
        """
        block: Any = self._blocks[number].module
        mask = None
        if self._sizes is not None:  # proportional attention: softmax(QK^T / sqrt(Q) + log size), 2210.09461
            mask = nn.functional.pad(self._sizes.log(), (self._prefix, 0))[:, None, None].to(x.dtype)  # (B, 1, 1, N)
        x = self._attend(block, x, mask, self._watches(number))
        return _process(block, self._leave(number, x))

    def _attend(self, block: Any, x: Tensor, mask: Tensor | None, watched: bool) -> Tensor:
        norm_after = type(block).__name__ == "ResPostBlock"
        normed = x if norm_after else block.norm1(x)
        if watched:
            attended = self._watched(block.attn, normed)
        else:
            attended = block.attn(normed) if mask is None else block.attn(normed, attn_mask=mask)
        found: Tensor = x + block.drop_path1(block.norm1(attended) if norm_after else block.ls1(attended))
        return found

    def _watches(self, number: int) -> bool:
        """Whether this block's attention matrix is looked at: as long as patches are dropped here or later."""
        return self.settings.mode == "cumulative" and any(after < before for before, after in self._now[number:])

    def _watched(self, attn: Any, x: Tensor) -> Tensor:
        x, matrix = attention.explicit(attn, x)
        score = received(matrix.detach(), self._prefix)
        self._received = score if self._received is None else self._received + score
        return x

    @torch.compiler.disable
    def _leave(self, number: int, x: Tensor) -> Tensor:
        if self.settings.mode == "cumulative":
            before, after = self._now[number]
            if after == before:
                return x
            assert self._received is not None
            stays = top(self._received, after)
            self._received = self._received.gather(1, stays)
            return keep_rows(x, stays, self._prefix)
        qkv, self._qkv = self._qkv, None
        assert qkv is not None
        before, after = self._now[number]
        if after == before:
            return x
        attn, prefix = self._blocks[number].attn, self._prefix
        if self.settings.mode == "evit":
            has_class = self._model.cls_token is not None
            with torch.set_grad_enabled(self.settings.fuse and torch.is_grad_enabled()):
                scores = attention.row(attn, qkv, prefix, has_class=has_class).mean(1)[:, prefix:]  # (B, n)
            return evit(x, scores, after - self.settings.fuse, prefix, fuse=self.settings.fuse)
        with torch.no_grad():
            keys = attention.parts(attn, qkv)[1].mean(1)[:, prefix:]  # (B, n, Q)
        sizes = self._sizes if self._sizes is not None else torch.ones(x.shape[0], before, device=x.device)
        x, self._sizes = merge(x, sizes, match(keys, before - after), prefix)
        return x

    def _weigh(self, norm: nn.Module, inputs: tuple[Tensor], x: Tensor) -> Tensor | None:
        """Let the mean over merged tokens be the mean over the patches that they stand for, as ToMe does for MAE's ViTs."""
        if self._sizes is None:
            return None
        sizes, prefix = self._sizes, self._prefix
        if getattr(self._model, "pool_include_prefix", False):
            scale = nn.functional.pad(sizes, (prefix, 0), value=1.0) * x.shape[1] / (prefix + self._count)
        else:
            scale = nn.functional.pad(sizes * sizes.shape[1] / self._count, (prefix, 0), value=1.0)
        return x * scale[..., None].to(x.dtype)
