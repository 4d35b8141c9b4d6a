# SPDX-License-Identifier: Apache-2.0
"""Command lines of QEMU with a test guest inside.

    vm = BareGuest('web1', mem_mib=512, dirty_mib=64, rate_mbps=20)
    console = lab.console(vm.name)              # before QEMU starts: it connects to it
    h1.popen(vm.argv())
    console.wait_for('ready')
    qmp = vm.qmp(h1)

A guest's paths are the same in every host: its console, a QMP socket for the product (vm.qmp_path), a
second one for the test, which vm.qmp(host) connects to. The bare guest's options and output are
described in tests/guest/bare/worker.h, those of the Linux guest in tests/guest/linux/worker.c.
"""
import functools
import os
import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass, field

from .qmp import Qmp

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
QEMU = 'qemu-system-x86_64'
HUGE_PAGES = '/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages'
FOUR_GIB = 4 << 30


def built(path):
    """A file that the build made. VMMIG_BUILD is the build folder, `build` at the top if unset."""
    found = os.path.join(os.environ.get('VMMIG_BUILD', os.path.join(ROOT, 'build')), path)
    if not os.path.exists(found):
        raise FileNotFoundError(f'{found} is missing: build first, or set VMMIG_BUILD')
    return found


@functools.cache
def accelerator():
    """QEMU's options for the bare guest's CPU: KVM if that guest really runs under it, or else TCG,
    with a warning that a reader of the test's output does not miss."""
    kvm = ['-accel', 'kvm', '-cpu', 'host,-arch-capabilities']
    with tempfile.TemporaryFile() as complaints:
        trial = subprocess.Popen(
            ['timeout', '10', QEMU, '-M', 'q35', '-bios', 'qboot.rom', '-nodefaults', '-display', 'none',
             '-no-reboot', '-m', '32', '-kernel', built('tests/guest/bare/bare_pc.bin'),
             '-append', 'dirty=1 fill=zero', '-serial', 'stdio', *kvm],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints)
        with trial.stdout:
            line = trial.stdout.readline()
        trial.terminate()
        trial.wait()
        if line.startswith(b'vmmig-guest ready'):
            return kvm
        complaints.seek(0)
        reason = complaints.read().decode(errors='replace').strip() or 'the guest does not come up'
    warnings.warn(f'NO KVM, the bare guest runs under TCG: {reason}', stacklevel=2)
    return ['-accel', 'tcg']


class huge_pages:
    """Reserves memory in 2 MiB pages for a with statement. Raises MemoryError where there are too few."""

    def __init__(self, mib):
        self.pages = (mib + 1) // 2

    def _set(self, count):
        with open(HUGE_PAGES, 'r+', encoding='ascii') as file:
            file.write(str(count))
        with open(HUGE_PAGES, encoding='ascii') as file:
            return int(file.read())

    def __enter__(self):
        with open(HUGE_PAGES, encoding='ascii') as file:
            self.former = int(file.read())
        if self._set(self.former + self.pages) < self.former + self.pages:
            self._set(self.former)
            raise MemoryError(f'cannot reserve {self.pages} pages of 2 MiB')
        return self

    def drop_free(self):
        """Whatever the machine had before, too: only those that are in use stay."""
        self._set(0)

    def __exit__(self, *exception):
        self._set(self.former)


