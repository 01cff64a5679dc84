"""One way of drawing, in a process of its own that draws when it is told to.

    python scripts/bench/peers.py KIND MODEL [DEVICE]

Reads a JSON object a line (prompt, steps, guidance, height, width, latents: an .npy file, out: another), draws with
DDIM on the model's own schedule from those latents, writes the pictures, float (N, H, W, 3) in [0, 1], and answers with
a line of JSON: seconds, memory (the process's largest, MB, or the GPU's), in_use (now). KINDS says what each runs.
`Peer` is the other end.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time

KINDS = {
    "openvino": "latentdiff on OpenVINO as it comes, bfloat16 where the CPU has it",
    "openvino-float32": "latentdiff on OpenVINO in float32",
    "torch": "latentdiff on torch in float32, --speed exact",
    "torch-fast": "latentdiff on torch, --speed fast",
    "torch-fast-bfloat16": "the same in bfloat16",
    "torch-max": "latentdiff on torch, --speed max",
    "diffusers": "diffusers' pipeline in float32, eager",
    "diffusers-bfloat16": "the same in bfloat16",
    "diffusers-best": "bfloat16, channels_last, fused projections, U-Net and decoder compiled (on a GPU max-autotune)",
    "optimum": "optimum-intel's OVStableDiffusionPipeline, reshaped to the size and compiled",
}


def ours(kind, model, device):
    from latentdiff import LatentDiffusionPipeline

    runtime, *rest = kind.split("-")
    settings = {"torch_dtype" if word.startswith(("float", "bfloat")) else "speed": word for word in rest}
    pipe = LatentDiffusionPipeline.from_pretrained(model, runtime=runtime, device=device, **settings)

    def draw(asked, latents):
        return (
            pipe(
                asked["prompt"],
                num_images_per_prompt=len(latents),
                batch_size=len(latents),
                num_inference_steps=asked["steps"],
                guidance_scale=asked["guidance"],
                height=asked["height"],
                width=asked["width"],
                sampler="ddim",
                spacing="trailing",
                latents=latents,
                output_type="uint8",
            ).images.astype("float32")
            / 255
        )

    return draw


def called(pipe, before=lambda asked, count: None):
    """A diffusers pipeline, and its likes."""
    import torch

    pipe.set_progress_bar_config(disable=True)

    def draw(asked, latents):
        before(asked, len(latents))
        return pipe(
            [asked["prompt"]] * len(latents),
            num_inference_steps=asked["steps"],
            guidance_scale=asked["guidance"],
            height=asked["height"],
            width=asked["width"],
            latents=torch.from_numpy(latents).to(pipe.device, getattr(pipe, "dtype", torch.float32)),
            output_type="uint8",
        ).images

    return draw


def diffusers(kind, model, device):
    import torch
    from diffusers import DiffusionPipeline

    dtype = torch.float32 if kind == "diffusers" else torch.bfloat16
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, use_safetensors=True).to(device)
    if kind.endswith("best"):
        mode = "max-autotune" if device == "cuda" else None
        pipe.fuse_qkv_projections()
        for part in (pipe.unet, pipe.vae):
            part.to(memory_format=torch.channels_last)
        pipe.unet.compile(fullgraph=True, mode=mode)
        pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True, mode=mode)
    return called(pipe)


def optimum(kind, model, device):
    from optimum.intel import OVStableDiffusionPipeline

    with tempfile.TemporaryDirectory() as scratch:
        pipe = OVStableDiffusionPipeline.from_pretrained(renamed(model, scratch), export=True, compile=False)
    shaped = []

    def reshaped(asked, count):
        shape = {"batch_size": count, "height": asked["height"], "width": asked["width"], "num_images_per_prompt": 1}
        if shaped != [shape]:
            pipe.reshape(**shape)
            pipe.compile()
            shaped[:] = [shape]

    return called(pipe, reshaped)


def renamed(model, scratch):
    """The model with its text encoder's weights called as the transformers of that environment calls them."""
    from pathlib import Path

    from safetensors.numpy import load_file, save_file

    copy = Path(shutil.copytree(model, Path(scratch) / "model"))
    (file,) = (copy / "text_encoder").glob("*.safetensors")
    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    return copy


def serve(kind, model, device="cpu"):
    import numpy as np
    import psutil

    make = {"diffusers": diffusers, "optimum": optimum}.get(kind.split("-")[0], ours)
    draw = make(kind, model, device)
    print("{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        latents = np.load(asked["latents"])
        began = time.perf_counter()
        pictures = draw(asked, latents)
        seconds = time.perf_counter() - began
        np.save(asked["out"], pictures)
        memory = largest(device)
        in_use = psutil.Process().memory_info().rss / 2**20
        print(json.dumps({"seconds": seconds, "memory": memory, "in_use": in_use}), flush=True)


def largest(device):
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Peer:
    """A process that draws; `python` is one in whose environment its library is installed."""

    def __init__(self, kind, model, device="cpu", python=sys.executable):
        self.kind = kind
        words = [python, __file__, kind, str(model), device]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._answer()

    def draw(self, **asked):
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self):
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # libraries print lines of their own
                return json.loads(line)
        raise SystemExit(f"{self.kind} ended: run {' '.join(self._process.args)} to see why")

    def close(self):
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    serve(*sys.argv[1:])
