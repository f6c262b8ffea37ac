"""A model on disk: a folder of ``spec.json``, which says how to build it, and ``model.safetensors``, its weights.

A spec is data. It names an architecture of timm's registry with plain arguments and the widths of each block; nothing in it is
imported or run. The folder is written beside its place and renamed as a whole.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lotus import files
from lotus.data.views import CENTER
from lotus.pruning import described, wrapping
from lotus.vit import cost, hub_models
from lotus.vit import model as door
from lotus.vit import weights as weights_of
from lotus.vit.preprocessing import preprocessing, resizing
from selection import regular
from selection.errors import Refused, reason

KIND = "lotus-vit"
FORMAT = 2
"""Of a model that lost sublayers, reads a part of the residual stream or convolves; any other is written as 1, which older
versions read."""
SPEC, WEIGHTS = "spec.json", "model.safetensors"
EXPORTED = (
    "timm.safetensors", "model.safetensors", "model.onnx", "model.int8.onnx", "MODEL.md", "README.md", "config.json",
)  # fmt: skip
"""What ``lotus export`` writes to ``export`` in a model's folder: of the older model, it goes with it."""
_NO_MATTER = 1e-5
"""What norms may add otherwise to a variance of about one."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    about: Mapping[str, Any] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write ``model``, dense or cut, to ``folder``; a folder that LOTUS wrote before is replaced.

    One that is compiled or parallel is unwrapped. One of Hugging Face's classes is written as timm's that computes the same,
    which :func:`load` gives.

    Args:
        about: Anything JSON-ready to keep beside the weights, e.g. class names, mean and standard deviation; what ``pretrained_cfg``
            says of images is kept where it says nothing of them, and so are classes.
        extra: More files of tensors to lie beside the weights: ``{"gates.safetensors": {...}}``.

    Raises:
        Refused: a model that could not be built again from a spec, a folder that holds something else, no space.
    """
    folder, model = Path(folder), wrapping.unwrapped(model)
    if hub_models.is_hub(model):
        model = _of_hub(model)
    origin = door.origin(model)
    rows, kernels = described.rows_of(model)
    state = model.state_dict()
    groups = {WEIGHTS: state, **(extra or {})}
    _check_names(groups)
    skeleton = described.skeleton(origin, rows, kernels, place=type(model).__name__)
    fault = weights_of.few(_faults(skeleton, state))
    if fault:
        raise Refused(f"{type(model).__name__}: would not come back from {folder} as it is: {fault}.")
    now, dense = cost.count(model), dense_cost({"model": origin}, type(model).__name__)
    spec = {
        "kind": KIND,
        "format": FORMAT if any(len(row) > 4 or 0 in row.values() for row in rows) else 1,
        "model": origin,
        "blocks": rows,
        **({"convolutions": kernels} if kernels else {}),
        "cost": {"params": now.params, "macs": now.macs},
        "dense_cost": {"params": dense.params, "macs": dense.macs},
        "weights": WEIGHTS,
        "versions": {name: _version(name) for name in ("lotus-vit", "timm", "torch")},
        "about": {**_known(model, about or {}), **(about or {})},
    }
    json.dumps(spec)  # an ``about`` that is not JSON-ready fails here, before anything is written
    if folder.exists() and not ours(folder):
        raise Refused(f"{folder}: holds something that LOTUS did not write. Take another folder.")
    with files.refusing(folder), files.folder_beside(folder, replace=True) as beside:
        for name, tensors in groups.items():
            files.put_tensors(tensors, beside / name)
        spec["digests"] = {name: files.digest_of(beside / name, size=32) for name in groups}
        (beside / SPEC).write_text(json.dumps(spec, indent=1), encoding="utf-8")
    return folder


