"""What a fine-tuning is: defaults by method and size, and what is refused."""

import pytest

from latentdiff.core.errors import ConfigError
from latentdiff.settings.config import save_config
from latentdiff.settings.finetuning import SMALL, load_finetuning
from latentdiff.stages.finetune_report import _differing

SOURCE = ("data.kind=pictures", "data.pictures.source=pictures")


def loaded(*overrides, size=1e6):
    return load_finetuning(None, (*SOURCE, *overrides), size)


def test_defaults_are_of_the_method_and_the_size():
    """The published rates are those of large models; explicit settings win, whether the size is known or not."""
    for method, large, small in (("full", 1e-5, 2e-4), ("lora", 1e-4, 1e-3)):
        rates = [loaded(f"method={method}", size=size).finetune.training.learning_rate for size in (SMALL, SMALL - 1)]
        assert rates == [large, small]
    explicit = loaded("method=full", "finetune.training.learning_rate=0.5", "finetune.training.max_train_steps=7")
    assert (explicit.finetune.training.learning_rate, explicit.finetune.training.max_train_steps) == (0.5, 7)
    assert explicit.finetune.training.validation_steps == 1, "a quarter of the steps"
    assert explicit.finetune.training.lr_warmup_steps == 0
    assert explicit.finetune.training.checkpointing_steps == 250, "the other settings are the method's own"
    assert loaded("method=lora").lora.rank == loaded("method=lora").lora.alpha == 16
    assert loaded("method=lora", "lora.rank=3").lora.alpha == 3
    dreambooth = ("method=dreambooth", 'prior.prompt="a dog"')
    assert loaded(*dreambooth).low_rank is False
    assert loaded(*dreambooth, "lora.rank=4").low_rank is True
    word = loaded("method=textual-inversion", "word.token=<ink>", "word.initial=ink")
    assert (word.finetune.training.weight_decay, word.finetune.caption_dropout) == (0, 0)


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=lora",),
        ("method=full",),
        ("method=dreambooth", 'prior.prompt="a dog"', "prior.source=dogs"),
        ("method=textual-inversion", "word.token=<ink>"),
    ],
)
def test_what_is_saved_is_read_again(overrides, tmp_path):
    """With every default written down, as a run's folder has it."""
    save_config(loaded(*overrides), tmp_path / "finetune.toml")
    assert load_finetuning(tmp_path / "finetune.toml") == loaded(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("lora.rank=0",), 'key "lora.rank": must be at least 1 (got 0)'),
        (("lora.rank=2000",), "lora.rank"),
        (("lora.alpha=nan",), "lora.alpha"),
        (("lora.rnak=3",), 'unknown key "lora.rnak" (did you mean rank?)'),
        (("method=magic",), 'key "method": must be'),
        (("method=dreambooth",), "dreambooth requires prior.prompt"),
        (("method=textual-inversion",), "textual-inversion requires word.token"),
        (("method=textual-inversion", "word.token=a", "prior.prompt=b"), "trains only a word's vectors"),
        (("word.token=a",), 'word has no effect without method = "textual-inversion"'),
        (("method=textual-inversion", "word.token=a/b"), "word.token"),
        (("method=full", "lora.rank=4"), "no effect on full: it requires method lora, dreambooth or consistency"),
        (("method=dreambooth", 'prior.prompt="a"', "lora.dora=true"), "no effect on dreambooth: it requires lora.rank"),
        (("lora.rslora=true", "lora.kohya=true"), "kohya's format has no rslora"),
        (("prior.weight=2.0",), "prior requires prior.prompt"),
        (('prior.prompt="a"', "prior.source=x", "prior.pictures=3"), "prior.source, which has its own"),
        (
            ("method=textual-inversion", "word.token=<x>", 'data.pictures.instance_prompt="a cat"'),
            "<x>, or the word learns nothing",
        ),
        (("finetune.snr_gamma=5.0",), "snr_gamma"),
        (("data.kind=scenes",), "data.pictures.source is missing"),
        (("data.pictures.crop=random",), "random crops cannot be cached: set finetune.cache = false"),
        (("control.annotator=canny",), 'control has no effect without method = "controlnet"'),
        (("method=controlnet", "prior.prompt=a"), "controlnet trains only a network beside the model"),
        (("method=controlnet", "control.annotator=depth"), "control.annotator"),
    ],
)
def test_refused(overrides, message):
    with pytest.raises(ConfigError) as refused:
        loaded(*overrides)
    assert message in str(refused.value)


def test_reports_name_no_folder():
    """Of absolute paths the page and the card show the names alone."""
    config = loaded(
        'data.pictures.source="/home/me/dogs"',
        'model="/home/me/sd15"',
        "method=controlnet",
        'control.source="/home/me/maps"',
    )
    shown = _differing(config)
    assert (shown["data.pictures.source"], shown["model"], shown["control.source"]) == ("dogs", "sd15", "maps")
    assert not any("/home" in str(value) for value in shown.values())
