# SPDX-License-Identifier: Apache-2.0
"""What this host cannot run is not restored: one clear line, and nothing is left."""
import contextlib
import json
import os
import socket
import subprocess

import pytest
from agents import Cluster
from lab import BareGuest
from lab.guests import built
from snapshots import REPO, disks, export_file, make_agent, start


@pytest.fixture(scope='module')
def agent():
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        yield make_agent(cluster)


@pytest.fixture(scope='module')
def files(agent, tmp_path_factory):
    """The files of a snapshot of a VM with two disks, and its definition."""
    vm = BareGuest('web1', mem_mib=64, dirty_mib=4, rate_mbps=1)
    disks(agent.cluster, vm)
    start(agent, vm)
    agent.vmmig('snapshot', 'web1', 'first')
    folder = tmp_path_factory.mktemp('files')
    shown, = agent.json('snapshot', 'show', 'web1@first')['snapshots']
    for file in shown['files']:
        with export_file(agent, 'web1@first', file['name']) as path:
            subprocess.run(['cp', '--sparse=always', path, folder / file['name']], check=True)
    return folder


def store(agent, files, name, definition):
    """An image of these files, and of another definition."""
    changed = files / f'{name}.json'
    changed.write_text(json.dumps(definition))
    paths = [f'{path.name}={path}' for path in files.iterdir() if path.suffix != '.json']
    subprocess.run([built('tests/unit/snapshot/mount_tool'), 'store', 'dir:' + agent.host.path(REPO), f'web1@{name}',
                    f'vm.json={changed}', *paths], check=True, capture_output=True)


def definition_of(files):
    return json.loads((files / 'vm.json').read_text())


def refused(agent, name, status, says):
    folder = os.path.join(agent.cluster.shared, name)
    os.makedirs(folder)
    before = agent.host.processes()
    failed = agent.vmmig('restore', f'web1@{name}', '--as', 'never', '--disk-dir', folder, check=False)
    lines = [line for line in failed.stderr.splitlines() if line.startswith('vmmig:')]
    assert (failed.returncode, len(lines)) == (status, 1) and says in lines[0], failed
    assert [vm['vm'] for vm in agent.json('list')['vms']] == ['web1']
    assert os.listdir(folder) == [] and os.listdir(agent.host.path('/var/lib/vmmig/making')) == []
    new = {pid: argv for pid, argv in agent.host.processes().items() if pid not in before}
    assert [argv for argv in new.values() if 'qemu' in argv[0]] == []
    leases = subprocess.run([built('tests/unit/snapshot/mount_tool'), 'leases', 'dir:' + agent.host.path(REPO)],
                            check=True, capture_output=True, text=True).stdout
    assert leases == ''


def test_a_machine_type_that_is_not_here(agent, files):
    definition = definition_of(files)
    here, there = definition['machine'], 'pc-q35-99.1'
    definition['machine'] = there
    definition['argv'] = [word.replace(here, there) for word in definition['argv']]
    store(agent, files, 'machine', definition)
    refused(agent, 'machine', 5, f'does not have the machine type {there}')


def of_another_cpu(files):
    definition = definition_of(files)
    words = definition['cpu_features'].split(';')
    assert len(words) > 2
    key, value = words[0].split('=')
    definition['cpu_features'] = ';'.join([f'{key}={int(value, 16) ^ 0x80000000:08x}', *words[1:]])
    return definition


def test_a_cpu_that_is_not_here(agent, files):
    store(agent, files, 'cpu', of_another_cpu(files))
    refused(agent, 'cpu', 5, 'the CPU that this host offers is not the guest\'s: CPUID word')


def test_a_template_of_a_cpu_that_is_not_here(agent, files):
    store(agent, files, 'cloned', of_another_cpu(files))
    agent.vmmig('template', 'publish', 'web1@cloned', 'cpu:1')
    agent.cluster.console('never')  # to which its QEMU connects
    failed = agent.vmmig('clone', 'cpu:1', '--as', 'never', check=False)
    assert failed.returncode == 5 and 'the CPU that this host offers is not the guest\'s' in failed.stderr, failed
    assert [vm['vm'] for vm in agent.json('list')['vms']] == ['web1']
    assert not [argv for argv in agent.host.processes().values() if 'never' in argv]


def test_more_memory_than_there_is(agent, files, tmp_path):
    """What the host has available is what it says."""
    store(agent, files, 'memory', definition_of(files))
    with open('/proc/meminfo', encoding='ascii') as real:
        lines = real.readlines()
    meminfo = tmp_path / 'meminfo'
    meminfo.write_text(''.join('MemAvailable:     1024 kB\n' if line.startswith('MemAvailable') else line
                               for line in lines))
    agent.host.run(['mount', '--bind', str(meminfo), '/proc/meminfo'])
    try:
        refused(agent, 'memory', 11, 'the VM needs 64 MiB of memory, 1 MiB are available')
    finally:
        agent.host.run(['umount', '/proc/meminfo'])


def test_a_program_that_may_not_be_run(agent, files):
    definition = definition_of(files)
    definition['binary'] = 'qemu-system-other'
    store(agent, files, 'binary', definition)
    refused(agent, 'binary', 5, 'qemu-system-other is not among the binaries')


def test_a_device_that_the_definition_has_not(agent, files):
    definition = definition_of(files)
    assert len(definition['devices']) == 2
    del definition['devices'][0]
    store(agent, files, 'device', definition)
    refused(agent, 'device', 5, 'is not the same machine')


def test_a_vm_whose_socket_somebody_has(agent, files):
    """Its QEMU would take it away, and nobody could reach that one any more."""
    store(agent, files, 'twice', definition_of(files))
    path = agent.host.path('/run/vmlab/never.judge')
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # of a QEMU that was killed
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(path)
        theirs.listen()
        refused(agent, 'twice', 5, 'away from a program that listens there on this host')
        assert os.path.exists(path)
    os.unlink(path)
