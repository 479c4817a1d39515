"""`minimind-ray lora merge`: merge an adapter into its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minimind_ray.cli.options import require_new

app = typer.Typer(help="Work with LoRA adapters.", no_args_is_help=True)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="adapter directory, or the run that made one")],
    out: Annotated[Path, typer.Argument(help="model directory to write")],
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="the base model; default: the base named by the adapter", show_default=False),
    ] = None,
) -> None:
    """Merge an adapter into its base model, and write an ordinary model directory."""
    require_new(out)
    from minimind_ray.config.errors import UserError
    from minimind_ray.model.checkpoint import save_model
    from minimind_ray.model.lora import is_adapter
    from minimind_ray.stages.use import open_trained
    from minimind_ray.train.run import resolve_model

    if not is_adapter(resolve_model(adapter)):
        raise UserError(f"{adapter} is a whole model, not an adapter: there is nothing to merge")
    merged = open_trained(adapter, base=base)
    save_model(merged.model, merged.tokenizer, out, generation=merged.generation)
    print(f"{out}: {merged.directory} with {adapter}")


@app.callback()
def group() -> None:
    """Work with LoRA adapters."""
