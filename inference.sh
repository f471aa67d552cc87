#!/usr/bin/env bash
# Sample videos.
#   bash inference.sh                                        the toy models, text and image to video, on any machine
#   bash inference.sh args.seed=7                            the toy for text to video
#   bash inference.sh configs/cogvideox_5b.yaml configs/inference.yaml args.load=FOLDER
# Arguments that end with .yaml are merged, later ones win; all others are passed to sample_video.py
# (--trust my_package lets targets in the YAML run code of that package).
# Paths are relative to this folder. To divide the prompts among processes: NPROC_PER_NODE=4 bash inference.sh ...
set -euo pipefail
export COGVIDEOX_COMMAND="bash inference.sh${*:+$(printf ' %q' "$@")}"  # findings are headed by it
cd "$(dirname "$0")"

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
sample=("$PYTHON" sample_video.py)

base=()
rest=()
for word in "$@"; do
    word=${word#--base=}
    if [[ "$word" =~ ^[A-Za-z_][A-Za-z0-9_.]*= && ! -e "$word" ]]; then rest+=("$word")  # whatever its value ends with
    elif [[ "$word" == *.yaml || "$word" == *.yml ]]; then base+=("$word")
    elif [[ "$word" != --base ]]; then rest+=("$word"); fi
done

if [[ ${#base[@]} -eq 0 ]]; then
    base=(configs/toy.yaml configs/toy_inference.yaml)
    if [[ $# -eq 0 ]]; then
        "${sample[@]}" --base "${base[@]}"
        base=(configs/toy_i2v.yaml configs/toy_inference.yaml)
        rest=(args.output_dir=outputs/toy_i2v)
    fi
fi
# Old versions of bash treat an empty array as unset.
words=(--base "${base[@]}" ${rest[@]+"${rest[@]}"})

if [[ "${NPROC_PER_NODE:-1}" != 1 ]]; then
    if [[ ! "$NPROC_PER_NODE" =~ ^[1-9][0-9]*$ ]]; then
        echo "error: NPROC_PER_NODE is '$NPROC_PER_NODE': give the number of processes, from 1, or unset it" >&2
        exit 2
    fi
    # One process checks the input first: one message instead of one per process.
    check=(env "WORLD_SIZE=$NPROC_PER_NODE" "${sample[@]}" "${words[@]}" --check)
    for word in "$@"; do
        case "$word" in --check | --help | -h) exec "${check[@]}" ;; esac
    done
    "${check[@]}" >/dev/null
    sample=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC_PER_NODE" sample_video.py)
fi
exec "${sample[@]}" "${words[@]}"
