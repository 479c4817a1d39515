"""The house keeps its order: who may import whom, and every shipped YAML loads."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from minimind_ray.config.load import load_config
from minimind_ray.config.search import read_sweep_file
from minimind_ray.config.stages import STAGES
from minimind_ray.stages.recipe import read_recipe, stage_config
from minimind_ray.sweep.axes import parse_axis, plan_trials

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minimind_ray"
LAYERS = [
    "config", "track", "data", "model", "tasks", "objectives", "train", "stages", "on_ray", "sweep", "diagnose",
    "display", "cli",
]  # fmt: skip
ONLY_IN = {
    "ray": "on_ray", "wandb": "track", "wandb_workspaces": "track", "swanlab": "track", "tensorboard": "track",
    "tensorboardX": "track", "lm_eval": "tasks", "typer": "cli",
}  # fmt: skip
LONGEST_FUNCTION = 60
TESTS_ONLY = {"transformers", "peft", "trl", "datasets"}


def imports(path: Path) -> set[str]:
    """Full names of the modules a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_files_import_only_from_layers_above(path: Path) -> None:
    relative = path.relative_to(PACKAGE).parts
    if len(relative) == 1:
        return
    layer = LAYERS.index(relative[0])
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "minimind_ray" and rest and rest[0] in LAYERS:
            assert LAYERS.index(rest[0]) <= layer, f"{name} stands below"
        if top in ONLY_IN:
            assert relative[0] == ONLY_IN[top], f"{top} is imported outside {ONLY_IN[top]}/"
        assert top not in TESTS_ONLY


def test_the_python_interface_imports_nothing_from_the_commands() -> None:
    assert not [name for name in imports(PACKAGE / "api.py") if name.startswith("minimind_ray.cli")]


def test_only_the_registry_knows_the_trackers() -> None:
    known = {"minimind_ray.track.registry", "minimind_ray.track.tracker"}
    for path in FILES:
        if path.parent != PACKAGE / "track":
            found = {".".join(name.split(".")[:3]) for name in imports(path) if name.startswith("minimind_ray.track.")}
            assert found <= known, path


def test_one_file_reads_the_hub() -> None:
    """data/files.py has the hub's file system, as it has those of all stores."""
    found = {
        str(path.relative_to(PACKAGE)) for path in FILES if any("huggingface_hub" in name for name in imports(path))
    }
    assert found == {"data/hub.py", "data/files.py"}


def is_private(path: Path) -> bool:
    return path.name.startswith("private_")


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_private_parts_of_packages_are_used_in_the_files_for_them(path: Path) -> None:
    """Each of these files is described in docs/private.md."""
    if is_private(path):
        document = (ROOT / "docs" / "private.md").read_text(encoding="utf-8")
        assert f"`{path.relative_to(PACKAGE)}`" in document
        return
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"\._private|\._internal|ray\.core\.generated|reportPrivateUsage|inspect\.unwrap", text)
    assert not [name for name in imports(path) if re.search(r"(^|\.)_[a-z]", name)]


def test_private_arguments_of_packages_are_described() -> None:
    """Arguments whose names begin with _, such as `_temp_dir` of `ray.init`."""
    document = (ROOT / "docs" / "private.md").read_text(encoding="utf-8")
    found = {
        (str(path.relative_to(PACKAGE)), keyword.arg)
        for path in FILES
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg and re.match("_[a-z]", keyword.arg) and not is_private(path)
    }
    assert all(f"| `{path}` | The argument `{name}`" in document for path, name in found), found


def test_private_files_are_imported_where_they_are_used() -> None:
    """Never at a file's start: with other versions of their packages they may not import."""
    names = {module_name(path) for path in FILES if is_private(path)}
    for path in FILES:
        if not is_private(path):
            assert not names & top_level_imports(path), path


