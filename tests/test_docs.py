"""What README.md and docs/ tell a reader to type: Python blocks run as written, commands are taken by the parsers they go to."""

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
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jsonargparse
import plain_mdlm
import pytest
import torch
from torch.distributed.run import get_args_parser

from atat_fast import push, train
from atat_fast.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
BENCH, LAUNCH = ROOT / "bench", ROOT / "docs" / "launch"
PAGES = [
    path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.is_file()
]
pytestmark = pytest.mark.skipif(not LAUNCH.is_dir(), reason="the pages are part of a checkout, and here are its tests alone")
CANNOT_RUN = {
    ("docs/mdlm.md", "kuleshov-group/mdlm-owt"): "loads 650 MB from the hub",
    ("docs/hub.md", "push_to_hub("): "uploads to the hub",
}
"""Python blocks that need what is not here: the page, and words of the block. They are compiled, their imports are run, and their
calls of what they import must fit its signature."""


class Block(NamedTuple):
    """A fenced or indented block. page: its path. line: of its first line, from 1. kind: python, or '' if it does not say."""

    page: str
    line: int
    kind: str
    text: str


def blocks_of(text, page):
    """The blocks of a page of Markdown."""
    lines, i = text.split("\n"), 0
    while i < len(lines):
        fence = re.fullmatch(r"( *)(```+)(\w*) *", lines[i])
        if fence:
            end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == fence[2])
            inside = [line.removeprefix(fence[1]) for line in lines[i + 1 : end]]
            yield Block(page, i + 2, fence[3], "\n".join(inside) + "\n")
            i = end
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            end = next((j for j in range(i, len(lines)) if not lines[j].startswith("    ")), len(lines))
            yield Block(page, i + 1, "", "\n".join(line[4:] for line in lines[i:end]) + "\n")
            i = end - 1
        i += 1


TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
PYTHON = [block for page, text in TEXTS.items() for block in blocks_of(text, page) if block.kind == "python"]


def run_blocks(blocks, namespace, folder):
    """Run a page's blocks in one namespace, each as a file, which Triton's kernels have to be in."""
    for block in blocks:
        file, source = folder.parent / f"{folder.name}-{block.line}.py", "\n" * (block.line - 1) + block.text
        file.write_text(source, encoding="utf-8")  # with the page's line numbers, which an error then names
        if any(page == block.page and words in block.text for page, words in CANNOT_RUN):
            check_calls(block.text)
        else:
            exec(compile(source, str(file), "exec"), namespace)


def check_calls(text):
    """Run a block's imports, and hold calls of what they bring to its signature. Raises what Python does."""
    tree, names = ast.parse(text), {}
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "imports", "exec"), names)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, *words = ast.unparse(call.func).split(".")
        if first in names:
            function = names[first]
            for word in words:
                function = getattr(function, word)
            inspect.signature(function).bind(*call.args, **{k.arg: k.value for k in call.keywords if k.arg is not None})


def given_run(folder, trained):
    """runs/demo, which README's `make train` leaves."""
    (folder / "runs").mkdir()
    (folder / "runs" / "demo").symlink_to(trained / "runs" / "demo")
    return {}


def given_mdlm(folder, trained):
    """What MDLM's own code brings: its checkpoint, and its Lightning module as `diffusion`."""
    diffusion = plain_mdlm.Diffusion()
    diffusion.mask_index = plain_mdlm.MASK
    torch.save(diffusion.checkpoint(), folder / "last.ckpt")
    return {"diffusion": diffusion}


