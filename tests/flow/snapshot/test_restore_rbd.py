# SPDX-License-Identifier: Apache-2.0
"""VMs are restored with their disks in Ceph, from there to elsewhere in Ceph, and from there to files."""
import json
import os
import signal
import subprocess

import pytest
from agents import Cluster, eventually, fault_build
from lab import BareGuest
from snapshots import disks, export_file, image_file, make_agent, start

from repo.conftest import ceph_with

MIB = 1 << 20


@pytest.fixture(scope='module')
def cluster():
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        yield cluster


@pytest.fixture(scope='module')
def ceph(cluster, tmp_path_factory):
    """In the host's network."""
    with ceph_with('vms', tmp_path_factory.mktemp('ceph'), osds=2, network_of=cluster.hosts[0].pid) as ceph:
        yield ceph


@pytest.fixture(scope='module')
def agent(cluster, ceph):
    return make_agent(cluster, faults='restore.made=delay:0')


@pytest.fixture(scope='module')
def web1(agent):
    """A snapshot of a VM that is gone since, with a raw disk and a qcow2 one in files; its guest and their paths."""
    vm = BareGuest('web1', mem_mib=64, dirty_mib=4, rate_mbps=1)
    paths = disks(agent.cluster, vm)
    start(agent, vm)
    agent.vmmig('snapshot', 'web1', 'first')
    agent.end('web1')
    return vm, paths


@pytest.fixture(autouse=True)
def nothing_runs_after_it(agent):
    yield
    for vm in agent.json('list')['vms']:
        agent.end(vm['vm'])


def rbd(agent, ceph, *words):
    return agent.host.run(['rbd', '--conf', ceph.conf, *words])


def images(agent, ceph, *words):
    return sorted(json.loads(rbd(agent, ceph, 'ls', '--format=json', 'vms', *words)))


def same(agent, snapshot, file, name, form):
    """Is that disk, a path or a name that QEMU knows, what the snapshot has?"""
    with export_file(agent, snapshot, file) as stored:
        said = agent.host.run(['qemu-img', 'compare', '-U', '-f', 'raw', '-F', form, stored, name])
    return 'identical' in said


def restored(agent, vm, image, name, *words):
    """It runs on, and its memory is whole."""
    console = agent.cluster.console(vm.name)
    mark = console.mark()
    done = agent.json('restore', image, '--as', name, *words)
    assert done['state'] == 'done', done
    console.wait_for('^hb ', after=mark)
    console.verify()


def test_to_ceph_and_from_there(agent, ceph, web1):
    vm, (plain, qcow2) = web1
    pool = f'rbd:vms:conf={ceph.conf}'
    restored(agent, vm, 'web1@first', 'inceph', '--disk-dir', pool)
    numbers = [image_file(agent, 'web1@first', path)[len('disk'):-len('.raw')] for path in (plain, qcow2)]
    assert images(agent, ceph) == sorted([f'inceph-disk{numbers[0]}', f'inceph-disk{numbers[1]}.qcow2'])
    # What the VM writes goes there, too, and its snapshot has it.
    vm.qmp(agent.host, of='inceph').hmp('qemu-io d1 "write -P 0x78 8M 1M"')
    agent.vmmig('snapshot', 'inceph', 'second')
    files = {disk['image_file']: disk for disk in definition(agent, 'inceph@second')['disks']}
    assert {disk['driver'] for disk in files.values()} == {'rbd'}
    vm.qmp(agent.host, of='inceph')('quit')  # which closes its disks; Ceph counts a dead user for half a minute
    eventually('its end', lambda: agent.json('status', 'inceph')['presence'] == 'ended')
    agent.vmmig('detach', 'inceph')
    raw, other = (f'disk{number}.raw' for number in numbers)
    assert same(agent, 'inceph@second', raw, f'rbd:vms/inceph-disk{numbers[0]}:conf={ceph.conf}', 'raw')
    assert same(agent, 'inceph@second', other, f'rbd:vms/inceph-disk{numbers[1]}.qcow2:conf={ceph.conf}', 'qcow2')

    # To where they were: not while something is there.
    refused = agent.vmmig('restore', 'inceph@second', check=False)
    assert refused.returncode == 4 and 'rbd:vms/inceph-disk' in refused.stderr, refused
    # To another place in Ceph, and to files.
    rbd(agent, ceph, 'namespace', 'create', 'vms/other')
    restored(agent, vm, 'inceph@second', 'elsewhere', '--disk-dir', f'rbd:vms/other:conf={ceph.conf}')
    agent.end('elsewhere')
    assert images(agent, ceph, '--namespace', 'other') == sorted(
        [f'elsewhere-disk{numbers[0]}', f'elsewhere-disk{numbers[1]}.qcow2'])
    folder = os.path.join(agent.cluster.shared, 'files')
    os.mkdir(folder)
    restored(agent, vm, 'inceph@second', 'files', '--disk-dir', folder)
    agent.end('files')
    assert same(agent, 'inceph@second', raw, f'{folder}/files-disk{numbers[0]}.raw', 'raw')
    with export_file(agent, 'inceph@second', other) as path, open(path, 'rb') as file:
        assert file.read()[8 * MIB:9 * MIB] == b'\x78' * MIB
    assert same(agent, 'inceph@second', other, f'{folder}/files-disk{numbers[1]}.qcow2', 'qcow2')
    # And where they were, now that there is room.
    for image in images(agent, ceph):
        eventually('nobody who uses the image', lambda i=image: subprocess.run(
            ['nsenter', '-t', str(agent.host.pid), '-n', 'rbd', '--conf', ceph.conf, 'rm', '--no-progress', f'vms/{i}'],
            capture_output=True, check=False).returncode == 0, 60)
    restored(agent, vm, 'inceph@second', 'inceph')
    assert len(images(agent, ceph)) == 2
    agent.end('inceph')