@dataclass
class Guest:
    """What all guests have in common. `memory` says what the RAM is made of:

        plain      -m alone
        numa       two memory-backend-ram, a NUMA node each
        named      a memory-backend-ram with an id of the user's
        shared     a memory-backend-memfd with share=on, as for vhost-user
        hugetlb    a memory-backend-memfd of 2 MiB pages (see huge_pages)
        mem-path   -m with -mem-path
    """
    name: str = 'web1'
    mem_mib: int = 512
    vcpus: int = 1
    memory: str = 'plain'
    mem_path: str = '/dev/shm'
    vga: bool = False
    dimm_slots: int = 0          # for memory plugged later: see plug_dimm()
    virtio_mem_mib: int = 0      # size of a virtio-mem device, all of it requested
    unmigratable: bool = False   # with a device that QEMU refuses to migrate
    options: list = field(default_factory=list)  # further words for QEMU

    def __post_init__(self):
        self.folder = '/run/vmlab'
        self.qmp_path = f'{self.folder}/{self.name}.qmp'
        self.judge_path = f'{self.folder}/{self.name}.judge'
        self.console_path = f'{self.folder}/{self.name}.console'

    def qmp(self, host, wait=10, of=None):
        """A QMP client for the test, beside whoever uses the product's socket. of: the name by which it was restored."""
        path = self.judge_path if of is None else f'{self.folder}/{of}.judge'
        return Qmp(host.path(path), wait=wait)

    def argv(self, incoming=None):
        """The whole command line; incoming is the URI (or 'defer') for a QEMU that waits for the guest. Threads have
        names, so that what the guest's vCPUs use can be told from the rest."""
        return [QEMU, '-name', f'{self.name},debug-threads=on', '-M', 'q35', '-nodefaults', '-no-reboot',
                '-display', 'none', '-smp', str(self.vcpus), *self._machine(), *self._memory(), *self._devices(),
                '-chardev', f'socket,id=console,path={self.console_path}', '-serial', 'chardev:console',
                '-qmp', f'unix:{self.qmp_path},server=on,wait=off',
                '-qmp', f'unix:{self.judge_path},server=on,wait=off', *self.options,
                *(['-incoming', incoming] if incoming else [])]

    def _machine(self):
        raise NotImplementedError

    def _memory(self):
        size = str(self.mem_mib)
        if self.dimm_slots or self.virtio_mem_mib:
            maximum = self.mem_mib + self.virtio_mem_mib + 1024 * self.dimm_slots
            size += f',slots={self.dimm_slots},maxmem={maximum}M'
        words = ['-m', size]
        if self.memory == 'numa':
            for node in (0, 1):
                words += ['-object', f'memory-backend-ram,id=node{node}-ram,size={self.mem_mib // 2}M',
                          '-numa', f'node,nodeid={node},memdev=node{node}-ram']
        elif self.memory == 'mem-path':
            words += ['-mem-path', self.mem_path]
        elif self.memory != 'plain':
            backend = {'named': 'memory-backend-ram,id=my-memory',
                       'shared': 'memory-backend-memfd,id=shared-memory,share=on',
                       'hugetlb': 'memory-backend-memfd,id=huge-memory,hugetlb=on,hugetlbsize=2M',
                       }[self.memory]
            identity = re.search(r'id=([^,]+)', backend).group(1)
            words += ['-object', f'{backend},size={self.mem_mib}M', '-machine', f'memory-backend={identity}']
        return words

    def _devices(self):
        words = []
        if self.vga:
            words += ['-device', 'VGA']
        if self.virtio_mem_mib:
            size = f'{self.virtio_mem_mib}M'
            words += ['-object', f'memory-backend-ram,id=virtio-mem-ram,size={size}',
                      '-device', f'virtio-mem-pci,id=vm0,memdev=virtio-mem-ram,requested-size={size}']
        if self.unmigratable:
            words += ['-device', 'nvme,serial=1']
        return words


@dataclass
class BareGuest(Guest):
    """The guest that checks its own memory; ready 0.2 to 0.6 s after its start (512 MiB, KVM)."""
    dirty_mib: int = 64
    rate_mbps: int = 20
    scan_mbps: int = 200
    fill: str = 'text'
    pattern: str = 'seq'
    heartbeat_ms: int = 20
    seed: int = 1
    tcg: bool = False

    def _machine(self):
        append = (f'vcpus={self.vcpus} dirty={self.dirty_mib} rate={self.rate_mbps} scan={self.scan_mbps} '
                  f'fill={self.fill} pattern={self.pattern} hb={self.heartbeat_ms} seed={self.seed}')
        return [*(['-accel', 'tcg'] if self.tcg else accelerator()), '-bios', 'qboot.rom',
                '-kernel', built('tests/guest/bare/bare_pc.bin'), '-append', append]

    def plug_dimm(self, qmp, console, mib=128, number=0):
        """Plugs a DIMM into the running guest, which fills it, works in it and checks it from then on."""
        above = self.mem_mib << 20 > 2816 << 20  # q35 keeps 2 GiB below 4 GiB of a larger memory
        start = -(-(FOUR_GIB + ((self.mem_mib << 20) - (2 << 30) if above else 0)) // (1 << 30)) << 30
        start += number << 30
        qmp('object-add', qom_type='memory-backend-ram', id=f'dimm{number}-ram', size=mib << 20)
        qmp('device_add', driver='pc-dimm', id=f'dimm{number}', memdev=f'dimm{number}-ram', addr=start)
        mark = console.mark()
        console.send(f'add {start:#x} {mib << 20:#x}')
        console.wait_for('^added', after=mark)
