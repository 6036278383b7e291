"""What README.md and docs/ tell a reader to type: Python blocks run as written, commands are taken by the parsers they go to."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import io
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import pytest
import torch

from atat_fast import train
from atat_fast.errors import UsageError
from atat_fast.models import hub

ROOT = Path(__file__).resolve().parents[1]
BENCH, LAUNCH = ROOT / "bench", ROOT / "docs" / "launch"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [path for path in PAGES if path.is_file()]

pytestmark = pytest.mark.skipif(not LAUNCH.is_dir(), reason="the pages are part of a checkout, and here are its tests alone")

CANNOT_RUN = {
    ("docs/mdlm.md", "kuleshov-group/mdlm-owt"): "loads 650 MB from the hub",
    ("docs/hub.md", "push_to_hub("): "uploads to the hub",
}
"""Python blocks that need what is not here: the page, and words of the block. They are compiled, their imports are run, and their
calls of what they import must fit its signature."""


@dataclass(frozen=True)
class Block:
    """A fenced or indented block. page: its path. line: of its first line, from 1. kind: python, or '' where it does not say."""

    page: str
    line: int
    kind: str
    text: str

    @property
    def place(self) -> str:
        """'README.md:67'."""
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> Iterator[Block]:
    """The blocks of a page of Markdown."""
    lines = text.split("\n")
    i = 0
    while i < len(lines):
        fence = re.fullmatch(r"( *)(```+)(\w*) *", lines[i])
        if fence:
            end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == fence[2])
            inside = [line.removeprefix(fence[1]) for line in lines[i + 1 : end]]
            yield Block(page, i + 2, fence[3], "\n".join(inside) + "\n")
            i = end + 1
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            end = next((j for j in range(i, len(lines)) if not lines[j].startswith("    ")), len(lines))
            yield Block(page, i + 1, "", "\n".join(line[4:] for line in lines[i:end]) + "\n")
            i = end
        else:
            i += 1


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


BLOCKS = [block for path in PAGES for block in blocks_of(path.read_text(encoding="utf-8"), page_name(path))]
PYTHON = [block for block in BLOCKS if block.kind == "python"]


# Python


def run_blocks(blocks: list[Block], namespace: dict[str, Any], folder: Path) -> None:
    """Run a page's blocks in one namespace, each as a file, which Triton's kernels have to be in."""
    for block in blocks:
        file = folder.parent / f"{folder.name}-{block.line}.py"
        source = "\n" * (block.line - 1) + block.text  # so that an error names the page's line
        file.write_text(source, encoding="utf-8")
        if reason_not_to_run(block) is None:
            exec(compile(source, str(file), "exec"), namespace)
        else:
            check_calls(block.text)


def reason_not_to_run(block: Block) -> str | None:
    return next((why for (page, words), why in CANNOT_RUN.items() if page == block.page and words in block.text), None)


def check_calls(text: str) -> None:
    """Run a block's imports, and hold calls of what they bring to its signature. Raises what Python does."""
    tree = ast.parse(text)
    names: dict[str, Any] = {}
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "imports", "exec"), names)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        words = ast.unparse(call.func).split(".")
        if words[0] in names:
            function = names[words[0]]
            for word in words[1:]:
                function = getattr(function, word)
            inspect.signature(function).bind(*call.args, **{k.arg: k.value for k in call.keywords if k.arg is not None})


def given_run(folder: Path, trained: Path) -> dict[str, Any]:
    """runs/demo, which README's `make train` leaves."""
    (folder / "runs").mkdir()
    (folder / "runs" / "demo").symlink_to(trained / "runs" / "demo")
    return {}


def given_mdlm(folder: Path, trained: Path) -> dict[str, Any]:
    """What MDLM's own code brings: its checkpoint, and its Lightning module as `diffusion`."""
    spec = importlib.util.spec_from_file_location("plain_mdlm", Path(__file__).parent / "models" / "plain_mdlm.py")
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    diffusion = plain.Diffusion()
    diffusion.mask_index = plain.MASK
    torch.save(diffusion.checkpoint(), folder / "last.ckpt")
    return {"diffusion": diffusion}


