"""A chat template is a program from anywhere: it can neither reach Python, nor loop for ever, nor fill the memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.data import template_process
from minimind_ray.data.chat_template import CHATML, ChatTemplate
from minimind_ray.data.template_process import LimitedTemplate
from minimind_ray.data.template_sandbox import Template, TemplateError

pytestmark = pytest.mark.unit

MESSAGES = [{"role": "user", "content": "x"}]
GROWING = "{% set ns = namespace(a=START) %}{% for i in range(99) %}{% set ns.a = NEXT %}{% endfor %}{{ ns.a }}"


def render(source: str) -> str:
    return ChatTemplate(source, {}, "the tokenizer").render(MESSAGES, None, False)


@pytest.fixture
def short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "MOST_SECONDS", 0.3)


@pytest.fixture
def harmful() -> LimitedTemplate:
    """Writes the content of the first message; loops or fills the memory where it is `loop` or `grow`."""
    loop = "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
    return LimitedTemplate(
        "{% set content = messages[0].content %}{{ content }}"
        "{% if content == 'loop' %}" + loop + "{% elif content == 'grow' %}{{ 'a' * 10**10 }}{% endif %}",
        {},
    )


def say(content: str) -> tuple[list[dict[str, Any]], None, bool]:
    return [{"role": "user", "content": content}], None, False


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * ['a'] }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ 'a'|center(9999999999) }}",
        "{{ 'a'|indent(9999999999) }}",
        "{{ (1).to_bytes(9999999999, 'big') }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        GROWING.replace("START", "'x'").replace("NEXT", "ns.a ~ ns.a"),
        GROWING.replace("START", "[1]").replace("NEXT", "ns.a + ns.a"),
        "{{ [[1]]|tojson(indent=3000000000) }}",
        "{% set a %}{% for i in range(99999) %}" + "x" * 19999 + "{% endfor %}{% endset %}",
        "{% macro f() %}{% for i in range(99999) %}" + "x" * 19999 + "{% endfor %}{% endmacro %}{{ f()|length }}",
    ],
)
def test_a_template_cannot_fill_the_memory(source: str) -> None:
    with pytest.raises(UserError, match="the tokenizer: the chat template fails on these messages: it needs more than"):
        render(source)


def test_a_template_cannot_write_more_than_a_conversation_can_hold() -> None:
    for source in ("{{ 'a' * 4000001 }}", "{{ [1]|tojson(indent=4000000) }}"):
        with pytest.raises(UserError, match="it writes more than 4,000,000 characters"):
            render(source)


@pytest.mark.usefixtures("short_time")
@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(a=9) %}{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
        GROWING.replace("START", "[1]").replace("NEXT", "[ns.a, ns.a]") + "{{ ns.a|tojson|length }}",
    ],
)
def test_a_template_cannot_run_for_ever(source: str) -> None:
    with pytest.raises(UserError, match=r"it (takes more than 0.3 s of processor time|needs more than)"):
        render(source)


@pytest.mark.usefixtures("short_time")
def test_a_conversation_that_takes_too_much_spoils_no_other(harmful: LimitedTemplate) -> None:
    contents = ["a", "loop", "b", "grow", "c"]
    harmful.expect(map(say, contents))
    outcomes = list[str]()
    for content in contents:
        try:
            outcomes.append(harmful.render(*say(content)))
        except TemplateError as error:
            outcomes.append(str(error))
    assert outcomes == [
        "a", "it takes more than 0.3 s of processor time", "b", "it needs more than 1,024 MiB of memory", "c",
    ]  # fmt: skip


@pytest.mark.usefixtures("short_time")
def test_a_template_that_takes_too_much_again_and_again_is_given_up(
    harmful: LimitedTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_process, "MOST_OVERRUNS", 2)
    for _ in range(2):
        with pytest.raises(TemplateError, match="processor time"):
            harmful.render(*say("loop"))
    for content in ("loop", "a"):
        with pytest.raises(TemplateError, match="2 times, and is not tried again"):
            harmful.render(*say(content))


@pytest.mark.parametrize("expected", [True, False])
def test_all_renderings_together_have_limited_time(expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rendering stays far below its own limit, but a file has many rows."""
    monkeypatch.setattr(template_process, "SPARE_SECONDS", 0.3)
    monkeypatch.setattr(template_process, "SECONDS_EACH", 0.001)
    loops = "{% for j in range(5) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
    slow = LimitedTemplate(loops + "{{ messages[0].content }}", {})
    contents = list(map(str, range(2000)))
    if expected:
        slow.expect(map(say, contents[-template_process.MOST_EXPECTED :]))
    with pytest.raises(TemplateError, match="more than 0.001 s of processor time for each of many renderings"):
        for content in contents if not expected else contents[-template_process.MOST_EXPECTED :]:
            assert slow.render(*say(content)) == content
    assert slow._budget.renderings < 1000
    with pytest.raises(TemplateError, match="for each of many"):
        slow.render(*say("another"))


