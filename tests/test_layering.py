"""Who may import whom, read from the source."""

import ast

import pytest

from .conftest import ROOT

PACKAGE = ROOT / "latentdiff"
LEAVES = ("diffusion", "models", "data", "config.py", "errors.py", "validation.py", "arrays.py", "recommended.py")
SHARED = ("errors", "validation", "arrays", "recommended", "page")  # what leaves may import
HOMES = {
    "diffusers": ("models", "pretrained.py"),
    "transformers": ("models",),
    "open_clip": ("models",),
    "peft": ("models",),
    "accelerate": ("training", "stages", "runtime"),
    "timm": ("training",),
    "datasets": ("data",),
    "braceexpand": ("data",),
    "openvino": ("runtime",),
    "tokenizers": ("runtime",),
    "typer": ("cli",),
    "torchmetrics": ("evaluation", "models"),
    "torch_fidelity": ("evaluation", "models"),
    "matplotlib": ("plots.py",),
    "PIL": (
        "pipeline.py",
        "metadata.py",
        "picture_files.py",
        "reproduce.py",
        "drawing",
        "data",
        "stages",
        "page.py",
        "evaluation",
    ),
}


def imports_of(path):
    """Every module imported anywhere in a file, absolute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path):
    for module in imports_of(path):
        top = module.split(".")[0]
        if top in HOMES:
            assert room(path) in HOMES[top], f"{path} imports {module}"
        if top == "latentdiff" and room(path) in LEAVES and module.count("."):
            other = module.split(".")[1]
            assert other in (room(path).removesuffix(".py"), *SHARED), f"{path} imports {module}"


def test_the_mathematics_needs_numpy_only():
    for path in sorted((PACKAGE / "diffusion").glob("*.py")):
        if path.name in ("objective.py", "bound.py"):
            continue
        foreign = {m.split(".")[0] for m in imports_of(path)} & {"torch", "scipy", "diffusers", "transformers"}
        assert not foreign, f"{path.name} imports {foreign}"


DRAWS = {"randn", "rand", "randint", "randperm", "normal", "randn_like", "rand_like", "bernoulli", "multinomial"}
SEEDED = {"build.py": {"torch.manual_seed"}}  # initial weights, which modules draw themselves


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_global_generator(path):
    """Nothing draws from torch's, NumPy's or Python's, nor seeds one; initial weights are the one exception."""
    found = set()
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    given = {id(call.func) for call in calls if "generator" in {word.arg for word in call.keywords}}
    for node in (node for node in ast.walk(tree) if id(node) not in given):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            owner, _, name = dotted.rpartition(".")
            if owner == "torch" and name in DRAWS | {"manual_seed", "seed"}:
                found.add(dotted)
            if owner in ("np.random", "numpy.random") and name not in ("Generator", "Philox"):
                found.add(dotted)
    found |= {f"import {name}" for name in imports_of(path) if name == "random"}
    assert found <= SEEDED.get(str(path.relative_to(PACKAGE)), set())
