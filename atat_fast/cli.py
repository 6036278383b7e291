"""What the command-line doors share: settings from presets, files and the command line, and errors in one sentence.

Presets are laid over the defaults, a --config file over the preset, and dotted options over both:

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


def run_door(door: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> None:
    """Run a door and leave: status 0, or 2 after one sentence on standard error where the user can put it right, as where the
    operating system refuses something. Ctrl-C leaves silently with 130, and a reader of our output that went away with 141.

    GNU OpenMP's threads spin only briefly while they wait, unless the user says otherwise: by default they spin so long that
    training on a CPU gets several times slower as soon as another process wants a core (docs/notes/cpu.md). torch reads this
    when it loads.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal's encoding lacks is no reason to lose a run
            stream.reconfigure(errors="replace")
    status = _status(door, sys.argv[1:] if arguments is None else arguments)
    try:
        sys.stdout.flush()
    except OSError as error:
        status = status or _refused(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
    sys.exit(status)


def _status(door: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    try:
        return door(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _refused(error)


def _refused(error: OSError) -> int:
    """Say what the operating system refused; the status to leave with."""
    if isinstance(error, BrokenPipeError):
        return 141
    where = error.filename if error.filename is not None else "standard output" if error.errno == errno.ENOSPC else None
    print(f"error: {error.strerror or first_line(error)}{'' if where is None else f': {where}'}", file=sys.stderr)
    return 2


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for what is allocated next, unless the user has set its malloc up, or another is in use.

    By default every large tensor is mapped anew, and the kernel clears its pages one fault at a time: 13 to 30 % of a training
    step of preset demo on a CPU (docs/notes/cpu.md). What a process holds does not grow past what it held at once before.
    """
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(chosen) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def path_text(text: str) -> str:
    """The type of an option that names a file or folder: ~ is the home folder, however the option is written."""
    return os.path.expanduser(text)


def make_parser(**options: Any) -> Any:
    """A jsonargparse parser whose complaints are one sentence, with the nearest known option."""
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
    """Add every setting to `parser`, parse, and give the Config beside the parsed namespace.

    The preset is --preset's, or with --resume the settings of the run named by --run.name where there is one.
    """
    preset = _early(arguments, "--preset")
    root, name = path_text(_early(arguments, "--run.root") or "runs"), _early(arguments, "--run.name")
    base = preset_settings(preset or "demo")
    if "--resume" in arguments and preset is None and name is not None and (Path(root) / name / "config.yaml").is_file():
        from atat_fast.runs.folder import read_settings

        base = read_settings(Path(root) / name)
    parser.add_argument("--preset", type=str, default="demo", help=f"Settings to begin with: {', '.join(preset_names())}.")
    parser.add_argument("--config", action="config", help="A YAML file of settings, laid over the preset.")
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
    """The value of an option that decides the others' defaults, read before they exist."""
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
