# SPDX-License-Identifier: Apache-2.0
"""What guests say, each line stamped on arrival, whichever host it came from.

A guest's serial port is a socket to which its QEMU connects, under the same path in every host; the
lab listens there before any QEMU starts, so no byte is lost and the destination of a migration connects by
itself. The guest writes one stream wherever it runs, so the bytes are put together in order of
arrival, even a line that began on one host and ended on the other.

    console = lab.console('web1')
    console.wait_for('ready')
    mark = console.mark()
    ... migrate ...
    console.wait_for(r'^hb', after=console.mark())
    assert console.check(after=mark) == ['h1', 'h2']
    print(console.pause(after=mark))

Stamps are seconds of CLOCK_MONOTONIC, taken by a thread of real-time priority. All methods may be called
by one thread, the test's.
"""
import ctypes
import os
import re
import selectors
import socket
import sys
import threading
import time
from typing import NamedTuple

CLONE_NEWNET = 0x40000000
SETTLING = 8
TICK = re.compile(r'^(hb|tick|udp) (\d+) ([0-9a-f.]+)')
TROUBLE = re.compile(r'^(BAD|PANIC)|\berrors=[1-9]|Kernel panic|BUG:|Oops:|Call Trace:|Out of memory')
END = re.compile(r'^PANIC|Kernel panic')


class Line(NamedTuple):
    at: float
    host: str
    text: str


class Tick(NamedTuple):
    """A numbered sign of life: at on the host's clock, clock on the guest's; stood_still, for how long
    the guest saw that it did not run before it. Seconds all."""
    at: float
    host: str
    number: int
    clock: float
    stood_still: float


