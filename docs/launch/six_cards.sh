#!/usr/bin/env bash
# Six RTX 4090 in one machine:   bash docs/launch/six_cards.sh --preset wikitext103 --run.name seed ...
#
# GeForce drivers give these cards no access to each other's memory. Some releases say that they do, and NCCL hangs in its first
# collective. NCCL_P2P_DISABLE=1 makes NCCL use host memory, which works. On cards with peer-to-peer access (data-centre cards,
# NVLink) that only costs bandwidth: set NCCL_P2P_DISABLE=0.
#
# CARDS       processes, one a card (6)
# RESTARTS    how often a failed or stopped run restarts from its last checkpoint (3)
set -euo pipefail
export NCCL_P2P_DISABLE="${NCCL_P2P_DISABLE:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node="${CARDS:-6}" \
  --max-restarts="${RESTARTS:-3}" -m atat_fast.train "$@"
