"""Quality of samples against values worked out by hand, and a causal LM made here."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch

from atat_fast import evaluate
from atat_fast.config import TrainConfig
from atat_fast.data.tokenizers import make_tokenizer
from atat_fast.errors import UsageError
from atat_fast.evaluation import generation
from atat_fast.evaluation.generation import Sample, distinct, entropy, measure_samples, read_samples, read_texts, tokens_of
from atat_fast.hardware.compute import resolve

BYTES, COMPUTE = make_tokenizer("bytes"), resolve(TrainConfig(device="cpu", dtype="fp32"))
END = "<|endoftext|>"
WORDS = ["<unk>", "a", "b", "c", "d"]


def test_entropy_and_distinct_by_hand():
    assert entropy("aaaa") == 0.0
    assert entropy("aaab") == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert entropy(list(range(50))) == pytest.approx(math.log(50))
    assert distinct(["abab", "ab"], 1) == 2 / 6
    assert distinct(["abab", "ab"], 2) == 2 / 4  # ab ba ab, ab: none reaches from one text into the next
    assert distinct(["abc"], 3) == 1.0
    assert math.isnan(distinct(["ab", ""], 3))


def lines(tmp_path, *rows, name="rows.jsonl"):
    written = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / name).write_text("".join(row + "\n" for row in written))
    return str(tmp_path / name)


def samples(tmp_path, texts, name="samples.jsonl"):
    return lines(tmp_path, *({"text": text} for text in texts), name=name)


def test_texts_of_a_file(tmp_path):
    assert read_texts(lines(tmp_path, {"text": "one", "prompt": "o"}, {"text": "", "prompt": "o"})) == ["one", ""]
    with pytest.raises(UsageError, match=r"samples .*rows\.jsonl hold no text"):
        read_texts(lines(tmp_path, {"text": ""}))
    assert tokens_of(Sample("ab", [97, 98, 200]), BYTES) == [97, 98, 200]
    eos = BYTES.eos_id  # an end in a text is a token
    assert tokens_of(Sample(f"ab{END}c{END}{END}"), BYTES) == [97, 98, eos, 99, eos, eos] and tokens_of(Sample(""), BYTES) == []


def evaluated(capsys, tmp_path, *arguments):
    assert evaluate.main([*map(str, arguments), "--json", str(tmp_path / "out.json"), "--dtype", "fp32"]) == 0
    return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out


def test_the_command_measures_words_or_a_models_tokens(trained_run, tmp_path, capsys):
    path = samples(tmp_path, ["a b a b", "c", ""])
    found, printed = evaluated(capsys, tmp_path, "--samples", path)
    assert (found["texts"], found["empty"], found["tokens"], found["unit"]) == (3, 1, 5, "words")
    assert found["entropy"] == pytest.approx((math.log(2) + 0) / 2)
    assert (found["distinct_1"], found["distinct_2"], found["distinct_4"]) == (3 / 5, 2 / 3, 1.0)
    assert f"entropy          {math.log(2) / 2:.4f} ±" in printed and "distinct-2       0.6667" in printed
    found, _ = evaluated(capsys, tmp_path, "--samples", path, "--run", trained_run)
    assert found["unit"] == "tokens of bytes" and found["tokens"] == 8 and found["distinct_1"] == 4 / 8


def test_ids_of_a_file_are_what_is_counted(trained_run, tmp_path, capsys):
    """What the sampler writes: broken UTF-8 is one token, not the three of U+FFFD, and an end of document one, not 13 letters."""
    from atat_fast import sample

    path = tmp_path / "drawn.jsonl"
    assert sample.main(["--run", str(trained_run), "--num_samples", "3", "--steps", "4", "--jsonl", str(path)]) == 0
    ids = [json.loads(line)["ids"] for line in path.read_text().splitlines()]
    found, printed = evaluated(capsys, tmp_path, "--samples", path, "--run", trained_run)
    assert found["tokens"] == sum(map(len, ids)) and found["texts_with_ids"] == 3 and "of them read as ids" in printed
    assert found["entropy"] == pytest.approx(sum(map(entropy, ids)) / 3)
    assert found["distinct_2"] == pytest.approx(distinct(ids, 2))
    words, _ = evaluated(capsys, tmp_path, "--samples", path)
    assert words["unit"] == "words" and words["texts_with_ids"] == 0


def test_a_file_of_both_with_blank_lines_and_empty_samples(trained_run, tmp_path, capsys):
    eos = BYTES.eos_id
    rows = (
        {"text": "ab\u2028c", "prompt": "a"},
        "",
        {"ids": [97, 255, eos]},
        "   ",
        {"ids": [97, eos], "text": f"a{END}"},
        {"text": f"a{END}", "ids": None},
        {"ids": [], "text": ""},
        {"text": ""},
    )
    found, _ = evaluated(capsys, tmp_path, "--samples", lines(tmp_path, *rows), "--run", trained_run)
    assert (found["texts"], found["texts_with_ids"], found["empty"]) == (6, 3, 2)
    assert found["tokens"] == 6 + 3 + 2 + 2 + 0 + 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ids": [97, 258]}, "line 2 of .*rows.jsonl has token id 258, outside the 258 of tokenizer bytes: .* give the run that"),
        ({"ids": [-1]}, "has token id -1, outside"),
        ({"ids": [97, 257, 98]}, r"line 2 of .* has the mask .token id 257. at place 1: it is not a finished sample"),
        ({"ids": [97, 98], "text": "ba"}, "by tokenizer bytes its ids say 'ab', but its text is 'ba'"),
        ({"ids": "ab"}, "ids must be a list of whole numbers"),
        ({"ids": [1, 2.5]}, "ids must be a list of whole numbers"),
        ({"ids": [True]}, "ids must be a list of whole numbers"),
        ({"ids": [97], "text": 3}, "text must be a string, got 3"),
        ({"prompt": "a"}, "line 2 of .* has no text$"),
        ("{text: 1}", "line 2 of .* is not JSON: "),
        ("[1]", "line 2 of .* is not a JSON object"),
    ],
)
def test_lines_that_are_no_samples_are_one_sentence(row, message, tmp_path):
    path = lines(tmp_path, {"ids": [97], "text": "a"}, row)
    with pytest.raises(UsageError, match=message) as raised:
        read_samples(path, BYTES)
    assert "\n" not in str(raised.value)


def test_files_without_a_sample_are_one_sentence(tmp_path):
    for rows in ([{"ids": []}], [{"text": " "}], [""]):
        with pytest.raises(UsageError, match="hold no text"):
            measure_samples(lines(tmp_path, *rows), tokenizer=BYTES, causal_lm=None, reference=None, batch=1, compute=COMPUTE)
    with pytest.raises(UsageError, match=r"line 1 of .* has no text; give --run or --model, whose tokenizer reads its ids"):
        read_samples(lines(tmp_path, {"ids": [97]}), None)
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "ab", "ids": [97, 98]}'.encode("utf-16"))
    assert read_samples(str(path), BYTES) == [("ab", [97, 98])]
    path.write_bytes('{"text": "\u00e9", "ids": [97]}'.encode("latin-1"))
    with pytest.raises(UsageError, match=r"rows\.jsonl is not UTF-8 at byte 10"):
        read_samples(str(path), BYTES)


def test_a_causal_lm_reads_its_own_end_for_ours(tmp_path, monkeypatch):
    seen = []

    class Reader:
        end = "</s>"

        def __init__(self, *_): ...

        def perplexity(self, texts, batch):
            seen.extend(texts)
            return {}

    monkeypatch.setattr(generation, "CausalLM", Reader)
    ours = ({"ids": [97, BYTES.eos_id, 98]}, {"text": f"c{END}"})
    for tokenizer, rows in ((BYTES, ours), (None, ({"text": f"a{END}"},))):
        path = lines(tmp_path, *rows)
        measure_samples(path, tokenizer=tokenizer, causal_lm="x", reference=None, batch=1, compute=COMPUTE)
    assert seen == ["a</s>b", "c</s>", f"a{END}"]  # without a tokenizer nothing is known of an end


@pytest.fixture
def causal_lm(tmp_path):
    """A random GPT-2 of five words that reads eight tokens at once."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(3)
    config = transformers.GPT2Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "lm"
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    return folder, model


