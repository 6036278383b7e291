"""Train a model:  torchrun -m atat_fast.train [--preset NAME] [--config FILE] [--group.setting VALUE ...]

Without arguments: the demo, a small model on the documentation of the Python that runs it, in a few minutes on two CPU cores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from atat_fast.cli import make_parser, parse_config, run_door
from atat_fast.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    """The door. Status 0 when the run is complete, 1 when it diverged, 2 on bad input, 128 + N when signal N stopped it."""
    parser = make_parser(prog="python -m atat_fast.train", description="Train a masked-diffusion language model.")
    parser.add_argument("--resume", action="store_true", help="Continue the run in the run folder from its last checkpoint.")
    parser.add_argument("--dry_run", action="store_true", help="Print parameters, tokens and memory of a step, and stop.")
    config, parsed = parse_config(parser, arguments)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise UsageError(f"this version trains on one process, and {ranks} were started; use --nproc-per-node=1")
    if parsed.dry_run:
        return _dry_run(config)

    from atat_fast.report import write_report
    from atat_fast.training.trainer import Diverged, Interrupted, Trainer

    trainer = Trainer(config, resume=parsed.resume)
    try:
        last = trainer.train()
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.code
    page = write_report(trainer.folder)
    gain = last["unigram_entropy"] - last["nll"]
    side = "below" if gain >= 0 else "above"
    print(f"unigram entropy {last['unigram_entropy']:.4f} nats a token (held-out text; the model is {abs(gain):.4f} {side} it)")
    print(f"val/nll {last['nll']:.4f} ± {last['nll_se']:.4f} nats a token, {last['bits_per_byte']:.4f} bits per byte")
    print(f"report {page}")
    return 0


def _dry_run(config) -> int:  # type: ignore[no-untyped-def]
    from atat_fast.data.tokenizers import vocabulary
    from atat_fast.training.device import resolve
    from atat_fast.training.plan import describe

    size, mask_id = vocabulary(config.data.tokenizer)
    print("\n".join(describe(config, size, mask_id, resolve(config.train))))
    return 0


if __name__ == "__main__":
    run_door(main)
