"""A page to play with a model:  python -m atat_fast.playground --run runs/demo

Type text with blanks, choose a sampler, and watch the tokens appear, shaded by estimated difficulty. `[MASK]` is one token to
fill in; `___` is as many as the page's slider says. The page is served to this machine alone and loads nothing from elsewhere. It
needs Gradio: pip install 'atat_fast[playground]'.
"""

from __future__ import annotations

import html
import inspect
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from atat_fast.cli import make_parser, path_text, run_command
from atat_fast.config import TrainConfig
from atat_fast.errors import UsageError
from atat_fast.evaluation.pieces import HIDDEN, PART, Pieces

if TYPE_CHECKING:
    from torch import Tensor

    from atat_fast.data import Tokenizer
    from atat_fast.hardware.compute import Compute
    from atat_fast.models.dit import DiT
    from atat_fast.models.importance import ImportanceEstimator

INSTALL = "pip install 'atat_fast[playground]'"
EXAMPLE = "The [MASK][MASK][MASK] of the list is returned, ___ value."
BLANK = re.compile(r"_{3,}")
MOST_WAITING = 4  # frames queued for a slow page, which then shows the newest
STYLE = """<style>
.canvas { font: 1.15rem/1.9 Charter, "Bitstream Charter", Cambria, Georgia, serif; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: plaintext; padding: 1rem 1.25rem; border: 1px solid color-mix(in srgb, currentColor 15%, transparent);
  border-radius: .4rem; min-height: 4rem }
:is(.canvas, .legend) .hidden { opacity: .55; letter-spacing: .08em }
:is(.canvas, .legend) :is(.hidden, .drawn) { border-radius: .2rem; padding: .1rem 0;
  background: color-mix(in srgb, #d55e00 calc(var(--i) * 70%), transparent) }
:is(.canvas, .legend) .new { box-shadow: 0 .12em 0 #0072b2 }
</style>"""


@dataclass(frozen=True)
class Player:
    """The page's model, on its device, and what belongs to it."""

    model: DiT
    tokenizer: Tokenizer
    estimator: ImportanceEstimator | None
    compute: Compute
    title: str

    @property
    def shading(self) -> str:
        """The meaning of the shades, in words."""
        if self.estimator is not None:
            return "the importance estimator's score: how likely it thought the model to get the token wrong"
        return "1 - p of the token when it was drawn: the chance of error that an estimator learns, and this model has none"

    @property
    def a_token(self) -> str:
        """The meaning of a token, in words."""
        if self.tokenizer.name == "bytes":
            return "A token is a byte: a letter of English, a part of others."
        return "A token is a word or a part of one; a space or a mark is often part of it, or a token of its own."


@dataclass(frozen=True)
class Frame:
    """One moment: ids [L], which are given, which are new, and a shade in [0, 1] for each that is not given."""

    step: int
    steps: int
    ids: list[int]
    given: list[bool]
    new: list[bool]
    shades: list[float]
    done: bool = False


def read_text(tokenizer: Tokenizer, text: str, *, blank: int, append: int, longest: int) -> list[int]:
    """Ids of the text, then `append` masks. [MASK] is one mask, ___ is `blank` masks. Raises UsageError."""
    ids: list[int] = tokenizer.encode_prompt(BLANK.sub("[MASK]" * blank, text)) + [tokenizer.mask_id] * append
    if len(ids) > longest:
        raise UsageError(f"this is {len(ids)} tokens, and the model takes at most {longest}; shorten the text or the blanks")
    if tokenizer.mask_id not in ids:
        raise UsageError("there is nothing to fill in: write [MASK] or ___ where text is missing, or append some tokens")
    return ids


