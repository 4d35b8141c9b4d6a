# SPDX-License-Identifier: Apache-2.0
"""The Linux guest: Debian's cloud kernel, and an initramfs of busybox, its modules and our worker.

    kernel, initrd = linux_guest(cache)     # downloads once, then a few milliseconds
    disk = make_disk(f'{lab.shared}/web1.raw', mib=64)
    vm = LinuxGuest('web1', kernel=kernel, initrd=initrd, disk=disk, network=1)

The packages come from wherever the machine's apt gets its own. They are unpacked in the cache folder,
nothing is installed. The guest's console says what tests/guest/linux/worker.c describes.
"""
import fcntl
import glob
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from .guests import ROOT, Guest, built
from .hosts import OBSERVER_ADDRESS, SUBNET, run

MODULES = ['virtio_pci', 'virtio_blk', 'virtio_net', 'virtio_console', 'virtio_balloon', 'virtio_mem',
           'crc32c_generic', 'ext4']
OVMF = '/usr/share/OVMF'
HEARTBEAT_PORT = 7000


def default_cache():
    """A cache folder of the user's."""
    base = os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache'))
    return os.environ.get('VMLAB_CACHE', os.path.join(base, 'vmmig-lab'))


def _unpack(package, cache):
    """Downloads a Debian package and unpacks it. Returns the folder."""
    folder = os.path.join(cache, package)
    if not os.path.exists(folder):
        download = os.path.join(cache, 'download')
        shutil.rmtree(download, ignore_errors=True)
        os.makedirs(download)
        run(['apt-get', '-q', '-o', 'APT::Sandbox::User=root', 'download', package], cwd=download)
        run(['dpkg-deb', '-x', *glob.glob(f'{download}/*.deb'), f'{download}/unpacked'])
        os.rename(f'{download}/unpacked', folder)
        shutil.rmtree(download)
    return folder


def _kernel_package():
    """The package that holds the kernel which linux-image-cloud-amd64 stands for."""
    for line in run(['apt-cache', 'depends', 'linux-image-cloud-amd64']).splitlines():
        if 'Depends: linux-image-' in line:
            return line.split()[-1]
    raise RuntimeError('apt knows no linux-image-cloud-amd64; run apt-get update')


def _module_files(folder):
    """The files of MODULES and of what they depend on, in the order in which they can be loaded."""
    top, = glob.glob(f'{folder}/lib/modules/*')
    files = {os.path.basename(path).removesuffix('.ko').replace('-', '_'): path
             for path in glob.glob(f'{top}/kernel/**/*.ko', recursive=True)}
    with open(f'{top}/modules.builtin', encoding='ascii') as file:
        inside = {os.path.basename(line.strip()).removesuffix('.ko').replace('-', '_') for line in file}
    ordered = []

    def add(name):
        name = name.replace('-', '_')
        if name in inside or files[name] in ordered:
            return
        for needed in re.search(rb'\0depends=([^\0]*)\0', _read(files[name])).group(1).decode().split(','):
            if needed:
                add(needed)
        ordered.append(files[name])

    for name in MODULES:
        add(name)
    return ordered


def _newc(entries):
    """A cpio archive in newc format of (name, mode, contents)."""
    archive = bytearray()
    for number, (name, mode, data) in enumerate([*entries, ('TRAILER!!!', 0, b'')]):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b'070701' + b''.join(b'%08x' % field for field in fields) + name.encode() + b'\0'
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return archive


def _read(path):
    with open(path, 'rb') as file:
        return file.read()


def _initramfs(kernel_folder, busybox_folder):
    folders = [(name, 0o40755, b'') for name in ('bin', 'modules')]
    modules = [(f'modules/{number:02}-{os.path.basename(path)}', 0o100644, _read(path))
               for number, path in enumerate(_module_files(kernel_folder))]
    return _newc([*folders, *modules,
                  ('bin/busybox', 0o100755, _read(f'{busybox_folder}/bin/busybox')),
                  ('bin/worker', 0o100755, _read(built('tests/guest/linux/linux_worker'))),
                  ('init', 0o100755, _read(f'{ROOT}/tests/guest/linux/init'))])


def _agent_archive(folder):
    """qemu-ga and the libraries that it needs, which QEMU on this machine needs, too."""
    program = f'{folder}/usr/sbin/qemu-ga'
    libraries = re.findall(r'(/\S+) \(0x', run(['ldd', program]))
    folders = sorted({os.path.join(*parts[:i]) for path in libraries for parts in [path.split('/')[1:-1]]
                      for i in range(1, len(parts) + 1)})
    return _newc([*((name, 0o40755, b'') for name in folders),
                  *((path[1:], 0o100755, _read(path)) for path in libraries), ('bin/qemu-ga', 0o100755, _read(program))])


