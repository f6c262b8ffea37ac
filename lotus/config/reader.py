"""The strict reader: YAML, ``key=value`` over it, and refusals that name the place and the nearest right name."""

from __future__ import annotations

import re
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ValidationError

from lotus import yaml_safe
from lotus.config import rules, usual
from lotus.config.faults import one_of_each, sentence
from lotus.config.page import Config, OneCut
from lotus.config.request import Keep, Prune
from lotus.config.section import Method, Section, is_number
from selection import regular
from selection.errors import Notice, Refused
from selection.methods import nearest

OLD: dict[str, str] = {
    "score.probe": "score.proxy",
    "score.subsets.part": "score.subsets.fraction",
    "score.redraw": "train.dynamic",
    "train.redraw": "train.dynamic",
    "finetune.redraw": "train.dynamic",
    "train.sparsity.inputs": "train.sparsity.in_channels",
    "prune.rank": "prune.scope",
    "prune.split": "prune.decouple_qk",
    "prune.inputs": "prune.in_channels",
    "prune.branches": "prune.sublayers",
    "prune.width": "prune.embed_dim",
    "prune.convolve": "prune.method={name: convolve}",
    "prune.pattern": "prune.method={name: unstructured, pattern: 'N:M'}",
    "prune.soup": "prune.method={name: soup}",
    "prune.sweep": "prune.method={name: unstructured, sweep: true}",
    "prune.weights": "prune.method={name: unstructured, weights: ...}",
    "train.sparsity.attention": "train.guests=[{name: attention_penalty}]",
}
"""A setting's old name and its new one, where the nearest-name refusal would not find it: ``{"prune.old": "prune.new"}``. A
section's stands for all inside of it."""

OLD_VALUES: dict[str, dict[str, str]] = {
    "score.proxy": {"train": "training", "linear": "linear_probe"},
    "prune.scope": {"pool": "global", "kind": "per_type", "quantile": "threshold"},
}
"""A setting's old values and their new ones, by the setting's present name."""