def frames(
    player: Player,
    ids: list[int],
    *,
    sampler: str,
    steps: int,
    temperature: float,
    seed: int,
    left: threading.Event | None = None,
) -> Iterator[Frame]:
    """The moments of filling in `ids`: the start, every step that changed something, and the end. Raises UsageError.

    The sampler runs in a thread. It ends when the generator does; both end at the next step after `left` is set.
    A slow reader misses moments, but not the end.
    """
    import torch

    from atat_fast.sampling.samplers import sample

    model, mask = player.model, player.model.mask_id
    start = torch.tensor([ids], device=player.compute.device)
    given = [i != mask for i in ids]
    scores = _scorer(player)
    options: dict[str, Any] = {"steps": steps, "sampler": sampler, "temperature": temperature, "seed": seed}
    if sampler == "importance" and scores is not None and player.estimator is not None:
        options |= {"importance": scores, "tilt": player.estimator.config.tilt}
    arrived: queue.Queue[Frame | BaseException] = queue.Queue()
    left = threading.Event() if left is None else left
    shades = _Shades(player, scores, start)

    def on_step(step: int, tokens: Tensor) -> None:
        if left.is_set():
            raise _Left
        new = shades.see(tokens)
        if any(new):
            arrived.put(Frame(step + 1, steps, tokens[0].tolist(), given, new, shades.values()))

    def run() -> None:
        try:
            with torch.no_grad(), player.compute.autocast():
                shades.begin()
                arrived.put(Frame(0, steps, ids, given, [False] * len(ids), shades.values()))
                final = sample(model, start, on_step=on_step, **options)
                shades.see(final)
            arrived.put(Frame(steps, steps, final[0].tolist(), given, [False] * len(ids), shades.values(), done=True))
        except BaseException as error:  # the reader raises it
            arrived.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            found = arrived.get()
            # A late reader skips frames between the start and the end.
            while arrived.qsize() >= MOST_WAITING and isinstance(found, Frame) and found.step and not found.done:
                found = arrived.get()
            if left.is_set():
                return
            if isinstance(found, BaseException):
                raise found
            yield found
            if found.done:
                return
    finally:
        left.set()


class _Left(Exception):
    """Nobody watches the page any more."""


class _Shades:
    """Shades of tokens: the estimator's score while hidden, or without an estimator 1 - p at the step that draws the token."""

    def __init__(self, player: Player, scores: Callable[[Tensor, Tensor], Tensor] | None, start: Tensor) -> None:
        self.player, self.scores, self.before = player, scores, start.clone()
        self.shade = start.new_zeros(start.shape[1]).double()

    def begin(self) -> None:
        """Score what is hidden now."""
        if self.scores is not None:
            hidden = self.before[0] == self.player.model.mask_id
            share = hidden.float().mean()[None]
            self.shade = self.shade.where(~hidden, self.scores(self.before, share)[0].double())

    def see(self, tokens: Tensor) -> list[bool]:
        """Take the tokens after a step. Returns which of them the step drew."""
        drawn = (self.before[0] == self.player.model.mask_id) & (tokens[0] != self.player.model.mask_id)
        rows = drawn.nonzero().flatten()
        if self.scores is None and len(rows):
            model = self.player.model
            share = (self.before == model.mask_id).float().mean(1)
            chance = model.logits(model.features(self.before, share, rows=rows)).double().softmax(-1)
            self.shade[rows] = 1 - chance.gather(1, tokens[0][rows, None])[:, 0]
        self.before = tokens.clone()
        if len(rows):
            self.begin()
        found: list[bool] = drawn.tolist()
        return found

    def values(self) -> list[float]:
        """Shades in [0, 1]."""
        found: list[float] = self.shade.clamp(0, 1).tolist()
        return found


def _scorer(player: Player) -> Callable[[Tensor, Tensor], Tensor] | None:
    if player.estimator is None or player.estimator.network is None:
        return None
    return player.estimator.scorer(player.model)


def picture(frame: Frame, pieces: Pieces) -> str:
    """A frame as HTML: given text plain, the rest in shaded spans."""
    parts = []
    for first, end, text in pieces(frame.ids):
        if text is None:
            parts.append(_span("hidden", HIDDEN, frame.shades[first]))
        elif all(frame.given[first:end]):
            parts.append(html.escape(text))
        else:
            parts.append(_span("drawn new" if any(frame.new[first:end]) else "drawn", text, max(frame.shades[first:end])))
    return f'{STYLE}<div class="canvas" role="status" data-done="{str(frame.done).lower()}">{"".join(parts)}</div>'


