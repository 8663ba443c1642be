# jdpo for TPU or NVIDIA GPU, as a user who is not root.
#
#   docker build --build-arg ACCELERATOR=tpu  --tag IMAGE:tpu .     # TPU (the default)
#   docker build --build-arg ACCELERATOR=cuda --tag IMAGE:cuda .    # GPUs: CUDA comes with the packages, the driver is the host's
#   docker run --rm IMAGE:tpu --version
#
# Pinned: the base image by its tag, every package by docker/requirements-*.txt, which
# `python scripts/write_requirements.py` makes from pyproject.toml.
FROM python:3.12.12-slim-bookworm

ARG ACCELERATOR=tpu

# One layer for all dependencies. It changes with the pins, and not with the code of jdpo.
COPY docker/requirements-${ACCELERATOR}.txt /tmp/requirements.txt
RUN pip install --no-cache-dir --no-deps --only-binary :all: --requirement /tmp/requirements.txt

COPY . /opt/jdpo
RUN pip install --no-cache-dir --no-deps --no-build-isolation /opt/jdpo \
    # Fails now and not on the nodes if a pin is missing or does not fit.
    && pip check \
    && jdpo --version \
    # The number is that of `runAsUser` and `fsGroup` in the JobSet.
    && groupadd --gid 1000 jdpo \
    && useradd --uid 1000 --gid 1000 --create-home jdpo

# Where GKE and the NVIDIA container runtime put the driver's libraries and nvidia-smi; without GPUs the folder is missing,
# which does no harm.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PATH=/usr/local/nvidia/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER 1000:1000
WORKDIR /home/jdpo
# As exec: jdpo is process 1 and gets SIGTERM itself.
ENTRYPOINT ["jdpo"]
CMD ["--help"]
