# Two images: `--target router`, without torch, and `--target worker`, for prefill and decode. How to build and run them:
# docs/images.md.

# Has Python 3.11 or later with venv and pip. For builds that are the same to the bit, name it by digest.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

# What pip may take instead of asking an index: empty, unless `--build-context wheels=FOLDER` stands in its place.
FROM scratch AS wheels


FROM ${BASE_IMAGE} AS tools
ARG PIP_INDEX_URL=""
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_NO_INDEX=""
ENV PIP_INDEX_URL=${PIP_INDEX_URL} PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} PIP_NO_INDEX=${PIP_NO_INDEX} \
    PIP_FIND_LINKS=/wheels PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PYTHONHASHSEED=0
WORKDIR /source
COPY pyproject.toml ./
COPY images images
# /tools builds; /opt/venv, which has no pip, is what the images get.
RUN --mount=type=bind,from=wheels,target=/wheels \
    python3 -m venv /tools \
    && python3 -m venv --without-pip /opt/venv \
    && python3 images/requirements.py build >/build.txt \
    && /tools/bin/pip install -q -c images/build-constraints.txt -r /build.txt


# Our own packages, with the stubs of the protos, and the tiny model, below /app.
FROM tools AS app
# Of the files in the wheel.
ARG SOURCE_DATE_EPOCH=315532800
COPY README.md LICENSE hatch_build.py ./
COPY protos protos
COPY common common
COPY pdserve pdserve
COPY router router
COPY prefill_service prefill_service
COPY decode_service decode_service
COPY models/tiny /app/models/tiny
RUN /tools/bin/pip wheel -q --no-deps --no-build-isolation --wheel-dir /wheel . \
    && /tools/bin/pip --python /opt/venv/bin/python install -q --no-compile --no-deps --no-index --target /app /wheel/*.whl \
    && /opt/venv/bin/python -m compileall -q -f --invalidation-mode unchecked-hash /app \
    && chmod -R u=rwX,go=rX /app


# Bytecode is compiled by one process, since what several make depends on which had which file; and it is believed without
# a look at its source, whose time changes.
FROM tools AS router-packages
ARG ROUTER_EXTRAS="http tracing"
RUN --mount=type=bind,from=wheels,target=/wheels \
    python3 images/requirements.py run ${ROUTER_EXTRAS} >/run.txt \
    && /tools/bin/pip --python /opt/venv/bin/python install -q --no-compile -c images/constraints.txt -r /run.txt \
    && /opt/venv/bin/python -m compileall -q -f --invalidation-mode unchecked-hash /opt/venv


FROM tools AS worker-packages
ARG WORKER_EXTRAS="gpu tracing"
# torch has files among its own tests that are written for other Pythons: they do not compile, and nobody imports them.
RUN --mount=type=bind,from=wheels,target=/wheels \
    python3 images/requirements.py run ${WORKER_EXTRAS} >/run.txt \
    && /tools/bin/pip --python /opt/venv/bin/python install -q --no-compile -c images/constraints.txt -r /run.txt \
    && /opt/venv/bin/python -m compileall -q -f -x /testing/_internal/ --invalidation-mode unchecked-hash /opt/venv


FROM ${BASE_IMAGE} AS router
LABEL org.opencontainers.image.title="pdserve router" \
      org.opencontainers.image.description="Takes prompts, places them on prefill and decode workers, streams text" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
COPY --from=router-packages /opt/venv /opt/venv
COPY --from=app /app /app
# /app comes first on Python's path, so that no other `common` or `router` can stand before ours. /tmp is all that has to
# be writable; nobody with the user's number is in /etc/passwd, so the names that Python looks for are here.
ENV PATH=/app/bin:/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    USER=pdserve HOME=/tmp
WORKDIR /app
USER 10001:10001
EXPOSE 50051 9101
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m"]
CMD ["router"]


FROM ${BASE_IMAGE} AS worker
LABEL org.opencontainers.image.title="pdserve worker" \
      org.opencontainers.image.description="Computes prompts (prefill_service) or tokens (decode_service)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
# Triton builds its launchers with a C compiler at the worker's start, on a GPU. Empty: for CPUs.
ARG COMPILER="gcc libc6-dev"
# Debian's archive keeps no version that it has replaced, so there is none to pin.
# hadolint ignore=DL3008
RUN if [ -n "${COMPILER}" ]; then \
        apt-get update && apt-get install -y --no-install-recommends ${COMPILER} && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=worker-packages /opt/venv /opt/venv
COPY --from=app /app /app
# As above. What is compiled and measured on a GPU is kept below HOME.
ENV PATH=/app/bin:/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    USER=pdserve HOME=/tmp
WORKDIR /app
USER 10001:10001
EXPOSE 50052 50053 9102 9103
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m"]
CMD ["decode_service"]