@torch.no_grad()
def test_generative_perplexity_is_the_models_own(causal_lm, tmp_path, capsys):
    folder, model = causal_lm
    texts = ["a b c d a", "d d", "c", "a b " * 7]  # the third has nothing to score, the last fills two windows
    found, printed = evaluated(capsys, tmp_path, "--samples", samples(tmp_path, texts), "--causal_lm", folder, "--batch", 2)
    nll, count = [0.0] * 4, [0] * 4
    for i, text in enumerate(texts):
        ids = [WORDS.index(word) for word in text.split()]
        for first in range(0, len(ids), 8):
            window = torch.tensor([ids[first : first + 8]])
            logp = torch.log_softmax(model(window).logits.double(), -1)
            nll[i] -= float(logp[0, :-1].gather(1, window[0, 1:, None]).sum())
            count[i] += window.shape[1] - 1
    assert found["causal_tokens"] == sum(count) == 4 + 1 + 0 + 7 + 5
    mean = sum(nll) / sum(count)
    assert found["causal_nll"] == pytest.approx(mean, rel=1e-5)
    assert found["generative_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    squares = sum((n - mean * c) ** 2 for n, c in zip(nll, count, strict=True) if c)
    assert found["causal_nll_se"] == pytest.approx(math.sqrt(squares * 3 / 2) / sum(count), rel=1e-4)
    assert f"generative ppl   {math.exp(mean):.3f}" in printed


def test_mauve_gets_features_of_both_sides(causal_lm, tmp_path, capsys, monkeypatch):
    (folder, model), seen = causal_lm, {}

    def compute_mauve(*, p_features, q_features, verbose):
        seen.update(p=p_features, q=q_features)
        return types.SimpleNamespace(mauve=0.5)

    monkeypatch.setitem(sys.modules, "mauve", types.SimpleNamespace(compute_mauve=compute_mauve))
    people = samples(tmp_path, ["c c", "a b c", "never read: one for each sample"], name="people.jsonl")
    path = samples(tmp_path, ["a b c", "d"])
    found, printed = evaluated(capsys, tmp_path, "--samples", path, "--causal_lm", folder, "--reference", people)
    assert found["mauve"] == 0.5 and "MAUVE            0.5000" in printed
    with torch.no_grad():
        want = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states[-1][0, -1].numpy()
    assert seen["p"].shape == seen["q"].shape == (2, 8)
    for side in seen.values():
        assert min(abs(row - want).max() for row in side) < 1e-5  # "a b c" is on both sides


def test_mauve_where_it_is_installed(causal_lm, tmp_path, capsys):
    pytest.importorskip("mauve", reason="mauve-text is not installed")
    path = samples(tmp_path, [" ".join(WORDS[1 + (i * j) % 4] for j in range(1, 6)) for i in range(12)])
    people = samples(tmp_path, ["d d d d d"] * 12, name="people.jsonl")
    own, one_word = (
        evaluated(capsys, tmp_path, "--samples", path, "--causal_lm", causal_lm[0], "--reference", reference)[0]["mauve"]
        for reference in (path, people)
    )
    assert 0 < one_word < own <= 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("without transformers", r"needs the package transformers, which is not installed: pip install 'atat_fast\[eval\]'"),
        ("without mauve", "needs the package mauve-text, which is not installed"),
        ("nobody/nothing", "causal LM nobody/nothing is no folder here, it is not in the local cache, and the hub cannot be"),
        ("./nothing", r"there is no folder \./nothing, and it is no hub id"),
        ("empty", "causal LM empty cannot be loaded: "),
    ],
)
def test_causal_lms_that_cannot_be_had_are_one_sentence(name, message, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    path, missing = samples(tmp_path, ["a b"]), name.removeprefix("without ")
    if missing != "transformers":
        pytest.importorskip("transformers", reason="transformers is not installed")
    more = ["--reference", path] if missing == "mauve" else []
    model = str(request.getfixturevalue("causal_lm")[0]) if missing == "mauve" else name
    if missing != name:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=message) as raised:
        evaluate.main(["--samples", path, "--causal_lm", model, *more])
    assert "\n" not in str(raised.value)
