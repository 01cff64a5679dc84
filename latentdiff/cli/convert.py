"""`latentdiff convert`: a model or an adapter in another form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from latentdiff.cli import terminal
from latentdiff.cli.options import Precision
from latentdiff.core.errors import ConfigError
from latentdiff.core.files import atomic, check_writable


class Form(StrEnum):
    """The target format of an adapter or a model."""

    peft = "peft"
    kohya = "kohya"
    openvino = "openvino"


def convert(
    source: Annotated[Path, typer.Argument(help="A model folder, a single .safetensors file, or an adapter.")],
    output: Annotated[
        Path | None,
        typer.Argument(help="A new folder, or a new .safetensors file; optional with --to openvino: MODEL/openvino."),
    ] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Precision of the weights (default: unchanged).")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="For a model: quantize to GGUF's q8_0 or q4_0, a half or a quarter of 16 bits.",
        ),
    ] = None,
    to: Annotated[
        Form | None, typer.Option(help="For an adapter: peft or kohya. For a model: openvino, for CPUs.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="For an adapter: its model (default: the one of the package)."),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of a folder's weights: fp16, ...")] = None,
    vae: Annotated[
        Path | None, typer.Option(help="For a model: replace its VAE by this one, which may be tiny.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="For a transformer file: a model folder of its family, which provides the other parts."),
    ] = None,
    part: Annotated[
        list[Path] | None, typer.Option(help="With --base: a further file, with a text encoder or a VAE. Repeatable.")
    ] = None,
    prediction: Annotated[
        str | None, typer.Option(help="What the model's U-Net predicts, where its files are wrong: v_prediction, ...")
    ] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Read the tensors of a pickle (.ckpt, .bin) in a separate process.")
    ] = False,
) -> None:
    """Convert a model or an adapter.

    A model folder to a single file and back, to another precision, with another VAE, with graphs for OpenVINO; an
    adapter to other names.
    """
    from latentdiff.families.loading import place_of

    source = place_of(source)
    options = {
        "--vae": vae,
        "--dtype": dtype,
        "--quantize": quantize,
        "--prediction": prediction,
        "--base": base,
        "--part": part or None,
    }
    of_models = next((option for option, value in options.items() if value is not None), None)
    adapter = None if to is Form.openvino else to
    _check_used(adapter, model, variant, trust_pickle=trust_pickle)
    if to is Form.openvino and output is None:
        if of_models:
            raise ConfigError(
                f"{of_models} requires an output: the graphs in MODEL/openvino belong to the model as it is"
            )
        terminal.result(_exported(source, variant))
        return
    if output is None:
        raise ConfigError("name an output: a new folder, or a new .safetensors file")
    check_writable(output, output.parent)
    if output.exists() or output.is_symlink():
        raise ConfigError(f"{output} exists; nothing is overwritten")
    _check_output(output, to, of_models, of_file=trust_pickle)
    if quantize is not None:
        _check_quantized(quantize, output, to)
    if trust_pickle:
        _pickle(source, output)
    elif adapter:
        _adapter(source, output, adapter, model)
    else:
        exporting = to is Form.openvino
        _model(source, output, _Change(dtype, variant, vae, prediction, base, part or [], quantize, exporting))
    terminal.result(output)


def _is_single(output: Path) -> bool:
    """Whether the output is a single file, not a folder."""
    return output.suffix.lower() == ".safetensors"


def _check_output(output: Path, to: Form | None, of_models: str | None, *, of_file: bool) -> None:
    """Raises ConfigError if the output's kind does not fit, or a model option is given for an adapter or a pickle."""
    single = _is_single(output)
    of_file = of_file or to in (Form.peft, Form.kohya)
    if of_file and to is not Form.openvino and not single:
        raise ConfigError(f"the output is a file: name it {output}.safetensors")
    if to is Form.openvino and (of_file or single):
        raise ConfigError(f"--to openvino writes a model folder, with graphs in it (got {output})")
    if of_file and of_models:
        raise ConfigError(f"{of_models} applies to models, not to an adapter or a pickle")


def _check_used(adapter: Form | None, model: str | None, variant: str | None, *, trust_pickle: bool) -> None:
    """Raises ConfigError for an option without effect."""
    if trust_pickle and adapter:
        raise ConfigError(f"--trust-pickle keeps the names of the tensors: convert its output by --to {adapter.value}")
    if model is not None and not adapter:
        raise ConfigError("--model requires --to peft or --to kohya: it is the adapter's model")
    if variant is not None and (trust_pickle or adapter):
        raise ConfigError("--variant applies to models, not to an adapter or a pickle")


def _check_quantized(kind: str, output: Path, to: Form | None) -> None:
    """Raises ConfigError for a kind that cannot be saved; those are chosen when a model is loaded."""
    from latentdiff.networks.blocks import TYPES
    from latentdiff.runtime.kinds import check_kind

    check_kind(kind, "auto")
    if kind not in TYPES:
        raise ConfigError(f"a folder keeps {' or '.join(TYPES)}; {kind} is an option of generate and serve")
    _check_folder(output)
    if to is Form.openvino:
        raise ConfigError("--to openvino has no quantized form. Convert without --quantize, then draw with it")


def _check_folder(output: Path) -> None:
    """Raises ConfigError for a single file, which cannot hold quantized weights."""
    if _is_single(output):
        raise ConfigError(f"quantized weights require a folder, not a single file (got {output})")


def _pickle(source: Path, output: Path) -> None:
    from latentdiff.formats.pickle import is_pickle
    from latentdiff.formats.unpickle import unpickled

    if not source.is_file() or not is_pickle(source):
        raise ConfigError(f"--trust-pickle requires a pickle (got {source})")
    with atomic(output) as made:
        dropped = unpickled(source, made)
    if dropped:
        terminal.note(f"note: objects beside the tensors are dropped: {', '.join(dropped)}")


