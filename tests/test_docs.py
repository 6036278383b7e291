"""README, the pages under docs and the source's messages: code runs as it is written there, and every option named exists."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import jsonargparse
import pytest

from atat_fast.config import Config, ModelConfig
from atat_fast.data import hub as network
from atat_fast.data.tokenizers import make_tokenizer
from atat_fast.models import DiT, hub
from atat_fast.training import checkpoint

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOORS = ("train", "evaluate", "sample", "report", "compare", "playground", "models.convert", "models.hub")
NOT_RUN = {
    ("docs/mdlm.md", 0): "reads MDLM's published checkpoint from the network, and files of a training that the reader did",
    ("docs/philox.md", 1): "C++: a part of a file; tests/ops/rules_on_host.cu compiles the header",
}
"""Blocks of Python and C++ that are not run, by page and number. What they import is imported all the same."""
FOREIGN = {
    "--model_args", "--tasks", "--model", "--gen_kwargs",  # lm-eval's
    "--always", "--dirty",  # git's
    "--standalone", "--nproc-per-node", "--nnodes",  # torchrun's
    "--no-build-isolation",  # pip's
    "--group.setting",  # stands for any
}  # fmt: skip
"""Options that belong to other programs."""
REACHED_FROM = {
    "data/zero_shot.py": ("evaluate",),
    "evaluation/generation.py": ("evaluate",),
    "evaluation/measure.py": ("evaluate",),
    "evaluation/precision.py": ("evaluate",),
    "models/mdlm.py": ("models.convert",),
    "models/mdlm_files.py": ("models.convert",),
    "training/comparison.py": ("compare",),
}
"""Files below the commands whose messages speak to one of them."""
ASKED_OF = {("models/hub.py", "--tokenizer"): ("evaluate", "playground", "sample")}
"""Options that a command's own file names for other commands: for all of these."""


class Block(NamedTuple):
    """A block of a page: its language, its number among those of its kind, and its text."""

    page: str
    number: int
    language: str
    text: str
    line: int


def blocks(path: Path) -> Iterator[Block]:
    """Fenced blocks; those without a language are commands. Python and C++ are counted together."""
    numbers = {True: -1, False: -1}
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for match in found:
        code = match[1] in ("python", "cpp")
        numbers[code] += 1
        line = match.string.count("\n", 0, match.start()) + 1
        yield Block(str(path.relative_to(ROOT)), numbers[code], match[1], match[2], line)


ALL = [block for path in PAGES for block in blocks(path)]
CODE = [block for block in ALL if block.language in ("python", "cpp")]


def commands(path: Path) -> list[str]:
    """Every command of ours on a page: in blocks, in indented lines, and in spans of code."""
    text = path.read_text(encoding="utf-8")
    fenced = "\n".join(block.text for block in blocks(path) if block.language not in ("python", "cpp", "yaml", "text"))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [*fenced.replace("\\\n", " ").split("\n"), *re.findall(r"^ {4,}(.*)$", prose, re.MULTILINE)]
    lines += [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    found = []
    for line in lines:
        for part in re.split(r"\s\|\s|\s&&\s|;\s", line):
            part = re.sub(r"\s#.*|(?<=\s)\.\.\.|\s\[.*?\]$", "", part).strip()
            if re.match(r"(\w+=\S+ )*(torchrun .*-m |(\S*/)?python3? -m )atat_fast|(\w+=\S+ )*python3? bench/", part):
                found.append(part)
    return found


class Parsed(Exception):
    """A parser was asked to parse: which, and what it made of it."""

    def __init__(self, parser: argparse.ArgumentParser, values: object) -> None:
        super().__init__()
        self.parser, self.values = parser, values

    @property
    def options(self) -> set[str]:
        return {name for action in self.parser._actions for name in action.option_strings}


def parse(main: Callable[..., object], arguments: list[str] | None) -> Parsed:
    """What a command's own parser makes of its arguments, None for only the parser. Nothing after it runs.

    Raises AssertionError with the parser's words where it refuses.
    """
    kinds = (jsonargparse.ArgumentParser, argparse.ArgumentParser)
    own = {kind: kind.parse_args for kind in kinds}

    def stop(self, args=None, *rest, **options):
        for kind in kinds:
            kind.parse_args = own[kind]
        raise Parsed(self, None if arguments is None else self.parse_args(args, *rest, **options))

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["command", *(arguments or [])])
        for kind in kinds:
            patch.setattr(kind, "parse_args", stop)
        try:
            main(*([list(arguments or [])] if main.__code__.co_argcount else []))
        except Parsed as parsed:
            return parsed
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{' '.join(arguments or [])}: {said.getvalue() or error}") from error
        finally:
            for kind in kinds:
                kind.parse_args = own[kind]
    raise AssertionError("the command parsed nothing")


