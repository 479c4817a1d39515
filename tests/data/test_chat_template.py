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
        GROWING.replace("START", "[1]").replace("NEXT", "[ns.a, ns.a]"),
        GROWING.replace("START", "[1]").replace("NEXT", "{'a': ns.a, 'b': ns.a}"),
        GROWING.replace("START", "[1]").replace("NEXT", "dict(a=ns.a, b=ns.a)"),
        GROWING.replace("START", "[1]").replace("NEXT", "namespace(a=ns.a, b=ns.a)") + "{{ ns }}",
        GROWING.replace("START", "3").replace("NEXT", "ns.a * ns.a"),
        "{{ [[1]]|tojson(indent=300000000) }}",
        "{{ range(60)|list|tojson(separators=['x' * 1000000, ':']) }}",
        "{% set ns = namespace(a=1) %}{% for i in range(500) %}{% set ns.a = [ns.a] %}{% endfor %}"
        "{{ ([ns.a] * 300)|tojson(indent=16) }}",
        "{{ [1]|batch(100000000, 0)|list }}",
        "{{ [1]|slice(20000000)|list }}",
        "{{ ('x ' * 1000000)|wordwrap(1, wrapstring='y' * 1000) }}",
        "{{ ('http://a.bc ' * 100000)|urlize(rel='y' * 1000) }}",
        "{{ (['a' * 10000] * 1000)|map('replace', 'a', 'b' * 100)|list }}",
        "{{ (['x' * 1000] * 20000)|join }}",
        "{{ (['x' * 1000] * 20000)|tojson }}",
        "{{ ([[1] * 10] * 1000)|sum(start=[]) }}",
        "{{ '%s%s%s' % ('x' * 9999999, 'x' * 9999999, 'x' * 9999999) }}",
        "{{ ('{0}' * 9999).format('x' * 9999) }}",
        "{{ '{:{w}}'.format(1, w=9999999999) }}",
        "{{ ('a' * 9999).translate({97: 'x' * 9999}) }}",
        "{{ 'a'.encode().center(9999999999) }}",
        "{{ (1).to_bytes(9999999999, 'big') }}",
        "{{ strftime_now('%99999d' * 9999) }}",
        "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{% set a %}{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}{% endset %}",
        "{% macro f() %}{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}{% endmacro %}{{ f()|length }}",
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
    assert {source: render(source) for source in cases} == cases
