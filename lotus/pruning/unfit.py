"""What cannot be pruned as it is: models, images and gates that are refused before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lotus.pruning.wrapping import refuse_bytes
from lotus.vit import anatomy
from selection.errors import Refused


def refuse_model(model: nn.Module) -> None:
    if torch.is_inference_mode_enabled() or any(weight.is_inference() for weight in model.parameters()):
        raise Refused(
            "prune: no derivative can be taken inside of torch.inference_mode(), or of weights made there. Call it outside; "
            "torch.no_grad() is no hindrance."
        )
    if hooked := anatomy.hooked(model):
        raise Refused(f"{hooked} carries a forward hook, which a cut would lose. Take it off first (gates: remove()).")
    first = next(iter(model.parameters())).dtype
    for where, weight in model.named_parameters():
        if weight.dtype != first:
            raise Refused(
                f"{where}: is {weight.dtype}, other weights are {first}. Bring all to one, e.g. model.float()."
            )
        if weight.is_meta:
            raise Refused(f"{where}: has no memory (meta device). Load the weights first.")
        if not torch.isfinite(weight).all():
            raise Refused(f"{where}: holds values that are not finite. Prune a checkpoint from before.")


def checked(model: nn.Module, passes: Callable[[], Iterable[Any]]) -> Callable[[], Iterable[Any]]:
    """The batches, refused where ``model`` cannot read their images."""
    embed: Any = getattr(model, "patch_embed", None)
    side, channels = getattr(embed, "img_size", None), getattr(getattr(embed, "proj", None), "in_channels", None)
    if not getattr(embed, "strict_img_size", True):
        side = None

    def again() -> Iterable[Any]:
        for batch in passes():
            images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if isinstance(images, Tensor):
                refuse_bytes(model, images)
                wrong = images.ndim != 4 or (channels is not None and images.shape[1] != channels)
                if wrong or (side is not None and tuple(images.shape[2:]) != tuple(side)):
                    size = " x ".join(map(str, side)) if side is not None else "any"
                    raise Refused(
                        f"prune: calibration images are {tuple(images.shape)}, the model reads (images, {channels}) of {size} pixels. "
                        "Resize them, or make the model with that img_size."
                    )
            yield batch

    return again


def refuse_gates(model: nn.Module, gates: Mapping[str, Tensor] | None, in_channels: bool) -> None:
    """Refuse gates that are missing or of other widths."""
    for site, linear in anatomy.sites(model, in_channels=in_channels).items():
        if gates is None or site not in gates:
            raise Refused(
                f"prune.criterion: this one reads the learned gate of {site}, which is not here. Train with gates, or take another."
            )
        if gates[site].numel() != linear.in_features:
            raise Refused(f"prune.criterion: {gates[site].numel()} gates for the {linear.in_features} units of {site}.")
