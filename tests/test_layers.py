"""Dependencies point one way, files and functions stay small, and importing a module does nothing."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.settings.cli import RECIPES

ROOT = RECIPES.parent
PACKAGE = ROOT / "src" / "lockstep"

# From bottom to top: a module may import only modules further up in this list. Folders stand in the order that data
# flows, each in one piece. A new module gets its place here.
ORDER = [
    "errors",
    "files",
    "lease",
    "randomness",
    "settings.types",
    "settings.config",
    "settings.yaml",
    "settings.cli",
    "settings.registry",
    "launch.machine",
    "launch.threads",
    "launch.copies",
    "launch.transfer",
    "launch.guards",
    "launch.imports",
    "launch.kernels",
    "launch.rendezvous",
    "launch.stack",
    "launch.watch",
    "launch.accelerator",
    "launch.load",
    "launch.numerics",
    "launch.preemption",
    "launch.sharding",
    "augment.geometry",
    "augment.colour",
    "augment.operations",
    "augment.policy",
    "augment.mix",
    "augment.transform",
    "data.split",
    "data.sources.source",
    "data.sources.embedded",
    "data.sources.torchvision",
    "data.sources.hub",
    "data.sources.folder",
    "data.sources.tar_index",
    "data.sources.tar",
    "data.sources.synthetic",
    "data.sources.kinds",
    "data.portions",
    "data.decoding",
    "data.decoded",
    "data.cache",
    "data.crop",
    "data.images",
    "data.duplicates",
    "data.loose",
    "data.sampler",
    "data.loader",
    "models.small",
    "models.resnet",
    "models.timm_models",
    "models.summary",
    "models.weights",
    "models.freeze",
    "models.compilation",
    "models.network",
    "evaluation.metrics",
    "evaluation.ranking",
    "evaluation.calibration",
    "evaluation.chance",
    "evaluation.scores",
    "evaluation.evaluate",
    "evaluation.predict",
    "evaluation.probe",
    "evaluation.suspicious",
    "evaluation.activations",
    "evaluation.grad_cam",
    "training.loss",
    "training.optim",
    "training.tree",
    "training.pace",
    "training.gradients",
    "training.progress",
    "training.schedule",
    "training.ema",
    "training.batchnorm",
    "training.meter",
    "training.stopwatch",
    "training.calendar",
    "training.records",
    "training.learner",
    "training.memory",
    "training.gain",
    "run.history",
    "run.environment",
    "run.digest",
    "run.console",
    "run.exhibit",
    "run.accelerate",
    "run.tensorboard",
    "run.wandb",
    "run.tracker",
    "run.folder",
    "run.inputs",
    "run.rebuild",
    "run.checkpoint",
    "run.profiler",
    "report.comparison",
    "report.tables",
    "report.fonts",
    "report.canvas",
    "report.figures",
    "report.page",
    "report.comparison_page",
    "report.predictions",
    "report.augmented",
    "report.exhibits",
    "report.ranking_figure",
    "report.reliability_figure",
    "report.drawing",
    "report.run_figures",
    "report.preview_figures",
    "report.preview",
    "report.suspicious",
    "report.loose_images",
    "report.explanation",
    "report.diagnosis",
    "report.run_page",
    "report.account",
    "report.summary",
    "report.evaluation",
    "report.milestones",
    "export.preprocessing",
    "export.classifier",
    "export.hub_folder",
    "export.formats",
    "export.card",
    "export.hub",
    "sweep.distribution",
    "sweep.hyperband",
    "sweep.file",
    "sweep.results",
    "sweep.command",
    "sweep.runner",
    "checks.finding",
    "checks.launch",
    "checks.training",
    "checks.results",
    "commands.prepare",
    "commands.preview",
    "commands.sweep",
    "commands.compare",
    "commands.upload",
    "commands.report",
    "commands.export",
    "commands.explain",
    "commands.verify",
    "commands.diagnose",
    "commands.doctor",
    "__main__",
]
ON_DEMAND = {"run.tensorboard", "run.wandb", "run.rebuild", "models.timm_models"}
"""Modules that import a library of seconds, and are themselves imported only where they are needed"""
PROGRAMS = {"train": 180, "eval": 120}
"""The two programs on top, and how many lines each may have"""

MAX_FUNCTION_LINES = 40
MAX_PARAMETERS = 6
LONGER_FUNCTIONS = {("train.py", "fit"): 60}
"""The story of a training is told in one place."""

SOURCES = sorted(PACKAGE.rglob("*.py")) + [ROOT / f"{program}.py" for program in PROGRAMS]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"}


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules a file imports, within functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: write the full name of the module"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    names = {name.removeprefix("lockstep.") for name in imports(path) if name.startswith("lockstep.")}
    return names & set(MODULES)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def run_python(program: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, env=surroundings, capture_output=True, text=True)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


by_path = pytest.mark.parametrize("path", SOURCES, ids=relative)


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted(ORDER) == sorted(MODULES), "put a new module into ORDER, and take a removed one out"


@pytest.mark.parametrize("module", MODULES)
def test_dependencies_point_one_way(module: str) -> None:
    below = ORDER[: ORDER.index(module)]
    above = own_imports(MODULES[module]) - set(below)
    assert not above, f"{module} must not import {', '.join(sorted(above))}: see ORDER"


@by_path
def test_nobody_imports_the_programs(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & set(PROGRAMS)


def test_folders_stand_in_one_piece() -> None:
    folders = [module.rpartition(".")[0] for module in ORDER if "." in module]
    pieces = [folder for folder, before in zip(folders, [None, *folders], strict=False) if folder != before]
    inner = [piece for piece in pieces if not piece.startswith("data")]  # data.sources stands within data
    assert len(inner) == len(set(inner)), "each folder has one place in the order of folders"


@by_path
def test_modules_are_named_by_what_they_hold(path: Path) -> None:
    assert path.stem not in ("utils", "util", "common", "helpers", "misc", "trainer", "callbacks")


@by_path
def test_functions_are_short_and_take_few_parameters(path: Path) -> None:
    too_large = []
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        arguments = function.args
        parameters = [a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
        count = len([name for name in parameters if name not in ("self", "cls")])
        if lines > LONGER_FUNCTIONS.get((relative(path), function.name), MAX_FUNCTION_LINES) or count > MAX_PARAMETERS:
            too_large.append(f"{function.name} has {lines} lines and {count} parameters")
    assert not too_large, "; ".join(too_large)


@pytest.mark.parametrize(("program", "max_lines"), PROGRAMS.items())
def test_the_programs_can_be_read_at_one_sitting(program: str, max_lines: int) -> None:
    assert len((ROOT / f"{program}.py").read_text().splitlines()) <= max_lines


@by_path
def test_modules_do_nothing_but_define(path: Path) -> None:
    """At the top of a module stand definitions and constants; a program's start is guarded by its name."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING"), f"line {node.lineno}"
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"line {node.lineno} runs when {path.name} is imported"
        else:
            allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
            assert isinstance(node, allowed), f"line {node.lineno}: {type(node).__name__} at the top of {path.name}"


