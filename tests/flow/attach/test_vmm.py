# SPDX-License-Identifier: Apache-2.0
"""vmmig-vmm by itself: its guest, its command line, and guests that move from one to another on one host."""
import os
import re
import subprocess

import pytest
from agents import eventually
from lab import Lab, VmmGuest
from lab.guests import built

DRIVERS = ['bitmap', 'ring', 'plain']


@pytest.fixture(scope='module')
def host():
    with Lab(hosts=1) as lab:
        yield lab.hosts[0]


class Moved:
    """A guest that goes from VMM to VMM on one host."""

    def __init__(self, host, vm):
        self.host, self.vm, self.moves = host, vm, 0
        self.console = host.lab.console(vm.name)
        self.socket = vm.attach_path
        self.process = host.popen(vm.argv(), name=vm.name)
        self.console.wait_for('ready', timeout=60)

    def move(self, rounds=3):
        """Returns what vmm_move printed, as a dictionary of numbers."""
        self.moves += 1
        socket = f'{self.vm.attach_path}{self.moves}'
        other = self.host.popen(self.vm.argv(incoming=True, socket=socket), name=self.vm.name)
        eventually('a VMM that waits', lambda: vmm_listens(other, self.host.path(socket)))
        done = subprocess.run([built('tests/unit/dirtylog/vmm_move'), self.host.path(self.socket),
                               self.host.path(socket), str(rounds)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + log_of(other)
        assert self.process.wait(10) == 0
        self.process, self.socket = other, socket
        self.console.wait_ticks(2)
        return {name: int(value) for name, value in re.findall(r'(\w+)=(\d+)', done.stdout)}

    def end(self):
        self.console.verify()
        self.console.check()
        self.process.terminate()
        assert self.process.wait(10) == 0


def log_of(process):
    with open(process.log, encoding='utf-8', errors='replace') as file:
        return file.read()


def vmm_listens(process, path):
    assert process.poll() is None, log_of(process)
    return os.path.exists(path)


@pytest.mark.parametrize('tracking', DRIVERS)
def test_a_busy_guest_moves_from_vmm_to_vmm(host, tracking):
    guest = Moved(host, VmmGuest(f'busy-{tracking}', mem_mib=128, vcpus=4, dirty_mib=16, rate_mbps=400,
                                 tracking=tracking))
    for _ in range(3):
        assert guest.move()['pages'] > 128 * 256
    guest.end()
