"""`minimind-ray demo`: all steps from data to a compared model, small enough for a laptop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from minimind_ray.stages.use import Trained


def demo(
    out: Annotated[str, typer.Option(help="directory for data, runs and the sweep, or its URL")] = "demo",
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="stages on Ray Train; the sweep needs Ray")] = True,
) -> None:
    """Make a small world of facts, train a tokenizer and a model on it, sweep DPO's beta, and ask ten questions.

    A second call skips finished steps.
    """
    import time
    from contextlib import nullcontext

    from rich.console import Console

    from minimind_ray.cli.run import run_recipe
    from minimind_ray.config.paths import output_path
    from minimind_ray.config.schema import ScaleConfig
    from minimind_ray.config.shipped import shipped
    from minimind_ray.data.demo import write_demo
    from minimind_ray.data.files import join
    from minimind_ray.data.storage import copy_of, mirror_of, require_writable
    from minimind_ray.on_ray.session import local_cpus, ray_running
    from minimind_ray.stages.recipe import read_recipe

    started = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    recipe = shipped("experiments/quickstart.yaml")
    out = output_path(out)
    require_writable(out)
    console.print(
        "the demo: make data and a tokenizer, train a model (pretrain, sft, lora), compare two values of DPO's beta, "
        f"ask ten questions. This takes a few minutes; all files go to {out}"
    )
    data, runs = join(out, "data"), join(out, "runs")
    files = write_demo(copy_of(data)).directory
    if mirror := mirror_of(data):
        mirror.put(*(str(file.relative_to(files)) for file in files.rglob("*") if file.is_file()))
    # One Ray for the recipe and the sweep. The recipe's workers need more logical CPUs than the sweep's trials.
    scale = ScaleConfig(**read_recipe(recipe).settings["scale"])
    with ray_running(local_cpus(scale)) if ray else nullcontext():
        run_recipe(recipe, data, runs, {}, ray=ray)
        sweep_beta(out, console)
    ask_questions(out, console)
    console.print(f"the demo took {time.monotonic() - started:.0f} s")
    offer_chat(join(out, "runs", "sft"), join(out, "runs", "lora"), console)


def sweep_beta(out: str, console: Console) -> None:
    """Sweep over two values of DPO's beta with two seeds each, starting from the fine-tuned model."""
    import os

    from minimind_ray.cli.tune import print_results, run_plan
    from minimind_ray.config.shipped import shipped
    from minimind_ray.data.files import join
    from minimind_ray.stages.recipe import set_aside
    from minimind_ray.stages.run import changed_inputs, prepare_job
    from minimind_ray.sweep.request import SweepRequest
    from minimind_ray.sweep.resume import reopen_sweep
    from minimind_ray.sweep.trials import open_sweep
    from minimind_ray.train.run import RunDirectory

    console.rule("DPO: which beta?", align="left")
    path = open_sweep(join(out, "sweep"))
    if (path / "sweep.json").exists():
        plan = reopen_sweep(path)
        trials = [RunDirectory(trial.config.out) for trial in plan.trials]
        if changed := changed_inputs(prepare_job(plan.trials[0].config), trials[0]):
            console.print(
                f"{' and '.join(changed)} changed; the earlier sweep was moved to {set_aside(RunDirectory(path))}"
            )
        elif all(trial.info()["state"] in ("finished", "early-stopped") for trial in trials):
            print_results(path, console, "winner")
            return
        else:
            run_plan(plan, resume=True)
            return
    settings = {f"data.{split}": join(out, "data", "dpo", f"{split}.jsonl") for split in ("train", "val")}
    settings["init_from"] = join(out, "runs", "sft")
    request = SweepRequest(
        file=shipped("experiments/sweeps/quickstart.yaml"),
        settings=settings,
        # On this machine Ray has more logical CPUs than there are cores; see `demo`.
        search={"concurrent": None if "RAY_ADDRESS" in os.environ else os.cpu_count()},
        out=str(path),
    )
    run_plan(request.plan(), resume=False)


def ask_questions(out: str, console: Console) -> None:
    """Ask the ten questions, and ask who the model is before and after LoRA."""
    from rich.markup import escape
    from rich.table import Table

    from minimind_ray.data.demo import DemoFiles, read_questions
    from minimind_ray.data.files import join
    from minimind_ray.data.storage import copy_of
    from minimind_ray.stages.use import open_trained

    console.rule("ten questions", align="left")
    sft, lora = join(out, "runs", "sft"), join(out, "runs", "lora")
    trained = open_trained(sft)
    questions = read_questions(DemoFiles(copy_of(join(out, "data"))))
    answers = _answers(trained, [q.question for q in questions])
    right = [question.is_right(answer) for question, answer in zip(questions, answers)]
    table = Table("question", "answer", "", box=None, header_style="dim")
    for question, answer, ok in zip(questions, answers, right):
        table.add_row(
            question.question, escape(answer), "[green]right[/]" if ok else f"[red]should be {question.answers[0]}[/]"
        )
    console.print(table)
    console.print(f"{sum(right)} of {len(right)} right")
    identity = ["Who are you?", "你是谁？"]
    adapted = open_trained(lora)
    for question, before, after in zip(identity, _answers(trained, identity), _answers(adapted, identity)):
        console.print(f"{question}  before LoRA: {before!r}  after: {after!r}", markup=False)


def offer_chat(model: str, adapter: str, console: Console) -> None:
    """Print the command that talks with the demo's model. On a terminal, ask whether to talk now.

    The adapter is only named: with it, the model says who it is, but knows fewer facts.
    """
    import sys

    from minimind_ray.cli.chat import chat

    console.print(f"talk to it: minimind-ray chat {model}", markup=False)
    console.print(f"with the adapter that says who it is: minimind-ray chat {model} --adapter {adapter}", markup=False)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    try:
        reply = input("talk to it now? [Y/n] ")
    except EOFError:
        reply = "n"
    if reply.strip().lower() in ("", "y", "yes"):
        chat(model)


def _answers(trained: Trained, questions: list[str]) -> list[str]:
    from minimind_ray.model.sampling import Sampling
    from minimind_ray.stages.prompts import answers

    greedy = Sampling(temperature=0, max_new_tokens=64)
    return [answer.text for answer in answers(trained, questions, greedy, len(questions), raw=False)]
