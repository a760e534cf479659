"""The rules of the house: who may import whom, how long things may be, and that importing does nothing.

Each rule is a function from a directory to the offences in it, so that it can be shown to find a planted one.
"""

import ast
import configparser
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # of ours
    "shards": {"shards"},
    "pipeline": {"pipeline", "shards"},
    "recipes": {"recipes", "pipeline"},
    "tools": {"tools", "pipeline", "shards"},
}
OURS = {*MAY_IMPORT, "tests"}
LAYERS = (  # of pipeline, low to high: a module imports lower ones, and none of its own layer
    {"recipe", "sharded"},
    {"validate", "augment", "models", "optim", "checkpoint", "backend", "ema", "loss"},
    {"data", "footprint"},
    {"evaluate", "bottleneck", "durations", "record", "best", "divergence", "telemetry"},
    {"run", "watch", "status"},
    {"prepare", "preflight", "launch"},
    {"trainer", "predict", "export"},
    {"report"},
    {"chain"},
)
MAY_USE_EXTRAS = {"shards": ("data", "ray"), "pipeline": ("export", "wandb"), "tools": ("demo",)}
TORCH = {"torch", "torchvision", "timm"}
IN_BACKEND_ONLY = {"accelerate", "deepspeed"}
# Where the import has another name.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "cv2": "opencv-python-headless", "yaml": "pyyaml"}

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 300
MODULES = {"nn.Module", "Module", "VisionTransformer"}
MAX_PARAMETERS = 8

# Run with the names of modules; prints what importing them did, and whatever they print themselves.
IMPORT_ALL = """
import importlib, logging, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if name.startswith("shards") and "torch" in sys.modules:
        print(f"{name}: brought torch in")
if logging.getLogger().handlers:
    print(f"logging was set up: {len(logging.getLogger().handlers)} handlers")
torch = sys.modules.get("torch")
if torch and torch.cuda.is_initialized():
    print("CUDA was initialised")
if torch and torch.distributed.is_initialized():
    print("a process group was made")
"""


def sources(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for package in MAY_IMPORT:
        for path in sorted((root / package).rglob("*.py")):
            yield path.relative_to(root), ast.parse(path.read_text(), str(path))


# --- imports


def import_offences(root: Path) -> list[str]:
    """`file:line imports NAME: rule` for every import that the rules forbid, wherever in a file it stands."""
    return [
        f"{path}:{node.lineno} imports {name}: {rule}"
        for path, tree in sources(root)
        for node in ast.walk(tree)
        for name in imported_names(node, path)
        if (rule := broken_rule(module_name(path), name))
    ]


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported_names(node: ast.AST, path: Path) -> list[str]:
    """Dotted and absolute; of `from a import b`, a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    above = path.parts[: len(path.parts) - node.level] if node.level else ()
    return [".".join((*above, *filter(None, [node.module]), alias.name)) for alias in node.names]


def broken_rule(importer: str, name: str) -> str:
    """The rule that `importer` breaks when it imports `name`; "" for none."""
    (package, unit), (target, target_unit) = first_two(importer), first_two(name)
    if target in OURS:
        if target not in MAY_IMPORT[package]:
            return f"of ours, {package} may import only {', '.join(sorted(MAY_IMPORT[package]))}"
        return broken_layer(unit, target_unit) if package == target == "pipeline" else ""
    if target in IN_BACKEND_ONLY and (package, unit) != ("pipeline", "backend"):
        return "only pipeline/backend may"
    if target in TORCH and package == "shards":
        return "shards does without torch"
    declared = target in sys.stdlib_module_names or distribution(target) in declared_distributions(package)
    return "" if declared else "setup.cfg does not declare it"


def broken_layer(unit: str, target: str) -> str:
    if target in ("", unit):
        return ""
    unknown = [name for name in (unit, target) if layer(name) is None]
    if unknown:
        return f"{unknown[0]} has no place in LAYERS of tests/test_house.py"
    return "" if layer(target) < layer(unit) else f"{target} is not below {unit} in pipeline"


def layer(unit: str) -> int | None:
    return next((height for height, units in enumerate(LAYERS) if unit in units), None)


def first_two(name: str) -> tuple[str, str]:
    first, second, *_ = (*name.split("."), "")
    return first, second


def distribution(name: str) -> str:
    return DISTRIBUTIONS.get(name, name).replace("_", "-")


def declared_distributions(package: str) -> set[str]:
    """What setup.cfg requires, and the extras that the package may use."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = [config["options.extras_require"][extra] for extra in MAY_USE_EXTRAS.get(package, ())]
    lines = "\n".join((config["options"]["install_requires"], *extras))
    return set(re.findall(r"^[\w.-]+", lines, re.MULTILINE))


# --- limits


def limit_offences(root: Path) -> list[str]:
    found = ((*file_offences(root, path), *function_offences(path, tree)) for path, tree in sources(root))
    return [offence for offences in found for offence in offences]


def file_offences(root: Path, path: Path) -> Iterator[str]:
    lines = len((root / path).read_text().splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{path} has {lines} lines, more than {MAX_FILE_LINES}"


def function_offences(path: Path, tree: ast.Module) -> Iterator[str]:
    exempt = model_constructors(tree) if path.is_relative_to("pipeline/models") else []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        where = f"{path}:{node.lineno} {node.name}"
        lines, parameters = node.end_lineno - node.lineno + 1, count(node.args)
        if lines > MAX_FUNCTION_LINES:
            yield f"{where} has {lines} lines, more than {MAX_FUNCTION_LINES}"
        if parameters > MAX_PARAMETERS and node not in exempt:
            yield f"{where} has {parameters} parameters, more than {MAX_PARAMETERS}"


def model_constructors(tree: ast.Module) -> list[ast.AST]:
    """They keep timm's convention: every option a parameter."""
    modules = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) in MODULES for base in node.bases)
    ]
    return [item for node in modules for item in node.body if getattr(item, "name", "") == "__init__"]


