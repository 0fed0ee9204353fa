# docker build -t lethe . && docker run --rm --gpus all -v lethe-runs:/lethe/runs lethe gpt-j-6b
# Any words after the image's name are run_all.sh's. docs/clusters.md says more.

# CUDA 13, as torch's wheel in requirements.lock has it; that wheel brings the larger libraries itself.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# git names the commit in each result's record. Ubuntu keeps only one version of a package to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git python3 python3-venv wordnet-base \
    && rm -rf /var/lib/apt/lists/*

# Not root, and with your own number (--build-arg LETHE_UID="$(id -u)") a mounted folder is yours too.
ARG LETHE_UID=1000
RUN userdel --remove ubuntu \
    && useradd --create-home --uid "$LETHE_UID" lethe \
    && install --directory --owner lethe --group lethe /lethe /lethe/runs /opt/venv /data
USER $LETHE_UID
WORKDIR /lethe

# run_all.sh uses an active environment that holds the pins.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH LETHE_DATA_DIR=/data HF_HOME=/lethe/runs/huggingface
COPY requirements.lock ./
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock
COPY --chown=lethe:lethe . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python workflow/check_pins.py \
    && python workflow/get_wordnet.py

VOLUME ["/lethe/runs", "/data"]
ENTRYPOINT ["./run_all.sh"]
