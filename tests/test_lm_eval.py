"""What the harness is told: likelihoods against enumeration, windows, generations; and the harness itself."""

from __future__ import annotations

import itertools
import json
import math
import sys
import types

import pytest
import torch

from atat_fast import lm_eval as adapter
from atat_fast.config import TrainConfig
from atat_fast.data.tokenizers import Tokenizer, make_tokenizer
from atat_fast.errors import UsageError
from atat_fast.evaluation.orders import EXACT, order_nll
from atat_fast.hardware.compute import resolve
from atat_fast.models.dit import DiT

LENGTH = 12


@pytest.fixture(scope="module")
def parts():
    tokenizer = make_tokenizer("bytes")
    torch.manual_seed(8)
    model = DiT(tokenizer.model_vocab_size, tokenizer.mask_id, dim=16, layers=1, heads=2, length=LENGTH, dropout=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.03 if "modulation" in name else 0.4))
        model.head.weight.mul_(0.3)
    return model.eval(), tokenizer, resolve(TrainConfig(device="cpu", dtype="fp32"))


def answers(parts, **options):
    return adapter.Answers(*parts, **options)


@torch.no_grad()
def logp(model, ids):
    return torch.log_softmax(model.logits(model.features(torch.tensor([ids]))).double(), -1)


def bound(model, given, part):
    """The conditional bound by its definition, over every mask."""
    total, m = 0.0, len(part)
    for k in range(1, m + 1):
        sets = list(itertools.combinations(range(m), k))
        for chosen in sets:
            ids = given + [model.mask_id if i in chosen else t for i, t in enumerate(part)]
            p = logp(model, ids)
            total -= sum(float(p[len(given) + i, part[i]]) for i in chosen) / k / len(sets)
    return total


def test_short_continuations_are_bounded_without_chance(parts):
    model, tokenizer, _ = parts
    for context, text in (("ab", "c"), ("a ", "bcd"), ("", "xyz")):
        said, _ = answers(parts, draws=64, batch=3).continuation(context, text)
        given = list(context.rstrip().encode()) or [tokenizer.eos_id]
        part = list((context[len(context.rstrip()) :] + text).encode())
        assert said == pytest.approx(-bound(model, given, part), rel=1e-5)
        assert said == answers(parts, draws=64, batch=3, seed=9).continuation(context, text)[0]


def test_longer_ones_by_draws_that_agree_with_every_mask(parts):
    model, _, _ = parts
    truth = -bound(model, list(b"ab"), list(b"cdefgh"))
    found = [answers(parts, draws=10, seed=seed).continuation("ab", "cdefgh")[0] for seed in range(24)]
    mean = sum(found) / len(found)
    spread = math.sqrt(sum((value - mean) ** 2 for value in found) / len(found) / (len(found) - 1))
    assert abs(mean - truth) < 4 * spread and spread > 0


@torch.no_grad()
@pytest.mark.parametrize("likelihood", EXACT)
def test_an_order_is_that_of_the_evaluation(parts, likelihood):
    x = torch.tensor([list(b"ab cd")])
    want, _ = order_nll(parts[0], x, torch.arange(5)[None] >= 2, likelihood, per_pass=2)
    assert answers(parts, likelihood=likelihood, per_pass=2).continuation("ab", " cd")[0] == pytest.approx(-float(want))


def test_left_to_right_by_hand_and_greedy(parts):
    model, _, _ = parts
    one = answers(parts, likelihood="left_to_right")
    ids, nll = list(b"ab"), 0.0
    best = []
    for step in range(3):
        p = logp(model, ids + best + [model.mask_id] * (3 - step))[2 + step]
        best.append(int(p.argmax()))
        nll -= float(p.max())
    said, greedy = one._scored(ids, best)
    assert said == pytest.approx(nll, rel=1e-5) and greedy
    assert not one._scored(ids, [best[0], best[1], (best[2] + 1) % 256])[1]


