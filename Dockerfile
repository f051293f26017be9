# Lory on one NVIDIA GPU. gcc and Python's headers stay in the image: Triton compiles its
# launchers at run time, and the CPU kernels are compiled at first use. Debian versions of system
# packages are left to the base image; Python packages are pinned by constraints.txt.
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3.12 python3.12-dev python3.12-venv curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 lory \
    && mkdir -p /models /adapters \
    && chown lory:lory /models /adapters

ENV VIRTUAL_ENV=/opt/lory \
    PATH=/opt/lory/bin:$PATH \
    HF_HOME=/models \
    PYTHONUNBUFFERED=1

RUN python3.12 -m venv /opt/lory
COPY constraints.txt pyproject.toml README.md LICENSE /src/
RUN pip install --no-cache-dir -c /src/constraints.txt torch==2.13.0
COPY router /src/router
COPY server /src/server
COPY kernels /src/kernels
COPY trainer /src/trainer
RUN pip install --no-cache-dir -c /src/constraints.txt /src

USER 10001
VOLUME ["/models", "/adapters"]
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["curl", "-fsS", "http://127.0.0.1:8080/health"]

ENTRYPOINT ["lory", "serve", "--host", "0.0.0.0", "--port", "8080", "--adapters", "/adapters"]
