"""Optimizers against torch's own classes, weight decay groups, and the L1 gradient against autograd."""

import copy
import inspect
import math

import pytest
import timm
import timm.optim
import timm.utils
import torch
from accelerate import Accelerator
from torch import nn

from lockstep.errors import UserError
from lockstep.settings.config import OptimConfig
from lockstep.training.optim import OPTIMIZERS, add_l1_gradient, build_optimizer, finish_gradients, set_lr, update

# Our settings, and what a user of torch would write for the same optimizer.
CASES = {
    "sgd": ({}, torch.optim.SGD, {}),
    "sgd-nesterov": ({"momentum": 0.8, "nesterov": True}, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "adam": ({}, torch.optim.Adam, {}),
    "adamw": ({}, torch.optim.AdamW, {}),
    "rmsprop": ({"momentum": 0.5}, torch.optim.RMSprop, {"momentum": 0.5}),
    "adamw-betas": ({"betas": (0.8, 0.9), "eps": 1e-3}, torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-3}),
    "rmsprop-alpha": ({"alpha": 0.5, "eps": 1e-3}, torch.optim.RMSprop, {"alpha": 0.5, "eps": 1e-3}),
    "adagrad": ({}, torch.optim.Adagrad, {}),
    "adadelta": ({}, torch.optim.Adadelta, {}),
    "nadamw": ({}, timm.optim.NAdamW, {}),
    "lion": ({}, timm.optim.Lion, {}),
    "adopt": ({}, timm.optim.Adopt, {}),
    "lamb": ({}, timm.optim.Lamb, {}),
    "muon": ({}, timm.optim.Muon, {}),
    "adamax": ({}, torch.optim.Adamax, {}),
    "radam": ({}, torch.optim.RAdam, {}),
    "rmsprop_tf": ({"momentum": 0.9, "eps": 1e-3}, timm.optim.RMSpropTF, {"momentum": 0.9, "eps": 1e-3}),
    "adabelief": ({}, timm.optim.AdaBelief, {"rectify": False}),
    "adamp": ({}, timm.optim.AdamP, {"wd_ratio": 0.01, "nesterov": True}),
    "adan": ({"betas": (0.98, 0.92, 0.9)}, timm.optim.Adan, {"betas": (0.98, 0.92, 0.9)}),
    "laprop": ({}, timm.optim.LaProp, {}),
    "lars": ({"momentum": 0.9}, timm.optim.Lars, {"momentum": 0.9}),
    "madgrad": ({"momentum": 0.9}, timm.optim.MADGRAD, {"momentum": 0.9}),
    "mars": ({}, timm.optim.Mars, {}),
    "novograd": ({}, timm.optim.NvNovoGrad, {}),
    "sgdp": ({"momentum": 0.9}, timm.optim.SGDP, {"momentum": 0.9}),
    "sgdw": ({"momentum": 0.9}, timm.optim.SGDW, {"momentum": 0.9}),
}
FUSED = {"sgd", "adam", "adamw", "adagrad"}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)  # no bias before the norm: its gradient is rounding noise, which adam would blow up
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        images = torch.randn(8, 1, 4, 4, generator=generator, dtype=dtype)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_same_updates_as_torch(case: str) -> None:
    settings, kind, keywords = CASES[case]
    name = case.split("-")[0]
    mine, theirs = network(), network()
    loops = (
        {"foreach": False} if "foreach" in inspect.signature(kind).parameters and kind is not timm.optim.Muon else {}
    )
    optimizer = build_optimizer(OptimConfig(name, lr=0.05, weight_decay=0.01, **settings), mine)
    train(mine, optimizer)
    train(theirs, kind(theirs.parameters(), lr=0.05, weight_decay=0.01, **loops, **keywords))
    assert optimizer.defaults.get("fused") is (True if name in FUSED else None)
    for one, other, start in zip(mine.parameters(), theirs.parameters(), network().parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        assert not torch.equal(one, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [*CASES, "sgd-momentum"])
def test_a_bad_step_changes_neither_weights_nor_state(case: str, dtype: torch.dtype) -> None:
    """Also as the very first step, for which torch makes momentum buffers and leaves them unfilled."""
    settings = {"momentum": 0.9} if case == "sgd-momentum" else CASES[case][0]
    results = []
    for bad_steps in ({0, 2, 3}, set()):
        model = network(dtype)
        optimizer = Accelerator(cpu=True).prepare(
            build_optimizer(OptimConfig(case.split("-")[0], lr=0.05, weight_decay=0.01, **settings), model)
        )
        generator = torch.Generator().manual_seed(1)
        for step in range(5):
            images = torch.randn(8, 1, 4, 4, generator=generator, dtype=dtype)
            if not bad_steps and step in {0, 2, 3}:
                continue
            optimizer.zero_grad()
            (model.eval()(images).square().mean() * (torch.nan if step in bad_steps else 1)).backward()
            update(optimizer, torch.tensor(step in bad_steps))
        results.append((model.state_dict(), optimizer.state_dict()["state"]))
    (weights, states), (expected_weights, expected_states) = results
    assert all(torch.equal(weights[name], value) and value.isfinite().all() for name, value in expected_weights.items())
    assert not torch.equal(weights["0.weight"], network(dtype)[0].weight)
    for number, state in expected_states.items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(states[number][name]), torch.as_tensor(value)), (number, name)


