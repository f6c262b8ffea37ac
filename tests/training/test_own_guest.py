"""The guide's guest and schedule, from its own text: in a training, from the command line, and when the text changes."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny import recipe, same, train

from lotus.cli import main
from lotus.config import Method, check
from lotus.events import Step
from lotus.run import Run
from lotus.stages import STAGES
from lotus.training import named
from lotus.training.guests import Guest, Seen
from selection.errors import Refused

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
COMMANDS = [command for command in re.findall(r"```\n(lotus .*?)\n```", GUIDE) if "PATH" not in command]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text("\n\n".join(CODE), encoding="utf-8")
    return file


def loaded(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mine", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_guides_guest_trains_on_the_hardest(tmp_path: Path, mine: Path) -> None:
    module = loaded(mine)
    wanted = (Method.model_validate({"name": "hard_examples", "part": 0.25}),)
    named.check(wanted, [module], place="train.guests")
    (hardest,) = named.chosen(wanted, {}, [module], place="train.guests")
    losses = torch.tensor([1.0, 3.0, 0.5, 2.0, 4.0, 0.1, 0.2, 0.3])
    assert hardest.losses(losses, None).tolist() == [0, 3, 0, 0, 4, 0, 0, 0]  # type: ignore[arg-type]

    class Counting(Guest):
        def losses(self, losses: torch.Tensor, seen: Seen) -> torch.Tensor:
            kept.append(int((losses > 0).sum()))
            return losses

    kept: list[int] = []
    done = train(tmp_path / "run", recipe(epochs=1), guests=[hardest, Counting()])
    assert kept == [2] * 6 + [1]
    plain = train(tmp_path / "plain", recipe(epochs=1))
    assert not same(done.fitted.state, plain.fitted.state)


def test_the_guides_schedule(tmp_path: Path, mine: Path) -> None:
    settings = recipe(epochs=2, warmup_epochs=1, schedule="steady")
    now = iter(range(10**6))
    done = train(tmp_path / "run", settings, shelves=[loaded(mine)], clock=lambda: float(next(now)))
    rates = [event.values["lr"] for event in done.events if isinstance(event, Step)]
    np.testing.assert_allclose(rates, [3e-3 * min(1, (step + 1) / 8) for step in range(14)])


def test_a_stage_goes_by_the_text_of_the_file(tmp_path: Path, mine: Path) -> None:
    page = check({"folder": str(tmp_path), "train": {"guests": ["hard_examples", "late_average"]}})
    run = Run(page, STAGES, [loaded(mine)])
    assert set(run.own("train")) == {"train.guests.hard_examples"}
    alone = Run(check({"folder": str(tmp_path), "train": {"guests": ["hard_examples"]}}), STAGES, [loaded(mine)])
    assert not alone.own("baseline")
    assert "hard_examples" not in str(alone.settings("baseline"))
    assert check({"train": {"guests": ["hard_examples"]}}).train.guests == (Method(name="hard_examples"),)


@pytest.mark.slow
def test_the_guides_commands(tmp_path: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["model.args.embed_dim=32", "model.args.depth=2", "model.args.num_heads=2", "train.epochs=2",
             "select.keep=1", "train.ema=0.9"]  # fmt: skip
    assert len(COMMANDS) == 3
    for number, command in enumerate(COMMANDS):
        words = [{"CONFIG": str(ROOT / "configs" / "staged.yaml"), "mine.py": str(mine)}.get(word, word)
                 for word in shlex.split(command)[1:]]  # fmt: skip
        folder = tmp_path / str(number)
        assert main([*words, *short, f"folder={folder}", f"data.folder={tmp_path / 'data'}"]) == 0, capsys.readouterr()
        assert (folder / "train" / "spec.json").exists()
    text = mine.read_text()
    mine.write_text(text.replace("0.5", "0.4"))
    capsys.readouterr()
    assert main([*words, *short, f"folder={folder}", f"data.folder={tmp_path / 'data'}"]) == 0
    assert "mine.py" not in capsys.readouterr().err


def test_a_linear_probe_goes_by_our_schedules_alone(mine: Path) -> None:
    from lotus.stages.checks import check as look

    page = check({"score": {"proxy": "linear_probe", "schedule": "steady"}, "train": {"schedule": "steady"}})
    with pytest.raises(Refused, match=r"score\.schedule: .*'steady'"):
        look(page, [loaded(mine)])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("train.guests=[hardst]", r"train\.guests: there is no 'hardst'"),
        ("finetune.guests=[{name: hard_examples, prt: 1}]", r"finetune\.guests\.hard_examples\.prt.*part"),
        ("train.guests=hard_examples", r"train\.guests"),
        ("train.schedule=stedy", r"train\.schedule: there is no 'stedy'.*'steady'"),
        ("train.sparsity.penalty=proximl", r"train\.sparsity\.penalty: there is no 'proximl'.*'proximal'"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_done(tmp_path: Path, mine: Path, words: str, says: str) -> None:
    from lotus.config import read
    from lotus.stages.checks import check as look

    def asked() -> None:
        look(read(ROOT / "configs" / "staged.yaml", [f"folder={tmp_path}", words]), [loaded(mine)])

    with pytest.raises(Refused, match=says):
        asked()


BAD = """from lotus.training.guests import Guest
class Boo(Guest):
    def {moment}:
        {body}
