"""The playground: what is read, what is shown, and the page itself in a browser where there is one."""

import html
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest
import torch

from atat_fast import playground
from atat_fast.data.tokenizers import make_tokenizer
from atat_fast.errors import UsageError
from atat_fast.evaluation.pieces import HIDDEN, PART, Pieces
from atat_fast.models import hub

BYTES = make_tokenizer("bytes")
MASK = BYTES.mask_id


@pytest.fixture(scope="module")
def player(trained_run):
    return playground.to_play_with(arguments(run=str(trained_run)))


def arguments(**given):
    options = {"run": None, "model": None, "tokenizer": None, "checkpoint": "best", "device": "cpu", "dtype": "fp32"}
    return SimpleNamespace(**options | given)


def plain(player):
    """The same model without its estimator."""
    return playground.Player(player.model, player.tokenizer, None, player.compute, "plain")


def play(player, ids, **options):
    return list(playground.frames(player, ids, **{"sampler": "ddpm_cache", "steps": 6, "temperature": 1.0, "seed": 3} | options))


def test_blanks_are_masks():
    def read(text, blank=2, append=0, longest=20):
        return playground.read_text(BYTES, text, blank=blank, append=append, longest=longest)

    assert read("a[MASK]b ___ c") == [97, MASK, 98, 32, MASK, MASK, 32, 99]
    assert read("a_______b") == [97, MASK, MASK, 98] and read("a__b", append=1) == [*b"a__b", MASK]
    with pytest.raises(UsageError, match="there is nothing to fill in"):
        read("no blank __ here")
    with pytest.raises(UsageError, match="this is 21 tokens, and the model takes at most 20"):
        read("_" * 3, blank=21)


@pytest.mark.parametrize("with_estimator", [True, False])
def test_tokens_appear_one_after_another_and_stay(player, with_estimator):
    one = player if with_estimator else plain(player)
    ids = playground.read_text(BYTES, "ab ___ c", blank=6, append=0, longest=16)
    shown = play(one, ids)
    assert shown[0].ids == ids and shown[0].step == 0 and shown[-1].done and MASK not in shown[-1].ids
    for before, after in itertools.pairwise(shown):
        assert all(old in (new, MASK) for old, new in zip(before.ids, after.ids, strict=True))
        assert after.given == [token != MASK for token in ids]
        assert not any(new and given for new, given in zip(after.new, after.given, strict=True))
        assert all(0 <= shade <= 1 for shade in after.shades)
    assert any(shade > 0 for shade in shown[-1].shades)
    assert all(shade == 0 for shade, given in zip(shown[-1].shades, shown[-1].given, strict=True) if given)
    assert play(one, ids)[-1].ids == shown[-1].ids  # a seed repeats itself
    cold = {tuple(play(one, [MASK] * 8, sampler="confidence", temperature=0.0, seed=s)[-1].ids) for s in range(3)}
    assert len(cold) == 1  # temperature 0 takes the likeliest


@torch.no_grad()
def test_shades_are_the_estimators_scores_or_the_chance_of_error(player):
    ids, share = [97, 98, MASK, 99], torch.tensor([0.25])
    z = torch.tensor([ids])
    score = torch.sigmoid(player.estimator.network(player.model.embedding(z), share))[0, 2]
    assert play(player, ids)[-1].shades[2] == pytest.approx(float(score), abs=1e-5)
    last = play(plain(player), ids)[-1]
    p = player.model.logits(player.model.features(z, share)).softmax(-1)[2, last.ids[2]]
    assert last.shades[2] == pytest.approx(1 - float(p), abs=1e-5)


@pytest.mark.parametrize("how", ["close", "event"])
def test_a_reader_that_leaves_or_is_told_to_ends_the_sampler(player, how):
    left, before = threading.Event(), set(threading.enumerate())
    options = {"sampler": "ancestral", "steps": 4_000, "temperature": 1.0, "seed": 0, "left": left}
    moments = playground.frames(player, [player.model.mask_id] * 16, **options)
    next(moments)
    (sampler,) = set(threading.enumerate()) - before
    if how == "close":
        moments.close()
    else:
        left.set()
        assert not any(moment.done for moment in moments)
    until(lambda: not sampler.is_alive())


