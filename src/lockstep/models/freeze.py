"""Parts of a network that do not learn."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lockstep.errors import UserError, did_you_mean


def freeze(model: nn.Module, patterns: Sequence[str]) -> str:
    """Let the parameters of these names stay as they are; returns a line that says which, empty without patterns.

    A shell-like pattern (`*`, `?`, `[12]`; `*` also spans dots) matches a parameter, or a layer with all that is in it.
    A batch norm whose own parameters are all frozen (or that has none, and matches) normalises by its running
    statistics from now on, in training too, and leaves them as they are.
    Raises UserError for a pattern that matches nothing.
    """
    if not patterns:
        return ""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in model.state_dict()):
            names = [*parameters, *(name for name, layer in model.named_modules() if name)]
            raise UserError(f"--model.freeze={pattern} matches no parameter.{did_you_mean(pattern, names)}".rstrip("."))
    frozen = {name for name in parameters if any(_matches(name, pattern) for pattern in patterns)}
    for name in frozen:
        parameters[name].requires_grad_(False)
    norms = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and _rests(name, layer, patterns)
    ]
    for layer in norms:
        layer.eval()
        vars(layer)["train"] = lambda mode=True, layer=layer: layer  # whatever its network is told later
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    statistics = f", and the statistics of {len(norms)} batch norms" if norms else ""
    return f"frozen: {len(frozen)} of {len(parameters)} tensors{statistics}; {learning:,} of {total:,} parameters learn"


def is_frozen(norm: nn.Module) -> bool:
    """Whether `freeze` made the statistics of this batch norm stay."""
    return "train" in vars(norm)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _rests(name: str, layer: nn.Module, patterns: Sequence[str]) -> bool:
    own = [*layer.parameters(recurse=False)]
    if own:
        return not any(parameter.requires_grad for parameter in own)
    return any(_matches(f"{name}.running_mean", pattern) for pattern in patterns)
