# Everything that trains, sweeps, evaluates and exports, with FFCV. From the repository's folder:
#   docker build -f deploy/train.Dockerfile -t cibl-ray-train .
#   docker run --gpus all --shm-size 8g -v "$PWD:/data" --user "$(id -u)" cibl-ray-train python -m cibl_ray.train quickstart
FROM debian:trixie-slim
# What FFCV and torch.compile build with; KubeRay asks the health of its pods with wget.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ libopencv-dev libturbojpeg0-dev pkg-config python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home cibl \
    && install -d -o cibl -g cibl /data
WORKDIR /source
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY pipelines pipelines
COPY cibl_ray cibl_ray
COPY serve serve
COPY configs configs
RUN python3 -m venv /opt/cibl-ray \
    && /opt/cibl-ray/bin/pip install --no-cache-dir --constraint requirements.lock \
        ".[train,photos,adapters,data,heic,ffcv,cluster,export]"
ENV PATH=/opt/cibl-ray/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /data
CMD ["python", "-m", "cibl_ray.train", "quickstart"]
