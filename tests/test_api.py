"""The Python interface: `from minimind_ray import train, tune, load, compare`."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.model.sampling import Sampling
from tests.jobs import make_config, make_tokenizer, rows_of, write_jsonl

ROOT = Path(__file__).parents[1]


def small(directory: Path, stage: str = "pretrain") -> dict[str, Any]:
    """Settings of a run of 3 steps, by the names of the command's options."""
    make_config(directory, stage, rows=100)
    return {
        "train": directory / f"{stage}.jsonl", "tokenizer": directory / "tokenizer", "cache_dir": directory / "cache",
        "max_seq_len": 64, "pack_tokens": 256, "batch_tokens": 512, "max_steps": 3, "precision": "float32",
        "wandb": "off", "progress": False,
    }  # fmt: skip


@pytest.mark.unit
def test_importing_it_is_cheap_and_its_functions_are_there() -> None:
    program = (
        "import sys; from minimind_ray import compare, load, train, tune; import minimind_ray; "
        "assert minimind_ray.train is train and callable(train) and callable(tune); "
        "import minimind_ray.train.schedule, pickle; assert pickle.loads(pickle.dumps(train)) is train; "
        "from minimind_ray import train as again; assert again is train; "
        "print(*sorted({'ray', 'torch', 'pyarrow', 'rich', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.slow
def test_train_load_and_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from minimind_ray import load, train

    settings = small(tmp_path)
    config = {"data": {"val_fraction": 0.1}, "eval": {"samples": 0}, "model": {"num_hidden_layers": 1}}
    run = train("pretrain", config=config, preset="tiny", out=tmp_path / "run", ray=False, **settings)
    assert capsys.readouterr().out == ""
    assert [line["step"] for line in run.metrics] == [1, 2, 3] and run.state == "finished"
    assert repr(run).startswith(f"Run('{tmp_path}/run': finished, step 3, loss ") and "val/loss" in repr(run)
    assert run.checkpoint.name == "step-00000003"
    texts = run.load().generate(["The fox", "月"], max_new_tokens=4, temperature=0)
    assert len(texts) == 2 and run.load().generate("The fox", max_new_tokens=4, temperature=0) == texts[:1]
    assert isinstance(load(run.path).answer("Who?", max_new_tokens=4), str)
    with pytest.raises(UserError, match="top_q: no such setting of sampling; valid: temperature, top_p"):
        run.load().generate("The fox", top_q=1)
    with pytest.raises(UserError, match="batch_size is 0: give at least 1"):
        run.load().generate("The fox", batch_size=0)
    with pytest.raises(UserError, match="holds a run already|exists already|choose another"):
        train("pretrain", config=config, preset="tiny", out=tmp_path / "run", ray=False, **settings)


@pytest.mark.unit
def test_wrong_settings_are_told_as_the_command_tells_them(tmp_path: Path) -> None:
    from minimind_ray import compare, load, train, tune

    with pytest.raises(UserError, match="learning_rate: no such setting; did you mean"):
        train("pretrain", learning_rate=1)
    with pytest.raises(UserError, match="trials: no such setting"):
        train("pretrain", trials=1)
    with pytest.raises(UserError, match=r"optim.lr \(from the arguments\): input should be a valid number, not 'x'"):
        train("pretrain", lr="x")
    with pytest.raises(UserError, match=r"optim.lrr \(from config\): no such setting; did you mean optim.lr"):
        train("pretrain", config={"optim": {"lrr": 1}})
    with pytest.raises(UserError, match="track.wandb .*input should be 'auto'"):
        train("pretrain", wandb=False)
    with pytest.raises(UserError, match="no stage given"):
        tune()
    with pytest.raises(UserError, match="optim.lr: given as an axis twice"):
        tune("sft", lr=[1, 2], axes={"optim.lr": [1, 2]})
    with pytest.raises(UserError, match="leave --lr out"):
        tune(out=tmp_path / "sweep", resume=True, lr=1e-3, seeds=3)
    with pytest.raises(UserError, match="is not a model"):
        load(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        compare(tmp_path)
    with pytest.raises(UserError, match="compare needs a sweep"):
        compare()


@pytest.mark.unit
def test_values_of_a_wrong_kind_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_ray import load, train, tune
    from minimind_ray.api import Model, Run

    wrong: Any = ["pretrain"]
    with pytest.raises(UserError, match=r"stage is \['pretrain'\]: give the name of one stage"):
        train(wrong)
    for config in (5, [5]):
        wrong = config
        with pytest.raises(
            UserError, match=r"config is .*5.*: give a mapping of settings, or the paths or names of YAML files"
        ):
            train("pretrain", config=wrong)
    with pytest.raises(UserError, match="nosuch: there is no file nosuch or nosuch.yaml here, and no config"):
        train("pretrain", config="nosuch")
    wrong = ["optim.lr"]
    with pytest.raises(UserError, match="axes is .*: give a mapping"):
        tune("sft", axes=wrong)
    wrong = None
    with pytest.raises(UserError, match="path is None: give the path of a run"):
        load(wrong)
    wrong = SimpleNamespace(continues_texts=True, sampling=lambda given, seed: Sampling(**given))
    with pytest.raises(UserError, match="temperature is 'hot': give a number"):
        Model(wrong).generate("x", temperature="hot")
    with pytest.raises(UserError, match="seed is 'x': give a whole number"):
        Model(wrong).generate("x", seed="x")
    run = Run(str(tmp_path / "nix"))
    with pytest.raises(UserError, match="nix holds no run"):
        _ = run.metrics
    assert run.state is None and repr(run).endswith("nix': not begun)")


def _example(readme: str) -> str:
    text = (ROOT / readme).read_text(encoding="utf-8")
    block = re.search(r"^    from minimind_ray import .*?(?=\n\n\S)", text, re.DOTALL | re.MULTILINE)
    assert block
    return textwrap.dedent(block[0])


@pytest.mark.ray
def test_the_example_of_the_readme(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minimind_ray import compare

    example, chinese = map(_example, ("README.md", "README_zh.md"))
    assert example == chinese
    monkeypatch.chdir(tmp_path)
    make_tokenizer(tmp_path / "tokenizer")
    for stage in ("pretrain", "sft"):
        write_jsonl(tmp_path / "data" / stage / "rows.jsonl", rows_of(stage, 600))
    names: dict[str, Any] = {}
    exec(example.replace("max_steps=500", "max_steps=3").replace("max_steps=100", "max_steps=1"), names)
    run, sweep = names["run"], names["sweep"]
    assert f"Run('{run.path}': finished, step 3" in capsys.readouterr().out
    assert sweep.ending == "by itself" and sweep.winner and sweep.winner.state == "finished"
    table = compare(sweep, sweep.path)
    assert repr(table) == repr(sweep.table) and "verdict" in repr(table) and repr(sweep).startswith("Sweep(")
    assert [row["verdict"] for row in table.rows][0] == "best" and len(table.rows) == 2
