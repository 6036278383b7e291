#!/usr/bin/env bash
# Two or more hosts, the same command on each:
#
#   HEAD=10.0.0.1:29400 CARDS=8 bash docs/launch/two_hosts.sh --preset large --run.root /shared/runs --run.name large ...
#
# All hosts need the same data, and a run.root that all of them see. HEAD's host is the meeting point: its port must be open to
# the others. They may start in any order, within a few minutes.
#
# HEAD        host:port of the meeting point, the same everywhere (no default)
# HOSTS       how many hosts (2)
# CARDS       processes on each host, one a card (8)
# JOB         a name that all hosts of this run share, and no other run (atat_fast)
# RESTARTS    how often a failed run restarts from its last checkpoint (3)
#
# If NCCL picks the wrong network interface between the hosts, NCCL_SOCKET_IFNAME names the right one.
set -euo pipefail
: "${HEAD:?set HEAD to host:port of the meeting point, the same on every host}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="${HOSTS:-2}" --nproc-per-node="${CARDS:-8}" \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${JOB:-atat_fast}" --max-restarts="${RESTARTS:-3}" \
  -m atat_fast.train "$@"