GIVEN = {"docs/sampling.md": given_run, "docs/mdlm.md": given_mdlm}
"""Pages whose blocks begin with what is made elsewhere; the others begin with an empty folder and no names."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
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
        settings = [f"--{name}={value}" for name, value in size.items()]
        for preset, name in (("demo", "demo"), ("plain", "small")):
            assert train.main([f"--preset={preset}", f"--run.name={name}", *settings]) == 0
    shutil.copytree(root / "runs" / "small", root / "runs" / "mine", symlinks=True)
    return root


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}))
def test_the_python_of_a_page_runs_as_written(page, trained, tmp_path, monkeypatch):
    (folder := tmp_path / "empty").mkdir()
    monkeypatch.chdir(folder)
    names = GIVEN.get(page, lambda *_: {})(folder, trained)
    run_blocks([block for block in PYTHON if block.page == page], names, folder)
    if page == "docs/ops/adaptive_norm.md":  # it defines a function, which can be called
        linear = torch.nn.Linear
        block = {"modulation": linear(4, 48), "attend": linear(8, 8), "mlp": linear(8, 8), "norm1": torch.ones(8), "norm2": None}
        rest = [SimpleNamespace(**block)] * 2, torch.randn(3, 4), torch.ones(8), linear(4, 16)
        y = names["blocks_forward"](torch.randn(3, 5, 8), *rest)
        assert y.shape == (3, 5, 8) and y.isfinite().all()


RUN = ("sample", "evaluate", "push", "convert", "ops")
"""Commands that are run, on a small model. train ends where --dry_run does, and of others the options are parsed."""
PARSED_ONLY = {
    "--zero_shot": "reads seven corpora from the network",
    "--causal_lm": "needs transformers and its weights",
    "--push": "uploads to the hub",
    "--model mdlm-owt": "is about a model from the hub",
}
"""Words of such commands that cannot run here; their options are still parsed."""
TAKEN = {"echo", "hf auth login", "pip install mauve-text", "podman build"}
"""Beginnings of commands that are not ours."""
COMMAND = re.compile(r"(\w+=\S+ )*(python3?|torchrun|make|bash|sbatch|pip|podman|hf|echo|pytest|\.venv/bin/\S+) .*")


class Command(NamedTuple):
    """A line that a reader types, without its prompt. inside: a sentence, which may name a part of it."""

    page: str
    line: int
    text: str
    inside: bool = False


def commands_of(text, page):
    """The commands of a page: lines of its blocks, and code inside its sentences."""
    inside = set()
    for block in blocks_of(text, page):
        lines = [line.removeprefix("$ ") for line in block.text.split("\n")]
        inside |= set(range(block.line, block.line + len(lines)))
        shell = block.kind in ("bash", "sh", "console") or any(COMMAND.match(line) or "-m atat_fast" in line for line in lines)
        for i, line in enumerate(lines, start=block.line) if shell and block.kind != "python" else []:
            if line.strip() and not line.startswith("#"):
                assert COMMAND.match(line), f"{page}:{i} is of no known command: {line}"
                yield Command(page, i, line)
    for i, line in enumerate(text.split("\n"), start=1):
        for code in re.findall(r"`([^`]+)`", line) if i not in inside else []:
            if COMMAND.match(code):
                yield Command(page, i, code, inside=True)


COMMANDS = [command for page, text in TEXTS.items() for command in commands_of(text, page)]


class Parsed(Exception):
    """Ends a command once it has read its options."""


def at_its_parser(main, give):
    """Call a command's main; what `give(parser, parse)` makes of its parser. The command ends there."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):

            def parse(self, *arguments, original=kind.parse_args, **options):
                raise Parsed(give(self, lambda: original(self, *arguments, **options)))

            patch.setattr(kind, "parse_args", parse)
        with pytest.raises(Parsed) as parsed:
            main()
    return parsed.value.args[0]


def check(command, stdin=""):
    """Run or read a command. Raises UsageError, SystemExit or AssertionError if a reader would be refused."""
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
        given = get_args_parser().parse_args(words)
        check_python(["-m" if given.module else "", given.training_script, *given.training_script_args], stdin, command)
    elif program.startswith("python"):
        check_python(words, stdin, command)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words:
            name, setting, _ = word.partition("=")
            assert re.search(rf"^{name} \?=" if setting else rf"^{name}:", makefile, re.MULTILINE), word
    elif program in ("bash", "sbatch"):
        script = next(i for i, word in enumerate(words) if word.startswith("docs/launch/"))
        assert (ROOT / words[script]).is_file(), words[script]
        check_python(["-m", "atat_fast.train", *words[script + 1 :]], stdin, command)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert words[0] == "install" and set(re.findall(r"atat_fast\[([\w-]+)\]", " ".join(words))) <= set(extras), words
    else:
        assert program in ("pytest", ".venv/bin/pre-commit", ".venv/bin/pytest"), program
        assert program != "pytest" or all((ROOT / word).exists() for word in words if "/" in word), words


