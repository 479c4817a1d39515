"""`minimind-ray eval MODEL FILES --stage STAGE`: measure a model on files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minimind_ray.cli import options
from minimind_ray.cli.flags import added, config_from_flags, key_options, with_options
from minimind_ray.config.errors import UserError

EvalCommand = with_options(lambda: key_options(only=["precision", "max_seq_len", "pack_tokens"]))


def evaluate_(
    context: typer.Context,
    model: options.Model,
    files: Annotated[list[str], typer.Argument(help="paths, globs, folders or URLs")],
    stage: Annotated[str, typer.Option(help="the stage that the rows are for: {stages}")],
    adapter: options.Adapter = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="dpo: the reference model, which rewards are relative to; without it, the reference's "
            "log-probabilities count as 0 and answers are compared by their own log-probabilities",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.parquet", help="write each example's result", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the result as a JSON object")] = False,
    config: Annotated[list[Path] | None, typer.Option(help="YAML file, such as a run's config.yaml")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="data.…, eval.max_tokens, dpo.beta, dpo.loss")
    ] = None,
) -> None:
    """Measure loss, perplexity and bits per byte on files; for preference pairs, the fraction ranked correctly.

    The data is prepared and measured as in a validation during training, so the numbers are the same.
    """
    if out is not None:
        options.require_local(out)
        if out.is_dir():
            raise UserError(f"--out {out} is a directory: name a file in it, such as {out / 'results.parquet'}")
        out.parent.mkdir(parents=True, exist_ok=True)
    resolved = config_from_flags(stage, config or [], set_ or [], {"val": files, **added(context)})
    from minimind_ray.stages.evaluate import measure

    evaluation, facts = measure(resolved, model, adapter, reference, say=(lambda line: None) if json else print)
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
