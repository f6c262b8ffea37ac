"""The whole: measure, score, fit, cut, compensate."""

from __future__ import annotations

import copy
import functools
import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from few import few
from masking import masked
from tiny_vits import CLASSES, FAST, KINDS, UNLIKE, asks, batches, pictures, shelf, tiny
from torch.nn import functional

import lotus
from lotus.pruning import Given, budget, criteria, latency, lottery, measure, prune, spec, study
from lotus.pruning.study import forwards_of
from lotus.vit import anatomy, cost
from selection import methods
from selection.errors import Refused

READ_NO_GATES = [name for name in methods.names(criteria) if "gates" not in methods.reads(getattr(criteria, name))]


def gates(model, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {site: torch.rand(linear.in_features, generator=draw) for site, linear in anatomy.sites(model).items()}


@pytest.mark.parametrize("kind", few(KINDS, FAST))
def test_any_kind_is_pruned_within_its_budget(kind, tmp_path):
    model = tiny(kind)
    before = copy.deepcopy(model.state_dict())
    small = prune(model, batches(), {"macs": 0.5})
    share = cost.count(small).macs / cost.count(model).macs
    assert 0.47 < share <= 0.5
    assert small(pictures()).shape == (8, CLASSES)
    assert not small.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
    with torch.no_grad():
        assert torch.equal(spec.load(spec.save(small, tmp_path / "small"))(pictures()), small(pictures()))


@pytest.mark.parametrize("embed_dim", [None, 0.75])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("name", ["fisher", "hessian", "variance", "magnitude"])
def test_what_looking_takes_is_known_before(name, rotate, embed_dim):
    for compensate in ("none", "affine"):
        request = asks({"macs": 0.5}, criterion=name, rotate=rotate, embed_dim=embed_dim, compensate=compensate)
        drawn = lottery(tiny(), batches(), request)
        assert drawn.forwards == forwards_of(request) * sum(len(labels) for _, labels in batches())


@pytest.mark.parametrize("kind", few(KINDS, UNLIKE))
def test_what_is_told_is_what_the_models_cost(kind):
    """Whether a block keeps its heads whole (timm's own attention comes back) or not."""
    model = tiny(kind)
    studied = study(model, batches(1), asks(criterion="magnitude", rotate=False, compensate="none"))

    def counted(one: torch.nn.Module) -> dict[str, int]:
        found = cost.count(one)
        return {"params": sum(weight.numel() for weight in one.parameters()), "macs": found.macs}

    for part in (1.0, 0.9, 0.5):
        for drawn in (studied.draw(asks({"params": part})), *studied.nested(asks(), [{"params": part}])):
            assert drawn.before == counted(model)
            assert drawn.after == counted(drawn.model)


def test_what_is_no_model_is_refused():
    with pytest.raises(Refused, match=r"^prune: a str "):
        prune("vit_tiny_patch16_224", batches(), {"macs": 0.5})


@pytest.mark.parametrize(
    ("name", "scope", "width"),
    few(
        [*itertools.product(READ_NO_GATES, ["global", "per_type"], ["auto"]), *itertools.product(READ_NO_GATES, ["global"], [1])],
        lambda one: one[2] == 1 or one == ("fisher", "per_type", "auto"),
    ),
)  # fmt: skip
def test_every_criterion_and_rank(name, scope, width):
    model = tiny()
    request = asks({"macs": 0.6, "params": 0.7}, criterion=name, scope=scope, compensate="mean", embed_dim=width)
    drawn = lottery(model, batches(), request)
    assert drawn.after["macs"] <= 0.6 * drawn.before["macs"]
    assert drawn.after["params"] <= 0.7 * drawn.before["params"]
    counted = cost.count(drawn.model)
    assert drawn.after == {"params": counted.params, "macs": counted.macs}
    again = lottery(model, batches(), request)
    assert again.plan == drawn.plan


def test_one_study_serves_any_budget():
    model, data = tiny(), batches()
    studied = study(model, data, asks(criterion="fisher"))
    for keep in (0.7, 0.4):
        drawn = lottery(model, data, asks({"macs": keep}, criterion="fisher", round=4, embed_dim=None))
        again = studied.draw(asks({"macs": keep}, round=4))
        assert again.plan == drawn.plan
        assert (again.forwards, again.images) == (drawn.forwards, drawn.images) == (96, 24)
        with torch.no_grad():
            assert torch.equal(again.model(pictures()), drawn.model(pictures()))


def test_learned_gates():
    model = tiny()
    learned = gates(model)
    learned["blocks.0.mlp"][7] = 0
    drawn = lottery(model, batches(), asks({"macs": 0.5}, criterion="gate"), Given(gates=learned))
    assert 7 not in drawn.plan.blocks[0].units
    np.testing.assert_allclose(drawn.scores["blocks.1.mlp"], learned["blocks.1.mlp"].double())
    v = drawn.scores["blocks.0.attn"].reshape(3, 16).sum(1)
    np.testing.assert_allclose(drawn.scores["blocks.0.qk"].reshape(3, 16).sum(1), v)
    with pytest.raises(Refused, match=r"gate of blocks\.0\.attn"):
        prune(model, batches(), {"macs": 0.5}, criterion="gate")
    with pytest.raises(Refused, match="9 gates for the 192 units"):
        prune(model, batches(), {"macs": 0.5}, criterion="gate", gates={**learned, "blocks.0.mlp": torch.ones(9)})


def test_gradients_are_those_of_each_image_alone():
    model, data = tiny(dtype=torch.float64), batches(2, 3, torch.float64)
    found = measure.measure(model, data, gradients=True, moments="none").gradients
    images, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    assert found["blocks.1.mlp"].shape == (6, 192)
    step, image, head, dim = 1e-5, 4, 1, 3
    block = model.blocks[0]

    def loss(weights: dict[str, torch.Tensor]) -> float:
        changed = torch.func.functional_call(model, weights, (images[image : image + 1],))
        return functional.cross_entropy(changed, labels[image : image + 1]).item()

    # A gate of 1 + e on an MLP unit is a column of fc2 times 1 + e; on a query dimension, a row of q.
    for site, name, where in (
        ("blocks.0.mlp", "blocks.0.mlp.fc2.weight", (slice(None), 17)),
        ("blocks.0.attn", "blocks.0.attn.proj.weight", (slice(None), head * 16 + dim)),
        ("blocks.0.qk", "blocks.0.attn.qkv", head * 16 + dim),
    ):
        slopes = []
        for sign in (1, -1):
            names = [name] if name.endswith("weight") else [f"{name}.weight", f"{name}.bias"]
            weights = {n: model.get_parameter(n).detach().clone() for n in names}
            for weight in weights.values():
                weight[where] *= 1 + sign * step
            slopes.append(loss(weights))
        unit = 17 if site.endswith("mlp") else head * 16 + dim
        assert found[site][image, unit] == pytest.approx((slopes[0] - slopes[1]) / (2 * step), rel=1e-3, abs=1e-7)
    assert block.attn.proj.weight.grad is None


@pytest.mark.parametrize("kind", ["layerscale", "no_bias"])
def test_squares_are_of_each_image_alone(kind):
    """Against autograd, an image at a time, by every weight; frozen weights are seen too."""
    model, data = tiny(kind, dtype=torch.float64), batches(2, 3, torch.float64)
    model.blocks[1].mlp.fc1.weight.requires_grad_(False)
    found = measure.measure(model, data, gradients=False, moments="none", squares=True).squares
    model.requires_grad_(True)
    for name in ("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"):
        linear, squares = model.get_submodule(name), []
        for images, labels in data:
            for image, label in zip(images, labels, strict=True):
                loss = functional.cross_entropy(model(image[None]), label[None])
                slopes = torch.autograd.grad(loss, list(linear.parameters()))
                squares.append(torch.cat([slope.reshape(len(linear.weight), -1) for slope in slopes], dim=1).square())
        want = torch.stack(squares).mean(0).numpy()
        site = name.replace("attn.", "").replace("mlp.", "")
        np.testing.assert_allclose(found[site][:, : want.shape[1]], want, rtol=1e-4, atol=1e-12)
    assert all(weight.grad is None for weight in model.parameters())


def test_hessian_is_the_loss_lost_with_each_weight_to_second_order():
    """The score of an MLP unit of a block with LayerScale, from autograd alone."""
    model, data = tiny("layerscale", dtype=torch.float64), batches(2, 3, torch.float64)
    scores = lottery(model, data, asks({"macs": 0.5}, criterion="hessian", rotate=False)).scores["blocks.1.mlp"]
    mlp, want = model.blocks[1].mlp, np.zeros(192)
    for images, labels in data:
        for image, label in zip(images, labels, strict=True):
            loss = functional.cross_entropy(model(image[None]), label[None])
            weights = [mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight]
            into, bias, out = (
                (weight * slope).detach().square().numpy()
                for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True)
            )
            want += 0.5 * (into.sum(1) + bias + out.sum(0)) / 6
    np.testing.assert_allclose(scores, want, rtol=1e-4)


