"""Gates on a real timm ViT: exact, complete, steered, resumed."""

import copy
import itertools

import pytest
import timm
import torch
from torch import nn

from lotus.config import Sparsity
from lotus.sparsity.gates import Gates
from lotus.vit import anatomy, cost
from selection.errors import Refused

SITES = {"blocks.0.attn": 16, "blocks.0.mlp": 32, "blocks.1.attn": 16, "blocks.1.mlp": 32}
FOUR = {
    f"blocks.{i}.{site}": 32 if site == "mlp" else 16 for i in range(2) for site in ("attn_in", "attn", "mlp_in", "mlp")
}
BOTH = pytest.mark.parametrize("in_channels", [False, True], ids=["two sites", "four sites"])
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def vit(**args):
    torch.manual_seed(0)
    args = {"depth": 2, "mlp_ratio": 2.0, **args}
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=16, num_heads=2, num_classes=4, **args
    )


def gates_of(model, target=None, **settings):
    return Gates(model, Sparsity(**{"start": 0.0, **settings}), target=target)


def flat(gates):
    """(G,) all gates."""
    return torch.cat([values.detach() for values in gates.values.values()])


def gradient(gates):
    return torch.cat([values.grad for values in gates.values.values()])


def put(gates, vector, into=lambda values: values.data):
    """Set all gates from one vector."""
    sizes = [len(values) for values in gates.values.values()]
    for values, part in zip(gates.values.values(), vector.split(sizes), strict=True):
        into(values).copy_(part)


def pull(gates, vector):
    """Set the gradients of all gates from one vector."""
    put(gates, vector, lambda values: values.grad)


def scatter(gates, seed=0):
    """Any values but ones, some of them zero or negative."""
    values = torch.randn(len(flat(gates)), generator=torch.Generator().manual_seed(seed))
    values[::5] = 0
    put(gates, values)
    return gates


def loss_of(model, images=IMAGES):
    return model(images).square().sum()


@BOTH
def test_every_site_has_a_gate_for_each_unit_and_no_parameter_is_added(in_channels):
    model = vit()
    before = set(model.state_dict())
    gates = gates_of(model, in_channels=in_channels)
    assert {site: len(values) for site, values in gates.values.items()} == (FOUR if in_channels else SITES)
    assert all(
        v.is_leaf and v.requires_grad and v.dtype == torch.float32 and (v == 1).all() for v in gates.values.values()
    )
    assert set(model.state_dict()) == before
    ids = {id(parameter) for parameter in model.parameters()}
    assert not ids & {id(values) for values in gates.values.values()}


@BOTH
def test_open_gates_change_nothing(in_channels):
    model = vit()
    plain = model(IMAGES)
    gates_of(model, in_channels=in_channels)
    assert torch.equal(model(IMAGES), plain)


@BOTH
def test_gates_multiply_what_their_linear_reads(in_channels):
    model = vit()
    reference = copy.deepcopy(model)
    gates = scatter(gates_of(model, in_channels=in_channels))
    for site, linear in anatomy.sites(reference, in_channels=in_channels).items():
        linear.register_forward_pre_hook(lambda _, inputs, gate=gates.values[site]: (inputs[0] * gate,))
    torch.testing.assert_close(model(IMAGES), reference(IMAGES), atol=1e-6, rtol=1e-6)


@BOTH
def test_gradients_are_those_of_parameters_in_the_activations(in_channels):
    model = vit()
    reference = copy.deepcopy(model)
    gates = scatter(gates_of(model, in_channels=in_channels))
    twins = {site: nn.Parameter(values.detach().clone()) for site, values in gates.values.items()}
    for site, linear in anatomy.sites(reference, in_channels=in_channels).items():
        linear.register_forward_pre_hook(lambda _, inputs, gate=twins[site]: (inputs[0] * gate,))
    loss_of(model).backward()
    loss_of(reference).backward()
    for site, twin in twins.items():
        torch.testing.assert_close(gates.values[site].grad, twin.grad, atol=1e-5, rtol=1e-4)
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_gradients_add_up_over_micro_batches_in_one_vector():
    model = vit()
    gates = gates_of(model)
    loss_of(model).backward()
    whole = gradient(gates)
    gates.skip()
    assert not gradient(gates).any()
    for part in IMAGES.split(2):
        loss_of(model, part).backward()
    torch.testing.assert_close(gradient(gates), whole, atol=1e-5, rtol=1e-4)
    assert len({values.grad.untyped_storage().data_ptr() for values in gates.values.values()}) == 1


