"""The page of settings: strict, typed, overridable, inherited, and never a way to run code."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from lotus import shelves, yaml_safe
from lotus.config import (
    Config,
    Finetune,
    Recipe,
    Rule,
    Score,
    Train,
    as_request,
    check,
    options,
    read,
    reader,
    rules,
    table,
)
from lotus.config.idle import IDLE, idle
from lotus.config.marks import Mark, marked
from lotus.config.page import taken
from selection.errors import Notice, Refused

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config_is_read_and_says_how_to_run_it(file: Path) -> None:
    config = read(file)
    assert config.name == file.stem
    head = file.read_text(encoding="utf-8").splitlines()[0]
    assert head.startswith("#")
    assert file.name in file.read_text(encoding="utf-8").split("\ndata:")[0]


def test_resolved_page_reads_back_the_same() -> None:
    config = read(ROOT / "configs" / "staged.yaml", ["train.lr=3e-4", "prune.keep.params=0.6"])
    assert check(__import__("yaml").safe_load(config.yaml())) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("prune.kep=1", "prune.kep: no such setting. Did you mean 'keep'?"),
        ("trian.lr=1", "trian: no such setting. Did you mean 'train'?"),
        ("train.augment.flp=true", "train.augment.flp: no such setting. Did you mean 'flip'?"),
        ("prune.keep.mac=0.5", "prune.keep.mac: no such setting. Did you mean 'macs'?"),
        ("select.keep=0", "select.keep: Input should be greater than 0, not 0."),
        ("select.keep=1.5", "select.keep: Input should be less than or equal to 1, not 1.5."),
        ("select.keep=half", "select.keep: Input should be a valid number"),
        ("prune.keep.macs=half", "prune.keep.macs: Input should be a valid number"),
        ("train.lr.x=1", "train.lr"),
        ("lr", "an override is key=value"),
        ("train.precision=fp8", "train.precision"),
        ("train.patches.mode=evitt", ", not 'evitt'. Did you mean 'evit'?"),
        ("prune.round=0", "prune.round: Input should be greater than or equal to 1, or 'auto', not 0."),
        ("prune.round=six", "prune.round: Input should be a valid integer, or 'auto', not 'six'."),
        ("train.epochs=two", "train.epochs: Input should be a valid integer, not 'two'."),
        (
            "train.guests=late_average",
            "train.guests: a list, not 'late_average'. Lists have brackets: train.guests=[late_average].",
        ),
        ("train.guests=[3]", "train.guests.0: a name, or a name with settings like {name: ..., ...}, not 3."),
        ("train.guests=[{nme: x}]", "train.guests.0.name: Field required."),
        (
            "train.shrink.steps=[{at: 0.1, kep: {macs: 0.6}}]",
            "train.shrink.steps.0.kep: no such setting. Did you mean 'keep'?",
        ),
        ("train.shrink.steps=[{at: 0.1}, {keep: {}}]", "train.shrink.steps.1.at: Field required."),
        (
            "train.shrink.steps=[[0.3, 0.7]]",
            "train.shrink.steps.0: a section like {at: ..., keep: ...}, not [0.3, 0.7].",
        ),
        (
            "train.shrink.steps=[{at: 0.1, keep: 0.6}]",
            "train.shrink.steps.0.keep: a section like {macs: ..., params: ..., ",
        ),
        ("train.sides=[[0]]", "train.sides.0: a list of another length, not [0]."),
        ("train.sides=[[0, 8, 1, 1]]", "train.sides.0: a list of another length, not [0, 8, 1, 1]."),
        ("data.options=3", "data.options: a section of settings, not 3."),
        ("train.shrink=true", "train.shrink: a section, not True. Say train.shrink={} for what it is by default."),
        ("train.shrink=0.1", "train.shrink: a section, not 0.1. Say e.g. train.shrink.at=0.1."),
        ("train.shrink=x", "train.shrink: a section, not 'x'. Say e.g. train.shrink.carry=true."),
        ("prune.round=aut", "prune.round: Input should be 'auto', not 'aut'. Did you mean 'auto'?"),
        (
            "prune.embed_dim=serch",
            "prune.embed_dim: Input should be 'auto' or 'search', not 'serch'. Did you mean 'search'?",
        ),
        ("prune.keep=0.5", "prune.keep: a section, not 0.5. Say prune.keep.macs=0.5."),
        ("prune.keep=half", "prune.keep: a section, not 'half'. Say e.g. prune.keep.macs=0.5."),
        ("select.pick=3", "select.pick: the name of a method, not 3."),
        ("train=3", "train: a section, not 3. Say e.g. train.epochs=20."),
        ("select.keep=true", "select.keep: expected a number, not True."),
        ("prune.keep={weights: 0.7}", "prune.keep.weights: is the budget of ways that cut no dimension"),
        ("prune.method.sweep=true", "prune.method: structured has no settings of its own"),
        ("prune.sweep=true", "prune.sweep: is called prune.method={name: unstructured, sweep: true} now"),
        ("prune.soup.steps=3", "prune.soup: is called prune.method={name: soup} now"),
        (
            "train.sparsity.attention.kind=log",
            "train.sparsity.attention: is called train.guests=[{name: attention_penalty}]",
        ),
        ("prune.search.compare=[0.5]", "prune.search.compare: the name of a method, not [0.5]"),
        ("prune={keep: {latency: 0.5}, scope: per_type}", "prune.keep.latency: is predicted for heads"),
        ("prune={keep: {latency: 0.5}, decouple_qk: true}", "prune.keep.latency: is predicted for heads"),
        ("prune.keep.macs=true", "prune.keep.macs: expected a number, not True."),
        ("train.epochs=true", "train.epochs: expected a number, not True."),
        ("train.zero=true", "train.zero: expected a number, not True."),
        ("train.augment.scale=[true, 1]", "train.augment.scale: expected a number"),
        ("train.lr=.inf", "train.lr: Input should be a finite number, not inf."),
        ("train.augment.ratio=[.nan, 1]", "train.augment.ratio.0: Input should be a finite number"),
        ("train.lr=[", "not valid YAML"),
        ("score.model=3", "score.model: a section, not 3. Say e.g. score.model.name="),
        ("score.model={nme: resnet18}", "score.model.nme: no such setting. Did you mean 'name'?"),
        ("score.proxy=linea", "score.proxy: Input should be 'training', 'linear_probe' or 'self'"),
        (
            "score={proxy: linear_probe, mixup: 0.2}",
            "score.mixup: a setting of a training; a linear probe sees each image once.",
        ),
        ("score.mixup=0.2", "score.mixup: an image is scored by what is said of it as it is. Remove it"),
        ("score={proxy: linear_probe, augment: {flip: true}}", "score.augment: a setting of a training"),
        (
            "score={proxy: linear_probe, optimizer: lamb}",
            "score.optimizer: the heads of a linear probe take optimizer adamw or sgd",
        ),
        (
            "score.subsets.runs=3",
            "score.subsets.runs: 3 runs on 0.7 leave images that are in all or in none; 4 do not.",
        ),
        ("score.subsets={runs: 4, fraction: 1}", "score.subsets.fraction: Input should be less than 1"),
    ],
)
def test_a_mistake_is_refused_with_place_and_cure(override: str, says: str) -> None:
    with pytest.raises(Refused) as refusal:
        read(ROOT / "configs" / "staged.yaml", [override])
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    "override", ["train.lr=abc", "train.zero=4", "train.lr=.inf", "train.augment=3", "train.augment.flip=x"]
)
def test_an_inherited_mistake_is_named_once_where_it_was_made(override: str) -> None:
    with pytest.raises(Refused) as refusal:
        read(None, [override])
    assert [line.partition(":")[0] for line in str(refusal.value).splitlines()] == [override.partition("=")[0]]
    with pytest.raises(Refused) as refusal:
        read(None, [override, override.replace("train", "score", 1)])
    assert len(str(refusal.value).splitlines()) == 2, "what was written at score is named at score"


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(Refused) as refusal:
        check({"trian": {}, "select": {"keep": 2}})
    assert "trian" in str(refusal.value)
    assert "select.keep" in str(refusal.value)


def test_yaml_reads_1e_3_as_a_string_and_we_as_a_number(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("train: {lr: 1e-3}\nmodel: {args: {init_values: 1e-5, act_layer: gelu}}\n")
    assert read(file).train.lr == 1e-3
    assert read(file).model.args == {"init_values": 1e-5, "act_layer": "gelu"}


@pytest.mark.parametrize(
    "text",
    [
        "- a list",
        "a: [",
        "a: &x {}\nb: *x",
        "!!python/object/apply:os.system ['touch {canary}']",
        "just words",
        "a: !x 1",
    ],
)
def test_a_file_that_is_no_config_is_refused_and_runs_nothing(tmp_path: Path, text: str) -> None:
    canary = tmp_path / "canary"
    file = tmp_path / "x.yaml"
    file.write_text(text.replace("{canary}", str(canary)))
    with pytest.raises(Refused):
        read(file)
    assert not canary.exists()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"nowhere\.yaml: .*Give a config file"):
        read(tmp_path / "nowhere.yaml")


def test_proxy_and_finetune_take_after_the_training() -> None:
    config = check({"train": {"lr": 3e-3, "batch_size": 32, "augment": {"flip": True}}, "finetune": {"clip": 2}})
    assert config.score.batch_size == config.finetune.batch_size == 32
    assert config.score.lr == 3e-3
    assert config.finetune.lr == pytest.approx(1e-3)
    assert config.finetune.clip == 2
    assert config.finetune.augment.flip
    assert not config.score.augment.flip, "a proxy watches the images as they are"
    blurred = check({"train": {"mixup": 0.2, "cutmix": 1.0, "drop_path": 0.1, "smoothing": 0.1}})
    assert (blurred.score.mixup, blurred.score.cutmix, blurred.score.drop_path, blurred.score.smoothing) == (
        0,
        0,
        0,
        0.1,
    )
    assert (blurred.finetune.mixup, blurred.finetune.drop_path) == (0.2, 0.1)
    assert config.finetune.epochs == 10


def test_a_linear_probe_takes_nothing_from_the_training() -> None:
    train = {
        "lr": 3e-3,
        "batch_size": 32,
        "mixup": 0.2,
        "patches": {"keep": 0.5},
        "optimizer": "lamb",
        "precision": "bf16",
    }
    score = check({"train": train, "score": {"proxy": "linear_probe"}}).score
    assert (score.epochs, score.batch_size, score.lr, score.mixup, score.optimizer) == (20, 256, 5e-3, 0, "adamw")
    assert score.precision == "bf16", "of the one pass through the model"
    mine = check({"train": train, "score": {"proxy": "linear_probe", "lr": 0.1, "epochs": 5}})
    assert (mine.score.lr, mine.score.epochs) == (0.1, 5)
    assert check(__import__("yaml").safe_load(mine.yaml())) == mine


def test_a_proxy_may_have_a_model_of_its_own() -> None:
    model = {"name": "vit_small_patch16_224", "args": {"img_size": 32}}
    assert check({"model": model}).score.model is None
    assert check({"model": model, "score": {"model": "resnet18"}}).score.model.args == {}
    named = check({"model": model, "score": {"model": {"name": "resnet18", "weights": "r.safetensors"}}}).score.model
    assert (named.name, named.args, named.weights) == ("resnet18", {}, "r.safetensors")
    same = read(None, ["model.args.img_size=32", "score.model.weights=w.safetensors"]).score.model
    assert (same.name, same.args, same.weights) == (Config().model.name, {"img_size": 32}, "w.safetensors")


def test_a_method_takes_options_in_yaml_and_on_the_command_line() -> None:
    assert check({"select": {"pick": {"name": "ccs", "bins": 20}}}).select.pick.options == {"bins": 20}
    config = read(ROOT / "configs" / "staged.yaml", ["select.pick=ccs", "select.pick.bins=20"])
    assert (config.select.pick.name, config.select.pick.options) == ("ccs", {"bins": 20})
    config = read(None, ["select.pick.bins=20", "prune.criterion.foo=1"])
    assert config.select.pick.options == {"bins": 20}, "the default method's"
    assert (config.prune.criterion.name, config.prune.criterion.options) == ("fisher", {"foo": 1})


def test_a_setting_has_a_sentence() -> None:
    silent = [
        f"{section.__name__}.{name}"
        for section in Config.__subclasses__() + [type(getattr(Config(), part)) for part in Config.model_fields]
        if hasattr(section, "model_fields")
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert not silent


def test_a_warm_up_is_said_once_and_what_follows_the_training_has_its_own() -> None:
    config = check({"train": {"warmup_ratio": 0.2, "epochs": 10}})
    assert (config.train.warmup, config.score.warmup, config.finetune.warmup) == (2, 0.5, 0.5)
    own = check(
        {"finetune": {"warmup_ratio": 0.1, "epochs": 30}, "score": {"proxy": "linear_probe", "warmup_ratio": 0.5}}
    )
    assert (own.train.warmup, own.finetune.warmup, own.score.warmup) == (2, 3, 10)
    assert check(yaml_safe.load(own.yaml(), "x")) == own
    with pytest.raises(Refused, match=r"train\.warmup_ratio: .*warmup_epochs"):
        check({"train": {"warmup_ratio": 0.2, "warmup_epochs": 1}})


def test_gates_are_learned_where_they_are_asked_for() -> None:
    assert not check({}).train.sparsity.gates
    with pytest.raises(Refused, match=r"train\.sparsity\.gates: .*off"):
        check({"train": {"sparsity": {"strength": 0.1}}})


def test_a_floor_is_for_classes_that_are_not_balanced() -> None:
    assert check({"select": {"balance": False, "floor": 0.5}}).select.floor == 0.5
    with pytest.raises(Refused, match=r"select\.floor: .*not balanced"):
        check({"select": {"floor": 0.5}})


OF_PAGE = table.one_by_one(rules.ROWS)
OF_SHELVES = tuple(row for row in rules.of(shelves.installed()) if row not in rules.ROWS)
ROWS = [*OF_PAGE, *OF_SHELVES, *rules.WITHOUT_A_RUN, *rules.CALLED]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.of}-{row.place}")
def test_every_row_of_the_table_refuses_its_example_and_not_the_one_beside_it(row: Rule) -> None:
    place, told = table.sentence(row)
    facts = {name: row.facts[name] for name in row.needs}
    where, bad = table.example(row, row.bad)
    with pytest.raises(Refused) as refusal:
        rules.refuse(bad, [row], place=where, **facts)
    assert str(refusal.value) == f"{place}: {told}."
    assert not any(rules.broken(table.example(row, row.good)[1], [row], **facts))
    good = read(None, table.words(row.good))
    if row in OF_PAGE or row in OF_SHELVES:
        for _, section in rules.sections(good):
            assert not any(rules.broken(section, rules.of(shelves.installed()), **facts))
    if row in OF_PAGE and not row.needs:
        with pytest.raises(Refused) as refusal:
            read(None, table.words(row.bad))
        assert f"{place}: {told}." in str(refusal.value).splitlines(), "no other row comes before it"
    else:
        read(None, table.words(row.bad))


@pytest.mark.parametrize("row", IDLE, ids=lambda row: f"{row.of}-{row.place}")
def test_a_setting_without_effect_is_told_and_the_one_beside_it_is_not(row: Rule) -> None:
    place, _ = table.sentence(row)
    assert any(text.startswith(f"{place} changes nothing: ") for text in idle(read(None, table.words(row.bad))))
    assert not idle(read(None, table.words(row.good)))


def test_a_page_as_it_ships_says_nothing_without_effect() -> None:
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        assert not idle(read(file)), file
    assert not idle(read(None, ["train.distill=none"])), "it says what is so"


def test_what_a_part_takes_from_another_is_told_where_it_was_said() -> None:
    words = ["train.optimizer=muon", "train.adamw_lr=0.002", "finetune.optimizer=adamw"]
    assert not idle(read(None, words)), "the fine-tune takes it from train, where it counts"
    assert [text.split()[0] for text in idle(read(None, [*words, "finetune.adamw_lr=0.001"]))] == ["finetune.adamw_lr"]
    model = ["model.start=mimetic", "score.model.weights=mine.pth"]
    assert not idle(read(None, model))
    assert [text.split()[0] for text in idle(read(None, ["train.adamw_lr=0.002"]))] == ["train.adamw_lr"]


def test_the_page_of_rules_is_printed_from_the_table() -> None:
    """Else: python -m lotus.config.table > docs/settings.md"""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == table.markdown()


def test_rows_of_ones_own_join_the_table() -> None:
    mine = SimpleNamespace(
        RULES=[Rule("Train", "lr", lambda it, moon: moon and it.lr > 1, "wanes in {place}", "train.lr=2", "")]
    )
    page = read(None, ["train.lr=2"])
    with pytest.raises(Refused, match=r"^train\.lr: wanes in train\.$"):
        rules.refuse(page.train, rules.of([mine]), place="train", moon=True)
    rules.refuse(page.train, rules.of([mine]), place="train", moon=False)
    rules.refuse(page.train, rules.of([mine]), place="train")


def test_an_old_name_is_refused_with_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reader.OLD, "prune.breadth", "prune.embed_dim")
    monkeypatch.setitem(reader.OLD, "scores", "score")
    with pytest.raises(Refused) as refusal:
        read(None, ["prune.breadth=0.5", "scores.epochs=3", "prune.sublayer=1"])
    assert set(str(refusal.value).splitlines()) == {
        "prune.breadth: is called prune.embed_dim now. Say that.",
        "scores: is called score now. Say that.",
        "prune.sublayer: no such setting. Did you mean 'sublayers'?",
    }
    with pytest.raises(Refused, match=r"prune\.breadth: .*prune\.embed_dim"):
        as_request({"breadth": 0.5})


def test_a_request_is_refused_as_the_section_of_a_config_is() -> None:
    asked = as_request({"keep": {"macs": 0.4}, "criterion": "taylor", "round": 16})
    assert asked == read(None, ["prune.keep.macs=0.4", "prune.criterion=taylor", "prune.round=16"]).prune
    for settings, says in (
        ({"rond": 8}, "prune.rond: no such setting. Did you mean 'round'?"),
        ({"keep": 0.5}, "prune.keep: a section, not 0.5. Say prune.keep.macs=0.5."),
        ({"keep": {"mac": 0.5}}, "prune.keep.mac: no such setting. Did you mean 'macs'?"),
        ({"keep": {}}, "prune.keep: say macs, params or latency"),
        ({"round": "aut"}, "prune.round: Input should be 'auto', not 'aut'. Did you mean 'auto'?"),
        ({"keep": {"latency": 0.5}, "decouple_qk": True}, "prune.keep.latency: is predicted for heads"),
    ):
        with pytest.raises(Refused) as refusal:
            as_request(settings)
        assert says in str(refusal.value)


def test_options_of_a_method_are_as_typed_as_the_page() -> None:
    def mine(signals, *, rate: Annotated[float, Field(gt=0)] = 0.5, words: tuple[str, ...] = (), free=None, need: int):
        """Positional annotations may name what is nowhere."""

    found = options(mine, {"rate": 1, "words": ["a"], "need": 2, "free": {}}, place="here")
    assert found == {"rate": 1.0, "words": ("a",), "need": 2, "free": {}}
    for given, says in (
        ({"rate": 0, "need": 1}, "here.rate: Input should be greater than 0, not 0."),
        ({"rate": True, "need": 1}, "here.rate: expected a number, not True."),
        ({"rte": 1, "need": 1}, "here.rte: 'mine' has no such setting. Did you mean 'rate'?"),
        ({}, "here.need: has no default. Set it."),
        ({"need": float("inf")}, "here.need: Input should be a finite number"),
    ):
        with pytest.raises(Refused) as refusal:
            options(mine, given, place="here")
        assert says in str(refusal.value)


def test_another_model_leaves_the_files_own_arguments_out() -> None:
    place = ROOT / "configs" / "cifar10.yaml"
    with pytest.warns(Notice, match=r"model\.args: .*vit_small_patch16_224"):
        config = read(place, ["model.name=vit_small_patch16_224", "model.args.img_size=32"])
    assert config.model.args == {"img_size": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(place, ["model.args.depth=3"]).model.args["embed_dim"] == 128
        assert read(place, ["model.name=vit_tiny_patch16_224"]).model.args["embed_dim"] == 128
    with pytest.warns(Notice, match="left out"):
        short = read(ROOT / "configs" / "cifar10.yaml", ["model=deit_tiny_patch16_224"]).model
    assert (short.name, short.args) == ("deit_tiny_patch16_224", {})
    assert read(ROOT / "configs" / "finetune.yaml", ["model=vit_base_patch16_224"]).model.pretrained
    assert check({"model": "vit_base_patch16_224"}).model.name == "vit_base_patch16_224"


def test_how_classes_share() -> None:
    for said, stands in (("fraction", True), (True, True), (False, False), ("equal", "equal"), ("sqrt", "sqrt")):
        assert check({"select": {"balance": said}}).select.balance == stands
    assert check({}).key("select") == check({"select": {"balance": "fraction"}}).key("select")
    page = check({"train": {"balance": "sqrt"}})
    assert page.finetune.balance == "sqrt"
    assert check({"train": {"balance": "sqrt"}, "finetune": {"balance": "none"}}).finetune.balance == "none"
    with pytest.raises(Refused, match=r"select\.balance: .*equal.*'equl'"):
        check({"select": {"balance": "equl"}})


class Misty(Train):
    """A training with settings that nobody has heard of."""

    haze: Annotated[float, Mark.BLURS, Mark.OFF_WITHIN] = 0.0
    turns: Annotated[int, Mark.LENGTH] = 3
    fog: Annotated[bool, Mark.SHARED] = False


class MistyScore(Score):
    haze: Annotated[float, Mark.BLURS, Mark.OF_TRAINING] = Field(0.0, examples=[0.3])


class MistyTune(Finetune):
    fog: bool = False


def test_a_setting_says_itself_what_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules, inheritance and stages ask for marks: whoever declares a setting names it nowhere else."""
    with pytest.raises(ValidationError, match=r"haze: an image is scored by what is said of it as it is"):
        MistyScore(haze=0.2)
    with pytest.raises(ValidationError, match=r"haze: a setting of a training; a linear probe sees each image once"):
        MistyScore(proxy="linear_probe", haze=0.2)
    assert MistyScore(proxy="linear_probe").haze == 0
    told = [row.bad for one in rules.ROWS if one.each for row in one.rows(MistyScore) if row.place == "haze"]
    assert told == ["score.haze=0.3", "score.proxy=linear_probe score.haze=0.3"]
    assert "haze" in Misty.off_within()
    for name in ("haze", "turns"):
        monkeypatch.setitem(Recipe.model_fields, name, Misty.model_fields[name])
    assert {"haze", "fog"} == taken(MistyTune, Misty) & {"haze", "turns", "fog"}
    assert not taken(MistyScore, Misty) & {"haze", "turns", "fog"}


def test_every_mark_is_carried_and_shown_by_an_example() -> None:
    sections = {type(section) for _, section in rules.sections(check({}))}
    for mark in Mark:
        assert any(marked(section, mark) for section in sections), mark
    for mark in (row.each for row in rules.ROWS if row.each):
        for name in marked(Score, mark):
            assert Score.model_fields[name].examples, f"{name}: docs/settings.md shows it"


def test_what_is_off_within_a_stage_is_off_by_default_and_says_so_itself() -> None:
    """A search and a convolution ask the features, and keep no list of them."""
    for page in (Train(), Finetune()):
        off = page.off_within()
        assert {"ema", "patches", "compile"} <= set(off)
        assert not any(off.values())
        assert page.model_copy(update=off) == page