def boo():
    return Boo()
"""


@pytest.mark.parametrize(
    ("moment", "body", "says"),
    [
        (
            "losses(self, losses, seen)",
            "raise ValueError('boo')",
            r" \(losses\): ValueError: boo \(bad\.py, line 4\)\.$",
        ),
        ("losses(self, losses, seen)", "return None", r": losses gave a NoneType\. Return what .*Guest\.losses says"),
        ("losses(self, losses, seen)", "return losses.mean()", r": losses gave a tensor of shape \(\) .*each image"),
        ("state(self)", "return 3", r": state gave a int\."),
        ("state(self)", "return {'a': 3}", r": state gave {'a': 'int'}\."),
        ("close_epoch(self, at)", "yield 1 / 0", r" \(close_epoch\): ZeroDivisionError: .*line 4"),
        ("evaluating(self)", "return 3", r": evaluating gave a int\."),
        ("attach(self)", "pass", r" \(attach\): TypeError: "),
    ],
)
def test_one_that_goes_wrong_in_a_moment_is_refused_with_its_place(
    tmp_path: Path, moment: str, body: str, says: str
) -> None:
    (tmp_path / "bad.py").write_text(BAD.format(moment=moment, body=body))
    wanted = (Method(name="boo"),)
    guests = named.chosen(wanted, {}, [loaded(tmp_path / "bad.py")], place="train.guests")
    with pytest.raises(Refused, match=r"^train\.guests\.boo" + says):
        train(tmp_path / "run", recipe(epochs=1), guests=guests)


def test_one_whose_state_is_none_is_refused_before_the_first_step(tmp_path: Path) -> None:
    losses = "    def losses(self, losses, seen):\n        STEPS.append(1)\n        return losses\n"
    bad = BAD.format(moment="state(self)", body="return [3]").replace("def boo()", f"{losses}STEPS = []\ndef boo()")
    (tmp_path / "bad.py").write_text(bad)
    module = loaded(tmp_path / "bad.py")
    guests = named.chosen((Method(name="boo"),), {}, [module], place="train.guests")
    with pytest.raises(Refused, match=r"^train\.guests\.boo: state gave a list\."):
        train(tmp_path / "run", recipe(epochs=1), guests=guests)
    assert module.STEPS == []


def test_one_that_is_named_twice_is_refused_before_anything_is_done() -> None:
    twice = (Method(name="late_average"), Method(name="late_average"))
    with pytest.raises(Refused, match=r"^train\.guests: 'late_average' is named twice"):
        named.check(twice, [], place="train.guests")
