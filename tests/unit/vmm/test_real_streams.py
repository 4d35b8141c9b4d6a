#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Streams of a real QEMU: taken apart, put together, and loaded by a real QEMU.

    test_real_streams.py RELAY_STREAM

For each machine a running guest is migrated into a file. Passed through the relay with nothing mapped,
that comes out byte for byte. With the guest's memory mapped, its pages go into memory files, on which a second
QEMU is started that loads the rest, and is migrated into a file in its turn. All blocks of memory, ROMs
and VGA memory too, must have the same contents in both files.
"""
import json
import mmap
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import unittest

QEMU = 'qemu-system-x86_64'
RELAY = sys.argv.pop(1) if len(sys.argv) > 1 else None
MIB = 1 << 20
PAYLOAD = random.Random(1).randbytes(6 * MIB)
PAYLOAD_AT = 16 * MIB

# Name of the test: machine, its own options, sizes of the memory backends that are mapped.
MACHINES = {
    'q35': ('q35', ['-device', 'VGA'], {'pc.ram': 128 * MIB}),
    'pc': ('pc', ['-device', 'VGA', '-uuid', '9a1f2a3e-95a4-4d51-8b07-3a5a7a8b0c11'], {'pc.ram': 128 * MIB}),
    'numa': ('q35', ['-smp', '2', '-numa', 'node,memdev=m0', '-numa', 'node,memdev=m1'],
             {'m0': 48 * MIB, 'm1': 80 * MIB}),
}


class Qemu:
    """A QEMU and its QMP. Its guest's memory lies in `backends`, memory files by name."""

    def __init__(self, machine, options, backends, payload, incoming):
        ours, theirs = socket.socketpair()
        memory = []
        for name, fd in backends.items():
            memory += ['-object', f'memory-backend-file,id={name},size={os.fstat(fd).st_size},share=on,'
                       f'mem-path=/proc/self/fd/{fd},x-use-canonical-path-for-ramblock-id=off']
        if len(backends) == 1:
            machine += ',memory-backend=' + next(iter(backends))
        self.process = subprocess.Popen(
            [QEMU, '-M', machine, '-accel', 'tcg', '-m', '128', '-nodefaults', '-display', 'none',
             *memory, *options, '-device', f'loader,file={payload},addr={PAYLOAD_AT:#x},force-raw=on',
             '-chardev', f'socket,id=qmp,fd={theirs.fileno()}', '-mon', 'chardev=qmp,mode=control',
             *(['-incoming', 'defer', '-S'] if incoming else [])],
            pass_fds=[theirs.fileno(), *backends.values()])
        theirs.close()
        self.lines = ours.makefile('r')
        self.socket = ours
        self.lines.readline()
        self('qmp_capabilities')
        self('migrate-set-capabilities', capabilities=[
            {'capability': 'events', 'state': True}, {'capability': 'validate-uuid', 'state': True}])
        self('migrate-set-parameters', **{'max-bandwidth': 20 * MIB})

    def __call__(self, command, **arguments):
        request = {'execute': command, 'arguments': arguments}
        self.socket.sendall(json.dumps(request).encode() + b'\n')
        while 'event' in (answer := json.loads(self.lines.readline())):
            pass
        if 'error' in answer:
            raise AssertionError(f'{command}: {answer["error"]}')
        return answer['return']

    def wait_migrated(self):
        while True:
            line = json.loads(self.lines.readline())
            if line.get('event') == 'MIGRATION' and line['data']['status'] in ('completed', 'failed'):
                return line['data']['status']

    def migrate_to(self, path):
        self('migrate', uri=f'exec:cat > {path}')
        assert self.wait_migrated() == 'completed', self('query-migrate')

    def close(self):
        self.process.kill()
        self.process.wait()
        self.lines.close()
        self.socket.close()


def memory_file(name, size):
    fd = os.memfd_create(name)
    os.ftruncate(fd, size)
    return fd


def contents(fd):
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as m:
        return m[:]


