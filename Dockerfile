# Grappa in a container; without arguments it runs the demo. Not built so far: README.md, `What has not run`.
#
#   docker build -t grappa .
#   docker run --rm -v "$PWD/work:/work" grappa                                  # the demo, into work/demo
#   docker run --rm -v "$PWD/work:/work" grappa init mine --images photos        # any other command, in work/
#
# For a GPU, with the NVIDIA container toolkit on the host:
#
#   docker build -t grappa-gpu --build-arg BASE=nvidia/cuda:12.6.3-base-ubuntu24.04 --build-arg EXTRA=gpu .
#   docker run --rm --gpus all -v "$PWD/work:/work" grappa-gpu
#
# torch's usual build holds the libraries of CUDA, some gigabytes. An index of its builds for the CPU, given as
# --build-arg PIP_EXTRA_INDEX_URL=ADDRESS, makes the CPU image much smaller.

ARG BASE=python:3.12-slim
FROM ${BASE}

ARG EXTRA=cpu
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PATH=/opt/grappa/bin:$PATH

# A base without Python (NVIDIA's) gets that of its distribution.
RUN command -v python3 >/dev/null \
    || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*)

WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY grappa grappa
COPY pipeline pipeline
COPY slurm slurm
RUN python3 -m venv /opt/grappa \
    && python -m pip install --constraint constraints.txt ".[all,hub,onnx,${EXTRA}]"

WORKDIR /work
ENV HOME=/work
ENTRYPOINT ["grappa"]
CMD ["demo", "demo"]
