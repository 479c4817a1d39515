"""The benchmarks of a training run: `eval.tasks` in its config. lm-eval is imported only where a task is used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import EvalConfig, GenerationConfig
from minimind_ray.config.search import TASK_PREFIX
from minimind_ray.config.stages import Mode
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.transformer import Transformer
from minimind_ray.tasks.extra import require_lm_eval
from minimind_ray.tasks.items import mode_of

if TYPE_CHECKING:
    from minimind_ray.tasks.suite import Suite, TaskResults


@cache
def _suite(names: tuple[str, ...], folder: str | None) -> Suite:
    require_lm_eval()
    from minimind_ray.tasks.suite import load_tasks

    return load_tasks(names, Path(folder) if folder else None)


def suite_of(config: EvalConfig) -> Suite:
    """Return the tasks of a run, loaded once in each process.

    Raises:
        UserError: lm-eval is not installed, a task cannot be loaded, or it has no metric with a value for each item.
    """
    suite = _suite(tuple(config.tasks), config.task_path)
    if unjudged := [name for name in suite.names if suite.judged_by(name) is None]:
        raise UserError(f"eval.tasks: {unjudged[0]} has no metric with a value for each item; use another task")
    return suite


def require_task(config: EvalConfig, metric: str, mode: Mode) -> None:
    """Check that trials can be judged by `metric`, which is the result of a task (task/NAME).

    Raises:
        UserError: the task is not among `eval.tasks`, does not run at each validation, or has another mode; or see
            `suite_of`.
    """
    name = metric.removeprefix(TASK_PREFIX)
    if name not in config.tasks:
        raise UserError(f"metric {metric}: {name} is not in eval.tasks; add it: --set 'eval.tasks=[{name}]'")
    if config.tasks_every > 1:
        raise UserError(
            f"metric {metric}: eval.tasks_every is {config.tasks_every}, but a trial is judged by its best validation, "
            "which may have no results of tasks: leave eval.tasks_every out"
        )
    judged = suite_of(config).judged_by(name)
    if judged and mode_of(judged) != mode:
        less = "less" if mode == "max" else "more"
        raise UserError(f"mode {mode}: {name} is judged by {judged}, of which {less} is better: give the other mode")


def run_tasks_of(
    config: EvalConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    generation: GenerationConfig,
    autocast: Callable[[], AbstractContextManager[Any]],
    *,
    converses: bool,
) -> TaskResults:
    """Run a model, which is in eval mode, on the first `task_limit` items of each task of a run."""
    suite = suite_of(config)
    from minimind_ray.tasks.lm import RaggedLM
    from minimind_ray.tasks.suite import run_tasks

    lm = RaggedLM(model, tokenizer, generation, autocast)
    return run_tasks(lm, suite, limit=config.task_limit, converses=converses)