def script(name: str) -> Callable[..., object]:
    """`main` of a file of bench/."""
    path = ROOT / "bench" / name
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        specification = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
        module = importlib.util.module_from_spec(specification)
        patch.setitem(sys.modules, specification.name, module)
        specification.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def doors() -> dict[str, set[str]]:
    """The options of each command, settings among them."""
    return {door: parse(importlib.import_module(f"atat_fast.{door}").main, None).options for door in DOORS}


def check_command(command: str) -> None:
    """Raise AssertionError where a parser refuses, or a file of bench/ is not there."""
    words = shlex.split(command, comments=True)
    while re.match(r"\w+=", words[0]):
        words.pop(0)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words[1:])
        words = ["python", "-m", given.training_script, *given.training_script_args]
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
        if len(words) > 2:
            parse(script(Path(words[1]).name), words[2:])
        return
    assert importlib.util.find_spec(words[2]) is not None, f"there is no {words[2]}"
    door = words[2].removeprefix("atat_fast.")
    if door in DOORS and len(words) > 3:
        parse(importlib.import_module(words[2]).main, [word for word in words[3:] if word != "SETTINGS"])


COMMANDS = [(str(path.relative_to(ROOT)), command) for path in PAGES for command in commands(path)]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(page, command):
    check_command(command)


