# SPDX-License-Identifier: Apache-2.0
"""The self-checking guest in a vmmig-vmm, the VMM that links libvmmig-attach.

    vm = VmmGuest('web1', vcpus=4, tracking='ring', writer=2000)
    console = lab.console(vm.name)              # before the VMM starts: it connects to it
    h1.popen(vm.argv())                         # then: vmmig attach web1 --socket PATH, PATH being vm.attach_path
    console.wait_for('ready')
    h2.popen(vm.argv(incoming=True))            # where no agent starts the destination

Paths are the same in every host. VMMIG_TRACKING in the environment: the driver of guests that do not say which.
"""
import os
from dataclasses import dataclass, field

from .guests import built


@dataclass
class VmmGuest:
    name: str = 'web1'
    mem_mib: int = 256
    below_4g_mib: int = 3072     # what is more lies above 4 GiB
    hugetlb: bool = False        # see huge_pages
    vcpus: int = 1
    tracking: str = os.environ.get('VMMIG_TRACKING', 'auto')  # auto, bitmap, ring, plain
    ring_entries: int = 0        # 0: as the library chooses
    writer: int = 0              # pages a second that a device writes; 0: there is none
    writer_pages: int = 256      # how many it goes round
    dirty_mib: int = 64
    rate_mbps: int = 20
    scan_mbps: int = 200
    fill: str = 'text'
    pattern: str = 'seq'
    heartbeat_ms: int = 20
    seed: int = 1
    events: bool = False         # it tells a listener at events_path when the guest runs
    options: list = field(default_factory=list)  # further words for vmmig-vmm

    def __post_init__(self):
        self.attach_path = f'/run/vmlab/{self.name}.vmm'
        self.console_path = f'/run/vmlab/{self.name}.console'
        self.events_path = f'/run/vmlab/{self.name}.events'

    def argv(self, incoming=False, socket=None, program=None):
        """The whole command line. socket: instead of attach_path, for a second VMM on the same host; program: of
        another build."""
        append = (f'vcpus={self.vcpus} dirty={self.dirty_mib} rate={self.rate_mbps} scan={self.scan_mbps} '
                  f'fill={self.fill} pattern={self.pattern} hb={self.heartbeat_ms} seed={self.seed}')
        if self.writer:
            append += f' writer={self.writer_pages}'
        return [program or built('tools/vmmig-vmm/vmmig-vmm'), '--attach', socket or self.attach_path,
                '--name', self.name, '--memory', f'{self.mem_mib}M',
                '--below-4g', f'{self.below_4g_mib}M', *(['--hugetlb'] if self.hugetlb else []),
                '--vcpus', str(self.vcpus), '--tracking', self.tracking,
                *(['--ring-entries', str(self.ring_entries)] if self.ring_entries else []),
                *(['--writer', str(self.writer)] if self.writer else []),
                *(['--events', '/run/vmlab/%n.events'] if self.events else []),
                '--serial', 'unix:/run/vmlab/%n.console', '--append', append, *self.options,
                *(['--incoming'] if incoming else ['--kernel', built('tests/guest/bare/bare_pc.bin')])]
