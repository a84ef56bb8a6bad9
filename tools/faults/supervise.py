"""Runs a program and decides about each of its calls that change files: let it happen, fail it, or kill the program in its place.

In: a command, and what decides, given the number of the call (from 1, over all threads and children, in the order in which
they are made), its name and the path that it is about. Out: the exit code, standard error, and the calls. Seccomp's user
notifications (Linux 5.5, x86-64) are what stops a call until it is answered, so the order is one for the whole program:
tracers that count by thread cannot tell the n-th calls of two threads apart.

    python3 tools/faults/supervise.py FD COMMAND...     (the child: installs the filter, sends its listener over FD, becomes COMMAND)
"""

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass

# Name: (number on x86-64, which argument is the path or the file, whether that is a file descriptor).
CALLS = {
    "openat": (257, 1, False), "mkdir": (83, 0, False), "mkdirat": (258, 1, False),
    "write": (1, 0, True), "writev": (20, 0, True), "pwrite64": (18, 0, True), "ftruncate": (77, 0, True),
    "fallocate": (285, 0, True), "copy_file_range": (326, 2, True), "sendfile": (40, 0, True), "ioctl": (16, 0, True),
    "fchmod": (91, 0, True), "chmod": (90, 0, False), "fsync": (74, 0, True), "fdatasync": (75, 0, True),
    "rename": (82, 1, False), "renameat": (264, 3, False), "renameat2": (316, 3, False),
    "link": (86, 1, False), "linkat": (265, 3, False), "symlink": (88, 1, False),
    "unlink": (87, 0, False), "unlinkat": (263, 1, False), "rmdir": (84, 0, False),
}
REMOVALS = {"unlink", "unlinkat", "rmdir"}
# Of these only the calls with one of the bits in this argument: opens that create or truncate; the sharing of blocks.
ONLY = {"openat": (2, os.O_CREAT | os.O_TRUNC, None), "ioctl": (1, None, 0x40049409)}
NAMES = {number: name for name, (number, _, _) in CALLS.items()}

ARCH, ALLOW, NOTIFY = 0xC000003E, 0x7FFF0000, 0x7FC00000
RECEIVE, SEND = 0xC0502100, 0xC0182101
CONTINUE = 1
AT_FDCWD = -100


def supported():
    """Whether this is Linux on x86-64, and lets a program install such a filter."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    code, _, _ = run(["true"], "/", dict(os.environ), lambda path: False)
    return code == 0


# ---------------------------------------------------------------- the child


def program():
    """The filter: the calls of `CALLS` wait for an answer, all others are let through."""
    load = lambda offset: (0x20, 0, 0, offset)
    lines = [load(4), (0x15, 1, 0, ARCH), (0x06, 0, 0, ALLOW), load(0)]
    for name, (number, _, _) in CALLS.items():
        argument, bits, value = ONLY.get(name, (None, None, None))
        if argument is None:
            lines += [(0x15, 0, 1, number), (0x06, 0, 0, NOTIFY)]
        else:
            test = (0x45, 0, 1, bits) if bits else (0x15, 0, 1, value)
            lines += [(0x15, 0, 4, number), load(16 + 8 * argument), test, (0x06, 0, 0, NOTIFY), (0x06, 0, 0, ALLOW)]
    lines.append((0x06, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in lines), len(lines)


def child(sender, command):
    libc = ctypes.CDLL(None, use_errno=True)
    code, lines = program()
    buffer = ctypes.create_string_buffer(code)
    filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", lines, ctypes.addressof(buffer)))
    with socket.socket(fileno=sender) as line:
        # No new privileges; seccomp(2): a filter, with a listener.
        if libc.prctl(38, 1, 0, 0, 0) or (listener := libc.syscall(317, 1, 8, filter)) < 0:
            sys.exit(f"no seccomp listener: {os.strerror(ctypes.get_errno())}")
        socket.send_fds(line, [b"x"], [listener])
        os.close(listener)
    os.execvp(command[0], command)


# ---------------------------------------------------------------- the parent


@dataclass
class Call:
    name: str
    path: str
    pid: int


def path_of(pid, name, arguments):
    """The path that a waiting call is about; empty where it has none."""
    _, which, is_file = CALLS[name]
    try:
        if is_file:
            return os.readlink(f"/proc/{pid}/fd/{arguments[which] & 0xFFFFFFFF}")
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(arguments[which])
            text = os.fsdecode(memory.read(4096).split(b"\0")[0])
        at = ctypes.c_int32(arguments[which - 1] & 0xFFFFFFFF).value if which else AT_FDCWD
        base = f"/proc/{pid}/cwd" if name in ("rename", "link", "symlink") or at == AT_FDCWD else f"/proc/{pid}/fd/{at}"
        return os.path.join(os.readlink(base), text)
    except OSError:
        return ""


def run(command, folder, environment, inside, decide=lambda number, call: None, seconds=900):
    """Exit code (negative: a signal), standard error, and the calls on files for whose path `inside` holds. `decide` says
    what becomes of each: nothing, "kill", or an error's name."""
    ours, theirs = socket.socketpair()
    calls = []
    with tempfile.TemporaryFile() as said, ours:
        launch = [sys.executable, "-S", __file__, str(theirs.fileno()), *command]
        process = subprocess.Popen(
            launch, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        _, sent, _, _ = socket.recv_fds(ours, 1, 1)
        if sent:
            try:
                answer(sent[0], process, calls, inside, decide, seconds)
            finally:
                os.close(sent[0])
        code = process.wait()
        said.seek(0)
        return code, said.read().decode(errors="replace"), calls


def answer(listener, process, calls, inside, decide, seconds):
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        ready = poll.poll(seconds * 1000)
        if not ready:
            process.kill()
            return
        if not ready[0][1] & select.POLLIN:
            return
        notice = bytearray(80)
        try:
            fcntl.ioctl(listener, RECEIVE, notice)
        except OSError as error:
            # Killed while it waited.
            if error.errno in (errno.ENOENT, errno.EINTR):
                continue
            raise
        identity, pid, _, number = struct.unpack_from("QIIi", notice)
        name = NAMES[number]
        call = Call(name, path_of(pid, name, struct.unpack_from("6Q", notice, 32)), pid)
        verdict = None
        if inside(call.path):
            calls.append(call)
            verdict = decide(len(calls), call)
        if verdict == "kill":
            os.kill(pid, signal.SIGKILL)
            continue
        failed = -getattr(errno, verdict) if verdict else 0
        try:
            fcntl.ioctl(listener, SEND, struct.pack("QqiI", identity, 0, failed, 0 if verdict else CONTINUE))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise


if __name__ == "__main__":
    child(int(sys.argv[1]), sys.argv[2:])
