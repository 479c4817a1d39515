"""Choose the files of the working directory that go to a cluster with a job, and write them as a zip file.

These files are left out:
- files that .gitignore or .rayignore names
- files that a cluster does not need (UNUSED)
- secrets: files with a suspicious name, and small files that hold a private key, an access key or a token of this
  machine

A symbolic link is replaced by its target, or left out if the target lies outside of the directory.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from minimind_ray.config.errors import UserError
from minimind_ray.config.trackers import tracker_folders

UNUSED = (
    "/runs/", "/sweeps/", "/fetched/", "/.cache/", ".git", ".venv/", "__pycache__/", ".pytest_cache/", ".ruff_cache/",
    *(f"/{folder}/" for folder in tracker_folders()),
)  # fmt: skip
SECRETS = (
    ".env", ".env.*", "*.env", "!.env.example", "!.env.sample", "!.env.template", ".envrc", ".netrc", "_netrc",
    ".git-credentials", ".pypirc", ".npmrc", ".pgpass", ".dockercfg", ".docker/", ".aws/", ".azure/", ".boto",
    "**/.config/gcloud/", ".kube/", "kubeconfig*", ".ssh/", ".gnupg/", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    "*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "credentials", "credentials.*",
    "*credentials*.json", "client_secret*.json", "service[-_]account*.json", "secret.*", "secrets.*", ".secrets",
    "secrets/", "*password*", ".s3cfg", ".my.cnf", ".htpasswd", ".renviron", ".databrickscfg", "rclone.conf",
    "pip.conf", ".env~", "*.pem.*", "*[-_]key.txt", "token", "token.*", "*.token", "*[-_]token", "*[-_]token.txt",
    "*_api_key*", "*.tfstate", "!*.py",
)  # fmt: skip
"""Patterns of secret files, as in .gitignore, compared in lower case."""
SHAPES = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY|\bA(?:KIA|SIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36}"
    rb"|\bgithub_pat_[A-Za-z0-9_]{60}|\bxox[abpr]-[0-9A-Za-z-]{20}|\bsk-[A-Za-z0-9_-]{20}"
    rb"|(?i:API_?KEY|TOKEN|SECRET|PASSWORD)\w*\s*[=:]\s*['\"]?[0-9a-f]{40}\b"
)
SCANNED = 1 << 20  # Files of more bytes are not searched for secrets.
TOKEN_FILES = ("~/.ray/auth_token", "~/.cache/huggingface/token")
TOKEN_VARIABLES = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$")
SHORTEST_TOKEN = 16


@dataclass
class Package:
    """The files to send, by their path relative to the working directory.

    `secrets` and `links` list the paths that stay here: secrets, and links to targets outside of the directory.
    """

    files: dict[str, Path] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """The total size of all files, in bytes."""
        return sum(path.stat().st_size for path in self.files.values())

    def write(self, target: Path) -> None:
        """Write the files as a zip file.

        Raises:
            UserError: a file cannot be read.
        """
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            for name, path in sorted(self.files.items()):
                try:
                    archive.write(path, name)
                except UnicodeEncodeError:
                    raise UserError(
                        f"{name.encode(errors='replace').decode()} cannot be sent: its name is not UTF-8; rename the "
                        "file, or list it in .rayignore"
                    ) from None
                except OSError as error:
                    raise UserError(f"{name} cannot be sent ({error}): list it in .rayignore") from None


@dataclass(frozen=True)
class Rule:
    """A line of .gitignore: matching paths below `base` are ignored, or (`keeps`, for a line with !) not ignored."""

    base: str
    pattern: re.Pattern[str]
    only_folders: bool
    keeps: bool


def package(root: Path, ship: Sequence[str] = ()) -> Package:
    """Choose the files of the directory `root` to send. Files and folders that `ship` names are always sent.

    Raises:
        UserError: a path of `ship` does not exist, lies outside of `root`, or is `root` itself.
    """
    root = root.absolute()
    found = Package()
    _collect(root, "", found, _rules_above(root), rules(SECRETS, ""), machine_tokens(), ())
    for name in ship:
        path = Path(os.path.normpath(root / name))
        if not path.is_relative_to(root):
            raise UserError(f"--ship {name} is outside of the working directory; only files in it can be sent")
        if path == root:
            raise UserError(
                f"--ship {name} is the whole directory, with all its secrets: name single files or folders in it"
            )
        if not path.exists():
            raise UserError(f"--ship {name}: there is no such file or folder here")
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file():
                found.files[file.relative_to(root).as_posix()] = file
        for left in (found.secrets, found.links):
            left[:] = [name for name in left if not Path(name).is_relative_to(path.relative_to(root))]
    return found


def _collect(
    folder: Path,
    at: str,
    found: Package,
    ignored: list[list[Rule]],
    secret: list[Rule],
    tokens: Sequence[bytes],
    parents: tuple[Path, ...],
) -> None:
    real = folder.resolve()
    if real in parents:  # a link to a folder that contains it
        return
    git, ray = (
        [*before, *_rules_in(folder / name)] for before, name in zip(ignored, (".gitignore", ".rayignore"), strict=True)
    )
    top = parents[0] if parents else real
    unused = rules(UNUSED, str(folder)) if not at else []
    for entry in sorted(folder.iterdir()):
        name, is_folder, where = at + entry.name, entry.is_dir(), str(entry)
        if any(is_ignored(each, where, is_folder) for each in (git, ray, unused)):
            continue
        target = Path(os.path.realpath(entry)) if entry.is_symlink() else real / entry.name
        outside = not target.is_relative_to(top)
        # A link has a second name, its target's, which may be the name of a secret.
        names = [name] if outside else [name, target.relative_to(top).as_posix()]
        if any(_is_secret(secret, each, is_folder) for each in names):
            found.secrets.append(name + "/" * is_folder)
        elif outside and (is_folder or entry.is_file()):
            found.links.append(name + "/" * is_folder)
        elif is_folder:
            _collect(entry, name + "/", found, [git, ray], secret, tokens, (*parents, real))
        elif entry.is_file():
            if _holds_secret(entry, tokens):
                found.secrets.append(name)
            else:
                found.files[name] = entry


def _is_secret(secret: list[Rule], name: str, is_folder: bool) -> bool:
    """Whether a path (relative to the working directory), or a folder in it, has the name of a secret."""
    folders = [f"/{folder.as_posix()}" for folder in PurePosixPath(name.lower()).parents][:-1]
    return is_ignored(secret, f"/{name.lower()}", is_folder) or any(is_ignored(secret, each, True) for each in folders)


def _holds_secret(file: Path, tokens: Sequence[bytes]) -> bool:
    try:
        if file.stat().st_size > SCANNED:
            return False
        content = file.read_bytes()
    except OSError:  # `Package.write` reports this error.
        return False
    return bool(SHAPES.search(content)) or any(token in content for token in tokens)


def machine_tokens() -> list[bytes]:
    """Return this machine's tokens, keys and passwords, from the environment and the token files of Ray and the Hub."""
    values = [value for name, value in os.environ.items() if TOKEN_VARIABLES.search(name)]
    for file in map(Path, TOKEN_FILES):
        try:
            values.append(file.expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
    return [value.strip().encode() for value in values if len(value.strip()) >= SHORTEST_TOKEN]


def rules(lines: Iterable[str], base: str) -> list[Rule]:
    """Parse the lines of a .gitignore that lies in the directory `base`."""
    return list(_rules(lines, base))


def _rules(lines: Iterable[str], base: str) -> Iterator[Rule]:
    for line in lines:
        text = re.sub(r"(?<!\\) +$", "", line.rstrip("\r\n"))
        if not text or text.startswith("#"):
            continue
        keeps = text.startswith("!")
        text = text[keeps:]
        only_folders = text.endswith("/")
        text = text.rstrip("/")
        anchored = "/" in text
        start = "" if anchored else "(?:.*/)?"
        try:
            yield Rule(base, re.compile(start + _regex(text.removeprefix("/"))), only_folders, keeps)
        except re.error:  # Git ignores an invalid pattern, too.
            continue


def _regex(pattern: str) -> str:
    """Translate a pattern of .gitignore to a regular expression for whole paths."""
    made, rest = "", pattern
    while rest:
        if found := re.match(r"\*\*/", rest) if not made or made.endswith("/") else None:
            made += "(?:.*/)?"
        elif found := re.match(r"\*\*$", rest) if made.endswith("/") else None:
            made += ".+"
        elif found := re.match(r"\*+", rest):
            made += "[^/]*"
        elif found := re.match(r"\?", rest):
            made += "[^/]"
        elif found := re.match(r"\[([!^]?)(\]?[^\]]*)\]", rest):
            made += f"(?!/)[{'^' if found[1] else ''}{found[2].replace('[', chr(92) + '[')}]"
        elif rest.startswith("["):
            raise re.error("a character class without its end")
        elif found := re.match(r"\\?(.)", rest, re.DOTALL):
            made += re.escape(found[1])
        assert found
        rest = rest[found.end() :]
    return made


def is_ignored(rules: Iterable[Rule], path: str, is_folder: bool) -> bool:
    """Whether an absolute path is ignored. The last matching rule decides."""
    last = False
    for rule in rules:
        if (is_folder or not rule.only_folders) and rule.pattern.fullmatch(path, len(rule.base.rstrip("/")) + 1):
            last = not rule.keeps
    return last


def _rules_in(file: Path, base: Path | None = None) -> list[Rule]:
    try:
        return rules(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), str(base or file.parent))
    except OSError:
        return []


def _rules_above(root: Path) -> list[list[Rule]]:
    """Return Git's ignore rules from outside `root`: the user's rules, and the rules of the repository around it."""
    top = next((folder for folder in (root, *root.parents) if (folder / ".git").exists()), None)
    if not top:
        return [[], []]
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    found = [*_rules_in(settings / "git" / "ignore", top), *_rules_in(top / ".git" / "info" / "exclude", top)]
    for folder in [folder for folder in reversed(root.parents) if folder.is_relative_to(top)]:
        found += _rules_in(folder / ".gitignore")
    return [found, []]
