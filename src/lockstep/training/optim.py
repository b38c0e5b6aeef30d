"""Optimizers: how gradients become updates.

The learning rate is not the optimizer's business: schedule.py computes it and `set_lr` writes it before every step.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from lockstep.errors import UserError
from lockstep.launch.sharding import is_sharded, whole
from lockstep.settings.config import OptimConfig
from lockstep.settings.registry import choose


class Record(NamedTuple):
    """An optimizer of torch's interface, and what this project must know of it."""

    build: Callable[..., torch.optim.Optimizer]
    settings: frozenset[str] = frozenset()
    """Settings of OptimConfig that are arguments of its own"""
    fused_on: frozenset[str] = frozenset()
    """Device types with a fused kernel in every torch we support"""
    takes_shards: bool = True
    """Whether its update of a part of a tensor is that part of its update of the tensor; not where norms decide"""


def _of_timm(name: str) -> Record:
    """timm's optimizer of that class name, with timm's own defaults."""

    def build(parameters: Any, **options: Any) -> torch.optim.Optimizer:
        from timm import optim  # here, because timm takes seconds to import

        return getattr(optim, name)(parameters, **options)

    return Record(build, takes_shards=False)


OPTIMIZERS = {
    "sgd": Record(torch.optim.SGD, frozenset({"momentum", "nesterov"}), frozenset({"cpu", "cuda"})),
    "adam": Record(torch.optim.Adam, fused_on=frozenset({"cpu", "cuda"})),
    "adamw": Record(torch.optim.AdamW, fused_on=frozenset({"cpu", "cuda"})),
    "rmsprop": Record(torch.optim.RMSprop, frozenset({"momentum"})),
    "adagrad": Record(torch.optim.Adagrad, fused_on=frozenset({"cpu"})),  # for CUDA since torch 2.12
    "adadelta": Record(torch.optim.Adadelta),
    "nadamw": _of_timm("NAdamW"),
    "lion": _of_timm("Lion"),
    "adopt": _of_timm("Adopt"),
    "lamb": _of_timm("Lamb"),  # of the recipes A1 to A3
    "muon": _of_timm("Muon"),  # weights of two dimensions and more; AdamW for the rest
}


def build_optimizer(config: OptimConfig, model: nn.Module, *, may_fuse: bool = True) -> torch.optim.Optimizer:
    """The optimizer of `config` over the trainable parameters of `model`, fused into one kernel where torch can.

    Build it when `model` is on its device and has its dtype: the choice of kernel (and Adagrad's state) follows them.
    The fused kernels of torch 2.15 take sharded tensors for Adam only, and no flag for bad steps with them.
    Everything that `config` does not set has torch's (or timm's) default. With `decay_all=false` biases and norm
    parameters (one dimension or none) form a second group without weight decay, as in He et al. 2019,
    https://arxiv.org/abs/1812.01187, and so do those that a timm model's `no_weight_decay` names, such as position
    embeddings.
    The order within a group is that of `model.parameters()`, so equal models give interchangeable state dicts.
    Raises UserError for an unknown name, a model without trainable parameters, and sharded ones that it cannot take.
    """
    record = choose(OPTIMIZERS, "optim.name", config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError(f"{type(model).__name__} has no trainable parameter: unfreeze some before training")
    if not record.takes_shards and any(map(is_sharded, parameters)):
        raise UserError(f"--optim.name={config.name} needs whole weights: leave --runtime.fsdp out")
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    options |= {setting: getattr(config, setting) for setting in record.settings}
    if may_fuse and _can_fuse(record, parameters):
        options["fused"] = True
    optimizer = record.build(_parameter_groups(config, model), **options)
    if config.name == "sgd" and config.momentum:
        # The first step makes them without filling them, and leaves them so if it is skipped (torch 2.15).
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _can_fuse(record: Record, parameters: Sequence[Tensor]) -> bool:
    return all(p.device.type in record.fused_on and p.is_floating_point() and not is_sharded(p) for p in parameters)


def _parameter_groups(config: OptimConfig, model: nn.Module) -> list[dict[str, Any]]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if config.decay_all:
        return [{"params": list(named.values())}]
    exempt: Any = getattr(model, "no_weight_decay", set)()
    free = {name for name, parameter in named.items() if parameter.ndim <= 1 or name in exempt}
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in named.items() if name not in free]},
        {"params": [parameter for name, parameter in named.items() if name in free], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Gives every parameter group the learning rate of the coming step, and returns it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
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


def finish_gradients(accelerator: Accelerator, model: nn.Module, config: OptimConfig) -> Tensor:
    """Once per step, when the gradients are complete: undo fp16 scaling, add the L1 penalty's part, clip.

    Returns their total norm before clipping, a scalar tensor on the device that the host has not waited for.
    """
    accelerator.unscale_gradients()
    parameters = [p for p in model.parameters() if p.grad is not None]
    if config.l1:
        add_l1_gradient(parameters, config.l1)
    norm = _total_norm([p.grad for p in parameters if p.grad is not None])
    if config.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
    return norm


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, the same bits whether they are sharded or not."""
    if any(is_sharded(gradient) for gradient in gradients):
        # Each is whole for a moment: norms of parts would be added up in another order.
        norms = [torch.linalg.vector_norm(whole(gradient)) for gradient in gradients]
        return torch.linalg.vector_norm(torch.stack(norms))
    return torch.nn.utils.get_total_norm(gradients)


def update(optimizer: AcceleratedOptimizer, bad: Tensor) -> None:
    """One optimizer step; nothing, neither weights nor state, changes where `bad`, a flag on the device, is set.

    The fused kernels look at the flag themselves. Others wait for the device to know it. In fp16 the gradient scaler
    has looked at the same gradients, and lowers its scale too.
    """
    bare = optimizer.optimizer
    if optimizer.scaler is None and bare.defaults.get("fused"):
        bare.found_inf = bad.float()
    if optimizer.scaler is not None or bare.defaults.get("fused") or not bad:
        optimizer.step()


def histograms_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradients and weights of every layer, by name, for histograms. Every process must take part."""
    named = list(model.named_parameters())
    gradients = {f"gradients/{name}": whole(p.grad) for name, p in named if p.grad is not None}
    return {**gradients, **{f"weights/{name}": whole(p.detach()) for name, p in named}}