def test_weights_are_whole_again_after_the_forward_even_after_an_exception():
    model = vit()
    gates_of(model)
    linear = model.blocks[0].attn.proj
    parameter = linear._parameters["weight"]
    model(IMAGES)
    assert linear.weight is parameter
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 3))
    assert linear.weight is parameter


@BOTH
def test_a_weight_that_is_not_whole_is_left_alone(in_channels):
    """Under ZeRO-3 (weights carry ds_id) the activations are gated; the result is the same."""
    model = vit()
    gates = scatter(gates_of(model, in_channels=in_channels))
    by_weight = model(IMAGES)
    loss_of(model).backward()
    before = gradient(gates)
    gates.skip()
    for linear in anatomy.sites(model, in_channels=in_channels).values():
        vars(linear.weight)["ds_id"] = 0
    torch.testing.assert_close(model(IMAGES), by_weight, atol=1e-6, rtol=1e-6)
    loss_of(model).backward()
    torch.testing.assert_close(gradient(gates), before, atol=1e-5, rtol=1e-4)


def test_bf16_models_are_gated_in_bf16():
    model = vit().bfloat16()
    gates = gates_of(model)
    model(IMAGES.bfloat16()).float().square().sum().backward()
    assert gradient(gates).dtype == torch.float32
    assert gradient(gates).any()


@BOTH
@pytest.mark.parametrize("kind", ["module", "state", "own"])
def test_folded_equals_masked(kind, in_channels):
    model = vit()
    gates = scatter(gates_of(model, in_channels=in_channels))
    masked = model(IMAGES)
    if kind == "own":
        folded = gates.fold(model)
        assert folded is model
    else:
        folded = vit()
        if kind == "module":
            folded.load_state_dict(model.state_dict())
            gates.fold(folded)
        else:
            folded.load_state_dict(gates.fold({k: v.clone() for k, v in model.state_dict().items()}))
        assert torch.equal(model(IMAGES), masked)
    torch.testing.assert_close(folded(IMAGES), masked, atol=1e-6, rtol=0)
    if kind != "own":
        gates.remove()
    assert not model.blocks[0].attn.proj._forward_pre_hooks


def test_a_step_is_torchs_adam_where_there_is_no_penalty():
    model = vit()
    gates = gates_of(model, strength=0, steer=False, lr=0.01)
    twin = nn.Parameter(torch.ones(sum(SITES.values())))
    adam = torch.optim.Adam([twin], lr=0.01)
    for turn in range(5):
        twin.grad = torch.randn(len(twin), generator=torch.Generator().manual_seed(turn))
        pull(gates, twin.grad)
        gates.step(turn / 5)
        adam.step()
        torch.testing.assert_close(flat(gates), twin.detach(), atol=1e-6, rtol=1e-6)
    assert not gradient(gates).any()


def test_ranks_are_averaged_once_in_one_vector():
    model = vit()
    gates = gates_of(model, strength=0)
    seen = []
    loss_of(model).backward()
    gates.step(0.5, lambda flat: seen.append(flat.shape))
    assert seen == [(sum(SITES.values()),)]


def test_the_penalty_waits_for_its_start():
    model = vit()
    gates = gates_of(model, start=0.5, strength=10.0, steer=False)
    gates.step(0.49)
    assert (flat(gates) == 1).all()
    gates.step(0.5)
    assert (flat(gates) < 1).all()


def drive(gates, turns=200, useful=None, noise=0.3, seed=0):
    """Train gates alone: the gradient of ||useful * (a - 1)||^2 / 2 with noise."""
    rng = torch.Generator().manual_seed(seed)
    size = len(flat(gates))
    useful = torch.ones(size) if useful is None else useful
    trace = []
    for turn in range(turns):
        pull(gates, useful * (flat(gates) - 1) + noise * torch.randn(size, generator=rng))
        gates.step(turn / turns)
        trace.append((gates.strength, gates.open_macs(), gates.met))
    return trace


