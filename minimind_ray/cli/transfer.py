"""`minimind-ray import` and `export`: read and write MiniMind's .pth files, and import Hugging Face models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind_ray.cli.options import require_new

if TYPE_CHECKING:
    from minimind_ray.config.schema import ModelShape


def _setting(help: str, **options: Any) -> Any:
    """Return an option for a setting that a .pth file does not contain."""
    return typer.Option(help=help, show_default=False, **options)


def _switch(name: str, help: str) -> Any:
    return typer.Option(f"--{name}/--no-{name}", help=help, show_default=False)


def import_(
    source: Annotated[
        str, typer.Argument(help="MiniMind's .pth file, or a Hugging Face model: a directory or a name on the hub")
    ],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="directory to write")],
    tokenizer: Annotated[str | None, _setting("tokenizer for a .pth model, which contains none", metavar="DIR")] = None,
    base: Annotated[str | None, _setting("base model of a .pth LoRA file", metavar="DIR")] = None,
    heads: Annotated[int | None, _setting("attention heads of a MiniMind-2 model; default: 8", min=1)] = None,
    experts_per_token: Annotated[
        int | None, _setting("of a .pth model; default: 2 for MiniMind-2, 1 for MiniMind-3", min=1)
    ] = None,
    norm_topk_prob: Annotated[
        bool | None,
        _switch("norm-topk-prob", "of a .pth model: the weights of a token's experts add up to 1; default: yes"),
    ] = None,
    router_aux_loss_coef: Annotated[
        float | None, _setting("of a .pth model, for training; default: 0.01 for MiniMind-2, 5e-4 for MiniMind-3")
    ] = None,
    rope_theta: Annotated[float | None, _setting("of a .pth model; default: 1e6", min=1)] = None,
    inference_rope_scaling: Annotated[
        bool | None,
        _switch("inference-rope-scaling", "of a .pth model: scale positions with MiniMind's YaRN; default: no"),
    ] = None,
    max_position_embeddings: Annotated[int | None, _setting("of a .pth model; default: 32768", min=1)] = None,
    rms_norm_eps: Annotated[
        float | None, _setting("of a .pth model; default: 1e-5 for MiniMind-2, 1e-6 for MiniMind-3")
    ] = None,
    dropout: Annotated[float | None, _setting("of a .pth model, for training; default: 0")] = None,
) -> None:
    """Write a model directory of minimind-ray, or with --base an adapter directory."""
    require_new(out)
    given = {
        "num_attention_heads": heads, "num_experts_per_tok": experts_per_token, "norm_topk_prob": norm_topk_prob,
        "router_aux_loss_coef": router_aux_loss_coef, "rope_theta": rope_theta,
        "inference_rope_scaling": inference_rope_scaling, "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": rms_norm_eps, "dropout": dropout,
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    from minimind_ray.data.hub import hub_ref

    is_directory = Path(source).is_dir() or hub_ref(source) is not None
    _require_fitting(source, tokenizer, base, settings, is_directory=is_directory)
    from minimind_ray.model.minimind_pth import import_pth
    from minimind_ray.stages.transfer import import_adapter, import_directory

    if is_directory:
        _describe(out, import_directory(source, out, tokenizer))
    elif base is not None:
        import_adapter(Path(source), base, out)
        print(f"{out}: adapter for {base}")
    else:
        assert tokenizer is not None
        shape = import_pth(Path(source), tokenizer, out, settings)
        _describe(out, shape)
        _print_assumed(shape, settings)


def _require_fitting(
    source: str, tokenizer: str | None, base: str | None, settings: Mapping[str, object], *, is_directory: bool
) -> None:
    """Check that the source exists, and that the given options apply to this kind of source."""
    from minimind_ray.config.errors import UserError

    of_model = {_flag(name): value for name, value in settings.items()}
    if is_directory:
        _refuse({"--base": base, **of_model}, f"{source} is a directory with these settings in its config.json")
    elif not Path(source).exists():
        raise UserError(f"{source}: no such file or directory")
    elif base is not None:
        _refuse({"--tokenizer": tokenizer, **of_model}, f"{base} already determines this for {source}")
    elif tokenizer is None:
        raise UserError(
            f"{source}: a .pth file contains no tokenizer: for a model, give the tokenizer with --tokenizer DIR; "
            "for a LoRA file, give its base model with --base DIR"
        )


def _flag(setting: str, value: object = None) -> str:
    """Return the option of `import` for a setting of MiniMind's config, with the value if it is not None."""
    short = {"num_attention_heads": "heads", "num_experts_per_tok": "experts-per-token"}
    name = short.get(setting, setting.replace("_", "-"))
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}" if value is None else f"--{name} {value:g}"


def _print_assumed(shape: ModelShape, given: Mapping[str, object]) -> None:
    from minimind_ray.model.minimind_pth import settings_not_in_file

    defaults = settings_not_in_file(shape.qk_norm, shape.num_experts > 0)
    assumed = [_flag(name, value) for name, value in defaults.items() if name not in given]
    fixed = "hidden_act silu, seq_aux true" if shape.num_experts and not shape.qk_norm else "hidden_act silu"
    print(f"assumed (not in the file): {' '.join([*assumed, ''])}{fixed} (no others are supported)")
    if assumed:
        print("If the model was trained with other values, import it again with those values.")


def _refuse(options: dict[str, object], reason: str) -> None:
    from minimind_ray.config.errors import UserError

    if given := [name for name, value in options.items() if value is not None]:
        raise UserError(f"{reason}: leave {given[0]} out")


def _describe(out: Path, shape: ModelShape) -> None:
    from minimind_ray.model.families import config_of
    from minimind_ray.train.throughput import parameter_counts

    total, active = parameter_counts(shape)
    experts = f", {active:,} active for a token" if shape.num_experts else ""
    print(
        f"{out}: {config_of(shape)['architectures'][0]}, {total:,} parameters{experts}; hidden {shape.hidden_size}, "
        f"{shape.num_hidden_layers} layers, {shape.num_attention_heads} heads, {shape.num_key_value_heads} key heads, "
        f"{shape.vocab_size:,} tokens"
    )


def export(
    source: Annotated[str, typer.Argument(metavar="DIR", help="run, model directory or adapter directory")],
    file: Annotated[Path, typer.Argument(help="the .pth file to write")],
    base: Annotated[
        str | None, typer.Option(metavar="DIR", help="base model; default: the adapter's own", show_default=False)
    ] = None,
    float32: Annotated[
        bool, typer.Option("--float32", help="write exact float32 weights; MiniMind's own files are float16")
    ] = False,
) -> None:
    """Write a model or an adapter as a .pth file for MiniMind's scripts. Print the settings that MiniMind needs."""
    require_new(file)
    from minimind_ray.model.lora import is_adapter
    from minimind_ray.stages.transfer import export as export_model
    from minimind_ray.train.run import resolve_model

    directory = resolve_model(source)
    if not is_adapter(directory):
        _refuse({"--base": base}, f"{source} is a whole model")
    dtype = "float32" if float32 else "half"
    settings = export_model(directory, file, base, dtype)
    print(f"{file}: {directory}, {dtype}")
    if settings:
        needed = ", ".join(f"{key} = {value}" for key, value in settings.items())
        print(f"MiniMind needs these settings in its MiniMindConfig to compute the same: {needed}")