def test_expected_renderings_are_those_that_are_not_expected(harmful: LimitedTemplate) -> None:
    harmful.expect(map(say, "abc"))
    harmful.expect(map(say, "de"))
    assert [harmful.render(*say(content)) for content in "cxadebba"] == list("cxadebba")


def test_a_process_that_someone_ends_is_replaced(harmful: LimitedTemplate) -> None:
    for _ in range(2):
        os.kill(harmful._process._popen.pid, signal.SIGKILL)
        assert harmful.render(*say("a")) == "a"


def test_an_interrupted_rendering_is_not_the_next_ones_answer(
    harmful: LimitedTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(size: int) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(harmful._process, "_read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        harmful.render(*say("a"))
    assert harmful.render(*say("b")) == "b"


def test_the_process_ends_when_nobody_can_ask_it_any_more(harmful: LimitedTemplate) -> None:
    """As when this process is killed, which closes the pipe."""
    process = harmful._process._popen
    assert process.stdin
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def test_the_process_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    template = LimitedTemplate("{{ 1 }}", {})
    environment = Path(f"/proc/{template._process._popen.pid}/environ")
    if not environment.exists():
        pytest.skip("there is no /proc")
    names = {entry.partition(b"=")[0].decode() for entry in environment.read_bytes().split(b"\0") if entry}
    assert names <= {"PYTHONPATH", *template_process.VARIABLES}


def test_our_own_template_needs_no_process() -> None:
    assert isinstance(ChatTemplate(CHATML, {}, "ours")._template, Template)
    assert isinstance(ChatTemplate(CHATML + "{# #}", {}, "theirs")._template, LimitedTemplate)


def test_what_templates_do_is_what_jinja_does() -> None:
    cases = {
        "{{ ['a', 'b']|join(', ') }}": "a, b",
        "{{ messages|map(attribute='role')|join }}": "user",
        "{{ messages|join('-', attribute='role') }}": "user",
        "{{ 'a\nb'|indent(2) }}": "a\n  b",
        "{{ '%s-%d' % ('a', 3) }}{{ '%s'|format('b') }}{{ '{:>3}'.format(4) }}": "a-3b  4",
        "{{ 'a' ~ 3 ~ none ~ true }}": "a3NoneTrue",
        "{{ 'x'.replace('x', 'yy') }}{{ 'aa'|replace('a', 'b', 1) }}": "yyba",
        "{{ 2 * 3 + 2 ** 3 }}{{ [1] + [2] }}{{ '-' * 3 }}{{ 7 % 4 }}": "14[1, 2]---3",
        "{{ [1, 2, 3]|batch(2, 0)|list }}{{ [1, 2, 3]|slice(2)|list }}": "[[1, 2], [3, 0]][[1, 2], [3]]",
        "{{ [1, 2, 3]|sum }}{{ [[1], [2]]|sum(start=[]) }}{{ x|default(1000000000) }}": "6[1, 2]1000000000",
        "{{ {'a': [1]}|tojson(indent=1) }}{{ [1, 2]|tojson(separators=(',', ':')) }}": '{\n "a": [\n  1\n ]\n}[1,2]',
        "{% for a, b in [(1, 2), (3, 4)] %}{{ a * b }}{% endfor %}{{ {'a': 1}.a }}": "2121",
        "{% set a, b = 1.5, [[2]] %}{{ a * 100000000 }}{{ b[0][0] is in [1, 2] }}": "150000000.0True",
        "{{ 'a b'|wordwrap(1) }}{{ [1, 2]|map('string')|reverse|join('+') }}": "a\nb2+1",
        "{{ messages|groupby('role')|map(attribute='grouper')|first }}{{ messages[0].items()|list|length }}": "user2",
        "{{ '%s' % {'a': 1} }}{{ '{a}{b}'.format(a=1, b='c') }}{{ '{a}'.format_map({'a': 2}) }}": "{'a': 1}1c2",
        "{{ 'a: {}'.format(1) }}{{ '{a}: {b}'.format(a=1, b=2) }}{{ '{{x: {}}}'.format(3) }}": "a: 11: 2{x: 3}",
        """{{ '{"args": {%s}}'|format('b') }}""": '{"args": {b}}',
        "{{ 'a'|center(3) }}{{ 'a b'.split(' ') }}{{ ', '.join(['a', 'b']) }}": " a ['a', 'b']a, b",
    }
    assert {source: Template(source, {}).render(MESSAGES, None, False) for source in cases} == cases
