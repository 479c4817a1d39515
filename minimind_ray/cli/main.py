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
    doctor,
    evaluate,
    generate,
    jobs,
    lora,
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
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.callback()(jobs.everywhere)
app.command("demo")(demo.demo)
app.command("train", cls=train.TrainCommand)(train.train)
app.command("run", cls=run_recipe.RunCommand)(run_recipe.run)
app.command("tune", cls=tune.TuneCommand)(tune.tune)
app.command("compare")(compare.compare)
app.command("report")(compare.report)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("eval", cls=evaluate.EvalCommand)(evaluate.evaluate_)
app.command("import")(transfer.import_)
app.command("export")(transfer.export)
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
    """Spare the interpreter's end a garbage collection over all that torch imported, which takes 0.4 s.

    Not with triton, whose library then reports its own objects as leaked.
    """
    if "triton" not in sys.modules:
        gc.freeze()


def run() -> None:
    """The console script: the user's and the disk's errors as one sentence on stderr, no traceback, exit code 1.

    After a signal the exit code is 128 and its number, whatever the end was but a success.

    With MINIMIND_DEBUG set, the traceback too.
    """
    atexit.register(_skip_last_collection)
    # Tokenizers and matrix libraries start their threads themselves; workers are told their share.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if os.environ.get("RAY_JOB_STOP_SIGNAL") == "SIGINT":
        # A Ray that a script started in its background has handed down to its jobs that SIGINT is to be ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.install()
    try:
        app()
    except SystemExit as ending:
        # The code of any stop, from the commands and from Typer.
        sys.exit(interrupts.exit_code(130) if ending.code == 130 else ending.code)
    except UserError as error:
        if os.environ.get("MINIMIND_DEBUG"):
            raise
        # What it cites of a file could steer a terminal, or fill it.
        text = printable(masked(" ".join(str(error).split())))
        print(f"error: {text if len(text) <= LONGEST_ERROR else f'{text[:LONGEST_ERROR]} …'}", file=sys.stderr)
        sys.exit(interrupts.exit_code(1))
    except OSError as error:
        # A place that cannot be read or written, a full disk: the user's to mend, wherever it shows.
        if os.environ.get("MINIMIND_DEBUG") or error.strerror is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(printable(f"error: {place}{error.strerror}"), file=sys.stderr)
        sys.exit(interrupts.exit_code(1))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(interrupts.exit_code(130))