def test_windows_score_each_token_once_with_the_most_before_it(parts):
    one = answers(parts)
    after = list(range(30))
    windows = list(one._windows([99], after))
    assert [t for _, part in windows for t in part] == after
    assert [len(part) for _, part in windows] == [11, 11, 8]
    assert windows[0][0] == [99] and windows[1][0] == [10] and windows[2][0] == list(range(18, 22))
    assert all(len(given) + len(part) == LENGTH for given, part in windows)
    ((given, part),) = one._windows(list(range(50, 70)), [1, 2])
    assert given == list(range(60, 70)) and part == [1, 2]  # a long context loses its beginning


def test_a_text_is_the_sum_of_its_windows(parts):
    one = answers(parts, likelihood="left_to_right")
    text = "a text of more than twelve bytes"
    total = sum(one._scored(given, part)[0] for given, part in one._windows([one.tokenizer.eos_id], list(text.encode())))
    assert one.whole(text) == pytest.approx(-total) and one.whole("") == 0.0
    assert one.continuation("", text)[0] == pytest.approx(-total)


def test_generations_stop_where_they_should(parts, monkeypatch):
    one, seen = answers(parts), {}

    def fill(model, ids, **options):
        seen.update(options, masks=int((ids == model.mask_id).sum()))
        return torch.where(ids == model.mask_id, torch.tensor(list(b"xy\nz.q!12345"))[: ids.shape[1]].expand_as(ids), ids)

    monkeypatch.setattr(adapter, "sample", fill)
    said = one.generated("a", stops=["\n", "q"], most=9, temperature=0.0, sample_id=4)
    assert said == "y" and seen["masks"] == 9 and seen["steps"] == 9 and seen["temperature"] == 0
    assert seen["sample_ids"].tolist() == [4]
    one.generated("a", stops=[], most=None, temperature=0.7, top_k=3, top_p=0.5, sample_id=0)
    assert seen["masks"] == LENGTH // 2 and (seen["temperature"], seen["top_k"], seen["top_p"]) == (0.7, 3, 0.5)
    assert one.generated("a", stops=[], most=0, temperature=0.0, sample_id=0) == ""


def test_a_context_keeps_what_fits_of_its_end_and_that_is_said_once(parts, monkeypatch, capsys):
    one, given = answers(parts), []

    def fill(model, ids, **_):
        given.append(ids[0][ids[0] != model.mask_id].tolist())
        assert ids.shape[1] <= LENGTH
        return ids.masked_fill(ids == model.mask_id, 120)

    monkeypatch.setattr(adapter, "sample", fill)
    for context, most in (("ab", 9), ("a long context", 4), ("a long context", 11), ("a long context", None), ("", 3), ("\n", 3)):
        one.generated(context, stops=[], most=most, temperature=0.0, sample_id=0)
    eos = one.tokenizer.eos_id
    assert given == [[*b"ab"], [*b" context"], [*b"ontext"], [*b"ontext"], [eos], [10]]
    (note,) = capsys.readouterr().err.splitlines()
    assert "a context of 14 tokens and max_gen_toks 4 are more than this model's 12: if they do not fit" in note
    for context, kept in (("a", 1), ("a long context", 6), ("", 1)):  # there is room whatever is asked for
        assert one.generated(context, stops=[], most=256, temperature=0.0, sample_id=0) == "x" * (LENGTH - kept)
    with pytest.raises(UsageError, match="max_gen_toks must be at least 0, got -1"):
        one.generated("a", stops=[], most=-1, temperature=0.0, sample_id=0)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, {"temperature": 0.0, "most": None, "stops": []}),
        ({"do_sample": True, "temperature": 0.0}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": None}, {"temperature": 1.0}),
        ({"temperature": 0.7, "top_p": 0.5, "do_sample": True}, {"temperature": 0.7, "top_p": 0.5, "top_k": 0}),
        ({"temperature": 0.7, "top_k": 3, "top_p": None}, {"temperature": 0.7, "top_p": 1.0, "top_k": 3}),
        ({"temperature": "0.5", "top_k": -1}, {"temperature": 0.5, "top_p": 1.0, "top_k": 0}),
        ({"temperature": None, "until": None, "max_gen_toks": None}, {"temperature": 0.0, "stops": [], "most": None}),
        ({"max_gen_toks": 0, "max_new_tokens": 9}, {"most": 0}),
        ({"max_new_tokens": 9}, {"most": 9}),
        ({"until": "\n"}, {"stops": ["\n"]}),
        ({"until": ["\n", ""]}, {"stops": ["\n", ""]}),
    ],
)
def test_settings_of_a_generation_are_followed(settings, want):
    said = []
    options = adapter.generation_options(settings, lambda *note: said.append(note))
    assert options == options | want and not said
    assert (options["temperature"] == 0) == ("top_k" not in options)


