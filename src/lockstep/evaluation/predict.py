"""What a network makes of images without labels."""

import numpy as np
import torch
from torch import nn

from lockstep.augment.transform import Transform
from lockstep.launch.sharding import gathered
from lockstep.launch.transfer import to_device


@torch.no_grad()
def predict(
    model: nn.Module, transform: Transform, images: np.ndarray, device: torch.device, temperature: float = 1.0
) -> np.ndarray:
    """Probabilities of all classes, float32 (N, classes), for uint8 images (N, H, W, C) of one batch.

    Logits are divided by `temperature`. Every process of a sharded network must take part.
    """
    model.eval()
    with gathered(model):
        logits = transform.logits(model, to_device(torch.from_numpy(images), device))
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).softmax(1).float().cpu().numpy()
