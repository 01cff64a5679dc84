"""The command line in processes forked from a server that has imported everything once: seconds less for each.

What a test does to such a process is a hook: a function of this module, run there before the command line.
"""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import weakref
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

from .conftest import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "latentdiff.cli",
        "latentdiff.stages.ahead",
        "latentdiff.stages.chain",
        "latentdiff.stages.plan",
        "torch.utils.tensorboard",
    ]
)

SMALL = ("image_size=32", "autoencoder.crop=16")  # a quarter of the pixels

# configs/scenes-tiny.toml, smaller and shorter: every stage with checkpoints on the way
SHORT = (
    *SMALL,
    "data.count=40",
    "recommended.num_inference_steps=2",  # previews are not what is tested
    "autoencoder.training.max_train_steps=9",
    "autoencoder.training.checkpointing_steps=3",
    "autoencoder.training.validation_steps=9",
    "clip.training.max_train_steps=6",
    "clip.training.train_batch_size=8",
    "clip.training.checkpointing_steps=2",
    "clip.training.validation_steps=6",
    "denoiser.training.max_train_steps=13",
    "denoiser.training.gradient_accumulation_steps=2",
    "denoiser.training.checkpointing_steps=3",
    "denoiser.training.validation_steps=100",
)


class Started:
    """A command that runs: its process, and what it prints."""

    def __init__(self, *words, hook=None, env=None, cwd=None, stdin=""):
        folder = Path(tempfile.mkdtemp(prefix="command-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.out, self.err = folder / "out", folder / "err"
        (folder / "in").write_text(stdin)
        arguments = (tuple(map(str, words)), folder, hook, env or {}, cwd or Path.cwd())
        self.process = CONTEXT.Process(target=_command_line, args=arguments)
        self.process.start()

    def printed(self):
        """Its standard output so far."""
        return self.out.read_text()

    def ended(self, timeout=300):
        """Wait; the exit code (negative: killed by that signal) and standard error."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, self.err.read_text()
        return self.process.exitcode, self.err.read_text()


def _command_line(words, folder, hook, env, cwd):
    for stream, name in enumerate(("in", "out", "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | (os.O_WRONLY if stream else os.O_RDONLY)), stream)
    sys.stdin = os.fdopen(0)  # multiprocessing gives its children none
    os.environ.update(env)
    os.chdir(cwd)
    os.setpgid(0, 0)  # a group of its own
    gc.freeze()  # or every collection visits all that the server has imported
    if hook:
        hook()
    from latentdiff.cli import main

    sys.argv = ["latentdiff", *words]
    main()


def train(folder, *words, hook=None, env=None, changes=(), short=True):
    """`latentdiff train` of the tiny config into `folder`, begun."""
    sets = [word for change in (*(SHORT if short else ()), *changes) for word in ("--set", change)]
    config = ROOT / "configs" / "scenes-tiny.toml"
    return Started("train", config, "-o", folder, *sets, *words, hook=hook, env=env)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_two_processes(target, *arguments):
    """`target(rank, *arguments)` in two processes that talk over gloo."""
    port = free_port()
    processes = [CONTEXT.Process(target=_talking, args=(rank, port, target, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0


def _talking(rank, port, target, arguments):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    target(rank, *arguments)
    dist.destroy_process_group()


def ranks(count, folder, *words, hooks=None, changes=()):
    """The same in `count` processes that share the batches, as a launcher starts them."""
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        train(
            folder,
            *words,
            hook=(hooks or {}).get(rank),
            changes=changes,
            env={name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()},
        )
        for rank in range(count)
    ]


# --- hooks ---------------------------------------------------------------------------------------------


def at_call(owner, name, number, act):
    """Before the `number`-th call of a function, counted from 1, `act()`; everything else stays as it is."""
    original, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def send(*numbers):
    """These signals to this process, at once."""
    for number in numbers:
        os.kill(os.getpid(), number)


def insist():
    """SIGTERM, and again after more than a launcher's echo would take."""
    send(signal.SIGTERM)
    time.sleep(0.7)
    send(signal.SIGTERM)


def exhaust():
    """Raise a GPU's out-of-memory error."""
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def wait():
    """As long as a test may take."""
    time.sleep(600)


KILL = partial(send, signal.SIGKILL)


def in_loss(stage, number, act=KILL):
    """`act` at a call of a stage's loss: in the middle of a step, or between two parts of an accumulated one."""
    from latentdiff.training.autoencoder import AutoencoderStage
    from latentdiff.training.clip import ClipStage
    from latentdiff.training.denoiser import DenoiserStage

    owner = {"autoencoder": AutoencoderStage, "clip": ClipStage, "denoiser": DenoiserStage}[stage]
    at_call(owner, "loss", number, act)


def check_deterministic():
    """Fail unless torch may choose deterministic kernels only."""
    import torch

    assert torch.are_deterministic_algorithms_enabled()


def in_save(number, act=KILL):
    """`act` at a boundary of the files of a checkpoint: each is flushed once, the manifest and the folders too."""
    from latentdiff.training import checkpoint

    at_call(checkpoint, "flush", number, act)


def in_caching(act):
    """`act` while the training set is encoded."""
    from latentdiff.stages import cache

    at_call(cache, "to_images", 1, act)


def in_validation(act):
    """`act` while the denoiser's validation is computed."""
    from latentdiff.stages import denoiser

    at_call(denoiser, "validation_losses", 1, act)


def recording(path, then=None):
    """Write what each process learns from, a line a batch: rows and a hash of noise, times and conditions."""
    import hashlib

    from latentdiff.training.denoiser import DenoiserStage

    original = DenoiserStage.loss

    def recorded(self, module, batch):
        if module.training:
            hashes = []
            for row in range(len(batch["rows"])):
                digest = hashlib.sha256()
                for name in ("noise", "posterior", "t", "tokens"):
                    digest.update(batch[name][row].numpy().tobytes())
                hashes.append(digest.hexdigest()[:16])
            with Path(path).open("a") as file:
                file.write(json.dumps(list(zip(batch["rows"].tolist(), hashes, strict=True))) + "\n")
        return original(self, module, batch)

    DenoiserStage.loss = recorded
    if then:
        then()


def isolated_and_poisoned():
    """No network; global generators seeded at random, and refused in the training loop."""
    import random

    import numpy as np
    import torch

    from latentdiff.training.run import _Run

    def refuse(*args, **kwargs):
        raise AssertionError("a global generator, or the network")

    socket.socket.connect = socket.getaddrinfo = refuse
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    train = _Run.train

    def poisoned(self, progress):
        with ExitStack() as stack:
            for owner, names in (
                (torch, "randn rand randint randperm normal randn_like rand_like bernoulli multinomial"),
                (np.random, "rand randn normal uniform permutation randint random shuffle choice"),
                (random, "random randint shuffle choice uniform sample"),
            ):
                for name in names.split():
                    stack.enter_context(mock.patch.object(owner, name, refuse))
            before = torch.get_rng_state()
            train(self, progress)
            assert torch.equal(torch.get_rng_state(), before), "torch's global generator was drawn from"

    _Run.train = poisoned


def with_files_up_to(size):
    """No file may grow beyond `size` bytes, as on a disk that fills."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def with_full_disk_at_the_end(size):
    """A disk that is full when CLIP is saved after its training."""
    from latentdiff.networks.clip import Clip

    at_call(Clip, "save", 1, partial(with_files_up_to, size))


def in_loading(act):
    """`act` while a library loads a network."""
    from diffusers import AutoencoderKL

    at_call(AutoencoderKL, "from_pretrained", 1, act)


def signal_the_group():
    """SIGTERM to this process and all it has begun."""
    os.killpg(os.getpgid(0), signal.SIGTERM)


def with_sigint():
    """SIGINT ends a command, as in a terminal: shells let commands in the background ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def with_hub(endpoint, home, offline):
    """The settings of huggingface_hub, which reads them from the environment when it is imported."""
    from huggingface_hub import constants

    constants.ENDPOINT, constants.HF_HUB_OFFLINE = endpoint, offline
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = str(home / "hub")


def as_nobody(folder):
    """A user who may not write into `folder`."""
    Path(folder).chmod(0o555)
    if os.geteuid() == 0:
        os.setuid(65534)


def tensors_of(run, stage="denoiser"):
    """Every tensor of the newest checkpoint, by file and name."""
    from latentdiff.training.checkpoint import load_checkpoint, newest_whole

    newest, _ = newest_whole(run / stage / "checkpoints")
    tensors, state = load_checkpoint(newest)
    return state["step"], {f"{file}/{name}": t for file, part in tensors.items() for name, t in part.items()}


def assert_bitwise(one, other, stages=("autoencoder", "clip", "denoiser")):
    """The final weights, averages and optimizer states of two runs are the same bits."""
    for stage in stages:
        (step, expected), (last, result) = tensors_of(one, stage), tensors_of(other, stage)
        assert step == last
        assert expected.keys() == result.keys()
        differ = [name for name in expected if expected[name].numpy().tobytes() != result[name].numpy().tobytes()]
        assert not differ, f"{stage}: {len(differ)} of {len(expected)} tensors differ, first {differ[0]}"


def logged_steps(run: Path, stage="denoiser"):
    """The steps in a stage's log, in order."""
    lines = (json.loads(line) for line in (run / stage / "log.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def not_finite_losses():
    """Every loss of the denoiser is NaN."""
    from latentdiff.training.denoiser import DenoiserStage

    original = DenoiserStage.loss
    DenoiserStage.loss = lambda self, module, batch: original(self, module, batch) * float("nan")
