"""The Python interface, for notebooks and scripts: `from minimind_ray import train, tune, load, compare`.

    run = train("pretrain", train="data/pretrain", tokenizer="tokenizer", preset="tiny", max_steps=100)
    run.metrics[-1]["loss"]
    run.load().generate("Once upon a time")

Each function does the same as the command of the same name. Settings have the names of the command's options (`lr`,
`max_steps`), or are given by config key in `config` (`{"optim": {"clip": 0.5}}`). Errors that the user can correct
raise `UserError`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind_ray.config.errors import UserError
from minimind_ray.config.flags import config_flags, overrides_of
from minimind_ray.config.load import load_config
from minimind_ray.config.schema import GenerationConfig
from minimind_ray.config.search import SearchConfig
from minimind_ray.config.shipped import find
from minimind_ray.train.run import RunDirectory, resolve_model

if TYPE_CHECKING:
    from rich.console import Console

    from minimind_ray.stages.run import Job
    from minimind_ray.stages.use import Trained

Configs = Mapping[str, Any] | str | Path | Sequence[str | Path]
"""Settings as in a YAML file, or the paths of YAML files. Later files override earlier ones."""


@dataclass(frozen=True)
class Run:
    """A run in a directory or at a URL. Every property reads the run's files again."""

    path: str

    @property
    def state(self) -> str | None:
        """The run's state, None if the run has not begun: running, finished, stopped, failed, "early-stopped" (its
        sweep's scheduler ended it), or "stopped (its process is gone)".
        """
        return RunDirectory(self.path).state()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: a dictionary for each step, with `val/loss` and others after a validation.

        Raises:
            UserError: there is no run.
        """
        run = RunDirectory(self.path)
        if not run.file("config.yaml").exists():
            raise UserError(f"{run.where} holds no run: give the directory of a run")
        run.file("metrics.jsonl")
        return list(run.metrics())

    @property
    def checkpoint(self) -> Path:
        """The directory of the run's model or adapter: the best checkpoint, or the last if no best is known yet.

        Raises:
            UserError: there is no checkpoint.
        """
        return resolve_model(self.path)

    def load(self, **options: Any) -> Model:
        """Return the run's model; see `load`."""
        return load(self.path, **options)

    def __repr__(self) -> str:
        state = self.state
        lines = self.metrics if state else []
        known = {name: line[name] for line in lines for name in ("step", "loss", "val/loss") if name in line}
        facts = "".join(f", {name} {value:.6g}" for name, value in known.items())
        return f"Run({self.path!r}: {state or 'not begun'}{facts})"


@dataclass(frozen=True)
class Model:
    """A trained model ready for use."""

    trained: Trained

    def answer(self, text: str, *, system: str | None = None, **sampling: Any) -> str:
        """Return the answer to a user's turn. For `sampling` see `generate`."""
        return self.generate([text], system=system, chat=True, **sampling)[0]

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        chat: bool | None = None,
        system: str | None = None,
        batch_size: int = 32,
        **sampling: Any,
    ) -> list[str]:
        """Return the model's answer to each prompt, or its continuation of each prompt.

        If `chat` is true, a prompt is a user's turn, which the model answers. If it is false, a prompt is a text, which
        the model continues. By default, it is false for the model of a pretraining run, and true for other models.
        `sampling` has fields of `Sampling`: temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed. Their
        defaults are those of the command: as the model's generation_config.json says, else temperature 0.8, top_p 0.95,
        top_k 0, repetition_penalty 1, max_new_tokens 256; seed 0.

        Raises:
            UserError: a prompt leaves no room for an answer, or a value cannot be used.
        """
        from minimind_ray.stages.prompts import answers

        raw = self.trained.continues_texts if chat is None else not chat
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if unknown := sampling.keys() - {*SAMPLING}:
            raise UserError(f"{min(unknown)}: no such setting of sampling; valid: {', '.join(SAMPLING)}")
        seed = sampling.pop("seed", 0)
        _require("seed", seed, int, "a whole number")
        settings = self.trained.sampling(sampling, seed=(seed,))
        answered = answers(self.trained, texts, settings, batch_size, raw=raw, system=system)
        return [answer.text for answer in answered]

    def __repr__(self) -> str:
        return f"Model({str(self.trained.directory)!r}, stage {self.trained.stage})"


