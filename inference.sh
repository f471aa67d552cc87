#!/usr/bin/env bash
# Sample videos.
#   bash inference.sh                                        the toy models, text then image to video, on any machine
#   bash inference.sh args.seed=7                            the toy for text to video
#   bash inference.sh configs/cogvideox_5b.yaml configs/inference.yaml args.load=FOLDER
# Words that end with .yaml are merged, later ones win; everything else goes to sample_video.py as it is.
# Paths are relative to this folder. Several processes share the prompts: NPROC_PER_NODE=4 bash inference.sh ...
set -euo pipefail
cd "$(dirname "$0")"

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
sample=("$PYTHON" sample_video.py)

base=()
rest=()
for word in "$@"; do
    if [[ "$word" == *.yaml || "$word" == *.yml ]]; then base+=("$word"); else rest+=("$word"); fi
done

if [[ ${#base[@]} -eq 0 ]]; then
    base=(configs/toy.yaml configs/toy_inference.yaml)
    if [[ $# -eq 0 ]]; then
        "${sample[@]}" --base "${base[@]}"
        base=(configs/toy_i2v.yaml configs/toy_inference.yaml)
        rest=(args.output_dir=outputs/toy_i2v)
    fi
fi
# Old versions of bash take an empty list for an unset one.
words=(--base "${base[@]}" ${rest[@]+"${rest[@]}"})

if [[ "${NPROC_PER_NODE:-1}" != 1 ]]; then
    # Wrong input ends here, with one message instead of one a process.
    WORLD_SIZE=$NPROC_PER_NODE "${sample[@]}" "${words[@]}" --check >/dev/null
    sample=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC_PER_NODE" sample_video.py)
fi
exec "${sample[@]}" "${words[@]}"
