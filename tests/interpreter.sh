#!/usr/bin/env bash
# Install the wheel for an interpreter into a folder of its own, and run a short part of the commands, as a user would
# from another folder: imports, --check, two steps of sampling and of training. Takes minutes, and gigabytes of packages.
#
#   bash tests/interpreter.sh python3.12 [arguments of pip, such as --extra-index-url URL]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
if ! "$python" -c "" 2>/dev/null; then
    echo "$python: not found, left out"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt "$@" ".[diffusers]"
cd "$work"
bin=$work/venv/bin
"$bin/python" -c "import sgm, train_video, sample_video, dit_video_concat, data_video, vae_modules.autoencoder, diffusers"
"$bin/cogvideox-sample" --base configs/toy.yaml configs/toy_inference.yaml --check
"$bin/cogvideox-sample" --base configs/toy.yaml configs/toy_inference.yaml args.num_steps=2 args.output_dir=videos
"$bin/cogvideox-train" --base configs/toy_lora.yaml configs/toy_sft.yaml args.train_iters=2 args.eval_interval=null \
    args.save=runs
"$bin/cogvideox-export-sat-lora-weight" --sat_pt_path runs/* --lora_save_directory lora
echo "$python: $("$python" --version) works"