def test_settings_that_are_not_followed_are_said_and_those_that_mean_nothing_refused():
    said = []
    adapter.generation_options({"num_beams": 4, "until": [], "min_p": 0.1, "penalty": None}, lambda *note: said.append(note))
    assert [name for name, _ in said] == ["num_beams", "min_p"]
    assert said[0][1].startswith("generation setting num_beams is not followed here; known are until, do_sample")

    for settings, message in (
        ({"temperature": "warm"}, "temperature must be a number, got 'warm'"),
        ({"max_gen_toks": 2.5}, r"max_gen_toks must be a whole number, got 2\.5"),
        ({"temperature": 1, "top_k": []}, r"top_k must be a whole number, got \[\]"),
        ({"until": 3}, "until must be a string or a list of strings, got 3"),
        ({"until": ["a", None]}, "until must be a string or a list"),
    ):
        with pytest.raises(UsageError, match=f"generation setting {message}"):
            adapter.generation_options(settings, lambda *_: None)


MERGING = ["the", "cat", "there", "other", "river", "brown", "mountain", "lazy"]


@pytest.fixture(scope="module")
def merging():
    """A tokenizer whose tokens are whole words, and a model of it."""
    tokenizer = make_tokenizer("bpe-290", [" ".join(MERGING[i % 8] for i in range(j, j + 40)) for j in range(20)])
    torch.manual_seed(2)
    model = DiT(tokenizer.model_vocab_size, tokenizer.mask_id, dim=16, layers=1, heads=2, length=LENGTH, dropout=0.0)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return answers((model.eval(), tokenizer, resolve(TrainConfig(device="cpu", dtype="fp32"))), draws=16)


@pytest.mark.parametrize(
    ("context", "text", "merges"),
    [
        ("the ca", "t", True),
        ("the oth", "er", True),
        ("a riv", "er brown", True),
        ("moun", "tain", True),
        ("x", " the", False),
        ("the ", "cat", False),
    ],
)
def test_a_continuation_is_scored_whole_whatever_token_it_would_be_part_of(merging, context, text, merges):
    read, kept = merging.tokenizer, context.rstrip()
    before, after = merging.split(context, text)
    both = read.encode(context + text)
    assert before == read.encode(kept) and read.decode(after) == context[len(kept) :] + text
    assert merges != (both == before + after)
    assert merging.continuation(context, text)[0] < -0.1


def test_what_a_text_without_a_context_is_given(merging, parts):
    eos = merging.tokenizer.eos_id
    for context in ("", "\n", "  ", "\n \t"):
        assert merging.split(context, "the") == ([eos], merging.tokenizer.encode(context + "the"))
    assert merging.split("the", "") == (merging.tokenizer.encode("the"), []) and merging.continuation("the", "") == (0.0, True)
    one = answers(parts, likelihood="left_to_right")
    assert one.continuation("\n", "ab")[0] == pytest.approx(one.continuation("", "\nab")[0])


