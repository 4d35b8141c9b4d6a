# SPDX-License-Identifier: Apache-2.0
"""A small QMP client, for judging a QEMU from outside: qmp('query-status')['status']."""
import json
import socket
import time


class QmpError(Exception):
    pass


class Qmp:
    """Connects as soon as somebody listens, within `wait` seconds. Events are kept in .events."""

    def __init__(self, path, timeout=10, wait=10):
        deadline = time.monotonic() + wait
        self.events = []
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(path)
                break
            except OSError:
                self._socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
        self._socket.settimeout(timeout)
        # For reading alone: to write through it would forget what it has read ahead, such as an event behind a reply.
        self._file = self._socket.makefile('r')
        self._read()
        self('qmp_capabilities')

    def _read(self):
        line = self._file.readline()
        if not line:
            raise ConnectionError('QEMU closed its QMP socket')
        return json.loads(line)

    def __call__(self, command, **arguments):
        """Underscores in names stand for hyphens."""
        arguments = {name.replace('_', '-'): value for name, value in arguments.items()}
        self._socket.sendall((json.dumps({'execute': command, 'arguments': arguments}) + '\n').encode())
        while True:
            answer = self._read()
            if 'event' in answer:
                self.events.append(answer)
            elif 'error' in answer:
                raise QmpError(f'{command}: {answer["error"]["desc"]}')
            else:
                return answer['return']

    def give_fd(self, fd, name):
        """As `getfd`: from now on QEMU has a copy of that descriptor, under that name."""
        command = json.dumps({'execute': 'getfd', 'arguments': {'fdname': name}}) + '\n'
        socket.send_fds(self._socket, [command.encode()], [fd])
        while 'return' not in (answer := self._read()):
            if 'error' in answer:
                raise QmpError(f'getfd: {answer["error"]["desc"]}')

    def hmp(self, line):
        return self('human-monitor-command', command_line=line)

    def status(self):
        return self('query-status')['status']

    def wait_status(self, *wanted, timeout=30):
        return self._wait(self.status, wanted, timeout)

    def wait_migration(self, *wanted, timeout=60):
        """Waits until query-migrate's status is one of these: completed and failed unless given."""
        wanted = wanted or ('completed', 'failed')
        self._wait(lambda: self('query-migrate').get('status'), wanted, timeout)
        return self('query-migrate')

    @staticmethod
    def _wait(ask, wanted, timeout):
        deadline = time.monotonic() + timeout
        while (found := ask()) not in wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f'{found!r}, not one of {wanted}, after {timeout} s')
            time.sleep(0.002)
        return found

    def close(self):
        self._file.close()
        self._socket.close()