def _adapter(source: Path, output: Path, to: Form, model: str | None) -> None:
    """Convert an adapter; kohya's names are compared with the names of the model's layers."""
    from latentdiff.drawing.extras import adaptable_networks
    from latentdiff.families.loading import stored_model
    from latentdiff.formats import adapter_file

    networks = adaptable_networks(stored_model(model))
    adapter = adapter_file.read_adapter(source, networks)
    if adapter.unused or adapter.missing:
        first = (adapter.unused + adapter.missing)[0]
        raise ConfigError(f"{first} of {source} has no place in the model and would be lost. Name its --model")
    if adapter.words:
        raise ConfigError(f"the learnt words {', '.join(adapter.words)} of {source} would be lost")
    if to is Form.peft:
        adapter_file.save_peft(adapter, output)
    else:
        adapter_file.save_kohya(adapter, output, networks)


def _exported(source: Path, variant: str | None) -> Path:
    """Write graphs beside a folder's weights, which do not change."""
    from latentdiff.families.loading import stored_model
    from latentdiff.runtime.export import export, export_control
    from latentdiff.runtime.graphs import FOLDER

    if not source.is_dir():
        raise ConfigError(f"{source} is not a local folder: name an output for the model and its graphs")
    if (source / FOLDER).exists() and not (source / FOLDER).is_dir():
        raise ConfigError(f"{source / FOLDER} is a file, in the place of the graphs. Move it away")
    check_writable(source, source)
    if (source / "config.json").is_file() and not (source / "model_index.json").is_file():
        from latentdiff.families.controls import stored_control

        _tell(export_control(stored_control(source), source))
        return source / FOLDER
    _tell(export(stored_model(source, variant), source, variant))
    return source / FOLDER


def _tell(differences: dict[str, float]) -> None:
    for part, difference in differences.items():
        terminal.note(f"{part}: differs from torch by {difference:.1e} of its largest value")


@dataclass(frozen=True)
class _Change:
    """What becomes different in a model; None for what stays. base, parts: see `families.parts.joined`."""

    dtype: Precision | None
    variant: str | None
    vae: Path | None
    prediction: str | None
    base: Path | None
    parts: list[Path]
    quantize: str | None
    exporting: bool

    @property
    def is_of_precision_alone(self) -> bool:
        """Whether only the numbers of a folder's weights change, if anything does."""
        others = (self.variant, self.vae, self.prediction, self.base, self.quantize)
        return not self.exporting and all(value is None for value in others)


def _model(source: Path, output: Path, change: _Change) -> None:
    """Write a model in another form. Raises ConfigError, ModelError, UnsafeError."""
    from latentdiff.formats.folder import quantized_parts

    if change.base is not None and output.resolve().is_relative_to(change.base.resolve()):
        raise ConfigError(f"{output} lies inside {change.base}. Choose another folder")
    if change.parts and change.base is None:
        raise ConfigError("--part requires --base: the folder that has the tokenizers")
    single = _is_single(output)
    # a model with quantized weights is loaded, since they and other weights share a file
    if source.is_dir() and not single and change.is_of_precision_alone and not quantized_parts(source):
        _rewrite(source, output, change.dtype)
        return
    model = _changed(source, output, change)
    _save(model, output, exporting=change.exporting)
    if single and source.is_dir():
        height, width = model.card.size
        terminal.note(f"note: a single file holds no size ({width}x{height}) and no recommended settings")


def _rewrite(source: Path, output: Path, dtype: Precision | None) -> None:
    """Write a folder in another precision, part by part: no network is built."""
    import torch

    from latentdiff.families.convert import convert_folder

    if dtype is None:
        raise ConfigError(f"{source} is a folder already: say what is to change (--dtype), or name a .safetensors")
    convert_folder(source, output, getattr(torch, dtype.value))


def _changed(source: Path, output: Path, change: _Change) -> Any:
    """The model with all that changes but its form on disk."""
    import torch

    from latentdiff.drawing.painter import prediction_of
    from latentdiff.drawing.request import request
    from latentdiff.families.loading import stored_model
    from latentdiff.pipeline import LatentDiffusionPipeline
    from latentdiff.runtime.device import moved
    from latentdiff.runtime.quantized import is_quantized, quantized

    base, variant = change.base, change.variant
    pipe = LatentDiffusionPipeline(
        stored_model(source, variant) if base is None else _joined(source, change.parts, base, variant)
    )
    if change.vae is not None:
        pipe.load_vae(change.vae, as_stored=True)
    model = pipe.model if change.dtype is None else moved(pipe.model, dtype=getattr(torch, change.dtype.value))
    if is_quantized(model):
        _check_folder(output)
    if change.quantize is not None:
        model = quantized(model, change.quantize)
    return replace(model, prediction=prediction_of(request(prompt="", prediction=change.prediction), model))


def _save(model: Any, output: Path, *, exporting: bool) -> None:
    from latentdiff.families.loading import save_model
    from latentdiff.families.original import save_single_file
    from latentdiff.runtime.export import export

    with atomic(output) as made:
        (save_single_file if _is_single(output) else save_model)(model, made)
        if exporting:
            _tell(export(model, made))


def _joined(source: Path, parts: list[Path], base: Path, variant: str | None) -> Any:
    """The model of a transformer's file, further files and a folder. Raises ConfigError, ModelError, UnsafeError."""
    from latentdiff.families.parts import joined

    if not source.is_file():
        raise ConfigError(f"--base requires a transformer file (got {source})")
    return joined([source, *parts], base, variant)