def test_words_that_only_an_unknown_token_stands_for_are_not_free(parts):
    """Under BERT's tokenizer context and continuation may be one unknown token, and a word cannot be continued at all."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    names = ["[UNK]", "[SEP]", "[MASK]", "a", "b"]
    backend = Backend(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[SEP]", "[MASK]"])
    one = answers((parts[0], Tokenizer(backend, "words"), parts[2]))
    assert one.split("a qu", "ite") == ([3, 0], [0]) and one.split("a", "b") == ([3], [4]) and one.split("a", " b") == ([3], [4])


def test_greedy_generation_is_the_models_own(parts):
    """The real sampler at temperature 0: one token, the likeliest."""
    one = answers(parts)
    best = int(logp(parts[0], [*b"ab", parts[0].mask_id])[2].argmax())
    said = one.generated("ab", stops=[], most=1, temperature=0.0, sample_id=0)
    assert said == one.tokenizer.decode([best] if best != one.tokenizer.eos_id else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": None}, "model_args names what is asked"),
        ({"model": "b"}, "model_args names what is asked"),
        ({}, "there is no run folder nothing"),
        ({"colour": "red"}, "there is no model argument 'colour'"),
        ({"weights": "emma"}, "there is no weights 'emma' .did you mean ema"),
        ({"checkpoint": "first"}, "there is no checkpoint 'first'; choose one of best, last"),
        ({"dtype": "float16"}, "there is no dtype 'float16'"),
        ({"device": "tpu:0"}, "there is no device 'tpu'"),
        ({"sampler": "ddpm"}, "there is no sampler 'ddpm' .did you mean ddpm_cache"),
        ({"batch_size": "many"}, "batch_size must be a whole number or auto, got 'many'"),
        ({"batch_size": None}, "batch_size must be a whole number or auto"),
        ({"likelihood": "elbo"}, "did you mean nelbo"),
        ({"draws": 1}, "draws must be at least 2, got 1"),
        ({"steps": "all"}, "steps must be a whole number, got 'all'"),
    ],
)
def test_arguments_that_do_not_do(parts, options, message):
    of_answers = options.keys() & {"likelihood", "draws", "steps"}
    with pytest.raises(UsageError, match=message):
        answers(parts, **options) if of_answers else adapter.open_answers(**{"run": "nothing"} | options)


def request(*args):
    return types.SimpleNamespace(args=args)


@pytest.fixture
def harness(monkeypatch):
    """What is used of the harness: its base class, its registry and its cache hook."""
    known, kept = {}, []
    hook = types.SimpleNamespace(add_partial=lambda *what: kept.append(what))
    registry = types.SimpleNamespace(register_model=lambda name: lambda kind: known.setdefault(name, kind))
    base = types.SimpleNamespace(LM=type("LM", (), {"__init__": lambda self: setattr(self, "cache_hook", hook)}))
    modules = {"lm_eval": types.ModuleType("lm_eval"), "lm_eval.api": types.ModuleType("lm_eval.api")}
    for name, module in (modules | {"lm_eval.api.model": base, "lm_eval.api.registry": registry}).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(adapter, "_registered", None)
    return known, kept


def test_the_harness_gets_a_model_by_name(harness, trained_run):
    known, kept = harness
    assert adapter.register() is known["atat_fast"] is adapter.register()
    options = {"batch_size": "auto", "device": "cpu", "max_batch_size": None, "dtype": "fp32"}  # what the harness passes on
    model = known["atat_fast"](run=str(trained_run), likelihood="left_to_right", **options)
    one = model.answers
    pairs = [("the list", " of"), ("", "a dict")]
    assert model.loglikelihood([request(*pair) for pair in pairs]) == [one.continuation(*pair) for pair in pairs]
    assert model.loglikelihood_rolling([request("the list of a dict")]) == [one.whole("the list of a dict")]
    said = model.generate_until([request("the", {"until": ["\n"], "max_gen_toks": 5, "do_sample": False})])
    assert len(said) == 1 and "\n" not in said[0]
    assert [what[0] for what in kept] == ["loglikelihood"] * 2 + ["loglikelihood_rolling", "generate_until"]
    assert model.tokenizer_name == one.tokenizer.fingerprint


def test_without_the_harness_the_command_says_so(monkeypatch, refused):
    monkeypatch.setattr(adapter, "_registered", None)
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    assert refused(adapter.main, "--tasks", "lambada_openai").endswith("lm-eval, which is not installed: " + adapter.INSTALL)


@pytest.mark.slow
def test_the_harness_itself_runs_tasks_of_all_three_kinds(trained_run, tmp_path, python):
    """Multiple choice, perplexity and generation from local files, by the command."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    rows = [{"question": "the list of", "choices": ["a dict", "z q"], "answer": i % 2, "text": f"the dict {i}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    shared = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "metadata": {"version": 1}}
    writing = {"doc_to_text": "{{question}}", "generation_kwargs": {"until": ["q"], "max_gen_toks": 4}}
    tasks = {
        "choices": ("multiple_choice", "answer", "acc", {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"}),
        "rolling": ("loglikelihood_rolling", "{{text}}", "bits_per_byte", {"doc_to_text": ""}),
        "writing": ("generate_until", "{{text}}", "exact_match", writing),
    }
    (tmp_path / "tasks").mkdir()
    for name, (kind, target, metric, more) in tasks.items():
        task = {"task": name, "output_type": kind, "doc_to_target": target, "metric_list": [{"metric": metric}]} | more
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(shared | task))
    command = ["--model_args", f"run={trained_run},draws=8,dtype=fp32", "--tasks", ",".join(tasks)]
    command += ["--include_path", tmp_path / "tasks", "--output_path", tmp_path / "out.json"]
    done = python("-m", "atat_fast.lm_eval", *command, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.glob("out*.json")
    results = json.loads(written.read_text())
    assert results["config"]["model"] == "atat_fast"
    found = results["results"]
    assert 0 <= found["choices"]["acc,none"] <= 1 and found["writing"]["exact_match,none"] == 0
    assert 2 < found["rolling"]["bits_per_byte,none"] < 12


def of_blocks(block):
    tokenizer = make_tokenizer("bytes")
    torch.manual_seed(8)
    sizes = {"dim": 16, "layers": 2, "heads": 2, "length": LENGTH, "dropout": 0.0, "block": block}
    model = DiT(tokenizer.model_vocab_size, tokenizer.mask_id, **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.03 if "modulation" in name else 0.4))
        model.head.weight.mul_(0.3)
    return model.eval(), tokenizer, resolve(TrainConfig(device="cpu", dtype="fp32"))


def sum_of_blocks(model, given, part):
    """The bound by its definition: each block's over all of its masks, from a cache of the tokens before it."""
    text, total, size = given + part, 0.0, model.config.block
    cache = model.cache(1)
    for start in range(0, len(text), size):
        here = text[start : start + size]
        counted = [i for i in range(len(here)) if start + i >= len(given)]
        for k in range(1, len(counted) + 1):
            sets = list(itertools.combinations(counted, k))
            for chosen in sets:
                ids = [model.mask_id if i in chosen else t for i, t in enumerate(here)]
                ids += [model.mask_id] * (size - len(ids))
                p = torch.log_softmax(model.logits(cache.features(torch.tensor([ids]))).double(), -1)
                total -= sum(float(p[i, here[i]]) for i in chosen) / k / len(sets)
        if len(here) == size:
            cache.append(torch.tensor([here]))
    return total


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 2, 3, 4])
@pytest.mark.parametrize(("context", "text"), [("ab", "cdef"), ("abc", "defghi"), ("a", "bcdefgh"), ("", "xyzuvwxyz")])
def test_a_model_of_blocks_is_scored_by_the_sum_of_its_blocks(block, context, text):
    parts = of_blocks(block)
    model, tokenizer, _ = parts
    said, writes = answers(parts, draws=64, batch=3).continuation(context, text)
    given = list(context.encode()) or [tokenizer.eos_id]
    assert said == pytest.approx(-sum_of_blocks(model, given, list(text.encode())), rel=1e-4)
    assert not writes
    if block == 1:  # an exact likelihood: no draws, and the text that greedy decoding writes is known
        drawn = answers(parts).generated(context, stops=[], most=4, temperature=0.0, sample_id=0)
        if drawn and len(drawn.encode()) == 4 and "\ufffd" not in drawn:
            assert answers(parts).continuation(context, drawn)[1]


def test_larger_blocks_are_scored_by_draws():
    parts = of_blocks(6)
    truth = sum_of_blocks(parts[0], list(b"ab"), list(b"cdefghijkl"))
    found = [-answers(parts, draws=12, seed=seed).continuation("ab", "cdefghijkl")[0] for seed in range(24)]
    spread = torch.tensor(found).std() / math.sqrt(24)
    assert abs(sum(found) / 24 - truth) < 4 * float(spread) and spread > 0


def test_orders_of_a_model_of_blocks_are_refused():
    with pytest.raises(UsageError, match="likelihood left_to_right reveals tokens of a whole text in an order, and this model"):
        answers(of_blocks(4), likelihood="left_to_right")
