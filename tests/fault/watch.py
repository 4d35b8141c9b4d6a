# SPDX-License-Identifier: Apache-2.0
"""When did a guest's vCPUs run, and where? From the RESUME and STOP events of its VMMs, stamped by them.

    watch = Watch(vm.name, {host.name: host.path(vm.judge_path) for host in lab.hosts})
    ... migrate, break, repair ...
    assert not watch.overlaps()

A thread connects to the test's own QMP socket of every VMM of that guest as soon as there is one. The stamps are of
one clock, since all hosts are one machine. A VMM that dies stops when its connection ends."""
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
    def __init__(self, watch, host, made):
        self.watch, self.host, self.socket = watch, host, made
        self.rest, self.run, self.asked = b'', None, False
        made.sendall(b'{"execute":"qmp_capabilities"}\n{"execute":"query-status","id":"first"}\n')

    def begin(self, at):
        if not self.run:
            self.run = Run(self.host, at)
            self.watch.runs.append(self.run)

    def end(self, at):
        if self.run:
            self.run.ended = at
            self.run = None

    def hear(self, message):
        event = message.get('event')
        if message.get('id') == 'first' and message['return']['running'] and not self.run:
            self.begin(time.time())  # it ran before there was anybody to see it begin
            self.watch.late.append(self.host)
        if event not in ('RESUME', 'STOP'):
            return
        stamp = message['timestamp']
        at = stamp['seconds'] + stamp['microseconds'] / 1e6
        (self.begin if event == 'RESUME' else self.end)(at)

    def read(self):
        """False when the VMM has gone."""
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b''
        *lines, self.rest = (self.rest + data).split(b'\n')
        for line in lines:
            self.hear(json.loads(line))
        if not data:
            self.end(time.time())
        return bool(data)


class Watch:
    def __init__(self, paths):
        self.paths = paths
        self.runs, self.late = [], []
        self._connections = {}
        self._closing = False
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _connect(self, selector):
        for host, path in self.paths.items():
            if host in self._connections or not os.path.exists(path):
                continue
            made = socket.socket(socket.AF_UNIX)
            try:
                made.connect(path)
                connection = Connection(self, host, made)
            except OSError:
                made.close()
                continue
            self._connections[host] = connection
            selector.register(made, selectors.EVENT_READ, connection)

    def _main(self):
        with selectors.DefaultSelector() as selector:
            while not self._closing:
                self._connect(selector)
                for key, _ in selector.select(POLL):
                    connection = key.data
                    if not connection.read():
                        selector.unregister(connection.socket)
                        connection.socket.close()
                        del self._connections[connection.host]
            for connection in self._connections.values():
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


class SpokenWatch:
    """For a VMM without events: a guest runs where it spoke last, as long as it speaks, and its heart beats every 10
    ms. Two copies ran if it spoke here, there, and here again."""

    def __init__(self, console):
        self.console, self.mark, self.late = console, console.mark(), []

    def begin(self):
        self.mark = self.console.mark()

    def running(self):
        lines = self.console.lines
        return [lines[-1].host] if lines and time.monotonic() - lines[-1].at < 0.5 else []

    def overlaps(self):
        seen, found = [], []
        for line in self.console.lines[self.mark:]:
            if line.host in seen[:-1]:
                found.append((seen[-1], line.host, line.text))
            if line.host not in seen:
                seen.append(line.host)
        return found

    def close(self):
        pass
