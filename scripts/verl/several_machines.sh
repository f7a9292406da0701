#!/usr/bin/env bash
# Trains with verl on several machines: run the same line on each of them, with its own NODE_RANK.
#
#   NODE_RANK=0 NODES=4 HEAD=<host name of machine 0> scripts/verl/several_machines.sh ppo|grpo|reinforce_plus_plus [verl override ...]
#
# Machine 0 waits for the others and trains; the others serve until it ends. Under Slurm: `srun --ntasks-per-node=1 bash -c 'NODE_RANK=$SLURM_NODEID
# NODES=$SLURM_NNODES HEAD=... scripts/verl/several_machines.sh grpo'`. Rows, model, agent loops, search data (SEARCHQA_DATA, exported here, because
# Ray's workers inherit the environment of the machine's `ray start`) and this project must be there on every machine, at the same paths; a retriever
# that is a server must be reachable from each. `ray stop` at the end stops every Ray of this user on the machine.
#
# Ray's machines trust each other by a token, the same on each: RAY_AUTH_TOKEN, or the file ~/.ray/auth_token (`ray get-auth-token --generate`, then copy
# it). RAY_AUTH_MODE=disabled, on every machine, does without, where nobody else is on the network.
#
# Tried as two Ray nodes on one machine, with verl replaced by a line that counts them; never on several machines.
set -euo pipefail

: "${NODE_RANK:?set NODE_RANK to the number of this machine, from 0}" "${NODES:?set NODES to the number of machines}" "${HEAD:?set HEAD to the host name of machine 0}"
PORT=${PORT:-6379}
GPUS=${GPUS:-8}
WAIT=${WAIT:-600} # seconds for the others to come
export NODES GPUS
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} # said outright: by default the head decides by whether it has a token, and the others do not follow
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -f "$HOME/.ray/auth_token" ]; then
    echo "$0: Ray needs a token that is the same on every machine; set RAY_AUTH_TOKEN, or see the top of this file" >&2
    exit 2
fi

if [ "$NODE_RANK" != 0 ]; then
    deadline=$((SECONDS + WAIT))
    until ray start --address="$HEAD:$PORT" --num-gpus="$GPUS"; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            echo "$0: no Ray at $HEAD:$PORT within $WAIT seconds" >&2
            exit 1
        fi
        sleep 5
    done
    trap 'ray stop' EXIT
    while ray status --address="$HEAD:$PORT" > /dev/null 2>&1; do
        sleep 15
    done
    exit 0
fi

ray start --head --port="$PORT" --num-gpus="$GPUS"
trap 'ray stop' EXIT
export RAY_ADDRESS=$HEAD:$PORT
"${PYTHON:-python3}" - "$NODES" "$WAIT" << 'WAIT_FOR_NODES'
import sys, time
import ray

nodes, seconds = int(sys.argv[1]), float(sys.argv[2])
ray.init(address="auto", log_to_driver=False)
deadline = time.monotonic() + seconds
while (here := sum(node["Alive"] for node in ray.nodes())) < nodes:
    if time.monotonic() > deadline:
        sys.exit(f"{here} of {nodes} machines within {seconds:.0f} seconds")
    time.sleep(2)
WAIT_FOR_NODES
"$(dirname "$0")/train.sh" "$@"
