"""A case of rank_cases.py on ranks that share one process's imports: forked_ranks.py RANKS CASE ARGUMENTS.

torchrun starts every rank anew, and each imports torch and the trainer for seconds. Here one process imports them and forks.
Faults, signals and restarts belong to torchrun (test_faults.py).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback

os.environ |= {"RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0"}

import rank_cases
from torch.distributed import TCPStore

from atat_fast import cli


def rank(number: int, case: str, arguments: list[str]) -> int:
    """In a child: the case as this rank, and the status to leave with."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    rank_cases.RANK = number
    try:
        getattr(rank_cases, case)(*arguments)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(ranks: str, case: str, *arguments: str) -> int:
    """1 if a rank fails; the others are ended then. As under torchrun, the ranks meet at a store of this process."""
    cli.parse_config(cli.make_parser(), [])  # imports what it needs
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    os.environ |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    alive = set()
    for number in range(int(ranks)):
        child = os.fork()
        if not child:
            listening.close()
            status = rank(number, case, list(arguments))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        alive.add(child)
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    failed = False
    while alive:
        child, status = os.wait()
        alive.discard(child)
        if status and not failed:
            failed = True
            for other in alive:
                os.kill(other, signal.SIGKILL)
    del store
    return int(failed)


if __name__ == "__main__":
    rank_cases.find_scripts()
    sys.exit(main(*sys.argv[1:]))
