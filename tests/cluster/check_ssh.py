"""ssh and pdsh to two addresses of this machine, through an sshd of our own: `python -m tests.cluster.check_ssh`."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.launched_runs import LauncherCheck, daemon, require_programs, runs_in_temporary_folder

HOSTS = ("127.0.0.1", "127.0.0.2")
PROGRAMS = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}
PRIVILEGE_SEPARATION = Path("/run/sshd")
SSHD_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/user_key.pub
AllowUsers {user}
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
"""
SSH_CONFIG = """\
Host *
    Port {port}
    User {user}
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking yes
"""


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[Path]:
    """Runs an sshd that only the key of this folder can enter; yields the configuration for ssh."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
        subprocess.run(command, check=True)
    values = {"port": port, "folder": folder, "user": getpass.getuser()}
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(**values))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(**values))
    key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text("".join(f"[{host}]:{port} {key}\n" for host in HOSTS))
    was_there = PRIVILEGE_SEPARATION.exists()
    PRIVILEGE_SEPARATION.mkdir(exist_ok=True)
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin") or "sshd"
    try:
        with daemon(sshd, "-D", "-e", "-f", str(folder / "sshd_config"), log=folder / "sshd.log"):
            wait_for_port(port)
            yield folder / "ssh_config"
    finally:
        if not was_there:
            PRIVILEGE_SEPARATION.rmdir()


def wait_for_port(port: int) -> None:
    """Waits until something listens."""
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing listens on port {port}")
        time.sleep(0.1)


def main() -> None:
    """Runs the checks of ssh and pdsh."""
    require_programs(PROGRAMS, root=True)
    with runs_in_temporary_folder() as runs, ssh_server(runs.folder) as config:
        hostfile = runs.folder / "hostfile"
        hostfile.write_text("# two addresses of one machine\n127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
        words = [f"hostfile={hostfile}"]
        LauncherCheck(runs, "ssh", [*words, "launcher=ssh", f"launcher_args=['-F', '{config}']"]).all()
        # A TMPDIR that the machines' logins do not have.
        variables = {"DLTS_HOSTFILE": str(hostfile), "TMPDIR": str(runs.folder)}
        environment = {"PDSH_SSH_ARGS_APPEND": f"-F {config}", **variables}
        LauncherCheck(runs, "pdsh", ["launcher=pdsh"], os.environ | environment).all()
    print("check_ssh: passed")


if __name__ == "__main__":
    main()
