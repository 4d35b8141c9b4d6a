# SPDX-License-Identifier: Apache-2.0
"""The agent is killed while it makes a clone, restores a VM or publishes a template: all of it is there, or nothing."""
import json
import os
import shutil
import signal
import subprocess

import pytest
from agents import eventually, fault_build
from lab import BareGuest
from stores import STORES, cluster_on

from .test_clone import content, kill, leases, make_agent, tool


def restart(agent):
    """As its supervisor would."""
    if agent.process.poll() is None:
        agent.kill()
    agent.start(build=fault_build())


def arm(agent, point):
    agent.vmmig('debug', 'faults', '--arm', point.replace('@', '=crash@') if '@' in point else f'{point}=crash')


def crash(agent, point, *words):
    arm(agent, point)
    failed = agent.vmmig(*words, check=False)
    assert failed.returncode == 6, failed
    agent.process.wait(20)


@pytest.fixture(scope='module', params=STORES)
def agent(request, tmp_path_factory):
    """With the snapshot web1@first, the template debian12:v1, and a clone of that, `old`, which runs through all of it."""
    with cluster_on(request.param, tmp_path_factory.mktemp('ceph')) as cluster:
        agent = make_agent(cluster, fault_build())
        restart(agent)
        disk = os.path.join(cluster.shared, 'web1.raw')
        subprocess.run(['qemu-img', 'create', '-q', '-f', 'raw', disk, '16M'], check=True)
        subprocess.run(['qemu-io', '-f', 'raw', '-c', 'write -P 0x11 1M 3M', disk], check=True, capture_output=True)
        vm = BareGuest('web1', mem_mib=64, dirty_mib=4, rate_mbps=1)
        qcow2 = os.path.join(cluster.shared, 'web1.qcow2')
        subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', qcow2, '16M'], check=True)
        vm.options = ['-blockdev', f'driver=raw,node-name=d0,file.driver=file,file.filename={disk}',
                      '-device', 'virtio-blk-pci,drive=d0',
                      '-blockdev', f'driver=qcow2,node-name=d1,file.driver=file,file.filename={qcow2}',
                      '-device', 'virtio-blk-pci,drive=d1']
        console = cluster.console('web1')
        agent.host.popen(vm.argv(), name='web1')
        console.wait_for('ready', timeout=60)
        agent.vmmig('attach', 'web1', '--qmp', vm.qmp_path)
        agent.vmmig('snapshot', 'web1', 'first')
        agent.vmmig('template', 'publish', 'web1@first', 'debian12:v1')
        vm.qmp(agent.host)('quit')
        eventually('web1 ended', lambda: agent.json('status', 'web1')['state'] == 'ended')
        agent.vmmig('detach', 'web1')
        agent.old = cluster.console('old')
        agent.vmmig('clone', 'debian12:v1', '--as', 'old')
        yield agent


@pytest.fixture(autouse=True)
def old_clone_runs_on(agent):
    mark = agent.old.mark()
    yield
    agent.old.wait_ticks(3)
    agent.old.verify()
    assert agent.old.check(mark) == ['h1']


def processes(agent, name):
    """QEMUs of the agent's host with that name on their command line."""
    return [pid for pid, argv in agent.host.processes().items()
            if 'qemu-system' in argv[0] and any(name == word or word.startswith(f'{name},') for word in argv)]


def nothing_is_left(agent, name):
    assert [vm['vm'] for vm in agent.json('list')['vms'] if vm['vm'] == name] == []
    assert processes(agent, name) == []
    folder = agent.host.path('/var/lib/vmmig/clones')
    assert not os.path.exists(os.path.join(folder, name))
    no_notes(agent)


def no_notes(agent):
    """Of leases and images in a store, which are taken back beside everything else, as soon as that answers."""
    eventually('no notes', lambda: os.listdir(agent.host.path('/var/lib/vmmig/making')) == [])


@pytest.mark.parametrize('point', ['clone.leased', 'clone.overlay', 'clone.spawn', 'clone.spawned'])
def test_a_clone_that_was_being_made(agent, point):
    console = agent.cluster.console('c1')
    crash(agent, point, 'clone', 'debian12:v1', '--as', 'c1')
    restart(agent)
    nothing_is_left(agent, 'c1')
    mark = console.mark()
    made, = agent.json('clone', 'debian12:v1', '--as', 'c1')['clones']
    console.wait_for('^hb ', after=mark)
    kill(agent, made)


@pytest.mark.parametrize('name, point, words', [
    ('c1', 'clone.spawned', ['clone', 'debian12:v1', '--as', 'c1']),
    ('back', 'restore.memory', ['restore', 'web1@first', '--as', 'back', '--disk-dir'])])
