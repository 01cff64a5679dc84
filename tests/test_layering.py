"""Which room may import which, which library belongs where, and that no file needs itself: read from the source."""

import ast
import re

import pytest

from .conftest import ROOT

PACKAGE = ROOT / "latentdiff"
FILES = sorted(PACKAGE.rglob("*.py"))
NUMBERS = {"core", "diffusion"}  # the mathematics
NETWORKS = NUMBERS | {"networks", "model"}
MODELS = NETWORKS | {"formats", "families", "settings"}  # all that reads and writes models
DOING = {"drawing", "data", "runtime", "training", "evaluation", "stages", "pipeline", "show"}
ARROWS = {  # the rooms that each room may import: a change here is a change of the design
    "core": set(),
    "diffusion": {"core"},
    "networks": {"core"},
    "formats": {"core", "networks"},  # files become the values that networks take
    "settings": NUMBERS,
    "data": NUMBERS | {"settings"},
    "model": NUMBERS | {"networks"},
    "families": MODELS - {"families"},
    "drawing": MODELS - {"families"},
    "runtime": MODELS - {"settings", "diffusion"},
    "training": NUMBERS | {"settings", "networks"},
    "evaluation": MODELS | {"drawing", "data"},
    "stages": MODELS | {"drawing", "data", "runtime", "training", "evaluation"},
    "pipeline": NUMBERS | {"model", "families", "drawing", "runtime"},
    "show": NUMBERS | {"networks", "evaluation", "pipeline"},
    "server": NUMBERS | {"settings", "drawing", "stages", "pipeline"},
    "cli": {"server"} | (MODELS - {"model"}) | DOING | {"__init__"},
    "__init__": {"pipeline"},
    "__main__": {"cli"},
}
HOMES = {  # the rooms that may import a library
    "diffusers": {"networks", "formats", "families"},
    "transformers": {"networks", "formats", "families"},
    "open_clip": {"networks"},
    "peft": {"networks"},
    "spandrel": {"networks"},
    "accelerate": {"training", "stages", "runtime", "networks"},
    "timm": {"training", "evaluation"},
    "datasets": {"data"},
    "braceexpand": {"data"},
    "openvino": {"runtime"},
    "tokenizers": {"runtime"},
    "cv2": {"core"},
    "typer": {"cli"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"server"},
    "torchmetrics": {"evaluation", "networks"},
    "torch_fidelity": {"evaluation", "networks"},
    "matplotlib": {"evaluation", "show"},
    "PIL": {"core", "data", "drawing", "evaluation", "server", "stages"},
    "huggingface_hub": {"formats", "data"},
    "yaml": {"data"},
}


def name_of(path):
    """latentdiff/drawing/plan.py -> latentdiff.drawing.plan."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {name_of(path): path for path in FILES}


def imports_of(path):
    """Every module imported anywhere in a file, for types alone too; of a name in a module the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def room_of(module):
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms(path):
    room = room_of(name_of(path))
    for module in imports_of(path):
        top = module.split(".")[0]
        if top in HOMES:
            assert room in HOMES[top], f"{path} imports {module}"
        if top == "latentdiff" and room_of(module) != room:
            assert room_of(module) in ARROWS[room], f"no arrow from {room} to {room_of(module)}: {path}"


FAMILY = re.compile(r"flux|qwen|z_?-?image(?!s)|\bsd3|sdxl|klein|stable.?diffusion|mmdit|kontext", re.IGNORECASE)
NETWORKS_OF_FAMILIES = ("families", "networks/backbones", "networks/encoders", "networks/codecs")
TABLES = {  # files whose tables are of families: names of layers in files, a module of diffusers, published levels
    "formats/original_transformers.py",
    "formats/folder.py",
    "diffusion/grids.py",
}


def words_in(tree):
    """The identifiers and texts of a module, without docstrings."""
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    heads = [node.body[0] for node in ast.walk(tree) if isinstance(node, scopes) and node.body]
    docstrings = {id(head.value) for head in heads if isinstance(head, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        yield from (getattr(node, field) for field in ("id", "attr", "name", "arg") if getattr(node, field, None))
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_family_is_named(path):
    """The code around the mathematics knows what a model reads and gives, not whose it is."""
    place = path.relative_to(PACKAGE).as_posix()
    if not place.startswith(NETWORKS_OF_FAMILIES) and place not in TABLES:
        assert [word for word in words_in(ast.parse(path.read_text())) if FAMILY.search(word)] == []


def test_every_room_has_its_arrows_and_needs_them():
    """The table names the rooms that there are, and no arrow that no file needs."""
    needed = {room: set() for room in map(room_of, MODULES)}
    for name, path in MODULES.items():
        needed[room_of(name)] |= {room_of(m) for m in imports_of(path) if m.split(".")[0] == "latentdiff"}
    assert {room: rooms - {room} for room, rooms in needed.items()} == ARROWS


def circles(graph):
    """The sets of nodes, larger than one, of which each reaches every other (Tarjan 1972)."""
    order, low, stack, result = {}, {}, [], []

    def visit(node):
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            group = {stack.pop()}
            while node not in group:
                group.add(stack.pop())
            result.extend([group] * (len(group) > 1))

    for node in graph:
        if node not in order:
            visit(node)
    return result


def test_no_file_needs_itself():
    """Not through others either, nor for its types."""
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == [{"a", "b", "c"}]
    graph = {name: sorted({m for m in imports_of(path) if m in MODULES} - {name}) for name, path in MODULES.items()}
    assert circles(graph) == []


def test_no_room_needs_itself_through_others():
    assert circles({room: sorted(rooms) for room, rooms in ARROWS.items()}) == []


OF_TRAINING = ("objective.py", "bound.py", "jump.py", "consistency.py", "easy_consistency.py", "mean_flow.py")


def test_the_mathematics_needs_numpy_only():
    """But for one inverse of scipy's, which is imported where it is used."""
    for path in sorted((PACKAGE / "diffusion").glob("*.py")):
        if path.name in OF_TRAINING:
            continue
        foreign = {m.split(".")[0] for m in imports_of(path)} & {"torch", "scipy", "diffusers", "transformers"}
        assert foreign <= ({"scipy"} if path.name == "grids.py" else set()), f"{path.name} imports {foreign}"


DRAWS = {"randn", "rand", "randint", "randperm", "normal", "randn_like", "rand_like", "bernoulli", "multinomial"}
SEEDED = {"families/own.py": {"torch.manual_seed"}}  # initial weights, which modules draw themselves


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_global_generator(path):
    """Nothing uses or seeds a global generator of torch, NumPy or Python; initial weights are the one exception."""
    uses = set()
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    keyed = {id(call.func) for call in calls if "generator" in {word.arg for word in call.keywords}}
    for node in (node for node in ast.walk(tree) if id(node) not in keyed):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            owner, _, name = dotted.rpartition(".")
            if owner == "torch" and name in DRAWS | {"manual_seed", "seed"}:
                uses.add(dotted)
            if owner in ("np.random", "numpy.random") and name not in ("Generator", "Philox"):
                uses.add(dotted)
    uses |= {f"import {name}" for name in imports_of(path) if name == "random"}
    assert uses <= SEEDED.get(str(path.relative_to(PACKAGE)), set())
