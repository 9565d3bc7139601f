"""`python unprivileged.py FOLDER COMMAND…`, by root: run COMMAND, which refuses root, in FOLDER.

PostgreSQL does not start as root. Where root may make a user namespace, the command is user
`nobody` inside and root outside: files stay root's, and no folder has to be opened to anybody.
Elsewhere, in most containers, it becomes user `nobody` of root's group and is given FOLDER; the
folder above it is opened to root's group.

Run as a script of its own, before anything else is imported.
"""

import ctypes
import os
import pwd
import sys
from pathlib import Path

CLONE_NEWUSER = 0x10000000


def main() -> None:
    folder, command = Path(sys.argv[1]), sys.argv[2:]
    nobody = _nobody()
    if _may_enter_namespace():
        _give(folder, 0)
        _enter_namespace(nobody)
    else:
        above = folder.parent
        above.chmod(above.stat().st_mode | 0o010)
        _give(folder, nobody)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(nobody, nobody, nobody)
    try:
        os.chdir(folder)
        os.execv(command[0], command)  # noqa: S606  the caller's own program
    except PermissionError as error:
        sys.exit(
            f"root cannot run PostgreSQL, and user nobody cannot reach {error.filename}: open the "
            "folders above it to root's group (chmod g+x), or run gpustack as another user"
        )


def _nobody() -> int:
    """A user of this system that is not root: PostgreSQL wants one with a name."""
    others = {entry.pw_name: entry.pw_uid for entry in pwd.getpwall() if entry.pw_uid != 0}
    return others.get("nobody") or next(iter(others.values()), 65534)


def _may_enter_namespace() -> bool:
    """Whether root may make a user namespace here; tried by a child, since it is for good."""
    if not sys.platform.startswith("linux"):
        return False
    child = os.fork()
    if child == 0:
        os._exit(ctypes.CDLL(None).unshare(CLONE_NEWUSER) != 0)
    return os.waitpid(child, 0)[1] == 0


def _enter_namespace(inside: int) -> None:
    """Be user `inside` to this process and its children, and root to everybody else."""
    ctypes.CDLL(None).unshare(CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{inside} 0 1")
    Path("/proc/self/gid_map").write_text(f"{inside} 0 1")


def _give(folder: Path, owner: int) -> None:
    """Make `owner` own the folder and all in it, after the other way was used before."""
    if folder.stat().st_uid == owner:
        return
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.lchown(Path(place) / name, owner, 0)
    os.chown(folder, owner, 0)


if __name__ == "__main__":
    main()
