"""The server beside the pipeline: a lone request, 200 requests of 20 clients, and the time until the first picture.

    python scripts/bench/serve.py [-m MODEL] [--clients 20] [--each 10]

A lone request and a call of the warm pipeline take turns. Under load every request is for one picture of its own seed;
it takes turns with one call of the pipeline for as many pictures, in full batches; which of them is first changes
from turn to turn. Memory is the server's. Last come sketches: a prompt is typed letter by letter, and each letter is
asked for when the sketch before is there (a model without a student of few steps has none).
"""

import argparse
import base64
import io
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from PIL import Image

from latentdiff import LatentDiffusionPipeline

PROMPT = "a red circle above a blue square"


def post(address: str, body: dict) -> dict:
    """The answer to a body in JSON."""
    head = {"content-type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode(), head, method="POST")
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def ask(address: str, seed: int) -> dict:
    """One picture."""
    return post(f"{address}/v1/images/generations", {"prompt": PROMPT, "seed": seed})


def sketched(address: str) -> float:
    """Sketches a second while the prompt is typed."""
    texts = [PROMPT[:length] for length in range(1, len(PROMPT) + 1)]
    post(f"{address}/api/live", {"prompt": PROMPT})  # loads the student
    taken = seconds(lambda: [post(f"{address}/api/live", {"prompt": text}) for text in texts])
    return len(texts) / taken


def seed_of(answer: dict) -> int:
    """The seed in the picture's own record."""
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    return json.loads(image.text["latentdiff"])["seed"]


def megabytes(process: int) -> float:
    """The resident memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def seconds(call) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def first_picture(address: str, server: subprocess.Popen) -> None:
    """Ask until the server answers."""
    while server.poll() is None:
        try:
            ask(address, 0)
            return
        except OSError:
            time.sleep(0.01)
    raise SystemExit("the server has ended")


def lone(pipe: LatentDiffusionPipeline, address: str, rounds: int) -> tuple[float, float]:
    """Medians of the pipeline and of the server, in turn."""
    own, served = [], []
    for seed in range(rounds):
        own.append(seconds(lambda seed=seed: pipe(PROMPT, seed=seed)))
        served.append(seconds(lambda seed=seed: ask(address, seed)))
    return statistics.median(own[2:]), statistics.median(served[2:])


def load(address: str, clients: int, each: int) -> tuple[float, int]:
    """The seconds for all requests, and how many answers have the seed that was asked for."""
    right = []

    def client(number: int) -> None:
        for k in range(each):
            seed = 1000 * number + k
            right.append(seed_of(ask(address, seed)) == seed)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, sum(right)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default=None)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=22)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address, model = f"http://127.0.0.1:{port}", ["-m", given.model] if given.model else []
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "latentdiff", "serve", "--port", str(port), "-o", folder, *model]
        server = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        try:
            print(f"from the command to the first picture: {seconds(lambda: first_picture(address, server)):.2f} s")
            pipe = LatentDiffusionPipeline.from_pretrained(given.model)
            own, served = lone(pipe, address, given.rounds)
            more = f"{(served - own) * 1e3:+.0f} ms"
            print(f"a lone request: {served * 1e3:.0f} ms, the warm pipeline {own * 1e3:.0f} ms: {more}")
            count = given.clients * given.each
            load(address, given.clients, 2)  # compiles the batch sizes
            before, shares = megabytes(server.pid), []
            for turn in range(given.turns):
                first = seconds(lambda: pipe(PROMPT, seed=0, num_images_per_prompt=count)) if turn % 2 else None
                taken, right = load(address, given.clients, given.each)
                batches = first or seconds(lambda: pipe(PROMPT, seed=0, num_images_per_prompt=count))
                shares.append(batches / taken)
                print(f"{count} requests of {given.clients} clients: {count / taken:.1f} pictures/s, {right} right")
                print(
                    f"one call in full batches: {count / batches:.1f} pictures/s; the server has {shares[-1]:.2f} of it"
                )
            print(f"median share: {statistics.median(shares):.2f}")
            if pipe.has_few_steps:
                print(f"sketches while a prompt is typed: {sketched(address):.1f} pictures/s")
            print(f"memory: {before:.0f} MB before, {megabytes(server.pid):.0f} MB after")
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