def test_covariance_of_query_and_key_dimensions_is_that_of_what_they_add_to_a_logit():
    """With every query of the calibration beside every centered key, as the moments have it."""
    model, data = tiny(dtype=torch.float64), batches(1, 3, torch.float64)
    read = []
    with model.blocks[0].attn.qkv.register_forward_hook(lambda _, __, out: read.append(out)), torch.no_grad():
        model(data[0][0])
    q, k = (read[0][..., i * 48 : i * 48 + 48].unflatten(-1, (3, 16))[..., 1, :] for i in (0, 1))  # head 1
    k = k - k.mean(dim=1, keepdim=True)
    added = (q.flatten(0, 1)[:, None] * k.flatten(0, 1)[None]).flatten(0, 1).numpy()  # (pairs, 16)
    scores = lottery(model, data, asks({"macs": 0.5}, criterion="variance", rotate=False)).scores["blocks.0.qk"]
    np.testing.assert_allclose(scores[16:32], (added**2).mean(axis=0), rtol=1e-6)
    seen = dict[int, Any]()

    def spy(covariance: np.ndarray, gain: np.ndarray) -> np.ndarray:
        seen.setdefault(len(seen), covariance)
        return gain

    lottery(model, data, asks({"macs": 0.5}, criterion="spy", rotate=False), Given([shelf(spy)]))
    np.testing.assert_allclose(seen[0][16:32, 16:32], added.T @ added / len(added), rtol=1e-6, atol=1e-9)
    assert not seen[0][:16, 16:].any()


