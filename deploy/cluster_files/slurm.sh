#!/usr/bin/env bash
# Starts Ray on the nodes of a Slurm allocation, with token authentication, and then `opdlm train`:
#   sbatch deploy/cluster_files/slurm.sh deploy/multi-node.yaml [further options of opdlm train]
# Slurm sends TERM five minutes before the time limit, and the run writes a checkpoint. Submit again with --resume.
# Memory and Ray's object store are what `opdlm plan deploy/multi-node.yaml` says, and at least a tenth more. With another run
# file give what its plan says: OPDLM_OBJECT_STORE=BYTES sbatch --mem=SIZE ...
#SBATCH --job-name=opdlm
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=224G
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: sbatch $0 RUN.yaml [options of opdlm train]" >&2
  exit 2
fi

port=${OPDLM_RAY_PORT:-6379}
store=${OPDLM_OBJECT_STORE:-42949672960} # bytes, on each node
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(head -n 1 <<<"$nodes") # the node that this script runs on
address=${OPDLM_HEAD_IP:-$(hostname --ip-address | cut -d " " -f 1)}
count=$(wc -l <<<"$nodes")
cpus=${SLURM_CPUS_PER_TASK:-1}

# A token for this job only, in a file that every node sees and only its owner can read.
umask 077
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=${OPDLM_TOKEN_FOLDER:-$HOME/.ray}/opdlm-$SLURM_JOB_ID.token
mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"

started=()
finish() {
  for step in "${started[@]}"; do kill "$step" 2>/dev/null || true; done
  rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap finish EXIT
trap 'exit 143' TERM INT # before the run starts, there is nothing to save

# The dashboard is on the head's loopback: ssh -L 8265:127.0.0.1:8265 HEAD
srun --nodes=1 --ntasks=1 --overlap -w "$head" \
  ray start --head --block --node-ip-address="$address" --port="$port" --num-cpus="$cpus" --dashboard-host=127.0.0.1 \
  --object-store-memory="$store" &
started+=($!)
export RAY_ADDRESS=$address:$port

ready() { # waits until the cluster has $1 nodes, for five minutes at most
  local deadline=$((SECONDS + 300))
  # The list is one line of JSON.
  until [ "$(ray list nodes --filter state=ALIVE --format json 2>/dev/null | grep -o '"node_id"' | wc -l)" -ge "$1" ]; do
    for step in "${started[@]}"; do
      kill -0 "$step" 2>/dev/null || { echo "slurm.sh: Ray ended on a node before the run; see its output above" >&2; return 1; }
    done
    if [ "$SECONDS" -ge "$deadline" ]; then
      echo "slurm.sh: after 5 minutes the Ray cluster at $RAY_ADDRESS has fewer than $1 nodes; see above" >&2
      return 1
    fi
    sleep 2
  done
}

ready 1
if [ "$count" -gt 1 ]; then
  srun --nodes=$((count - 1)) --ntasks=$((count - 1)) --overlap --exclude="$head" \
    ray start --block --address="$RAY_ADDRESS" --num-cpus="$cpus" --object-store-memory="$store" &
  started+=($!)
  ready "$count"
fi

train= asked=
trap 'asked=1; kill -TERM ${train:-} 2>/dev/null || true' TERM INT # from here on, it is the run that ends
opdlm train "$@" &
train=$!
[ -z "$asked" ] || kill -TERM "$train" 2>/dev/null || true # the signal came before its process id was known
code=0
wait "$train" || code=$?
# A trapped signal ends `wait` early: wait again until the checkpoint is written.
while kill -0 "$train" 2>/dev/null; do
  code=0
  wait "$train" || code=$?
done
exit "$code"
