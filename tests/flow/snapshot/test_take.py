# SPDX-License-Identifier: Apache-2.0
"""Snapshots of running QEMU guests, as their user sees them."""
import importlib.util
import json
import os
import socket
import statistics
import struct
import subprocess

import pytest
from agents import Cluster, eventually
from lab import BareGuest, judge
from lab.guests import ROOT
from snapshots import GuestAgent, disks, export, export_file, image_file, left_in_qemu, make_agent, start, tool, untouched

MIB = 1 << 20


@pytest.fixture(scope='module')
def agent():
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        yield make_agent(cluster)


@pytest.fixture(scope='module')
def web1(agent):
    """A guest with a plain disk, and a qcow2 one with an iothread, that was snapshotted once."""
    vm = BareGuest('web1', mem_mib=256, dirty_mib=4, rate_mbps=1)
    plain, qcow2 = disks(agent.cluster, vm)
    console = start(agent, vm)
    monitor = vm.qmp(agent.host)
    judge.set_migration(monitor)
    monitor.close()
    first = agent.json('snapshot', 'web1', 'first')
    return vm, console, plain, qcow2, first


def test_all_of_it_is_one_image(agent, web1):
    vm, console, plain, qcow2, first = web1
    assert first['state'] == 'done' and first['kind'] == 'snapshot'
    shown, = agent.json('snapshot', 'show', 'web1@first')['snapshots']
    sizes = {file['name']: file['size_bytes'] for file in shown['files']}
    assert sizes['memory.raw'] == 256 * MIB and shown['memory']
    assert sizes['disk0.raw'] == sizes['disk1.raw'] == 64 * MIB
    assert set(sizes) == {'memory.raw', 'disk0.raw', 'disk1.raw', 'device.state', 'vm.json'}
    definition = json.loads(export(agent, 'web1@first', 'vm.json'))
    assert definition['ram'][0]['image_file'] == 'memory.raw'
    for disk in definition['disks']:
        form = 'raw' if disk['file'] == plain else 'qcow2'
        with export_file(agent, 'web1@first', disk['image_file']) as stored:
            same = subprocess.run(['qemu-img', 'compare', '-U', '-f', form, '-F', 'raw', disk['file'], stored],
                                  capture_output=True, text=True, check=False)
        assert 'identical' in same.stdout, same
    console.wait_ticks(5)
    console.verify()
    untouched(vm, agent)


def test_settings_of_the_user_stay(agent, web1):
    assert judge.migration_is_set(web1[0].qmp(agent.host))


def test_an_idle_disk_is_not_read_again_and_little_is_stored(agent, web1):
    vm, console, _, _, first = web1
    again = agent.json('snapshot', 'web1', 'second')['snapshot']
    assert again['parent'] == 'web1@first'
    assert again['disk_read_bytes'] == 0
    console.wait_ticks(5)
    untouched(vm, agent)
    assert again['stored_bytes'] < first['snapshot']['stored_bytes']


def test_of_an_idle_guest_less_than_a_hundredth_is_stored(agent):
    vm = BareGuest('idle', mem_mib=64, dirty_mib=32, rate_mbps=0, scan_mbps=0, fill='random')
    disks(agent.cluster, vm)
    start(agent, vm)
    first, again = (agent.json('snapshot', 'idle', name)['snapshot'] for name in ('first', 'again'))
    assert again['parent'] == 'idle@first' and again['disk_read_bytes'] == 0
    assert 100 * again['stored_bytes'] < first['stored_bytes'], (first, again)
    vm.qmp(agent.host)('quit')


def test_what_was_written_is_read_and_nothing_else(agent, web1):
    vm, _, _, qcow2, _ = web1
    monitor = vm.qmp(agent.host)
    before = agent.json('snapshot', 'web1', 'w1')['snapshot']
    assert before['disk_read_bytes'] == 0
    monitor.hmp('qemu-io d1 "write -P 0x33 4M 256k"')
    after = agent.json('snapshot', 'web1', 'w2')['snapshot']
    assert after['disk_read_bytes'] == 256 << 10
    name = image_file(agent, 'web1@w2', qcow2)
    new, old = export(agent, 'web1@w2', name), export(agent, 'web1@w1', name)
    assert new[4 * MIB:4 * MIB + (256 << 10)] == b'\x33' * (256 << 10)
    assert new[:4 * MIB] == old[:4 * MIB] and new[4 * MIB + (256 << 10):] == old[4 * MIB + (256 << 10):]


