#!/usr/bin/env bash
# Train on several devices, one process each, on this machine or on several.
#   bash finetune_multi_gpus.sh                               a LoRA of the toy, on all accelerators, or on two processes
#   NPROC_PER_NODE=4 bash finetune_multi_gpus.sh configs/cogvideox_5b_lora.yaml configs/sft.yaml args.train_data=FOLDER
# On each of two machines, NODE_RANK=0 on the one whose address is MASTER_ADDR:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500 bash finetune_multi_gpus.sh ...
# On one to four machines, whichever are there, without numbers; MASTER_ADDR is one that stays:
#   NNODES=1:4 MAX_RESTARTS=3 MASTER_ADDR=node0 bash finetune_multi_gpus.sh ...
# NPROC_PER_NODE defaults to the number of accelerators, or 2 on a CPU. MAX_RESTARTS (0) is how often all processes are
# restarted after one fails; with args.resume=auto they resume from the newest checkpoint.
# With --check, nothing is trained; on several machines all give it, and their ranks are compared.
# Arguments that end with .yaml are merged, later ones win; all others are passed to train_video.py
# (--trust my_package lets targets in the YAML run code of that package).
# Paths are relative to this folder.
set -euo pipefail
export COGVIDEOX_COMMAND="bash finetune_multi_gpus.sh${*:+$(printf ' %q' "$@")}"  # findings are headed by it
cd "$(dirname "$0")"

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

base=()
rest=()
for word in "$@"; do
    word=${word#--base=}
    if [[ "$word" =~ ^[A-Za-z_][A-Za-z0-9_.]*= && ! -e "$word" ]]; then rest+=("$word")  # whatever its value ends with
    elif [[ "$word" == *.yaml || "$word" == *.yml ]]; then base+=("$word")
    elif [[ "$word" != --base ]]; then rest+=("$word"); fi
done
[[ ${#base[@]} -eq 0 ]] && base=(configs/toy_lora.yaml configs/toy_sft.yaml)
# Old versions of bash treat an empty array as unset.
words=(--base "${base[@]}" ${rest[@]+"${rest[@]}"})

if [[ -z "${NPROC_PER_NODE:-}" ]]; then
    NPROC_PER_NODE=$("$PYTHON" -c 'import torch; print(torch.accelerator.device_count() or 2)')
fi
export NPROC_PER_NODE
nodes=${NNODES:-1}
if [[ ! "$NPROC_PER_NODE" =~ ^[1-9][0-9]*$ || ! "$nodes" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]]; then
    echo "error: NPROC_PER_NODE is '$NPROC_PER_NODE' and NNODES is '$nodes': the first is the number of processes on a" \
        "machine, the second that of machines, or a range such as 1:4; give numbers from 1, or unset them" >&2
    exit 2
fi
launch=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NPROC_PER_NODE" --max_restarts "${MAX_RESTARTS:-0}")
if [[ "$nodes" == 1 ]]; then
    launch+=(--standalone)
elif [[ "$nodes" == *:* ]]; then
    launch+=(--nnodes "$nodes" --rdzv_id "${RUN_ID:-cogvideox}" --rdzv_backend c10d)
    launch+=(--rdzv_endpoint "${MASTER_ADDR:?the address of a machine that stays}:${MASTER_PORT:-29500}")
else
    launch+=(--nnodes "$nodes" --node_rank "${NODE_RANK:?the number of this machine, from 0}")
    launch+=(--master_addr "${MASTER_ADDR:?the address of machine 0}" --master_port "${MASTER_PORT:-29500}")
fi

# One process checks the input first, for the fewest machines: one message instead of one per process.
check=(env "WORLD_SIZE=$((NPROC_PER_NODE * ${nodes%%:*}))" "$PYTHON" train_video.py "${words[@]}" --check)
for word in "$@"; do
    case "$word" in
        --help | -h | --devices*) exec "${check[@]}" ;;
        --check) [[ "$nodes" != 1 ]] || exec "${check[@]}" ;; # on several machines the ranks are compared, too
    esac
done
"${check[@]}" >/dev/null
exec "${launch[@]}" train_video.py "${words[@]}"