def test_moments_are_taken_of_the_model_before_the_cut():
    model, data = tiny(dtype=torch.float64), batches(dtype=torch.float64)
    found = measure.measure(model, data, gradients=True, moments="affine").moments["blocks.1.mlp"]
    seen = []
    with model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        for images, _ in data:
            model(images)
    tokens = torch.cat(seen).reshape(-1, 192)
    torch.testing.assert_close(found.mean, tokens.mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(tokens.T, correction=0))


def test_compensation_brings_what_a_cut_mlp_writes_closer():
    model, data = tiny(), batches(6)
    read = []
    with model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: read.append(args[0])), torch.no_grad():
        for images, _ in data:
            model(images)
    x, errors = torch.cat(read), {}
    for how in ("none", "mean", "affine"):
        small: Any = prune(model, data, {"macs": 0.6}, criterion="fisher", compensate=how)
        assert small.blocks[0].mlp.fc1.out_features < 192
        with torch.no_grad():
            errors[how] = float((small.blocks[0].mlp(x) - model.blocks[0].mlp(x)).square().mean())
    assert errors["affine"] < 0.5 * errors["mean"]
    assert errors["mean"] < errors["none"]


def test_a_cut_without_compensation_is_the_surgeons():
    model = tiny("registers")
    drawn = lottery(model, batches(), asks({"macs": 0.5}, rotate=False, compensate="none", embed_dim=None))
    with torch.no_grad():
        torch.testing.assert_close(drawn.model(pictures()), masked(model, drawn.plan)(pictures()), rtol=0, atol=1e-5)


def test_keeping_all_changes_no_output():
    model = tiny()
    small = prune(model, batches(), {"macs": 1.0})
    with torch.no_grad():
        assert torch.equal(small(pictures()), model(pictures()))


