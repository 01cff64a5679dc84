"""Networks that compare pictures: Inception and LPIPS.

Both take tensors under the names of their public weights: `pt_inception-2015-12-05-6726825d` (torch-fidelity's
conversion of the network that measures published FIDs) and the complete `lpips.LPIPS` module (Zhang et al. 2018).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.core.errors import ModelError, loading

_BACKBONES = {"alex": 256, "squeeze": 384, "vgg": 512}  # channels of LPIPS' fourth part -> its network


def inception(state: dict[str, Tensor], file: Path) -> Callable[[Tensor], Tensor]:
    """uint8 (B, 3, H, W) -> pooled features (B, 2048), float32, resized as TensorFlow 1 did.

    file: the path of the weights, for messages. Raises ModelError.
    """
    with loading("Inception", file):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        ours = io.BytesIO()  # the library reads its weights only from a file of torch.save
        torch.save(state, ours)
        ours.seek(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=ours)

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        (features,) = network(pictures)
        return features.flatten(1)

    return features


def lpips(state: dict[str, Tensor], file: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Two batches of images (B, 3, H, W) in [-1, 1] -> their perceptual distances (B,).

    The weights decide between AlexNet, SqueezeNet and VGG. Raises ModelError.
    """
    with loading("LPIPS", file):
        from torchmetrics.functional.image.lpips import _LPIPS

        width = state["lin3.model.1.weight"].shape[1] if "lin3.model.1.weight" in state else None
        kind: Any = next((name for name, channels in _BACKBONES.items() if channels == width), None)
        if kind is None:
            raise ModelError(f"not the weights of LPIPS ({file}), which have lin0 to lin4 beside the network")
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("lins.")}  # copies of lin0 to 4
        network = _LPIPS(pretrained=False, net=kind, pnet_rand=True)
        again = {f"lins.{name[3:]}": tensor for name, tensor in kept.items() if name.startswith("lin")}
        network.load_state_dict(kept | again)

    @torch.no_grad()
    def distance(first: Tensor, second: Tensor) -> Tensor:
        return network(first, second).flatten()

    return distance
