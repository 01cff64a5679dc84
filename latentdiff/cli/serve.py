"""`latentdiff serve`: the web page and the HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentdiff.cli import terminal
from latentdiff.cli.loading import adapter_and_weight, embedding_and_word, load_extras, loaded
from latentdiff.cli.options import OUTPUTS, Model, Precision, Runtime, Speed
from latentdiff.core.errors import ConfigError, UnsafeError
from latentdiff.core.files import check_writable

if TYPE_CHECKING:
    from latentdiff.pipeline import LatentDiffusionPipeline

HOST = "127.0.0.1"


def serve(
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; any other than this machine's needs a token.")
    ] = HOST,
    port: Annotated[int, typer.Option(min=1, max=65_535, help="The port.")] = 7860,
    token: Annotated[
        str | None, typer.Option(envvar="LATENTDIFF_TOKEN", help="Clients must send it: Authorization: Bearer TOKEN.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    models: Annotated[Path | None, typer.Option(help="A folder of models that clients may choose by name.")] = None,
    loras: Annotated[Path | None, typer.Option(help="A folder of adapters that clients may choose by name.")] = None,
    controls: Annotated[
        Path | None, typer.Option(help="A folder of ControlNets that clients may choose by name.")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, max=100, help="Largest number of models in memory.")] = 2,
    runs: Annotated[Path, typer.Option(help="The folder of the training runs that the page shows.")] = Path("runs"),
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of all pictures.")] = OUTPUTS,
    lora: Annotated[
        list[str] | None, typer.Option(help="An adapter and its weight, PATH:0.8; may be repeated.")
    ] = None,
    embedding: Annotated[list[str] | None, typer.Option(help="Learnt words, PATH or WORD=PATH.")] = None,
    vae: Annotated[Path | None, typer.Option(help="Another VAE for the same latents.")] = None,
    most_waiting: Annotated[int, typer.Option(min=1, max=100_000, help="Largest number of waiting pictures.")] = 200,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one).")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Precision of the arithmetic.")] = None,
    runtime: Annotated[
        Runtime, typer.Option(help="auto: openvino on a CPU if the model has an export, otherwise torch.")
    ] = Runtime.auto,
    speed: Annotated[Speed | None, typer.Option(help="exact, fast or max.")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="Quantize the weights, for less memory (int4: openvino; fp8, q8_0, q4_0: torch)."
        ),
    ] = None,
) -> None:
    """Serve a web page, OpenAI's images API and A1111's API. Ctrl-C stops it."""
    _check_token(host, token)
    for folder in (models, loras, controls):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"no such folder ({folder})")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file. Name a folder")
    check_writable(output, output)
    adapters = [adapter_and_weight(each) for each in lora or []]
    words = [embedding_and_word(each) for each in embedding or []]
    from latentdiff.server.guard import names_of
    from latentdiff.server.run import listening
    from latentdiff.server.run import serve as run
    from latentdiff.server.shelf import Shelf
    from latentdiff.server.studio import Studio

    def opened(path: Path | None, torch: bool = False) -> LatentDiffusionPipeline:
        """A model with the command's options; without a path the server's own, with its adapters, words and VAE."""
        chosen = Runtime.torch if torch and runtime == Runtime.auto else runtime
        pipe = loaded(model if path is None else str(path), device, dtype, None, None, chosen, speed, quantize)
        if path is None:
            load_extras(pipe, adapters, words, vae)
        return pipe

    with listening(host, port) as listener:  # before the model is loaded, which may take minutes
        pipe = opened(None)
        shelf = Shelf(pipe, opened, models, loras, keep, controls)
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        terminal.note(f"{pipe.card.name} at {address}, for programs at {address}/v1; pictures go to {output}")
        run(Studio(shelf, output, most_waiting, runs), listener, names_of(host), token, address if open_ else None)


def _check_token(host: str, token: str | None) -> None:
    """Raises UnsafeError for an address that others reach without a token, ConfigError for a bad token."""
    if token is not None and not (len(token) >= 8 and token.isascii() and token.isprintable()):
        raise ConfigError("a token must have at least 8 printable ASCII characters")
    from latentdiff.server.guard import is_local

    if token is None and not is_local(host):
        raise UnsafeError(f"--host {host} needs --token or LATENTDIFF_TOKEN")
