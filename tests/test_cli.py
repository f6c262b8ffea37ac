"""The command line: a verb a stage, and what ``lotus config`` says of every setting."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lotus import cli
from lotus.cli import main, notices_as_they_are
from lotus.cli.config import settings
from lotus.config import Config, read, shipped
from lotus.events import Event, Skipped
from lotus.stages import STAGES
from lotus.training.distributed import StopFlag
from lotus.watch import STOPPED
from selection.errors import Notice, Refused


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_every_stage_has_a_verb(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([stage, "--help"])
    assert left.value.code == 0
    assert f"lotus {stage}" in capsys.readouterr().out


class Gone:
    """Watches a run, and is read by nobody after the first event."""

    def __init__(self) -> None:
        self.shown = 0

    def show(self, event: Event) -> None:
        self.shown += 1
        if self.shown > 1:
            raise BrokenPipeError


@pytest.mark.parametrize("works", [True, False])
def test_a_run_that_nobody_reads_on_is_saved_and_stops(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lotus.cli.run import _tell

    saved = []

    def events() -> Iterator[Event]:
        with StopFlag() if works else contextlib.nullcontext() as stop:
            try:
                for _ in range(5):
                    if stop:
                        raise KeyboardInterrupt(f"stopped ({stop.reason})")
                    yield Skipped("train")
            finally:
                saved.append(bool(stop))

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    gone: Any = Gone()
    with pytest.raises(KeyboardInterrupt, match="nobody reads its output"):
        _tell(events(), [gone])
    assert gone.shown == 2
    assert saved == [works]


def leaves(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value and "name" not in value:
            yield from leaves(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


def test_config_says_every_setting_with_its_default_and_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    told = capsys.readouterr().out
    lines = told.splitlines()
    for place, default in leaves(Config().model_dump(mode="json")):
        said = [line for line in lines if line.startswith(f"{place} = ")]
        if said:  # a model or a method that has a name is a section or one word
            shown = said[0].partition(" = ")[2]
            if isinstance(default, Mapping):
                assert shown == default["name"] or json.loads(shown) == default
            else:
                assert shown == default or json.loads(shown) == default, place
        else:
            assert f"\n{place}\n" in told or f"\n{place}." in told, place
    assert "Multiply-accumulates an image." in told
    assert "prune.search = null" in lines, "what is off says so, and what it would have is told below"
    assert any(line.startswith("prune.search.rounds = ") for line in lines)


def test_config_of_a_section_and_of_one_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "prune.keep"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "prune.keep"
    assert {line.split(" ")[0] for line in told if not line.startswith(" ")} == {
        "prune.keep", *(f"prune.keep.{name}" for name in Config().prune.keep.model_dump())
    }  # fmt: skip
    assert main(["config", "prune.keep.macs"]) == 0
    assert capsys.readouterr().out == "prune.keep.macs = 0.5\n    Multiply-accumulates an image.\n"
    assert main(["config", "prune.kep"]) == 2
    assert "Did you mean 'prune.keep'?" in capsys.readouterr().err
    assert main(["config", "prune.rank"]) == 2
    assert "prune.rank: is called prune.scope now. See: lotus config prune.scope" in capsys.readouterr().err


def test_config_of_a_config_is_what_a_run_resolves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("train: {epochs: 7, lr: 0.1}")
    assert main(["config", str(tmp_path / "mine.yaml"), "train.lr=0.2"]) == 0
    told = capsys.readouterr().out
    assert told == read(tmp_path / "mine.yaml", ["train.lr=0.2"]).yaml()
    (tmp_path / "config.yaml").write_text(told)
    assert main(["config", str(tmp_path)]) == 0
    assert "  lr: 0.2\n" in capsys.readouterr().out
    for words in (["train.lr", "train.lr=3"], [str(tmp_path), "--schema"], [str(tmp_path / "none.yaml")]):
        assert main(["config", *words]) == 2
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["prune", "--model", "vit", "--round", "16"], "--round: no such option. It is a setting: prune.round=16."),
        (["prune", "a.yaml", "--criterion=magnitude"], "It is a setting: prune.criterion=magnitude."),
        (["prune", "a.yaml", "--rank"], "It is a setting: prune.scope=VALUE."),
        (["prune", "a.yaml", "--rnd"], "--rnd: no such option. See: lotus prune --help"),
    ],
)
def test_a_flag_that_is_a_setting_is_told_so(given: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(given)
    assert told in capsys.readouterr().err


def test_the_schema_knows_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["additionalProperties"] is False
    assert main(["config", "export", "--schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(Config().export.model_dump())


def test_every_setting_has_its_sentence() -> None:
    assert [one.place for one in settings() if not one.sentence] == []
    schema = Config.model_json_schema()
    for name, section in {"the page": schema, **schema["$defs"]}.items():
        for setting, about in section.get("properties", {}).items():
            told = about if "description" in about else schema["$defs"][about["$ref"].rpartition("/")[2]]
            assert told["description"], f"{name}: {setting}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def bad(loss:", "line 1"),
        ("x = 1\nimport nothing_of_that_name", "line 2"),
        ("\n\n1 / 0", "line 3"),
        ("\nraise SystemExit(3)", "SystemExit: 3 (line 2)"),
    ],
)
def test_a_file_of_ones_own_that_cannot_be_imported_is_told_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    (tmp_path / "my file.py").write_text(text)
    assert main(["run", "configs/digits.yaml", "--with", str(tmp_path / "my file.py")]) == 2
    told = capsys.readouterr().err
    assert "my file.py: it cannot be imported" in told
    assert says in told


@pytest.mark.parametrize(("verb", "missing"), [("run", "config"), ("select", "signals"), ("plan", "config")])
def test_only_what_is_missing_is_asked_for(verb: str, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb])
    assert capsys.readouterr().err.rstrip().endswith(f"required: {missing}")


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (["inspect", "nowhere"], "nowhere: there is nothing. Give "),
        (["finetune", "nowhere"], "Give the weights of a model"),
        (["prepare", "configs/imagefolder.yaml"], "data.path=PHOTOS"),
    ],
)
def test_what_is_not_there_is_told_with_what_to_give(
    words: list[str], cure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert cure in told
    assert "--data" not in told


def told_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the terminal shows of a notice of ours and of a library's warning."""
    with warnings.catch_warnings():  # pytest's own record aside: as a process of its own
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: print("raw", message, file=sys.stderr))
        with notices_as_they_are():
            warnings.warn("the head starts anew", Notice, stacklevel=1)
            warnings.warn("Corrupt EXIF data", UserWarning, stacklevel=1)
    return capsys.readouterr().err