class Timeline:
    """Lines in order of arrival."""

    def __init__(self, name):
        self.name = name
        self.lines = []
        self.chunk_hosts = []  # the host of each run of arrivals
        self._partial = b''
        self._arrived = threading.Condition()

    def __str__(self):
        return self.name

    def feed(self, at, host, data):
        """Adds what arrived. The collector's thread calls it."""
        with self._arrived:
            if not self.chunk_hosts or self.chunk_hosts[-1] != host:
                self.chunk_hosts.append(host)
            *whole, self._partial = (self._partial + data).split(b'\n')
            self.lines += [Line(at, host, text.decode(errors='replace').rstrip('\r')) for text in whole]
            self._arrived.notify_all()

    def mark(self):
        """Here and now, as a place to look from later (after=)."""
        with self._arrived:
            return len(self.lines)

    def wait_for(self, pattern, timeout=30, after=0):
        """The first line, from `after` on, in which the regular expression is found. Fails when the guest has
        ended instead."""
        deadline = time.monotonic() + timeout
        with self._arrived:
            seen = after
            while True:
                for line in self.lines[seen:]:
                    if re.search(pattern, line.text):
                        return line
                    assert not END.search(line.text), f'{self.name}: {line.text}'
                seen = len(self.lines)
                if not self._arrived.wait(max(0, deadline - time.monotonic())):
                    raise TimeoutError(f'{self.name}: no line with {pattern!r} in {timeout} s; the last:\n'
                                       + self.tail())

    def wait_ticks(self, count, timeout=30):
        """Waits for that many further ticks."""
        for _ in range(count):
            self.wait_for(TICK.pattern, timeout, after=self.mark())

    def tail(self, count=15):
        return '\n'.join(f'{line.at:.4f} {line.host} {line.text}' for line in self.lines[-count:])

    # -- judging

    def clock_rate(self):
        """Units of the guest's clock per second: TSC ticks, or 1 for lines that give seconds."""
        for line in self.lines:
            if found := re.search(r'ready .*tsc_khz=(\d+)', line.text):
                return int(found.group(1)) * 1000
        return 1

    def ticks(self, after=0):
        """The guest's numbered signs of life."""
        rate = self.clock_rate()
        found = []
        for line in self.lines[after:self.mark()]:
            if match := TICK.match(line.text):
                clock = match.group(3)
                clock = int(clock, 16) / rate if match.group(1) == 'hb' else float(clock)
                still = re.search(r' gap=(\d+)', line.text)
                found.append(Tick(line.at, line.host, int(match.group(2)), clock,
                                  int(still.group(1)) / 1e6 if still else 0))
        return found

    def _steps(self, after):
        ticks = self.ticks(after)
        assert len(ticks) > 1, f'{self.name}: no ticks\n{self.tail()}'
        return list(zip(ticks, ticks[1:]))

    def gap(self, after=0):
        """The longest time without a tick, in seconds: the pause and up to one interval."""
        return max(b.at - a.at for a, b in self._steps(after))

    def pause(self, after=0):
        """The longest time for which the guest did not run, in seconds, whatever the ticks' interval: by how
        much more the host's clock went on than the guest's, where that stops with the guest, and what
        the guest saw itself, where it does not (a TSC that KVM leaves alone)."""
        return max(self._stood(a, b) for a, b in self._steps(after))

    @staticmethod
    def _stood(a, b):
        return (b.at - a.at) - (b.clock - a.clock) + b.stood_still

    def hand_overs(self, after=0):
        """As pause(), of each change of the host, in their order: what the guest stood still elsewhere, for lack of a
        CPU, does not count. A line is seen late when this program waits for a CPU, and never early: so of the
        SETTLING ticks before the change, and of those after it, the one counts that was seen with the least delay.
        A guest that was stopped within a tick, after it had looked at its clock, tells of it in the next one."""
        ticks = self.ticks(after)
        found = []
        for place in range(1, len(ticks)):
            left, entered = ticks[place - 1], ticks[place]
            if left.host == entered.host:
                continue
            before = [tick.at - tick.clock for tick in ticks[max(0, place - SETTLING):place] if tick.host == left.host]
            then = [tick.at - tick.clock for tick in ticks[place:place + SETTLING] if tick.host == entered.host]
            found.append(min(then) - min(before) + max(tick.stood_still for tick in ticks[place:place + 2]))
        return found

    def changes(self, after=0):
        """The last tick on one host and the first on the next, of each change."""
        ticks = self.ticks(after)
        return [pair for pair in zip(ticks, ticks[1:]) if pair[0].host != pair[1].host]

    def stops(self, changes, after=0):
        """As hand_overs(), by ticks that do not say which host they come from: `changes` are those of a timeline that
        does, by the same clock of the guest's."""
        begins = [float('-inf'), *(entered.clock for _, entered in changes)]
        ends = [*(left.clock for left, _ in changes), float('inf')]
        stays = [[tick.at - tick.clock for tick in self.ticks(after) if begin <= tick.clock <= end]
                 for begin, end in zip(begins, ends)]
        return [min(then[:SETTLING]) - min(before[-SETTLING:]) for before, then in zip(stays, stays[1:])]

    def missing(self, after=0):
        """Numbers that never came, and those that came out of order."""
        return [b.number for a, b in self._steps(after) if b.number != a.number + 1]

    def around(self, number, after=0, count=8):
        """The lines before and after the tick of that number, for the reader of a failure."""
        place = next((i for i, line in enumerate(self.lines[after:], after)
                      if (match := TICK.match(line.text)) and int(match.group(2)) == number), after)
        return '\n'.join(f'{line.at:.4f} {line.host} {line.text}'
                         for line in self.lines[max(0, place - count):place + count])

    def trouble(self, after=0):
        """Lines in which the guest complains."""
        return [line.text for line in self.lines[after:] if TROUBLE.search(line.text)]

    def check(self, after=0):
        """Fails unless the guest is well: no complaint, no tick missing. Returns the hosts that it ran on in
        their order, so that two that spoke in turns are seen."""
        assert not self.trouble(after), f'{self.name}: {self.trouble(after)[:5]}'
        missing = self.missing(after)
        assert not missing, f'{self.name}: ticks missing before {missing[:5]}:\n{self.around(missing[0], after)}'
        hosts = []
        for line in self.lines[after:]:
            if not hosts or hosts[-1] != line.host:
                hosts.append(line.host)
        return hosts