def test_the_models_mode_and_the_callers_grad_mode_are_left_alone():
    model = tiny().train()
    model.blocks[0].eval()
    model.set_grad_checkpointing(True)
    for weight in model.parameters():
        weight.requires_grad_(False)
    with torch.no_grad():
        prune(model, batches(), {"macs": 0.5})
        assert not torch.is_grad_enabled()
    assert model.training
    assert model.blocks[1].training
    assert not model.blocks[0].training
    assert model.grad_checkpointing


def test_batches_may_be_anything_that_begins_with_images_and_labels():
    model, data = tiny(), batches()
    plans = [
        lottery(model, given, asks({"macs": 0.5})).plan  # widths are tried too
        for given in (data, iter(data), [(x, y, torch.arange(8)) for x, y in data], lambda: iter(data))
    ]
    assert all(plan == plans[0] for plan in plans)
    prune(model, [x for x, _ in data], {"macs": 0.5}, criterion="magnitude")
    told: list[int] = []
    assert lottery(model, data, asks({"macs": 0.5}, embed_dim=None), progress=told.append).images == 24
    assert told == [8, 16, 24, 32, 40, 48]
    told.clear()
    lottery(model, iter(data), asks({"macs": 0.5}, rotate=False, embed_dim=None), progress=told.append)
    assert told == [8, 16, 24]
    told.clear()
    lottery(model, iter(data), asks({"macs": 0.5}, rotate=False, embed_dim=0.75), progress=told.append)
    assert told == [8, 16, 24, 32, 40, 48], "the stream, then the units"


def test_a_half_precision_model_stays_one():
    small = prune(tiny().bfloat16(), batches(), {"macs": 0.5})
    assert {weight.dtype for weight in small.parameters()} == {torch.bfloat16}
    assert small(pictures(dtype=torch.bfloat16)).isfinite().all()


