"""Show what `diagnose` finds: in full for the command, or in a line per finding at the end of runs and sweeps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from shlex import quote
from typing import Any

from rich.console import Console

from minimind_ray.data.files import one_line
from minimind_ray.data.storage import url_of
from minimind_ray.diagnose.facts import read_facts
from minimind_ray.diagnose.finding import Finding
from minimind_ray.diagnose.rules import diagnose
from minimind_ray.diagnose.sweep import SweepFindings, diagnose_sweep
from minimind_ray.diagnose.words import LABELS, NAMES, Language, to_json, words
from minimind_ray.sweep.trials import Sweep

NOTHING: dict[Language, str] = {"en": "no findings", "zh": "没有发现问题"}
TRIALS: dict[Language, str] = {"en": "{n} of {count} trials", "zh": "{count} 个试验中的 {n} 个"}
MOST_NAMES = 4


def print_findings(findings: Sequence[Finding], console: Console, language: Language) -> None:
    """Print findings with causes and advice."""
    if not findings:
        _say(console, NOTHING[language])
    for finding in findings:
        _print(finding, console, language)


def print_sweep_findings(found: SweepFindings, console: Console, language: Language) -> None:
    """Print the findings of a sweep and, for each rule, of its trials."""
    if not found.own and not found.groups:
        _say(console, NOTHING[language])
    for finding in found.own:
        _print(finding, console, language)
    for group in found.groups:
        more = ", …" if len(group.trials) > MOST_NAMES else ""
        share = TRIALS[language].format(n=len(group.trials), count=found.count)
        _print(group.finding, console, language, f"{share} ({', '.join(group.trials[:MOST_NAMES])}{more})")


def print_run_findings(where: str, console: Console) -> None:
    """Print a line for each finding of a run that has ended, and the command that says more; nothing without findings.

    Never raises: the run itself has succeeded.
    """
    try:
        findings = diagnose(read_facts(where))
        lines = [f"  {finding.severity}: {words(finding, 'en').found}" for finding in findings]
    except Exception as error:
        print(f"{where}: could not be diagnosed: {one_line(error)}", file=sys.stderr)
        return
    for line in lines:
        _say(console, line)
    if lines:
        _say(console, f"  causes, and what to try: minimind-ray diagnose {quote(where)}")


def print_sweep_line(sweep: Sweep, console: Console) -> None:
    """Print one line about the findings of a sweep; nothing without findings. Never raises."""
    try:
        found = diagnose_sweep(sweep)
        parts = [words(finding, "en").short for finding in found.own]
        parts += [f"{words(g.finding, 'en').short} ({len(g.trials)} of {found.count} trials)" for g in found.groups]
    except Exception as error:
        print(f"{sweep.path}: could not be diagnosed: {one_line(error)}", file=sys.stderr)
        return
    if parts:
        _say(console, f"findings: {', '.join(parts)}; more: minimind-ray diagnose {quote(url_of(sweep.path))}")


def sweep_json(found: SweepFindings, language: Language) -> dict[str, Any]:
    """Return the findings of a sweep for JSON."""
    groups = zip(to_json((group.finding for group in found.groups), language), found.groups)
    return {
        "findings": to_json(found.own, language),
        "trials": found.count,
        "of_trials": [{**finding, "trials": list(group.trials)} for finding, group in groups],
    }


def _print(finding: Finding, console: Console, language: Language, whose: str = "") -> None:
    said, (why, advice) = words(finding, language), LABELS[language]
    name = NAMES[language][finding.severity]
    _say(console, f"{name}: {said.short}{f': {whose}' if whose else ''}")
    for text in (said.found, f"{why}{said.why}", f"{advice}{said.advice}"):
        _say(console, f"  {text}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)
