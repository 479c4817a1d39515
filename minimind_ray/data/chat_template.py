"""Chat templates: a conversation as the text a model reads, rendered as Hugging Face renders it, in a sandbox.

A template comes with a tokenizer, from anywhere; it is a program in Jinja. Here it can neither reach Python, nor loop
for ever, nor make values that fill the memory: values have a size, which is looked at where they are made, and before
where little makes much, as in repeating, padding, replacing and joining. What it can do within that may take a while.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from string import Formatter
from typing import Any, NoReturn, TypeVar, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from minimind_ray.config.errors import UserError

Message = dict[str, Any]
T = TypeVar("T")

LARGEST_TEMPLATE = 1_000_000  # characters; the largest in use have some 20,000
LARGEST_VALUE = 1 << 24  # characters of a text, items of a list
MOST_STEPS = 100_000  # turns of loops and calls of macros in one rendering; a conversation takes a few hundred

# Characters around each {% generation %} block in what a template writes; messages must not hold them.
ANSWER_START, ANSWER_END = "\ufdd1", "\ufdd2"

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


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, with which a template marks what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser: Parser) -> nodes.Node:
        """Jinja's hook for the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        cast(_Sandbox, self.environment).marks_answers = True
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return ANSWER_START + caller() + ANSWER_END


class _Sandbox(ImmutableSandboxedEnvironment):
    """With a count of the steps a template takes, and a bound on the size of what they make."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation])
        self.marks_answers = False  # set when a template with {% generation %} is compiled
        del self.globals["lipsum"], self.filters["pprint"]  # They make much of little, and no template has them.
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.finalize = _small  # What {{ }} puts out, before it is made a text.
        self.steps_left = MOST_STEPS

    def count_step(self) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise SecurityError(f"it takes more than {MOST_STEPS} steps")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Jinja's hook for the operators above."""
        if operator == "%" and isinstance(left, str):
            _require_small(_makes("%", left, list(right) if isinstance(right, tuple) else [right]))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * abs(right)
            _require_small(_int_size(bits))
        elif operator == "*":
            _require_small(max(_size(left) * _factor(right), _factor(left) * _size(right)))
        else:
            _require_small(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 (Jinja's hook)
        owner = getattr(obj, "__self__", None)
        if owner is self:  # what _Counting puts in
            return obj(*args)
        name = str(getattr(obj, "__name__", ""))
        if name == "join":
            args = tuple(map(_whole, args))
        _require_small(_makes(name, owner, [*args, *kwargs.values()]))
        return _small(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:  # noqa: D102 (Jinja's hook)
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            _require_small(_makes("format", value.__self__, [*args, *kwargs.values()]))
            return wrapped(*args, **kwargs)

        return bounded

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """What a template, a macro or a block puts out."""
        size, texts = 0, list[str]()
        for piece in pieces:
            size += len(piece)
            _require_small(size)
            texts.append(piece)
        return "".join(texts)

    def concat_values(self, *values: Any) -> str:
        """What ~ makes."""
        return self.concat(str(_small(value)) for value in values)

    def made(self, value: Any) -> Any:
        """A list, tuple or dictionary that stands in a template."""
        return _small(value)

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        # Jinja's hook between parsing and compiling.
        return super()._generate(_Counting().visit(source), name, filename, defer_init)


class _Counting(NodeTransformer):
    """Each loop and macro counts a step where its body begins, and what Python would make without a hook is looked
    at: the values of ~, and lists, tuples and dictionaries, which double with every step when they hold another twice.
    """

    def visit_For(self, node: Any) -> Any:  # noqa: N802
        node.body.insert(0, nodes.ExprStmt(_call("count_step", [], node)).set_lineno(node.lineno))
        return self.generic_visit(node)

    visit_Macro = visit_For

    def visit_Concat(self, node: Any) -> Any:  # noqa: N802
        return _call("concat_values", self.generic_visit(node).nodes, node)  # pyright: ignore[reportAttributeAccessIssue]

    def visit_List(self, node: Any) -> Any:  # noqa: N802
        node = self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _call("made", [node], node)

    visit_Tuple = visit_Dict = visit_List


def _call(name: str, args: list[Any], node: nodes.Node) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)
    call.set_lineno(node.lineno)
    return call


def _require_small(size: int) -> None:
    if size > LARGEST_VALUE:
        raise SecurityError(f"it makes a value of more than {LARGEST_VALUE:,} characters")


def _small(value: Any) -> Any:
    """The value, if it is not too large."""
    _require_small(_size(value))
    return value


def _size(value: Any) -> int:
    """Characters of all texts in a value, each as often as it is there, and for the rest about what it weighs in bytes.

    Counting ends where it is too much: lists that hold others twice, level after level, have more than can be counted.
    """
    if isinstance(value, str):  # as most are
        return len(value)
    size, waiting = 0, [value]
    while waiting and size <= LARGEST_VALUE:
        item = waiting.pop()
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, int):
            size += _int_size(item.bit_length())
        elif isinstance(item, dict):
            size += 64 + 64 * len(item)
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list | tuple):
            size += 64 + 32 * len(item)
            waiting += item
        elif isinstance(item, Namespace):
            waiting.append(object.__getattribute__(item, "_Namespace__attrs"))
    return size


