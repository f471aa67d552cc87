# The commands of the project in a container; docs/installing.md says how to use it.
#
#   docker build --tag cogvideox .
#
# BASE: an image of Ubuntu 24.04. One of CUDA (nvidia/cuda:VERSION-devel-ubuntu24.04) adds nvcc, with which DeepSpeed
#   compiles kernels of its own; PyTorch brings the libraries that it needs.
# TORCH_INDEX: an index with other builds of PyTorch, such as its builds for CPUs alone, which are smaller.
# EXTRAS: of setup.py.
# WEB: gradio and what only it needs, as in the Makefile: all is pinned, and its own bound on pillow is below the pillow of
#   constraints.txt, with which it works. Empty for an image without the page in the browser.

ARG BASE=ubuntu:24.04
FROM ${BASE}

ARG TORCH_INDEX=""
ARG EXTRAS=diffusers,scenes,evaluate,wandb,optim,lowmem
ARG WEB="gradio gradio-client hf-gradio groovy safehttpx brotli fastapi starlette uvicorn orjson pydub python-multipart \
    pytz semantic-version tomlkit"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Triton and DeepSpeed compile while they run. Ubuntu removes old versions, so that none can be pinned; distclean removes
# the lists of packages.
# hadolint ignore=DL3008,DL3009
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
    && apt-get distclean \
    && python3 -m venv /venv \
    && useradd --create-home --uid 10001 cogvideox \
    && install --directory --owner cogvideox /data
ENV PATH=/venv/bin:$PATH

COPY setup.py pyproject.toml constraints.txt README.md LICENSE /source/
COPY sample_video.py train_video.py data_video.py dit_video_concat.py /source/
COPY sgm /source/sgm
COPY vae_modules /source/vae_modules
COPY tools /source/tools
COPY configs /source/configs
COPY assets /source/assets
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    --constraint /source/constraints.txt "/source[$EXTRAS]" \
    && echo "$WEB" | xargs --no-run-if-empty pip install --no-cache-dir --no-deps --constraint /source/constraints.txt

# Weights, clips and results are mounted here; configurations and the toy come with the package.
USER 10001
WORKDIR /data
CMD ["cogvideox-sample", "--help"]
