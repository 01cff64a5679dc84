"""`latentdiff data`: check a data set before training, preview its samples, encode it ahead."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentdiff.cli import terminal
from latentdiff.core.files import check_page, check_writable, write_text

if TYPE_CHECKING:
    from latentdiff.data.dataset import DataSet
    from latentdiff.networks.encoders.clip import Tokenizer
    from latentdiff.settings.config import Config

app = typer.Typer(no_args_is_help=True, help="Check, preview and cache captioned pictures.")

Source = Annotated[
    str, typer.Argument(help="A folder, shards-{000..099}.tar, .parquet files, a hub id, or a config (.toml).")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: data.pictures.bucket_step=16.")]
Resolution = Annotated[
    int | None, typer.Option(min=8, help="Side in pixels; buckets have as many pixels as its square (default 64).")
]
SHEET = 64  # pictures of a contact sheet


@app.callback()
def _data() -> None:
    """Check, preview and cache captioned pictures."""


@app.command()
def check(
    source: Source,
    resolution: Resolution = None,
    bucket_step: Annotated[int | None, typer.Option(min=1, help="Sides of buckets are multiples of this.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=4, help="Tokens after which captions are cut (default: 32).")
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Exit 0 if some pictures can be used; list the rest in the quarantine file."),
    ] = False,
    allow_missing_captions: Annotated[
        bool, typer.Option("--allow-missing-captions", help="Allow pictures without a caption.")
    ] = False,
    quarantine: Annotated[Path, typer.Option(help="The file in which --skip-bad lists unusable pictures.")] = Path(
        "quarantine.jsonl"
    ),
    html: Annotated[Path | None, typer.Option(help="Write the report as a page with a contact sheet.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    set_: Set = None,
) -> None:
    """Decode every picture and check every caption. Exits with 3 if training would refuse the data; changes nothing."""
    import json

    from latentdiff.core.errors import ConfigError, DataError
    from latentdiff.data.buckets import bucket_table
    from latentdiff.data.dataset import picture_data, survey_of
    from latentdiff.data.survey import QUARANTINED
    from latentdiff.evaluation.report.data_set import as_lines, sections, summary
    from latentdiff.evaluation.report.page import PAGE, as_html
    from latentdiff.families.own import new_tokenizer

    if skip_bad:
        check_page(quarantine, QUARANTINED)
    if html:
        check_page(html, PAGE)
    config = _config(
        source,
        set_,
        {
            "image_size": resolution,
            "data.pictures.bucket_step": bucket_step,
            "clip.max_length": max_tokens,
            "data.pictures.skip_bad": skip_bad or None,
            "data.pictures.allow_missing_captions": allow_missing_captions or None,
        },
    )
    settings = config.data.pictures
    if config.data.is_procedural:
        raise ConfigError(f"the data of {source} are procedural scenes: there is nothing to check")
    table = bucket_table(config.image_size, settings.bucket_step, settings.bucket_max_aspect)
    survey = survey_of(config)
    tokenizer = new_tokenizer(config, (caption for picture in survey.pictures for caption in picture.captions))
    limit = config.clip.max_length
    report = sections(survey, settings.source, table, limit, lambda texts: _token_counts(tokenizer, texts))
    tree: dict[str, Any] = {"summary": summary(survey, settings.source)}
    tree |= {section.title: {"text": section.text, "lines": section.lines} for section in report}
    terminal.result(*json.dumps(tree, indent=1).split("\n") if json_ else as_lines(report))
    data = picture_data(config, survey) if survey.pictures else None  # raises the errors of training
    if html:
        page = as_html(settings.source, report, _sheet(data, SHEET, 0, tokenizer) if data else [])
        write_text(html, page)
        terminal.note(html)
    if skip_bad and survey.left_out and survey.pictures:
        survey.write_quarantine(quarantine)
        terminal.note(f"{len(survey.quarantined):,} images left out: {quarantine}")
    elif refusal := survey.refusal():
        raise DataError(refusal)


@app.command()
def preview(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("preview.html"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=10_000, help="Number of samples.")] = SHEET,
    epoch: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Epoch of the random crops, flips and captions.")
    ] = 0,
    resolution: Resolution = None,
    set_: Set = None,
) -> None:
    """Show what the network sees: cropped samples of an epoch, with the words that the text encoder reads."""
    from latentdiff.data.dataset import open_data
    from latentdiff.evaluation.report.page import PAGE, Entry, as_html
    from latentdiff.families.own import new_tokenizer

    check_page(output, PAGE)
    config = _config(source, set_, {"image_size": resolution})
    data = open_data(config)
    tree = f"{min(count, len(data.training)):,} of {len(data.training):,} samples, epoch {epoch}"
    sheet = _sheet(data, count, epoch, new_tokenizer(config, data.training.all_captions()))
    page = as_html(config.data.pictures.source or config.name, [Entry("preview", tree)], sheet)
    write_text(output, page)
    terminal.result(output)


@app.command()
def cache(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder (default: runs/NAME).")] = None,
    shard: Annotated[str, typer.Option(help="i/n: this is job i (from 0) of n jobs that share the work.")] = "0/1",
    data: Annotated[str | None, typer.Option("--data", help="Pictures instead of the config's.")] = None,
    set_: Set = None,
) -> None:
    """Encode pictures and captions ahead of training.

    The run's pictures, and its captions if the text encoder is frozen, go into RUN/cache, as at the start of training.
    Jobs may be killed and run again, also with another n: only what is missing is encoded.
    """
    from latentdiff.data.dataset import open_data
    from latentdiff.settings.config import load_config, own_pictures
    from latentdiff.stages.ahead import cache_ahead, parse_shard

    share = parse_shard(shard)
    effective = load_config(config, [*(set_ or ()), *(own_pictures(data) if data else ())])
    folder = output or Path("runs") / effective.name
    check_writable(folder, folder)
    latents, contexts = cache_ahead(effective, folder, open_data(effective, folder / "cache"), share)
    terminal.note(f"{latents:,} latents and {contexts:,} contexts encoded")
    terminal.result(folder / "cache")


def _config(source: str, set_: list[str] | None, flags: dict[str, Any]) -> Config:
    """A config file, or the defaults with these pictures; flags override it."""
    from latentdiff.settings.config import load_config, own_pictures

    overrides = [(key, value) for key, value in flags.items() if value is not None]
    if source.endswith(".toml") and not Path(source).is_dir():
        return load_config(Path(source), [*(set_ or ()), *overrides])
    return load_config(None, [*own_pictures(source), *(set_ or ()), *overrides])


def _token_counts(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False).input_ids] if texts else []


def _sheet(data: DataSet, count: int, epoch: int, tokenizer: Tokenizer) -> list[tuple[Any, dict[str, str]]]:
    """Samples evenly spaced over the set, with their names and their captions as the text encoder reads them."""
    examples = data.training
    count = min(count, len(examples))
    rows = [number * len(examples) // count for number in range(count)]
    pixels = dict(examples.pictures.each([(row, examples.view(row, epoch)) for row in rows]))
    sheet = []
    for number, row in enumerate(rows):
        words = examples.caption(row, epoch)
        ids = tokenizer(words, truncation=True, verbose=False).input_ids
        read = tokenizer.decode(ids, skip_special_tokens=True)
        tree = {"": examples.pictures.name(row), "caption": words, "read": read}
        sheet.append((examples.toned(pixels[number]), tree))
    return sheet