def test_useless_units_close_first():
    """Closing a useful unit costs a lot, closing a useless one nothing; half are useless."""
    model = vit()
    useful = torch.zeros(sum(SITES.values()))
    useful[::2] = 3.0
    gates = gates_of(model, strength=0.6, steer=False, lr=0.02)
    drive(gates, 300, useful)
    closed = flat(gates) == 0
    assert closed[useful == 0].float().mean() > 0.9
    assert not closed[useful > 0].any()


@BOTH
def test_exact_zeros_by_proximal_alone(in_channels):
    for penalty, zeros in (("proximal", True), ("subgradient", False)):
        gates = gates_of(vit(), penalty=penalty, strength=2.0, steer=False, lr=0.02, in_channels=in_channels)
        drive(gates, 200, torch.zeros(len(flat(gates))))
        assert bool((flat(gates) == 0).any()) is zeros
        assert gates.summary()["zero_gates"] > 0.5


@pytest.mark.parametrize("penalty", ["proximal", "subgradient"])
@pytest.mark.parametrize(("target", "lr", "turns"), [(0.5, 0.02, 200), (0.3, 0.05, 150), (0.7, 0.005, 1200)])
def test_steering_meets_the_budget_and_then_lets_go(penalty, target, lr, turns):
    gates = gates_of(vit(depth=3), target=target, penalty=penalty, lr=lr, start=0.2, strength=1e-3)
    trace = drive(gates, turns, torch.rand(len(flat(gates)), generator=torch.Generator().manual_seed(3)) * 2)
    summary = gates.summary()
    least = (0.95 if penalty == "proximal" else 0.75) * target
    assert least <= summary["open_macs"] <= target + 1e-6
    assert summary["lambda"] == 0
    met = next(turn for turn, (*_, met) in enumerate(trace) if met)
    assert 0.5 * turns < met < 0.98 * turns  # neither at once nor too late
    assert min(macs for _, macs, _ in trace[met:]) >= least  # nothing is crushed afterwards
    if penalty == "proximal":
        assert len({macs for _, macs, _ in trace[met:]}) == 1  # what is closed stays, what is open stays


def test_open_macs_are_those_of_the_cut_model():
    """All gates of one MLP unit, and of one dimension of each head, against the closed form."""
    model = vit()
    gates = gates_of(model, target=0.5)
    outline = cost.outline(model)
    first, *rest = outline.dims
    whole = outline.cost().macs
    with torch.no_grad():
        gates.values["blocks.0.mlp"][:5] = 0
    cut = outline.cost([first._replace(hidden=first.hidden - 5), *rest]).macs
    assert gates.open_macs() == pytest.approx(cut / whole, abs=1e-6)
    with torch.no_grad():
        gates.values["blocks.0.attn"][[0, 8]] = 0
    less = first._replace(hidden=first.hidden - 5, qk_dim=first.qk_dim - 1, v_dim=first.v_dim - 1)
    assert gates.open_macs() == pytest.approx(outline.cost([less, *rest]).macs / whole, abs=1e-6)


def test_open_macs_with_inputs_are_those_of_the_cut_model():
    """What an input saves depends on how many rows are left: counted, not added up."""
    model = vit()
    gates = gates_of(model, target=0.5, in_channels=True)
    outline = cost.outline(model)
    first, second = outline.dims
    with torch.no_grad():
        gates.values["blocks.0.mlp"][:5] = 0
        gates.values["blocks.0.mlp_in"][3:7] = 0
        gates.values["blocks.0.attn"][[0, 8]] = 0
        gates.values["blocks.1.attn_in"][:9] = 0
    less = first._replace(hidden=27, qk_dim=7, v_dim=7, mlp_in=12)
    cut = outline.cost([less, second._replace(attn_in=7)]).macs
    assert gates.open_macs() == pytest.approx(cut / outline.cost().macs, abs=1e-6)


@pytest.mark.parametrize("penalty", ["proximal", "subgradient"])
@pytest.mark.parametrize("budget", [{"target": 0.5}, {"target": None, "of_gates": 0.6}], ids=["macs", "gates"])
def test_four_sites_are_steered_too(penalty, budget):
    model = vit(depth=3)
    gates = Gates(model, Sparsity(penalty=penalty, lr=0.02, start=0.2, strength=1e-3, in_channels=True), **budget)
    drive(gates, 200, torch.rand(len(flat(gates)), generator=torch.Generator().manual_seed(3)) * 2)
    open_ = float((flat(gates).abs() > gates.tau).float().mean())
    left, wanted = (gates.open_macs(), 0.5) if budget["target"] else (open_, 0.6)
    assert (0.95 if penalty == "proximal" else 0.7) * wanted <= left <= wanted + 1e-6
    assert gates.summary()["lambda"] == 0


