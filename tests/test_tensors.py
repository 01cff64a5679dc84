"""Files of tensors."""

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from latentdiff.formats.tensors import write_tensors


def test_the_same_content_is_the_same_bytes(tmp_path):
    """Whatever the order of the metadata, which safetensors writes in another one each time."""
    state = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(3, dtype=torch.float16)}
    metadata = {"zß": 'a "quote"\n\x01\\', "ss_seed": "0", "a": "", "ü": "\u2028\x7f", "ss_steps": "5", "c": "d"}
    written = set()
    for number in range(20):
        file = tmp_path / f"{number}.safetensors"
        write_tensors(state, file, dict(sorted(metadata.items(), reverse=bool(number % 2))))
        written.add(file.read_bytes())
    assert len(written) == 1
    again = load_file(file)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    with safe_open(file, "pt") as content:
        assert content.metadata() == metadata
    write_tensors(state, file)
    with safe_open(file, "pt") as content:
        assert content.metadata() is None