def legend(player: Player) -> str:
    """The legend of the canvas, as HTML."""
    shades = "".join(f'<span class="drawn" style="--i:{i / 4}">&nbsp;{i / 4:g}&nbsp;</span>' for i in range(5))
    lines = (
        f"<b>[MASK]</b> is one token to fill in, <b>___</b> several. {html.escape(player.a_token)}",
        f'plain: given &middot; <span class="hidden" style="--i:0">{HIDDEN}</span> hidden &middot; '
        f'<span class="drawn new" style="--i:0">underlined</span> newly drawn &middot; '
        f"{PART} part of a character whose rest is hidden",
        f"{shades} shade of what was not given: {html.escape(player.shading)}",
    )
    return f'{STYLE}<div class="legend">{"<br>".join(lines)}</div>'


def _span(kind: str, text: str, shade: float) -> str:
    return f'<span class="{kind}" style="--i:{shade:.3f}" title="{shade:.2f}">{html.escape(text)}</span>'


def build(player: Player) -> Any:
    """The page as Gradio's Blocks. Raises UsageError if Gradio is not installed."""
    gradio = _gradio()
    from atat_fast.sampling.samplers import SAMPLERS

    usable = [name for name in SAMPLERS if _usable(name, player)]
    longest = player.model.config.length
    if player.model.config.block:
        raise UsageError(
            "the playground shows whole texts, and this model makes them block by block; use python -m atat_fast.sample"
        )
    pieces = Pieces(player.tokenizer.decode, player.model.mask_id)
    running: dict[str | None, threading.Event] = {}  # stops the sampler of each open page

    def fill(
        text: str, sampler: str, steps: float, temperature: float, blank: float, append: float, seed: float, request: Any
    ) -> Iterator[tuple[str, str, str]]:
        left = running[request.session_hash] = threading.Event()
        options: dict[str, Any] = {"sampler": sampler, "steps": int(steps), "temperature": temperature, "seed": int(seed or 0)}
        try:
            ids = read_text(player.tokenizer, text, blank=int(blank), append=int(append), longest=longest)
            for frame in frames(player, ids, **options, left=left):
                hidden = frame.ids.count(player.model.mask_id)
                said = "done" if frame.done else f"step {frame.step} of {frame.steps}, {hidden} tokens to go"
                yield picture(frame, pieces), said, player.tokenizer.decode(frame.ids) if frame.done else ""
        except UsageError as error:
            told = gradio.Error(html.escape(str(error)))  # shown as HTML
            told.print_exception = False
            raise told from error
        finally:
            if running.get(request.session_hash) is left:
                del running[request.session_hash]

    def stop(request: Any) -> str:
        left = running.pop(request.session_hash, None)
        if left is None:
            return "nothing is being filled in"
        left.set()
        return "stopped"

    def leave(request: Any) -> None:
        stop(request)

    for function in (fill, stop, leave):  # Gradio passes its Request to parameters with this annotation
        function.__annotations__["request"] = gradio.Request

    own: dict[str, Any] = {"title": "atat_fast playground", "analytics_enabled": False}
    with gradio.Blocks(**own) as page:
        gradio.Markdown(f"## {_plain(player.title)}")
        gradio.HTML(legend(player), elem_id="legend")
        text = gradio.Textbox(EXAMPLE, label="Text with blanks", lines=3, elem_id="text")
        with gradio.Row():
            sampler = gradio.Dropdown(usable, value=usable[0], label="Sampler", elem_id="sampler")
            steps = gradio.Slider(1, max(256, longest), value=min(64, longest), step=1, label="Steps", elem_id="steps")
            temperature = gradio.Slider(
                0.0, 2.0, value=1.0, step=0.05, label="Temperature (0: the likeliest)", elem_id="temperature"
            )
        with gradio.Row():
            blank = gradio.Slider(
                1, max(2, longest // 2), value=min(8, longest // 2), step=1, label="Tokens in ___", elem_id="blank"
            )
            append = gradio.Slider(0, longest - 1, value=0, step=1, label="Tokens to append", elem_id="append")
            seed = gradio.Number(0, label="Seed", precision=0, elem_id="seed")
        with gradio.Row():
            button = gradio.Button("Fill in", variant="primary", elem_id="fill")
            stop_button = gradio.Button("Stop", variant="stop", elem_id="stop")
        canvas = gradio.HTML(label="Text", elem_id="canvas")
        said = gradio.Textbox(label="Progress", interactive=False, elem_id="progress")
        final = gradio.Textbox(label="As text", interactive=False, lines=3, elem_id="final")
        inputs = [text, sampler, steps, temperature, blank, append, seed]
        filling = gradio.on([button.click, text.submit], fill, inputs, [canvas, said, final], show_progress="hidden")
        stop_button.click(stop, None, said, cancels=[filling], queue=False, show_progress="hidden")
        page.unload(leave)
    return page


def _usable(sampler: str, player: Player) -> bool:
    if sampler == "ddpm_cache":
        return not player.model.time_conditioning
    return sampler != "importance" or _scorer(player) is not None


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise UsageError(f"the playground needs the package gradio, which is not installed: {INSTALL}") from error
    return gradio


def main(arguments: Sequence[str]) -> int:
    """The command. Serves the page until it is stopped. Status 0, or 2 on bad input."""
    parser = make_parser(prog="python -m atat_fast.playground", description="A page to fill in text with a model.")
    parser.add_argument("--run", type=path_text, default=None, help="A run folder, or one of its checkpoints.")
    parser.add_argument("--model", type=path_text, default=None, help="A saved model instead of a run: a folder, or owner/name.")
    parser.add_argument("--tokenizer", type=path_text, default=None, help="Tokenizer of a --model that was saved without one.")
    parser.add_argument("--checkpoint", type=Literal["best", "last"], default="best", help="Which checkpoint of the run.")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="Address to serve at: 127.0.0.1 is this machine alone.")
    parser.add_argument("--port", type=int, default=7860, help="Port to serve at.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where to compute.")
    parser.add_argument("--dtype", type=Literal["auto", "bf16", "fp32"], default="auto", help="Precision.")
    args = parser.parse_args(list(arguments))
    if (args.run is None) == (args.model is None):
        raise UsageError("say what to play with: --run runs/NAME, or --model FOLDER for a saved model")
    if not 0 < args.port < 1 << 16:
        raise UsageError(f"--port must be in 1..65535, got {args.port}")
    gradio = _gradio()
    page = build(to_play_with(args))
    fonts = ["system-ui", "sans-serif"]  # names only: the page loads no font files
    theme = gradio.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"])
    options: dict[str, Any] = {"server_name": args.host, "server_port": args.port, "quiet": True, "share": False}
    if "theme" in inspect.signature(page.launch).parameters:
        options["theme"] = theme
    else:
        page.theme = theme
    print(f"playground at http://{args.host}:{args.port}  (stop with Ctrl-C)", flush=True)
    try:
        page.queue().launch(**options)
    except OSError as error:
        raise UsageError(f"the page cannot be served at {args.host}:{args.port}; give another --port") from error
    return 0


def to_play_with(args: Any) -> Player:
    """The model of --run or --model, on its device. Raises UsageError."""
    from atat_fast.hardware.compute import resolve
    from atat_fast.runs.loaded import open_model

    compute = resolve(TrainConfig(device=args.device, dtype=args.dtype, compile="off"), "--")
    found = open_model(run=args.run, model=args.model, tokenizer=args.tokenizer, which=args.checkpoint)
    if found.estimator is not None:
        found.estimator.eval().to(compute.device)
    return Player(found.model.eval().to(compute.device), found.reads(), found.estimator, compute, found.title)


if __name__ == "__main__":
    run_command(main)
