"""`minimind-ray import` and `export`: MiniMind's .pth files, and model directories from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind_ray.cli.options import require_new

if TYPE_CHECKING:
    from minimind_ray.config.schema import ModelShape


def import_(
    source: Annotated[Path, typer.Argument(help="MiniMind's .pth file, or a Hugging Face model directory")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="directory to write")],
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="tokenizer of a .pth model, which holds none", show_default=False),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="DIR", help="the model that a .pth LoRA file is for", show_default=False)
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="attention heads of a MiniMind-2 model; default: 8", show_default=False)
    ] = None,
    experts_per_token: Annotated[
        int | None,
        typer.Option(min=1, help="of a .pth model; default: 2 for MiniMind-2, 1 for 3", show_default=False),
    ] = None,
    norm_topk_prob: Annotated[
        bool | None,
        typer.Option(
            "--norm-topk-prob/--no-norm-topk-prob",
            help="of a .pth model: the weights of a token's experts add up to 1; default: they do",
            show_default=False,
        ),
    ] = None,
    router_aux_loss_coef: Annotated[
        float | None,
        typer.Option(
            help="of a .pth model, for training; default: 0.01 for MiniMind-2, 5e-4 for 3", show_default=False
        ),
    ] = None,
    rope_theta: Annotated[
        float | None, typer.Option(min=1, help="of a .pth model; default: 1e6", show_default=False)
    ] = None,
    inference_rope_scaling: Annotated[
        bool | None,
        typer.Option(
            "--inference-rope-scaling/--no-inference-rope-scaling",
            help="of a .pth model: use it with MiniMind's YaRN; default: without",
            show_default=False,
        ),
    ] = None,
    max_position_embeddings: Annotated[
        int | None, typer.Option(min=1, help="of a .pth model; default: 32768", show_default=False)
    ] = None,
    rms_norm_eps: Annotated[
        float | None,
        typer.Option(help="of a .pth model; default: 1e-5 for MiniMind-2, 1e-6 for 3", show_default=False),
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="of a .pth model, for training; default: 0", show_default=False)
    ] = None,
) -> None:
    """Make a model directory (or with --base an adapter directory) of ours; what does not fit is named."""
    require_new(out)
    from minimind_ray.config.errors import UserError
    from minimind_ray.model.minimind_pth import import_lora_pth, import_pth
    from minimind_ray.stages.start import whole_model

    given = {
        "num_attention_heads": heads, "num_experts_per_tok": experts_per_token, "norm_topk_prob": norm_topk_prob,
        "router_aux_loss_coef": router_aux_loss_coef, "rope_theta": rope_theta,
        "inference_rope_scaling": inference_rope_scaling, "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": rms_norm_eps, "dropout": dropout,
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    of_model = {_flag(name): value for name, value in settings.items()}
    if source.is_dir():
        _refuse({"--base": base, **of_model}, f"{source} is a directory, whose config.json says this")
        shape = _import_directory(source, out, tokenizer)
    elif not source.exists():
        raise UserError(f"{source}: no such file or directory")
    elif base is not None:
        _refuse({"--tokenizer": tokenizer, **of_model}, f"{base} says this of {source}")
        import_lora_pth(source, whole_model(base, "--base").absolute(), out)
        print(f"{out}: adapter for {base}")
        return
    elif tokenizer is None:
        raise UserError(
            f"{source}: a .pth file holds no tokenizer: give a model's with --tokenizer DIR, "
            "or for a LoRA file its model with --base DIR"
        )
    else:
        shape = import_pth(source, tokenizer, out, settings)
        _describe(out, shape)
        _print_assumed(shape, settings)
        return
    _describe(out, shape)


def _flag(setting: str, value: object = None) -> str:
    """The option of `import` for a setting of MiniMind's config, and its value where one is given."""
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
    print(f"assumed (not in the file): {' '.join([*assumed, ''])}{fixed} (no other is supported)")
    if assumed:
        print("If the model was trained with other values, import it again with these.")


def _refuse(options: dict[str, object], why: str) -> None:
    from minimind_ray.config.errors import UserError

    if told := [name for name, value in options.items() if value is not None]:
        raise UserError(f"{why}: leave {told[0]} out")


def _import_directory(source: Path, out: Path, tokenizer: str | None) -> ModelShape:
    """Read all of it, so that it is known to be whole, and write it as ours."""
    from minimind_ray.config.errors import UserError
    from minimind_ray.data.tokenizer import Tokenizer
    from minimind_ray.model.checkpoint import load_model, save_model
    from minimind_ray.model.lora import is_adapter
    from minimind_ray.model.minimind_pth import require_room
    from minimind_ray.train.run import resolve_model

    directory = resolve_model(source)
    if is_adapter(directory):
        raise UserError(f"{source} is an adapter, which is used as it is: give it as --adapter, or see lora merge")
    model, loaded = load_model(directory), Tokenizer.load(tokenizer or directory)
    require_room(model.shape, loaded, directory)
    save_model(model, loaded, out)
    return model.shape


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
        str | None, typer.Option(metavar="DIR", help="an adapter's base; default: where it says", show_default=False)
    ] = None,
    float32: Annotated[bool, typer.Option("--float32", help="exact, where MiniMind's own files hold half")] = False,
) -> None:
    """Write a model or an adapter as a file that MiniMind's scripts load, and say what their config lacks for it."""
    require_new(file)
    from minimind_ray.model.lora import is_adapter
    from minimind_ray.model.minimind_pth import export_lora_pth, export_pth
    from minimind_ray.stages.use import base_of
    from minimind_ray.train.run import resolve_model

    directory = resolve_model(source)
    dtype = "float32" if float32 else "half"
    settings: dict[str, object] = {}
    if is_adapter(directory):
        export_lora_pth(directory, base_of(directory, base), file, dtype)
    else:
        _refuse({"--base": base}, f"{source} is a whole model")
        settings = export_pth(directory, file, dtype)
    print(f"{file}: {directory}, {dtype}")
    if settings:
        told = ", ".join(f"{key} = {value}" for key, value in settings.items())
        print(f"MiniMind must be told in its MiniMindConfig, or it computes something else: {told}")
