"""Add options from the schema to commands: the short flags of config keys, and the settings of a sweep's search.

The schema is read when one of these commands is parsed, so that `minimind-ray --help` starts without it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from minimind_ray.config.flag import Flag
    from minimind_ray.config.flags import KeyFlag
    from minimind_ray.config.schema import Config

ADDED = "minimind_ray.added"


@dataclass(frozen=True)
class Option:
    """An option that the schema adds to a command. Its value is None if it is not given."""

    parameter: str
    name: str
    kind: Any
    help: str
    panel: str | None = None


def key_options(
    panel: Callable[[Flag], str] | None = None, *, only: Iterable[str] | None = None, without: Iterable[str] = ()
) -> list[Option]:
    """Return options for config keys: for all, for `only` some, or for all `without` some (names in Python).

    `panel` returns the heading of an option in the help.
    """
    from minimind_ray.config.flags import config_flags

    flags = config_flags()
    names = [name for name in (flags if only is None else only) if name not in without]
    return [_key_option(flags[name], panel(flags[name].flag) if panel else None) for name in names]


def _key_option(found: KeyFlag, panel: str | None) -> Option:
    flag = found.flag
    text = f"{found.key}; {flag.note}" if flag.note else found.key
    return Option(flag.parameter, flag.name, list[str] if found.repeated else str, text, panel)


def search_options(*, without: Iterable[str] = ()) -> list[Option]:
    """Return options for the fields of `SearchConfig`, `without` some of them."""
    from minimind_ray.config.search import SearchConfig

    return [
        Option(name, f"--{name.replace('_', '-')}", _scalar(field.annotation), field.description or "")
        for name, field in SearchConfig.model_fields.items()
        if name not in without
    ]


def _scalar(annotation: Any) -> type:
    """Return the type that Typer checks: int, float, or str for a field that also accepts words."""
    kinds = {kind for kind in _leaves(annotation) if kind is not type(None)}
    return kinds.pop() if len(kinds) == 1 else str


def _leaves(annotation: Any) -> Iterator[Any]:
    if getattr(annotation, "__metadata__", None):  # Annotated[int, Gt(0)]
        yield from _leaves(get_args(annotation)[0])
    elif arguments := get_args(annotation):
        for argument in arguments:
            yield from _leaves(argument)
    else:
        yield annotation if isinstance(annotation, type) else type(annotation)


class StageCommand(TyperCommand):
    """A command with a parameter for a stage. `{stages}` in the help of a parameter stands for the stages' names."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's parameters, with the stages' names in their help."""
        from minimind_ray.config.stages import STAGES, one_of

        found: list[Any] = super().get_params(ctx)
        for parameter in found:
            if parameter.help:
                parameter.help = parameter.help.replace("{stages}", one_of(STAGES))
        return found


def stage_names() -> list[str]:
    """Return the stages' names, for a shell's completion."""
    from minimind_ray.config.stages import STAGES

    return list(STAGES)


def require_stage(stage: str | None, command: str) -> str:
    """Return the stage. If none was given, print the stages with a line each, and exit as after a usage error."""
    from minimind_ray.config.stages import STAGES

    if stage is not None:
        return stage
    width = max(map(len, STAGES))
    lines = [f"  {record.name:<{width}}  {record.about}" for record in STAGES.values()]
    more = f"minimind-ray {command} --help lists the options, minimind-ray recipes the files of settings"
    print(f"which stage? minimind-ray {command} STAGE", *lines, more, sep="\n", file=sys.stderr)
    raise typer.Exit(2)


def with_options(make: Callable[[], list[Option]]) -> type[StageCommand]:
    """Return the class of a command that has the options of its function and the options of `make`.

    The function gets their values by `added` or `given`. `make` is called only when the command is parsed.
    """

    class Command(StageCommand):
        @functools.cached_property
        def extra(self) -> list[Any]:
            return _click_options(make())

        def get_params(self, ctx: Any) -> list[Any]:
            known = super().get_params(ctx)
            own = len(self.params)  # --help comes after the function's own options.
            return [*known[:own], *self.extra, *known[own:]]

        def invoke(self, ctx: Any) -> Any:
            ctx.meta[ADDED] = {option.name: ctx.params.pop(option.name) for option in self.extra}
            return super().invoke(ctx)

    return Command


def _click_options(options: Iterable[Option]) -> list[Any]:
    """Return Typer's objects for the options. Typer makes them from the signature of a function."""

    def function(**values: Any) -> None:
        raise NotImplementedError

    parameters: list[inspect.Parameter] = []
    for option in options:
        info = typer.Option(option.name, help=option.help, show_default=False, rich_help_panel=option.panel)
        kind = Annotated[option.kind | None, info]
        parameters.append(
            inspect.Parameter(option.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        )
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return list(typer.main.get_command(app).params)


def added(context: typer.Context) -> dict[str, Any]:
    """Return the options that `with_options` added and the user gave, by their names in Python."""
    from minimind_ray.config.flags import without_unset

    return without_unset(context.meta[ADDED])


def given(context: typer.Context) -> dict[str, Any]:
    """Return all parameters that the user gave to a command `with_options`, by their names in Python."""
    from minimind_ray.config.flags import without_unset

    return without_unset({**context.params, **context.meta[ADDED]})


def config_from_flags(stage: str, config: Iterable[Path], settings: Iterable[str], flags: Mapping[str, Any]) -> Config:
    """Return the config. --set overrides the --config files, and the short flags override --set."""
    from minimind_ray.config.flags import overrides_of
    from minimind_ray.config.load import load_config, parse_override

    overrides = {**dict(map(parse_override, settings)), **overrides_of(flags)}
    return load_config(stage, list(config), overrides)
