#!/usr/bin/env bash
# One card, or a machine without any:   bash docs/launch/one_card.sh --preset small [--run.name mine] ...
# All arguments go to the trainer. PYTHON is the interpreter of the environment it is installed in.
set -euo pipefail
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node=1 -m atat_fast.train "$@"
