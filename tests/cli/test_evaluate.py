"""eval: the numbers that training's validation gives, and what it says of preference data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from minimind_ray.config.schema import DataConfig
from minimind_ray.data.encode import RowEncoder
from minimind_ray.data.records import discover, read_rows
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import load_model
from minimind_ray.train.intervals import wilson
from tests.cli.conftest import Command, Models

pytestmark = pytest.mark.slow


@pytest.fixture
def evaluate(command: Command, rows: Path, tmp_path: Path):
    def call(model: object, stage: str, *args: object, file: str | None = None) -> dict[str, Any]:
        settings = ["--max-seq-len", 96, "--pack-tokens", 256, "--set", f"data.cache_dir={tmp_path / 'cache'}"]
        path = rows / f"{file or stage}.jsonl"
        outcome = command("eval", model, path, "--stage", stage, *settings, "--precision", "float32", "--json", *args)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return call


def log_probs(directory: Path, stage: str, path: Path) -> list[list[float]]:
    """Of every document of each row: the summed log-probability of what counts, document by document."""
    model, tokenizer = load_model(directory).eval(), Tokenizer.load(directory)
    config = DataConfig(max_seq_len=96, pack_tokens=256)
    sums: list[list[float]] = []
    for group in RowEncoder(stage, tokenizer, config).encode(r for s in discover(str(path)) for r in read_rows(s)):
        of_group = []
        for document in group:
            tokens_N = torch.from_numpy(document.tokens).long()
            with torch.no_grad():
                hidden_NC = model(tokens_N[:-1], torch.tensor([0, len(tokens_N) - 1], dtype=torch.int32))
                logp_N = model.project(hidden_NC).log_softmax(-1)[range(len(tokens_N) - 1), tokens_N[1:]]
            of_group.append(float((logp_N * torch.from_numpy(document.weights[1:])).sum()))
        sums.append(of_group)
    return sums


def test_loss_perplexity_and_bits_per_byte(evaluate, models: Models, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "examples.parquet"
    found = evaluate(models.run, "pretrain", "--out", out)
    expected = -sum(sum(group) for group in log_probs(models.base, "pretrain", rows / "pretrain.jsonl"))
    assert found["loss"] == pytest.approx(expected / found["tokens"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-9)
    size = sum(len(json.loads(line)["text"].encode()) for line in (rows / "pretrain.jsonl").open(encoding="utf-8"))
    assert found["bits_per_byte"] == pytest.approx(expected / math.log(2) / size, rel=1e-5)

    table = pq.read_table(out)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    assert columns["example"].dtype == np.int64 and len(np.unique(columns["example"])) == 40 == found["examples"]
    assert columns["loss"].dtype == columns["count"].dtype == np.float64
    assert columns["loss"].sum() / columns["count"].sum() == pytest.approx(found["loss"])


def test_as_many_tokens_as_training_validates_on(evaluate, models: Models) -> None:
    whole, part = (evaluate(models.base, "sft", *more) for more in ((), ("--set", "eval.max_tokens=1")))
    assert 0 < part["tokens"] < whole["tokens"]
    pairs = [evaluate(models.base, "dpo", *more) for more in ((), ("--set", "eval.max_tokens=1"))]
    assert 0 < pairs[1]["examples"] < pairs[0]["examples"] == 40


def test_an_adapter_is_measured_on_its_base(evaluate, models: Models) -> None:
    adapted, base = evaluate(models.adapter, "sft"), evaluate(models.base, "sft")
    assert adapted["tokens"] == base["tokens"] and adapted["loss"] != base["loss"]
    assert evaluate(models.base, "lora", "--adapter", models.adapter, file="sft")["loss"] == adapted["loss"]


def test_preference_by_log_probability_and_by_reward(evaluate, models: Models, rows: Path, tmp_path: Path) -> None:
    pairs = np.array(log_probs(models.base, "dpo", rows / "dpo.jsonl"))
    reference = np.array(log_probs(models.other, "dpo", rows / "dpo.jsonl"))

    plain = evaluate(models.base, "dpo", "--out", tmp_path / "plain.parquet")
    accuracy = float((pairs[:, 0] > pairs[:, 1]).mean())
    assert 0 < accuracy < 1 and plain["log_probability_accuracy"] == accuracy
    assert plain["log_probability_accuracy_95_wilson"] == pytest.approx(wilson(accuracy, 40))
    assert "reward_accuracy" not in plain and "loss" not in plain

    rewarded = evaluate(models.base, "dpo", "--reference", models.other, "--out", tmp_path / "reward.parquet")
    margins = 0.1 * ((pairs - reference)[:, 0] - (pairs - reference)[:, 1])
    assert rewarded["reward_accuracy"] == float((margins > 0).mean())
    assert rewarded["margin"] == pytest.approx(margins.mean(), rel=1e-4)
    assert rewarded["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)
    table = pq.read_table(tmp_path / "reward.parquet")
    assert {"example", "loss", "count", "margin", "accuracy"} <= set(table.column_names)
    assert sorted(table["margin"].to_numpy()) == pytest.approx(sorted(margins), rel=1e-3, abs=1e-5)
    assert table["accuracy"].to_numpy().mean() == rewarded["reward_accuracy"]
    # The examples have the same ids with and without a reference: two results can be compared pair by pair.
    assert table["example"].equals(pq.read_table(tmp_path / "plain.parquet")["example"])

    itself = evaluate(models.base, "dpo", "--reference", models.run)
    assert itself["loss"] == pytest.approx(math.log(2), abs=1e-6) and itself["margin"] == pytest.approx(0, abs=1e-5)


def test_pairs_that_share_a_prompt_are_one_cluster(evaluate, models: Models, rows: Path) -> None:
    lines = (rows / "dpo.jsonl").read_text(encoding="utf-8").splitlines()
    (rows / "thrice.jsonl").write_text("\n".join(line for line in lines for _ in range(3)), encoding="utf-8")
    once, thrice = evaluate(models.base, "dpo"), evaluate(models.base, "dpo", file="thrice")
    assert (thrice["examples"], thrice["prompts"]) == (120, 40) and "prompts" not in once
    name = "log_probability_accuracy_95_wilson"
    assert thrice[name] == pytest.approx(once[name], abs=5e-3)


def test_wilson() -> None:
    # Worked out by hand: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    assert wilson(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx([0.7225, 1.0], abs=1e-4)


BAD = [
    (["/nowhere", "{rows}/sft.jsonl", "--stage", "sft"], "/nowhere is not a model"),
    (["{base}", "/nowhere.jsonl", "--stage", "sft"], "/nowhere.jsonl: no such file"),
    (["{base}", "{rows}/sft.jsonl", "--stage", "dpo"], "chosen is missing, but conversations is there"),
    (["{base}", "{rows}/sft.jsonl", "--stage", "chat"], "stage: input should be"),
    (["{base}", "{rows}/sft.jsonl", "--stage", "sft", "--reference", "{other}"],
     "stage sft has no reference model: leave --reference out"),
    (["{base}", "{rows}/dpo.jsonl", "--stage", "dpo", "--reference", "{adapter}"], "is an adapter, not a whole model"),
    (["{base}", "{rows}/dpo.jsonl", "--stage", "dpo", "--reference", "{other}", "--set", "dpo.loss=simpo"],
     "dpo.loss simpo has no reference model"),
    (["{base}", "{rows}/sft.jsonl", "--stage", "sft", "--out", "{rows}"], "is a directory: name a file in it"),
    (["{other}", "{rows}/sft.jsonl", "--stage", "sft", "--adapter", "{adapter}"], "not on this model"),
]  # fmt: skip


@pytest.mark.parametrize("args, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_sentence(
    command: Command, models: Models, rows: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    places = {**vars(models), "rows": rows}
    cache = ["--set", f"data.cache_dir={tmp_path}"]
    outcome = command("eval", *(arg.format_map(places) for arg in args), *cache)
    assert outcome.code == 1 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert message in outcome.err


LOCAL = Path(__file__).parents[1] / "tasks" / "local"


def test_tasks_as_json_and_their_items(command: Command, models: Models, tmp_path: Path) -> None:
    out = tmp_path / "new" / "items.parquet"
    names = "my_choice,my_texts,mm_demo"
    options = ["--task-path", LOCAL, "--limit", 6, "--num-fewshot", 1, "--out", out]
    outcome = command("eval", models.run, "--tasks", names, *options, "--precision", "float32", "--json")
    assert outcome.code == 0, outcome.err
    scores = {(score["task"], score["metric"]): score for score in json.loads(outcome.out)["tasks"]}
    assert [key for key in scores] == [
        ("my_choice", "acc"), ("my_choice", "acc_norm"), ("my_texts", "bits_per_byte"), ("my_texts", "word_perplexity"),
        ("mm_demo", "acc"), ("mm_demo", "acc_norm"),
    ]  # fmt: skip
    choice = scores["my_choice", "acc"]
    assert (choice["items"], choice["chance"]) == (6, 0.25)
    assert choice["low"] < choice["value"] < choice["high"]
    assert choice["verdict"] == ("not distinguishable from chance" if choice["low"] <= 0.25 else "")
    table = pq.read_table(out)
    assert table.num_rows == 5 * 6
    values = table.filter(pc.field("task") == "my_texts")
    ratio = sum(values["value"].to_pylist()) / sum(values["weight"].to_pylist())
    assert scores["my_texts", "bits_per_byte"]["value"] == pytest.approx(ratio)
    texts = [json.loads(line)["text"] for line in (LOCAL / "data" / "texts.jsonl").read_text("utf-8").splitlines()]
    assert values["weight"].to_pylist() == [len(text.encode()) for text in texts[:6]]


def test_a_table_of_tasks_with_an_adapter(command: Command, models: Models) -> None:
    shown = [
        command("eval", models.base, "--tasks", "my_letters", "--task-path", LOCAL, *more).out
        for more in ([], ["--adapter", models.adapter])
    ]
    assert shown[0].splitlines()[0].split() == ["task", "metric", "value", "95", "%", "interval", "items", "chance"]
    assert shown[0] != shown[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "eval needs files and their --stage, or --tasks"),
        (["{rows}/sft.jsonl", "--stage", "sft", "--limit", "3"], "belong to benchmarks: give --tasks, too"),
        (["--tasks", "mm_demo", "--stage", "sft"], "--tasks needs no files and none of their settings"),
        (["--tasks", "mm_demo", "--pack-tokens", "64"], "--tasks needs no files and none of their settings"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "mm_demo", "--task-path", "{rows}"], "has no .yaml file with a task"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_benchmarks_is_named(
    command: Command, models: Models, rows: Path, args: list[str], message: str
) -> None:
    outcome = command("eval", models.base, *(str(arg).format(rows=rows) for arg in args))
    assert outcome.code == 1
    assert message in outcome.err


def test_without_lm_eval_the_command_says_what_to_install(
    command: Command, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind_ray.tasks.extra.find_spec", lambda name: None)
    assert "pip install 'minimind-ray[eval]'" in command("eval", models.base, "--tasks", "mm_demo").err
