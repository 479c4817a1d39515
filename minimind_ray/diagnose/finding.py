"""What a rule returns: a finding with its evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minimind_ray.diagnose.facts import Facts

Severity = Literal["error", "warning", "note"]
"""error: the run's model is of no use. warning: the model is worse than it could be. note: the numbers say little, or
the run cost more than needed."""
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Something that a run or a sweep shows. texts.yaml has its words under the name of the rule.

    evidence: the numbers that the words name.
    steps: the steps at which it shows, if there are such steps.
    setting, value: the config key to try, and a value for it if there is a good one.
    """

    rule: str
    severity: Severity
    evidence: Mapping[str, Any] = field(default_factory=dict[str, Any])
    steps: tuple[int, ...] = ()
    setting: str | None = None
    value: Any = None


Rule = Callable[[Facts], Finding | None]
"""A pure function; its name is the name of its findings."""


def rounded(value: float) -> float:
    """Return a number with one or two digits, to type: 3.3e-05 for 3.3333e-05."""
    return float(f"{value:.2g}")
