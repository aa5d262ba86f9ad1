"""What the Prefect server and the processes of the flows have to be started with: the one place that says so.

``python -m flows.server_settings`` prints the server's settings as ``KEY=VALUE`` lines, ``--flows`` those of workers
and flow runs. Addresses, folders and credentials are the deployment's own and are not here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

__all__ = ["FLOW_SETTINGS", "HEARTBEAT_S", "HEARTBEAT_TIMEOUT_S", "SERVER_SETTINGS", "main"]

HEARTBEAT_S = 30  # the shortest that Prefect takes
HEARTBEAT_TIMEOUT_S = 3 * HEARTBEAT_S  # a flow run that was silent for this long is dead

SERVER_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        # Leases on disk, below PREFECT_HOME, which has to be a volume: a server that keeps them in memory forgets on a
        # restart who holds a slot of a limit, and the slots of holders that die afterwards never come back.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # A task that waits for a slot asks again after at most this time. The defaults (10 s, 30 s) leave the LTS idle
        # between two datablocks for seconds.
        "PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS": "0.5",
        "PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS": "0.5",
        # What tasks report is written together, once a second. The defaults write every event by itself, and on SQLite
        # a request for a slot that meets a write of others is refused; the client asks again only after 2 s.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "500",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
        # Runs that ended more than 90 days ago go, with their logs and artifacts: the reconciler alone makes 288 a day.
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        # A facility's server reports to nobody and advertises nothing.
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "DO_NOT_TRACK": "1",
    }
)

FLOW_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        # Flow runs whose heartbeats stop are set to Crashed by an automation (flows.configure). Off or slow heartbeats
        # would leave a run whose worker died with it in Running for ever.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        # What the engine and the catalogue's client log is shown with the run.
        "PREFECT_LOGGING_EXTRA_LOGGERS": "mover",
        "DO_NOT_TRACK": "1",
    }
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the settings as ``KEY=VALUE`` lines; returns the exit code."""
    given = tuple(sys.argv[1:] if arguments is None else arguments)
    if given not in {(), ("--flows",)}:
        sys.stderr.write("usage: python -m flows.server_settings [--flows]\n")
        return 2
    chosen = FLOW_SETTINGS if given else SERVER_SETTINGS
    sys.stdout.writelines(f"{name}={value}\n" for name, value in chosen.items())
    return 0


if __name__ == "__main__":
    sys.exit(main())