def shipped(name: str) -> Path:
    """The config of this name that comes with LOTUS: in the package where it was installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside, beside = (folder / "configs" / f"{name}.yaml" for folder in (package, package.parent))
    return inside if inside.is_file() else beside


def read(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a config file, or that of a run's folder, apply ``key=value`` overrides, and check it all.

    Raises:
        Refused: no such file, not YAML, an unknown setting, a value of the wrong kind; says where and what is right.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if (file / "config.yaml").is_file():
            file, overrides = file / "config.yaml", [f"folder={file}", *overrides]  # it may have been moved
        elif not file.exists() and file.parts[:1] == ("configs",):  # as the guides write it, from any folder
            file = shipped(str(Path(*file.parts[1:]).with_suffix("")))
        try:
            text = regular.text(file, most=1 << 20)
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"{path}: {_no_config(file, error)}") from None
        raw = _load_yaml(text, str(path))
        raw.setdefault("name", file.stem)
        # model=NAME is short for model.name=NAME, and keeps what else the file says of it
        overrides = [re.sub(r"^\s*model\s*=\s*(?![{\s])", "model.name=", override) for override in overrides]
        _for_another_model(raw, overrides)
    return check(over(raw, overrides), place=str(path) if path else "config")


def _no_config(file: Path, error: Exception) -> str:
    """Why no config can be read there, and the cure."""
    give = "Give a config file, e.g. configs/digits.yaml, or the folder of a run, e.g. runs/digits."
    if not file.exists():
        return f"there is no such file or folder. {give}"
    if (file / "MODEL.md").is_file():
        return "is an exported model, without weights to train on. Give the folder that it was exported from, e.g. RUN/finetune."
    if file.is_dir():
        return f"is a folder without a config.yaml, so no run's. {give}"
    why = (error.strerror or error) if isinstance(error, OSError) else "it is no text"
    return f"cannot be read as a config ({why}). {give}"


def _for_another_model(raw: dict[str, Any], overrides: Iterable[str]) -> None:
    """Where ``model.name=NAME`` asks for another model, leave out what the file says of its own one."""
    model = raw.get("model")
    asked = dict(override.partition("=")[::2] for override in overrides)
    name = asked.get("model.name")
    if not isinstance(model, dict) or name is None or name == model.get("name"):
        return
    own = [key for key in ("args", "start", "pos_embed_std", "patch_embed_init") if model.get(key)]
    for key in own:
        del model[key]
    if own:
        left = ", ".join(f"model.{key}" for key in own)
        warnings.warn(
            f"{left}: of the config's own model, and left out for {name}. Say them anew to keep them.",
            Notice,
            stacklevel=3,
        )


def over(raw: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``raw`` with ``key=value`` settings over it; it is changed.

    Raises:
        Refused: what is no ``key=value``, or sets something inside of a value.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise Refused(f"{override!r}: an override is key=value, e.g. train.lr=3e-4.")
        _set(raw, key.strip().split("."), _scalar(value, override), override)
    return raw


def check(raw: Mapping[str, Any], place: str = "config") -> Config:
    """The typed page for a dictionary.

    Raises:
        Refused: with every fault, a line each.
    """
    return _checked(Config, raw, (), place)


def as_request(raw: Mapping[str, Any]) -> Prune:
    """What to prune, of settings by name, as they stand in a config's section ``prune``.

    Raises:
        Refused: with every fault, a line each.
    """
    return _checked(Prune, raw, ("prune",), "prune")


def one_cut(overrides: Iterable[str]) -> OneCut:
    """What to prune of a model that LOTUS never trained, of ``key=value`` settings.

    Raises:
        Refused: as :func:`read`; nothing says how much is to stay, or a setting is for a run.
    """
    raw = over({}, overrides)
    asked = _checked(OneCut, raw, (), "prune")
    if "keep" not in (raw.get("prune") or {}):
        raise Refused("prune.keep: nothing says how much is to stay. Say e.g. prune.keep.macs=0.5.")
    for place, section in rules.sections(asked):
        rules.refuse(section, rules.WITHOUT_A_RUN, place=place)
    return asked


S = TypeVar("S", bound=Section)


def _checked(kind: type[S], raw: Mapping[str, Any], at: tuple[str, ...], place: str) -> S:
    """The section ``kind``, which stands at ``at`` of the page, for a dictionary; ``place`` is named where there is no setting to."""
    faults = list(_unknown(raw, kind, at, OneCut if kind is OneCut else Config))
    try:
        section = kind.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False)
        places = {fault["loc"] for fault in found}
        wrong: dict[str, dict[str, str]] = {}  # by setting: sentence -> kind of fault
        for fault in found:
            if fault["type"] == "extra_forbidden":
                continue  # named above, with the nearest right name
            if _inherited(fault["loc"], raw) and ("train", *fault["loc"][1:]) in places:
                continue  # named at train
            fault = {**fault, "loc": (*at, *fault["loc"])}
            wrong.setdefault(_where(fault["loc"]), {})[_fault(fault, place)] = fault["type"]
        faults += [sentence for kinds in wrong.values() for sentence in one_of_each(kinds)]
        raise Refused("\n".join(dict.fromkeys(faults))) from None
    if faults:
        raise Refused("\n".join(dict.fromkeys(faults)))
    return section


def _fault(fault: Mapping[str, Any], place: str) -> str:
    """What pydantic found, in a sentence with its place."""
    below = _at(fault["loc"])
    if below is not None and fault["type"] in ("model_type", "model_attributes_type"):
        return _no_section(".".join(map(str, fault["loc"])), below, fault["input"])
    where = _where(fault["loc"])
    if fault["type"] == "rule":
        row, value = fault["ctx"]["row"], fault["ctx"]["value"]
        return f"{rules.join(where, row.place) or place}: {row.sentence(value, where)}."
    now = _now(where, fault["input"])
    said = sentence(fault, where or place)
    return said if now is None else f"{said.partition(' Did you mean ')[0]} That is called {now!r} now."


def _inherited(loc: tuple[int | str, ...], raw: Mapping[str, Any]) -> bool:
    """Whether the user did not write this setting of score or finetune."""
    own = raw.get(str(loc[0])) if loc else None
    return len(loc) > 1 and loc[0] in ("score", "finetune") and not (isinstance(own, Mapping) and loc[1] in own)


def _at(loc: Iterable[int | str]) -> type[Section] | None:
    """The Section that stands at a place of the page, if one does; each of a list is the same."""
    section: type[Section] | None = Config
    for step in loc:
        if isinstance(step, int):
            continue
        field = section.model_fields.get(str(step)) if section else None
        section = _section(field.annotation) if field else None
    return section


def _where(loc: Iterable[int | str], page: type[Section] = Config) -> str:
    """The setting of ``page`` at a place that pydantic names, without the kinds of value that it tried there."""
    section: type[Section] | None = page
    steps = []
    for step in loc:
        field = None if section is None or isinstance(step, int) else section.model_fields.get(step)
        if field is not None or isinstance(step, int):
            steps.append(str(step))
        if field is not None:
            section = _section(field.annotation)
    return ".".join(steps)


def _no_section(where: str, section: type[Section], given: Any) -> str:
    if any(step.isdigit() for step in where.split(".")):
        return _no_member(where, section, given)
    if issubclass(section, Method):
        return f"{where}: the name of a method, not {given!r}."
    if section is Keep:
        number = isinstance(given, (int, float)) and not isinstance(given, bool)
        return (
            f"{where}: a section, not {given!r}. Say {f'{where}.macs={given}' if number else f'e.g. {where}.macs=0.5'}."
        )
    said = {False: "null for none", True: "{} for what it is by default"}
    if isinstance(given, bool):
        return f"{where}: a section, not {given!r}. Say {where}={said[given]}."
    return f"{where}: a section, not {given!r}. Say {_example(where, section, given)}."


def _example(where: str, section: type[Section], given: Any) -> str:
    """A setting of ``section`` in place of the whole: the one that ``given`` is most likely meant for."""
    fields = section.model_fields
    (first, field), *_ = fields.items()
    if isinstance(given, float) and "keep" in fields and is_number(fields["keep"].annotation):
        return f"{where}.keep={given}"
    if isinstance(given, (int, float)) and field.default is None and is_number(field.annotation):
        return f"e.g. {where}.{first}={given}"
    defaults = {name: field.get_default() for name, field in fields.items()}
    name, value = next((name, value) for name, value in defaults.items() if isinstance(value, (str, int, float)))
    return f"e.g. {where}.{name}={str(value).lower() if value is True else value}"


def _no_member(where: str, section: type[Section], given: Any) -> str:
    """Of a list, or within one, where no word of a command sets a part."""
    if issubclass(section, Method):
        return f"{where}: a name, or a name with settings like {{name: ..., ...}}, not {given!r}."
    parts = ", ".join(f"{name}: ..." for name in section.model_fields)
    return f"{where}: a section like {{{parts}}}, not {given!r}."


def _load_yaml(text: str, place: str) -> dict[str, Any]:
    loaded = yaml_safe.load(text, place)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise Refused(f"{place}: expected settings like 'seed: 0', not {type(loaded).__name__}.")
    return loaded


def _scalar(text: str, override: str) -> Any:
    return yaml_safe.load(text, repr(override[:80])) if text.strip() else ""


def _set(raw: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    here = raw
    for depth, step in enumerate(path[:-1]):
        below = here.get(step)
        if below is None or below is True:
            below = {}  # baseline.epochs=9 over 'baseline: true'
        elif isinstance(below, str):
            below = {"name": below}  # select.pick.bins=20 over 'pick: ccs'
        elif not isinstance(below, dict):
            raise Refused(f"{override!r}: {'.'.join(path[: depth + 1])} is a value, not a section.")
        here[step] = dict(below)
        here = here[step]
    here[path[-1]] = value


def _unknown(raw: Any, section: type[BaseModel], place: tuple[str, ...], page: type[Section] = Config) -> Iterable[str]:
    """A sentence for each setting of ``section``, which stands at a place of ``page``, that does not exist."""
    if not isinstance(raw, Mapping) or section.model_config.get("extra") != "forbid":
        return
    fields = section.model_fields
    for key, value in raw.items():
        where = ".".join((*place, str(key)))
        if where in OLD:
            new = OLD[where]
            now = _now(new, value)
            yield f"{where}: is called {new} now. Say {'that' if now is None else f'{new}={now}'}."
        elif key not in fields:
            here = f" Here: {', '.join(fields)}."
            yield f"{where}: no such setting.{suggested(where, fields, page) or here}"
        else:
            below = _section(fields[key].annotation)
            if below is None:
                continue
            listed = isinstance(value, (list, tuple))
            for number, one in enumerate(value if listed else [value]):
                yield from _unknown(one, below, (*place, str(key), *([str(number)] if listed else [])), page)


def suggested(where: str, near: Iterable[str], page: type[Section] = Config) -> str:
    """``" Did you mean 'train.lr'?"`` for what is no setting of ``page``: one that others call so, one of a name among ``near`` that
    is spelled alike, or one of that name in another section; else an empty string."""
    steps = where.split(".")

    def known(setting: str) -> bool:
        return _where(setting.split("."), page) == setting

    found = usual.meant(steps, known)
    if not found and (alike := nearest(steps[-1], near)):
        return alike
    found = found or usual.elsewhere(steps, known)
    return f" Did you mean {found!r}?" if found else ""


def _now(where: str, value: Any) -> str | None:
    """What a setting's old value is called; None where it has no other name."""
    return OLD_VALUES.get(where, {}).get(value) if isinstance(value, str) else None


def _section(annotation: Any) -> type[Section] | None:
    """The Section inside an annotation like ``Section | None`` or ``tuple[Section, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (Annotated, tuple):
        return _section(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((found for found in map(_section, typing.get_args(annotation)) if found), None)
    return None
