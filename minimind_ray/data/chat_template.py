"""Chat templates: a conversation as the text a model reads, rendered as Hugging Face renders it, in a sandbox.

A template comes with a tokenizer, from anywhere; it is a program in Jinja. Here it can neither reach Python nor loop
for ever.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from minimind_ray.config.errors import UserError

Message = dict[str, Any]

LARGEST_TEMPLATE = 1_000_000  # characters; the largest in use have some 20,000
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
    """With a count of the steps a template takes."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json
        self.steps_left = MOST_STEPS

    def count_step(self) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise SecurityError(f"it takes more than {MOST_STEPS} steps")

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        # Jinja's hook between parsing and compiling: each loop and macro counts a step where its body begins.
        for node in source.find_all((nodes.For, nodes.Macro)):
            count = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(count).set_lineno(node.lineno))
        return super()._generate(source, name, filename, defer_init)


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
