"""Settings of flow runs: environment, then Prefect Variables and Secret blocks, then the TOML file, then defaults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from pydantic import SecretStr

from mover.errors import ConfigError
from tests.prefect_servers import PrefectServer

pytestmark = [
    pytest.mark.anyio,
    # Prefect leaves the connections of its threads to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _server(prefect_server: PrefectServer) -> Iterator[None]:
    with prefect_server.client_settings():
        with get_client(sync_client=True) as client:
            for variable in client.read_variables():  # of other tests that configure the server
                client.delete_variable_by_name(variable.name)
        yield


async def test_the_strongest_source_of_each_name_counts(tmp_path: Path) -> None:
    from prefect.blocks.system import Secret as SecretBlock
    from prefect.variables import Variable

    from flows.settings import read_settings

    config = tmp_path / "vars.toml"
    names = ("MINIO_REGION", "MINIO_STAGING_BUCKET", "MINIO_RETRIEVAL_BUCKET")
    config.write_text("\n".join(["[minio]", *(f'{name} = "file"' for name in names)]))
    await Variable.aset("minio_region", "variable", overwrite=True)
    await Variable.aset("minio_staging_bucket", "variable-staging", overwrite=True)
    await Variable.aset("somebody_elses", {"any": "thing"}, overwrite=True)
    await SecretBlock(value=SecretStr("secret of the block")).asave("scicat-password", overwrite=True)
    environ = {"MOVER_CONFIG": str(config), "MINIO_REGION": "environment", "SCICAT_USER": "environment"}

    settings = await read_settings(environ)

    assert settings.minio_region == "environment"
    assert settings.minio_staging_bucket == "variable-staging"
    assert settings.minio_retrieval_bucket == "file"
    assert settings.minio_landingzone_bucket == "landingzone"
    assert settings.scicat_user == "environment"
    assert settings.scicat_password is not None
    assert settings.scicat_password.reveal() == "secret of the block"
    assert "secret of the block" not in repr(settings)
    assert settings.origins["MINIO_STAGING_BUCKET"] == "prefect variable"


async def test_a_wrong_value_in_a_variable_is_named_with_what_is_allowed() -> None:
    from prefect.variables import Variable

    from flows.settings import read_settings

    await Variable.aset("lts_free_space_percentage", "half of it", overwrite=True)
    try:
        with pytest.raises(ConfigError) as caught:
            await read_settings({})
    finally:
        await Variable.aunset("lts_free_space_percentage")
    assert caught.value.key == "LTS_FREE_SPACE_PERCENTAGE"
    assert "half of it" in str(caught.value)
    assert "prefect variable" in str(caught.value)
