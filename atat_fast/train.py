"""Train a model:  torchrun -m atat_fast.train [--preset NAME] [--config FILE] [--group.setting VALUE ...]

Without arguments it trains the demo: a small model of the running Python's documentation, in a few minutes on two CPU cores.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from atat_fast.cli import make_parser, parse_config, run_command
from atat_fast.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    """The command. Status 0 if the run is complete, 1 if it diverged, 2 on bad input, 128 + N if signal N stopped it.

    Only rank 0 prints; all ranks exit with the same status.
    """
    try:
        return _main(arguments)
    except UsageError:
        if os.environ.get("RANK", "0") == "0":
            raise
        from atat_fast.distributed.ranks import leave_to_rank_0

        leave_to_rank_0(2)


def _main(arguments: Sequence[str]) -> int:
    parser = make_parser(prog="python -m atat_fast.train", description="Train a masked-diffusion language model.")
    parser.add_argument("--resume", action="store_true", help="Continue the run in the run folder from its last checkpoint.")
    parser.add_argument("--dry_run", action="store_true", help="Print parameters, tokens and memory of a step, then stop.")
    config, parsed = parse_config(parser, arguments)
    if parsed.dry_run:
        return _dry_run(config)

    from atat_fast.distributed.ranks import Launch, Ranks, leave_to_rank_0, lost_contact
    from atat_fast.evaluation.likelihood import per_byte
    from atat_fast.hardware.compute import resolve
    from atat_fast.report import write_report
    from atat_fast.training.plan import check
    from atat_fast.training.trainer import Diverged, Interrupted, Trainer

    launch = Launch.of()
    check(config, launch.size, launch.local_size)
    ranks = Ranks.start(resolve(config.train).device.type, config.parallel.timeout, launch)
    try:
        trainer = Trainer(config, resume=parsed.resume, ranks=ranks)
        last = trainer.train()
    except Diverged as error:
        if ranks.first or not error.everywhere:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        leave_to_rank_0(1, ranks)
    except Interrupted as stop:
        if ranks.first:
            print(stop, file=sys.stderr, flush=True)
            return stop.code
        leave_to_rank_0(stop.code, ranks)
    except Exception as error:
        if ranks.size == 1 or isinstance(error, (UsageError, OSError)):
            raise
        if isinstance(error, RuntimeError) and lost_contact(error):
            print(f"rank {ranks.rank} stops: it lost contact with another rank", file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"rank {ranks.rank} failed, which ends the run", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: to take the process group down would be to wait for ranks that wait for this one
    ranks.leave()
    if not ranks.first:
        return 0
    page = write_report(trainer.folder)
    gain = last["unigram_entropy"] - last["nll"]
    side = "below" if gain >= 0 else "above"
    print(f"unigram entropy {last['unigram_entropy']:.4f} nats a token (held-out text; the model is {abs(gain):.4f} {side} it)")
    print(f"val/nll {last['nll']:.4f} ± {last['nll_se']:.4f} nats a token, {per_byte(last)}")
    print(f"report {page}")
    return 0


def _dry_run(config) -> int:  # type: ignore[no-untyped-def]
    """Print the plan, for the cards of parallel.device and parallel.world_size, or for this machine's."""
    from atat_fast.data.tokenizers import vocabulary
    from atat_fast.distributed.ranks import Launch
    from atat_fast.hardware.compute import resolve
    from atat_fast.hardware.devices import named
    from atat_fast.runs.trackers import require
    from atat_fast.training.plan import describe

    require(config.run)
    size, mask_id = vocabulary(config.data.tokenizer)
    device = named(config.parallel.device) if config.parallel.device else None
    started = launch = Launch.of()
    if config.parallel.world_size:
        launch = Launch(
            size=config.parallel.world_size, local_size=min(config.parallel.world_size, device.cards if device else 8)
        )
    lines = describe(config, size, mask_id, resolve(config.train), launch, device)
    if started.rank == 0:
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_command(main)