def test_a_criterion_of_ones_own():
    def last(units: int) -> np.ndarray:
        return np.arange(units, dtype=float)

    drawn = lottery(tiny(), batches(), asks({"macs": 0.6}, criterion="last", embed_dim=None), Given([shelf(last)]))
    block = drawn.plan.blocks[0]
    assert block.units == tuple(range(192 - len(block.units), 192))
    mine = ModuleType("mine")
    exec(
        "def first(units, *, shift=0.0):\n    import numpy as np\n    return np.arange(units)[::-1] + shift\n",
        mine.__dict__,
    )
    named = asks({"macs": 0.6}, criterion={"name": "first", "shift": 1}, embed_dim=None)
    drawn = lottery(tiny(), batches(), named, Given([mine]))
    assert drawn.plan.blocks[0].units[0] == 0
    given = functools.partial(mine.first, shift=2)  # in Python a function will do, or what is called like one
    for one in (mine.first, lambda units: np.arange(units)[::-1], given):
        small = prune(tiny(), batches(), {"macs": 0.6}, criterion=one, embed_dim=None)
        assert all(torch.equal(a, b) for a, b in zip(small.parameters(), drawn.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rond": 8}, "prune.rond: no such setting. Did you mean 'round'"),
        ({"shelve": []}, "^lotus.prune: has no argument 'shelve'. Did you mean 'shelves'"),
        ({"sed": 1}, "^lotus.prune: has no argument 'sed'. Did you mean 'seed'"),
        ({"search": {"kind": "ratios"}}, "prune.search: is done by a run"),
        ({"method": "unstructured", "keep": {"weights": 0.5}}, "prune.method: unstructured is done by a run"),
        ({"sizes": (0.3,)}, "prune.sizes: is done by a run"),
        ({"calibration": 100}, "prune.calibration: the images are those of the batches"),
        ({"keep": {"latency": 0.9}, "decouple_qk": True}, "prune.keep.latency: is predicted for heads"),
        ({"keep": {"gates": 0.9}}, "prune.keep.gates: a fraction of all units"),
    ],
)
def test_settings_are_refused_as_those_of_a_config_are(settings, message):
    with pytest.raises(Refused, match=message):
        lotus.prune(tiny(), [], **{"keep": {"macs": 0.5}, **settings})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "tailor"}, "Did you mean 'taylor'"),
        ({"compensate": "some"}, "prune.compensate.*'affine'.*, not 'some'"),
        ({"scope": "all"}, "prune.scope.*'global', 'per_type'.*not 'all'"),
        ({"keep": {"macs": 0.01}}, "out of reach"),
        ({"keep": {"macs": 2}}, "prune.keep.macs.*less than or equal to 1, not 2"),
        ({"batches": []}, "no calibration batch"),
        ({"batches": [pictures()]}, "must be \\(images, labels\\)"),
        ({"batches": [{"image": pictures()}]}, "must be \\(images, labels\\)"),
        ({"batches": [{"picture": pictures()}]}, "a mapping of picture, not of pixel_values and labels"),
        ({"batches": [{pictures()}]}, "not set"),
        ({"batches": [(pictures().numpy(), torch.ones(8).long())]}, "images of a calibration batch are a ndarray"),
        ({"batches": [(pictures(), [1] * 8)]}, "labels of a calibration batch are a list, not a tensor"),
        ({"batches": [(pictures(), torch.full((8,), 5))]}, "labels run from 5 to 5, the model has 5 classes"),
        ({"batches": [(pictures(), torch.ones(8))]}, r"labels are float32 \(8,\).*labels\.long"),
        ({"batches": [(pictures(), torch.ones(7, dtype=torch.long))]}, "not 8 class numbers"),
        ({"batches": [(pictures()[..., :24], torch.ones(8))]}, r"\(8, 3, 32, 24\).*32 x 32 pixels"),
        ({"batches": [(pictures()[:, :1], torch.ones(8))]}, "Resize them"),
        ({"batches": [(pictures()[0], torch.ones(3))], "embed_dim": 0.75}, "Resize them"),
        ({"round": 2.5}, "prune.round"),
        ({"round": "fast"}, "(?s)prune.round.*'auto', not 'fast'"),
        ({"batches": [(pictures() * torch.nan, torch.zeros(8, dtype=torch.long))]}, "not finite.*Are these finite"),
        (
            {"criterion": lambda units: np.ones(3)},
            r"^prune\.criterion \(<lambda>\): gave scores of shape \(3,\) .*Return a score a unit",
        ),
        (
            {"criterion": lambda units: "many"},
            r"^prune\.criterion \(<lambda>\): gave a str for .*Return a score a unit",
        ),
        (
            {"criterion": lambda units: np.full(units, np.nan)},
            r"^prune\.criterion \(<lambda>\): gave scores for .*not finite. Return a finite score",
        ),
        ({"criterion": lambda souls: souls}, "reads souls"),
    ],
)
def test_what_cannot_be_done_is_refused(change, message):
    with pytest.raises(Refused, match=message):
        prune(tiny(), **{"batches": batches(), "keep": {"macs": 0.5}, **change})


def test_inference_mode_is_refused_with_the_way_out():
    model, data = tiny(), batches(1)
    for way in (prune, lottery):
        with torch.inference_mode(), pytest.raises(Refused, match="Call it outside"):
            way(model, data, {"macs": 0.5})
    with torch.inference_mode():
        born = tiny()
    with pytest.raises(Refused, match="weights made there"):
        prune(born, data, {"macs": 0.5})
    with torch.no_grad():
        assert not prune(model, data, {"macs": 0.5}, embed_dim=None).training


def test_a_fast_multiple_is_measured_where_it_is_asked_for(monkeypatch):
    asked = []

    def sixteen(model, batch):
        asked.append(batch)
        return 16

    monkeypatch.setattr(latency, "fast_multiple", sixteen)
    drawn = lottery(tiny(), batches(1), asks({"macs": 0.6}, round="auto", embed_dim=None))
    assert asked == [64]
    assert all(dims.hidden % 16 == 0 for dims in drawn.plan.dims)
    assert drawn.notes[0] == "Widths stay multiples of 16: measured."
    again = study(tiny(), batches(1), asks()).draw(asks({"macs": 0.6}, round="auto"))
    assert (again.plan, again.notes) == (drawn.plan, drawn.notes)
    asked.clear()
    nested = study(tiny(), batches(1), asks()).nested(asks(round="auto"), [{"macs": 0.8}, {"macs": 0.6}])
    assert asked == [64]
    assert all(dims.hidden % 16 == 0 for one in nested for dims in one.plan.dims)
    assert all(one.notes[0] == "Widths stay multiples of 16: measured." for one in nested)


