"""The memory that fine-tuning Stable Diffusion takes: weights and optimizer computed, a step's activations measured.

A step of batch 1 with random weights in the exact size, forward and backward on a CPU, by fused attention as on a GPU;
each row in a process of its own. "step" is the most it held over what was there before, with gradients and narrow
copies of the weights. A GPU needs about a gigabyte more for its kernels.

    python scripts/bench/finetune_memory.py
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

ROWS = [  # family, method, side in pixels, gradient checkpointing, bytes of both moments of a weight
    ("1", "lora", 512, False, 8),
    ("1", "lora", 512, True, 8),
    ("1", "full", 512, True, 8),
    ("1", "full", 512, True, 2),
    ("XL", "lora", 1024, True, 8),
]
AUTOENCODER = 83_653_863  # text encoders leave the device once the captions are encoded


def measured(family: str, method: str, side: int, checkpointing: bool) -> tuple[int, int, float]:
    """Parameters trained and not, and gigabytes of a step."""
    import torch

    from latentdiff.families.own import seeded
    from latentdiff.networks.adapters import trained as taught_adapter
    from latentdiff.networks.backbones.unet import UNet
    from latentdiff.networks.conditions import Conditions
    from tests import stable_diffusion

    torch.set_default_dtype(torch.bfloat16 if method == "lora" else torch.float32)
    unet = UNet(stable_diffusion.unet(family, tiny=False))
    if method == "lora":
        with seeded(0):
            taught_adapter.attach_factors({"unet": unet.model}, taught_adapter.Factors(16, 16))
    if checkpointing:
        unet.save_memory()
    unet.train()
    arrays = {"tokens": torch.randn(1, 77, unet.spec.reads["tokens"][-1])}
    if family == "XL":
        arrays |= {"pooled": torch.randn(1, 1280), "sizes": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])}
    conditions = Conditions(arrays)
    x = torch.randn(1, 4, side // 8, side // 8)
    before = _resident()
    with torch.autocast("cpu", torch.bfloat16):
        loss = unet(x, 500, conditions).float().square().mean()
    loss.backward()
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in unet.parameters()) - trained, _peak() - before


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """A line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=int)
    options = parser.parse_args()
    if options.row is None:
        print("family method side checkpointing  trained   weights  optimizer  step    together")
        for row in range(len(ROWS)):
            subprocess.run([sys.executable, __file__, "--row", str(row)], check=True)
        return
    family, method, side, checkpointing, moments = ROWS[options.row]
    trained, frozen, step = measured(family, method, side, checkpointing)
    weights = (4 * trained + 2 * frozen + 4 * AUTOENCODER) / 1e9
    optimizer = (moments + 4) * trained / 1e9  # and the average
    kind = f"{method}, 8-bit" if moments == 2 else method
    print(
        f"{family:6} {kind:11} {side:4} {'yes' if checkpointing else 'no':4} {trained / 1e6:12.1f} M {weights:6.1f} GB "
        f"{optimizer:6.1f} GB {step:6.1f} GB {weights + optimizer + step:6.1f} GB",
        flush=True,
    )


if __name__ == "__main__":
    main()
