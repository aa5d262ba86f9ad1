"""The code base obeys its rules, and each rule is able to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import RULES, SourceFile, cycles

_ROOT = Path(__file__).parent.parent
_FOLDERS = ("mover", "flows", "tests", "benchmarks")


def _sources() -> list[SourceFile]:
    paths = sorted(path for folder in _FOLDERS for path in (_ROOT / folder).rglob("*.py"))
    return [SourceFile(path.relative_to(_ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


@pytest.mark.parametrize("rule", RULES)
def test_the_code_obeys(rule: str) -> None:
    violations = [violation for source in _sources() for violation in RULES[rule](source)]
    assert not violations, "\n".join(["", *violations])


def test_no_modules_import_each_other_in_a_ring() -> None:
    assert cycles(_sources()) == []


_LONG_FUNCTION = "def f():\n" + "    a = 1\n" * 40
_VIOLATIONS = [
    ("import_direction", "mover/errors.py", "from mover.engine import Engine"),
    ("import_direction", "mover/policies/retry.py", "from mover.streams.s3 import S3Store"),
    ("import_direction", "mover/streams/interfaces.py", "import mover.streams.tar"),
    ("import_direction", "mover/streams/tar.py", "from mover import plan"),
    ("import_direction", "mover/plan.py", "def lazy():\n    from mover.archive import archive_dataset"),
    ("import_direction", "mover/engine.py", "from mover.cli import main"),
    ("import_direction", "mover/cli.py", "from flows.archive import archive_dataset"),
    ("import_direction", "mover/helpers.py", "import os"),
    ("import_direction", "mover/plan.py", "from .model import Member"),
    ("libraries", "mover/engine.py", "import prefect"),
    ("libraries", "mover/engine.py", "def lazy():\n    from prefect.client import get_client"),
    ("libraries", "mover/retrieve.py", "import tarfile"),
    ("libraries", "mover/streams/lts.py", "from aiobotocore.session import get_session"),
    ("libraries", "mover/streams/lts.py", "from http.client import HTTPConnection"),
    ("libraries", "mover/archive.py", "import obstore as obs"),
    ("libraries", "flows/archive.py", "import botocore.exceptions"),
    ("libraries", "tests/test_plan.py", "from unittest.mock import patch"),
    ("libraries", "tests/test_plan.py", "from unittest import mock"),
    ("settings_at_the_faces", "mover/engine.py", "from mover.settings import Settings"),
    ("settings_at_the_faces", "mover/engine.py", "from mover import settings"),
    ("settings_at_the_faces", "mover/streams/s3.py", "from mover.settings_rules import endpoint_url"),
    ("durable_calls", "mover/journal.py", "import os\nos.replace('a', 'b')"),
    ("durable_calls", "mover/journal.py", "import os\nos.fsync(3)"),
    ("durable_calls", "mover/streams/lts.py", "from os import fdatasync"),
    ("durable_calls", "mover/streams/lts.py", "def f(path, other):\n    path.rename(other)"),
    ("durable_calls", "mover/streams/lts.py", "def f(path, other):\n    path.with_suffix('.x').replace(other)"),
    ("deletion", "mover/archive.py", "async def f(store):\n    await store.delete('b', ['k'])"),
    ("deletion", "flows/archive.py", "async def f(client):\n    await client.delete_objects()"),
    ("tasks_and_sleeps", "mover/engine.py", "import asyncio\nasyncio.create_task(f())"),
    ("tasks_and_sleeps", "mover/engine.py", "def f(loop, job):\n    loop.create_task(job)"),
    ("tasks_and_sleeps", "mover/engine.py", "import time\ntime.sleep(1)"),
    ("tasks_and_sleeps", "mover/engine.py", "from time import sleep"),
    ("module_size", "mover/plan.py", "a = 1\n" * 301),
    ("module_size", "tests/test_plan.py", "a = 1\n" * 501),
    ("function_size", "mover/plan.py", _LONG_FUNCTION),
    ("function_size", "mover/plan.py", "async " + _LONG_FUNCTION),
    ("exports", "mover/plan.py", "def f(): ..."),
    ("exports", "mover/plan.py", "__all__ = ['f']\ndef f(): ...\ndef g(): ..."),
    ("exports", "mover/plan.py", "__all__ = []\nLIMIT_BYTES: int = 1"),
    ("exports", "mover/plan.py", "__all__ = ['gone']"),
    ("units_in_names", "mover/plan.py", "def f(*, timeout): ..."),
    ("units_in_names", "mover/plan.py", "class A:\n    size: int"),
    ("units_in_names", "mover/plan.py", "class A:\n    interval = 3"),
    ("docstrings", "mover/plan.py", "'''Words.'''\ndef f(): ..."),
    ("docstrings", "mover/plan.py", "'''Words.'''\nclass A: ..."),
    ("docstrings", "mover/plan.py", "a = 1"),
]
_FINE = [
    ("import_direction", "mover/plan.py", "import os\nfrom mover.model import Member\nfrom mover.streams import tar"),
    ("libraries", "mover/streams/s3_http.py", "import http.client\nimport http"),
    ("libraries", "tests/test_tar.py", "import tarfile"),
    ("settings_at_the_faces", "mover/cli_config.py", "from mover.settings import Settings"),
    ("durable_calls", "mover/streams/durable.py", "import os\nos.fsync(3)"),
    ("durable_calls", "mover/plan.py", "a = 'x'.replace('/', '-')\nb = now.replace(microsecond=0)"),
    ("deletion", "mover/cleanup.py", "async def f(store):\n    await store.delete('b', ['k'])"),
    ("tasks_and_sleeps", "mover/engine.py", "def f(group):\n    group.start_soon(g)"),
    ("module_size", "mover/plan.py", "a = 1\n" * 300),
    ("function_size", "mover/plan.py", "def f():\n" + "    a = 1\n" * 39),
    ("exports", "mover/plan.py", "__all__ = ['f']\nimport os\ndef f(): ...\ndef _g(): ...\n_x = 1\nT = TypeVar('T')"),
    ("exports", "mover/__init__.py", "'''Words.'''"),
    ("units_in_names", "mover/plan.py", "def f(size_bytes, timeout_s): ..."),
    ("docstrings", "mover/plan.py", "'''Words.'''\ndef f():\n    '''Does.'''\ndef _g(): ..."),
]


@pytest.mark.parametrize(("rule", "path", "text"), _VIOLATIONS)
def test_the_rule_catches(rule: str, path: str, text: str) -> None:
    assert list(RULES[rule](SourceFile(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), _FINE)
def test_the_rule_lets_pass(rule: str, path: str, text: str) -> None:
    assert list(RULES[rule](SourceFile(path, text))) == []


def test_every_rule_is_seen_to_catch_and_to_let_pass() -> None:
    assert {rule for rule, _, _ in _VIOLATIONS} == {rule for rule, _, _ in _FINE} == set(RULES)


def test_a_ring_of_imports_is_found() -> None:
    ring = [
        SourceFile("mover/plan.py", "from mover.verify import verify"),
        SourceFile("mover/verify.py", "def lazy():\n    from mover import journal"),
        SourceFile("mover/journal.py", "import mover.plan.x"),
    ]
    assert cycles(ring) == ["mover.journal -> mover.plan -> mover.verify -> mover.journal"]
