"""Every part of tests/bench at its smallest size: it runs, and its report and tables hold positive numbers.

How fast anything is, is not tested.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench import soak
from tests.bench.__main__ import main, parse
from tests.jobs import make_tokenizer, rows_of, write_jsonl

ROOT = Path(__file__).parents[1]
SMALLEST_TRAINING = "training --models tiny --eager --rows 64 --rounds 1 --seconds 0.1 --warm-up 0 --probe-seconds 0.01"
# As MiniMind's scripts print; started in the folder trainer/ of its checkout.
SCRIPT = """
import itertools
for step in itertools.count(1):
    print(f"Epoch:[1/1000]({step}/1000000), loss: 6.0", flush=True)
"""

Bench = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up rows in a folder for each stage, and a tokenizer."""
    directory = tmp_path_factory.mktemp("bench")
    for stage in ("pretrain", "sft", "dpo"):
        write_jsonl(directory / "corpus" / stage / "train.jsonl", rows_of(stage, 250))
    make_tokenizer(directory / "tokenizer")
    return directory


@pytest.fixture(scope="module")
def bench(data: Path) -> Bench:
    """Run the command with these words; its report, which all tests add to, so that the limits are measured once."""

    def run(words: str) -> dict[str, Any]:
        report = data / "bench.json"
        common = ["--corpus", data / "corpus", "--tokenizer", data / "tokenizer", "--report", report, "--cpus", 1]
        main([*words.split(), *map(str, common)])
        return json.loads(report.read_text())

    return run