def _known(model: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's own ``pretrained_cfg`` says of its images and classes, another than timm's of that name as often as not; nothing
    of the images where ``about`` does."""
    held = getattr(model, "pretrained_cfg", None)
    told = held if isinstance(held, Mapping) else held.to_dict() if held else {}
    if not told:
        return {}
    seen = preprocessing(model).about()
    seen["resize"] = resizing({**seen, "resize": told.get("resize", seen["interpolation"])})
    found = {} if seen.keys() & about.keys() else seen
    names = told.get("label_names")
    if isinstance(names, (list, tuple)) and len(names) == model.num_classes:
        found["classes"] = [str(name) for name in names]
    return found


def _of_hub(model: Any) -> nn.Module:
    """timm's ViT that computes what one of Hugging Face's does, cut or not."""
    name, args = hub_models.origin(model)
    made = described.skeleton(
        {"name": name, "args": args}, list(hub_models.rows(model)), {}, place=type(model).__name__
    )
    made.load_state_dict(hub_models.weights(model), assign=True)
    ours = {norm.eps for norm in made.modules() if isinstance(norm, nn.LayerNorm)}
    theirs = hub_models.eps_of(model)
    if any(abs(eps - theirs) > _NO_MATTER for eps in ours):  # Hugging Face's ViT has 1e-12, timm's 1e-6
        raise Refused(
            f"{type(model).__name__}: its norms add {theirs:g} (layer_norm_eps), timm's {max(ours):g}, which computes something else. "
            "Save it by its own save_pretrained."
        )
    return made.eval()


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise Refused(f"{name!r}: an extra file is a plain name that ends in .safetensors.")


def load(folder: str | Path) -> nn.Module:
    """The model that :func:`save` wrote, on the CPU, in eval mode; the same outputs to the last bit.

    Raises:
        Refused: no such folder, a foreign or newer one, or weights that are damaged, were changed or do not fit the spec.
    """
    folder = Path(folder)
    skeleton, weights, origin = _open(folder)
    fault = weights_of.few(_faults(skeleton, weights))
    if fault:
        raise Refused(f"{folder / WEIGHTS}: does not fit {SPEC}: {fault}.")
    _check_digest(folder)
    # Copies own aligned memory, where the file's map need not be: kernels, and so last bits, may depend on it.
    skeleton.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    _fill(skeleton, origin)
    _describe(skeleton, read(folder).get("about"))
    return skeleton.eval()


def _describe(model: Any, about: Any) -> None:
    """Give ``model`` the preprocessing, classes and license that its folder knows, as timm's models have them."""
    known = about if isinstance(about, dict) else {}
    wanted = preprocessing(model).updated(known)
    if "mean" in known and "crop" not in known:  # of a training of ours, which looks at images so
        wanted = wanted._replace(crop=CENTER, interpolation="bilinear")
    held = getattr(model, "pretrained_cfg", None) or {}
    cfg = {"architecture": held.get("architecture"), **wanted.cfg(), "num_classes": model.num_classes}
    cfg["resize"] = resizing({**wanted.about(), **known})  # timm has no word for by area
    names, license_ = known.get("classes"), known.get("license")
    if isinstance(names, (list, tuple)) and len(names) == model.num_classes:
        cfg["label_names"] = [str(name) for name in names]
    if isinstance(license_, str) and license_:
        cfg["license"] = license_
    model.pretrained_cfg = model.default_cfg = cfg


def _check_digest(folder: Path) -> None:
    """Refuse weights that are not, bit for bit, what was saved; those of an older LOTUS have no digest."""
    known = read(folder).get("digests")
    if isinstance(known, dict) and WEIGHTS in known and files.digest_once(folder / WEIGHTS, 32) != known[WEIGHTS]:
        raise Refused(
            f"{folder / WEIGHTS}: its bytes have changed since it was written (its digest is another than {SPEC} says). Take "
            "another copy; where a run made it, delete it, and lotus run makes it again."
        )


def differences(folder: str | Path) -> list[str]:
    """Every tensor of a folder that is missing, too many, of another shape than its spec says or of another dtype than most.

    Raises:
        Refused: as :func:`load`, but for these.
    """
    skeleton, weights, _ = _open(Path(folder))
    return [f"{fault}." for fault in _faults(skeleton, weights)]


def _faults(skeleton: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """How tensors differ from what ``skeleton`` holds: by name and shape, or else by dtype. Numbers with a fraction are all of
    one, of any width."""
    expected = skeleton.state_dict()
    faults = weights_of.differences(weights_of.shapes(expected), weights_of.shapes(weights))
    if faults:
        return faults
    real = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    told = Counter(weights[name].dtype for name in real if weights[name].dtype in _DTYPES)
    most = told.most_common(1)[0][0] if told else torch.float32
    dtypes = {name: most if name in real else tensor.dtype for name, tensor in expected.items()}
    return [
        f"{name} is {_said(weights[name].dtype)}, not {_said(dtype)} as it should be"
        for name, dtype in dtypes.items()
        if weights[name].dtype != dtype
    ]


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def changed(folder: str | Path) -> list[str]:
    """What of a folder's tensor files is no longer, byte for byte, what :func:`save` wrote; nothing where an older LOTUS did,
    which left no digests.

    Raises:
        Refused: no such folder, or a foreign, damaged or newer spec.
    """
    folder = Path(folder)
    digests = read(folder).get("digests", {})
    if not isinstance(digests, dict):
        return [f"{SPEC}: digests are no digests by file."]
    faults = []
    for name, digest in digests.items():
        if Path(name).name != name:
            faults.append(f"{SPEC}: {name!r} is no file of this folder.")
        elif not (folder / name).is_file():
            faults.append(f"{name}: is missing.")
        elif files.digest_of(folder / name, size=32) != digest:
            faults.append(f"{name}: was changed after it was written (its digest is another than {SPEC} says).")
    return faults


def dense_cost(spec: Mapping[str, Any], place: str) -> cost.Cost:
    """What timm's own model of a spec's name and arguments costs: the one that it was cut from, but where the stream is narrower,
    since that is an argument."""
    return cost.count(door.build(spec["model"]["name"], spec["model"]["args"], meta=True, place=place))


def _open(folder: Path) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """The model that a folder describes, without memory, its weights, and how it is made dense."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    spec, file = read(folder), folder / WEIGHTS
    try:
        weights = load_file(regular.check(file))
    except (OSError, MemoryError, SafetensorError) as error:
        raise Refused(f"{file}: cannot be read ({reason(error)}). Is it whole?") from None
    try:
        rows = [described.row_of(row) for row in spec["blocks"]]
        origin = {"name": spec["model"]["name"], "args": dict(spec["model"]["args"])}
        kernels = dict(spec.get("convolutions", {}))
    except (TypeError, KeyError, ValueError) as error:
        raise Refused(f"{folder / SPEC}: is damaged ({reason(error)}).") from None
    return described.skeleton(origin, rows, kernels, place=str(folder / SPEC)), weights, origin


def _fill(skeleton: nn.Module, origin: Mapping[str, Any]) -> None:
    """Give what no file keeps, since it follows from the architecture (rotary angles, masks of windows), its values."""
    if not any(buffer.is_meta for buffer in skeleton.buffers()):
        return
    # None of it depends on the MLPs, whose weights would be most of the memory: and of a tampered spec, as much as that asks for.
    made = door.build(origin["name"], {**origin["args"], "mlp_ratio": 1.0}).to(next(skeleton.parameters()).dtype)
    for name, buffer in made.named_buffers():
        where, _, last = name.rpartition(".")
        try:
            owner = skeleton.get_submodule(where)
        except AttributeError:
            continue
        if getattr(owner, last, None) is not None and getattr(owner, last).is_meta:
            setattr(owner, last, buffer)


def read(folder: str | Path) -> dict[str, Any]:
    """The spec of a folder, checked for kind and format; ``about`` holds what was given to :func:`save`.

    Raises:
        Refused: no such folder, or a foreign, damaged or newer spec.
    """
    folder = Path(folder)
    files.recover(folder)
    file = folder / SPEC
    try:
        spec: dict[str, Any] = json.loads(regular.text(file))
    except FileNotFoundError:
        if not folder.exists():
            raise Refused(
                f"{folder}: there is no such folder. Give the folder of a model, e.g. RUN/finetune."
            ) from None
        raise Refused(f"{folder}: is no model folder (it has no {SPEC}). Give one, e.g. RUN/finetune.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{file}: cannot be read ({reason(error)}). Is it whole?") from None
    known = isinstance(spec, dict) and spec.get("kind") == KIND and type(spec.get("format")) is int
    if not known or spec["format"] < 1:
        raise Refused(f"{file}: was not written by LOTUS.")
    if spec["format"] > FORMAT:
        raise Refused(f"{file}: has format {spec['format']}, this LOTUS reads up to {FORMAT}. Take a newer LOTUS.")
    return spec


def images_of(folder: Path) -> dict[str, list[float]]:
    """Mean and standard deviation of the images that a model of LOTUS wants, where they lie beside it.

    Raises:
        Refused: they are no three numbers between 0 and 1, or a deviation is 0.
    """
    if not (folder / SPEC).is_file():
        return {}
    about = read(folder).get("about", {})
    about = about if isinstance(about, dict) else {}
    numbers = {name: about[name] for name in ("mean", "std") if name in about}
    for name, three in numbers.items():
        if not _of_colors(three) or (name == "std" and 0 in three):
            raise Refused(
                f"{folder / SPEC}: about.{name} is {three!r:.60}, not three numbers between 0 and 1. Mend it."
            )
    return {name: [float(number) for number in three] for name, three in numbers.items()}


def _of_colors(value: Any) -> bool:
    """Whether it is a number between 0 and 1 for each of three colors."""
    three = isinstance(value, list) and len(value) == 3
    return three and all(type(one) in (int, float) and 0 <= one <= 1 for one in value)


def ours(folder: Path) -> bool:
    """Whether ``folder`` is empty or holds nothing but what :func:`save` writes, and what ``lotus export`` made of it."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    sent = folder / "export"
    if sent.is_dir() and {path.name for path in sent.iterdir()} <= set(EXPORTED):
        names.remove("export")
    return not names or (SPEC in names and all(name == SPEC or name.endswith(".safetensors") for name in names))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
