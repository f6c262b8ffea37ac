"""``lotus prune --model``: a model that LOTUS never trained, its weights in a file, images in a folder."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lotus
from lotus import cli
from lotus.config import one_cut
from lotus.export import lines
from lotus.stages import outside
from lotus.vit import cost
from selection.errors import Refused

ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
FLAGS_OF_A_RUN = [["--again"], ["--dry-run"], ["--deepspeed_config", "mine.json"]]


def model(classes: int = 3) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **ARGS).eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for number, name in enumerate("abc"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 120, (20, 24, 3)) + 60 * number
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


def words(photos: Path, weights: Path, out: Path, *more: str) -> list[str]:
    given = [f"model.args.{name}={value}" for name, value in ARGS.items()]
    return ["prune", "--model", "vit_tiny_patch16_224", "--weights", str(weights), "--data", str(photos), "--keep", "macs=0.6",
            "--out", str(out), *given, *more]  # fmt: skip


@pytest.mark.parametrize("form", ["safetensors", "torch", "checkpoint", "folder"])
def test_weights_in_any_form(photos, tmp_path, form, capsys):
    state = model().state_dict()
    file = tmp_path / {"safetensors": "a.safetensors", "folder": "a"}.get(form, "a.pth")
    if form == "safetensors":
        save_file(state, file)
    elif form == "folder":
        lotus.save(model(), file)
    else:
        torch.save(
            state if form == "torch" else {"epoch": 3, "model": {f"module.{k}": v for k, v in state.items()}}, file
        )
    assert cli.main(words(photos, file, tmp_path / "small")) == 0
    told = capsys.readouterr().out
    assert "block   heads" in told
    assert "% after the cut" in told
    assert f"lotus.load('{tmp_path / 'small'}')" in told
    small = lotus.load(tmp_path / "small")
    assert lotus.verify(tmp_path / "small")
    assert small.num_classes == 3


@pytest.mark.slow  # that the widths load: tests/test_export.py
def test_equal_widths_load_by_the_printed_lines_with_timm_alone(photos, tmp_path, capsys):
    """In an interpreter of its own, which knows nothing of LOTUS."""
    save_file(model().state_dict(), tmp_path / "a.safetensors")
    assert cli.main(words(photos, tmp_path / "a.safetensors", tmp_path / "small", "prune.scope=uniform")) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    first = lines.index("import timm, safetensors.torch")
    end = next(i for i in range(first, len(lines)) if lines[i].startswith("model.load_state_dict("))
    code = "\n".join(lines[first : end + 1])
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    save_file({"images": images}, tmp_path / "images.safetensors")
    code += f"""
