"""`minimind-ray generate MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from minimind_ray.cli import options

if TYPE_CHECKING:
    from minimind_ray.data.chat_template import Message
    from minimind_ray.data.tokenizer import Tokenizer


class Talk(NamedTuple):
    """A conversation that ends with a turn to answer, and its tools."""

    messages: list[Message]
    tools: list[Any] | None


def generate(
    model: options.Model,
    prompt: Annotated[list[str] | None, typer.Option(help="prompt; may be repeated", show_default=False)] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="prompts: a text file with one a line, or rows (.jsonl, .json, .csv, .tsv, .parquet) with prompt, or "
            "with conversations or messages, whose last question is answered",
            show_default=False,
        ),
    ] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat",
            help="continue the prompt as a text, or answer it as a user's turn; default: --raw for a pretraining run, "
            "which has not learned conversations, else --chat",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="text of the system turn", show_default=False)] = None,
    temperature: options.Temperature = 0.8,
    top_p: options.TopP = 0.95,
    top_k: options.TopK = 0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    max_new_tokens: options.MaxNewTokens = 256,
    seed: options.Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts at once")] = 32,
    adapter: options.Adapter = None,
    precision: options.Precision = "auto",
    json: Annotated[bool, typer.Option("--json", help="a JSON object a line: prompt, answer, tokens, end")] = False,
) -> None:
    """Answer or continue prompts, many at a time."""
    from json import dumps

    from minimind_ray.config.errors import UserError
    from minimind_ray.model.sampling import Sampling
    from minimind_ray.stages.use import complete, open_trained

    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed=(seed,))
    require_text(system or "", "--system")
    prompts = read_prompts(prompt or [], file)
    trained = open_trained(model, adapter=adapter, precision=precision)
    if raw is None:
        raw = trained.continues_texts
    if raw and system is not None:
        raise UserError("--system works only with --chat, because a text has no turns: leave --system or --raw out")
    ids = [text_ids(p, trained.tokenizer) if raw else chat_ids(p, system, trained.tokenizer) for p in prompts]
    answers = complete(trained, ids, sampling, batch_size)
    for asked, prompt_ids, (answer, ended) in zip(prompts, ids, answers, strict=True):
        tokenizer = trained.tokenizer
        if raw:
            text = tokenizer.decode(answer, skip_special=True, after=prompt_ids)
        else:
            text = tokenizer.answer_text(prompt_ids, answer)
        if json:
            end = "stop" if ended else "length"
            given = asked if isinstance(asked, str) else asked.messages
            print(dumps({"prompt": given, "answer": text, "tokens": len(answer), "end": end}, ensure_ascii=False))
            continue
        shown = asked if isinstance(asked, str) else asked.messages[-1]["content"]
        if raw:
            print(options.printable(shown + text))
        else:
            print(options.printable(f"> {shown}\n{text}" if len(prompts) > 1 else text))
        if len(prompts) > 1:
            print()


def read_prompts(given: list[str], file: Path | None) -> list[str | Talk]:
    """Prompts of the command line and the file: texts, or conversations up to a question.

    Raises:
        UserError: there is none, or the file cannot be read.
    """
    from minimind_ray.config.errors import UserError

    prompts: list[str | Talk] = []
    for text in given:
        require_text(text, "--prompt")
        prompts.append(text)
    if file is not None:
        from minimind_ray.data.records import SUFFIXES

        rows = file.name.endswith(SUFFIXES) and not file.name.endswith(".txt")
        prompts += _row_prompts(str(file)) if rows else _line_prompts(file)
    if not prompts:
        raise UserError("no prompts: give --prompt TEXT or --file FILE" if file is None else f"{file}: no prompts")
    return prompts


def _line_prompts(file: Path) -> list[str]:
    from minimind_ray.config.errors import UserError

    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return [line for line in lines if line.strip()]


def _row_prompts(path: str) -> list[str | Talk]:
    from minimind_ray.config.errors import UserError
    from minimind_ray.data.records import Reject, discover, read_rows

    prompts: list[str | Talk] = []
    for source in discover(path):
        for row in read_rows(source):
            where = f"{row.file}:{row.line}"
            if isinstance(row, Reject):
                raise UserError(f"{where}: {row.reason}")
            prompts.append(_row_prompt(row.value, where))
    return prompts


def _row_prompt(row: dict[str, Any], where: str) -> str | Talk:
    """The row's prompt, or its turns without the answers at the end."""
    from json import dumps

    from minimind_ray.config.errors import UserError
    from minimind_ray.config.reading import DEEPEST, deeper
    from minimind_ray.data.fields import BadRowError
    from minimind_ray.data.formats import question_of

    prompt = row.get("prompt")
    if isinstance(prompt, str) and len(row) == 1:
        require_text(prompt, f"{where}: prompt")
        return prompt
    try:
        messages, tools = question_of(row)
        if deeper([messages, tools], DEEPEST):  # as JSON in a text can be
            raise RecursionError
    except BadRowError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: objects are nested too deeply") from None
    require_text(dumps([messages, tools], ensure_ascii=False), where)
    if tools is None and [m["role"] for m in messages] == ["user"]:
        return str(messages[0]["content"])
    return Talk(messages, tools)


def require_text(text: str, where: str) -> None:
    """Check that a text can be encoded: bytes of the command line that are no UTF-8 come as halves of surrogate pairs.

    Raises:
        UserError: it cannot.
    """
    from minimind_ray.config.errors import UserError

    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} is no UTF-8 text") from None


def text_ids(prompt: str | Talk, tokenizer: Tokenizer) -> list[int]:
    """As pretraining documents begin."""
    from minimind_ray.config.errors import UserError

    if not isinstance(prompt, str):
        raise UserError("--raw continues texts, but the file has conversations: leave --raw out")
    return [tokenizer.bos_id, *tokenizer.encode([prompt])[0]]


def chat_ids(prompt: str | Talk, system: str | None, tokenizer: Tokenizer) -> list[int]:
    """By the chat template, up to where the answer begins."""
    messages, tools = Talk([{"role": "user", "content": prompt}], None) if isinstance(prompt, str) else prompt
    if system is not None:
        messages = [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]
    return tokenizer.prompt_ids(messages, tools)
