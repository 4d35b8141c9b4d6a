# SPDX-License-Identifier: Apache-2.0
"""When did a guest's vCPUs run, and where? From the RESUME and STOP events of its VMMs, stamped by them.

    watch = QemuWatch(vm.name, {host.name: host.path(vm.judge_path) for host in lab.hosts})
    ... migrate, break, repair ...
    assert not watch.overlaps()

A thread connects to the test's own QMP socket of every QEMU of that guest as soon as there is one; a vmmig-vmm connects
to the test's listener in its host before the guest runs. The stamps are of one clock, since all hosts are one machine. A
VMM that dies stops when its connection ends."""
import contextlib
import json
import os
import selectors
import socket
import threading
import time

POLL = 0.005


class Run:
    """From `began` to `ended` (None: it still runs) the vCPUs of the VMM on `host` could run."""

    def __init__(self, host, began):
        self.host, self.began, self.ended = host, began, None

    def __repr__(self):
        return f'{self.host} {self.began:.6f}..{f"{self.ended:.6f}" if self.ended else ""}'


class Connection:
    """To a VMM, which says lines."""

    def __init__(self, watch, host, made):
        self.watch, self.host, self.socket = watch, host, made
        self.rest, self.run = b'', None

    def begin(self, at):
        if not self.run:
            self.run = Run(self.host, at)
            self.watch.runs.append(self.run)

    def end(self, at):
        if self.run:
            self.run.ended = at
            self.run = None

    def happened(self, event, at):
        (self.begin if event == 'RESUME' else self.end)(at)

    def read(self):
        """False when the VMM has gone."""
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b''
        *lines, self.rest = (self.rest + data).split(b'\n')
        for line in lines:
            self.hear(line)
        if not data:
            self.end(time.time())
        return bool(data)


class QemuConnection(Connection):
    def __init__(self, watch, host, made):
        super().__init__(watch, host, made)
        made.sendall(b'{"execute":"qmp_capabilities"}\n{"execute":"query-status","id":"first"}\n')

    def hear(self, line):
        message = json.loads(line)
        event = message.get('event')
        if message.get('id') == 'first' and message['return']['running'] and not self.run:
            self.begin(time.time())  # it ran before there was anybody to see it begin
            self.watch.late.append(self.host)
        if event in ('RESUME', 'STOP'):
            stamp = message['timestamp']
            self.happened(event, stamp['seconds'] + stamp['microseconds'] / 1e6)


class VmmConnection(Connection):
    def hear(self, line):
        event, at = line.decode().split()
        self.happened(event, float(at))


class Watch:
    """paths: {host: where the VMM of that host is met}"""

    def __init__(self, paths):
        self.paths = paths
        self.runs, self.late = [], []
        self._connections = set()
        self._closing = False
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _add(self, selector, connection):
        self._connections.add(connection)
        selector.register(connection.socket, selectors.EVENT_READ, connection)

    def _main(self):
        with selectors.DefaultSelector() as selector:
            while not self._closing:
                self._meet(selector)
                for key, _ in selector.select(POLL):
                    if not key.data.read():
                        selector.unregister(key.data.socket)
                        key.data.socket.close()
                        self._connections.remove(key.data)
            for connection in self._connections:
                connection.socket.close()

    def close(self):
        self._closing = True
        self._thread.join()

    def begin(self):
        """A case begins: what was seen too late before is over."""
        del self.late[:]

    def running(self):
        """Hosts on which the guest can run now."""
        return [run.host for run in list(self.runs) if run.ended is None]

    def overlaps(self):
        """Pairs of runs on two hosts that have an instant in common."""
        runs = list(self.runs)
        return [(a, b) for i, a in enumerate(runs) for b in runs[i + 1:] if a.host != b.host
                and max(a.began, b.began) < min(a.ended or float('inf'), b.ended or float('inf'))]


class QemuWatch(Watch):
    def _meet(self, selector):
        met = [connection.host for connection in self._connections]
        for host, path in self.paths.items():
            if host in met or not os.path.exists(path):
                continue
            made = socket.socket(socket.AF_UNIX)
            try:
                made.connect(path)
                self._add(selector, QemuConnection(self, host, made))
            except OSError:
                made.close()


class VmmWatch(Watch):
    def __init__(self, paths):
        self._listeners = {}
        for host, path in paths.items():
            self._listeners[host] = socket.socket(socket.AF_UNIX)
            self._listeners[host].bind(path)
            self._listeners[host].listen()
            self._listeners[host].setblocking(False)
        super().__init__(paths)

    def _meet(self, selector):
        for host, listener in self._listeners.items():
            with contextlib.suppress(BlockingIOError):
                made = listener.accept()[0]
                made.setblocking(True)
                self._add(selector, VmmConnection(self, host, made))

    def close(self):
        super().close()
        for host, listener in self._listeners.items():
            listener.close()
            os.unlink(self.paths[host])
