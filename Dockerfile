# The image that the KubeRay files name (deploy/cluster_files/), and that serves a student in a container:
#   docker build --tag example.com/opdlm-ray:0.1.0 .
#   docker run --gpus all --shm-size 8g --volume /shared:/shared --publish 8000:8000 example.com/opdlm-ray:0.1.0 \
#     opdlm serve /shared/runs/mine/student --gpus-per-replica 1 --host 0.0.0.0 --api-key-file /shared/keys
# Packages have the versions of constraints.txt. torch brings CUDA's libraries: the machine needs only the driver.
# `--build-arg EXTRAS=serve,eval,lora,nixl` chooses other optional parts of pyproject.toml.
FROM python:3.11-slim

# g++: torch compiles kernels (flex_attention) as it meets them. wget: KubeRay's probes.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ wget \
    && rm -rf /var/lib/apt/lists/*

# What changes seldom first: with other code alone, a build takes seconds.
ARG EXTRAS=serve,eval,lora
COPY pyproject.toml constraints.txt /src/
RUN python -c "import sys, tomllib; \
project = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']; \
extras = [project['optional-dependencies'][name] for name in sys.argv[1].split(',')]; \
print(*project['dependencies'], *sum(extras, []), sep='\n')" "$EXTRAS" > /src/requirements.txt \
    && python -m pip install --no-cache-dir --disable-pip-version-check --constraint /src/constraints.txt \
        --requirement /src/requirements.txt

COPY . /src
RUN python -m pip install --no-cache-dir --disable-pip-version-check --no-deps /src \
    && python -m pip check \
    && opdlm recipes > /dev/null

# The container runtime of NVIDIA reads these.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 1000 --create-home --shell /bin/bash ray
USER ray
WORKDIR /home/ray
CMD ["opdlm", "--help"]