def test_a_failed_one_loses_no_note_of_what_was_written(agent, web1):
    vm, _, _, qcow2, _ = web1
    vm.qmp(agent.host).hmp('qemu-io d1 "write -P 0x44 8M 64k"')
    failed = agent.vmmig('snapshot', 'web1', 'w2', check=False)  # the name is taken
    assert failed.returncode == 4 and 'w2' in failed.stderr
    untouched(vm, agent)
    good = agent.json('snapshot', 'web1', 'w3')['snapshot']
    assert good['disk_read_bytes'] == 64 << 10
    assert export(agent, 'web1@w3', image_file(agent, 'web1@w3', qcow2))[8 * MIB:8 * MIB + 65536] == b'\x44' * 65536


def listener(path):
    """The process that listens there."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        return struct.unpack('iii', connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def test_a_vm_is_restored_beside_the_running_one(agent):
    """It gets sockets of its own, so that nobody loses the running one's; either goes on without the other."""
    vm = BareGuest('twin', mem_mib=64, dirty_mib=4, rate_mbps=1)
    vm.options = ['-chardev', 'socket,id=own,path=/run/vmlab/own,server=on,wait=off', '-serial', 'file:/run/vmlab/twin.out']
    console = start(agent, vm)
    agent.vmmig('snapshot', 'twin', 'first')
    agent.vmmig('restore', 'twin@first', '--as', 'twin-2')
    states = {one['vm']: one['state'] for one in agent.json('list')['vms']}
    assert states['twin'] == states['twin-2'] == 'running'
    for judged in ('twin', 'twin-2'):  # each answers at its own
        assert listener(agent.host.path(f'/run/vmlab/{judged}.judge')) == agent.json('status', judged)['pid']
        agent.vmmig('snapshot', judged, 'beside')
    for path in ('own', 'twin-2-own', 'twin.out', 'twin-2.out'):
        assert os.path.exists(agent.host.path(f'/run/vmlab/{path}')), path
    agent.end('twin')
    console.wait_ticks(3)  # the other one's: it connects to the same place
    assert agent.json('status', 'twin-2')['state'] == 'running'
    agent.end('twin-2')


def test_disks_alone(agent, web1):
    vm, console, _, _, _ = web1
    done = agent.json('snapshot', 'web1', 'disks', '--disk-only')['snapshot']
    assert done['memory_bytes'] == 0 and done['disk_bytes'] == 128 * MIB
    shown, = agent.json('snapshot', 'show', 'web1@disks')['snapshots']
    assert not shown['memory']
    console.wait_ticks(3)
    untouched(vm, agent)


def test_deletion_of_any_and_retention(agent, web1):
    names = [s['name'] for s in agent.json('snapshot', 'list', 'web1')['snapshots']]
    assert names[:2] == ['first', 'second']
    agent.vmmig('snapshot', 'delete', 'web1@second')
    kept = [name for name in names if name != 'second'][-2:]
    told = agent.json('snapshot', 'prune', 'web1', '--keep-last', '2', '--dry-run')['snapshots']
    assert [s['name'] for s in agent.json('snapshot', 'list', 'web1')['snapshots']] != kept
    gone = agent.json('snapshot', 'prune', 'web1', '--keep-last', '2')['snapshots']
    assert told == gone
    assert [s['name'] for s in agent.json('snapshot', 'list', 'web1')['snapshots']] == kept
    after = agent.json('snapshot', 'web1', 'after')['snapshot']
    assert after['parent'] == f'web1@{kept[-1]}' and after['disk_read_bytes'] == 0


def test_any_member_of_a_chain_can_go(agent):
    """Each of the others is what it was, and the next one is what the disk is."""
    vm = BareGuest('chain', mem_mib=64, dirty_mib=4, rate_mbps=1)
    _, qcow2 = disks(agent.cluster, vm)
    start(agent, vm)
    monitor = vm.qmp(agent.host)

    def take(number):
        monitor.hmp(f'qemu-io d1 "write -P {0x60 + number} {number}M 1M"')
        return agent.json('snapshot', 'chain', f's{number}')

    def contents(number):
        image = f'chain@s{number}'
        return [export(agent, image, name) for name in ('memory.raw', image_file(agent, image, qcow2))]
    for number in range(4):
        take(number)
    former = {number: contents(number) for number in range(4)}
    for gone in (1, 0, 3):  # one amid the others, the first, and the last, of which QEMU has its note of what was written
        agent.vmmig('snapshot', 'delete', f'chain@s{gone}')
        tool(agent, 'collect', '1000')
        del former[gone]
        assert [s['name'] for s in agent.json('snapshot', 'list', 'chain')['snapshots']] == [f's{n}' for n in former]
        assert {number: contents(number) for number in former} == former
    again = take(4)
    assert again['snapshot']['parent'] == 'chain@s2' and 'read whole' in again['note'], again
    disk = contents(4)[1]
    assert [disk[n << 20:(n + 1) << 20] for n in range(5)] == [bytes([0x60 + n]) * MIB for n in range(5)]
    assert take(5)['snapshot']['disk_read_bytes'] == MIB
    kept = agent.json('snapshot', 'prune', 'chain', '--keep-daily', '1', '--keep-weekly', '1')['snapshots']
    assert [s['name'] for s in kept] == ['s2', 's4']  # those that went: of a day and a week the newest stays
    assert [s['name'] for s in agent.json('snapshot', 'list', 'chain')['snapshots']] == ['s5']
    monitor('quit')


