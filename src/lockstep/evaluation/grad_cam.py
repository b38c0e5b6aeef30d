"""Which part of an image speaks for a class: Grad-CAM."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lockstep.evaluation.activations import as_maps, recorded


def grad_cam(model: nn.Module, layer: str, images: Tensor, classes: Tensor) -> Tensor:
    """Heat (N, h, w) in [0, 1] over the maps of a layer, for a normalised batch (N, C, H, W) and a class of each, (N,).

    The maps are weighted by the mean over their pixels of the gradient of the class's logit, added up, and cut off
    below zero; the hottest pixel of each image is 1, or all are 0 where nothing speaks for the class. Selvaraju et
    al., Grad-CAM, ICCV 2017. The network is left in evaluation mode.
    """
    model.eval()
    with torch.enable_grad(), recorded(model, [layer]) as outputs:
        logits = model(images.detach().requires_grad_())
        chosen = logits.gather(1, classes[:, None]).sum()  # images do not meet in evaluation
        (gradient,) = torch.autograd.grad(chosen, outputs[layer])
    maps, gradients = (as_maps(model, model.get_submodule(layer), of) for of in (outputs[layer].detach(), gradient))
    assert maps is not None and gradients is not None, f"{layer} puts out no maps"
    heat = (gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu().float()
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)


def usual_layer(model: nn.Module, names: Sequence[str]) -> str:
    """Of layers that put out maps, in their order, the last, or of a transformer the one before the last attention.

    Behind it a class token may go on alone to the logits: then the others have no gradient.
    """
    attention = f"blocks.{len(getattr(model, 'blocks', ())) - 1}.norm1"
    return attention if hasattr(model, "num_prefix_tokens") and attention in names else names[-1]