def _int_size(bits: int) -> int:
    """By the time that a product takes: 65,536 bits are the most."""
    return bits * bits >> 8


def _factor(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _widths(form: str) -> int:
    """The largest number in a format, which pads to it; * takes it from elsewhere."""
    digits = max((len(number) for number in re.findall(r"\d+|\*", form)), default=0)
    return LARGEST_VALUE + 1 if digits > 6 or "*" in form else len(form)


def _makes(name: str, value: Any, args: list[Any]) -> int:
    """The size, at most, of what a method or filter of that name makes of a value; 0 where it is no more than that."""
    if name not in GROWING or not args:
        return 0
    size = _size(value)
    given = max(map(_factor, args))
    longest = max(map(_size, args))
    match name:
        case "%":
            return _widths(str(value)) + str(value).count("%") * longest
        case "format" | "format_map":
            form = str(value)
            if _takes_widths(form):
                return LARGEST_VALUE + 1
            widths = sum(map(_widths, (form, *(a for a in args if isinstance(a, str)))))
            return widths + (form.count("{") + form.count("%")) * longest
        case "replace" | "translate" | "wordwrap" | "urlize":
            return size + (size + 1) * longest
        case "join":
            return size + longest + size * len(args[0])
        case "sum":
            return size * len(value) if any(isinstance(a, list | tuple) for a in args) else size
        case "expandtabs" | "indent":
            text = str(value)
            return (text.count("\t") + text.count("\n") + 1) * max(given, longest) + size
        case "tojson":  # A separator is there for each value, an indent for each level.
            parts = [part for a in args for part in (a if isinstance(a, list | tuple) else [a])]
            longest = max(len(part) if isinstance(part, str) else _factor(part) for part in [*parts, 0])
            return size + longest * ((size >> 5) + (1 << 20))
        case "batch" | "slice":
            return size + 64 * given
        case "center" | "ljust" | "rjust" | "zfill" | "to_bytes":
            return max(size, given)
        case _:
            raise AssertionError(name)


GROWING = {
    "%", "format", "format_map", "replace", "translate", "wordwrap", "urlize", "join", "sum", "expandtabs", "indent",
    "tojson", "batch", "slice", "center", "ljust", "rjust", "zfill", "to_bytes",
}  # fmt: skip


def _takes_widths(form: str) -> bool:
    """Whether a form's field takes its width from another one, as {:{}} does."""
    try:
        return any("{" in (spec or "") for _, _, spec, _ in Formatter().parse(form))
    except ValueError:  # It is no form, and fails by itself.
        return False


def _bounded(name: str, function: Any) -> Any:
    """A filter, refused where it would make too much."""
    first = int(hasattr(function, "jinja_pass_arg"))  # the context

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        context, (value, *rest) = args[:first], args[first:]
        given = [*rest, *kwargs.values()]
        if name in ("join", "sum"):
            value = _whole(value)
        if name == "join":
            _require_small(_makes(name, str(given[0]) if given else "", [value]))
        else:
            _require_small(_makes("%" if name == "format" else name, value, given))
        result = function(*context, value, *rest, **kwargs)
        return _counted(result) if isinstance(result, Iterator) else _small(result)

    return bounded


def _whole(value: Any) -> Any:
    """A list of what may be there only once."""
    return value if hasattr(value, "__len__") else list(value)


def _counted(items: Iterable[T]) -> Iterator[T]:
    """The items, up to where they are too much together."""
    size = 0
    for item in items:
        size += 32 + _size(item)
        _require_small(size)
        yield item


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

    @property
    def marks_answers(self) -> bool:
        """Whether the template has {% generation %} blocks."""
        return self._sandbox.marks_answers

    def render(self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        """The conversation as text; `add_generation_prompt` ends it where an answer begins.

        ANSWER_START and ANSWER_END stand around each {% generation %} block.

        Raises:
            UserError: the template fails on these messages, or refuses them.
        """
        self._sandbox.steps_left = MOST_STEPS
        try:
            return self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt
            )
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
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _Sandbox.concat(encoder.iterencode(value, _one_shot=True))


def _strftime_now(form: str) -> str:
    _require_small(len(form) << 14)  # which can ask for widths
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


# The names that Hugging Face gives a template.
_FUNCTIONS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
