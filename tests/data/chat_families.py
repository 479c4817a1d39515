"""Small chat templates of the families that peers use, and small tokenizers for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    f"The number {i} is after {i - 1}. 数字{i}在{i - 1}之后。\n\nsystem user assistant model [INST] hello"
    for i in range(200)
]

CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\\n\\n' }}
    {%- if m.tool_calls %}
        {%- set call = m.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
    {%- else %}
        {{- m.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

LLAMA2 = """\
{%- if messages[0].role == 'system' %}
    {%- set opening = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- bos_token + '[INST] ' + (opening or '' if loop.first else '') + m.content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m.content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

# The system text goes into the last user turn, and with it changes all before.
MISTRAL = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {%- set last = turns[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list | length == 0 %}
        {{- '[INST] ' + (system + '\\n\\n' if system and last else '') + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] ' + m.tool_calls | tojson + eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""

GEMMA = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

PHI3 = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

ZEPHYR = """\
{%- for m in messages %}
    {{- '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}
    {%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
{%- endfor %}"""

# Thoughts of turns before the last user's are left out, those after it are always written.
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# The same with other control tokens, so that answers are found by comparing.
THINKING = QWEN3.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|done|>")

MARKED = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

THOUGHTS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

# Of each family: the template, what ends an answer, the special tokens (the first begins, the last ends a document).
FAMILIES: dict[str, tuple[str, str, list[str]]] = {
    "chatml": (CHATML, "<|im_end|>\n", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "llama3": (LLAMA3, "<|eot_id|>",
               ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]),
    "llama2": (LLAMA2, " </s>", ["<s>", "</s>"]),
    "mistral": (MISTRAL, "</s>", ["<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
                                  "</s>"]),
    "mistral-text": (MISTRAL, "</s>", ["<s>", "</s>"]),
    "gemma": (GEMMA, "<end_of_turn>", ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]),
    "phi3": (PHI3, "<|end|>", ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]),
    "zephyr": (ZEPHYR, "</s>", ["<s>", "</s>"]),
    "qwen3": (QWEN3, "<|im_end|>\n", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "thinking": (THINKING, "<|done|>", ["<|endoftext|>", "<|turn|>", "<|done|>"]),
    "marked": (MARKED, "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
}  # fmt: skip

SPM_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
KINDS = ("bytes", "bytes-prefix", "always", "first", "never", "prepend", "unigram")


def make_tokenizer(kind: str, special: list[AddedToken], words: list[str | AddedToken] = THOUGHTS) -> Tokenizer:
    """A tokenizer of 600 tokens: bytes as GPT-2's or Llama 3's, or space marks as SentencePiece's."""
    contents = [token.content for token in special]
    if kind.startswith("bytes"):
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes-prefix")
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=contents, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.decoder = decoders.Sequence(SPM_DECODER)
        if kind == "prepend":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=kind != "first")
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *contents, *bytes_], show_progress=False)
        in_use, made.pre_tokenizer = made.pre_tokenizer, pre_tokenizers.Metaspace()  # No token holds an inner space.
        made.train_from_iterator(TEXTS, trainer)
        made.pre_tokenizer = in_use
        layout = json.loads(made.to_str())
        layout["added_tokens"] = [t for t in layout["added_tokens"] if not t["content"].startswith("<0x")]
        made = Tokenizer.from_str(json.dumps(layout))
        made.add_special_tokens(special)
        made.add_tokens(words)
        return made
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens(special)
    made.add_tokens(words)
    return made


def write_family(
    path: Path, family: str, kind: str, flags: dict[str, dict[str, bool]] | None = None, **settings: Any
) -> Path:
    """A tokenizer directory; `flags` are those of single special tokens."""
    template, _, contents = FAMILIES[family]
    special = [AddedToken(c, normalized=False, special=True, **(flags or {}).get(c, {})) for c in contents]
    path.mkdir(parents=True, exist_ok=True)
    make_tokenizer(kind, special).save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": contents[0], "eos_token": contents[-1],
        "chat_template": template, **settings,
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return path
