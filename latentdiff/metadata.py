"""What a picture says about how it was made: A1111's `parameters` line and everything as JSON.

Two text chunks of a PNG. `parameters` is what the tools of this field read; `latentdiff` is the whole request with
its defaults, the model's hash, the versions, runtime and device, from which the picture can be made again (unless
it was drawn from latents of the caller's own, which is noted).
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentdiff.errors import DataError

_SAMPLER_NAMES = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
}
_SPACING_NAMES = {"karras": "Karras", "uniform": "Exponential"}


@dataclass(frozen=True)
class Source:
    """A file that a picture was drawn with beside the model: what it served as, where it was, what it was.

    path: as it was named, but of an absolute path the name alone: pictures do not tell of their maker's folders.
    """

    kind: str  # lora, embedding, weaker, clip
    path: str
    sha256: str
    weight: float = 1.0


@dataclass(frozen=True)
class ImageMetadata:
    """One picture's record. `request` is the call's, with defaults; `seed` and `index` are this picture's.

    steps: those that each pass took. canvas: the picture it was drawn from. batch: its place in its batch, and the
    batch's size. own_noise: noise or contexts were the caller's, not those of seed and prompt.
    """

    request: dict[str, Any]
    index: int
    seed: int
    width: int
    height: int
    model: str
    model_hash: str
    runtime: str
    device: str
    dtype: str
    versions: dict[str, str]
    steps: tuple[int, ...] = ()
    model_source: str | None = None
    sources: tuple[Source, ...] = ()
    canvas: dict[str, Any] | None = None
    batch: tuple[int, int] = (0, 1)
    own_noise: bool = False


def recorded(path: Path) -> str:
    """What a picture says of a path; see `Source`."""
    return path.name if path.is_absolute() else path.as_posix()


def installed_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("latentdiff", "torch", "diffusers", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def parameters_text(record: ImageMetadata) -> str:
    """A1111's format: prompt, negative prompt, then one line of settings.

    Every value is kept on its own line, so that no prompt can forge a field of another.
    """
    asked = record.request
    lines = [_one_line(asked["prompt"])]
    if asked["negative_prompt"]:
        lines.append(f"Negative prompt: {_one_line(asked['negative_prompt'])}")
    fields = {
        "Steps": asked["num_inference_steps"],
        "Sampler": _SAMPLER_NAMES[asked["sampler"]],
        "Schedule type": _SPACING_NAMES.get(asked["spacing"], "Automatic"),
        "CFG scale": f"{asked['guidance_scale']:g}",
        "Seed": record.seed,
        "Size": f"{record.width}x{record.height}",
        "Model hash": record.model_hash[:10],
        "Model": _quoted(record.model),
        "Version": f"latentdiff {record.versions.get('latentdiff', 'unknown')}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return "\n".join(lines)


def _one_line(text: str) -> str:
    """Without line breaks; a text that opens like a field of the format is quoted."""
    line = " ".join(text.split())
    return json.dumps(line) if line.startswith(("Negative prompt:", "Steps:")) else line


def _quoted(text: str) -> str:
    return json.dumps(text) if any(c in text for c in ',:"\n') else text


def png_info(record: ImageMetadata) -> PngInfo:
    """The text chunks of one picture."""
    info = PngInfo()
    info.add_text("parameters", parameters_text(record)) if parameters_text(record).isascii() else info.add_itxt(
        "parameters", parameters_text(record)
    )
    info.add_itxt("latentdiff", json.dumps(asdict(record), ensure_ascii=False))
    return info


def read_metadata(path: Path) -> dict[str, Any]:
    """What a picture says of itself: {"parameters": text, "latentdiff": tree}, what is there of it.

    Raises DataError for what is not a picture. The tree is data from outside: validate before use.
    """
    try:
        with Image.open(path) as image:
            image.load()
            texts = {k: v for k, v in image.info.items() if k in ("parameters", "latentdiff") and isinstance(v, str)}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"not a readable picture ({path}): {error}") from None
    found: dict[str, Any] = dict(texts)
    if "latentdiff" in found:
        try:
            found["latentdiff"] = json.loads(found["latentdiff"])
        except (ValueError, RecursionError):
            raise DataError(f"its latentdiff record is not JSON ({path})") from None
    return found
