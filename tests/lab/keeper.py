# SPDX-License-Identifier: Apache-2.0
"""Holds a lab's namespaces, and clears everything away when the lab is gone.

Run as a program: keeper.py FOLDER COUNT. It makes COUNT sets of namespaces (network, mount, UTS),
prints the pid that holds each, and waits for the end of its standard input, which comes when the lab
closes or when the test dies in whatever way. Then it kills every process that is left in those network
namespaces and removes the lab's cgroups and FOLDER (which stays if it contains a file named "keep").
Links, mounts and addresses vanish with the last process of a namespace, so that nothing stays behind.
"""
import ctypes
import os
import shutil
import signal
import sys
import time

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x20000, 0x4000000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
CGROUP_TOPS = ('/sys/fs/cgroup', '/sys/fs/cgroup/memory')
libc = ctypes.CDLL(None, use_errno=True)


def hold():
    """A child in namespaces of its own, that sleeps. Returns its pid once they exist."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(0)
        if libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWNET) != 0 or \
                libc.mount(b'none', b'/', None, MS_REC | MS_PRIVATE, None) != 0:
            os._exit(1)
        os.write(tell, b'.')
        os.close(tell)
        while True:
            signal.pause()
    os.close(tell)
    if os.read(ready, 1) != b'.':
        sys.exit('cannot make namespaces: root is needed')
    os.close(ready)
    return pid


def namespace(pid):
    """The network namespace of a process; None for a process that has ended."""
    try:
        return os.stat(f'/proc/{pid}/ns/net').st_ino
    except OSError:
        return None


def processes(namespaces):
    """The pids of all processes in these network namespaces."""
    return {int(name) for name in os.listdir('/proc')
            if name.isdigit() and namespace(name) in namespaces}


def has_ended(pid):
    """Not while it is a zombie whose threads, which may be vCPUs, have not ended yet."""
    try:
        with open(f'/proc/{pid}/stat', encoding='ascii', errors='replace') as file:
            state, *numbers = file.read().rsplit(')', 1)[1].split()
            return state in 'ZX' and int(numbers[16]) <= 1
    except OSError:
        return True


def kill_all(namespaces, spared):
    """Kills the processes in these namespaces, and any that they start meanwhile. They have left the namespace before
    they have ended."""
    deadline, killed = time.monotonic() + 20, set()
    while rest := (processes(namespaces) - set(spared)) | {pid for pid in killed if not has_ended(pid)}:
        killed |= rest
        for pid in rest:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if time.monotonic() > deadline:
            raise TimeoutError(f'processes that do not die: {sorted(rest)}')
        time.sleep(0.005)


def remove_cgroups(name):
    for top in CGROUP_TOPS:
        for path, _, _ in os.walk(os.path.join(top, name), topdown=False):
            os.rmdir(path)


def main(folder, count):
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    holders = [hold() for _ in range(count)]
    namespaces = {namespace(pid) for pid in holders}
    assert namespace('self') not in namespaces
    print(*holders, flush=True)
    sys.stdin.read()
    kill_all(namespaces, spared=holders)
    for pid in holders:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    remove_cgroups(os.path.basename(folder))
    if not os.path.exists(os.path.join(folder, 'keep')):
        shutil.rmtree(folder)


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]))