def until(true, seconds=20):
    """Wait for it."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


class StandIn:
    """As much of gradio as the page is built with: keeps the components by their elem_id, and what they were asked to call."""

    class Error(Exception):
        pass

    class Request(SimpleNamespace):
        pass

    class Component(SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def click(self, *call, **options):
            self.called.append((call, options))

        submit = unload = click

    def __init__(self):
        self.made = {}

    def __getattr__(self, kind):
        def make(*values, **options):
            return self.made.setdefault(options.get("elem_id", kind), self.Component(values=values, called=[]))

        return make

    def asks(self, name):
        return self.Request(session_hash=name)


@pytest.fixture
def page(player, monkeypatch):
    gradio = StandIn()
    monkeypatch.setattr(playground, "_gradio", lambda: gradio)
    playground.build(player)
    return gradio


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (("no blank", "ddpm_cache", 4, 1.0, 2, 0, 0), "there is nothing to fill in: write [MASK] or ___ where text is missing"),
        (("[MASK]", "<b>", 4, 1.0, 2, 0, 0), "there is no sampler &#x27;&lt;b&gt;&#x27;"),
        (("[MASK]", "ddpm_cache", 4, 1.0, 2, 0, -1), "seed is -1; give a whole number from 0"),
    ],
)
def test_the_pages_errors_are_one_sentence_beside_the_text(page, inputs, message):
    fill = page.made["on"].values[1]
    assert fill.__annotations__["request"] is page.Request
    with pytest.raises(page.Error) as error:
        list(fill(*inputs, page.asks("a")))
    assert str(error.value).startswith(message) and not error.value.print_exception


def test_stop_and_leaving_end_the_sampler_of_their_page_alone(page):
    (stop,), options = page.made["stop"].called[0][0][:1], page.made["stop"].called[0][1]
    fill, leave = page.made["on"].values[1], page.made["Blocks"].called[0][0][0]
    assert options["cancels"] == [page.made["on"]] and not options["queue"]
    assert stop(page.asks("a")) == "nothing is being filled in"
    before = set(threading.enumerate())
    one, other = (fill("", "ancestral", 100_000, 1.0, 1, 16, 0, page.asks(name)) for name in "ab")
    next(one), next(other)
    samplers = set(threading.enumerate()) - before
    assert len(samplers) == 2
    assert stop(page.asks("a")) == "stopped"
    assert all(said != "done" for _, said, _ in one)
    until(lambda: sum(sampler.is_alive() for sampler in samplers) == 1)
    assert "step" in next(other)[1]
    leave(page.asks("b"))
    until(lambda: not any(sampler.is_alive() for sampler in samplers))
    assert stop(page.asks("b")) == "nothing is being filled in"
    assert [said for _, said, _ in fill("a[MASK]", "ancestral", 4, 0.0, 1, 0, 0, page.asks("a"))][-1] == "done"


def test_the_page_says_what_is_seen_what_a_token_is_and_which_samplers_there_are(page, player):
    said = page.made["legend"].values[0]
    for part in (HIDDEN, PART, "a letter of English, a part of others", "newly drawn", "given", "importance estimator", "[MASK]"):
        assert part in said
    assert page.made["temperature"].values[:2] == (0.0, 2.0)
    words = playground.Player(player.model, SimpleNamespace(name="gpt2"), None, player.compute, "words")
    assert "a word or a part of one" in playground.legend(words) and "has none" in playground.legend(words)
    assert playground._usable("ddpm_cache", player) and playground._usable("importance", player)
    assert not playground._usable("importance", plain(player))
    assert not playground._usable("ddpm_cache", SimpleNamespace(model=SimpleNamespace(time_conditioning=True)))


WRITTEN = "<b>é</b> & x"


@pytest.mark.parametrize(
    ("ids", "kinds", "text", "classes"),
    [
        ([0xE4, MASK, 0xA0, 0xC3, 0xA9], "g.nng", f"{PART}{HIDDEN}{PART}é", {"drawn new": 2}),
        ([*WRITTEN.encode(), MASK], "g" * 11 + ".n.", WRITTEN + HIDDEN, {"drawn": 1, "drawn new": 1, "hidden": 1}),
    ],
)
def test_a_picture_shows_text_and_nothing_else(ids, kinds, text, classes):
    frame = playground.Frame(1, 2, ids, [k == "g" for k in kinds], [k == "n" for k in kinds], [0.5] * len(ids))
    body = playground.picture(frame, Pieces(BYTES.decode, MASK)).split("</style>")[1]
    assert html.unescape(re.sub("<[^>]*>", "", body)) == text and "<b>" not in body
    assert {kind: body.count(f'class="{kind}"') for kind in classes} == classes
    assert "--i:0.500" in body and 'data-done="false"' in body


def test_a_model_without_its_tokenizer_is_played_with_another(player, tmp_path):
    hub.save_pretrained(tmp_path / "model", hub.Saved(player.model, player.tokenizer))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    with pytest.raises(UsageError, match="--tokenizer"):
        playground.to_play_with(arguments(model=str(tmp_path / "model")))
    found = playground.to_play_with(arguments(model=str(tmp_path / "model"), tokenizer="bytes"))
    assert found.tokenizer.fingerprint == player.tokenizer.fingerprint and found.estimator is None
    with pytest.raises(UsageError, match="--tokenizer goes with --model"):
        playground.to_play_with(arguments(run="runs/small", tokenizer="bytes"))


def test_bad_input_is_one_sentence(trained_run, monkeypatch, refused):
    for options, message in (
        ([], "say what to play with: --run runs/NAME, or --model FOLDER"),
        (["--run", "a", "--model", "b"], "say what to play with"),
        (["--run", "a", "--port", "0"], "--port must be in 1..65535, got 0"),
    ):
        assert refused(playground.main, *options).startswith(message)
    monkeypatch.setitem(sys.modules, "gradio", None)
    said = refused(playground.main, "--run", trained_run)
    assert said == "the playground needs the package gradio, which is not installed: pip install 'atat_fast[playground]'"


@pytest.fixture
def chromium():
    """Playwright's Chromium, or the system's. Skips if there is none."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    try:
        manager = sync.sync_playwright().start()
    except Exception as error:
        pytest.skip(f"playwright does not start: {error}")
    try:
        system = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
        for path in (None, system):
            try:
                made = manager.chromium.launch(executable_path=path, args=["--no-sandbox"])
            except Exception:
                continue
            yield made
            made.close()
            return
        pytest.skip("there is no Chromium to run")
    finally:
        manager.stop()


