#!/usr/bin/env bash
# One job on two nodes without a scheduler: run the same line on each node, with its own number.
#
#     MAIN_HOST=10.0.0.1 NODE_RANK=0 configs/torchrun.sh select --config configs/llama-3.2-3b.yaml --output_dir /shared/selection
#     MAIN_HOST=10.0.0.1 NODE_RANK=1 configs/torchrun.sh select --config configs/llama-3.2-3b.yaml --output_dir /shared/selection
#
# The arguments are dualsft's own, and the YAML that of one machine. The output folder, the data and a model that is
# given as a folder must be the same on all nodes, as on a shared file system. Options for the trainer that the YAML
# or the line has are overridden by those below.
set -euo pipefail

: "${MAIN_HOST:?the address of the first node, which the others can reach}"
: "${NODE_RANK:?the number of this node, from 0}"
NODES=${NODES:-2}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}   # processes per node, one for each GPU
MAIN_PORT=${MAIN_PORT:-29500}       # any port that is free on the first node
STRATEGY=${STRATEGY:-fsdp2}         # the model in shards over all GPUs; hsdp: over those of a node; ddp: all on each

exec torchrun \
    --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS_PER_NODE" \
    --master-addr "$MAIN_HOST" --master-port "$MAIN_PORT" \
    -m dualsft "$@" \
    --trainer.strategy "$STRATEGY" --trainer.num_nodes "$NODES" --trainer.devices "$GPUS_PER_NODE"
