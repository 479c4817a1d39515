"""`minimind-ray push MODEL --repo OWNER/NAME`: upload a model with its card to the Hugging Face Hub."""

from __future__ import annotations

from typing import Annotated

import typer


def push(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="run, sweep (its winner), checkpoint or model directory")
    ],
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="repository; it is made if there is none")],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the files and the card; upload nothing")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="branch; it is made if there is none; default: main")
    ] = None,
    message: Annotated[str | None, typer.Option(help="message of the commit", show_default=False)] = None,
    base: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="of an adapter: its base on the hub", show_default=False)
    ] = None,
) -> None:
    """Upload the chosen checkpoint with its model card to the Hugging Face Hub.

    Weights, JSON files, tokenizer and card are uploaded; never the optimizer's state or logs. Give your token as
    HF_TOKEN or by `hf auth login`.
    """
    from minimind_ray.cli.options import printable
    from minimind_ray.data.hub import require_token, size_text, upload
    from minimind_ray.stages.push import collect

    if not dry_run:
        require_token()
    chosen = winner_of(model) or model
    found = collect(chosen, repo, base)
    for note in found.notes:
        print(printable(note))
    sizes = found.sizes()
    print(f"{printable(str(found.directory))}: {len(sizes)} files, {size_text(sum(sizes.values()))}")
    if dry_run:
        for name, size in sizes.items():
            print(f"  {printable(name)}  {size_text(size)}")
        print(f"\n{printable(found.card)}")
        return
    print(upload(repo, found.files, private=private, revision=revision, message=message or "Upload by MiniMind Ray"))


def winner_of(path: str) -> str | None:
    """Return the run of a sweep's winner, and name it; None if there is no sweep at `path`.

    Raises:
        UserError: no trial of the sweep has a result yet.
    """
    from minimind_ray.config.errors import UserError
    from minimind_ray.config.paths import input_path
    from minimind_ray.data.hub import hub_ref
    from minimind_ray.data.storage import url_of
    from minimind_ray.train.run import RunDirectory

    if hub_ref(path) or not RunDirectory(input_path(path)).file("sweep.json").exists():
        return None
    from minimind_ray.sweep.compare import compare
    from minimind_ray.sweep.trials import read_sweep

    comparison = compare([read_sweep(path)])
    winner = comparison.winner
    if winner is None:
        raise UserError(f"{path}: no trial of the sweep has a result yet; push it when one is validated")
    print(f"the sweep's winner by {comparison.metric} is {winner.id} ({winner.status})")
    return url_of(winner.path)