@pytest.mark.parametrize('words, status, says', [
    (['snapshot', 'web1', 'a/b'], 2, 'cannot be a snapshot'),
    (['snapshot', 'web1', '-a'], 2, ''),
    (['snapshot', 'nobody', 'x'], 3, 'nobody'),
    (['snapshot', 'web1', 'x', '--guest-agent', '/dev/null'], 6, 'agent'),
    (['snapshot', 'show', 'web1@nope'], 3, 'web1@nope'),
    (['snapshot', 'show', 'nope'], 2, 'VM@NAME'),
    (['snapshot', 'delete', 'web1@nope'], 3, 'web1@nope'),
    (['snapshot', 'prune', 'web1'], 2, '--keep-last'),
    (['restore', 'web1@after'], 4, 'web1'),
    (['restore', 'web1@nope', '--as', 'x'], 3, 'web1@nope'),
    (['restore', 'web1', '--as', 'x'], 2, 'VM@NAME'),
    (['restore', 'web1@after', '--as', 'a/b'], 2, 'a/b'),
])
def test_bad_input_is_one_clear_line(agent, web1, words, status, says):
    said = agent.vmmig(*words, check=False)
    lines = [line for line in said.stderr.splitlines() if line.startswith('vmmig:')]
    assert (said.returncode, len(lines)) == (status, 1), said
    assert says in lines[0]
    untouched(web1[0], agent)


@pytest.mark.parametrize('options, says', [
    (['-blockdev', 'driver=raw,node-name=spare,file.driver=file,file.filename={disk}'], ['{disk}', 'no disk of the guest']),
    (['-device', 'qemu-xhci', '-device', 'usb-host,vendorid=0x1234,productid=0x5678'], ['usb-host', 'passed through']),
])
def test_what_cannot_be_snapshotted_is_said(agent, options, says):
    disk = os.path.join(agent.cluster.shared, 'spare.raw')
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'raw', disk, '1M'], check=True)
    vm = BareGuest('odd' + says[0][:1].strip('{'), mem_mib=64, dirty_mib=4, rate_mbps=1)
    vm.options = [word.format(disk=disk) for word in options]
    console = start(agent, vm)
    said = agent.vmmig('snapshot', vm.name, 'never', check=False)
    assert said.returncode == 5 and said.stderr.count('vmmig: ') == 1, said
    assert all(word.format(disk=disk) in said.stderr for word in says), said
    console.wait_ticks(3)
    untouched(vm, agent)
    monitor = vm.qmp(agent.host)
    monitor('quit')


def test_a_paused_guest_is_not_set_going(agent, web1):
    vm, console, _, _, _ = web1
    monitor = vm.qmp(agent.host)
    monitor('stop')
    agent.vmmig('snapshot', 'web1', 'paused-disks', '--disk-only')
    assert monitor('query-status')['status'] == 'paused'
    mark = console.mark()
    agent.vmmig('snapshot', 'web1', 'paused')
    assert monitor('query-status')['status'] == 'postmigrate' and console.mark() == mark
    assert left_in_qemu(monitor) == []
    memory = export(agent, 'web1@paused', 'memory.raw')
    again = agent.vmmig('snapshot', 'web1', 'paused-again', check=False)
    assert again.returncode == 5 and 'resume' in again.stderr
    monitor('pmemsave', val=0, size=len(memory), filename=os.path.join(agent.cluster.shared, 'memory'))
    with open(os.path.join(agent.cluster.shared, 'memory'), 'rb') as file:
        assert memory[MIB:] == file.read()[MIB:]  # below 1 MiB the CPU sees firmware and video memory in places
    monitor('cont')
    console.wait_ticks(3)
    console.verify()


