"""Recorded runs: those that are sound have no finding, those that were broken have the finding for what was done.

runs.zip holds the files of real runs that the rules read. To make it again (some minutes):

    MINIMIND_CORPUS=… python -m tests.bench.diagnose --out DIR --record tests/diagnose/runs.zip
"""

from __future__ import annotations

from pathlib import Path

import pytest

from minimind_ray.diagnose.facts import read_facts
from minimind_ray.diagnose.rules import diagnose
from minimind_ray.diagnose.words import LANGUAGES, words
from tests.bench.diagnose import BROKEN, HEALTHY

pytestmark = pytest.mark.unit


def test_ten_healthy_runs_are_recorded(runs: Path) -> None:
    assert len(HEALTHY) == 10 and len(BROKEN) >= 6
    assert {path.name for path in runs.iterdir()} == {*HEALTHY, *BROKEN}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_finding(name: str, runs: Path) -> None:
    assert diagnose(read_facts(str(runs / name))) == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_has_the_finding_that_names_its_fault(name: str, runs: Path) -> None:
    found = {finding.rule: finding for finding in diagnose(read_facts(str(runs / name)))}
    assert name in found
    for language in LANGUAGES:
        assert all(words(found[name], language))
