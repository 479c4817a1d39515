"""Tasks of a local folder: lm-eval's YAML files beside jsonl files. Reading them runs no code.

lm-eval itself can run code from a task's file: with `!function`, through metrics that it downloads, and in templates.
So the files are read here. Only the keys below are known, and templates run in Jinja's sandbox.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import lm_eval.utils
import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.registry import aggregation_registry, metric_registry
from lm_eval.api.task import ConfigurableTask

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import parse_json
from minimind_ray.tasks.docs import Docs

KEYS = frozenset(
    {
        "task", "task_alias", "tag", "include", "dataset_path", "dataset_kwargs", "training_split", "validation_split",
        "test_split", "fewshot_split", "doc_to_text", "doc_to_target", "doc_to_choice", "description",
        "target_delimiter", "fewshot_delimiter", "fewshot_config", "num_fewshot", "metric_list", "output_type",
        "generation_kwargs", "repeats", "filter_list", "gen_prefix", "metadata",
    }
)  # fmt: skip


def _sandboxed() -> SandboxedEnvironment:
    """Return lm-eval's environment of templates, in a sandbox: a template cannot reach Python's objects."""
    env = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    cast("dict[str, Any]", env.filters)["regex_replace"] = lm_eval.utils.regex_replace
    return env


def local_tasks(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what loads each task of the folder and of its subfolders, by the task's name.

    Raises:
        UserError: there is no task, or a file is broken or would run code.
    """
    if not folder.is_dir():
        raise UserError(f"--task-path {folder} is not a folder")
    found: dict[str, Callable[[], Any]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        config = _read(path, folder)
        name = config.get("task")
        if name is None:  # Only for `include`.
            continue
        if name in found:
            raise UserError(f"{path}: there are two tasks {name}; rename one of them")
        found[str(name)] = partial(_load, path, config)
    if not found:
        raise UserError(f"--task-path {folder} has no .yaml file with a task; see docs/benchmarks.md")
    return found


def _read(path: Path, folder: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the content of a task's file, with the files that it includes."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        if "!function" in str(error):
            raise UserError(
                f"{path}: !function would run Python code from the folder, so it is not supported; use templates, or "
                "run this task with lm-eval itself"
            ) from None
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a task is a mapping of keys, such as `task: my_task`")
    config = cast("dict[str, Any]", content)
    if unknown := sorted(str(key) for key in config if key not in KEYS):
        raise UserError(
            f"{path}: the key {unknown[0]} is not supported in a local task; known keys: {', '.join(sorted(KEYS))}"
        )
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [includes] if isinstance(includes, str) else includes:
        other = (path.parent / str(name)).resolve()
        if not other.is_relative_to(folder.resolve()) or other in (*seen, path.resolve()):
            raise UserError(f"{path}: include {name} is outside the folder, or includes this file itself")
        merged |= _read(other, folder, (*seen, path.resolve()))
    return merged | config


def _load(path: Path, config: dict[str, Any]) -> Any:
    """Return the task of a file.

    Raises:
        UserError: its data cannot be read, or lm-eval refuses the task.
    """
    settings = {key: value for key, value in config.items() if key not in ("dataset_path", "dataset_kwargs", "tag")}
    for metric in settings.get("metric_list") or []:
        if metric.get("hf_evaluate") or metric.get("metric") not in metric_registry:
            raise UserError(
                f"{path}: the metric {metric.get('metric')} is none of lm-eval's: {', '.join(metric_registry)}"
            )
        if metric.get("aggregation", "mean") not in aggregation_registry:
            raise UserError(
                f"{path}: the aggregation {metric['aggregation']} is none of lm-eval's: "
                f"{', '.join(aggregation_registry)}"
            )
    if config.get("dataset_path") != "json":
        raise UserError(
            f"{path}: dataset_path must be json, with dataset_kwargs.data_files; other data is not supported"
        )
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    splits = {"train": files} if isinstance(files, str) else files
    if not isinstance(splits, dict):
        raise UserError(f"{path}: dataset_kwargs.data_files must name a .jsonl file for each split")
    data = {str(split): _rows(path.parent / str(file)) for split, file in splits.items()}
    lm_eval.utils.env = _sandboxed()
    try:
        task = ConfigurableTask(config={**settings, "custom_dataset": lambda **_: data})
    except UserError:
        raise
    except Exception as error:  # lm-eval tries the task on its first item, and a template may raise anything.
        raise UserError(f"{path}: the task cannot be used: {type(error).__name__}: {error}") from error
    for number, doc in enumerate(task.eval_docs, 1):
        try:
            _try(task, doc)
        except Exception as error:  # As above.
            raise UserError(f"{path}: item {number} cannot be used: {type(error).__name__}: {error}") from error
    return task


def _try(task: Any, doc: Any) -> None:
    """Fill in the templates of an item, to find a broken one before a model has answered for an hour."""
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"doc_to_choice must give a list of choices, not {choices!r}")
        right = (
            text if isinstance(text, int) else target
        )  # A number in the place of the text: the choices are contexts.
        if isinstance(right, int) and not 0 <= right < len(choices):
            raise ValueError(f"the right choice is {right}, but the choices have the numbers 0 to {len(choices) - 1}")
        if isinstance(right, str) and right not in choices:
            raise ValueError(f"the right choice is {right!r}, which is not among the choices")


def _rows(file: Path) -> Docs:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    rows = [parse_json(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{file}: no items")
    return Docs(rows)