def test_models_that_do_not_serve_are_refused():
    mixed = tiny()
    mixed.blocks[0].half()
    with pytest.raises(Refused, match=r"blocks\.0\.norm1\.weight: .*model\.float"):
        prune(mixed, batches(), {"macs": 0.5})
    broken = tiny()
    broken.blocks[1].mlp.fc1.weight.data[3, 3] = torch.nan
    with pytest.raises(Refused, match=r"blocks\.1\.mlp\.fc1\.weight: .*not finite"):
        prune(broken, batches(), {"macs": 0.5})
    hooked = tiny()
    hooked.blocks[0].attn.proj.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(Refused, match=r"blocks\.0: proj .*hook"):
        prune(hooked, batches(), {"macs": 0.5})
    with pytest.raises(Refused, match="no classifier"):
        prune(tiny(global_pool=""), batches(), {"macs": 0.5})
    with pytest.raises(Refused, match="Conv2d: is of no family"):
        prune(torch.nn.Conv2d(3, 3, 1), batches(), {"macs": 0.5})
    with pytest.raises(Refused, match=r"prune\.criterion\.sign"):
        lottery(tiny(), batches(), asks({"macs": 0.5}, criterion={"name": "fisher", "sign": True}))


def test_scores_of_dimensions_of_queries_matter():
    """A q/k dimension that is silent in a head is the first of that head to go."""

    def scored(model: torch.nn.Module, name: str) -> np.ndarray:
        request = asks({"macs": 0.9}, criterion=name, rotate=False, embed_dim=None)
        return lottery(model, batches(), request).scores["blocks.0.qk"]

    model = tiny()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[16 + 5] = 0  # q of head 1, dimension 5
        model.blocks[0].attn.qkv.bias[16 + 5] = 0
    for name in ("fisher", "taylor", "magnitude"):
        scores = scored(model, name)
        assert scores.reshape(3, 16)[1].argmin() == 5
        assert scores[16 + 5] == 0
    keys = tiny()
    with torch.no_grad():
        keys.blocks[0].attn.qkv.weight[48 + 32 + 7] = 0  # k of head 2, dimension 7
        keys.blocks[0].attn.qkv.bias[48 + 32 + 7] = 0
    for name in ("fisher", "magnitude"):
        scores = scored(keys, name)
        assert scores[32 + 7] == pytest.approx(0, abs=1e-9)
        assert scores.argmin() == 32 + 7
    qkv = keys.blocks[0].attn.qkv
    rows = torch.cat((qkv.weight, qkv.bias[:, None]), dim=1).detach().double()
    np.testing.assert_allclose(scores, (rows[:48].norm(dim=1) * rows[48:96].norm(dim=1)).numpy(), rtol=1e-6)
    outline = cost.outline(model)
    drawn = lottery(model, batches(), asks({"macs": 0.3}, criterion="fisher", rotate=False, embed_dim=None))
    plan = budget.fit_plan(outline, drawn.scores, asks({"macs": 0.3}))
    for head, kept in zip(plan.blocks[0].heads, plan.blocks[0].qk, strict=True):
        assert head != 1 or len(kept) == 16 or 5 not in kept


@pytest.mark.slow
def test_a_pruned_model_compiles_without_breaks():
    small = prune(tiny(), batches(), {"macs": 0.5})
    images = pictures()
    with torch.no_grad():
        compiled = torch.compile(small, backend="eager", fullgraph=True)(images)
        torch.testing.assert_close(compiled, small(images))


@pytest.mark.slow  # the ONNX of a cut model: tests/test_export.py
def test_a_pruned_model_exports_to_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    small = prune(tiny(), batches(), {"macs": 0.5})
    file = tmp_path / "small.onnx"
    torch.onnx.export(small, (pictures(2),), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: pictures(2).numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, small(pictures(2)).numpy(), atol=1e-4)


def test_the_front_page_says_the_truth():
    small = lotus.prune(tiny(), batches(), keep={"macs": 0.5})
    assert cost.count(small).macs <= 0.5 * cost.count(tiny()).macs
