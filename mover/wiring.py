"""From settings to an engine: the one place where documented names become the values that an engine is built from."""

from __future__ import annotations

from mover.engine import EngineConfig
from mover.parts import Buckets
from mover.scicat import SciCatAccess
from mover.settings import Settings, require, s3_access
from mover.settings_rules import endpoint_url
from mover.streams.s3_calls import S3Endpoint

__all__ = ["engine_config", "s3_endpoint", "scicat_access"]

_MIB = 1 << 20


def s3_endpoint(settings: Settings) -> S3Endpoint:
    """How to reach the S3 storage.  Raises ConfigError when a required setting is missing."""
    access = s3_access(settings)
    external = access.external_endpoint_url
    return S3Endpoint(
        endpoint_url=access.endpoint_url,
        region=access.region,
        access_key=access.user,
        secret_key=access.password.reveal(),
        external_endpoint_url=None if external == access.endpoint_url else external,
    )


def scicat_access(settings: Settings) -> SciCatAccess:
    """How to reach SciCat.  Raises ConfigError when a required setting is missing."""
    require(settings, ("SCICAT_ENDPOINT", "SCICAT_USER", "SCICAT_PASSWORD"))
    endpoint, user, password = settings.scicat_endpoint, settings.scicat_user, settings.scicat_password
    assert endpoint is not None and user is not None and password is not None  # noqa: S101, PT018 - for the type checker
    return SciCatAccess(endpoint_url(endpoint), user, password, settings.scicat_api_prefix)


def engine_config(settings: Settings) -> EngineConfig:
    """Everything an engine needs.  Raises ConfigError when a required setting is missing."""
    return EngineConfig(
        s3=s3_endpoint(settings),
        buckets=Buckets(
            landing_zone=settings.minio_landingzone_bucket,
            staging=settings.minio_staging_bucket,
            retrieval=settings.minio_retrieval_bucket,
        ),
        lts_root=settings.lts_storage_root,
        scratch_folder=settings.archiver_scratch_folder,
        lts_filesystem="" if settings.lts_filesystem == "any" else settings.lts_filesystem,
        target_bytes=settings.archiver_target_size_mb * _MIB,
        free_space_percentage=settings.lts_free_space_percentage,
        lts_file_timeout_s=settings.archiver_lts_file_timeout_s,
        wait_before_verify_s=settings.archiver_lts_wait_before_verify_s,
        staging=settings.archiver_staging == "always",
        lts_free_limit=settings.lts_free_limit,
        move_to_lts_limit=settings.move_to_lts_limit,
        verify_lts_limit=settings.verify_lts_limit,
        lts_to_retrieval_limit=settings.lts_to_retrieval_limit,
        buffer_bytes=settings.mover_buffer_mb * _MIB,
        s3_concurrency=settings.mover_s3_concurrency,
        url_expiration_days=settings.minio_url_expiration_days,
    )
