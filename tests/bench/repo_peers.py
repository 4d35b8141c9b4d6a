#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""The repository beside restic, borg, casync and qemu-img: time and space for a disk and the memory of its guests.

usage: repo_peers.py [--inputs DIR] [--work DIR] [--rounds N] [--tools A,B] [--json FILE]

DIR holds disk.raw and mem1.raw, mem2.raw; what is missing is made: a Debian disk by mmdebstrap, and the memory of
two guests booted from it under TCG. In each round every tool, one after the other, stores the three files in an
empty store, stores the disk once more under another name, and gets all three out again; what comes out is
compared. Medians over the rounds.

Needs restic, borgbackup, casync, mmdebstrap, qemu-utils, qemu-system-x86 (tools/packages bench).
"""
import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = ('disk.raw', 'mem1.raw', 'mem2.raw')
MEMORY_MIB = 768
SAY_BOOTED = '''[Unit]
Description=say when the guest is up
[Service]
ExecStart=/bin/sh -c "cat /usr/bin/* /usr/lib/x86_64-linux-gnu/*.so* >/dev/null; echo BOOTED >/dev/ttyS0"
Type=oneshot
RemainAfterExit=yes
[Install]
WantedBy=multi-user.target
'''


# What the programs that run() has started took, since somebody last set it back.
usage = {'cpu_s': 0, 'peak_rss_bytes': 0}


def run(*argv, env=None, cwd=None):
    """What the program printed. time(1) starts it: the kernel would count this process's own memory as its peak."""
    with tempfile.NamedTemporaryFile('r') as took, tempfile.TemporaryFile('w+') as errors:
        words = ['time', '--quiet', '--output', took.name, '--format', '%M', *map(str, argv)]
        # pylint: disable=consider-using-with  # wait4() waits for it
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=env,
                                   cwd=cwd, text=True)
        said = process.stdout.read()
        _, status, spent = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, words, said, errors.read())
        usage['cpu_s'] += spent.ru_utime + spent.ru_stime
        usage['peak_rss_bytes'] = max(usage['peak_rss_bytes'], int(took.read()) << 10)
        return said


# ---- the inputs

def make_disk(folder):
    root, made = folder / 'root', folder / 'disk.new'
    shutil.rmtree(root, ignore_errors=True)  # of a run that was interrupted
    run('mmdebstrap', '--variant=minbase', '--include=linux-image-cloud-amd64,systemd-sysv,openssh-server,'
        'python3,curl,vim-tiny,git', 'bookworm', root)
    service = root / 'etc/systemd/system/say.service'
    service.write_text(SAY_BOOTED)
    wants = root / 'etc/systemd/system/multi-user.target.wants'
    wants.mkdir(parents=True, exist_ok=True)
    (wants / 'say.service').symlink_to('../say.service')
    for name in ('vmlinuz', 'initrd.img'):
        shutil.copy(next((root / 'boot').glob(f'{name}-*')), folder / name)
    with open(made, 'wb') as disk:
        disk.truncate(2 << 30)
    run('mkfs.ext4', '-q', '-F', '-d', root, made)
    shutil.rmtree(root)
    made.rename(folder / 'disk.raw')


def command(stream, name, **arguments):
    stream.write(json.dumps({'execute': name, 'arguments': arguments}) + '\n')
    stream.flush()
    while 'return' not in (answer := json.loads(stream.readline())):
        assert 'error' not in answer, answer


