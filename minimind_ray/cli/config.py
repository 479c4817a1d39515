"""`minimind-ray config show STAGE`: print a config."""

from __future__ import annotations

from typing import Annotated

import typer

from minimind_ray.cli.flags import StageCommand, config_from_flags

app = typer.Typer(help="Look at configs.", no_args_is_help=True)


@app.command(cls=StageCommand)
def show(
    stage: Annotated[str, typer.Argument(help="{stages}")],
    config: Annotated[
        list[str] | None, typer.Option(metavar="FILE|NAME", help="config file; a later file overrides earlier ones")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any config key")] = None,
) -> None:
    """Print the resolved config as YAML: defaults, the stage's defaults, the files, --set."""
    from minimind_ray.config.load import to_yaml
    from minimind_ray.config.shipped import find

    files = [find("config", each).path for each in config or []]  # Only the YAML is printed.
    print(to_yaml(config_from_flags(stage, files, set_ or [], {})), end="")


@app.callback()
def group() -> None:
    """Look at configs."""
