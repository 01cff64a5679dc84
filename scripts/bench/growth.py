"""How the time of drawing grows with pictures, steps and size, and whether memory does: one runtime, one process.

    python scripts/bench/growth.py [MODEL] [--kind openvino] [--pictures 500]

Pictures at once 1 to 64, steps 5 to 50, sides 64 to 256, medians of `--runs`. Of pictures and steps the straight line
a + b n that fits best and the share of the variance that it explains; of size the exponent of the number of pixels.
Then `--pictures` one after another, and the memory in use at every tenth of them.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from peers import KINDS, Peer
from warm import options_of


def line(x, y):
    """a, b and R^2 of y = a + b x."""
    b, a = np.polyfit(x, y, 1)
    return a, b, 1 - np.var(np.subtract(y, a + b * np.asarray(x))) / np.var(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--kind", choices=KINDS, default="openvino")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--guidance", type=float, default=2.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments, folder):
    peer = None

    def request(pictures=1, steps=20, size=64):
        options = argparse.Namespace(**vars(arguments) | {"pictures": pictures, "steps": steps, "size": size})
        return options_of(options, folder)

    def seconds(**shape):
        nonlocal peer
        model, settings = request(**shape)
        peer = peer or Peer(arguments.kind, model)
        peer.draw(**settings)  # compiles, where it must
        result = statistics.median(peer.draw(**settings)["seconds"] for _ in range(arguments.runs))
        print(f"  {shape}: {result:.3f} s")
        return result

    for name, values in (("pictures", (1, 2, 4, 8, 16, 32, 64)), ("steps", (5, 10, 20, 35, 50))):
        a, b, explained = line(values, [seconds(**{name: value}) for value in values])
        print(f"{name}: {a:.3f} s + {b:.4f} s each, R^2 {explained:.4f}\n", flush=True)
    sides = (64, 96, 128, 192, 256)
    exponent = np.polyfit(np.log(np.square(sides)), np.log([seconds(size=side) for side in sides]), 1)[0]
    print(f"size: the number of pixels to the power of {exponent:.2f}\n", flush=True)
    _, settings = request(steps=5)
    every = max(arguments.pictures // 10, 1)
    curve = [peer.draw(**settings)["in_use"] for _ in range(arguments.pictures)][every - 1 :: every]
    print(f"memory in use over {arguments.pictures} pictures, MB: {', '.join(f'{each:.0f}' for each in curve)}")


if __name__ == "__main__":
    main()
