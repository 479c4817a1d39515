"""The words of findings, in English and Chinese, from texts.yaml; and findings as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from minimind_ray.config.load import read_yaml
from minimind_ray.diagnose.finding import Finding, Severity

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
NAMES: dict[Language, dict[Severity, str]] = {
    "en": {"error": "error", "warning": "warning", "note": "note"},
    "zh": {"error": "错误", "warning": "警告", "note": "提示"},
}
LABELS: dict[Language, tuple[str, str]] = {"en": ("why: ", "try: "), "zh": ("原因：", "建议：")}


class Words(NamedTuple):
    """A finding in words: a title, what was found, a likely cause, and what to try."""

    short: str
    found: str
    why: str
    advice: str


@cache
def texts() -> dict[str, Any]:
    """Return texts.yaml: by rule, language and part."""
    return read_yaml(Path(__file__).with_name("texts.yaml"))


def words(finding: Finding, language: Language) -> Words:
    """Return a finding in words."""
    values = {**finding.evidence, "setting": finding.setting, "value": finding.value}
    parts = cast(dict[str, str], texts()[finding.rule][language])
    return Words(*(parts[part].format(**values) for part in ("short", "found", "why", "try")))


def to_json(findings: Iterable[Finding], language: Language) -> list[dict[str, Any]]:
    """Return findings with their words and evidence, for JSON."""
    return [
        {
            "rule": finding.rule, "severity": finding.severity, **words(finding, language)._asdict(),
            "evidence": {name: _plain(value) for name, value in finding.evidence.items()},
            "steps": list(finding.steps), "setting": finding.setting, "value": _plain(finding.value),
        }
        for finding in findings
    ]  # fmt: skip


def _plain(value: Any) -> Any:
    """Return a value that JSON has: null for infinity and NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
