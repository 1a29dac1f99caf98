# The software of a node: `docker build .` for CPUs, `docker build --build-arg DEVICE=cuda .` for NVIDIA GPUs.
#
# PyPI's torch for Linux brings CUDA along, some gigabytes that a CPU does not need: `--build-arg TORCH_INDEX=URL` names an index with
# another build, `--build-arg PACKAGES="gcsfs …"` whatever else a store or cloud needs. Nothing here runs as root.
ARG DEVICE=cpu
ARG PYTHON=3.12

FROM ubuntu:24.04 AS cpu
# With nvcc and headers, of the release that the pinned torch is made with: DeepSpeed compiles the optimizer of `zero.offload_optimizer`.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda

FROM ${DEVICE} AS base
ARG PYTHON
ENV DEBIAN_FRONTEND=noninteractive
# g++ and ninja compile DeepSpeed's operators; wget is for the probes of KubeRay, rsync and ssh for Ray's cluster launcher, which runs on the head, too.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ netbase ninja-build openssh-client rsync wget "python${PYTHON}" "python${PYTHON}-dev" "python${PYTHON}-venv" \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu \
    && useradd --uid 1000 --user-group --create-home --shell /bin/bash maskwright \
    && install --directory --owner=maskwright --group=maskwright --mode=0700 /home/maskwright/.ray

FROM base AS wheel
ARG PYTHON
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY launcher launcher
COPY trainer trainer
COPY data_pipeline data_pipeline
COPY cluster_configs cluster_configs
RUN "python${PYTHON}" -m venv /build \
    && /build/bin/pip install --no-cache-dir --constraint constraints.txt build hatchling \
    && /build/bin/python -m build --wheel --no-isolation --outdir /wheels

FROM base AS node
ARG PYTHON
ARG TORCH_INDEX=
ARG PACKAGES=
COPY constraints.txt /opt/maskwright/constraints.txt
COPY --from=wheel /wheels /opt/maskwright/wheels
# hadolint ignore=SC2086
RUN "python${PYTHON}" -m venv /opt/maskwright/venv \
    && /opt/maskwright/venv/bin/pip install --no-cache-dir --constraint /opt/maskwright/constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$(echo /opt/maskwright/wheels/*.whl)[s3,zst]" boto3 ${PACKAGES}
# HOME: Ray's cluster launcher copies the token to where the image says that it is.
ENV HOME=/home/maskwright \
    PATH=/opt/maskwright/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false \
    RAY_USAGE_STATS_ENABLED=0
# By number: Kubernetes cannot tell whether a name is root.
USER 1000:1000
WORKDIR /home/maskwright
CMD ["maskwright", "--help"]