def test_files_do_not_import_in_a_circle() -> None:
    there = {module_name(path): path for path in FILES}
    waits = {name: sorted(imports(path) & there.keys() - {name}) for name, path in there.items()}
    TopologicalSorter(waits).prepare()  # Raises CycleError, which names the circle.


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", ["architecture.md", "architecture_zh.md"])
def test_every_folder_is_described_in_the_order_of_imports(name: str) -> None:
    assert re.findall(r"^ {6}(\w+)/ +\S", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.MULTILINE) == LAYERS
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_every_file_begins_by_saying_what_it_is_for(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith('"""')
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_functions_are_short() -> None:
    long: list[str] = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long


@pytest.mark.parametrize(
    ("start", "slow"),
    [
        ("cli/main.py", ("ray", "torch", "pyarrow", "numpy", "wandb", "matplotlib", "tokenizers", "pydantic", "yaml")),
        ("stages/conversation.py", ("ray", "pyarrow", "fsspec", "pandas", "wandb", "matplotlib", "huggingface_hub")),
        ("stages/prompts.py", ("ray", "pyarrow", "fsspec", "pandas", "wandb", "matplotlib", "huggingface_hub")),
    ],
    ids=["help", "chat", "generate"],
)
def test_commands_start_without_slow_packages(start: str, slow: tuple[str, ...]) -> None:
    """What a file imports at its start, followed through our own modules."""
    seen, waiting = set(), [PACKAGE / start]
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for name in top_level_imports(path):
            assert name.split(".")[0] not in slow, f"{path.relative_to(ROOT)} imports {name} at its start"
            file = ROOT / (name.replace(".", "/") + ".py")
            if file.exists() and file not in seen:
                waiting.append(file)


def top_level_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_shipped_experiment_loads() -> None:
    stages, recipes = [], []
    for path in sorted((ROOT / "experiments").glob("*.yaml")):
        if "stages:" in path.read_text(encoding="utf-8"):
            recipe = read_recipe(path)
            for i in range(len(recipe.stages)):
                base = {} if i or recipe.stages[0].name == "pretrain" else {"init_from": "runs/base"}
                stage_config(recipe, i, "runs", "tokenizer", Path("data"), base).packs_per_step()
            recipes.append(path.name)
        else:
            stage = path.stem
            load_config(stage, [path]).packs_per_step()
            stages.append(path.name)
    assert stages == ["dpo.yaml", "pretrain.yaml", "sft.yaml"]
    assert recipes == ["corpus.yaml", "full.yaml", "lora.yaml", "quickstart.yaml", "zero.yaml"]


def test_every_shipped_sweep_loads() -> None:
    sweeps = sorted((ROOT / "experiments" / "sweeps").glob("*.yaml"))
    for path in sweeps:
        sweep = read_sweep_file(path)
        axes = [parse_axis(key, spec) for key, spec in sweep.axes.items()]
        base = load_config(sweep.stage, trees={str(path): sweep.settings})
        planned = plan_trials(base, axes, draws=sweep.trials, seeds=sweep.seeds, sweep_seed=base.train.seed)
        assert len(planned) >= 2
    assert [path.name for path in sweeps] == ["dpo.yaml", "lora.yaml", "pretrain.yaml", "quickstart.yaml"]


# Demo code names its own files by stage; `verify` trains a base by pretraining it, on the demo's files.
NAMES_STAGES = (
    "config/stages.py",
    *(f"stages/{name}.py" for name in STAGES),
    "data/demo.py",
    "cli/demo.py",
    "stages/verify.py",
)


def test_no_other_file_knows_a_stage_by_its_name() -> None:
    """No literal that is a stage's name, and no comparison with the name of a stage: code asks the stage's record.

    "lora" also names a section of the config and a command, so there only a comparison counts.
    """
    found: list[str] = []
    for path in FILES:
        file = str(path.relative_to(PACKAGE))
        if file in NAMES_STAGES:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                wrong = any("stage" in side for side in sides) and any(
                    re.search(rf"['\"]{name}['\"]", side) for name in STAGES for side in sides
                )
            else:
                wrong = isinstance(node, ast.Constant) and node.value in set(STAGES) - {"lora"}
            if wrong:
                found.append(f"{file}:{node.lineno}")
    assert not found