def test_commands_are_found_and_wrong_ones_refused():
    assert len(COMMANDS) > 40 and {page for page, _ in COMMANDS} >= {"README.md", "docs/hub.md", "docs/sampling.md"}
    for command in (
        "python -m atat_fast.train --train.max_stepps 3",
        "torchrun --standalone -m atat_fast.train --preset nothing",
        "torchrun --standalonee -m atat_fast.train",
        "python -m atat_fast.sample --run a --sampel",
        "python -m atat_fast.report --runs a",
        "python -m atat_fast.nothing",
        "python bench/nothing.py",
        "python bench/throughput.py --nothing",
    ):
        with pytest.raises((AssertionError, SystemExit)):
            check_command(command)


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for path in PAGES for name in re.findall(r"(?:^|`)make ([a-z]+)\b", path.read_text(), re.MULTILINE)}
    assert len(named) > 3 and named <= targets


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder but for what the commands of the pages have left there: a run called demo, and its saved model."""
    tokenizer = make_tokenizer("bytes")
    config = Config(model=ModelConfig(dim=16, layers=1, heads=2, length=64, conditioning_dim=8, dropout=0.0))
    model = DiT(tokenizer.model_vocab_size, tokenizer.mask_id, **vars(config.model))
    files = {name: dict(model.named_parameters()) for name in (checkpoint.WEIGHTS, checkpoint.EMA)}
    facts = {"vocabulary": tokenizer.model_vocab_size}
    checkpoint.save(tmp_path / "runs" / "demo", 1, config, files, tokenizer, facts)
    hub.save_pretrained(tmp_path / "demo", hub.open_run(tmp_path / "runs" / "demo", "best", average=True))
    monkeypatch.chdir(tmp_path)

    class Api:
        def create_repo(self, repository, **options):
            return f"hub/{repository}"

        def upload_folder(self, **options):
            assert Path(options["folder_path"]).is_dir()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(network, "reachable", lambda: True)
    return tmp_path


def mdlm() -> object:
    """MDLM's own module, which a page takes from its reader."""
    specification = importlib.util.spec_from_file_location("plain_mdlm", ROOT / "tests" / "models" / "plain_mdlm.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.Diffusion(vocabulary=50_258)


GIVEN: dict[str, Callable[[], dict[str, object]]] = {"docs/mdlm.md": lambda: {"diffusion": mdlm()}}
"""What a page's reader brings."""


@pytest.mark.parametrize("page", sorted({block.page for block in CODE}))
def test_blocks_run_as_they_are_written(page, home, monkeypatch):
    """The blocks of one page, one after the other, in one namespace."""
    names: dict[str, object] = {"__name__": page, **GIVEN.get(page, dict)()}
    for block in CODE:
        if block.page != page:
            continue
        if (page, block.number) in NOT_RUN:
            run = [] if block.language == "cpp" else [n for n in ast.parse(block.text).body if "Import" in type(n).__name__]
            exec(compile(ast.Module(run, []), page, "exec"), dict(names))
            continue
        file = home / f"block_{block.number}.py"  # a file, because Triton reads the source of its kernels
        file.write_text(block.text, encoding="utf-8")
        exec(compile(block.text, str(file), "exec"), names)


def test_the_table_of_blocks_that_are_not_run_is_of_blocks_that_are_there():
    assert set(NOT_RUN) <= {(block.page, block.number) for block in CODE}
    assert len(CODE) > 9 and {block.language for block in ALL} <= {"", "python", "cpp", "bash", "sh", "console", "yaml", "text"}


def messages(path: Path) -> Iterator[str]:
    """Texts of a source file: f-strings as one, with U+FFFC for what is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\ufffc" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def options_in(text: str) -> list[str]:
    """Options that a text names, but not properties of a style sheet."""
    style = set(re.findall(r"(--[\w-]+):|var\((--[\w-]+)", text))
    found = re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)
    return [option for option in found if not any(option in pair for pair in style)]


SOURCES = sorted((ROOT / "atat_fast").rglob("*.py"))


def wrong_options(where: str, text: str, doors: dict[str, set[str]]) -> list[str]:
    """Options that a text in a file of atat_fast names and that the command it speaks of does not have."""
    if "--" not in text:
        return []
    named = [door for door in DOORS if f"atat_fast.{door} " in f"{text} "]
    own = where.removesuffix(".py").replace("/", ".")
    wrong = []
    for option in options_in(text):
        if option in FOREIGN:
            continue
        if (where, option) in ASKED_OF:
            right = all(option in doors[door] for door in ASKED_OF[where, option])
        else:
            speaks_of = named or ([own] if own in DOORS else REACHED_FROM.get(where, DOORS))
            right = any(option in doors[door] for door in speaks_of)
        if not right:
            wrong.append(option)
    return wrong


def test_every_option_in_a_message_exists(doors):
    wrong = [
        (where, option)
        for path in SOURCES
        for text in messages(path)
        for where in [str(path.relative_to(ROOT / "atat_fast"))]
        for option in wrong_options(where, text, doors)
    ]
    assert not wrong, wrong


def test_options_that_do_not_exist_are_found(doors):
    assert wrong_options("playground.py", "say --tokeniser gpt2", doors) == ["--tokeniser"]
    assert wrong_options("report.py", "give --checkpoint best", doors) == ["--checkpoint"]
    assert wrong_options("data/zero_shot.py", "python -m atat_fast.sample --zero_shot all", doors) == ["--zero_shot"]
    assert wrong_options("training/plan.py", "--train.micro_batch 4 and --train.micro_bath 4", doors) == ["--train.micro_bath"]