SAMPLING = (*GenerationConfig.model_fields, "seed")


@dataclass(frozen=True)
class Table:
    """The points of one or more sweeps, best first. Its `repr` is the table that the command prints.

    `rows` has a dictionary for each point: its settings, the metric with its 95 % interval, the difference to the best
    point, and the verdict. `winner` is the run with the best metric among the runs of the best point; None if no run
    was validated.
    """

    rows: list[dict[str, Any]]
    winner: Run | None
    text: str = field(repr=False)

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Sweep:
    """A sweep in a directory or at a URL. `ending` says how it ended: by itself, out of time, or interrupted."""

    path: str
    ending: str

    @property
    def table(self) -> Table:
        """The comparison of the sweep's points."""
        return compare(self)

    @property
    def winner(self) -> Run | None:
        """The best run of the best point; None if no run was validated."""
        return self.table.winner

    def __repr__(self) -> str:
        return f"Sweep({self.path!r}, ended {self.ending})\n{self.table}"


def train(
    stage: str,
    *,
    config: Configs | None = None,
    resume: bool = False,
    ray: bool = True,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Train one stage, as `minimind-ray train` does. With `ray=False`, train in this process.

    Ctrl-C stops the run after the current step, with a checkpoint. In a thread of your own with `ray=False`, signals
    keep their usual effect instead.

    Raises:
        UserError: the command would fail with the same message.
    """
    from minimind_ray.on_ray.host import train_stage

    _require("stage", stage, str, "the name of one stage, such as 'sft'")
    files, trees = _configs(config)
    resolved = load_config(
        stage, files, overrides_of(_known(settings, config_flags())), trees, overrides_from="the arguments"
    )
    console = _console(progress)
    run = train_stage(resolved, resume=resume, ray=ray, say=_say(console), watch=partial(_watch, console=console))
    return Run(run.where)


def tune(
    stage: str | None = None,
    *,
    sweep: str | Path | None = None,
    config: Configs | None = None,
    axes: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    gpus_per_trial: float | None = None,
    progress: bool = True,
    **settings: Any,
) -> Sweep:
    """Sweep over settings of one stage, as `minimind-ray tune` does.

    A list of values such as `beta=[0.05, 0.1]`, or a text such as "log(1e-6,1e-4)", makes a setting an axis. `axes` has
    axes by config key, such as `{"optim.weight_decay": [0, 0.1]}`. The command's options for the search, such as
    `seeds`, `scheduler` and `trials`, are settings, too. `resume` continues the sweep in `out`. With more `seeds` than
    before, it adds seeds to all points, or to the points that `points` names, such as "best,second".

    Raises:
        UserError: the command would fail with the same message.
    """
    from minimind_ray.data.storage import url_of
    from minimind_ray.display.board import Board
    from minimind_ray.sweep.axes import parse_axis
    from minimind_ray.sweep.compare import compare as compare_sweeps
    from minimind_ray.sweep.plan import check_free
    from minimind_ray.sweep.publish import INTERRUPTED_SECONDS, SECONDS, publish
    from minimind_ray.sweep.report import write_report
    from minimind_ray.sweep.request import SweepRequest, settings_and_axes
    from minimind_ray.sweep.resume import resumed_plan
    from minimind_ray.sweep.run import sweep_on_ray
    from minimind_ray.sweep.trials import read_sweep

    _require("axes", axes or {}, Mapping, "a mapping, such as {'optim.weight_decay': [0, 0.1]}")
    if resume:
        if out is None:
            raise UserError("resume continues a sweep: name its directory with out")
        fixed = {"stage": stage, "sweep": sweep, "config": config, "axes": axes, "gpus_per_trial": gpus_per_trial}
        plan = resumed_plan(out, {name: v for name, v in {**fixed, **settings}.items() if v is not None})
    else:
        given = _known(settings, [*config_flags(), *SearchConfig.model_fields])
        search = {name: value for name, value in given.items() if name in SearchConfig.model_fields}
        values, varied = settings_and_axes(given)
        files, trees = _configs(config)
        plan = SweepRequest(
            stage=stage, file=find("sweep", sweep).path if sweep else None, config=files, trees=trees, settings=values,
            search=search,
            axes=[*varied, *(parse_axis(key, spec) for key, spec in (axes or {}).items())],
            out=None if out is None else str(out), gpus_per_trial=gpus_per_trial,
        ).plan()  # fmt: skip
        check_free(plan.path)
    console = _console(progress)
    ending = sweep_on_ray(plan, resume=resume, say=_say(console), board=Board(plan, console))
    if any(plan.path.glob("trials/*/")):  # With optuna, a sweep may end before its first trial.
        found, seconds = read_sweep(plan.path), INTERRUPTED_SECONDS if ending == "interrupted" else SECONDS
        comparison = compare_sweeps([found])
        write_report(found, comparison)
        publish(found, comparison, seconds=seconds, ending=ending)
    return Sweep(url_of(plan.path), ending)


def load(path: str | Path, adapter: str | Path | None = None, *, precision: str = "auto") -> Model:
    """Load the model of a run, a model directory or an adapter. `adapter` is an adapter to apply to the model.

    Raises:
        UserError: there is no model at `path`, the model is broken, the adapter belongs to another model, or there is
            no such `precision` (auto, bfloat16, float32).
    """
    from minimind_ray.stages.use import open_trained

    _require("path", path, str | Path, "the path of a run, a model directory or an adapter")
    return Model(open_trained(path, adapter=adapter, precision=precision))


def compare(
    *sweeps: Sweep | str | Path, metric: str | None = None, mode: str | None = None, margin: float | None = None
) -> Table:
    """Compare the points of sweeps, as `minimind-ray compare` does with the options of the same names.

    Raises:
        UserError: a path is not a sweep, an option is wrong, or the sweeps cannot be compared.
    """
    from minimind_ray.display.comparison import print_comparison
    from minimind_ray.sweep.compare import compare as compare_sweeps
    from minimind_ray.sweep.export import to_records
    from minimind_ray.sweep.trials import read_sweeps

    if not sweeps:
        raise UserError("compare needs a sweep: give sweeps or their directories")
    paths = [sweep.path if isinstance(sweep, Sweep) else sweep for sweep in sweeps]
    comparison = compare_sweeps(read_sweeps(paths), metric=metric, mode=mode, margin=margin)
    text = io.StringIO()
    print_comparison(comparison, text)
    winner = Run(str(comparison.winner.path)) if comparison.winner else None
    return Table(to_records(comparison), winner, text.getvalue())


def _configs(config: Configs | None) -> tuple[list[str | Path], dict[str, Mapping[str, Any]]]:
    """Return the arguments `files` and `trees` of `load_config`. Raises UserError if `config` is neither."""
    if config is None:
        return [], {}
    if isinstance(config, Mapping):
        return [], {"config": config}
    files = [config] if isinstance(config, str | Path) else config
    wanted = "a mapping of settings, or the paths or names of YAML files"
    _require("config", files, list | tuple, wanted)
    for file in files:
        _require("config", file, str | Path, wanted)
    return [find("config", file).path for file in files], {}


def _require(name: str, value: Any, kinds: Any, wanted: str) -> None:
    """Raise UserError if the argument `name` has a value of another kind. Notebooks are not type-checked."""
    if not isinstance(value, kinds):
        raise UserError(f"{name} is {value!r}: give {wanted}")


def _known(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the given settings (not None), with paths as texts.

    Raises:
        UserError: a setting's name is not among `names`.
    """
    for name in settings:
        if name not in (valid := list(names)):
            near = get_close_matches(name, valid, 1, 0.0)[0]
            raise UserError(f"{name}: no such setting; did you mean {near}? Give other config keys in config")
    return {name: _text(value) for name, value in settings.items() if value is not None}


def _text(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_text(each) for each in value] if isinstance(value, list | tuple) else value


def _console(progress: bool) -> Console:
    from rich.console import Console

    return Console(markup=False) if progress else Console(markup=False, quiet=True)


def _say(console: Console) -> Any:
    return partial(console.print, highlight=False, markup=False, soft_wrap=True)


def _watch(job: Job, console: Console) -> AbstractContextManager[None]:
    from minimind_ray.display.progress import watching

    return nullcontext() if console.quiet else watching(job, console)
