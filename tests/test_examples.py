"""Every script of examples/ runs, and shows what it says it shows."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
SHORT = [
    "model.args.embed_dim=32", "model.args.depth=2", "model.args.num_heads=2", "score.epochs=2", "train.epochs=2",
    "finetune.epochs=1", "prune.calibration=128", "train.batch_size=128", "export.onnx=false", "export.latency_batch=8",
]  # fmt: skip


def main_of(name: str) -> Callable[..., dict[str, Any]]:
    main: Callable[..., dict[str, Any]] = runpy.run_path(str(ROOT / "examples" / name))["main"]
    return main


def test_every_example_is_here_and_named() -> None:
    assert EXAMPLES == ["choose_images.py", "prune_your_model.py", "whole_run.py"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in EXAMPLES if f"examples/{name}" not in readme] == []


@pytest.mark.slow
def test_images_are_chosen_without_torch() -> None:
    code = (
        "import runpy, sys\n"
        "reached = runpy.run_path('examples/choose_images.py')['main'](starts=1)\n"
        "assert reached['hardest'] > reached['random'], reached\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all images" in done.stdout


@pytest.mark.slow
def test_a_model_of_ones_own_is_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    reached = main_of("prune_your_model.py")(epochs=8)
    assert 0.33 < reached["macs"] <= 0.35
    assert reached["cut"] > reached["dense"] - 3 > 70
    assert "MLP units" in capsys.readouterr().out


@pytest.mark.slow
def test_a_whole_run_goes_from_python_and_a_second_one_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, folder = main_of("whole_run.py"), str(tmp_path / "run")
    first = main(folder, *SHORT)
    assert first["kept"]["images"]["kept"] == round(0.4 * 1438)
    assert "prune: begins" in capsys.readouterr().out
    assert main(folder, *SHORT) == first
    assert "begins" not in capsys.readouterr().out