def make_memory(folder, out):
    """The memory of a guest that has booted from the disk."""
    serial, qmp, made = folder / 'serial', folder / 'qmp', out.with_suffix('.new')
    for path in (serial, made):
        path.unlink(missing_ok=True)
    argv = ['qemu-system-x86_64', '-machine', 'q35,accel=tcg', '-m', str(MEMORY_MIB), '-nodefaults',
            '-display', 'none', '-kernel', folder / 'vmlinuz', '-initrd', folder / 'initrd.img',
            '-append', 'root=/dev/vda console=ttyS0', '-serial', f'file:{serial}',
            '-drive', f'file={folder}/disk.raw,format=raw,if=virtio,snapshot=on',
            '-qmp', f'unix:{qmp},server=on,wait=off']
    with subprocess.Popen(argv) as guest, contextlib.ExitStack() as stack:
        stack.callback(guest.kill)
        deadline = time.monotonic() + 600
        while not serial.exists() or b'BOOTED' not in serial.read_bytes():
            assert guest.poll() is None and time.monotonic() < deadline, 'the guest does not boot'
            time.sleep(0.5)
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(qmp))
            stream = s.makefile('rw')
            stream.readline()
            command(stream, 'qmp_capabilities')
            command(stream, 'stop')
            command(stream, 'pmemsave', val=0, size=MEMORY_MIB << 20, filename=str(made))
            command(stream, 'quit')
        guest.wait(60)
    made.rename(out)


def make_inputs(folder):
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / 'disk.raw').exists():
        make_disk(folder)
    for name in FILES[1:]:
        if not (folder / name).exists():
            make_memory(folder, folder / name)
    return [folder / name for name in FILES]


# ---- the tools: each has init, put(file, name), get(name, path), and its store's bytes

class Tool:
    def __init__(self, store):
        self.store = store

    def bytes(self):
        """What the store takes; ballast of vmmig, which is empty space set aside, not counted."""
        total = 0
        for path in self.store.rglob('*'):
            if path.is_file() and path.name != 'ballast':
                total += min(path.stat().st_size, path.stat().st_blocks * 512)
        return total


class Vmmig(Tool):
    def url(self):
        return f'dir:{self.store}'

    def vmmig(self, *words):
        build = pathlib.Path(os.environ.get('VMMIG_BUILD', ROOT / 'build'))
        return json.loads(run(build / 'tools/vmmig', *words, '--json', '--repo', self.url()))

    def init(self):
        self.vmmig('repo', 'init')

    def put(self, path, name):
        self.vmmig('image', 'import', path, name, '--format', 'raw')

    def get(self, name, path):
        self.vmmig('image', 'export', name, path)

    def repacked_bytes(self):
        """The same once all packs were compressed again, and the recipes that named the old ones are gone."""
        self.vmmig('repo', 'gc', '--repack')
        self.vmmig('repo', 'gc')
        return self.bytes()


class Restic(Tool):
    env = dict(os.environ, RESTIC_PASSWORD='x')

    def restic(self, *words):
        return run('restic', '-q', '--no-cache', '-r', self.store, *words, env=self.env)

    def init(self):
        self.restic('init')

    def put(self, path, name):
        self.restic('backup', '--force', '--tag', name, path)

    def get(self, name, path):
        self.restic('restore', 'latest', '--tag', name, '--target', path.parent / 'restic')
        found, = [p for p in (path.parent / 'restic').rglob('*.raw')]
        os.rename(found, path)
        shutil.rmtree(path.parent / 'restic')


class Borg(Tool):
    def __init__(self, store):
        super().__init__(store)
        self.env = dict(os.environ, BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK='yes', BORG_BASE_DIR=f'{store}.base')

    def init(self):
        run('borg', 'init', '-e', 'none', self.store, env=self.env)

    def put(self, path, name):
        run('borg', 'create', '-C', 'lz4', '--chunker-params', 'fixed,65536', '--files-cache', 'disabled',
            f'{self.store}::{name}', path.name, env=self.env, cwd=path.parent)

    def get(self, name, path):
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            run('borg', 'extract', '--sparse', f'{self.store}::{name}', env=self.env, cwd=folder)
            found, = pathlib.Path(folder).iterdir()
            os.rename(found, path)


class Casync(Tool):
    def init(self):
        self.store.mkdir()

    def put(self, path, name):
        run('casync', 'make', f'--store={self.store}/chunks', self.store / f'{name}.caibx', path)

    def get(self, name, path):
        run('casync', 'extract', f'--store={self.store}/chunks', self.store / f'{name}.caibx', path)


class QemuImg(Tool):
    def init(self):
        self.store.mkdir()

    def put(self, path, name):
        run('qemu-img', 'convert', '-f', 'raw', '-c', '-O', 'qcow2', path, self.store / name)

    def get(self, name, path):
        run('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', self.store / name, path)


