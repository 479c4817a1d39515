"""The `minimind-ray` command."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys

import typer

from minimind_ray.cli import (
    chat,
    cluster,
    compare,
    config,
    data,
    demo,
    diagnose,
    doctor,
    evaluate,
    generate,
    init,
    jobs,
    lora,
    push,
    recipes,
    runs,
    tokenizer,
    train,
    transfer,
    tune,
    verify,
)
from minimind_ray.cli import run as run_recipe
from minimind_ray.cli.options import printable
from minimind_ray.config.errors import UserError
from minimind_ray.config.paths import masked
from minimind_ray.train import interrupts

LONGEST_ERROR = 2000

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.callback()(jobs.main)
app.command("init")(init.init)
app.command("demo")(demo.demo)
app.command("train", cls=train.TrainCommand)(train.train)
app.command("run", cls=run_recipe.RunCommand)(run_recipe.run)
app.command("recipes")(recipes.recipes)
app.command("tune", cls=tune.TuneCommand)(tune.tune)
app.command("compare")(compare.compare)
app.command("report")(compare.report)
app.command("diagnose")(diagnose.diagnose)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("eval", cls=evaluate.EvalCommand)(evaluate.evaluate_)
app.command("import")(transfer.import_)
app.command("export")(transfer.export)
app.command("push")(push.push)
app.command("doctor")(doctor.doctor)
app.command("runs")(runs.runs)
app.command("jobs")(jobs.jobs)
app.command("logs")(jobs.logs)
app.command("stop")(jobs.stop)
app.command("pack", hidden=True)(jobs.pack)
app.add_typer(cluster.app, name="cluster")
app.add_typer(verify.app, name="verify")
app.add_typer(lora.app, name="lora")
app.add_typer(data.app, name="data")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(config.app, name="config")


def _skip_last_collection() -> None:
    """Skip the garbage collection at the interpreter's exit, which takes 0.4 s with torch.

    With triton the collection stays: without it, triton's library reports its own objects as leaked.
    """
    if "triton" not in sys.modules:
        gc.freeze()


def run() -> None:
    """Run the command line. A user's or a disk's error becomes one sentence on stderr, and the exit code 1.

    After a signal, the exit code is 128 plus the signal's number, unless the command succeeded. If MINIMIND_DEBUG is
    set, errors show their traceback.
    """
    atexit.register(_skip_last_collection)
    # Let the tokenizers library use all threads in this process. Worker processes set their own limit.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if os.environ.get("RAY_JOB_STOP_SIGNAL") == "SIGINT":
        # If a script started Ray in the background, Ray's jobs inherit its ignored SIGINT: undo this.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.install()
    try:
        app()
    except SystemExit as ending:
        # 130: a command or Typer was stopped by a signal.
        sys.exit(interrupts.exit_code(130) if ending.code == 130 else ending.code)
    except UserError as error:
        if os.environ.get("MINIMIND_DEBUG"):
            raise
        # Text quoted from a file may contain control characters, or be very long.
        text = printable(masked(" ".join(str(error).split())))
        print(f"error: {text if len(text) <= LONGEST_ERROR else f'{text[:LONGEST_ERROR]} …'}", file=sys.stderr)
        sys.exit(interrupts.exit_code(1))
    except OSError as error:
        # Such as a missing permission or a full disk: the user must solve it.
        if os.environ.get("MINIMIND_DEBUG") or error.strerror is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(printable(f"error: {place}{error.strerror}"), file=sys.stderr)
        sys.exit(interrupts.exit_code(1))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(interrupts.exit_code(130))