GIVEN: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"docs/sampling.md": given_run, "docs/mdlm.md": given_mdlm}
"""Pages whose blocks begin with what is made elsewhere; the others begin with an empty folder and no names."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.jsonl, and runs/demo, small and mine: settings of presets demo and plain, but for sizes and text."""
    root = tmp_path_factory.mktemp("docs")
    (root / "text.jsonl").write_text("".join(f'{{"text": "the list {i} of values is returned {i}"}}\n' for i in range(160)))
    size = {
        "data.corpus": root / "text.jsonl", "data.cache_dir": root / "cache", "model.dim": 32, "model.layers": 1,
        "model.heads": 2, "train.max_steps": 2, "train.global_batch": 4, "eval.every": 2, "eval.sequences": 4,
        "sample.num_samples": 0, "run.root": root / "runs", "run.tensorboard": "false",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atat_fast.report.write_report", lambda folder: folder)
        for preset, name in (("demo", "demo"), ("plain", "small"), ("plain", "mine")):
            settings = {"preset": preset, "run.name": name, **size}
            assert train.main([part for option, value in settings.items() for part in (f"--{option}", str(value))]) == 0
    return root


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}))
def test_the_python_of_a_page_runs_as_written(page, trained, tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    namespace = GIVEN.get(page, lambda *_: {})(folder, trained)
    run_blocks([block for block in PYTHON if block.page == page], namespace, folder)


def test_a_function_that_a_page_defines_can_be_called(tmp_path):
    names: dict[str, Any] = {}
    run_blocks([block for block in PYTHON if block.page == "docs/ops/adaptive_norm.md"], names, tmp_path)
    linear = torch.nn.Linear
    blocks = [
        SimpleNamespace(modulation=linear(4, 48), attend=linear(8, 8), mlp=linear(8, 8), norm1=torch.ones(8), norm2=None)
        for _ in range(2)
    ]
    y = names["blocks_forward"](torch.randn(3, 5, 8), blocks, torch.randn(3, 4), torch.ones(8), linear(4, 16))
    assert y.shape == (3, 5, 8) and y.isfinite().all()


def test_every_exception_is_of_a_block_that_is_there():
    for (page, words), why in CANNOT_RUN.items():
        assert sum(block.page == page and words in block.text for block in PYTHON) == 1, (page, words, why)
    assert set(GIVEN) <= {block.page for block in PYTHON}
    for words, why in PARSED_ONLY.items():
        assert any(words in command.text for command in COMMANDS), (words, why)
    for beginning in TAKEN:
        assert any(beginning in command.text for command in COMMANDS), beginning


# Commands

RUN = ("sample", "evaluate", "push", "convert", "ops")
"""Doors whose commands are run, on a small model. train's end where --dry_run does, and of others the options are parsed."""
PARSED_ONLY = {
    "--zero_shot": "reads seven corpora from the network",
    "--causal_lm": "needs transformers and its weights",
    "--push": "uploads to the hub",
    "--model mdlm-owt": "is about a model from the hub",
}
"""Words of commands of such doors that cannot run here; their options are still parsed."""
TAKEN = {"echo", "hf auth login", "pip install mauve-text", "podman build"}
"""Beginnings of commands that are not ours."""
COMMAND = re.compile(r"(\w+=\S+ )*(python3?|torchrun|make|bash|sbatch|pip|podman|hf|echo|pytest|\.venv/bin/\S+) .*")


class Parsed(Exception):
    """Ends a door once it has read its options."""


@dataclass(frozen=True)
class Command:
    """A line that a reader types, without its prompt. place: where it stands. inside: a sentence, which may name a part of it."""

    place: str
    text: str
    inside: bool = False

    @property
    def page(self) -> str:
        return self.place.split(":")[0]


def commands_of(text: str, page: str) -> Iterator[Command]:
    """The commands of a page, in its order: lines of its blocks, and code inside its sentences."""
    inside = set()
    for block in blocks_of(text, page):
        lines = block.text.split("\n")
        inside |= set(range(block.line, block.line + len(lines)))
        lines = [line.removeprefix("$ ") for line in lines]
        shell = block.kind in ("bash", "sh", "console") or any(COMMAND.match(line) or "-m atat_fast" in line for line in lines)
        for i, line in enumerate(lines) if shell and block.kind != "python" else []:
            if line.strip() and not line.startswith("#"):
                assert COMMAND.match(line), f"{page}:{block.line + i} is of no known command: {line}"
                yield Command(f"{page}:{block.line + i}", line)
    for i, line in enumerate(text.split("\n"), start=1):
        for code in re.findall(r"`([^`]+)`", line) if i not in inside else []:
            if COMMAND.match(code):
                yield Command(f"{page}:{i}", code, inside=True)


COMMANDS = [command for path in PAGES for command in commands_of(path.read_text(encoding="utf-8"), page_name(path))]


def parse_only(door: Callable[[], Any]) -> Any:
    """What a door's parser makes of its options; the door ends there."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
            original = kind.parse_args

            def parse(self: Any, *arguments: Any, original: Any = original, **options: Any) -> Any:
                raise Parsed(original(self, *arguments, **options))

            patch.setattr(kind, "parse_args", parse)
        try:
            door()
        except Parsed as parsed:
            return parsed.args[0]
    raise AssertionError("no options were read")


def check(command: Command, stdin: str = "") -> None:
    """Run or read a command. Raises UsageError, SystemExit or AssertionError where a reader would be refused."""
    *before, last = command.text.split(" | ")
    for part in before:
        assert shlex.split(part)[0] == "echo", part
        stdin = shlex.split(part)[1] + "\n"
    words = [word for word in shlex.split(last, comments=True) if word != "..."]
    while "=" in words[0]:
        words.pop(0)
    if any(" ".join(words).startswith(name) for name in TAKEN):
        return
    program, *words = words
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        with_launcher = get_args_parser().parse_args(words)
        words = ["-m" if with_launcher.module else "", with_launcher.training_script, *with_launcher.training_script_args]
        program = "python"
    if program.startswith("python"):
        check_python(words, stdin, command)
    elif program == "make":
        check_make(words)
    elif program in ("bash", "sbatch"):
        script = next(i for i, word in enumerate(words) if word.startswith("docs/launch/"))
        assert (ROOT / words[script]).is_file(), words[script]
        check_python(["-m", "atat_fast.train", *words[script + 1 :]], stdin, command)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert words[0] == "install", words
        for extra in re.findall(r"atat_fast\[([\w-]+)\]", " ".join(words)):
            assert extra in extras, extra
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in words if "/" in word), words
    else:
        assert program in (".venv/bin/pre-commit", ".venv/bin/pytest"), program


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, setting, _ = word.partition("=")
        assert re.search(rf"^{name} \?=" if setting else rf"^{name}:", makefile, re.MULTILINE), word


def check_python(words: list[str], stdin: str, command: Command) -> None:
    if words[0] != "-m":
        assert words[0].startswith("bench/") and (ROOT / words[0]).is_file(), words
        if "parse_args(" not in (ROOT / words[0]).read_text():
            assert words[1:] == [], words
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(BENCH)
            patch.setenv("ATEN_CPU_CAPABILITY", "avx2")  # a script that finds another value begins anew
            patch.setattr(sys, "argv", [str(ROOT / words[0]), *words[1:]])
            parse_only(lambda: runpy.run_path(str(ROOT / words[0]), run_name="__main__"))
        return
    name, arguments = words[1].removeprefix("atat_fast."), words[2:]
    module = importlib.import_module(f"atat_fast.{name}.__main__" if name in ("ops", "audit") else f"atat_fast.{name}")
    if name == "lm_eval":
        for argument in arguments[1].split(",") if arguments[:1] == ["--model_args"] else []:
            known = {*inspect.signature(module.open_answers).parameters, "likelihood", "draws", "steps", "sampler", "seed"}
            assert argument.split("=")[0] in known, argument
    elif command.inside and not arguments:
        assert '__name__ == "__main__"' in inspect.getsource(module)
    elif not inspect.signature(module.main).parameters:
        assert arguments == [], arguments
    elif name == "train" and not command.inside:
        assert module.main([*arguments, "--dry_run"]) == 0
    elif name not in RUN or command.inside or any(part in " ".join(words) for part in PARSED_ONLY):
        parse_only(lambda: module.main(arguments))
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            assert module.main(arguments) == 0


@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS}))
def test_the_commands_of_a_page_are_taken(page, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATAT_FAST_CACHE", str(trained / "cache"))
    prepare(page, trained, tmp_path)
    for command in COMMANDS:
        if command.page == page:
            try:
                check(command)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{command.place}: {command.text}") from error


def prepare(page: str, trained: Path, folder: Path) -> None:
    """What the commands of a page begin with: trained runs, a saved model, an MDLM checkpoint, and files of a reader's own."""
    shutil.copytree(trained / "runs", folder / "runs", symlinks=True)
    shutil.copy(trained / "text.jsonl", folder)
    (folder / "questions.txt").write_text("The [MASK] of the list\n")
    (folder / "more.jsonl").write_text('{"prompt": "a [MASK]"}\n')
    (folder / "samples.jsonl").write_text('{"text": "the list of values"}\n')
    given_mdlm(folder, trained)
    shutil.copy(folder / "last.ckpt", folder / "mdlm.ckpt")
    if page == "docs/evaluation.md":
        assert hub.main(["--run", "runs/demo", "--out", "demo"]) == 0


def check_page(text: str, folder: Path) -> None:
    run_blocks([block for block in blocks_of(text, "page.md") if block.kind == "python"], {}, folder)
    for command in commands_of(text, "page.md"):
        check(command)


@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        ("```python\nimport math\nprint(tokens)\n```", NameError),
        ("```python\nfrom atat_fast.models.hub import push_to_hub\n\npush_to_hub('copy', secret=True)\n```", TypeError),
        ("    python -m atat_fast.sample --run runs/demo --temprature 1", UsageError),
        ("```\npython -m atat_fast.evaluate --run runs/demo --order confidense\n```", UsageError),
        ("```\ntorchrun --standalone -m atat_fast.train --preset smal\n```", UsageError),
        ("```\ntorchrun --alone -m atat_fast.train\n```", SystemExit),
        ("```bash\nmake trian\n```", AssertionError),
        ("say `python bench/nothing.py`", AssertionError),
        ("say `python bench/throughput.py --variant mdlm --what`", SystemExit),
        ("say `python -m atat_fast.compare --budgets tokens=2M --seedlings 3`", UsageError),
        ("say `pip install 'atat_fast[speed]'`", AssertionError),
        ("    bash docs/launch/ten_cards.sh", AssertionError),
        ("```\npyton -m atat_fast.train\n```", AssertionError),
        ("```sh\ncurl -O https://example.org\n```", AssertionError),
    ],
)
def test_what_is_wrong_in_a_page_is_found(page, wrong, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "runs", tmp_path / "runs", symlinks=True)
    if "push_to_hub" in page:
        monkeypatch.setitem(CANNOT_RUN, ("page.md", "push_to_hub("), "uploads to the hub")
    with pytest.raises(wrong):
        check_page(page, tmp_path)


