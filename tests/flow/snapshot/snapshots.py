# SPDX-License-Identifier: Apache-2.0
"""An agent with a repository, and what a test looks at after a snapshot."""
import contextlib
import json
import os
import socket
import subprocess
import threading

from agents import UNPRIVILEGED, fault_build
from lab import BareGuest
from lab.guests import built
from lab.hosts import inside

REPO = '/var/lib/vmmig/repo'
THAW = 'guest-fsfreeze-thaw'


def make_agent(cluster, faults=None):
    """The first host's agent, started, with an empty repository."""
    agent = cluster.agents[0]
    folder = fault_build() if faults else os.path.dirname(os.path.dirname(built('agent/vmmigd')))
    agent.options['nbdkit-plugin'] = os.path.join(folder, 'snapshot/nbdkit-vmmig-plugin.so')
    agent.options['libexec-dir'] = os.path.join(folder, 'snapshot')
    agent.options['cache-dir'] = '/var/lib/vmmig/cache'
    tool(agent, 'init')
    return agent.start(faults=faults)


def tool(agent, *words):
    """Upon its repository; where that is in Ceph, on its host."""
    url = agent.options.get('repository')
    command = [built('tests/unit/repo/repo_tool'), url or 'dir:' + agent.host.path(REPO), *words]
    return subprocess.run(inside(agent.host.pid, command) if url else command, check=True, capture_output=True,
                          text=True)


@contextlib.contextmanager
def export_file(agent, image, name):
    """A file of an image, as a file of this machine while it is needed."""
    path = os.path.join(agent.cluster.folder, 'exported')
    tool(agent, 'export', image, path, name)
    try:
        yield path
    finally:
        os.unlink(path)


def export(agent, image, name):
    """The content of a file of an image."""
    with export_file(agent, image, name) as path, open(path, 'rb') as file:
        return file.read()


def image_file(agent, image, path):
    """The file of the image that holds the disk which the VM had at that path."""
    files = {disk['file']: disk['image_file'] for disk in json.loads(export(agent, image, 'vm.json'))['disks']}
    return files[path]


def disks(cluster, vm):
    """Gives the guest a raw disk and a qcow2 one with an iothread; their paths."""
    plain, qcow2 = (os.path.join(cluster.shared, f'{vm.name}.{form}') for form in ('raw', 'qcow2'))
    for path, form in ((plain, 'raw'), (qcow2, 'qcow2')):
        subprocess.run(['qemu-img', 'create', '-q', '-f', form, path, '64M'], check=True)
        subprocess.run(['qemu-io', '-f', form, '-c', 'write -P 0x11 1M 3M', path], check=True, capture_output=True)
        os.chmod(path, 0o666)
    vm.options = [
        '-blockdev', f'driver=raw,node-name=d0,file.driver=file,file.filename={plain}',
        '-device', 'virtio-blk-pci,drive=d0', '-object', 'iothread,id=io0',
        '-drive', f'file={qcow2},format=qcow2,if=none,id=d1', '-device', 'virtio-blk-pci,drive=d1,iothread=io0']
    return plain, qcow2


def start(agent, vm, unprivileged=False):
    """Starts and attaches it; unprivileged: its QEMU may not use userfaultfd."""
    console = agent.cluster.console(vm.name)
    lame = UNPRIVILEGED if unprivileged else []
    agent.host.popen([*lame, *vm.argv()], name=vm.name)
    console.wait_for('ready', timeout=60)
    agent.vmmig('attach', vm.name, '--qmp', vm.qmp_path)
    return console


def left_in_qemu(monitor):
    """Names of what a snapshot put into QEMU and did not take out. Bitmaps are to stay: one per disk."""
    nodes = monitor('query-named-block-nodes', flat=True)
    found = [node['node-name'] for node in nodes if node['node-name'].startswith('vmmig-')]
    found += [job['id'] for job in monitor('query-jobs')]
    found += [o['name'] for o in monitor('qom-list', path='/objects') if o['name'].startswith('vmmig-')]
    for node in nodes:
        bitmaps = [b['name'] for b in node.get('dirty-bitmaps', [])]
        found += bitmaps if len(bitmaps) > 1 else []
    return found


def untouched(vm, agent):
    """Nothing of a snapshot is left, in QEMU or on the host."""
    assert left_in_qemu(vm.qmp(agent.host)) == []
    assert [argv for argv in agent.host.processes().values() if 'nbdkit' in str(argv)] == []
    sockets = agent.host.path('/run/vmmig/nbd')
    assert not os.path.exists(sockets) or os.listdir(sockets) == []
    assert [name for name in os.listdir(agent.host.path('/run/vmmig')) if name.endswith(('.snapshot', '.frozen'))] == []
    assert os.listdir(agent.host.path('/var/lib/vmmig/scratch')) == []


class GuestAgent(threading.Thread):
    """What a guest's agent says, at a socket of its own; `frozen` is how its file systems are, `interfaces` their MACs,
    and what is in `refuses` it does not do."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.frozen, self.said = False, []
        self.interfaces, self.refuses = {'lo': '00:00:00:00:00:00'}, set()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.start()

    def run(self):
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with connection, connection.makefile('rb') as lines, contextlib.suppress(OSError):
            for line in lines:
                if line[:1] == b'\xff':
                    connection.sendall(b'{"error": {"class": "GenericError", "desc": "JSON parse error, stray \'?\'"}}\n')
                connection.sendall(self.answer(json.loads(line.strip(b'\xff'))))

    def answer(self, asked):
        name = asked['execute']
        self.said.append(name)
        if name == 'guest-sync-delimited':
            return b'\xff' + json.dumps({'return': asked['arguments']['id']}).encode() + b'\n'
        if name in self.refuses:
            return b'{"error": {"class": "CommandNotFound", "desc": "not allowed"}}\n'
        if name == 'guest-exec' and asked['arguments']['path'] == 'ip':
            words = asked['arguments']['arg']
            self.interfaces[words[words.index('dev') + 1]] = words[words.index('address') + 1]
        elif 'fsfreeze' in name:
            self.frozen = name == 'guest-fsfreeze-freeze'
        said = {'guest-exec': {'pid': 7}, 'guest-exec-status': {'exited': True, 'exitcode': 0},
                'guest-network-get-interfaces': [{'name': key, 'hardware-address': mac}
                                                 for key, mac in self.interfaces.items()]}
        return json.dumps({'return': said.get(name, 2)}).encode() + b'\n'


class FrozenGuest:
    """A VM, and the agent within it. port: its command line names that one's socket."""

    def __init__(self, agent, name, port=True):
        self.agent, self.path = agent, os.path.join(agent.cluster.shared, f'{name}.qga')
        self.inside = GuestAgent(self.path)
        self.vm = BareGuest(name, mem_mib=64, dirty_mib=4, rate_mbps=1)
        if port:
            self.vm.options = ['-chardev', f'socket,id=qga,path={self.path}', '-device', 'virtio-serial',
                               '-device', 'virtserialport,chardev=qga,name=org.qemu.guest_agent.0']
        self.console = start(agent, self.vm)

    def thaws(self):
        return self.inside.said.count(THAW)


def thawing(agent):
    """Pids of those on the agent's host that try to thaw a guest, or stand beside a snapshot."""
    return [pid for pid, argv in agent.host.processes().items() if 'vmmig-guard' in argv[0]]


def notes(agent):
    """Of guests whose file systems are frozen."""
    return [name for name in os.listdir(agent.host.path('/run/vmmig')) if name.endswith('.frozen')]