def test_adamw_decays_only_as_configured() -> None:
    assert build_optimizer(OptimConfig("adamw"), network()).defaults["weight_decay"] == 0  # torch's own is 0.01


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_a_float32_step(name: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = network(torch.float32).to(device)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(OptimConfig(name, lr=0.1), model)
    for _ in range(2):  # adopt's first step only looks
        model(torch.randn(8, 1, 4, 4, device=device)).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_decay_groups_hold_every_trainable_parameter_once_in_order() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    decayed, free = build_optimizer(OptimConfig("sgd", weight_decay=0.1, decay_all=False), model).param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    assert decayed["params"] == [model[3].weight]
    assert [id(p) for p in free["params"]] == [id(p) for p in model.parameters() if p.requires_grad and p.ndim == 1]


def test_what_a_timm_model_names_is_not_decayed() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    decayed, free = build_optimizer(OptimConfig("sgd", weight_decay=0.1, decay_all=False), model).param_groups
    assert model.pos_embed.ndim > 1 and {"pos_embed", "cls_token"} <= set(model.no_weight_decay())
    for parameter in (model.pos_embed, model.cls_token, model.head.bias):
        assert any(parameter is one for one in free["params"]) and not any(
            parameter is one for one in decayed["params"]
        )
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_biases_without_decay_stand_still_under_zero_gradients() -> None:
    model = nn.Linear(3, 2)
    start = copy.deepcopy(model)
    optimizer = build_optimizer(OptimConfig("adamw", lr=0.1, weight_decay=0.5, decay_all=False), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model.bias, start.bias)
    torch.testing.assert_close(model.weight, start.weight * (1 - 0.1 * 0.5))


def test_a_group_that_would_be_empty_is_left_out() -> None:
    config = OptimConfig("sgd", weight_decay=0.1, decay_all=False)
    assert len(build_optimizer(config, nn.Linear(3, 2, bias=False)).param_groups) == 1
    assert len(build_optimizer(config, nn.BatchNorm1d(3)).param_groups) == 1


@pytest.mark.parametrize("name", [*OPTIMIZERS])
def test_a_saved_state_continues_bit_for_bit(name: str) -> None:
    momentum = 0.9 if "momentum" in OPTIMIZERS[name].settings else 0.0
    config = OptimConfig(name, lr=0.01, momentum=momentum, weight_decay=0.1, decay_all=False)
    straight, first = network(), network()
    optimizer = build_optimizer(config, straight)
    train(straight, optimizer)
    train(straight, optimizer)
    early = build_optimizer(config, first)
    train(first, early)
    second = network()
    second.load_state_dict(first.state_dict())
    late = build_optimizer(config, second)
    late.load_state_dict(copy.deepcopy(early.state_dict()))
    train(second, late)
    assert all(torch.equal(one, other) for one, other in zip(straight.parameters(), second.parameters(), strict=True))


LAYERED = ["test_vit", "test_resnet", "test_convnext"]


@pytest.mark.parametrize("name", LAYERED)
def test_layer_decay_makes_the_groups_of_timm(name: str) -> None:
    """With a frozen part, and weight decay as `--opt` of timm has it, or on all."""
    model = timm.create_model(name, num_classes=3)
    next(model.parameters()).requires_grad_(False)
    config = OptimConfig("adamw", weight_decay=0.05, decay_all=False, layer_decay=0.7)
    optimizer = build_optimizer(config, model)
    expected = timm.optim.param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=getattr(model, "no_weight_decay", set)(), layer_decay=0.7
    )
    assert len(expected) > 4 and len({group["lr_scale"] for group in expected}) > 2
    for group, theirs in zip(optimizer.param_groups, expected, strict=True):
        assert all(one is other for one, other in zip(group["params"], theirs["params"], strict=True))
        assert (group["weight_decay"], group["lr_scale"]) == (theirs["weight_decay"], theirs["lr_scale"])
    assert set_lr(optimizer, 0.5) == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5 * group["lr_scale"] for group in expected]
    everywhere = build_optimizer(OptimConfig("adamw", weight_decay=0.05, layer_decay=0.7), model)
    assert {group["weight_decay"] for group in everywhere.param_groups} == {0.05}


