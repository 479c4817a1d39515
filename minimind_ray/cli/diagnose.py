"""`minimind-ray diagnose RUN|SWEEP`: say in plain words what a run or a sweep shows, why, and what to try."""

from __future__ import annotations

from typing import Annotated

import typer

from minimind_ray.config.errors import UserError


def diagnose(
    where: Annotated[str, typer.Argument(metavar="RUN|SWEEP", help="a run or a sweep, also one that still runs")],
    lang: Annotated[str, typer.Option(metavar="en|zh", help="language of the words: English or Chinese")] = "en",
    json: Annotated[bool, typer.Option("--json", help="print JSON with the evidence")] = False,
) -> None:
    """Say what a run's or a sweep's records show, with evidence, a likely cause, and the setting to try.

    The exit code is 0 with and without findings.
    """
    if lang not in ("en", "zh"):
        raise UserError(f"--lang is {lang!r}; it is en (English) or zh (Chinese)")
    from json import dumps

    from rich.console import Console

    from minimind_ray.config.paths import input_path
    from minimind_ray.diagnose.facts import read_facts
    from minimind_ray.diagnose.rules import diagnose as apply_rules
    from minimind_ray.diagnose.sweep import diagnose_sweep
    from minimind_ray.diagnose.words import to_json
    from minimind_ray.display.findings import print_findings, print_sweep_findings, sweep_json
    from minimind_ray.sweep.trials import read_sweep
    from minimind_ray.train.run import RunDirectory

    console = Console(markup=False)
    if RunDirectory(input_path(where)).file("sweep.json").exists():
        found = diagnose_sweep(read_sweep(where))
        if json:
            print(dumps(sweep_json(found, lang), ensure_ascii=False, indent=2))
        else:
            print_sweep_findings(found, console, lang)
        return
    findings = apply_rules(read_facts(where))
    if json:
        print(dumps(to_json(findings, lang), ensure_ascii=False, indent=2))
    else:
        print_findings(findings, console, lang)