@pytest.fixture
def ray_address(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the benchmarks start use the session's Ray."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


def numbers(value: Any) -> Iterator[float]:
    """All numbers of a report's part."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, int | float):
        yield value


def all_positive(value: Any) -> bool:
    found = list(numbers(value))
    return bool(found) and all(math.isfinite(number) and number > 0 for number in found)


def table_rows(output: str) -> list[list[str]]:
    """The cells of the Markdown table that is printed, without its head."""
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.unit
def test_commands_in_the_documents_are_ones_it_takes() -> None:
    texts = [file.read_text(encoding="utf-8") for file in [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")]]
    found = [match for text in texts for match in re.findall(r'make bench ARGS=("[^"]+"|\w+)', text)]
    assert len(found) >= 7
    for words in found:
        assert parse(shlex.split(words.strip('"'))).parts


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trainig", "no such part: trainig"),
        ("--stages sft,ppo", "no ppo; there are pretrain, sft, lora, dpo"),
        ("--sides minimind", "with --minimind or MINIMIND_REPO"),
    ],
)
def test_bad_options_are_named(
    words: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINIMIND_REPO", raising=False)
    with pytest.raises(SystemExit, match="2"):
        parse(words.split())
    assert message in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.slow
def test_training_of_every_stage(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(f"{SMALLEST_TRAINING} --sides ours")
    assert all_positive({key: value for key, value in report["limits"].items() if key != "device"})
    rows = table_rows(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["tiny", stage] for stage in ("pretrain", "sft", "lora", "dpo")]
    for stage in ("pretrain", "sft", "lora", "dpo"):
        cell = report["training"][f"tiny/{stage}"]
        (turn,) = cell["sides"]["ours"]
        assert turn.pop("gpu_memory_bytes") >= 0
        assert all_positive(cell)


@pytest.mark.long
@pytest.mark.slow
def test_training_beside_the_others(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "minimind" / "trainer" / "train_pretrain.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT)
    sides = ["minimind", "trl"] if importlib.util.find_spec("trl") else ["minimind"]
    report = bench(
        f"{SMALLEST_TRAINING} --stages pretrain --sides {','.join(sides)} --minimind {tmp_path / 'minimind'}"
    )
    cell = report["training"]["tiny/pretrain"]
    assert list(cell["sides"]) == sides
    for (turn,) in cell["sides"].values():
        assert turn["tokens_per_second"] > 0
    row = table_rows(capsys.readouterr().out)[0]
    assert float(row[3].replace(",", "")) > 0


@pytest.mark.long
@pytest.mark.slow
def test_fused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    words = "fused --presets tiny --tokens 256 --together 2 --trial-steps 2 --separate 1 --places 1"
    hourly = bench(words)["fused"]["tiny/256"]
    assert list(hourly) == ["one after another", "side by side", "2 together"]
    assert all_positive(hourly)
    output = capsys.readouterr().out
    assert all(re.search(rf"^ +{way} +[\d,]+ ", output, re.MULTILINE) for way in hourly)


@pytest.mark.long
@pytest.mark.slow
def test_checkpoint(bench: Bench) -> None:
    found = bench("checkpoint --checkpoint-preset tiny --checkpoints 1")["checkpoint"]["seconds"]
    assert all_positive([found["bytes"], found["step"]])
    # Differences of times, so not always positive in so short a run.
    assert math.isfinite(found["pause"]) and math.isfinite(found["until it is there"])


@pytest.mark.long
@pytest.mark.slow
def test_tasks(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench("tasks --task-models tiny --task-items 4 --task-batch 2 --rounds 1")["tasks"]
    assert list(found) == [f"tiny {kind}" for kind in ("choices", "letters", "texts", "answers")]
    assert all(list(each["ratio"]) == ["hf", "hf in batches of 2"] for each in found.values())
    assert all(seconds > 0 for each in found.values() for seconds in each["seconds"].values())
    assert "tiny letters: 4 items, ours" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.slow
def test_coverage(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench("coverage --sweeps 2 --draws 50")["coverage"]["sweeps"]
    assert all(list(kind) == ["before", "after"] for kind in found.values())
    assert len(table_rows(capsys.readouterr().out)) == 2 * len(found)


@pytest.mark.long
@pytest.mark.slow
def test_growth(bench: Bench, tmp_path: Path) -> None:
    points = "--workers 2 --worker-steps 1 --lengths 128,256 --packs 512,1024 --point-seconds 0"
    report = bench(f"growth --growth-model tiny {points} --plots {tmp_path}")["growth"]
    measured = report["measured"]
    workers = measured["workers"]["2"]
    assert workers["tokens_per_second"] > 0
    assert 0 < workers["communication"] < 1 and 0 < workers["idle"] < 1
    assert all_positive([measured["length"], measured["pack_tokens"], report["modelled"]["step_seconds"]])
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["growth-measured.png", "growth-modelled.png"]


@pytest.mark.long
@pytest.mark.ray
def test_data(bench: Bench, ray_address: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench("data --megabytes 1")["data"]["1 MB"]
    assert list(found) == ["tokenizers", "process", "ray"]
    for mode in found.values():
        assert math.isfinite(mode.pop("grew"))
        assert all_positive(mode)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows if row[0] == "1"] == ["tokenizers", "process", "ray"]


@pytest.mark.long
@pytest.mark.ray
def test_ray_beside_a_plain_process(bench: Bench, ray_address: None) -> None:
    medians = bench("ray --preset tiny --steps 3 --rounds 1")["ray"]["1 threads"]
    assert list(medians) == ["--no-ray", "--ray"]
    assert all_positive(medians)


@pytest.mark.long
@pytest.mark.ray
def test_sweep(bench: Bench, ray_address: None) -> None:
    found = bench("sweep --pairs 20 --betas 0.1 --seeds 1")["sweep"]["seconds"]
    assert list(found) == ["sweep", "steps of trials", "1 x train dpo --ray", "1 x train dpo --no-ray"]
    assert all_positive(found)


@pytest.mark.long
@pytest.mark.cluster
def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    soak.main(["--rows=200", "--steps=20", "--kills=1", "--quiet-seeds=2", "--between", "1", "2"])
    output = capsys.readouterr().out
    assert "0 workers and 1 nodes killed" in output
    assert "metrics    each step once" in output
    assert "exactly once an epoch, up to step 20" in output
    (losses,) = re.findall(r"^loss +([\d.]+), twin ([\d.]+), between seeds ([\d.]+)", output, re.MULTILINE)
    assert all(float(loss) > 0 for loss in losses)
