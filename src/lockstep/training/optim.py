"""Optimizers: how gradients become updates.

The learning rate is not the optimizer's business: schedule.py computes it and `set_lr` writes it before every step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from lockstep.errors import UserError
from lockstep.launch.sharding import is_sharded, local, whole
from lockstep.settings.config import OptimConfig
from lockstep.settings.registry import choose


class Record(NamedTuple):
    """An optimizer of torch's interface, and what this project must know of it."""

    build: Callable[..., torch.optim.Optimizer]
    settings: frozenset[str] = frozenset()
    """Settings of OptimConfig that are arguments of its own"""
    fused_on: frozenset[str] = frozenset()
    """Device types with a fused kernel in every torch we support"""
    betas: int = 2
    """How many it has, if `settings` has them"""
    takes_shards: bool = True
    """Whether its update of a part of a tensor is that part of its update of the tensor; not where norms decide"""


_ADAM, _MOMENTUM = frozenset({"betas", "eps"}), frozenset({"momentum", "nesterov"})


def _of_timm(name: str, settings: frozenset[str] = _ADAM, *, betas: int = 2, **fixed: Any) -> Record:
    """timm's optimizer of that class name, with timm's own defaults, and those of its factory in `fixed`."""

    def build(parameters: Any, **options: Any) -> torch.optim.Optimizer:
        from timm import optim  # here, because timm takes seconds to import

        return getattr(optim, name)(parameters, **fixed, **options)

    return Record(build, settings, betas=betas, takes_shards=False)


OPTIMIZERS = {
    "sgd": Record(torch.optim.SGD, _MOMENTUM, frozenset({"cpu", "cuda"})),
    "adam": Record(torch.optim.Adam, _ADAM, frozenset({"cpu", "cuda"})),
    "adamw": Record(torch.optim.AdamW, _ADAM, frozenset({"cpu", "cuda"})),
    "rmsprop": Record(torch.optim.RMSprop, frozenset({"momentum", "alpha", "eps"})),
    "adagrad": Record(torch.optim.Adagrad, frozenset({"eps"}), frozenset({"cpu"})),  # for CUDA since torch 2.12
    "adadelta": Record(torch.optim.Adadelta, frozenset({"eps"})),
    "adamax": Record(torch.optim.Adamax, _ADAM),
    "radam": Record(torch.optim.RAdam, _ADAM),
    "nadamw": _of_timm("NAdamW"),
    "lion": _of_timm("Lion", frozenset({"betas"})),
    "adopt": _of_timm("Adopt"),
    "lamb": _of_timm("Lamb"),  # of the recipes A1 to A3
    "muon": _of_timm("Muon", frozenset()),  # weights of two dimensions and more; AdamW for the rest
    "rmsprop_tf": _of_timm("RMSpropTF", frozenset({"momentum", "alpha", "eps"})),  # of EfficientNet, MobileNet
    "adabelief": _of_timm("AdaBelief", rectify=False),
    "adamp": _of_timm("AdamP", wd_ratio=0.01, nesterov=True),
    "adan": _of_timm("Adan", betas=3),
    "laprop": _of_timm("LaProp"),
    "lars": _of_timm("Lars", _MOMENTUM),
    "madgrad": _of_timm("MADGRAD", frozenset({"momentum", "eps"})),
    "mars": _of_timm("Mars"),
    "novograd": _of_timm("NvNovoGrad"),
    "sgdp": _of_timm("SGDP", _MOMENTUM),
    "sgdw": _of_timm("SGDW", _MOMENTUM),
}


