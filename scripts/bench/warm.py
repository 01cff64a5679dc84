"""A picture once everything is loaded: ours in each runtime beside diffusers and optimum-intel, paired in one run.

    python scripts/bench/warm.py MODEL [--beside diffusers optimum ...] [--runs 7] [--size 256] [--steps 4]

All draw with the same weights, latents, prompt, DDIM steps and guidance, each in a process of its own with all cores.
The kind `--of` is measured beside every other in turn; two are in memory at a time. Printed: the seconds of a picture,
medians; how many times as long the other takes, run by run; how far its pictures are from torch's exact ones, of 255.
`--optimum PYTHON` names the interpreter of an environment with optimum-intel, which wants versions of its own.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from peers import KINDS, Peer

PROMPT = "a red circle above a blue square"


def options_of(arguments, folder):
    """What all are told, and the file of their latents."""
    from latentdiff.diffusion.noise import normal
    from latentdiff.families.loading import included_model
    from latentdiff.formats.folder import picture_geometry

    model = arguments.model or included_model()
    height, width = (arguments.size, arguments.size) if arguments.size else picture_geometry(model)[1]
    from latentdiff.formats.folder import read_json

    vae = read_json(model / "vae" / "config.json")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    shape = (arguments.pictures, vae["latent_channels"], height // factor, width // factor)
    np.save(folder / "latents.npy", normal(shape, 1, "bench"))
    return model, {
        "prompt": PROMPT,
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "height": height,
        "width": width,
        "latents": str(folder / "latents.npy"),
        "out": str(folder / "pictures.npy"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--of", default="openvino", choices=KINDS)
    parser.add_argument("--beside", nargs="+", choices=KINDS, default=["torch", "diffusers"])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--size", type=int)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--optimum", metavar="PYTHON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, options = options_of(arguments, Path(folder))
        pythons = {"optimum": {"python": arguments.optimum}} if arguments.optimum else {}
        exact = Peer("torch", model)
        exact.draw(**options)
        expected = np.load(options["out"])
        exact.close()
        print(f"{options['width']}x{options['height']}, {options['steps']} steps, {arguments.pictures} at once")
        reference = Peer(arguments.of, model)
        for kind in arguments.beside:
            other = Peer(kind, model, **pythons.get(kind, {}))
            rows = [
                (reference.draw(**options), pictures(options), other.draw(**options), pictures(options))
                for _ in range(arguments.runs + 2)
            ][2:]  # the first two compile and warm
            other.close()
            report(arguments.of, kind, rows, expected)
        reference.close()


def pictures(options):
    return np.load(options["out"])


def report(ours, theirs, rows, expected):
    mine, other = [row[0]["seconds"] for row in rows], [row[2]["seconds"] for row in rows]
    ratios = [b / a for a, b in zip(mine, other, strict=True)]
    for kind, seconds, picture in ((ours, mine, rows[-1][1]), (theirs, other, rows[-1][3])):
        apart = 255 * np.abs(picture - expected)
        memory = rows[-1][0 if kind == ours else 2]["memory"]
        distance = f"from exact: at most {apart.max():5.1f}, mean {apart.mean():.3f}"
        print(f"  {kind:<17} {statistics.median(seconds):7.3f} s  {memory:6.0f} MB  {distance}")
    print(
        f"  {theirs} takes {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f})\n",
        flush=True,
    )


if __name__ == "__main__":
    main()