class Console(Timeline):
    """A guest's serial console, in both directions."""

    def __init__(self, name):
        super().__init__(name)
        self.connections = {}

    def send(self, text):
        """Sends a line to the guest, on the host that it spoke on last."""
        host = self.chunk_hosts[-1] if self.chunk_hosts else next(iter(self.connections))
        self.connections[host].sendall(text.encode() + b'\n')

    def cycles(self, after, timeout=30):
        """How often the bare guest has rewritten its working set, by the first report from `after` on."""
        line = self.wait_for(r'cycles=\d+', timeout, after)
        return int(re.search(r'cycles=(\d+)', line.text).group(1))

    def wait_cycles(self, count, timeout=30):
        """Waits until the bare guest has rewritten all of its working set that often from now on."""
        deadline = time.monotonic() + timeout
        goal = self.cycles(self.mark()) + count
        while self.cycles(self.mark(), deadline - time.monotonic()) < goal:
            pass

    def verify(self, timeout=60):
        """Has the bare guest check all of its memory; fails if any check ever failed."""
        mark = self.mark()
        self.send('verify')
        line = self.wait_for(r'^verified', timeout, after=mark)
        assert re.match(r'verified .*errors=0$', line.text), f'{line.text}; {self.trouble()[:5]}'
        return int(re.search(r'checked=(\d+)', line.text).group(1))


def socket_in(pid, *arguments):
    """A socket in the network namespace of pid."""
    made = []

    def make():
        with open(f'/proc/{pid}/ns/net', 'rb') as file:
            if ctypes.CDLL(None).setns(file.fileno(), CLONE_NEWNET) == 0:
                made.append(socket.socket(*arguments))

    thread = threading.Thread(target=make)  # the namespace is the thread's, and ends with it
    thread.start()
    thread.join()
    return made[0]


class Collector:
    """The thread that reads all consoles and heartbeats."""

    def __init__(self):
        self._selector = selectors.DefaultSelector()
        self._timelines = {}
        self._wake, self._waker = socket.socketpair()
        self._closing = False
        self._watch(self._wake, self._woken)
        sys.setswitchinterval(0.0005)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def timelines(self):
        return list(self._timelines.values())

    def console(self, name, paths):
        """The console that QEMUs connect to at paths, {host: path}."""
        if name not in self._timelines:
            console = self._timelines[name] = Console(name)
            for host, path in paths.items():
                listener = socket.socket(socket.AF_UNIX)
                listener.bind(path)
                os.chmod(path, 0o777)
                listener.listen()
                self._watch(listener, lambda at, l=listener, h=host: self._accept(console, h, l))
        return self._timelines[name]

    def udp(self, pid, address, port):
        name = f'udp port {port}'
        if name not in self._timelines:
            timeline = self._timelines[name] = Timeline(name)
            receiver = socket_in(pid, socket.AF_INET, socket.SOCK_DGRAM)
            receiver.bind((address, port))
            self._watch(receiver, lambda at: timeline.feed(at, 'udp', receiver.recv(2048).strip() + b'\n'))
        return self._timelines[name]

    def close(self):
        self._closing = True
        self._waker.send(b'.')
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def _watch(self, source, action):
        self._selector.register(source, selectors.EVENT_READ, action)
        self._waker.send(b'.')

    def _woken(self, at):
        self._wake.recv(4096)

    def _accept(self, console, host, listener):
        connection, _ = listener.accept()
        console.connections[host] = connection
        self._watch(connection, lambda at: self._read(at, console, host, connection))

    def _read(self, at, console, host, connection):
        before = console.chunk_hosts[-1] if console.chunk_hosts else host
        if before != host and before in console.connections:
            self._read_rest(at, console, before)
        try:
            data = connection.recv(65536)
        except ConnectionError:
            data = b''
        if data:
            console.feed(at, host, data)
            return
        self._selector.unregister(connection)
        connection.close()
        if console.connections.get(host) is connection:
            del console.connections[host]

    @staticmethod
    def _read_rest(at, console, host):
        """What the guest said where it was before is older than what it says where it is."""
        try:
            data = console.connections[host].recv(65536, socket.MSG_DONTWAIT)
        except OSError:
            return
        if data:
            console.feed(at, host, data)

    def _run(self):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        while not self._closing:
            for key, _ in self._selector.select():
                key.data(time.monotonic())
