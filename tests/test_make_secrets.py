"""``docker/make-secrets``: creates what is missing, for the user of the containers, and never writes what is there."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = {
    *("postgresuser", "postgrespass", "prefectauth", "miniouser", "miniopass"),
    *("scicatuser", "scicatpass", "scicattrigger", "movertoken"),
}
RANDOM = ("postgrespass", "prefectauth", "miniopass", "scicatpass", "scicattrigger", "movertoken")
NOBODY = 65534


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as the project's, whose containers run as whoever runs the test."""
    return _project(tmp_path / "project")


def _project(folder: Path) -> Path:
    (folder / "docker").mkdir(parents=True)
    shutil.copy(ROOT / "docker" / "make-secrets", folder / "docker" / "make-secrets")
    (folder / ".env").write_text(_owner(os.getuid(), os.getgid()), encoding="utf-8")
    return folder


def _owner(user: int, group: int) -> str:
    return f"MOVER_UID={user}   # owner of the files\nMOVER_GID='{group}'# of theirs\n"


def _run(project: Path, environ: Mapping[str, str] | None = None, *, user: int | None = None) -> tuple[int, str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MOVER_", "COMPOSE_"))}
    done = subprocess.run(
        [str(project / "docker" / "make-secrets")],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        env={**plain, **(environ or {})},
        cwd=project.parent,
        user=user,
        extra_groups=[] if user is not None else None,
    )
    return done.returncode, done.stdout, done.stderr


def _random_part(text: str) -> str:
    """Of the first line: the second one of movertoken is scicattrigger again."""
    return text.splitlines()[0].rpartition(":")[2]


def _secrets(project: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in (project / ".secrets").iterdir()}


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_missing_secrets_are_created_for_their_owner_alone_and_not_shown(project: Path) -> None:
    code, out, err = _run(project)
    assert (code, err) == (0, "")
    secrets = _secrets(project)
    assert set(secrets) == NAMES
    assert _mode(project / ".secrets") == 0o700
    assert {_mode(path) for path in (project / ".secrets").iterdir()} == {0o600}
    for name, text in secrets.items():
        assert text.endswith("\n")
        assert text.strip()
        assert f"created  .secrets/{name}.txt" in out
    assert not any(_random_part(secrets[name]) in out for name in RANDOM)
    assert secrets["prefectauth"].startswith("admin:")
    assert secrets["movertoken"].splitlines()[1] == f"scicat:operate:{secrets['scicattrigger'].strip()}"


@pytest.mark.slow
def test_random_values_differ_between_secrets_and_between_projects(tmp_path: Path) -> None:
    values = []
    for name in ("one", "two"):
        project = _project(tmp_path / name)
        assert _run(project)[0] == 0
        secrets = _secrets(project)
        values += [_random_part(secrets[name]) for name in RANDOM]
    assert len(set(values)) == len(values)
    assert min(map(len, values)) >= 32


def test_what_is_there_is_never_written_but_closed_to_others(project: Path) -> None:
    assert _run(project)[0] == 0
    given = project / ".secrets" / "miniopass.txt"
    given.write_text("of the facility", encoding="utf-8")
    given.chmod(0o644)
    (project / ".secrets" / "scicatpass.txt").unlink()
    before = _secrets(project)
    code, out, _ = _run(project)
    assert code == 0
    after = _secrets(project)
    assert set(after) - set(before) == {"scicatpass"}
    assert {name: after[name] for name in before} == before
    assert "kept     .secrets/miniopass.txt" in out
    assert _mode(given) == 0o600


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MOVER_GID=1000\n", "MOVER_UID is neither in .env nor in the environment"),
        ("MOVER_UID=1000\n#MOVER_GID=1000\n", "MOVER_GID is neither in .env nor in the environment"),
        ("MOVER_UID=  # none\nMOVER_GID=1000\n", "MOVER_UID is neither"),
    ],
)
def test_without_an_owner_nothing_is_created(project: Path, text: str, said: str) -> None:
    (project / ".env").write_text(text, encoding="utf-8")
    code, _, err = _run(project)
    assert code == 2
    assert said in err
    assert not (project / ".secrets").exists()