def check_python(words, stdin, command):
    with pytest.MonkeyPatch.context() as patch:
        if words[0] != "-m":
            script = ROOT / words[0]
            assert words[0].startswith("bench/") and script.is_file(), words
            if "parse_args(" not in script.read_text():
                assert words[1:] == [], words
                return
            patch.syspath_prepend(BENCH)
            patch.setenv("ATEN_CPU_CAPABILITY", "avx2")  # a script that finds another value begins anew
            patch.setattr(sys, "argv", [str(script), *words[1:]])
            at_its_parser(lambda: runpy.run_path(str(script), run_name="__main__"), lambda parser, parse: parse())
            return
        name, arguments = words[1].removeprefix("atat_fast."), words[2:]
        folder = (ROOT / "atat_fast" / name).is_dir()
        module = importlib.import_module(f"atat_fast.{name}.__main__" if folder else f"atat_fast.{name}")
        if name == "lm_eval":
            known = {*inspect.signature(module.open_answers).parameters, "likelihood", "draws", "steps", "sampler", "seed"}
            for argument in arguments[1].split(",") if arguments[:1] == ["--model_args"] else []:
                assert argument.split("=")[0] in known, argument
        elif command.inside and not arguments:
            assert '__name__ == "__main__"' in inspect.getsource(module)
        elif not inspect.signature(module.main).parameters:
            assert arguments == [], arguments
        elif name == "train" and not command.inside:
            assert module.main([*arguments, "--dry_run"]) == 0
        elif name not in RUN or command.inside or any(part in " ".join(words) for part in PARSED_ONLY):
            at_its_parser(lambda: module.main(arguments), lambda parser, parse: parse())
        else:
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            assert module.main(arguments) == 0


@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS}))
def test_the_commands_of_a_page_are_taken(page, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATAT_FAST_CACHE", str(trained / "cache"))
    shutil.copytree(trained / "runs", tmp_path / "runs", symlinks=True)
    shutil.copy(trained / "text.jsonl", tmp_path)
    (tmp_path / "questions.txt").write_text("The [MASK] of the list\n")
    (tmp_path / "more.jsonl").write_text('{"prompt": "a [MASK]"}\n')
    (tmp_path / "samples.jsonl").write_text('{"text": "the list of values"}\n')
    given_mdlm(tmp_path, trained)
    shutil.copy("last.ckpt", "mdlm.ckpt")
    if page == "docs/evaluation.md":
        assert push.main(["--run", "runs/demo", "--out", "demo"]) == 0
    for command in (command for command in COMMANDS if command.page == page):
        try:
            check(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}:{command.line}: {command.text}") from error


def check_page(text, folder):
    run_blocks([block for block in blocks_of(text, "page.md") if block.kind == "python"], {}, folder)
    for command in commands_of(text, "page.md"):
        check(command)


@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        ("```python\nimport math\nprint(tokens)\n```", NameError),
        ("```python\nfrom atat_fast.models.hub import push_to_hub\n\npush_to_hub('copy', secret=True)\n```", TypeError),
        ("    python -m atat_fast.sample --run runs/demo --temprature 1", UsageError),
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


def test_every_exception_is_of_a_block_or_command_that_is_there():
    for page, words in CANNOT_RUN:
        assert sum(block.page == page and words in block.text for block in PYTHON) == 1, (page, words)
    assert set(GIVEN) <= {block.page for block in PYTHON}
    for words in (*PARSED_ONLY, *TAKEN):
        assert any(words in command.text for command in COMMANDS), words


COMMANDS_WITH_OPTIONS = ("train", "evaluate", "sample", "report", "compare", "playground", "convert", "push")
OTHERS = {
    "--standalone", "--nproc-per-node", "--no-build-isolation", "--always", "--dirty", "--model_args", "--tasks", "--gen_kwargs",
    "--group.setting",
}  # fmt: skip
"""Options of torchrun, pip, git and lm-eval, and what stands for any of ours."""


def options_of(name):
    """The options of a command's parser."""
    main = importlib.import_module(f"atat_fast.{name}").main
    return at_its_parser(lambda: main([]), lambda parser, _: {o for action in parser._actions for o in action.option_strings})


def named_options(tree):
    """(line, option) of every whole --option in the strings of a tree, but for CSS's var(--name) and --name: value."""
    for node in ast.walk(tree):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node] if isinstance(node, ast.Constant) else []
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{" for part in parts)
        for option in re.findall(r"(?<![\w(-])--[a-zA-Z][\w.-]*+(?![{:])", text):
            yield node.lineno, option.rstrip(".-")


def test_every_option_that_a_message_names_is_there():
    takes = {name: options_of(name) for name in COMMANDS_WITH_OPTIONS}
    known = set().union(*takes.values()) | OTHERS
    assert all("--tokenizer" in takes[name] for name in ("evaluate", "sample", "playground"))
    wrong = []
    for path in sorted((ROOT / "atat_fast").rglob("*.py")):
        module = path.relative_to(ROOT / "atat_fast").with_suffix("").as_posix().replace("/", ".")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = takes.get(module, known)
        wrong += [f"{module}:{line} {option}" for line, option in named_options(tree) if option not in known]
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Raise)):
            wrong += [f"{module}:{line} {option}" for line, option in named_options(node) if option not in own]
    assert wrong == [], "\n".join(wrong)