def count(arguments: ast.arguments) -> int:
    named = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(named) - (named[:1] in (["self"], ["cls"]))


# --- nothing at import


def import_effects(root: Path) -> str:
    """What importing every module of shards, and then of pipeline, printed or set up, in a process of its own."""
    names = [module_name(path) for path, _ in sources(root) if path.parts[0] in ("shards", "pipeline")]
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # of root alone
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


# --- this project keeps them


def test_imports():
    assert import_offences(ROOT) == []


def test_every_module_of_pipeline_has_a_layer():
    units = {first_two(module_name(path))[1] for path, _ in sources(ROOT) if path.parts[0] == "pipeline"} - {""}
    assert sorted(unit for unit in units if layer(unit) is None) == []


def test_limits():
    assert limit_offences(ROOT) == []


def test_nothing_happens_at_import():
    assert import_effects(ROOT) == ""


# --- and each rule finds what breaks it


MAKE_GROUP = "import torch.distributed as d; d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)"


def plant(root: Path, path: str, source: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(source)


@pytest.mark.parametrize(
    ("path", "source", "offence"),
    [
        ("shards/a.py", "import torch", "torch: shards does without torch"),
        ("shards/a.py", "import pipeline.recipe", "pipeline.recipe: of ours, shards may import only shards"),
        ("shards/a.py", "import lxml", "lxml: setup.cfg does not declare it"),
        ("pipeline/ema.py", "from tests.a import b", "tests.a.b: of ours, pipeline may import only pipeline, shards"),
        ("pipeline/data.py", "import accelerate.utils", "accelerate.utils: only pipeline/backend may"),
        ("recipes/a.py", "import deepspeed", "deepspeed: only pipeline/backend may"),
        ("recipes/a.py", "from shards import plan", "shards.plan: of ours, recipes may import only pipeline, recipes"),
        ("tools/a.py", "import recipes", "recipes: of ours, tools may import only pipeline, shards, tools"),
        ("pipeline/ema.py", "def f(): import pipeline.loss", "pipeline.loss: loss is not below ema in pipeline"),
        ("pipeline/data.py", "from .record import R", "pipeline.record.R: record is not below data in pipeline"),
        ("pipeline/models/a.py", "from .. import data", "pipeline.data: data is not below models in pipeline"),
        ("pipeline/optim/__init__.py", "from ..ema import E", "pipeline.ema.E: ema is not below optim in pipeline"),
        ("pipeline/chain.py", "import pipeline.new", "pipeline.new: new has no place in LAYERS of tests/test_house.py"),
    ],
)
def test_import_rules_find(path, source, offence, tmp_path):
    plant(tmp_path, path, source)
    assert import_offences(tmp_path) == [f"{path}:1 imports {offence}"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pipeline/backend/a.py", "import deepspeed"),
        ("pipeline/evaluate.py", "from pipeline.data import Batch"),
        ("pipeline/models/vittm/a.py", "from pipeline.models.load import load_start\nfrom . import heads"),
        ("tools/a.py", "import sklearn\nfrom shards.index import Index"),
    ],
)
def test_import_rules_allow(path, source, tmp_path):
    plant(tmp_path, path, source)
    assert import_offences(tmp_path) == []


def test_limits_find(tmp_path):
    names = ", ".join(f"p{i}" for i in range(MAX_PARAMETERS + 1))
    constructor = f"class Net(nn.Module):\n    def __init__(self, {names}): ...\n"
    plant(tmp_path, "pipeline/models/a.py", constructor)
    plant(tmp_path, "pipeline/b.py", constructor)
    plant(tmp_path, "pipeline/c.py", f"def f(*, {names}): ...\n")
    plant(tmp_path, "shards/d.py", "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES)
    plant(tmp_path, "shards/e.py", "pass\n" * (MAX_FILE_LINES + 1))
    plant(tmp_path, "shards/f.py", "def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1))
    assert limit_offences(tmp_path) == [
        "shards/d.py:1 f has 61 lines, more than 60",
        "shards/e.py has 301 lines, more than 300",
        "pipeline/b.py:2 __init__ has 9 parameters, more than 8",
        "pipeline/c.py:1 f has 9 parameters, more than 8",
    ]


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("shards/a.py", "print('hello')", "hello"),
        ("shards/a.py", "import torch", "shards.a: brought torch in"),
        ("pipeline/a.py", "import logging; logging.basicConfig()", "logging was set up: 1 handlers"),
        ("pipeline/a.py", MAKE_GROUP, "a process group was made"),
    ],
)
def test_import_effects_find(path, source, found, tmp_path):
    plant(tmp_path, path, source)
    assert import_effects(tmp_path) == found + "\n"
