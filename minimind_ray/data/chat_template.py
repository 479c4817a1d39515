"""Chat templates: a conversation as the text a model reads, rendered as Hugging Face renders it, in a sandbox.

A template comes with a tokenizer, from anywhere; it is a program in Jinja. Here it can neither reach Python, nor loop
for ever, nor make values that fill the memory: what a step is given bounds what it makes, but for repeating, padding,
replacing and joining, and those are checked before they are done.
"""

from __future__ import annotations

import functools
import json
import re
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.nodes import EvalContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from minimind_ray.config.errors import UserError

Message = dict[str, Any]

LARGEST_TEMPLATE = 1_000_000  # characters; the largest in use have some 20,000
LARGEST_VALUE = 1 << 24  # characters of a text, items of a list
MOST_STEPS = 100_000  # turns of loops and calls of macros in one rendering; a conversation takes a few hundred

CHATML = """\
{%- set opening = messages[0] if messages and messages[0].role == 'system' else {'content': ''} %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if opening.content %}
        {{- opening.content + '\\n\\n' }}
    {%- endif %}
    {{- 'These tools can be called, each described by a line of JSON:\\n<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '</tools>\\nA call is a JSON object between tags:\\n' }}
    {{- '<tool_call>\\n{"name": "a tool", "arguments": {"a parameter": "its value"}}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.role == 'tool' %}
            {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- else %}
            {%- if message.reasoning_content %}
                {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
            {%- endif %}
            {{- message.content }}
            {%- for call in message.tool_calls or [] %}
                {%- set call = call.function or call %}
                {{- '\\n' if message.content or not loop.first }}
                {{- '<tool_call>\\n{"name": ' + call.name | tojson + ', "arguments": ' }}
                {{- call.arguments if call.arguments is string else call.arguments | tojson }}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


class _Sandbox(ImmutableSandboxedEnvironment):
    """With a count of the steps a template takes, and a bound on the size of what they make."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        del self.globals["lipsum"]
        for name in ("center", "indent", "replace", "join", "format"):
            self.filters[name] = _bounded(name, self.filters[name])
        self.filters["tojson"] = _to_json
        self.steps_left = MOST_STEPS

    def count_step(self) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise SecurityError(f"it takes more than {MOST_STEPS} steps")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Jinja's hook for the operators above."""
        if operator == "%" and isinstance(left, str):
            _require_small(_widths(left))
        elif operator == "*":
            _require_small(max(_size(left) * _factor(right), _factor(left) * _size(right)))
        elif operator == "**":
            _require_small(_factor(left).bit_length() * _factor(right))
        else:
            _require_small(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 (Jinja's hook)
        text = getattr(obj, "__self__", None)
        if isinstance(text, str):
            _require_small(_makes(str(getattr(obj, "__name__", "")), text, [*args, *kwargs.values()]))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:  # noqa: D102 (Jinja's hook)
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _require_small(_widths(value.__self__))
        return wrapped

    @staticmethod
    def concat_values(*values: Any) -> str:
        """What ~ makes."""
        texts = [str(value) for value in values]
        _require_small(sum(map(len, texts)))
        return "".join(texts)

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        # Jinja's hook between parsing and compiling: each loop and macro counts a step where its body begins.
        for node in source.find_all((nodes.For, nodes.Macro)):
            count = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(count).set_lineno(node.lineno))
        for node in source.find_all(nodes.Concat):
            node.nodes = [nodes.Call(nodes.EnvironmentAttribute("concat_values"), node.nodes, [], None, None)]
        return super()._generate(source, name, filename, defer_init)


def _require_small(size: int) -> None:
    if size > LARGEST_VALUE:
        raise SecurityError(f"it makes a value of more than {LARGEST_VALUE:,} characters")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _factor(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _widths(form: str) -> int:
    """The largest number in a format, which pads to it; * takes it from elsewhere."""
    digits = max((len(number) for number in re.findall(r"\d+|\*", form)), default=0)
    return LARGEST_VALUE + 1 if digits > 6 or "*" in form else len(form)


def _makes(name: str, text: str, args: list[Any]) -> int:
    """Characters, at most, that a method or filter of that name makes of a text."""
    given = max(map(_factor, args), default=0)
    longest = max(map(_size, args), default=0)
    match name:
        case "format":
            return _widths(text) + sum(map(_widths, (a for a in args if isinstance(a, str))))
        case "replace":
            return len(text) + (len(text) + 1) * longest
        case "join":
            return len(text) * longest
        case "expandtabs" | "indent":
            return (text.count("\t") + text.count("\n") + 1) * max(given, longest) + len(text)
        case _:
            return max(len(text), given)


def _bounded(name: str, function: Any) -> Any:
    """Jinja's filter, refused where it would make too much."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        context = [a for a in args[:1] if isinstance(a, EvalContext)]
        value, *rest = args[len(context) :]
        if name == "join":
            value = list(value)  # which may be there only once
            separator = str(next(iter([*rest, *kwargs.values()]), ""))
            _require_small(_makes(name, separator, [value]))
        else:
            _require_small(_makes(name, str(value), [*rest, *kwargs.values()]))
        return function(*context, value, *rest, **kwargs)

    return bounded


class ChatTemplate:
    """A compiled template. `special_tokens` (`bos_token` and so on) are variables in it; `name` is for errors.

    Raises:
        UserError: it does not compile.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], name: str) -> None:
        if len(source) > LARGEST_TEMPLATE:
            raise UserError(f"{name}: the chat template is longer than {LARGEST_TEMPLATE} characters; give another")
        self._name = name
        self._sandbox = _Sandbox()
        try:
            self._template = self._sandbox.from_string(source, globals={**_FUNCTIONS, **special_tokens})
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise UserError(f"{name}: the chat template does not compile ({error}); mend it") from error

    def render(self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        """The conversation as text; `add_generation_prompt` ends it where an answer begins.

        Raises:
            UserError: the template fails on these messages, or refuses them.
        """
        self._sandbox.steps_left = MOST_STEPS
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: it can fail in any way
            reason = str(error) or type(error).__name__
            raise UserError(f"{self._name}: the chat template fails on these messages: {reason}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML, which would put \\u003c into prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


# The names that Hugging Face gives a template.
_FUNCTIONS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
