"""`minimind-ray eval MODEL FILES --stage STAGE`: measure a model on files; `eval MODEL --tasks …`: on benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_ray.cli import options
from minimind_ray.cli.flags import added, config_from_flags, key_options, with_options
from minimind_ray.config.errors import UserError

if TYPE_CHECKING:
    from minimind_ray.stages.benchmark import Score

EvalCommand = with_options(lambda: key_options(only=["precision", "max_seq_len", "pack_tokens"]))


Files = Annotated[list[str] | None, typer.Argument(help="paths, globs, folders or URLs", show_default=False)]
Stage = Annotated[str | None, typer.Option(help="the stage that the rows are for: {stages}", show_default=False)]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="dpo: the reference model, which rewards are relative to; without it, the reference's "
        "log-probabilities count as 0 and answers are compared by their own log-probabilities",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE.parquet", help="write each example's or item's result", show_default=False),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="data.…, eval.max_tokens, dpo.beta, dpo.loss")
]


def _of_benchmarks(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, show_default=False, rich_help_panel="Benchmarks", **more)


Tasks = Annotated[
    str | None,
    _of_benchmarks(
        "tasks of lm-eval, such as arc_easy,ceval-valid, or offline tasks: mm_arithmetic, mm_demo, mm_tools, "
        "mm_format, mm_repetition",
        metavar="NAME,NAME",
    ),
]
TaskPath = Annotated[
    Path | None,
    _of_benchmarks("folder with tasks of your own: lm-eval's YAML files and .jsonl files", metavar="DIR"),
]
Limit = Annotated[int | None, _of_benchmarks("use the first items of each task only", min=1)]
Shots = Annotated[
    int | None,
    _of_benchmarks("examples before each question, in tasks that may have them; default: as the task says", min=0),
]
Chat = Annotated[bool, _of_benchmarks("put each prompt into a conversation", "--chat")]


def evaluate_(
    context: typer.Context,
    model: options.Model,
    files: Files = None,
    stage: Stage = None,
    adapter: options.Adapter = None,
    reference: Reference = None,
    out: Out = None,
    json: Annotated[bool, typer.Option("--json", help="print the result as a JSON object")] = False,
    config: Annotated[list[Path] | None, typer.Option(help="YAML file, such as a run's config.yaml")] = None,
    set_: Settings = None,
    tasks: Tasks = None,
    task_path: TaskPath = None,
    limit: Limit = None,
    num_fewshot: Shots = None,
    chat: Chat = False,
) -> None:
    """Measure loss, perplexity and bits per byte on files; for preference pairs, the fraction ranked correctly.

    The data is prepared and measured as in a validation during training, so the numbers are the same. With --tasks,
    measure the model on benchmarks instead.
    """
    if out is not None:
        _make_room(out)
    if tasks is None:
        if not files or stage is None:
            raise UserError("eval needs files and their --stage, or --tasks with the names of benchmarks")
        if task_path or limit or num_fewshot is not None or chat:
            raise UserError("--task-path, --limit, --num-fewshot and --chat belong to benchmarks: give --tasks, too")
        resolved = config_from_flags(stage, config or [], set_ or [], {"val": files, **added(context)})
        _measure(resolved, model, adapter, reference, out, json)
        return
    more = added(context)
    precision = more.pop("precision", "auto")
    if files or stage or reference or config or set_ or more:
        raise UserError("--tasks needs no files and none of their settings: leave them out, or run eval twice")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    asked = {"limit": limit, "chat": chat, "adapter": adapter, "precision": precision}
    _benchmark(model, names, task_path, num_fewshot, out, json, asked)


def _make_room(out: Path) -> None:
    options.require_local(out)
    if out.is_dir():
        raise UserError(f"--out {out} is a directory: name a file in it, such as {out / 'results.parquet'}")
    out.parent.mkdir(parents=True, exist_ok=True)


def _measure(config: Any, model: str, adapter: str | None, reference: str | None, out: Path | None, json: bool) -> None:
    from minimind_ray.stages.evaluate import measure

    evaluation, facts = measure(config, model, adapter, reference, say=(lambda line: None) if json else print)
    if out is not None:
        evaluation.write(out)
    if json:
        from json import dumps

        print(dumps(facts, ensure_ascii=False))
        return
    for name, value in facts.items():
        shown = f"{value[0]:.4f} to {value[1]:.4f}" if isinstance(value, list) else value
        print(f"{name.replace('_', ' ')}: {f'{shown:.6g}' if isinstance(shown, float) else shown}")
    if out is not None:
        print(f"examples: {out}")


def _benchmark(
    model: str, names: list[str], folder: Path | None, shots: int | None, out: Path | None, json: bool, asked: Any
) -> None:
    from rich.console import Console

    from minimind_ray.display.tasks import task_progress
    from minimind_ray.stages.benchmark import load_suite, run_benchmark, summarise
    from minimind_ray.tasks.items import write_items
    from minimind_ray.train.run import resolve_model

    if not names:
        raise UserError("--tasks names no task")
    resolve_model(model)  # Find a mistake before the tasks are loaded, which may take minutes.
    suite = load_suite(names, folder, shots)
    with task_progress(Console(stderr=True)) as progress:
        results = run_benchmark(model, suite, progress=progress, **asked)
    scores = summarise(results)
    if out is not None:
        write_items(out, results.items)
    if json:
        from json import dumps

        found = [{**score._asdict(), "verdict": score.verdict} for score in scores]
        print(dumps({"model": model, "tasks": found}, ensure_ascii=False))
        return
    for line in _table(scores):
        print(line)
    if out is not None:
        print(f"items: {out}")


def _table(scores: list[Score]) -> list[str]:
    """Return the lines of a table with a row for each score."""
    rows = [("task", "metric", "value", "95 % interval", "items", "chance", "")]
    for score in scores:
        interval = "" if score.low is None else f"{score.low:.4f} to {score.high:.4f}"
        chance = "" if score.chance is None else f"{score.chance:.4f}"
        rows.append(
            (score.task, score.metric, f"{score.value:.4f}", interval, f"{score.items:,}", chance, score.verdict)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
