"""A chat template is a program from anywhere: it can fill neither memory nor time."""

from __future__ import annotations

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.data.chat_template import LARGEST_VALUE, ChatTemplate

pytestmark = pytest.mark.unit

GROWING = "{% set ns = namespace(a=START) %}{% for i in range(99) %}{% set ns.a = NEXT %}{% endfor %}"


def render(source: str) -> str:
    return ChatTemplate(source, {}, "the tokenizer").render([{"role": "user", "content": "x"}], None, False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * ['a'] }}",
        "{{ 9 ** 99999999 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:>9999999999}'|format(1) }}",
        "{{ 'a'|center(9999999999) }}",
        "{{ 'a'|indent(9999999999) }}",
        "{{ 'a'.ljust(9999999999) }}",
        "{{ 'a'.zfill(9999999999) }}",
        "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999)|replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999).join(['b'] * 9999) }}",
        "{{ (['b'] * 9999)|join('a' * 9999) }}",
        GROWING.replace("START", "'x'").replace("NEXT", "ns.a ~ ns.a"),
        GROWING.replace("START", "'x'").replace("NEXT", "ns.a + ns.a"),
        GROWING.replace("START", "[1]").replace("NEXT", "ns.a + ns.a"),
    ],
)
def test_a_value_that_would_fill_the_memory_is_not_made(source: str) -> None:
    with pytest.raises(UserError, match=f"it makes a value of more than {LARGEST_VALUE:,} characters"):
        render(source)


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
        "{{ 'a'|center(3) }}{{ 'a b'.split(' ') }}{{ ', '.join(['a', 'b']) }}": " a ['a', 'b']a, b",
    }
    assert {source: render(source) for source in cases} == cases