def definition(agent, image):
    with export_file(agent, image, 'vm.json') as path, open(path, encoding='utf-8') as file:
        return json.load(file)


@pytest.mark.parametrize('pool, says', [
    ('rbd:nothere', 'nothere'),
    ('rbd:/', 'neither a path nor'),
    ('rbd:vms:conf=/nonexistent', 'nonexistent'),
])
def test_a_pool_that_is_not_there(agent, ceph, web1, pool, says):
    before = images(agent, ceph)
    words = pool if 'conf=' in pool or pool == 'rbd:/' else f'{pool}:conf={ceph.conf}'
    failed = agent.vmmig('restore', 'web1@first', '--as', 'never', '--disk-dir', words, check=False)
    last = failed.stderr.strip().splitlines()[-1]
    assert failed.returncode not in (0, 12) and last.startswith('vmmig: ') and says in last, failed
    assert agent.json('list')['vms'] == [] and images(agent, ceph) == before


# Ceph counts the dead VMM that had the images open as a user for half a minute.
@pytest.mark.parametrize('point, there', [
    ('restore.drafted', 1), ('restore.disk=crash@2', 1), ('restore.drafted=crash@2', 2), ('restore.made', 2),
    pytest.param('restore.filled', 2, marks=pytest.mark.full)])
def test_the_agent_dies(agent, ceph, web1, point, there):
    """Its images are removed when the next agent is there: also one that no note could name yet."""
    before = images(agent, ceph)
    agent.vmmig('debug', 'faults', '--arm', point if '=' in point else f'{point}=crash')
    words = ['restore', 'web1@first', '--as', 'dies', '--disk-dir', f'rbd:vms:conf={ceph.conf}']
    assert agent.vmmig(*words, check=False).returncode == 6
    agent.process.wait(20)
    assert len(images(agent, ceph)) == len(before) + there
    agent.start(build=fault_build())
    eventually('no image of it', lambda: images(agent, ceph) == before, 60)
    eventually('no notes', lambda: os.listdir(agent.host.path('/var/lib/vmmig/making')) == [])
    assert agent.json('list')['vms'] == []


@pytest.mark.parametrize('point', [pytest.param('restore.disk', marks=pytest.mark.full), 'restore.made'])
def test_a_restore_is_cancelled_while_ceph_is_away(agent, ceph, web1, point):
    """While images are made, or written: it ends, and what there was of them goes when Ceph is back."""
    before = images(agent, ceph)
    agent.vmmig('debug', 'faults', '--arm', f'{point}=hold')
    restoring = agent.popen('restore', 'web1@first', '--as', 'away', '--disk-dir', f'rbd:vms:conf={ceph.conf}')
    eventually('the step', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    daemons = [ceph.daemons[f'osd.{number}'] for number in range(2)]
    for daemon in daemons:
        daemon.send_signal(signal.SIGSTOP)
    try:
        agent.vmmig('debug', 'faults', '--arm', 'none')
        program = 'qemu-nbd' if point == 'restore.made' else 'qemu-img'
        eventually('what waits for Ceph', lambda: [argv for argv in agent.host.processes().values() if argv[0] == program])
        agent.vmmig('cancel', 'away')
        out, _ = restoring.communicate(timeout=40)
        assert restoring.returncode == 14, out
        assert agent.json('list')['vms'] == []
    finally:
        for daemon in daemons:
            daemon.send_signal(signal.SIGCONT)
    ceph.wait_osds(2)
    ceph.wait_clean()
    # A first attempt to remove them may have failed since; there is one each minute.
    eventually('no image of it', lambda: images(agent, ceph) == before, 180)
    eventually('no notes', lambda: os.listdir(agent.host.path('/var/lib/vmmig/making')) == [])


def test_somebody_elses_image_of_that_name_stays(agent, ceph, web1):
    """It was made while ours was: the restore fails, and so does nothing else."""
    before = images(agent, ceph)
    agent.vmmig('debug', 'faults', '--arm', 'restore.drafted=hold')
    restoring = agent.popen('restore', 'web1@first', '--as', 'late', '--disk-dir', f'rbd:vms:conf={ceph.conf}')
    eventually('the step', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    rbd(agent, ceph, 'create', '--size', '1M', 'vms/late-disk0')
    rbd(agent, ceph, 'create', '--size', '1M', 'vms/late-disk0.qcow2')
    agent.vmmig('debug', 'faults', '--arm', 'none')
    out, _ = restoring.communicate(timeout=60)
    assert restoring.returncode == 1 and 'late-disk0' in out.splitlines()[-1], out
    eventually('no image of ours', lambda: images(agent, ceph) == sorted([*before, 'late-disk0', 'late-disk0.qcow2']))
    for image in ('late-disk0', 'late-disk0.qcow2'):
        rbd(agent, ceph, 'rm', '--no-progress', f'vms/{image}')