import sys
assert not any(name.partition(".")[0] in ("lotus", "selection") for name in sys.modules)
images = safetensors.torch.load_file({str(tmp_path / "images.safetensors")!r})["images"]
safetensors.torch.save_file({{"logits": model.eval()(images).detach()}}, {str(tmp_path / "logits.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    small: Any = lotus.load(tmp_path / "small")
    assert len({block.mlp.fc1.out_features for block in small.blocks}) == 1
    assert small.blocks[0].mlp.fc1.out_features < 192
    with torch.no_grad():
        torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], small(images))


def test_the_stream_its_inputs_and_sublayers_may_go_too(photos, tmp_path, capsys):
    save_file(model().state_dict(), tmp_path / "a.safetensors")
    shared = words(photos, tmp_path / "a.safetensors", tmp_path / "small", "prune.round=4", "--evaluate", "0")
    assert cli.main([*shared, "prune.embed_dim=0.75", "prune.sublayers=true"]) == 0
    assert lotus.load(tmp_path / "small").embed_dim == 36
    assert "timm alone cannot load it: " in capsys.readouterr().out
    assert cli.main([*shared, "prune.in_channels=true", "prune.criterion=magnitude"]) == 0
    assert cost.count(lotus.load(tmp_path / "small")).macs <= 0.6 * cost.count(model()).macs
    assert lotus.verify(tmp_path / "small")
    assert cli.main([*shared, "prune.embed_dim=2"]) == 2
    assert cli.main([*shared, "prune.in_channels=true", "--keep", "latency=0.5"]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["prune.embed_dim=0.05"], "prune.embed_dim: 8 of 48 channels leave 0."),
        (["--keep", "macs=0.7"], "--keep macs=0.7: there is a --keep macs already"),
        (["--keep", "0.5"], "--keep 0.5: write BUDGET=FRACTION, e.g. --keep macs=0.5"),
        (["prune.keep.macs=0.3"], "--keep macs=0.6: there is a setting prune.keep.macs=0.3 already. Give one"),
        (["--keep", "params=0.7", "prune.keep.params=0.3"], "--keep params=0.7: there is a setting prune.keep.params"),
        (["prune.keep={macs: 0.3}"], "--keep macs=0.6: there is a setting prune.keep={macs: 0.3} already"),
        (["--keep", "params=0.7", "params=0.8"], "--keep params=0.8: there is a --keep params already"),
        (
            ["--keep", "gates=0.7"],
            "prune.keep.gates: a fraction of all units is what one threshold leaves. Set prune.scope=threshold",
        ),
        (["--keep", "latency=0.7", "prune.scope=per_type"], "prune.keep.latency: is predicted for heads"),
        (["--out", "/proc/foo"], "--out /proc/foo: cannot be written"),
        (["prune.rond=4"], "prune.rond: no such setting. Did you mean 'round'?"),
        (["train.lr=0.1"], "train: no such setting. Here: seed, data, model, prune."),
        (["prune.search.kind=ratios"], "prune.search: is done by a run"),
        (["prune.method=soup"], "prune.method: soup is done by a run"),
        (["model.pos_embed_std=0.2"], "model.pos_embed_std: is how a model starts that is trained here"),
        (["prune.criterion=mine", "--with", "nowhere.py"], "--with nowhere.py: no such Python file"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_an_image_is_read(
    photos, tmp_path, capsys, monkeypatch, more, message
):
    save_file(model().state_dict(), tmp_path / "a.safetensors")
    monkeypatch.setattr("lotus.data.dataset.open_data", lambda *_: pytest.fail("the data were opened"))
    assert cli.main(words(photos, tmp_path / "a.safetensors", tmp_path / "small", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_criterion_is_told_before_the_weights_are_looked_for(photos, tmp_path, capsys):
    assert cli.main(words(photos, tmp_path / "nowhere.safetensors", tmp_path / "small", "prune.criterion=taylr")) == 2
    out, err = capsys.readouterr()
    assert "prune.criterion: there is no 'taylr'. Did you mean 'taylor'?" in err
    assert not out, "nothing has begun"


def test_one_threshold_leaves_a_part_of_all_units(photos, tmp_path):
    save_file(model().state_dict(), tmp_path / "a.safetensors")
    asked = words(
        photos,
        tmp_path / "a.safetensors",
        tmp_path / "small",
        "prune.scope=threshold",
        "prune.round=1",
        "--evaluate",
        "0",
    )
    asked[asked.index("macs=0.6")] = "gates=0.6"
    assert cli.main([*asked, "prune.rotate=false", "prune.criterion=magnitude"]) == 0
    left = sum(
        b.attn.num_heads * b.attn.head_dim + b.mlp.fc1.out_features for b in lotus.load(tmp_path / "small").blocks
    )
    assert left / (2 * (48 + 192)) == pytest.approx(0.6, abs=0.03)


def test_a_fast_multiple_is_measured(photos, tmp_path, monkeypatch, capsys):
    save_file(model().state_dict(), tmp_path / "a.safetensors")
    monkeypatch.setattr("lotus.pruning.latency.fast_multiple", lambda model, batch: 16)
    given = ["prune.round=auto", "--evaluate", "0", "prune.criterion=magnitude", "prune.rotate=false"]
    assert cli.main(words(photos, tmp_path / "a.safetensors", tmp_path / "small", *given)) == 0
    assert "multiples of 16" in capsys.readouterr().out
    assert all(block.mlp.fc1.out_features % 16 == 0 for block in lotus.load(tmp_path / "small").blocks)


def events(
    photos: Path, tmp_path: Path, *, keep: str = "macs=0.6", classes: int = 3, settings: tuple[str, ...] = ()
) -> list:
    save_file(model(classes).state_dict(), tmp_path / "a.safetensors")
    page = one_cut([
        "model.name=vit_tiny_patch16_224", f"model.args={ARGS}", f"model.weights={tmp_path / 'a.safetensors'}",
        f"data.path={photos}", f"data.name={'npz' if photos.suffix == '.npz' else 'imagefolder'}", f"prune.keep.{keep}", *settings,
    ])  # fmt: skip
    return list(outside.prune(outside.Job(page, str(tmp_path / "small"))))


def test_a_criterion_of_ones_own(photos, tmp_path):
    save_file(model().state_dict(), tmp_path / "a.safetensors")
    mine = tmp_path / "mine.py"
    mine.write_text("import numpy as np\n\ndef last(units):\n    return np.arange(units)\n")
    asked = words(photos, tmp_path / "a.safetensors", tmp_path / "small", "--evaluate", "0", "prune.criterion=last")
    assert cli.main(asked) == 2
    assert (
        cli.main([*asked, "--with", str(mine), "prune.rotate=false", "prune.compensate=none", "prune.embed_dim=null"])
        == 0
    )
    small: Any = lotus.load(tmp_path / "small")
    dense = model()
    units = small.blocks[0].mlp.fc1.out_features
    assert units < 192
    torch.testing.assert_close(small.blocks[0].mlp.fc1.weight, dense.blocks[0].mlp.fc1.weight[-units:])


def test_weights_for_other_images_are_refused_with_the_argument_that_fits(photos, tmp_path, capsys):
    save_file(model().state_dict(), tmp_path / "a.safetensors")
    asked = words(photos, tmp_path / "a.safetensors", tmp_path / "small")
    assert cli.main([word for word in asked if "img_size" not in word]) == 2
    assert capsys.readouterr().err.endswith(" in patches of 4: say model.args.img_size=16.\n")


def test_without_a_network_it_ends_at_once_with_a_cure(photos, monkeypatch, capsys):
    """The hub's own attempts would go on for half a minute. The port of an address of our own answers nothing."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(photos / "no cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it tries again"))
    asked = words(photos, Path("none"), Path("small"))
    del asked[asked.index("--weights") : asked.index("--weights") + 2]
    began = time.monotonic()
    assert cli.main(asked) == 2
    assert time.monotonic() - began < 10
    assert "Without a network give weights of your own: model.weights=FILE." in capsys.readouterr().err


def test_a_budget_that_is_mistyped_is_refused_before_anything_is_fetched(photos, capsys):
    assert cli.main(["prune", "--model", "vit_tiny_patch16_224", "--data", str(photos), "--keep", "mac=0.5"]) == 2
    assert "prune.keep.mac: no such setting. Did you mean 'macs'?" in capsys.readouterr().err


def test_what_happens_is_told(photos, tmp_path):
    seen = events(photos, tmp_path)
    steps = [event for event in seen if type(event).__name__ == "Step"]
    assert steps[-1].done == steps[-1].total == 24  # twice the 12 validation images
    assert max(step.total for step in steps) == 48  # twice 24 calibration images
    end = seen[-1]
    assert end.values["images"] == 24
    assert 0 <= end.values["top1"] <= 100
    assert end.values["top1_before"] == pytest.approx(top1(model(), photos))


def top1(vit: torch.nn.Module, photos: Path) -> float:
    """From the files, by timm's own transform and a plain forward."""
    right = total = 0
    for number, name in enumerate("abc"):
        for file in sorted((photos / "val" / name).iterdir()):
            with torch.no_grad():
                right += int(vit(by_timm(vit, file)[None]).argmax()) == number
            total += 1
    return 100 * right / total


def by_timm(vit: Any, file: Path) -> torch.Tensor:
    told = {**timm.data.resolve_model_data_config(vit), "input_size": (3, 16, 16)}
    return timm.data.create_transform(**told)(Image.open(file))  # type: ignore[no-any-return]


def test_other_classes_are_answered_by_the_model_itself(photos, tmp_path):
    seen = events(photos, tmp_path, classes=7)
    assert any("its own answers stand in for labels" in getattr(event, "text", "") for event in seen)
    assert set(seen[-1].values) == {"images", "agreement", "measured_on"}
    assert lotus.load(tmp_path / "small").num_classes == 7


def test_classes_go_by_their_names_and_stay_the_model_s(photos, tmp_path, capsys):
    """As many of other names are other classes: what is shipped keeps its own, and its license."""
    lotus.save(model(), tmp_path / "a", about={"classes": ["x", "y", "z"], "license": "mit"})
    asked = ["prune", "--model", str(tmp_path / "a"), "--data", str(photos), "--keep", "macs=0.6", "--out"]
    assert cli.main([*asked, str(tmp_path / "small")]) == 0
    assert "tells 3 apart: 'x' where the data has 'a'" in " ".join(capsys.readouterr().out.split())
    about = lotus.pruning.spec.read(tmp_path / "small")["about"]
    assert (about["classes"], about["license"]) == (["x", "y", "z"], "mit")


def test_a_backbone_is_measured_by_its_features(photos, tmp_path):
    seen = events(photos, tmp_path, classes=0)
    assert any("has no classifier" in getattr(event, "text", "") for event in seen)
    assert set(seen[-1].values) == {"images", "likeness"}
    small, whole = lotus.load(tmp_path / "small"), model(0)
    assert small.num_classes == 0
    files = [file for name in "abc" for file in sorted((photos / "val" / name).iterdir())]
    images = torch.stack([by_timm(whole, file) for file in files])
    with torch.no_grad():
        a, b = small(images), whole(images)
    cosine = ((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean()
    assert seen[-1].values["likeness"] == pytest.approx(float(cosine), abs=1e-3)


@pytest.mark.parametrize("form", ["folder", "npz"])
def test_images_of_one_class_will_do_where_the_model_answers_itself(photos, tmp_path, form):
    for part in ("train", "val"):
        shutil.copytree(photos / part / "a", tmp_path / "some" / part / "pictures")
    if form == "npz":
        pixels = np.zeros((12, 20, 24, 3), np.uint8)
        np.savez(
            tmp_path / "some.npz", x_train=pixels, y_train=np.zeros(12, int), x_test=pixels, y_test=np.zeros(12, int)
        )
    seen = events(tmp_path / ("some.npz" if form == "npz" else "some"), tmp_path)
    assert any("The data has 1 class, the model tells 3 apart" in getattr(event, "text", "") for event in seen)
    assert seen[-1].values["images"] == (12 if form == "npz" else 8)
    assert set(seen[-1].values) == {"images", "agreement", "measured_on"}


def test_one_folder_of_classes_is_split_and_said(photos, tmp_path):
    seen = events(photos / "train", tmp_path, settings=("prune.calibration=5",))
    assert any("There is no val folder" in getattr(event, "text", "") for event in seen)
    assert seen[-1].values["images"] == 5


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_a_pickle_is_never_run(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, write in (
        ("a.pth", lambda file: torch.save({"model": model().state_dict(), "args": Evil()}, file)),
        ("b.pth", lambda file: file.write_bytes(pickle.dumps(Evil()))),
    ):
        write(tmp_path / name)
        assert cli.main(words(photos, tmp_path / name, tmp_path / "small")) == 2
        assert "no state dict of tensors alone" in capsys.readouterr().err
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "small").exists()


def test_what_cannot_be_done_is_refused_before_an_image_is_read(photos, tmp_path, capsys, monkeypatch):
    file = tmp_path / "a.safetensors"
    save_file(model().state_dict(), file)
    bad = {**model().state_dict(), "norm.bias": torch.zeros(7)}
    save_file(bad, tmp_path / "bad.safetensors")
    nan = {**model().state_dict(), "norm.bias": torch.full((48,), torch.nan)}
    save_file(nan, tmp_path / "nan.safetensors")
    for given, message in (
        (["prune"], "Give a CONFIG, or --model NAME"),
        (["prune", "--keep", "macs=0.5"], "--keep belongs to --model"),
        (["prune", "a.yaml", "--evaluate", "8"], "--evaluate belongs to --model"),
        (["prune", "prune.round=8"], "prune.round=8: there is no such file or folder"),
        (words(photos, file, tmp_path / "o", "prune.embed_dim=[1"), "not valid YAML"),
        (["prune", "a.yaml", *words(photos, file, tmp_path)[1:]], "takes no config"),
        (words(photos, file, tmp_path / "o")[:5], "--data is missing"),
        (words(photos, file, tmp_path / "o", "--keep", "macs"), "write BUDGET=FRACTION"),
        (words(photos, file, tmp_path / "o", "--keep", "mac=0.5"), "Did you mean 'macs'"),
        (words(photos, file, tmp_path / "o", "--keep", "params=0.001"), "out of reach"),
        (
            words(photos, file, tmp_path / "o", "--keep", "latency=0.9", "prune.decouple_qk=true"),
            "without prune.decouple_qk",
        ),
        (words(photos, file, tmp_path / "o", "prune.criterion=fischer"), "Did you mean 'fisher'"),
        (words(photos, tmp_path / "bad.safetensors", tmp_path / "o"), r"norm.bias is (7,), not (48,)"),
        (words(photos, tmp_path / "nan.safetensors", tmp_path / "o"), "norm.bias: holds values that are not finite"),
        (words(photos, tmp_path / "absent.pth", tmp_path / "o"), "cannot be read"),
        (words(tmp_path / "nowhere", file, tmp_path / "o"), "nowhere"),
        (words(photos, file, tmp_path / "o", "prune.calibration=0"), "prune.calibration"),
        *(
            (words(photos, file, tmp_path / "o", *flag), f"is no run, and takes no {flag[0]}")
            for flag in FLAGS_OF_A_RUN
        ),
    ):
        assert cli.main(given) == 2, given
        assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_only_what_it_wrote_itself_is_written_over(photos, tmp_path, capsys, monkeypatch):
    file, trained, foreign = tmp_path / "a.safetensors", tmp_path / "trained", tmp_path / "foreign"
    save_file(model().state_dict(), file)
    lotus.save(model(), trained)
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("all of it")
    before = (trained / "spec.json").read_bytes()
    with monkeypatch.context() as patched:  # refused before any work
        patched.setattr("lotus.vit.model.adopt", lambda *_: pytest.fail("the model was loaded"))
        for out, more, message in (
            (trained, [], "--force to write over it"),
            (foreign, [], "no model of LOTUS"),
            (foreign, ["--force"], "no model of LOTUS"),
            (file, ["--force"], "no model of LOTUS"),
        ):
            assert cli.main(words(photos, file, out, "--evaluate", "0", *more)) == 2
            assert message in capsys.readouterr().err
    assert (trained / "spec.json").read_bytes() == before
    assert (foreign / "thesis.txt").read_text() == "all of it"
    for keep, more in (("0.7", ["--force"]), ("0.5", [])):  # the second time it is its own
        given = words(
            photos, file, trained, "--evaluate", "0", "prune.criterion=magnitude", "prune.rotate=false", *more
        )
        given[given.index("macs=0.6")] = f"macs={keep}"
        assert cli.main(given) == 0
    assert sum(p.numel() for p in lotus.load(trained).parameters()) < sum(p.numel() for p in model().parameters())


def test_an_exported_folder_is_written_over_and_files_of_others_are_not(photos, tmp_path, capsys, monkeypatch):
    file, out = tmp_path / "a.safetensors", tmp_path / "small"
    save_file(model().state_dict(), file)
    lotus.save(model(), out, about={"made_by": outside.MADE_BY})
    assert cli.main(["export", str(out)]) == 0
    assert cli.main(words(photos, file, out)) == 0
    assert not (out / "export").exists(), "of the older model"
    (out / "export").mkdir()
    (out / "export" / "notes.txt").write_text("mine")
    monkeypatch.setattr(outside, "batches_of", lambda *_: pytest.fail("an image was read"))
    capsys.readouterr()
    assert cli.main(words(photos, file, out)) == 2
    assert "files that LOTUS did not write" in capsys.readouterr().err
    assert (out / "export" / "notes.txt").read_text() == "mine"


def clock(vit, *_, **__):
    return 1.0 + sum(block.mlp.fc1.out_features + block.attn.qkv.out_features for block in vit.blocks) / 100


def test_a_budget_of_latency(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "latency", clock)
    seen = events(photos, tmp_path, keep="latency=0.8", settings=("prune.latency_batch=3",))
    told = [getattr(event, "text", "") for event in seen]
    assert any("Latency at batch 3 on cpu" in text and "asked 0.8" in text for text in told)
    assert any(getattr(event, "unit", "") == "timings" for event in seen)
    assert clock(lotus.load(tmp_path / "small")) / clock(model()) == pytest.approx(0.8, rel=0.04)


def test_several_budgets_hold_together(photos, tmp_path, monkeypatch, capsys):
    """However they are written, and whichever of them is the tighter one."""
    monkeypatch.setattr(cost, "latency", clock)
    save_file(model().state_dict(), tmp_path / "a.safetensors")
    asked = words(photos, tmp_path / "a.safetensors", tmp_path / "small", "prune.latency_batch=3", "prune.round=2")
    asked += ["prune.criterion=magnitude", "prune.rotate=false", "--evaluate", "0"]
    at = asked.index("macs=0.6")
    for given, tight in (
        (["macs=0.5", "latency=0.95"], "macs"),
        (["macs=0.95", "--keep", "latency=0.6"], "latency"),
    ):
        assert cli.main([*asked[:at], *given, *asked[at + 1 :]]) == 0
        told = capsys.readouterr().out
        assert f"asked {given[-1].partition('=')[2]}, predicted" in told
        small = lotus.load(tmp_path / "small")
        left = {"macs": cost.count(small).macs / cost.count(model()).macs, "latency": clock(small) / clock(model())}
        want = {one.partition("=")[0]: float(one.partition("=")[2]) for one in given if "=" in one}
        assert all(left[what] <= part * 1.02 for what, part in want.items())
        assert left[tight] > want[tight] - 0.05
        assert f"({left['macs']:.3f})" in told


def test_a_damaged_picture_is_named(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "some")
    (tmp_path / "some" / "train" / "a" / "3.png").write_bytes(b"no picture")
    with pytest.raises(Refused, match=r"a/3\.png: cannot be read"):
        events(tmp_path / "some", tmp_path)


def test_its_folder_is_exported_as_a_run_is(photos, tmp_path, capsys):
    lotus.save(
        lotus.prune(model(), [torch.randn(4, 3, 16, 16)], {"macs": 0.6}, criterion="magnitude"), tmp_path / "small"
    )
    assert cli.main(["export", str(tmp_path / "small")]) == 0
    told, written = capsys.readouterr().out, {file.name for file in (tmp_path / "small" / "export").iterdir()}
    assert "MODEL.md" in written
    assert all(name in told for name in written)
    page = (tmp_path / "small" / "export" / "MODEL.md").read_text()
    assert 'lotus.load("small")' in page or "timm.safetensors" in written
    assert lotus.verify(tmp_path / "small")
    for words, why in (
        (["seed=1"], "is a model, not a run, and takes no seed=1"),
        (["export.latency_batch=2"], "takes no export.latency_batch=2"),
        (["data.path=x"], "images are read for 8 bits alone"),
        (["export.int8=true"], "Say where some are: data.path=PHOTOS"),
        (["export.int8=true", "export.onnx=false", f"data.path={photos}"], "is made of model.onnx"),
    ):
        assert cli.main(["export", str(tmp_path / "small"), *words]) == 2
        assert why in capsys.readouterr().err
    for flag in [*FLAGS_OF_A_RUN, ["--plain"]]:
        assert cli.main(["export", str(tmp_path / "small"), *flag]) == 2
        assert f"is a model, not a run, and takes no {flag[0]}. Leave it out." in capsys.readouterr().err


def test_a_model_of_no_run_is_exported_in_8_bits_of_pixels(photos, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    lotus.save(model(), tmp_path / "m", about={"classes": ["a", "b", "c"]})
    asked = ["export", str(tmp_path / "m"), "export.int8=true", "export.onnx_input=uint8", f"data.path={photos}"]
    assert cli.main(asked) == 0
    told = capsys.readouterr().out
    found = re.search(r"top-1 ([\d.]+) and ([\d.]+) on 12 images", told)
    assert found is not None
    assert float(found[1]) == pytest.approx(top1(lotus.load(tmp_path / "m"), photos), abs=0.01)
    assert "model.int8.onnx" in told
    for page in ("MODEL.md", "README.md"):
        said = (tmp_path / "m" / "export" / page).read_text()
        assert "`model.int8.onnx`" in said
        assert f"Top-1 {found[2]} ±" in said
    pictures = [str(file) for file in sorted((photos / "val" / "a").iterdir())]
    both = []
    for name in ("model.onnx", "model.int8.onnx"):
        assert cli.main(["predict", str(tmp_path / "m" / "export" / name), *pictures, "--json"]) == 0
        both.append([one["probability"] for one in json.loads(capsys.readouterr().out)])
    assert np.allclose(both[0], both[1], atol=0.1)


def test_where_timm_holds_the_widths_its_lines_are_printed(capsys):
    from lotus.report.terminal import pruned_page

    held = {"name": "vit_tiny_patch16_224", "args": {"depth": 2}, "file": "model.safetensors"}
    pruned_page("the plan", {"top1": 50.0, "top1_before": 60.0}, "small", lines(held, Path("small")))
    told = capsys.readouterr().out
    assert "50.00 % after the cut, 60.00 % before" in told
    assert "model = timm.create_model('vit_tiny_patch16_224', depth=2)" in told
    assert "load_file('small/model.safetensors')" in told
    pruned_page("the plan", {"agreement": 50.0}, "small")
    assert "Without LOTUS" not in capsys.readouterr().out


def test_a_folder_that_says_itself_what_it_is_needs_no_name(photos, tmp_path, capsys):
    """`lotus prune --model FOLDER`, as `lotus finetune FOLDER`; a file of weights asks for the name."""
    lotus.save(model(), tmp_path / "ours")
    settings = ["--keep", "macs=0.6", "--evaluate", "0", "prune.round=4", "--out", str(tmp_path / "small")]
    assert cli.main(["prune", "--model", str(tmp_path / "ours"), "--data", str(photos), *settings]) == 0
    assert cost.count(lotus.load(tmp_path / "small")).macs <= 0.6 * cost.count(model()).macs
    save_file(model().state_dict(), tmp_path / "a.safetensors")
    capsys.readouterr()
    assert cli.main(["prune", "--model", str(tmp_path / "a.safetensors"), "--data", str(photos), *settings]) == 2
    assert "Say of which model: --model NAME --weights" in capsys.readouterr().err


def test_weights_that_are_no_file_or_of_no_vit_are_told_from_by_the_cure(photos, tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:200])
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    for name, cure in (
        ("nowhere.pth", "nothing is there. Give a file of weights, or the folder of a model."),
        ("cut.pth", "Is it whole"),
        ("module.pth", "Save model.state_dict(), best as .safetensors."),
        ("whole.pth", "take a timm ViT's."),
    ):
        assert cli.main(words(photos, tmp_path / name, tmp_path / "small")) == 2
        told = capsys.readouterr().err
        assert name in told, told
        assert cure in told or (name == "cut.pth" and "Save model.state_dict()" in told), told
        assert "starts anew" not in told, "of weights that are refused nothing else is said"
    assert not (tmp_path / "small").exists()
