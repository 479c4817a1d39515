"""`minimind-ray generate MODEL`: answer or continue prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind_ray.cli import options

if TYPE_CHECKING:
    from minimind_ray.stages.prompts import AnswerText, Talk


def generate(
    model: options.Model,
    prompt: Annotated[list[str] | None, typer.Option(help="prompt; may be repeated", show_default=False)] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="file of prompts: a text file with a prompt on each line, or rows (.jsonl, .json, .csv, .tsv, "
            ".parquet) with the field prompt, conversations or messages; the last question of a row is answered",
            show_default=False,
        ),
    ] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat",
            help="continue the prompt as a text, or answer it as a user's turn; default: --raw for a pretraining run "
            "(it has not learned conversations), otherwise --chat",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="text of the system turn", show_default=False)] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    max_new_tokens: Annotated[int | None, options.max_new_tokens(256)] = None,
    seed: options.Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="number of prompts at once")] = 32,
    adapter: options.Adapter = None,
    precision: options.Precision = "auto",
    json: Annotated[
        bool, typer.Option("--json", help="print a JSON line per prompt: prompt, answer, tokens, end")
    ] = False,
) -> None:
    """Answer or continue prompts, many at a time."""
    from minimind_ray.config.errors import UserError
    from minimind_ray.config.reading import require_text
    from minimind_ray.stages.prompts import answers, read_prompts
    from minimind_ray.stages.use import open_trained

    given = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    require_text(system or "", "--system")
    prompts = read_prompts(prompt or [], file)
    trained = open_trained(model, adapter=adapter, precision=precision)
    if raw is None:
        raw = trained.continues_texts
    if raw and system is not None:
        raise UserError("--system works only with --chat, because a text has no turns: leave --system or --raw out")
    sampling = trained.sampling(given, seed=(seed,))
    answered = answers(trained, prompts, sampling, batch_size, raw=raw, system=system)
    for asked, answer in zip(prompts, answered, strict=True):
        if json:
            print(json_line(asked, answer))
        else:
            print_answer(asked, answer.text, raw=raw, several=len(prompts) > 1)


def json_line(asked: str | Talk, answer: AnswerText) -> str:
    """Return the JSON object of a prompt and its answer."""
    from json import dumps

    given = asked if isinstance(asked, str) else asked.messages
    end = "stop" if answer.ended else "length"
    return dumps({"prompt": given, "answer": answer.text, "tokens": answer.tokens, "end": end}, ensure_ascii=False)


def print_answer(asked: str | Talk, text: str, *, raw: bool, several: bool) -> None:
    """Print a text with its continuation, or an answer. If there are `several` answers, print each question, too."""
    shown = asked if isinstance(asked, str) else asked.messages[-1]["content"]
    if raw:
        print(options.printable(shown + text))
    else:
        print(options.printable(f"> {shown}\n{text}" if several else text))
    if several:
        print()
