"""`minimind-ray data inspect` and `data prepare`: show the data that training gets, and prepare it."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from minimind_ray.cli.flags import added, config_from_flags, key_options, with_options

if TYPE_CHECKING:
    from rich.console import Console

    from minimind_ray.config.schema import DataConfig
    from minimind_ray.data.inspect import Inspection
    from minimind_ray.data.prepare import Encoding, Prepared, Progress, Unit
    from minimind_ray.data.store import UnitStats
    from minimind_ray.data.tokenizer import Tokenizer

app = typer.Typer(help="Look at data and prepare it.", no_args_is_help=True)


@app.command(cls=with_options(lambda: key_options(only=["max_seq_len", "pack_tokens"])))
def inspect(
    context: typer.Context,
    files: Annotated[list[str], typer.Argument(help="paths, globs, folders or URLs")],
    tokenizer: Annotated[str, typer.Option(help="directory with tokenizer.json, or a model of the hub")],
    stage: Annotated[str | None, typer.Option(help="{stages}; default: recognised from the rows")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="read at most this many rows", show_default=False)] = None,
    samples: Annotated[int, typer.Option(min=0, help="documents to show")] = 3,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any data key, such as data.fields.prompt=q")
    ] = None,
) -> None:
    """Show the data as training gets it: counts, lengths, cut documents, full packs, samples with tokens with loss."""
    from itertools import chain, islice

    from minimind_ray.config.paths import input_path
    from minimind_ray.config.stages import STAGES
    from minimind_ray.data.hub import model_location
    from minimind_ray.data.inspect import guess_stage, inspect_rows
    from minimind_ray.data.records import discover, read_rows
    from minimind_ray.data.tokenizer import Tokenizer

    loaded = Tokenizer.load(model_location(tokenizer))
    flags = added(context)
    # Any stage works: only the section data is used.
    unstaged = config_from_flags(stage or next(iter(STAGES)), [], set_ or [], flags).data
    sources = discover([input_path(file) for file in files], unstaged.text_files)
    source_rows = islice(chain.from_iterable(map(read_rows, sources)), rows)
    if stage is None:
        stage, source_rows = guess_stage(source_rows, unstaged)
    config = config_from_flags(stage, [], set_ or [], flags)
    inspection = inspect_rows(config.stage, source_rows, loaded, config.data, config.eval.cluster, samples)
    _print_inspection(inspection, config.stage, loaded, config.data)


@app.command(cls=with_options(lambda: key_options(only=["max_seq_len", "pack_tokens", "cache_dir"])))
def prepare(
    context: typer.Context,
    files: Annotated[list[str], typer.Argument(help="training files: paths, globs, folders or URLs")],
    stage: Annotated[str, typer.Option(help="{stages}")],
    tokenizer: Annotated[str, typer.Option(help="directory with tokenizer.json, or a model of the hub")],
    val: Annotated[list[str] | None, typer.Option(help="validation files; default: hold out rows")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any data key")] = None,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Ray Data on all CPUs, or this process alone")] = True,
) -> None:
    """Prepare the packs that training reads. A later `train` with the same data settings uses them."""
    from rich.console import Console

    from minimind_ray.data.prepare import prepare, run_units_here, worth_spreading
    from minimind_ray.data.records import require_files
    from minimind_ray.data.shipped import resolve_paths
    from minimind_ray.data.storage import require_writable
    from minimind_ray.data.tokenizer import Tokenizer

    flags = {"train": files, "val": val, "tokenizer": tokenizer, **added(context)}
    config = resolve_paths(config_from_flags(stage, [], set_ or [], flags))
    require_writable(config.data.cache_dir)
    require_files(config.data)
    loaded = Tokenizer.load(config.data.tokenizer or tokenizer)
    splits = ("train", "val") if config.data.val or config.data.val_fraction else ("train",)
    console = Console(highlight=False, soft_wrap=True)
    prepared: list[Prepared] = []
    with ExitStack() as stack:

        def on_ray(units: Sequence[Unit], encoding: Encoding) -> Iterable[UnitStats]:
            if not (os.environ.get("RAY_ADDRESS") or worth_spreading(units)):
                return run_units_here(units, encoding)
            # Start Ray only if there is work, because it takes seconds.
            from minimind_ray.on_ray.prepare import run_units_on_ray
            from minimind_ray.on_ray.session import ray_running

            stack.enter_context(ray_running())
            return run_units_on_ray(units, encoding)

        for split in splits:
            with _progress(split, console) as report:
                run_units = on_ray if ray else run_units_here
                cluster = config.eval.cluster
                prepared.append(prepare(config.stage, config.data, split, loaded, run_units, report, cluster))
    _print_prepared(prepared, console)


@contextmanager
def _progress(split: str, console: Console) -> Generator[Callable[[Progress], None]]:
    """Show a progress bar over the source bytes, with the rows read so far, while data is prepared."""
    from rich import progress

    columns = (
        *progress.Progress.get_default_columns(),
        progress.DownloadColumn(),
        progress.TextColumn("{task.fields[rows]:,} rows"),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"preparing {split}", total=None, rows=0)
        yield lambda now: bar.update(task, completed=now.done, total=now.total, rows=now.rows)


def _print_prepared(prepared: list[Prepared], console: Console) -> None:
    from rich.table import Table

    table = Table("", *(p.manifest.split for p in prepared), box=None, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    counts = {
        "rows": "rows read",
        "kept": "= kept",
        "rejected": "+ rejected",
        "left_out": "+ too long, left out",
        "held_out": "+ held out",
        "documents": "documents",
        "split": "texts split at max_seq_len",
        "cut": "documents cut at max_seq_len",
        "cut_tokens": "tokens cut off",
        "tokens": "tokens",
        "counted_tokens": "tokens that carry loss",
    }
    for count, label in counts.items():
        table.add_row(label, *(f"{p.manifest.total(count):,}" for p in prepared))
    table.add_row("packs", *(f"{p.manifest.n_packs:,}" for p in prepared))
    table.add_row("packs' fullness", *(f"{p.fullness:.1%}" for p in prepared))
    table.add_row("units made now", *(f"{p.made:,}" for p in prepared))
    table.add_row("units found in the cache", *(f"{p.reused:,}" for p in prepared))
    table.add_row("seconds", *(f"{p.seconds:.1f}" for p in prepared))
    console.print(table)
    if not any(p.made for p in prepared):
        console.print("nothing to do: all data was in the cache")
    for p in prepared:
        formats = f" (format {', '.join(p.manifest.formats)})" if p.manifest.formats else ""
        console.print(f"{p.manifest.split}: {p.path}{formats}", markup=False)
        for remark in p.remarks():
            console.print(f"  {remark}", markup=False)
        if p.manifest.total("rejected"):
            console.print(f"  rejected rows: {p.rejects}", markup=False)


def _print_inspection(inspection: Inspection, stage: str, tokenizer: Tokenizer, config: DataConfig) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from minimind_ray.data.inspect import histogram

    console = Console(highlight=False, soft_wrap=True)
    tally, lengths = inspection.tally, inspection.lengths
    formats = f" of format {', '.join(inspection.formats)}" if inspection.formats else ""
    left_out = f" + {tally.left_out:,} too long" if tally.left_out else ""
    console.print(
        f"[bold]{stage}[/]: {inspection.rows:,} rows{formats} = {tally.kept:,} kept + "
        f"{tally.rejected:,} rejected{left_out}"
    )
    for remark in inspection.remarks:
        console.print(remark, markup=False)
    for reason in inspection.reasons[:5]:
        where = f"{reason.first.file}:{reason.first.line}"
        console.print(f"  {reason.count:,} rejected, the first at {where}: {reason.first.reason}", markup=False)
    if tally.rejected > config.max_reject_fraction * inspection.rows:
        console.print(f"data.max_reject_fraction {config.max_reject_fraction:g} allows fewer: training would stop")
    if not inspection.documents:
        return

    console.print(
        f"{len(lengths):,} documents, {int(lengths.sum()):,} tokens; tokens in a document: "
        + ", ".join(f"{q} % {int(v):,}" for q, v in zip((50, 90, 95, 99), np.percentile(lengths, (50, 90, 95, 99))))
        + f", longest {lengths.max():,}, mean {lengths.mean():.1f}"
    )
    console.print("a token has {:.2f} chars, {:.2f} bytes of text".format(*inspection.per_token))
    bins = histogram(lengths)
    most = max(count for _, _, count in bins)
    table = Table("tokens", "documents", "", box=None, header_style="dim")
    table.columns[0].justify = table.columns[1].justify = "right"
    for first, last, count in bins:
        label = f"{first:,}" if first == last else f"{first:,}–{last:,}"
        table.add_row(label, f"{count:,}", "█" * round(40 * count / most))
    console.print(table)

    over = int((lengths > config.max_seq_len).sum())
    console.print(
        f"data.max_seq_len {config.max_seq_len:,}: {over:,} documents are longer; {tally.split:,} split, "
        f"{tally.cut:,} cut, losing {tally.cut_tokens:,} tokens ({tally.cut_tokens / int(lengths.sum()):.2%})"
    )
    console.print(
        f"data.pack_tokens {config.pack_tokens:,}: {inspection.packs:,} packs, "
        f"{inspection.fill(config.pack_tokens):.1%} full; {inspection.tokens:,} tokens, of which "
        f"{inspection.counted:,} ({inspection.counted / inspection.tokens:.1%}) carry loss"
    )
    _print_samples(inspection, tokenizer, console)


def _print_samples(inspection: Inspection, tokenizer: Tokenizer, console: Console) -> None:
    """Print some documents, with the tokens that carry loss in green."""
    from rich.text import Text

    from minimind_ray.data.inspect import runs

    for group in inspection.samples:
        for document in group:
            console.rule(style="dim")
            text = Text()
            for piece, counts in runs(document, tokenizer):
                text.append(piece, style="green" if counts else "dim")
            console.print(text)
    if inspection.samples:
        console.rule(style="dim")
        console.print("[green]green[/]: these tokens carry loss")


@app.callback()
def group() -> None:
    """Look at data and prepare it."""
