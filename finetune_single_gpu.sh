#!/usr/bin/env bash
# Train on one device: the accelerator if available, else the CPU.
#   bash finetune_single_gpu.sh                               a LoRA of the toy, on any machine, in a minute or two
#   bash finetune_single_gpu.sh args.train_iters=20           shorter
#   bash finetune_single_gpu.sh configs/cogvideox_5b_lora.yaml configs/sft.yaml args.train_data=FOLDER
# Arguments that end with .yaml are merged, later ones win; all others are passed to train_video.py
# (--trust my_package lets targets in the YAML run code of that package).
# Paths are relative to this folder.
set -euo pipefail
export COGVIDEOX_COMMAND="bash finetune_single_gpu.sh${*:+$(printf ' %q' "$@")}"  # findings are headed by it
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
exec "$PYTHON" train_video.py --base "${base[@]}" ${rest[@]+"${rest[@]}"}
