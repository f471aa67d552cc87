#!/usr/bin/env bash
# Sample videos.
#   bash inference.sh                                        the toy models, on any machine
#   bash inference.sh configs/cogvideox_5b.yaml configs/inference.yaml args.load=FOLDER
# Words that end with .yaml are merged, later ones win; everything else goes to sample_video.py as it is.
# Several processes share the prompts: NPROC_PER_NODE=4 bash inference.sh ...
set -euo pipefail
cd "$(dirname "$0")"

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
command=("$PYTHON")
if [[ "${NPROC_PER_NODE:-1}" != 1 ]]; then
    command=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC_PER_NODE")
fi

base=()
rest=()
for word in "$@"; do
    if [[ "$word" == *.yaml || "$word" == *.yml ]]; then base+=("$word"); else rest+=("$word"); fi
done

if [[ ${#base[@]} -eq 0 ]]; then
    "${command[@]}" sample_video.py --base configs/toy.yaml configs/toy_inference.yaml "${rest[@]}"
    exec "${command[@]}" sample_video.py --base configs/toy_i2v.yaml configs/toy_inference.yaml \
        args.output_dir=outputs/toy_i2v "${rest[@]}"
fi
exec "${command[@]}" sample_video.py --base "${base[@]}" "${rest[@]}"
