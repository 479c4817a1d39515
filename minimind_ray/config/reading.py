"""Read JSON and YAML from untrusted files safely: refuse extreme content before it costs time or memory.

There are limits for a file's size, the depth of nesting, whole numbers (64 bits), and the number of YAML values after
expanding aliases. Texts with halves of surrogate pairs are refused, because they could not be written again.

YAML has the same meaning in files, lists and flags. Plain values follow the core schema of YAML 1.2, which differs from
1.1: `1e-4` and `1E5` are numbers and `010` is ten; `yes`, `off`, `1:30`, `1_000` and `2026-01-01` are texts. Values
with a tag follow the same schema: `!!int 1_000` is an error, and so is any tag outside of the core schema.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any, cast

import yaml

from minimind_ray.config.errors import UserError

LARGEST_JSON, LARGEST_YAML = 64 << 20, 1 << 20  # bytes; tokenizers of 250,000 tokens take 35 MB
DEEPEST = 64
MOST_NODES = 100_000
MERGE = "tag:yaml.org,2002:merge"
WORD = range(-(2**63), 2**64)


def read_text(path: Path, largest: int = LARGEST_JSON, hint: str = "") -> str:
    """Return a regular file's UTF-8 text. `hint` is added to some error messages and says what to do.

    Raises:
        UserError: the file cannot be read, is not a regular file, has more than `largest` bytes, or is not UTF-8.
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise UserError(f"{path}: cannot be read: it is not a regular file{hint}")
        if info.st_size > largest:
            raise UserError(f"{path}: is {info.st_size:,} bytes long; files of at most {largest:,} bytes are read")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text, at byte {error.start + 1}") from None
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}{hint}") from None


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """Read a file that holds a JSON object. `hint` is as in `read_text`.

    Raises:
        UserError: see `read_text`; or the file is a link to another directory, or does not hold a JSON object within
            the limits.
    """
    require_own(path)
    return parse_json(read_text(path, hint=hint), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Parse a text that holds a JSON object. Error messages begin with `where`.

    Raises:
        UserError: the text is not a JSON object within the limits.
    """
    try:
        content = _decode(text)
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: not valid JSON: half of a surrogate pair, which is not a character") from None
    except RecursionError:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: not a JSON object")
    if deeper(content, DEEPEST):
        raise UserError(f"{where}: not valid JSON: nested deeper than {DEEPEST} levels")
    return cast("dict[str, Any]", content)


def deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects in the value are nested deeper than this number of levels."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return children is not None and (levels == 0 or any(deeper(child, levels - 1) for child in children))


def require_own(path: Path) -> None:
    """Check that a file is not a link to another directory.

    Links of Hugging Face's cache are allowed. In this cache, snapshots/REVISION/x is a link to ../../blobs/HASH.

    Raises:
        UserError: the file is a link to another directory.
    """
    try:
        if not path.is_symlink():
            return
        folder, target = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if target.parent not in (folder, folder.parent.parent / "blobs"):
        raise UserError(f"{path}: links to a file outside of its directory; copy the file there")


def require_text(text: str, where: str) -> None:
    """Check that a text can be encoded. Python reads invalid UTF-8 on the command line as halves of surrogate pairs.

    Raises:
        UserError: the text cannot be encoded.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} is not UTF-8 text") from None


def parse_yaml(text: str) -> Any:
    """Parse a text by YAML 1.2, with the merge keys (`<<`) of 1.1.

    Raises:
        yaml.YAMLError: the text is not YAML, exceeds a limit, or has a key twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, 0)
        return loader.construct_document(node)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:  # a date of 99 months
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def dump_yaml(value: Any) -> str:
    """Return YAML text that `parse_yaml` reads back to the same value. Keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """A loader that accepts only whole numbers of 64 bits, texts that can be encoded, and tags of the core schema."""

    def construct_plain(self, node: Any) -> Any:
        """Read a null, boolean or number with a tag. Its text must have the tag's type; an int is valid as a float."""
        text, kind = self.construct_scalar(node), node.tag.rpartition(":")[2]
        read_as = self.resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
        if read_as != kind and (read_as, kind) != ("int", "float"):
            raise yaml.constructor.ConstructorError(None, None, f"{text!r} is not !!{kind}", node.start_mark)
        return getattr(self, f"construct_yaml_{kind}")(node)

    def construct_undefined(self, node: Any) -> Any:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise yaml.constructor.ConstructorError(None, None, f"the tag {tag} is unknown: remove it", node.start_mark)

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        value = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if value not in WORD:
            raise yaml.constructor.ConstructorError(None, None, "a whole number of more than 64 bits", node.start_mark)
        return value

    def construct_yaml_str(self, node: Any) -> str:
        value = super().construct_yaml_str(node)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise yaml.constructor.ConstructorError(
                None, None, "half of a surrogate pair, which is not a character", node.start_mark
            ) from None
        return value


_Loader.yaml_constructors = {
    **{f"tag:yaml.org,2002:{name}": _Loader.construct_plain for name in ("null", "bool", "int", "float")},
    **{f"tag:yaml.org,2002:{name}": getattr(_Loader, f"construct_yaml_{name}") for name in ("str", "seq", "map")},
    None: _Loader.construct_undefined,
}


class _Dumper(yaml.SafeDumper):
    """Puts quotes around each text that YAML 1.1 or 1.2 would read as another type."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _measure(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Return the number of nodes after expanding every alias."""
    size = sizes.get(id(node))
    if size == 0 or depth > DEEPEST:  # 0: an alias to a node that contains it
        problem = "an alias of a value that contains it" if size == 0 else f"nested deeper than {DEEPEST} levels"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    if size is None:
        sizes[id(node)] = 0
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
            _require_unique([key for key, _ in node.value])
            _require_mergeable(node.value)
        size = sizes[id(node)] = 1 + sum(_measure(child, sizes, depth + 1) for child in children)
    if size > MOST_NODES:
        problem = f"more than {MOST_NODES:,} values after expanding aliases"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return size


def _require_unique(keys: list[yaml.Node]) -> None:
    """Check that no key appears twice, because YAML would silently use its last value. `<<` may appear twice."""
    seen: set[tuple[str, str]] = set()
    for key in keys:
        if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} appears twice", key.start_mark)
            seen.add((key.tag, key.value))


def _require_mergeable(pairs: list[tuple[yaml.Node, yaml.Node]]) -> None:
    """Check that each `<<` has a mapping, or a list of mappings."""
    for key, value in pairs:
        values = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if key.tag == MERGE and not all(isinstance(each, yaml.MappingNode) for each in values):
            problem = "<< needs a mapping, such as *name, or a list of mappings"
            raise yaml.constructor.ConstructorError(None, None, problem, value.start_mark)


def _int(text: str) -> int:
    if len(text) > 20 or (value := int(text)) not in WORD:
        raise ValueError("a whole number of more than 64 bits")
    return value


_decode = json.JSONDecoder(parse_int=_int).decode