@pytest.mark.slow
def test_the_last_owner_of_the_file_counts_and_the_environment_beats_it(project: Path) -> None:
    user, group = os.getuid(), os.getgid()
    (project / ".env").write_text(_owner(user + 1, group + 1) + _owner(user, group), encoding="utf-8")
    assert _run(project)[0] == 0
    (project / ".env").write_text(_owner(user + 1, group + 1), encoding="utf-8")
    assert _run(project, {"MOVER_UID": str(user), "MOVER_GID": str(group)})[0] == 0
    assert {(path.stat().st_uid, path.stat().st_gid) for path in (project / ".secrets").iterdir()} == {(user, group)}


def test_files_with_own_values_are_named_by_the_variable_of_compose(project: Path) -> None:
    (project / ".env").write_text(_owner(os.getuid() + 1, os.getgid() + 1), encoding="utf-8")
    (project / "own.env").write_text(_owner(os.getuid(), os.getgid()), encoding="utf-8")
    assert _run(project, {"COMPOSE_ENV_FILES": ".env,own.env"})[0] == 0
    assert {(path.stat().st_uid, path.stat().st_gid) for path in (project / ".secrets").iterdir()} == {
        (os.getuid(), os.getgid())
    }


def test_a_secret_that_was_written_by_hand_is_closed_to_others(project: Path) -> None:
    (project / ".secrets").mkdir()
    by_hand = project / ".secrets" / "githubpass.txt"
    by_hand.write_text("token", encoding="utf-8")
    by_hand.chmod(0o644)
    assert _run(project)[0] == 0
    assert (_mode(by_hand), by_hand.read_text(encoding="utf-8")) == (0o600, "token")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "has no line for SciCat's trigger"),
        ("scicat:operate:of-the-day-before-yesterday\n", "still lets SciCat's trigger in with another token"),
        ("scicat:operate:{}\nscicat:operate:of-the-day-before-yesterday\n", "still lets SciCat's trigger in"),
        (" scicat : operate : {}\n", ""),
    ],
)
def test_a_token_of_the_trigger_that_is_no_longer_its_password_is_told_and_left(
    project: Path, line: str, said: str
) -> None:
    assert _run(project)[0] == 0
    file = project / ".secrets" / "movertoken.txt"
    trigger = (project / ".secrets" / "scicattrigger.txt").read_text(encoding="utf-8").strip()
    text = f"admin:operate:of-an-administrator\n{line.format(trigger)}"
    file.write_text(text, encoding="utf-8")
    code, _, err = _run(project)
    assert (code, file.read_text(encoding="utf-8")) == (0, text)
    assert said in err if said else err == ""
    assert trigger not in err
    assert "yesterday" not in err


def test_what_a_umask_closed_of_the_folder_docker_is_opened(project: Path) -> None:
    folder, file = project / "docker" / "job-templates", project / "docker" / "job-templates" / "production.json"
    folder.mkdir(mode=0o700)
    file.touch(mode=0o600)
    (project / "docker").chmod(0o700)
    code, out, err = _run(project)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "opened   docker/  (the containers read it)"
    assert [_mode(path) & 0o055 for path in (project / "docker", folder, file)] == [0o055, 0o055, 0o044]
    assert "opened" not in _run(project)[1]


@pytest.mark.skipif(os.getuid() == 0, reason="root may give files away")
def test_another_user_than_the_containers_is_refused(project: Path) -> None:
    (project / ".env").write_text(_owner(os.getuid() + 1, os.getgid()), encoding="utf-8")
    _assert_refused(project, os.getuid(), os.getuid() + 1, _run(project))


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become others")
def test_root_gives_the_secrets_to_the_user_of_the_containers_and_others_are_refused(tmp_path: Path) -> None:
    project = _project(tmp_path / "project")
    for folder in (tmp_path.parent.parent, tmp_path.parent, tmp_path):
        folder.chmod(0o755)
    project.chmod(0o777)
    (project / ".env").write_text(_owner(4242, 4243), encoding="utf-8")
    (project / ".env").chmod(0o644)
    _assert_refused(project, NOBODY, 4242, _run(project, user=NOBODY))
    assert _run(project)[0] == 0
    folder = project / ".secrets"
    assert {(path.stat().st_uid, path.stat().st_gid) for path in [folder, *folder.iterdir()]} == {(4242, 4243)}


def _assert_refused(project: Path, user: int, wanted: int, done: tuple[int, str, str]) -> None:
    code, _, err = done
    assert code == 2
    assert f"The containers run as user {wanted} (MOVER_UID in .env)" in err
    assert f"set MOVER_UID and MOVER_GID to {user} and" in err
    assert not (project / ".secrets").exists()