def linux_guest(cache=None, agent=False):
    """The paths of the guest's kernel and initramfs, made from packages in the cache folder. agent: with qemu-ga."""
    cache = cache or default_cache()
    os.makedirs(cache, exist_ok=True)
    with open(os.path.join(cache, 'lock'), 'w', encoding='ascii') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernel_folder = _unpack(_kernel_package(), cache)
        contents = _initramfs(kernel_folder, _unpack('busybox-static', cache))
        if agent:
            contents += _agent_archive(_unpack('qemu-guest-agent', cache))
        initrd = os.path.join(cache, 'initrd-agent' if agent else 'initrd')
        if not os.path.exists(initrd) or _read(initrd) != contents:
            with open(initrd + '.new', 'wb') as file:
                file.write(contents)
            os.rename(initrd + '.new', initrd)
    kernel, = glob.glob(f'{kernel_folder}/boot/vmlinuz-*')
    return kernel, initrd


def make_disk(path, mib=64):
    """An empty ext4 file system in a raw image."""
    with open(path, 'wb') as file:
        file.truncate(mib << 20)
    os.chmod(path, 0o666)
    run(['mkfs.ext4', '-q', '-E', 'lazy_itable_init=0,lazy_journal_init=0', path])
    return path


def check_disk(path):
    """Fails unless the file system was unmounted and is clean, and the guest's log on it is whole. Returns
    the number of its lines."""
    said = fsck(path)
    assert 'journal recovery' not in said, f'{path}: not unmounted: {said}'
    log = disk_log(path)
    numbers = [int(line.split()[1]) for line in log]
    assert numbers == list(range(len(log))), f'{path}: the log has a hole or a line twice'
    return len(numbers)


def fsck(path):
    """What is said of a file system that is clean; fails if it is not."""
    return run(['fsck.ext4', '-f', '-n', path])


def disk_log(path):
    """The lines of the guest's log on its disk."""
    return subprocess.run(['debugfs', '-R', 'cat /log', path], text=True, check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.splitlines()


@dataclass
class LinuxGuest(Guest):
    """Linux under TCG. `network` n gives it the address 10.77.0.(100+n), a tap of that number (host.add_tap
    must have made it on every host), and heartbeats to the observer: lab.udp(HEARTBEAT_PORT)."""
    mem_mib: int = 256
    kernel: str = ''
    initrd: str = ''
    disk: str = ''
    network: int = 0
    work_mib: int = 64
    rate_mbps: int = 10
    tick_ms: int = 100
    agent: bool = False             # with qemu-ga, at agent_path(); the initramfs has to have it
    firmware: str = 'seabios'       # or 'ovmf': needs vars, a copy that make_vars() made
    vars: str = ''

    @property
    def agent_path(self):
        return f'{self.folder}/{self.name}.qga'

    def _machine(self):
        worker = f'mem={self.work_mib},rate={self.rate_mbps},tick={self.tick_ms}'
        append = 'console=ttyS0 quiet panic=-1 memhp_default_state=online'
        if self.disk:
            append += ' lab.disk=1'
        if self.agent:
            append += ' lab.agent=1'
        if self.network:
            append += f' lab.ip={SUBNET}{100 + self.network}'
            worker += f',udp={OBSERVER_ADDRESS}'
        words = ['-accel', 'tcg', '-cpu', 'max', '-kernel', self.kernel, '-initrd', self.initrd,
                 '-append', f'{append} lab.worker={worker}']
        if self.firmware == 'ovmf':
            words += ['-drive', f'if=pflash,format=raw,unit=0,readonly=on,file={OVMF}/OVMF_CODE_4M.fd',
                      '-drive', f'if=pflash,format=raw,unit=1,file={self.vars}']
        return words

    def _devices(self):
        words = super()._devices()
        if self.agent:
            words += ['-device', 'virtio-serial', '-chardev',
                      f'socket,id=qga,path={self.agent_path},server=on,wait=off',
                      '-device', 'virtserialport,chardev=qga,name=org.qemu.guest_agent.0']
        if self.disk:
            words += ['-drive', f'if=none,id=disk0,format=raw,cache=none,file={self.disk}',
                      '-device', 'virtio-blk-pci,drive=disk0']
        if self.network:
            words += ['-netdev', f'tap,id=net0,ifname=tap{self.network},script=no,downscript=no',
                      '-device', f'virtio-net-pci,netdev=net0,mac=52:54:00:77:00:{self.network:02x}']
        return words

    def power_off(self, console, process, timeout=60):
        """Has the guest unmount its disk and end; its QEMU ends with it."""
        mark = console.mark()
        console.send('poweroff')
        console.wait_for('lab-guest halted', timeout, after=mark)
        process.wait(timeout)


def make_vars(path):
    """A copy of OVMF's variables for one guest; on shared storage, since the guest takes it along."""
    return shutil.copy(f'{OVMF}/OVMF_VARS_4M.fd', path)