def test_qemu_dies_while_its_vm_is_made(agent, name, point, words):
    """What there was of it goes; the next one comes."""
    folder = os.path.join(agent.cluster.shared, 'dies')
    os.makedirs(folder, exist_ok=True)
    words = words + [folder] * (words[-1] == '--disk-dir')
    console = agent.cluster.console('c1' if name == 'c1' else 'web1')
    agent.vmmig('debug', 'faults', '--arm', f'{point}=hold')
    making = agent.popen(*words)
    eventually('the step', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    pid, = processes(agent, 'c1' if name == 'c1' else 'web1')
    os.kill(pid, signal.SIGKILL)
    agent.vmmig('debug', 'faults', '--arm', 'none')
    out, _ = making.communicate(timeout=60)
    said = [line for line in out.splitlines() if line.startswith('vmmig: ')]
    if name == 'c1':  # it ran already, and has ended
        assert making.returncode in (0, 13), out
        if making.returncode == 0:
            eventually('its end', lambda: agent.json('status', name)['state'] == 'ended')
            agent.vmmig('detach', name)
            subprocess.run(['rm', '-rf', agent.host.path(f'/var/lib/vmmig/clones/{name}')], check=True)
    else:
        assert making.returncode == 13 and len(said) == 1, out
    nothing_is_left(agent, name)
    assert os.listdir(folder) == []
    mark = console.mark()
    agent.vmmig(*words)
    console.wait_for('^hb ', after=mark)
    kill(agent, {'vm': name, 'pid': agent.json('status', name)['pid']})
    shutil.rmtree(folder)


@pytest.mark.parametrize('count', [0, 2])
@pytest.mark.parametrize('point', ['clone.leased', 'clone.spawned', 'clone.telling'])
def test_a_clone_is_cancelled(agent, point, count):
    """By its name: all that were asked for with it go."""
    named = ['c1-1', 'c1-2'] if count else ['c1']
    for name in named:
        agent.cluster.console(name)
    agent.vmmig('debug', 'faults', '--arm', f'{point}=hold@2' if count else f'{point}=hold')
    cloning = agent.popen('clone', 'debian12:v1', '--as', 'c1', *(['--count', str(count)] if count else []))
    eventually('the step', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    assert agent.json('cancel', named[-1]) == {'vm': named[-1], 'kind': 'clone', 'cancelling': True}
    agent.vmmig('debug', 'faults', '--arm', 'none')
    out, _ = cloning.communicate(timeout=60)
    assert cloning.returncode == 14 and len(out.splitlines()) == 1 and 'cancelled' in out, out
    for name in named:
        nothing_is_left(agent, name)
    assert agent.vmmig('cancel', named[0], check=False).returncode == 3


def test_ctrl_c_cancels_a_clone_whose_memory_does_not_come(agent):
    """Its QEMU waits for the template's memory, in the middle of loading its state."""
    console = agent.cluster.console('c1')
    agent.vmmig('template', 'publish', 'web1@first', 'slow:v1')
    agent.vmmig('debug', 'faults', '--arm', 'clone.spawn=hold')
    cloning = agent.popen('clone', 'slow:v1', '--as', 'c1')
    eventually('the step', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    fetchers = [pid for pid, argv in agent.host.processes().items() if 'vmmig-fetch' in argv[0]]
    for pid in fetchers:
        os.kill(pid, signal.SIGSTOP)
    try:
        agent.vmmig('debug', 'faults', '--arm', 'none')
        eventually('its QEMU', lambda: processes(agent, 'c1'))
        cloning.send_signal(signal.SIGINT)
        out, _ = cloning.communicate(timeout=20)
        assert cloning.returncode == 14 and 'cancelled' in out.splitlines()[-1], out
    finally:
        for pid in fetchers:
            os.kill(pid, signal.SIGCONT)
    eventually('the end of its QEMU', lambda: agent.host.reap() or processes(agent, 'c1') == [])
    nothing_is_left(agent, 'c1')
    mark = console.mark()
    made, = agent.json('clone', 'slow:v1', '--as', 'c1')['clones']
    console.wait_for('^hb ', after=mark)
    kill(agent, made)
    agent.vmmig('template', 'delete', 'slow:v1')


def test_its_template_is_deleted_while_a_clone_is_made(agent):
    """It has it, from the first of its files on."""
    agent.vmmig('template', 'publish', 'web1@first', 'short:v1')
    console = agent.cluster.console('c1')
    agent.vmmig('debug', 'faults', '--arm', 'clone.leased=hold')
    cloning = agent.popen('clone', 'short:v1', '--as', 'c1', '--json')
    eventually('the lease', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    agent.vmmig('template', 'delete', 'short:v1')
    tool(agent, 'collect', '1000')
    agent.vmmig('debug', 'faults', '--arm', 'none')
    out, _ = cloning.communicate(timeout=60)
    assert cloning.returncode == 0, out
    console.wait_ticks(3)
    console.verify()
    kill(agent, *json.loads(out)['clones'])


def test_its_template_is_deleted_before_a_clone_has_it(agent):
    agent.vmmig('template', 'publish', 'web1@first', 'gone:v1')
    agent.cluster.console('c1')
    agent.vmmig('debug', 'faults', '--arm', 'clone.found=hold')
    cloning = agent.popen('clone', 'gone:v1', '--as', 'c1')
    eventually('the step', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    agent.vmmig('template', 'delete', 'gone:v1')
    agent.vmmig('debug', 'faults', '--arm', 'none')
    out, _ = cloning.communicate(timeout=60)
    assert cloning.returncode == 3 and len(out.splitlines()) == 1 and 'gone:v1' in out, out
    nothing_is_left(agent, 'c1')


@pytest.mark.parametrize('point', ['clone.telling', 'clone.kept'])
def test_a_clone_that_was_there(agent, point):
    """From the moment it runs, also while it is told what it is."""
    console = agent.cluster.console('c1')
    crash(agent, point, 'clone', 'debian12:v1', '--as', 'c1')
    restart(agent)
    eventually('the VM', lambda: agent.json('status', 'c1')['presence'] == 'present')
    console.wait_ticks(3)
    no_notes(agent)
    kill(agent, {'vm': 'c1', 'pid': agent.json('status', 'c1')['pid']})


def test_several_clones_are_all_or_those_that_are_whole(agent):
    for i in (1, 2, 3):
        agent.cluster.console(f'many-{i}')
    agent.vmmig('debug', 'faults', '--arm', 'clone.spawn=crash@2')
    assert agent.vmmig('clone', 'debian12:v1', '--as', 'many', '--count', '3', check=False).returncode == 6
    agent.process.wait(20)
    restart(agent)
    nothing_is_left(agent, 'many-2')
    nothing_is_left(agent, 'many-3')
    eventually('the first', lambda: agent.json('status', 'many-1')['state'] == 'running')
    kill(agent, {'vm': 'many-1', 'pid': agent.json('status', 'many-1')['pid']})


def test_none_of_several_is_anybodys_before_all_are_there(agent):
    for i in (1, 2):
        agent.cluster.console(f'many-{i}')
    agent.vmmig('debug', 'faults', '--arm', 'clone.spawn=hold@2')
    cloning = agent.popen('clone', 'debian12:v1', '--as', 'many', '--count', '2')
    eventually('the step', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    for words in (['snapshot', 'many-1', 'early'], ['send', 'many-1', '--to', 'h2'], ['detach', 'many-1']):
        refused = agent.vmmig(*words, check=False)
        assert refused.returncode == 4 and 'clone is under way' in refused.stderr, refused
    agent.vmmig('debug', 'faults', '--arm', 'none')
    out, _ = cloning.communicate(timeout=60)
    assert cloning.returncode == 0, out
    kill(agent, *({'vm': name, 'pid': agent.json('status', name)['pid']} for name in ('many-1', 'many-2')))


def test_the_first_disk_gets_larger(agent):
    """The first of the command line, which is raw in web1."""
    console = agent.cluster.console('c1')
    made, = agent.json('clone', 'debian12:v1', '--as', 'c1', '--disk-size', '32M')['clones']
    console.wait_ticks(3)
    folder = '/var/lib/vmmig/clones/c1'
    found = {}
    for name in os.listdir(agent.host.path(folder)):
        data = content(agent, f'{folder}/{name}')
        found[len(data) >> 20] = data[1 << 20:4 << 20]
    assert found == {32: b'\x11' * (3 << 20), 16: bytes(3 << 20)}
    kill(agent, made)


def test_the_agent_dies_and_a_group_of_its_own_goes_with_a_clone(agent):
    group = agent.cluster.cgroup('vms')
    agent.stop()
    agent.options['vm-cgroup'] = group
    restart(agent)
    agent.cluster.console('c1')
    crash(agent, 'clone.spawned', 'clone', 'debian12:v1', '--as', 'c1')
    assert os.path.exists(f'{group}/c1')
    restart(agent)
    assert not os.path.exists(f'{group}/c1')
    nothing_is_left(agent, 'c1')
    agent.stop()
    del agent.options['vm-cgroup']
    restart(agent)


@pytest.mark.parametrize('point', ['restore.disk', 'restore.format', 'restore.format@2', 'restore.made', 'restore.filled', 'restore.memory'])
def test_a_vm_that_was_being_restored(agent, point):
    folder = os.path.join(agent.cluster.shared, 'restored')
    os.makedirs(folder, exist_ok=True)
    words = ['restore', 'web1@first', '--as', 'back', '--disk-dir', folder]
    crash(agent, point, *words)
    restart(agent)
    nothing_is_left(agent, 'back')
    assert os.listdir(folder) == []
    eventually('no lease of a restore', lambda: leases(agent) == [one for one in leases(agent) if one[:2] == 't:'])
    console = agent.cluster.console('web1')  # which it had
    mark = console.mark()
    agent.vmmig(*words)
    console.wait_for('^hb ', after=mark)
    os.kill(agent.json('status', 'back')['pid'], signal.SIGKILL)
    eventually('its end', lambda: agent.json('status', 'back')['state'] == 'ended')
    agent.vmmig('detach', 'back')
    shutil.rmtree(folder)


def test_what_makes_a_disk_ends_with_the_agent(agent, tmp_path):
    """Else it would make it after the next agent has taken back what there was."""
    slow = tmp_path / 'qemu-img'
    slow.write_text(f'#!/bin/sh\ntouch {tmp_path}/began\nsleep 3\nexec /usr/bin/qemu-img "$@"\n')
    slow.chmod(0o755)
    folder = os.path.join(agent.cluster.shared, 'slowly')
    os.makedirs(folder)
    agent.stop()
    agent.start(build=fault_build(), wrapper=['env', f'PATH={tmp_path}:{os.environ["PATH"]}'])
    restoring = agent.popen('restore', 'web1@first', '--as', 'back', '--disk-dir', folder)
    eventually('qemu-img', (tmp_path / 'began').exists)
    agent.kill()
    restart(agent)
    restoring.communicate(timeout=60)
    nothing_is_left(agent, 'back')
    eventually('its end', lambda: not [argv for argv in agent.host.processes().values() if str(slow) in argv])
    assert os.listdir(folder) == []


def test_a_restored_vm_that_was_there(agent):
    """It runs on, on its disks."""
    folder = os.path.join(agent.cluster.shared, 'kept')
    os.makedirs(folder)
    console = agent.cluster.console('web1')
    mark = console.mark()
    crash(agent, 'restore.kept', 'restore', 'web1@first', '--as', 'back', '--disk-dir', folder)
    restart(agent)
    eventually('the VM', lambda: agent.json('status', 'back')['presence'] == 'present')
    console.wait_for('^hb ', after=mark)
    eventually('no lease of a restore', lambda: leases(agent) == [one for one in leases(agent) if one[:2] == 't:'])
    no_notes(agent)
    assert sorted(os.listdir(folder)) == ['back-disk0.qcow2', 'back-disk1.raw']
    agent.end('back')
    shutil.rmtree(folder)


def test_an_agent_ends_whose_repository_does_not_answer(agent):
    """Leases of a restore that was cut short are left to the next one."""
    folder = os.path.join(agent.cluster.shared, 'away')
    os.makedirs(folder)
    notes = agent.host.path('/var/lib/vmmig/making')
    crash(agent, 'restore.made', 'restore', 'web1@first', '--as', 'back', '--disk-dir', folder)
    agent.start(faults='repo.leases=hold')
    eventually('it asks', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    assert agent.stop() == 0
    assert os.listdir(notes) != []
    restart(agent)
    eventually('no lease of a restore', lambda: leases(agent) == [one for one in leases(agent) if one[:2] == 't:'])
    eventually('no notes', lambda: os.listdir(notes) == [])
    shutil.rmtree(folder)


@pytest.mark.parametrize('agent', ['dir'], indirect=True)
def test_what_a_restore_left_is_decided_upon_once(agent):
    """The VM that came of it is its user's, however long its lease stays since the repository is away."""
    folder = os.path.join(agent.cluster.shared, 'theirs')
    os.makedirs(folder)
    agent.cluster.console('web1')
    crash(agent, 'restore.kept', 'restore', 'web1@first', '--as', 'back', '--disk-dir', folder)
    repo = agent.host.path('/var/lib/vmmig/repo')
    os.rename(repo, f'{repo}.away')
    try:
        restart(agent)
        eventually('the VM', lambda: agent.json('status', 'back')['presence'] == 'present')
        agent.end('back')
        for _ in range(2):
            restart(agent)
            assert sorted(os.listdir(folder)) == ['back-disk0.qcow2', 'back-disk1.raw']
    finally:
        os.rename(f'{repo}.away', repo)
    assert len(os.listdir(agent.host.path('/var/lib/vmmig/making'))) == 1
    restart(agent)
    eventually('no lease of a restore', lambda: leases(agent) == [one for one in leases(agent) if one[:2] == 't:'])
    no_notes(agent)
    shutil.rmtree(folder)


def test_a_lease_that_a_failed_restore_cannot_drop_is_dropped_later(agent):
    folder = os.path.join(agent.cluster.shared, 'fails')
    os.makedirs(folder)
    agent.vmmig('debug', 'faults', '--arm', 'restore.made=hold,restore.lease=error')
    restoring = agent.popen('restore', 'web1@first', '--as', 'back', '--disk-dir', folder)
    eventually('the step', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    agent.vmmig('cancel', 'back')
    agent.vmmig('debug', 'faults', '--arm', 'restore.lease=error')
    out, _ = restoring.communicate(timeout=60)
    assert restoring.returncode == 14, out
    assert 'a lease stays' in agent.log() and os.listdir(folder) == []
    eventually('no lease of a restore', lambda: leases(agent) == [one for one in leases(agent) if one[:2] == 't:'])
    no_notes(agent)
    agent.vmmig('debug', 'faults', '--arm', 'none')
    nothing_is_left(agent, 'back')


@pytest.mark.parametrize('renamed', [True, False])
def test_what_somebody_else_put_there_is_not_removed(agent, renamed):
    """Where a disk that was being restored lay there is another file when the agent comes back: also one that got the
    number of the former."""
    folder = os.path.join(agent.cluster.shared, f'precious-{renamed}')
    os.makedirs(folder)
    crash(agent, 'restore.made', 'restore', 'web1@first', '--as', 'back', '--disk-dir', folder)
    path = os.path.join(folder, 'back-disk1.raw')
    former = os.stat(path).st_ino
    other = f'{path}.new' if renamed else path
    if not renamed:
        os.unlink(path)
    for _ in range(1 if renamed else 50):
        with open(other, 'w', encoding='ascii') as file:
            file.write('precious')
        if renamed or os.stat(other).st_ino == former:
            break
        os.rename(other, f'{other}.{os.stat(other).st_ino}')
    if not os.path.exists(other):  # this file system gives no number again
        os.rename(f'{path}.{max(os.stat(entry.path).st_ino for entry in os.scandir(folder))}', path)
    os.replace(other, path)
    restart(agent)
    nothing_is_left(agent, 'back')
    with open(path, encoding='ascii') as file:
        assert file.read() == 'precious'


def test_a_disk_that_becomes_a_link_is_not_written_through(agent):
    folder = os.path.join(agent.cluster.shared, 'linked')
    os.makedirs(folder)
    target = os.path.join(folder, 'target')
    with open(target, 'w', encoding='ascii') as file:
        file.write('precious')
    agent.vmmig('debug', 'faults', '--arm', 'restore.made=hold')
    restoring = agent.popen('restore', 'web1@first', '--as', 'back', '--disk-dir', folder)
    eventually('the step', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    os.unlink(f'{folder}/back-disk1.raw')
    os.symlink(target, f'{folder}/back-disk1.raw')
    agent.vmmig('debug', 'faults', '--arm', 'none')
    out, _ = restoring.communicate(timeout=60)
    assert restoring.returncode not in (0, 6) and 'back-disk1.raw' in out.splitlines()[-1], out
    with open(target, encoding='ascii') as file:
        assert file.read() == 'precious'
    nothing_is_left(agent, 'back')


@pytest.mark.parametrize('point, there', [
    ('repo.commit=crash@1', False), ('repo.committed=crash@1', False),  # of the version
    ('repo.commit=crash@2', False), ('repo.committed=crash@2', True),  # of its tag
    ('template.tagged=crash', True)])
def test_a_template_that_was_being_published(agent, point, there):
    agent.vmmig('debug', 'faults', '--arm', point)
    assert agent.vmmig('template', 'publish', 'web1@first', 'other:v1', check=False).returncode == 6
    agent.process.wait(20)
    restart(agent)
    tags = [t['template'] for t in agent.json('template', 'list')['templates']]
    assert ('other:v1' in tags) == there
    agent.vmmig('template', 'publish', 'web1@first', 'other:v1')
    console = agent.cluster.console('c1')
    made, = agent.json('clone', 'other:v1', '--as', 'c1')['clones']
    console.wait_ticks(3)
    kill(agent, made)
    agent.vmmig('template', 'delete', 'other:v1')
    tool(agent, 'collect', '1000')