def test_a_guest_that_goes_on_from_frozen_file_systems_is_thawed(agent):
    """They stood frozen at the instant: restored or cloned, the guest would wait for ever."""
    vm = BareGuest('still', mem_mib=64, dirty_mib=4, rate_mbps=1)
    path = os.path.join(agent.cluster.shared, 'qga')
    inside = GuestAgent(path)
    vm.options = ['-chardev', f'socket,id=qga,path={path}', '-device', 'virtio-serial',
                  '-device', 'virtserialport,chardev=qga,name=org.qemu.guest_agent.0',
                  '-netdev', 'user,id=n0', '-device', 'virtio-net-pci,netdev=n0']
    start(agent, vm)
    inside.interfaces['eth0'] = former = vm.qmp(agent.host)('query-rx-filter')[0]['main-mac']
    assert agent.json('snapshot', 'still', 'one')['snapshot']['frozen'] == 2 and not inside.frozen
    agent.vmmig('template', 'publish', 'still@one', 'still:v1')
    vm.qmp(agent.host)('quit')
    agent.cluster.console('still-c')
    for words in (['restore', 'still@one', '--as', 'still-b'],
                  ['clone', 'still:v1', '--as', 'still-c', '--set', 'mac=auto']):
        inside.frozen = True
        done = agent.json(*words)
        assert not inside.frozen, done
        eventually('the guest', lambda name=words[3]: agent.json('status', name)['state'] == 'running')
        if words[0] == 'restore':
            os.kill(agent.json('status', words[3])['pid'], 9)
    # A clone's NIC has another MAC than the guest knows: it is told.
    made, = done['clones']
    with open(f'/proc/{made["pid"]}/cmdline', encoding='utf-8') as file:
        assert f'mac={inside.interfaces["eth0"]}' in file.read() and inside.interfaces['eth0'] != former
    assert not [note for note in made['notes'] if 'MAC' in note]
    os.kill(made['pid'], 9)
    inside.interfaces['eth0'], inside.refuses = former, {'guest-exec'}
    agent.cluster.console('still-e')
    made, = agent.json('clone', 'still:v1', '--as', 'still-e')['clones']
    assert [note for note in made['notes'] if 'keeps its MAC' in note and 'not allowed' in note], made
    os.kill(made['pid'], 9)
    inside.refuses.clear()
    agent.cluster.console('still-k')
    made, = agent.json('clone', 'still:v1', '--as', 'still-k', '--set', 'mac=keep')['clones']
    assert BareGuest('still-k', mem_mib=64).qmp(agent.host)('query-rx-filter')[0]['main-mac'] == former
    assert not [note for note in made['notes'] if 'MAC' in note]
    os.kill(made['pid'], 9)
    for name in ('still-m-1', 'still-m-2'):
        agent.cluster.console(name)
    said = agent.vmmig('clone', 'still:v1', '--as', 'still-m', '--count', '2').stdout.splitlines()
    assert len([line for line in said if 'vmgenid' in line]) == 1, said  # of both, and said once
    # The agent is that of the first, whose MAC is another one by now.
    assert 'keeps its MAC' in said[-1] and len([line for line in said if 'MAC' in line]) == 1, said
    for name in ('still-m-1', 'still-m-2'):
        os.kill(agent.json('status', name)['pid'], 9)


@pytest.mark.full
def test_the_pause_of_a_guest_of_1_gib(agent):
    """At most 30 ms beyond what QEMU takes to stop, save devices' state, and go on; of incremental ones, too."""
    spec = importlib.util.spec_from_file_location('bench_snapshot', os.path.join(ROOT, 'tests/bench/snapshot.py'))
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    vm = BareGuest('large', mem_mib=1024, dirty_mib=64, rate_mbps=20)
    disks(agent.cluster, vm)
    start(agent, vm)
    seen = bench.measure(agent, vm, 5)
    assert statistics.median(seen['vmmig']) - statistics.median(seen['state']) <= 30, seen
    vm.qmp(agent.host)('quit')


@pytest.mark.parametrize('tcg', [False, True])
def test_memory_that_cannot_be_protected_is_copied_before(agent, tcg):
    vm = BareGuest('copied-tcg' if tcg else 'copied', mem_mib=128, dirty_mib=16, rate_mbps=20, tcg=tcg)
    plain, _ = disks(agent.cluster, vm)
    console = start(agent, vm, unprivileged=True)
    for name in ('one', 'two'):
        mark = console.mark()
        taken = agent.json('snapshot', vm.name, name)
        assert 'write-protected' in taken['note'] and taken['pause_ms'] > 0
        console.wait_ticks(5)
        console.verify()
        assert console.check(mark) == ['h1']
        untouched(vm, agent)
    assert taken['snapshot']['disk_read_bytes'] == 0 and taken['snapshot']['parent'] == f'{vm.name}@one'
    with export_file(agent, f'{vm.name}@two', image_file(agent, f'{vm.name}@two', plain)) as stored:
        same = subprocess.run(['qemu-img', 'compare', '-U', '-f', 'raw', '-F', 'raw', plain, stored],
                              capture_output=True, text=True, check=False)
    assert 'identical' in same.stdout, same
    vm.qmp(agent.host)('quit')
    mark = console.mark()
    folder = os.path.join(agent.cluster.shared, vm.name)
    os.mkdir(folder)
    back = agent.json('restore', f'{vm.name}@two', '--as', f'{vm.name}-back', '--disk-dir', folder)
    assert back['state'] == 'done', back
    console.wait_for('^(hb|tick) ', after=mark)
    console.verify()