TOOLS = {'vmmig': Vmmig, 'restic': Restic, 'borg': Borg, 'casync': Casync, 'qemu-img': QemuImg}


class Clock:
    """Seconds, and seconds of CPU of the programs that ended meanwhile, summed up over calls."""

    def __init__(self):
        self.seconds = self.cpu = 0

    def run(self, call, *args):
        began, used = time.monotonic(), os.times()
        call(*args)
        now = os.times()
        self.seconds += time.monotonic() - began
        self.cpu += now.children_user + now.children_system - used.children_user - used.children_system


def digest(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest() if hasattr(hashlib, 'file_digest') else \
            hashlib.sha256(file.read()).hexdigest()


def sha256_rate():
    """Bytes a second of one core, pages of 4 KiB as the repository hashes them."""
    page, n = os.urandom(4096), 0
    began = time.process_time()
    while time.process_time() - began < 0.5:
        hashlib.sha256(page)
        n += 4096
    return n / (time.process_time() - began)


def one_round(name, inputs, digests, work):
    with tempfile.TemporaryDirectory(dir=work) as folder:
        folder = pathlib.Path(folder)
        tool = TOOLS[name](folder / 'store')
        tool.init()
        first, again, export, result = Clock(), Clock(), Clock(), {}
        for path in inputs:
            first.run(tool.put, path, path.stem)
        result['stored_bytes'] = before = tool.bytes()
        again.run(tool.put, inputs[0], 'again')
        result['again_bytes'] = tool.bytes() - before
        for path in inputs:
            out = folder / f'out-{path.name}'
            export.run(tool.get, path.stem, out)
            assert digest(out) == digests[path], f'{name}: {path.name} came out changed'
            out.unlink()
        if isinstance(tool, Vmmig):
            result['repacked_bytes'] = tool.repacked_bytes()
        for what, clock in (('import', first), ('again', again), ('export', export)):
            result |= {f'{what}_s': clock.seconds, f'{what}_cpu_s': clock.cpu}
        return result


def measure(inputs, work, rounds, tools):
    digests = {path: digest(path) for path in inputs}
    rows = {name: [] for name in tools}
    for _ in range(rounds):
        for name in tools:
            rows[name].append(one_round(name, inputs, digests, work))
    medians = {name: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for name, rs in rows.items()}
    return {'input_bytes': sum(p.stat().st_size for p in inputs),
            'input_data_bytes': sum(p.stat().st_blocks * 512 for p in inputs), 'cores': os.cpu_count(),
            'disk_bytes': inputs[0].stat().st_blocks * 512, 'sha256_rate': sha256_rate(), 'medians': medians,
            'rounds': rows}


def table(result):
    lines = [f'{"":10} {"import s":>9} {"CPU s":>6} {"export s":>9} {"CPU s":>6} {"stored MB":>10} {"again s":>8} '
             f'{"CPU s":>6} {"again MB":>9}']
    for name, m in result['medians'].items():
        lines.append(f'{name:10} {m["import_s"]:9.2f} {m["import_cpu_s"]:6.2f} {m["export_s"]:9.2f} '
                     f'{m["export_cpu_s"]:6.2f} {m["stored_bytes"] / 1e6:10.1f} {m["again_s"]:8.2f} '
                     f'{m["again_cpu_s"]:6.2f} {m["again_bytes"] / 1e6:9.3f}')
        if 'repacked_bytes' in m:
            rate = result['disk_bytes'] / m['again_cpu_s'] / result['sha256_rate']
            lines.append(f'  after gc --repack {m["repacked_bytes"] / 1e6:.1f} MB; the second import takes '
                         f'{rate:.2f} of the bytes that SHA-256 alone takes per second of CPU')
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
    parser.add_argument('--inputs', type=pathlib.Path)
    parser.add_argument('--work', type=pathlib.Path)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--tools', default=','.join(TOOLS))
    parser.add_argument('--json', type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work or '/var/tmp') as folder:
        inputs = make_inputs(args.inputs or pathlib.Path(folder, 'inputs'))
        result = measure(inputs, folder, args.rounds, args.tools.split(','))
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
