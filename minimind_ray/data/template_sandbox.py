"""Compile and render a chat template in Jinja's sandbox, with the functions that Hugging Face gives to templates.

`template_process` runs this file as a script, in the process in which it renders templates. The script reads pickled
requests from its standard input and writes the answers to its standard output. The process has to start fast, so this
file imports only Jinja and the standard library.

    requests  a pickled number, the seconds of processor time that the requests may take together, with a list of
              pickles. The first request has the arguments of `Template`, each later request has the arguments of
              `Template.render`.
    answers   for each request, in order: HEADER (whether the request succeeded, its seconds of processor time, number
              of bytes) and a text, which is the rendered text or the reason of a failure. The first answer is
              MARKS_ANSWERS or an empty text.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, BinaryIO, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Characters around each {% generation %} block in the rendered text; messages must not contain them.
ANSWER_START, ANSWER_END = "\ufdd1", "\ufdd2"

LARGEST_TEXT = 4_000_000  # characters that a template may write
LONGEST_REASON = 1000  # characters of an error's message

HEADER = struct.Struct(">?dQ")
MARKS_ANSWERS = "marks answers"
OUT_OF_MEMORY, OUT_OF_TIME = 3, 4  # exit codes


class TemplateError(Exception):
    """A template does not compile or fails on messages; the message says why."""


class Template:
    """A compiled template. `special_tokens` (`bos_token` and so on) are its variables.

    `marks_answers` says whether the template has {% generation %} blocks.

    Raises:
        TemplateError: the template does not compile.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
        )
        sandbox.filters["tojson"] = _to_json
        functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        with _template_errors():
            self._template = sandbox.from_string(source, globals={**functions, **special_tokens})
        self.marks_answers = cast(_Generation, sandbox.extensions[_Generation.identifier]).is_used

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        """Return the conversation as text. With `add_generation_prompt`, the text ends where an answer begins.

        ANSWER_START and ANSWER_END stand around each {% generation %} block.

        Raises:
            TemplateError: the template fails on these messages, or refuses them.
        """
        with _template_errors():
            text = self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt
            )
        if len(text) > LARGEST_TEXT:
            raise TemplateError(f"it writes more than {LARGEST_TEXT:,} characters")
        return text


class _Generation(Extension):
    """The tag `{% generation %}...{% endgeneration %}`, which marks the text that the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.is_used = False

    def parse(self, parser: Parser) -> nodes.Node:
        """Compile the tag. Jinja calls this method."""
        self.is_used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return ANSWER_START + caller() + ANSWER_END


@contextmanager
def _template_errors() -> Generator[None]:
    """Turn every error but MemoryError into a TemplateError. A template is a program: it can raise any error."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise TemplateError(str(error)[:LONGEST_REASON] or type(error).__name__) from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would put \\u003c into prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


# The process


def serve(requests: BinaryIO, answers: BinaryIO, seconds: float) -> None:
    """Answer requests until there are no more.

    The process ends by SIGPROF when one request takes more than `seconds` of processor time, with the exit code
    OUT_OF_TIME when requests together take too much of it, and with OUT_OF_MEMORY when it needs more memory than there
    is.
    """
    template: Template | None = None
    while batch := _next_batch(requests):
        left, pickles = batch
        for arguments in map(pickle.loads, pickles):
            if left < 0:
                os._exit(OUT_OF_TIME)
            began = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                if template is None:
                    template = Template(*arguments)
                    succeeded, text = True, MARKS_ANSWERS if template.marks_answers else ""
                else:
                    succeeded, text = True, template.render(*arguments)
            except TemplateError as error:
                succeeded, text = False, str(error)
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
            signal.setitimer(signal.ITIMER_PROF, 0)
            data = text.encode("utf-8", "surrogatepass")
            used = time.process_time() - began
            left -= used
            answers.write(HEADER.pack(succeeded, used, len(data)) + data)
        answers.flush()


def _next_batch(requests: BinaryIO) -> tuple[float, list[bytes]] | None:
    try:
        return pickle.load(requests)
    except EOFError:
        return None


def limit_process(memory: int) -> None:
    """Limit this process's address space to `memory` bytes, and let the timer of `serve` end the process.

    Set no memory limit on macOS, which does not enforce it.
    """
    if sys.platform != "darwin":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])


if __name__ == "__main__":
    limit_process(memory=int(sys.argv[2]))
    serve(sys.stdin.buffer, sys.stdout.buffer, seconds=float(sys.argv[1]))
