"""One way of drawing, in a process of its own that draws on request.

    python scripts/bench/peers.py KIND MODEL [DEVICE]

Reads a JSON object a line (prompt, steps, guidance, height, width, latents: an .npy file, out: another), draws with
DDIM on the model's own schedule from those latents, writes the pictures, float (N, H, W, 3) in [0, 1], and answers with
a line of JSON: seconds, memory (the process's largest, MB, or the GPU's), in_use (now), weights (MB). KINDS says what
each runs. `Peer` is the other end.
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
    "genai": "openvino-genai's Text2ImagePipeline; with -int8 or -int4 NNCF's weight compression",
}
GRAPHS = "graphs"  # the first argument of a process that only writes openvino-genai's graphs: MODEL FOLDER BITS


def ours(kind, model, device):
    from latentdiff import LatentDiffusionPipeline

    runtime, *rest = kind.split("-")
    settings = {name_of(word): word for word in rest}
    pipe = LatentDiffusionPipeline.from_pretrained(model, runtime=runtime, device=device, **settings)
    solver = (
        {} if pipe.model.path.has_integer_times is False else {"sampler": "ddim", "spacing": "trailing"}
    )  # a straight path keeps its own sampler

    def draw(options, latents):
        draw.weights = weights_of(pipe)
        return (
            pipe(
                options["prompt"],
                num_images_per_prompt=len(latents),
                batch_size=len(latents),
                num_inference_steps=options["steps"],
                guidance_scale=options["guidance"],
                height=options["height"],
                width=options["width"],
                **solver,
                latents=latents,
                output_type="uint8",
            ).images.astype("float32")
            / 255
        )

    return draw


def name_of(word):
    """The setting that a word of a kind is a value of."""
    if word in ("exact", "fast", "max"):
        return "speed"
    return "torch_dtype" if word.startswith(("float", "bfloat")) else "quantize"


def weights_of(pipe):
    """Bytes of a pipeline's weights in memory; of OpenVINO's those of its compiled graphs in the cache."""
    import os
    from pathlib import Path

    if pipe.runtime == "openvino":
        return sum(file.stat().st_size for file in Path(os.environ["LATENTDIFF_CACHE"]).glob("*.blob"))
    modules = [part for part in pipe.components.values() if hasattr(part, "parameters")]
    return sum(map(bytes_of, (parameter for module in modules for parameter in module.parameters())))


def bytes_of(tensor):
    """Bytes of a tensor; torchao's are made of others."""
    inner = getattr(type(tensor), "__tensor_flatten__", None)
    if inner is None:
        return tensor.numel() * tensor.element_size()
    return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def genai(kind, model, device):
    """openvino-genai's pipeline on graphs of the same weights, with NNCF's weight compression at its defaults."""
    from pathlib import Path

    import numpy as np
    import openvino as ov
    import openvino_genai

    folder = Path(tempfile.mkdtemp())
    subprocess.run([sys.executable, __file__, GRAPHS, model, folder, kind.partition("-")[2]], check=True)
    pipe = openvino_genai.Text2ImagePipeline(folder, "CPU")
    sizes = sum(file.stat().st_size for file in folder.rglob("openvino_model.bin"))
    shutil.rmtree(folder)

    class Noise(openvino_genai.Generator):
        def __init__(self, latents):
            super().__init__()
            self.latents = latents

        def next(self):
            raise RuntimeError("only whole tensors are asked for")

        def randn_tensor(self, shape):
            return ov.Tensor(np.ascontiguousarray(self.latents.reshape(list(shape))))

    def draw(options, latents):
        draw.weights = sizes
        pictures = pipe.generate(
            options["prompt"],
            num_inference_steps=options["steps"],
            guidance_scale=options["guidance"],
            height=options["height"],
            width=options["width"],
            generator=Noise(latents),
        )
        return np.asarray(pictures.data, np.float32) / 255

    return draw


def graphs_of(model, folder, bits):
    """A model as openvino-genai reads it: the layout that optimum-intel writes."""
    from pathlib import Path

    import nncf
    import openvino as ov
    import torch
    from diffusers import StableDiffusionPipeline
    from openvino_tokenizers import convert_tokenizer

    folder = Path(folder)
    pipe = StableDiffusionPipeline.from_pretrained(model, use_safetensors=True, torch_dtype=torch.float32)
    width = pipe.unet.config.cross_attention_dim

    class Texts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = pipe.text_encoder

        def forward(self, input_ids):
            output = self.model(input_ids)
            return output.last_hidden_state, output.pooler_output

    class Denoised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = pipe.unet

        def forward(self, sample, timestep, encoder_hidden_states):
            return self.model(sample, timestep, encoder_hidden_states).sample

    class Decoded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = pipe.vae

        def forward(self, latent_sample):
            return self.vae.decode(latent_sample).sample

    x, text = torch.randn(2, 4, 32, 32), torch.randn(2, 77, width)
    parts = {
        "text_encoder": (Texts(), (torch.ones(1, 77, dtype=torch.long),), ["last_hidden_state", "pooler_output"]),
        "unet": (Denoised(), (x, torch.tensor([1]), text), ["out_sample"]),
        "vae_decoder": (Decoded(), (x[:1],), ["sample"]),
    }
    for name, (module, inputs, outputs) in parts.items():
        with torch.no_grad():
            graph = ov.convert_model(module.eval(), example_input=inputs)
        for output, called in zip(graph.outputs, outputs, strict=True):
            output.get_tensor().set_names({called})
        if bits and name != "vae_decoder":
            adjusted = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
            fine = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 64, "advanced_parameters": adjusted}
            graph = nncf.compress_weights(graph, **({} if bits == "int8" else fine))
        (folder / name).mkdir()
        ov.save_model(graph, folder / name / "openvino_model.xml", compress_to_fp16=True)
        config = pipe.vae.config if name == "vae_decoder" else getattr(pipe, name).config
        tree = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        (folder / name / "config.json").write_text(json.dumps(tree, default=str))
    (folder / "tokenizer").mkdir()
    ov.save_model(convert_tokenizer(pipe.tokenizer), folder / "tokenizer" / "openvino_tokenizer.xml")
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.save_config(folder)


def called(pipe, before=lambda options, count: None):
    """A diffusers pipeline, and its likes."""
    import torch

    pipe.set_progress_bar_config(disable=True)

    def draw(options, latents):
        before(options, len(latents))
        return pipe(
            [options["prompt"]] * len(latents),
            num_inference_steps=options["steps"],
            guidance_scale=options["guidance"],
            height=options["height"],
            width=options["width"],
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

    def reshaped(options, count):
        shape = {
            "batch_size": count,
            "height": options["height"],
            "width": options["width"],
            "num_images_per_prompt": 1,
        }
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

    make = {"diffusers": diffusers, "optimum": optimum, "genai": genai}.get(kind.split("-")[0], ours)
    draw = make(kind, model, device)
    print("{}", flush=True)
    for line in sys.stdin:
        options = json.loads(line)
        latents = np.load(options["latents"])
        began = time.perf_counter()
        pictures = draw(options, latents)
        seconds = time.perf_counter() - began
        np.save(options["out"], pictures)
        memory = largest(device)
        in_use = psutil.Process().memory_info().rss / 2**20
        weights = getattr(draw, "weights", 0) / 2**20
        print(json.dumps({"seconds": seconds, "memory": memory, "in_use": in_use, "weights": weights}), flush=True)


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

    def draw(self, **options):
        self._process.stdin.write(json.dumps(options) + "\n")
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
    graphs_of(*sys.argv[2:]) if sys.argv[1] == GRAPHS else serve(*sys.argv[1:])
