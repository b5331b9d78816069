# A small image that serves bundles: no torch, no Ray, not root, and its root may be read-only. From the repository's folder:
#   docker build -f deploy/serve.Dockerfile -t cibl-ray-serve .
#   docker run --read-only -p 127.0.0.1:8000:8000 -v "$PWD/runs/NAME/bundle:/model:ro" cibl-ray-serve
# With Ray Serve, for KubeRay: --build-arg EXTRA=serve --build-arg PACKAGES="bash wget"
FROM debian:trixie-slim AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY pipelines pipelines
COPY cibl_ray cibl_ray
COPY serve serve
COPY configs configs
ARG EXTRA=serve-cpu
RUN python3 -m venv /opt/cibl-ray \
    && /opt/cibl-ray/bin/pip install --no-cache-dir --constraint requirements.lock ".[$EXTRA]"

FROM debian:trixie-slim
ARG PACKAGES=
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 $PACKAGES \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home cibl
COPY --from=build /opt/cibl-ray /opt/cibl-ray
ENV PATH=/opt/cibl-ray/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /home/cibl
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["python", "-m", "serve"]
CMD ["--simple", "--host", "0.0.0.0", "/model"]
