# syntax=docker/dockerfile:1
#
#     docker build -t dualsft .                                    # --build-arg EXTRAS='[lm-eval]' for ready-made tasks
#     docker run --rm --gpus all -v dualsft-cache:/cache -v "$PWD":/work dualsft quickstart --output_dir runs/quickstart
#
# torch's wheels bring the CUDA libraries that they were built with; the base image brings what the driver asks for.
# /work is the working directory; mount your data there, and add `--user "$(id -u):$(id -g)"` to own what comes out.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Ubuntu keeps no old versions of a package to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/dualsft \
    && useradd --create-home --uid 10001 dualsft \
    && install --directory --mode=1777 /cache /cache/huggingface /work

ENV PATH=/opt/dualsft/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface

# The dependencies alone, in a layer that a change of the code leaves as it is.
WORKDIR /src
ARG EXTRAS=
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip install --requirement requirements.txt

COPY README.md LICENSE ./
COPY dualsft dualsft
# What is installed here is this folder.
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip pip install ".${EXTRAS}"

USER 10001
WORKDIR /work
VOLUME ["/cache"]
ENTRYPOINT ["dualsft"]
CMD ["--help"]