def test_importing_everything_is_silent_writes_nothing_and_leaves_heavy_libraries_alone(tmp_path: Path) -> None:
    program = (
        "import importlib, sys\n"
        f"for module in {[module for module in ORDER[:-1] if module not in ON_DEMAND]}:\n"
        "    importlib.import_module('lockstep.' + module)\n"
        "heavy = {'wandb', 'timm', 'datasets', 'torchvision', 'matplotlib', 'sklearn', 'tensorboard', 'pyarrow', "
        "'bokeh', 'jinja2', 'scipy'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)\n"
    )
    child = run_python(program, cwd=tmp_path)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


WITHOUT_TORCH = [
    "settings.config",
    "settings.cli",
    "run.tracker",
    "report.comparison",
    "report.fonts",
    "report.figures",
    "sweep.results",
    "training.schedule",
]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_some_modules_work_without_torch(module: str) -> None:
    program = f"import sys, lockstep.{module}; sys.exit('torch' in sys.modules)"
    assert run_python(program, cwd=ROOT).returncode == 0


@by_path
def test_every_module_and_public_function_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{relative(path)} has no docstring"
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    silent = [node.name for node in defined if not node.name.startswith("_") and not ast.get_docstring(node)]
    # The programs' own functions are explained by the program.
    assert path.parent == ROOT or not silent, f"no docstring: {', '.join(silent)}"
