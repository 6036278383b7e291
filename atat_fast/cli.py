"""What the commands share: settings from presets, files and the command line, and errors in one sentence.

A preset overrides the defaults, a --config file overrides the preset, and dotted options override both:

    --preset small --config my.yaml --model.length 512
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atat_fast.config import Config, preset_names, preset_settings, to_dict
from atat_fast.errors import UsageError, first_line, nearest

Settings = dict[str, Any]
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Names of mallopt's settings in glibc's malloc.h."""


def run_command(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its status: 2 after one sentence on standard error if the user can fix the error or the
    operating system refused something, 130 without a word after Ctrl-C, 141 if the reader of our output went away.

    GNU OpenMP's waiting threads spin only briefly, unless the user says otherwise. By default they spin so long that training on
    a CPU gets several times slower as soon as another process wants a core (docs/notes/cpu.md). torch reads this when it loads.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character the terminal lacks must not end a run
            stream.reconfigure(errors="replace")
    status = _status(main, sys.argv[1:] if arguments is None else arguments)
    try:
        sys.stdout.flush()
    except OSError as error:
        status = status or _refused(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
    sys.exit(status)


def _status(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    try:
        return main(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _refused(error)


def _refused(error: OSError) -> int:
    """Print what the operating system refused. Returns the exit status."""
    if isinstance(error, BrokenPipeError):
        return 141
    where = error.filename if error.filename is not None else "standard output" if error.errno == errno.ENOSPC else None
    print(f"error: {error.strerror or first_line(error)}{'' if where is None else f': {where}'}", file=sys.stderr)
    return 2


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory, unless the user has configured malloc or another malloc is in use.

    By default every large tensor is mapped anew, and the kernel clears its pages one fault at a time: 13 to 30 % of a training
    step of preset demo on a CPU (docs/notes/cpu.md). A process does not grow past its earlier peak.
    """
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(chosen) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def path_text(text: str) -> str:
    """The type of an option that names a file or folder. Expands ~, also after an equals sign."""
    return os.path.expanduser(text)


def make_parser(**options: Any) -> Any:
    """A jsonargparse parser whose errors are one sentence, with the nearest known option."""
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            known = [name for action in self._actions for name in action.option_strings]
            raise UsageError(_sentence(message, known)) from ex

    return Parser(**options)


def _sentence(message: str, known: list[str]) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", message).strip()
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", text) or re.search(r"Option '([\w.]+)' is not accepted", text)
    if unknown is None:
        unknown = re.search(r"Key '([\w.]+)' is not expected", text)
    if unknown is not None:
        option = unknown.group(1).split("=")[0]
        name = option if option.startswith("-") else f"--{option}"
        if not name.startswith("--") and len(name) > 2:
            return f"{option!r} is not an option; options begin with --"
        return f"there is no setting {name}{nearest(name, known)}"
    missing = re.search(r"arguments are required: (.+)", text)
    if missing is not None:
        names = [f"--{name}" if f"--{name}" in known else name.upper() for name in missing.group(1).split(", ")]
        return f"{' and '.join(names)} must be given; --help says what"
    return " ".join(text.split())


def parse_config(parser: Any, arguments: Sequence[str]) -> tuple[Config, Any]:
    """Add every setting to `parser` and parse. Returns the Config and the parsed namespace.

    Settings begin as --preset's. With --resume and no --preset they begin as those of the run --run.name, if it exists.
    """
    preset = _early(arguments, "--preset")
    root, name = path_text(_early(arguments, "--run.root") or "runs"), _early(arguments, "--run.name")
    base = preset_settings(preset or "demo")
    if "--resume" in arguments and preset is None and name is not None and (Path(root) / name / "config.yaml").is_file():
        from atat_fast.runs.folder import read_settings

        base = read_settings(Path(root) / name)
    parser.add_argument("--preset", type=str, default="demo", help=f"Settings to start from: {', '.join(preset_names())}.")
    parser.add_argument("--config", action="config", help="A YAML file of settings that override the preset.")
    groups = [group for group in to_dict(Config()) if group != "preset"]
    fields = {f.name: f.default_factory for f in Config.__dataclass_fields__.values() if f.name in groups}
    for group, kind in fields.items():
        parser.add_class_arguments(kind, group)
    parser.set_defaults(_flat(base))
    parsed = parser.parse_args(list(arguments))
    built = parser.instantiate(parsed)
    config = Config(preset=parsed.preset, **{group: _as(kind, built[group]) for group, kind in fields.items()})
    return config, parsed


def _as(kind: Any, value: Any) -> Any:
    return value if isinstance(value, kind) else kind(**vars(value))


def _early(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option that decides other options' defaults, read before the parser has any."""
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1]
    return None


def _flat(settings: Settings, prefix: str = "") -> Settings:
    flat: Settings = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