def test_warnings_of_libraries_stay_off_the_terminal_unless_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    assert told_of(capsys, monkeypatch) == "! the head starts anew\n"
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    assert told_of(capsys, monkeypatch) == "! the head starts anew\nraw Corrupt EXIF data\n"


def test_a_notice_is_said_once_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Each stage that starts from given weights makes the model anew: of its head one plain line is enough."""
    with warnings.catch_warnings(), notices_as_they_are():
        warnings.simplefilter("always")
        for text in ("the head starts anew", "positions were resampled", "the head starts anew"):
            warnings.warn(text, Notice, stacklevel=1)
    assert capsys.readouterr().err == "! the head starts anew\n! positions were resampled\n"


def test_a_config_that_is_shipped_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("imagefolder", "papers/dvbp"):
        assert read(f"configs/{name}.yaml").model_dump() == read(shipped(name)).model_dump()
    assert main(["run", "configs/nothing.yaml"]) == 2
    assert "configs/nothing.yaml: there is no such file or folder" in capsys.readouterr().err
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "imagefolder.yaml").write_text("seed: 7\n")
    assert read("configs/imagefolder.yaml").seed == 7, "one's own comes first"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_that_a_library_turned_into_an_error_still_stops(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader in Rust that calls Python says so: what was refused then is no fault of the user's."""

    def library(options: object) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt as inside:
            raise Refused("model.safetensors: it cannot be read") from inside
        return 0

    monkeypatch.setattr("lotus.cli.compare._compare", library)
    assert main(["compare", "runs/a"]) == STOPPED
    assert "goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "then", "code"),
    [("SIGINT", "SIGTERM", STOPPED), ("SIGTERM", "SIGINT", STOPPED), ("", "SIGTERM", -signal.SIGTERM), ("", "SIGINT", -signal.SIGINT)],
)  # fmt: skip
def test_who_leaves_as_asked_is_not_ended_by_a_signal_that_follows(first: str, then: str, code: int) -> None:
    """As DeepSpeed's launcher sends SIGTERM after the Ctrl-C that its ranks had as well."""
    program = f"""
import signal, sys
from lotus.cli import stopping
signal.signal(signal.SIGINT, signal.default_int_handler)  # else it is ignored by what was started in the background
stopping.asked_once()
try:
    with stopping.terminated_like_interrupted():
        {f"signal.raise_signal(signal.{first})" if first else "pass"}
except KeyboardInterrupt:
    pass
signal.raise_signal(signal.{then})
sys.exit({STOPPED})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr


def test_an_interrupt_that_a_library_swallowed_ends_a_run_at_its_next_event(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = []

    def go(config: Config, **more: Any) -> Iterator[Event]:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        try:
            yield Skipped("prepare")
            yield Skipped("score")
        finally:
            left.append(True)

    monkeypatch.setattr("lotus.stages.go", go)
    assert main(["train", "configs/digits.yaml", "--plain"]) == STOPPED
    shown = capsys.readouterr()
    assert "prepare" in shown.out
    assert "score" not in shown.out
    assert left


def test_on_a_terminal_each_slow_import_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    slow = ["torch", "timm", "sklearn"]
    for name in slow:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with cli._FirstWord():
        finder = sys.meta_path[0]
        for name in ("torch", "json", "torch", "timm.models", "timm", "timm", "sklearn"):
            assert finder.find_spec(name, None) is None
        assert finder not in sys.meta_path
    assert capsys.readouterr().err.splitlines() == [f"lotus: importing {name}" for name in slow]