# Options that messages name

DOORS = ("train", "evaluate", "sample", "report", "compare", "playground", "convert", "push")
OTHERS = {
    "--standalone",
    "--nproc-per-node",
    "--no-build-isolation",
    "--always",
    "--dirty",
    "--model_args",
    "--tasks",
    "--gen_kwargs",
    "--group.setting",
}
"""Options of torchrun, pip, git and lm-eval, and what stands for any of ours."""


def options_of(door: str) -> set[str]:
    """The options of a door's parser."""
    found: list[set[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):

            def parse(self: Any, *_: Any, **__: Any) -> Any:
                found.append({option for action in self._actions for option in action.option_strings})
                raise Parsed

            patch.setattr(kind, "parse_args", parse)
        with pytest.raises(Parsed):
            importlib.import_module(f"atat_fast.{door}").main([])
    return found[0]


def named_options(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, option) of every whole --option in the strings of a tree, but for CSS's var(--name) and --name: value."""
    for node in ast.walk(tree):
        parts: list[ast.expr] = (
            node.values if isinstance(node, ast.JoinedStr) else [node] if isinstance(node, ast.Constant) else []
        )
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{" for part in parts)
        for option in re.findall(r"(?<![\w(-])--[a-zA-Z][\w.-]*+(?![{:])", text):
            yield node.lineno, option.rstrip(".-")


def test_every_option_that_a_message_names_is_there():
    takes = {door: options_of(door) for door in DOORS}
    known = set().union(*takes.values()) | OTHERS
    assert all("--tokenizer" in takes[door] for door in ("evaluate", "sample", "playground"))
    wrong = []
    for path in sorted((ROOT / "atat_fast").rglob("*.py")):
        module = path.relative_to(ROOT / "atat_fast").with_suffix("").as_posix().replace("/", ".")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [f"{module}:{line} {option}" for line, option in named_options(tree) if option not in known]
        own = takes.get(module, known)
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise):
                wrong += [f"{module}:{line} {option}" for line, option in named_options(node) if option not in own]
    assert wrong == [], "\n".join(wrong)