def build_optimizer(config: OptimConfig, model: nn.Module, *, may_fuse: bool = True) -> torch.optim.Optimizer:
    """The optimizer of `config` over the trainable parameters of `model`, fused into one kernel where torch can.

    Build it when `model` is on its device and has its dtype: the choice of kernel (and Adagrad's state) follows them.
    The fused kernels of torch 2.15 take sharded tensors for Adam only, and no flag for bad steps with them.
    Everything that `config` does not set has torch's (or timm's) default. With `decay_all=false` biases and norm
    parameters (one dimension or none) form a second group without weight decay, as in He et al. 2019,
    https://arxiv.org/abs/1812.01187, and so do those that a timm model's `no_weight_decay` names, such as position
    embeddings. With `layer_decay` each layer of a timm model is a group or two with a share of the learning rate.
    The order within a group is that of `model.parameters()`, so equal models give interchangeable state dicts.
    Raises UserError for an unknown name, a model without trainable parameters, one whose layers have no order that
    `layer_decay` could follow, and sharded ones that the optimizer or `clip_mode` cannot take.
    """
    record = choose(OPTIMIZERS, "optim.name", config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError(f"{type(model).__name__} has no trainable parameter: unfreeze some before training")
    if any(map(is_sharded, parameters)):
        _refuse_shards(config, record)
    if config.betas and len(config.betas) != record.betas:
        raise UserError(f"--optim.betas={list(config.betas)}: --optim.name={config.name} takes {record.betas} of them")
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    given = {setting: getattr(config, setting) for setting in record.settings}
    options |= {setting: value for setting, value in given.items() if value not in (None, ())}
    if may_fuse and _can_fuse(record, parameters):
        options["fused"] = True
    optimizer = record.build(_parameter_groups(config, model), **options)
    if config.name == "sgd" and config.momentum:
        # The first step makes them without filling them, and leaves them so if it is skipped (torch 2.15).
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _refuse_shards(config: OptimConfig, record: Record) -> None:
    culprit = f"clip_mode={config.clip_mode}" if config.clip_mode == "agc" else f"name={config.name}"
    if config.clip_mode == "agc" or not record.takes_shards:
        raise UserError(f"--optim.{culprit} needs whole weights: leave --runtime.fsdp out")


def _can_fuse(record: Record, parameters: Sequence[Tensor]) -> bool:
    return all(p.device.type in record.fused_on and p.is_floating_point() and not is_sharded(p) for p in parameters)


def _parameter_groups(config: OptimConfig, model: nn.Module) -> list[dict[str, Any]]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    exempt: Any = getattr(model, "no_weight_decay", set)()
    if config.layer_decay is not None:
        return _layer_groups(config, config.layer_decay, model, () if config.decay_all else exempt)
    if config.decay_all:
        return [{"params": list(named.values())}]
    free = {name for name, parameter in named.items() if parameter.ndim <= 1 or name in exempt}
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in named.items() if name not in free]},
        {"params": [parameter for name, parameter in named.items() if name in free], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _layer_groups(
    config: OptimConfig, layer_decay: float, model: nn.Module, exempt: Iterable[str]
) -> list[dict[str, Any]]:
    """timm's groups for layer-wise decay (BEiT, https://arxiv.org/abs/2106.08254), each with its `lr_scale`."""
    if not hasattr(model, "group_matcher"):
        raise UserError("--optim.layer_decay is for networks of timm, which say in what order their layers stand")
    from timm.optim import param_groups_layer_decay  # here, because timm takes seconds to import

    return param_groups_layer_decay(
        model,
        weight_decay=config.weight_decay,
        no_weight_decay_list=tuple(exempt),
        weight_decay_exclude_1d=not config.decay_all,
        layer_decay=layer_decay,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Gives every parameter group the learning rate of the coming step, its share with layer decay; returns `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


@torch.no_grad()
def add_l1_gradient(parameters: Iterable[Tensor], l1: float) -> None:
    """Adds `l1 * sign(w)`, the (sub)gradient of `l1 * sum(|w|)`, to the gradient of every parameter that has one.

    Call it once per step, when the gradients are complete, averaged over processes and free of any loss scale.
    Zero weights, and all weights when `l1` is 0, get nothing.
    """
    pairs = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    if l1 and pairs:
        weights, gradients = zip(*pairs, strict=True)
        torch._foreach_add_(gradients, torch._foreach_sign(weights), alpha=l1)


def finish_gradients(
    accelerator: Accelerator, parameters: dict[str, nn.Parameter], config: OptimConfig
) -> tuple[Tensor, Tensor]:
    """Once per step, when the gradients are complete: undo fp16 scaling, add the L1 penalty's part, clip.

    `parameters` are those of the network by name. Returns the total norm of their gradients before clipping, and
    whether it is not finite: scalar tensors on the device, the same on all processes, that the host has not waited for.
    """
    accelerator.unscale_gradients()
    if config.l1:
        add_l1_gradient(parameters.values(), config.l1)
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    norm = _total_norm(gradients)
    if config.clip_norm is not None and gradients:
        _CLIP_MODES[config.clip_mode](parameters, config.clip_norm, norm)
    return norm, ~(norm < math.inf)  # which a NaN is not either


def _clip_norm(parameters: dict[str, nn.Parameter], largest: float, norm: Tensor) -> None:
    """As torch's clip_grads_with_norm_, which sorts gradients by device and type first; ours are of one device."""
    gradients = [local(p.grad) for p in parameters.values() if p.grad is not None]
    torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1))


def _clip_values(parameters: dict[str, nn.Parameter], largest: float, norm: Tensor) -> None:
    gradients = [local(p.grad) for p in parameters.values() if p.grad is not None]
    torch._foreach_clamp_min_(gradients, -largest)
    torch._foreach_clamp_max_(gradients, largest)


def _clip_adaptively(parameters: dict[str, nn.Parameter], share: float, norm: Tensor) -> None:
    """Unit by unit, to a share of the norm of its weights, but for the last layer (https://arxiv.org/abs/2102.06171)."""
    from timm.utils.agc import adaptive_clip_grad  # here, because timm takes seconds to import

    last_layer = next(reversed(parameters)).rpartition(".")[0]
    adaptive_clip_grad(
        [p for name, p in parameters.items() if name.rpartition(".")[0] != last_layer], clip_factor=share
    )


_CLIP_MODES = {"norm": _clip_norm, "value": _clip_values, "agc": _clip_adaptively}


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, the same bits whether they are sharded or not."""
    if any(is_sharded(gradient) for gradient in gradients):
        # Each is whole for a moment: norms of parts would be added up in another order.
        norms = [torch.linalg.vector_norm(whole(gradient)) for gradient in gradients]
    else:
        norms = list(torch._foreach_norm(gradients))
    return torch.linalg.vector_norm(torch.stack(norms))


def update(optimizer: AcceleratedOptimizer, bad: Tensor) -> None:
    """One optimizer step; nothing, neither weights nor state, changes where `bad`, a flag on the device, is set.

    The fused kernels look at the flag themselves. Others wait for the device to know it. In fp16 the gradient scaler
    has looked at the same gradients, and lowers its scale too.
    """
    if optimizer.scaler is not None:
        optimizer.step()
        return
    # Not by Accelerate's `step`, which looks through sys.path for a package each time (0.15 ms, on a local disk).
    bare = optimizer.optimizer
    is_fused = bare.defaults.get("fused")
    if is_fused:
        bare.found_inf = bad.float()
    if is_fused or not bad:
        bare.step()


def histograms_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradients and weights of every layer, by name, for histograms. Every process must take part."""
    named = list(model.named_parameters())
    gradients = {f"gradients/{name}": whole(p.grad) for name, p in named if p.grad is not None}
    return {**gradients, **{f"weights/{name}": whole(p.detach()) for name, p in named}}
