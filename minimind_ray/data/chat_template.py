"""Render a conversation with a chat template, as Hugging Face does. The result is the text that a model reads.

A template is a Jinja program that comes with a tokenizer, and a tokenizer may come from anywhere. So templates run in
Jinja's sandbox, where they cannot reach Python, and in a separate process with limits on time and memory. Only two
known templates run in this process: CHATML, which tokenizers trained here have, and MiniMind's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from minimind_ray.config.errors import UserError
from minimind_ray.data.template_process import Arguments, LimitedTemplate
from minimind_ray.data.template_sandbox import Template, TemplateError

Message = dict[str, Any]

LARGEST_TEMPLATE = 1_000_000  # characters; the largest templates in use have some 20,000

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


# The template in the tokenizer_config.json of jingyaogong/minimind. Its time is linear in the conversation's length.
MINIMIND_SHA256 = "97c6a9ef3f8d35044f435bb7773f1af160a7328ab6e8d2e9d67702941320a711"


class ChatTemplate:
    """A compiled template. `special_tokens` (`bos_token` and so on) are its variables; errors begin with `name`.

    Raises:
        UserError: the template is too long or does not compile.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], name: str) -> None:
        if len(source) > LARGEST_TEMPLATE:
            raise UserError(f"{name}: the chat template is longer than {LARGEST_TEMPLATE} characters; give another")
        self._name = name
        kind = Template if _is_harmless(source) else LimitedTemplate
        try:
            self._template = kind(source, special_tokens)
        except TemplateError as error:
            raise UserError(f"{name}: the chat template does not compile ({error}); correct it") from error

    @property
    def marks_answers(self) -> bool:
        """Whether the template has {% generation %} blocks."""
        return self._template.marks_answers

    def expect(self, renderings: Iterable[Arguments]) -> None:
        """Announce arguments that `render` will be called with. This saves time."""
        if isinstance(self._template, LimitedTemplate):
            self._template.expect(renderings)

    def render(self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        """Return the conversation as text. With `add_generation_prompt`, the text ends where an answer begins.

        ANSWER_START and ANSWER_END stand around each {% generation %} block.

        Raises:
            UserError: the template fails on these messages, or refuses them.
        """
        try:
            return self._template.render(messages, tools, add_generation_prompt)
        except TemplateError as error:
            raise UserError(f"{self._name}: the chat template fails on these messages: {error}") from error


def _is_harmless(source: str) -> bool:
    return source == CHATML or hashlib.sha256(source.encode("utf-8", "replace")).hexdigest() == MINIMIND_SHA256