@pytest.mark.slow
def test_the_page_in_a_browser(trained_run, tmp_path, chromium):
    """Text is typed, filled in and shaded; its given words stay; an error has a box of its own; nobody else is asked."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "atat_fast.playground", "--run", trained_run, "--port", str(port), "--dtype", "fp32"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address, asked = f"http://127.0.0.1:{port}", []
        for _ in range(240):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, "the page's server ended"
                time.sleep(0.5)
        page = chromium.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.locator("#text textarea").fill("ab[MASK][MASK] c ___")
        page.locator("#blank input[type=number]").fill("3")
        page.locator("#fill").click()
        done = page.locator('#canvas .canvas[data-done="true"]')
        done.wait_for(timeout=60_000)
        assert done.locator(".hidden").count() == 0 and done.locator(".drawn").count() >= 3
        said = page.locator("#final textarea").input_value()
        assert said.startswith("ab") and " c " in said and "[MASK]" not in said and "_" not in said[:5]
        drawn = done.locator(".drawn").first
        assert 0 < float(drawn.get_attribute("title")) < 1
        assert drawn.evaluate("e => getComputedStyle(e).backgroundColor") not in ("rgba(0, 0, 0, 0)", "transparent")
        assert "importance estimator's score" in page.inner_text("body")

        page.locator("#text textarea").fill("nothing to do")
        page.locator("#fill").click()
        page.get_by_text("there is nothing to fill in").wait_for(timeout=60_000)
        assert page.locator("#canvas").get_by_text("there is nothing to fill in").count() == 0
        assert page.locator("#stop").is_visible() and "a letter of English" in page.locator("#legend").inner_text()
        if shot := os.environ.get("ATAT_FAST_SCREENSHOT"):
            page.screenshot(path=shot)
        assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
    finally:
        server.terminate()
        server.wait(timeout=30)
