"""Models and batches of others: the ViT inside of what wraps it, and batches in the forms that trainers give.

B batch, C channels, S side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lotus.vit import anatomy, hub_models
from selection.errors import Refused

IMAGES, LABELS = ("pixel_values", "images", "image"), ("labels", "label")
"""What a batch that is a mapping may call them, as the Hugging Face hub's do."""

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


class Wrapped:
    """A model and the one ViT that is in it, which may be the model itself.

    Attributes:
        vit: what can be cut
        name: where it lies, e.g. ``"1"`` of a Sequential; empty where it is the whole of what was unwrapped
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
            Refused: no ViT that can be cut, or several; names them.
        """
        self.layers: list[nn.Module] = []  # compiled, DataParallel, DDP: the outermost first
        self.bare = model
        while (inner := _inside(self.bare)) is not None:
            self.layers.append(self.bare)
            self.bare = inner
        self.name, self.vit = _found(self.bare)
        self.hub = self.vit if hub_models.is_hub(self.vit) else None
        """A class of Hugging Face's, which is cut as timm's ``vit`` and comes back in its own."""
        if self.hub is not None:
            self.vit = hub_models.as_timm(self.hub)

    def batches(self, batches: Batches) -> Callable[[], Iterable[Any]]:
        """Calibration batches as (images, labels), the images as the ViT reads them; as often as they are asked for."""
        passes = passes_of(batches)
        return (lambda: map(self._reached, passes())) if self.name else passes

    def around(self, small: nn.Module) -> nn.Module:
        """``small`` in the wrapping that the ViT has; what else is in there is copied."""
        inner = self.vit if self.hub is None else self.hub
        small = small if self.hub is None else hub_models.put_back(self.hub, small)
        made = copy.deepcopy(self.bare, {id(inner): small}).eval() if self.name else small
        for layer in reversed(self.layers):
            made = _again(layer, made)
        return made.eval()

    def _reached(self, batch: Any) -> Any:
        """``batch`` with what the ViT is given of its images."""
        images, *rest = _parts(batch)
        if not isinstance(images, Tensor):
            return batch
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        inner = self.vit if self.hub is None else self.hub
        training, where = self.bare.training, next(inner.parameters())
        handle = inner.register_forward_pre_hook(stop)
        try:
            with torch.no_grad():
                self.bare.eval()(images.to(where.device))
        except _Reached:
            pass
        finally:
            handle.remove()
            self.bare.train(training)
        if not seen or not isinstance(seen[0], Tensor):
            raise Refused(
                f"prune: {self.name}, the ViT inside of {type(self.bare).__name__}, is not given the images as its first "
                f"argument. Prune it alone: model.{self.name}, with images as it reads them."
            )
        return (seen[0], *rest)


class _Reached(Exception):
    """The images have come to the ViT: the rest need not be computed."""


def passes_of(batches: Batches) -> Callable[[], Iterable[Any]]:
    """The batches as tuples, as often as they are asked for."""
    if callable(batches):
        return lambda: map(_parts, _several(batches()))
    _several(batches)
    again = list(batches) if iter(batches) is batches else batches
    return lambda: map(_parts, again)


def _several(batches: Any) -> Iterable[Any]:
    """The batches, refused where they cannot be gone through."""
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise Refused(
            f"prune: batches are {type(batches).__name__}, not calibration data. Give a DataLoader, a list of (images, labels), or a "
            "function that gives one."
        )
    several: Iterable[Any] = batches
    return several


def _parts(batch: Any) -> Any:
    """A mapping's images and labels as a tuple; anything else as it is."""
    if not isinstance(batch, Mapping):
        return batch
    images, labels = (next((name for name in names if name in batch), None) for names in (IMAGES, LABELS))
    if images is None:
        raise Refused(
            f"prune: a calibration batch is a mapping of {', '.join(map(str, batch)) or 'nothing'}, not of pixel_values and labels. "
            "Give (images, labels)."
        )
    return batch[images], None if labels is None else batch[labels]


def refuse_bytes(model: nn.Module, images: Tensor) -> None:
    """Refuse images that are no numbers as the model was trained on.

    Raises:
        Refused: they are whole numbers; with the line that normalizes them.
    """
    if images.is_floating_point():
        return
    about: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (tuple(about.get(name) or (0.5,) * 3) for name in ("mean", "std"))
    raise Refused(
        f"prune: images are {str(images.dtype).removeprefix('torch.')}, and a ViT reads normalized numbers. Give "
        f"(images / 255 - mean) / std with the mean and std that it was trained on, here perhaps mean {mean} and std {std}, "
        "each as torch.tensor(...).view(3, 1, 1)."
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without what compiled or parallel training puts around it.

    Raises:
        Refused: it is no ViT, and holds one: says where.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    inside = [name for name, part in model.named_modules() if anatomy.family(part) or hub_models.is_hub(part)]
    if len(inside) == 1 and inside[0]:
        raise Refused(
            f"{type(model).__name__}: the ViT is in it at {inside[0]}, and what else is in there cannot be saved. Save that alone: "
            f"lotus.save(model.get_submodule({inside[0]!r}), ...)."
        )
    return model


def _inside(model: Any) -> nn.Module | None:
    """What a compiled or parallel model wraps; None where it is neither."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        found: nn.Module | None = model.module
        return found
    return getattr(model, "_orig_mod", None)


def _again(layer: Any, small: nn.Module) -> nn.Module:
    """``small`` compiled, or parallel, as ``layer`` is."""
    if isinstance(layer, nn.DataParallel):  # without a device it knows neither of the others
        told = (layer.device_ids, layer.output_device, layer.dim) if layer.device_ids else ()
        return nn.DataParallel(small, *told)
    if isinstance(layer, nn.parallel.DistributedDataParallel):
        return nn.parallel.DistributedDataParallel(
            small,
            device_ids=layer.device_ids,
            output_device=layer.output_device,
            dim=layer.dim,
            broadcast_buffers=layer.broadcast_buffers,
            process_group=layer.process_group,
            find_unused_parameters=layer.find_unused_parameters,
            gradient_as_bucket_view=layer.gradient_as_bucket_view,
        )
    found: nn.Module = type(layer)(small, layer.dynamo_ctx)
    return found


def _found(model: nn.Module) -> tuple[str, nn.Module]:
    """The one ViT in ``model``: its name and itself."""
    found = {name: part for name, part in model.named_modules() if anatomy.family(part) or hub_models.is_hub(part)}
    if len(found) > 1:
        names = list(found)
        raise Refused(
            f"{type(model).__name__}: there are {len(found)} ViTs in it, {', '.join(names)}. Prune one after the other, e.g. "
            f"model.{names[0]}, and put it back."
        )
    if found:
        return next(iter(found.items()))
    for name, part in model.named_modules():
        if type(part).__module__.startswith("torchvision.models.vision_transformer"):
            raise Refused(
                f"{f'{name}: ' if name else ''}torchvision's VisionTransformer (vit_b_16 and its kin) keeps q, k and v in "
                "nn.MultiheadAttention, which no block of LOTUS is. Take timm's: vit_base_patch16_224 is the same model, "
                "with published weights of its own."
            )
    return "", model  # which is refused where it is cut, by its own name
