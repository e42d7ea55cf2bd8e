"""A server as in a container: a nameless user without a home folder, a read-only project, a /tmp/coglet of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cog_server import Server, running

USER = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "--no-new-privs"]
USER += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # pytest's folders are root's
MOUNT = """
set -e
mkdir -p /tmp/coglet
mount -t tmpfs -o mode=1777 coglet /tmp/coglet
mount --bind "$0" "$0"
mount -o remount,bind,ro "$0"
cd "$0"
exec "$@"
"""


def _is_possible() -> bool:
    command = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs x /mnt && exec " + " ".join([*USER, "true"])]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


CONTAINER = pytest.mark.skipif(not _is_possible(), reason="needs root, unshare and setpriv")


@contextmanager
def contained(project: Path, scratch: Path, *options: str, **environment: str) -> Iterator[Server]:
    """Cog's server as an image starts it, in `project`, which is read-only for it. Options are those of the server."""
    scratch.chmod(0o777)
    command = ["unshare", "--mount", "sh", "-c", MOUNT, str(project), *USER]
    command += [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1", *options]
    environment = {
        **{"COG_PREDICT_TYPE_STUB": "predict.py:Predictor", "COG_TRAIN_TYPE_STUB": "train.py:train"},
        **{"COG_MAX_CONCURRENCY": "12", "HOME": "", "PYTHONDONTWRITEBYTECODE": "1"},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # Cog starts its worker as `python`
        **environment,
    }
    with running(command, project, scratch, **environment) as server:
        yield server.wait_until_set_up()


def inside(server: Server, *command: str) -> list[str]:
    """The command, as the container's runtime runs a probe or a hook: in the mounts of the server."""
    return ["nsenter", "--mount", f"--target={server.process.pid}", *command]
