"""Recipes, configs and sweeps by name: what is taken, what is said, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from minimind_ray.cli.main import app
from minimind_ray.config.errors import UserError
from minimind_ray.config.shipped import experiments, find, shipped
from tests.cli.conftest import Command

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_here_wins_over_the_shipped_one(here: Path) -> None:
    (here / "zero").mkdir()
    assert find("recipe", "zero").path == shipped("experiments/zero.yaml")
    assert find("sweep", "dpo").path == shipped("experiments/sweeps/dpo.yaml")
    assert find("config", "dpo").path == shipped("experiments/dpo.yaml")
    for name in ("experiments/zero.yaml", "zero.yaml"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("")
        found = find("recipe", "zero")
        assert (str(found.path), found.note) == (name, f"recipe: ./{name}")
    (here / "mine").write_text("")
    assert find("sweep", "mine").note == "sweep: ./mine"
    assert find("recipe", "other/mine.yml").note is None


def test_a_name_that_is_nothing_is_answered_with_the_names() -> None:
    with pytest.raises(UserError, match="did you mean zero.* the recipes are corpus, full, lora, quickstart, zero$"):
        find("recipe", "zeroo")
    with pytest.raises(UserError, match=r"it is a config \(minimind-ray train sft --config sft\); the recipes are"):
        find("recipe", "sft")
    with pytest.raises(UserError, match="there is no such file; zero comes with minimind-ray: minimind-ray run zero"):
        find("recipe", "experiments/zero.yaml")


def test_the_list_has_a_line_for_each(command: Command) -> None:
    said = command("recipes").out
    assert all(f"  {each.name} " in said and each.about in said for each in experiments())
    assert all(each.about for each in experiments()) and len(experiments()) == 12


def test_commands_without_a_stage_or_a_recipe_list_them(command: Command) -> None:
    for name in ("train", "tune"):
        said = command(name)
        assert said.code == 2 and "  dpo       a model that answers learns" in said.err and said.out == ""
    said = command("run")
    assert said.code == 2 and "  zero " in said.err
    assert "--sweep" not in command("tune", "--sweep", "nosuch").err


def test_runs_says_how_to_make_one(command: Command) -> None:
    said = command("runs")
    assert said.code == 0 and "no runs under runs; make one with minimind-ray demo" in said.out
    assert command("runs", "--json").out == "[]\n"
    assert command("runs", "elsewhere").code == 1


def test_version_names_what_a_report_of_a_fault_needs(command: Command) -> None:
    said = command("--version")
    assert said.code == 0 and said.out.startswith("minimind-ray 0.1.0\nPython 3.")
    assert "torch 2." in said.out and "Ray 2." in said.out and "device: " in said.out


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("minimind-ray tr", "train"),
        ("minimind-ray data p", "prepare"),
        ("minimind-ray train d", "dpo"),
        ("minimind-ray run z", "zero"),
        ("minimind-ray tune dpo --bet", "--beta"),
        ("minimind-ray init --cloud k", "kubernetes"),
    ],
)
def test_bash_completes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, completed: str
) -> None:
    monkeypatch.setenv("_MINIMIND_RAY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit):
        app(prog_name="minimind-ray")
    assert capsys.readouterr().out.split() == [completed]