def test_layer_decay_needs_an_order_of_layers() -> None:
    with pytest.raises(UserError, match=r"--optim.layer_decay is for networks of timm"):
        build_optimizer(OptimConfig(layer_decay=0.75), network())


@pytest.mark.parametrize(("mode", "bound"), [("norm", 0.1), ("value", 0.01), ("agc", 0.02)])
def test_gradients_are_clipped_as_in_timm(mode: str, bound: float) -> None:
    mine, theirs, free = network(), network(), network()
    for model in (mine, theirs, free):
        torch.manual_seed(2)
        model(torch.randn(8, 1, 4, 4, dtype=torch.float64)).square().mean().backward()
    config = OptimConfig(clip_norm=bound, clip_mode=mode)
    norm, bad = finish_gradients(Accelerator(cpu=True), dict(mine.named_parameters()), config)
    # timm's train script keeps the last layer out of adaptive clipping
    parameters = list(theirs.parameters())[: -2 if mode == "agc" else None]
    timm.utils.dispatch_clip_grad(parameters, bound, mode=mode)
    gradients = [[parameter.grad for parameter in model.parameters()] for model in (mine, theirs, free)]
    for one, other in zip(*gradients[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    assert any(not torch.equal(one, other) for one, other in zip(gradients[0], gradients[2], strict=True))
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(gradients[2]))
    assert not bad


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_told(value: float) -> None:
    model = network()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    parameters = dict(model.named_parameters())
    assert not finish_gradients(Accelerator(cpu=True), parameters, OptimConfig())[1]
    model[0].weight.grad[0] = value
    assert finish_gradients(Accelerator(cpu=True), parameters, OptimConfig())[1]


def test_a_wrong_number_of_betas_is_refused() -> None:
    with pytest.raises(UserError, match=r"--optim.betas=\[0.9, 0.99, 0.9\]: --optim.name=adam takes 2 of them"):
        build_optimizer(OptimConfig("adam", betas=(0.9, 0.99, 0.9)), network())
    with pytest.raises(UserError, match=r"--optim.betas=\[0.9, 0.99\]: --optim.name=adan takes 3 of them"):
        build_optimizer(OptimConfig("adan", betas=(0.9, 0.99)), network())


def test_set_lr_reaches_every_group_and_the_update() -> None:
    model = network()
    optimizer = build_optimizer(OptimConfig("sgd", lr=1.0, weight_decay=0.1, decay_all=False), model)
    set_lr(optimizer, 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    train(model, optimizer, steps=1)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), network().parameters(), strict=True))


def test_l1_gradient_is_that_of_the_penalty() -> None:
    model, penalised = network(), network()
    images = torch.randn(8, 1, 4, 4, dtype=torch.float64)
    for one in (model, penalised):
        one[3].weight.data[0, 0] = 0.0  # a zero weight is not pushed
        one[1].weight.requires_grad_(False)  # a frozen one has no gradient to add to
    model(images).square().mean().backward()
    add_l1_gradient(model.parameters(), 0.01)
    penalty = sum(parameter.abs().sum() for parameter in penalised.parameters() if parameter.requires_grad)
    (penalised(images).square().mean() + 0.01 * penalty).backward()
    for one, other in zip(model.parameters(), penalised.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-15)


def test_l1_without_gradients_does_nothing() -> None:
    model = network()
    add_l1_gradient(model.parameters(), 0.01)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_misspelt_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"--optim.name=adamww is not one of sgd, adam, adamw, .*Did you mean adamw"):
        build_optimizer(OptimConfig("adamww"), network())


def test_a_setting_that_only_other_optimizers_have_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"--optim.momentum=0.9 has no meaning for --optim.name=adam: remove it \(it takes betas, eps\)"
    ):
        build_optimizer(OptimConfig("adam", momentum=0.9), network())
    with pytest.raises(
        UserError, match=r"nesterov=true has no meaning .*optim.name=rmsprop: .* \(it takes alpha, eps, momentum\)"
    ):
        build_optimizer(OptimConfig("rmsprop", momentum=0.9, nesterov=True), network())


def test_a_network_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="Flatten has no trainable parameter"):
        build_optimizer(OptimConfig("sgd"), nn.Flatten())