def blocks_of(path):
    """Name and size of every memory block in a stream's list."""
    with open(path, 'rb') as f:
        stream = f.read(65536)
    at = stream.index(b'\x03ram' + struct.pack('>II', 0, 4)) + 12
    total = struct.unpack_from('>Q', stream, at)[0] & ~0xfff
    at += 8
    blocks = {}
    while total:
        n = stream[at]
        name = stream[at + 1:at + 1 + n].decode()
        blocks[name] = struct.unpack_from('>Q', stream, at + 1 + n)[0]
        total -= blocks[name]
        at += 9 + n
    return blocks


def relay(stream, rest, mapped, *options):
    """Pass the file `stream` through the relay; its report."""
    ours, theirs = socket.socketpair()
    with open(rest, 'wb') as out:
        process = subprocess.Popen(
            [RELAY, *options, str(theirs.fileno()), str(out.fileno()),
             *(f'{os.fstat(fd).st_size}:{fd}:{name}' for name, fd in mapped.items())],
            stdout=subprocess.PIPE, text=True,
            pass_fds=[theirs.fileno(), out.fileno(), *mapped.values()])
    theirs.close()

    def send():
        with open(stream, 'rb') as f, ours:
            ours.sendfile(f)
    sender = threading.Thread(target=send)
    sender.start()
    report = json.loads(process.communicate()[0])
    sender.join()
    return report


@unittest.skipUnless(shutil.which(QEMU), f'{QEMU} is not installed')
class RealStreams(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix='vmmig-streams-')
        self.addCleanup(shutil.rmtree, self.folder)
        with open(self.path('payload'), 'wb') as f:
            f.write(PAYLOAD)

    def path(self, name):
        return os.path.join(self.folder, name)

    def memory(self, sizes):
        fds = {name: memory_file(name, size) for name, size in sizes.items()}
        for fd in fds.values():
            self.addCleanup(os.close, fd)
        return fds

    def qemu(self, machine, options, backends, incoming=False):
        q = Qemu(machine, options, backends, self.path('payload'), incoming)
        self.addCleanup(q.close)
        return q

    def same(self, a, b):
        with open(a, 'rb') as f, open(b, 'rb') as g:
            self.assertTrue(f.read() == g.read(), f'{a} and {b} differ')

    def all_memory(self, stream):
        fds = self.memory(blocks_of(stream))
        report = relay(stream, os.devnull, fds)
        self.assertEqual(report['error'], '')
        return {name: contents(fd) for name, fd in fds.items()}

    def check(self, machine, options, sizes):
        self.qemu(machine, options, self.memory(sizes)).migrate_to(self.path('stream'))

        report = relay(self.path('stream'), self.path('same'), {})
        self.assertEqual((report['error'], report['pages']), ('', 0))
        self.same(self.path('stream'), self.path('same'))
        self.assertLess(report['memory_done'], report['rest'])
        report = relay(self.path('stream'), self.path('opaque'), {}, '-o')
        self.same(self.path('stream'), self.path('opaque'))

        mapped = self.memory(sizes)
        report = relay(self.path('stream'), self.path('rest'), mapped)
        self.assertEqual((report['error'], report['opaque']), ('', False))
        self.assertGreaterEqual(report['pages'], sum(sizes.values()) // 4096)
        self.assertLess(report['rest'], report['bytes_read'] - len(PAYLOAD))
        destination = self.qemu(machine, options, mapped, incoming=True)
        destination('migrate-incoming', uri=f'exec:cat {self.path("rest")}')
        self.assertEqual(destination.wait_migrated(), 'completed')
        destination.migrate_to(self.path('again'))

        expected, loaded = self.all_memory(self.path('stream')), self.all_memory(self.path('again'))
        self.assertEqual(expected.keys(), loaded.keys())
        for name, data in expected.items():
            self.assertTrue(data == loaded[name], f'{name} differs after loading')
        flat = b''.join(expected[name] for name in sizes)
        self.assertTrue(flat[PAYLOAD_AT:PAYLOAD_AT + len(PAYLOAD)] == PAYLOAD)


for test, parameters in MACHINES.items():
    setattr(RealStreams, f'test_{test}', lambda self, p=parameters: self.check(*p))

if __name__ == '__main__':
    result = unittest.main(exit=False, verbosity=2).result
    if result.skipped:
        print('SKIPPED:', result.skipped[0][1])
        sys.exit(77)
    sys.exit(not result.wasSuccessful())
