# The image of everything that runs Prefect or the mover: server, workers, configuration, flow runs and the daemon.
#
#     docker build -f prefect-runtime.Dockerfile -t mover-runtime:0.1.0 .
#
# All packages come from requirements-runtime.lock, by hash and as wheels: nothing is compiled, and the same lock gives
# the same packages anywhere. Base image and versions are arguments.
ARG PYTHON_IMAGE=python:3.13-slim-trixie

FROM ${PYTHON_IMAGE} AS packages
ARG UV_VERSION=0.13.9
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --root-user-action=ignore --disable-pip-version-check --quiet "uv==${UV_VERSION}"
ENV UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never VIRTUAL_ENV=/opt/mover
WORKDIR /srv/mover
COPY requirements-runtime.lock ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv --quiet --python python3 /opt/mover \
 && uv pip install --quiet --require-hashes --no-build --compile-bytecode -r requirements-runtime.lock \
 # The SDK describes every service of its vendor; S3 is what is used here.
 && find /opt/mover/lib/python3*/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d \
      ! -name s3 ! -name sts -exec rm -r {} +
COPY pyproject.toml README.md LICENSE ./
COPY mover mover
COPY flows flows
COPY prefect.yaml ./
COPY docker/job-templates docker/job-templates
# The source stays where it is: flow runs name it by its path, and there is one copy of each module. Its modes are those of
# the clone, which depend on the umask.
RUN uv pip install --quiet --no-deps --no-build-isolation --editable . \
 && python3 -m compileall -q mover flows && rm -rf ./*.egg-info/SOURCES.txt build \
 && chmod -R u=rwX,go=rX .

FROM packages AS scicat-stand-in-source
COPY tests/__init__.py tests/
COPY tests/scicat_fake tests/scicat_fake
RUN chmod -R u=rwX,go=rX tests

FROM ${PYTHON_IMAGE} AS runtime
ARG MOVER_UID=1000
ARG MOVER_GID=1000
ARG MOVER_VERSION=0.1.0
ARG SOURCE_REVISION=unknown
LABEL org.opencontainers.image.title="mover" \
      org.opencontainers.image.description="Streams S3 datasets into verified tar datablocks on long-term storage, and back" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${MOVER_VERSION}" \
      org.opencontainers.image.revision="${SOURCE_REVISION}"
# Folders that volumes are mounted on: a new local volume takes over their owner.
RUN groupadd --non-unique --gid "${MOVER_GID}" mover \
 && useradd --non-unique --uid "${MOVER_UID}" --gid "${MOVER_GID}" --no-create-home --home-dir /tmp --shell /usr/sbin/nologin mover \
 && install -d -o mover -g mover -m 0700 /var/lib/prefect /var/lib/scicat \
 && install -d -o mover -g mover -m 0755 /tmp/scratch /tmp/LTS
COPY --from=packages /opt/mover /opt/mover
COPY --from=packages /srv/mover /srv/mover
COPY --chmod=0755 docker/entrypoint.sh /usr/local/bin/entrypoint
ENV PATH=/opt/mover/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    PREFECT_HOME=/tmp/prefect \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /srv/mover
USER ${MOVER_UID}:${MOVER_GID}
ENTRYPOINT ["entrypoint"]
CMD ["mover", "--help"]

# For development: a catalogue to try a deployment with.
FROM runtime AS scicat-stand-in
COPY --from=scicat-stand-in-source /srv/mover/tests tests
CMD ["python", "-m", "tests.scicat_fake", "--help"]

# What is built without --target.
FROM runtime
