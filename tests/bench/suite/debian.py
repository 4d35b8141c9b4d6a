# SPDX-License-Identifier: Apache-2.0
"""A Debian guest that works, under TCG: systemd, ext4, and a load on it.

    vm = DebianGuest.on(cluster, 'web1', 'sqlite', inputs)

Its disk is a copy of the Debian image of repo_peers.py, to which debugfs adds the worker that ticks on the console
(tests/guest/linux/worker.c) and the load: guest_load.py, run as a service.
"""
import os
import pathlib
import subprocess
import tempfile
from dataclasses import dataclass

import repo_peers
from lab.guests import Guest, built

HERE = pathlib.Path(__file__).parent
SERVICE = '''[Unit]
Description={name}
[Service]
ExecStart={command}
{more}
[Install]
WantedBy=multi-user.target
'''
# The console is the worker's alone: it says "ready" when systemd has come that far.
WORKER = SERVICE.format(name='ticks on the console', command='/usr/local/bin/worker mem=64 rate=0 tick=20',
                        more='StandardInput=tty\nStandardOutput=tty\nTTYPath=/dev/ttyS0\nTTYReset=no')
LOAD = SERVICE.format(name='load', command='/usr/bin/python3 /usr/local/bin/guest_load.py {load}', more='')


def add_to_disk(disk, load):
    with tempfile.TemporaryDirectory() as folder:
        units = '/etc/systemd/system'
        lines = ['rm /etc/systemd/system/multi-user.target.wants/say.service']
        for name, text in (('worker.service', WORKER), ('load.service', LOAD.format(load=load))):
            path = pathlib.Path(folder, name)
            path.write_text(text, encoding='ascii')
            lines += [f'write {path} {units}/{name}', f'symlink {units}/multi-user.target.wants/{name} ../{name}']
        for name, path in (('worker', built('tests/guest/linux/linux_worker')),
                           ('guest_load.py', HERE / 'guest_load.py')):
            lines += [f'write {path} /usr/local/bin/{name}', f'sif /usr/local/bin/{name} mode 0100755']
        commands = pathlib.Path(folder, 'commands')
        commands.write_text('\n'.join(lines) + '\n', encoding='ascii')
        subprocess.run(['debugfs', '-w', '-f', commands, disk], check=True, capture_output=True)


@dataclass
class DebianGuest(Guest):
    mem_mib: int = 768
    disk: str = ''
    kernel: str = ''
    initrd: str = ''

    @classmethod
    def on(cls, cluster, name, load, inputs):
        """With a disk on the storage that all hosts of the cluster see."""
        repo_peers.make_inputs(inputs)
        disk = os.path.join(cluster.shared, f'{name}.raw')
        subprocess.run(['cp', '--sparse=always', inputs / 'disk.raw', disk], check=True)
        os.chmod(disk, 0o666)
        add_to_disk(disk, load)
        return cls(name, disk=disk, kernel=str(inputs / 'vmlinuz'), initrd=str(inputs / 'initrd.img'))

    def _machine(self):
        return ['-accel', 'tcg', '-cpu', 'max', '-kernel', self.kernel, '-initrd', self.initrd, '-append',
                'root=/dev/vda rw console=ttyS0 quiet loglevel=1 systemd.show_status=no '
                'systemd.mask=serial-getty@ttyS0.service']

    def _devices(self):
        return [*super()._devices(),
                '-drive', f'if=none,id=disk0,format=raw,cache=none,file={self.disk}',
                '-device', 'virtio-blk-pci,drive=disk0']