def shares_of(model):
    """(G,) what closing a gate of two sites saves of the model's MACs: a unit, and of a dimension of all heads its part."""
    outline, shares = cost.outline(model), []
    for index, dims in enumerate(outline.dims):
        narrow = dims._replace(qk_dim=dims.qk_dim - 1, v_dim=dims.v_dim - 1)
        slim = dims._replace(hidden=dims.hidden - 1)
        for less, gates, together in ((narrow, dims.heads * dims.v_dim, dims.heads), (slim, dims.hidden, 1)):
            saved = outline.block(index, dims).macs - outline.block(index, less).macs
            shares += [saved / together / outline.cost().macs] * gates
    return torch.tensor(shares)


def test_the_search_ends_when_the_masks_have_settled():
    """Distances of successive masks at the budget, by hand; the last three must lie below epsilon."""
    gates = gates_of(vit(), target=0.5, early_bird={"epsilon": 0.1, "epochs": 3})
    costs, masks = shares_of(vit()), []
    size = len(costs)
    wanders = torch.randn(6, size, generator=torch.Generator().manual_seed(0))
    settled = []
    gates.end_epoch(0)
    assert gates.distances() == [1, 1, 1], "before the penalty has set in nothing is drawn"
    gates.step(0.0)
    for epoch in range(9):
        put(gates, wanders[min(epoch, 4)])
        gates.end_epoch(epoch)
        gates.end_epoch(epoch)  # an epoch that is closed twice counts once
        order = flat(gates).abs().argsort()
        left = 1 - costs[order].cumsum(0)
        mask = torch.ones(size, dtype=torch.bool)
        mask[order[: int((left > 0.5).sum()) + 1]] = False
        masks.append(mask)
        settled.append(gates.settled())
    moved = [float((a != b).float().mean()) for a, b in itertools.pairwise(masks)]
    assert gates.distances() == pytest.approx(moved[-3:])
    assert min(moved[:4]) > 0.1
    assert settled == [epoch >= 7 for epoch in range(9)]
    other = gates_of(vit(), target=0.5, early_bird={"epsilon": 0.1, "epochs": 3})
    other.load_state(gates.state())
    assert other.settled()
    assert not gates_of(vit(), target=0.5).settled()


def test_a_budget_that_gates_cannot_reach_is_refused():
    with pytest.raises(Refused, match=r"prune\.keep\.macs: 0\.01 .*reach"):
        gates_of(vit(), target=0.01)
    assert gates_of(vit(), target=1.0).target is None


@pytest.mark.parametrize("penalty", ["proximal", "subgradient"])
def test_a_resumed_run_goes_on_to_the_bit(penalty):
    def fresh():
        return gates_of(vit(), target=0.5, penalty=penalty, lr=0.02)

    def go(gates, turns):
        for turn in turns:
            pull(gates, torch.randn(96, generator=torch.Generator().manual_seed(turn)))
            gates.step(turn / 120)

    straight, first, second = fresh(), fresh(), fresh()
    go(straight, range(120))
    go(first, range(53))
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    go(second, range(53, 120))
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_gates_of_another_model_are_refused():
    state = gates_of(vit()).state()
    with pytest.raises(Refused, match=r"no gates at blocks\.2\.attn"):
        gates_of(vit(depth=3)).load_state(state)
    with pytest.raises(Refused, match=r"32 gates at blocks\.0\.mlp.*64"):
        gates_of(vit(mlp_ratio=4.0)).load_state(state)


def test_copies_of_a_model_share_its_gates():
    """An EMA of the weights is evaluated with the gates as they are now."""
    model = vit()
    gates = gates_of(model)
    twin = copy.deepcopy(model)
    scatter(gates)
    assert torch.equal(model(IMAGES), twin(IMAGES))
    assert twin.blocks[0].mlp.fc2.weight is twin.blocks[0].mlp.fc2._parameters["weight"]


def test_gates_come_off_without_a_trace():
    model = vit()
    plain = model(IMAGES)
    gates = scatter(gates_of(model))
    assert not torch.equal(model(IMAGES), plain)
    gates.remove()
    assert torch.equal(model(IMAGES), plain)
