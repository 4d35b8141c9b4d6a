# SPDX-License-Identifier: Apache-2.0
"""Something dies or fails while a snapshot is taken: the guest runs on, no half snapshot is visible, nothing is left."""
import contextlib
import datetime
import os
import select
import signal
import socket
import time

import pytest
from agents import eventually
from lab import BareGuest, judge
from snapshots import GuestAgent, disks, left_in_qemu, make_agent, start, untouched
from stores import STORES, cluster_on

# Each step of a snapshot, in their order; memory is on its way from `memory` on, disks from `arrived` on.
BEFORE = ['snapshot.prepared', 'snapshot.waiting', 'snapshot.paused', 'snapshot.switched', 'snapshot.protecting',
          'snapshot.memory@9', 'snapshot.pushing', 'snapshot.arrived@2', 'snapshot.copied', 'snapshot.commit']
AFTER = ['snapshot.committed', 'snapshot.swept']
GOES_ON = 3  # seconds after which a guest whose agent died has said something again


@pytest.fixture(scope='module', params=STORES)
def agent(request, tmp_path_factory):
    with cluster_on(request.param, tmp_path_factory.mktemp('ceph')) as cluster:
        yield make_agent(cluster, faults='snapshot.arrived=delay:0')


@pytest.fixture(scope='module')
def guest(agent):
    vm = BareGuest('web1', mem_mib=128, dirty_mib=4, rate_mbps=1)
    disks(agent.cluster, vm)
    console = start(agent, vm)
    monitor = vm.qmp(agent.host)
    judge.set_migration(monitor)
    monitor.close()
    return vm, console


@pytest.fixture(scope='module')
def unprivileged(agent):
    vm = BareGuest('copied', mem_mib=128, dirty_mib=8, rate_mbps=10)
    disks(agent.cluster, vm)
    return vm, start(agent, vm, unprivileged=True)


def processes_of(agent, program, word=''):
    """Pids of the host's processes of that program with that in their command line."""
    return [pid for pid, argv in agent.host.processes().items()
            if os.path.basename(argv[0]) == program and any(word in w for w in argv)]


def names(agent, vm='web1'):
    return [s['name'] for s in agent.json('snapshot', 'list', vm)['snapshots']]


def runs_on(agent, vm, console):
    eventually('a running guest', lambda: agent.json('status', 'web1')['state'] == 'running')
    untouched(vm, agent)
    console.wait_ticks(5)
    console.verify()


def arm(agent, fault):
    agent.vmmig('debug', 'faults', '--arm', fault)


def present(agent):
    eventually('the VM', lambda: agent.json('status', 'web1')['presence'] == 'present')


def guards(agent):
    return processes_of(agent, 'vmmig-guard')


@pytest.mark.parametrize('point', BEFORE + AFTER)
def test_the_agent_dies(agent, guest, point):
    """The guest goes on before any agent is there again."""
    vm, console = guest
    name = point.split('@')[0].replace('.', '-')
    vm.qmp(agent.host).hmp('qemu-io d1 "write -P 0x55 4M 4M"')
    arm(agent, point.replace('@', '=crash@') if '@' in point else f'{point}=crash')
    assert agent.vmmig('snapshot', 'web1', name, check=False).returncode == 6
    agent.process.wait(20)
    console.wait_ticks(3, GOES_ON)
    console.verify(10)  # each page is touched: none is protected
    monitor = vm.qmp(agent.host)
    eventually('what its user had set for migrations', lambda: judge.migration_is_set(monitor))
    monitor.close()
    agent.start(faults='snapshot.arrived=delay:0')
    present(agent)
    assert agent.json('status', 'web1')['state'] == 'running'
    assert (name in names(agent)) == (point in AFTER)
    agent.vmmig('snapshot', 'web1', f'{name}-again')  # after which no bitmap of the dead one is left, either
    runs_on(agent, vm, console)
    eventually('the end of the guard', lambda: not guards(agent))


# QEMU pauses the guest by itself when what is left is little for the rate at which it gives memory away. With a reader
# that is slow it never is, for a guest that writes: the pause is the agent's decision then.
SLOWLY = 'snapshot.memory=delay:20@*'


@pytest.mark.parametrize('point, faults', [('memory', 'snapshot.memory=crash@9'),
                                           ('paused', f'{SLOWLY},snapshot.paused=crash'),
                                           ('migrated', 'snapshot.migrated=crash'),
                                           ('switched', 'snapshot.switched=crash')])
def test_the_agent_dies_where_memory_is_copied_before(agent, unprivileged, point, faults):
    vm, console = unprivileged
    if agent.process.poll() is not None:  # another step's test has failed
        agent.start(faults='snapshot.arrived=delay:0')
    eventually('the VM', lambda: agent.json('status', vm.name)['presence'] == 'present')
    arm(agent, faults)
    assert agent.vmmig('snapshot', vm.name, f'{point}-never', check=False).returncode == 6
    agent.process.wait(20)
    console.wait_ticks(3, GOES_ON)
    console.verify(10)
    agent.start(faults='snapshot.arrived=delay:0')
    eventually('the VM', lambda: agent.json('status', vm.name)['presence'] == 'present')
    assert f'{point}-never' not in names(agent, vm.name)
    agent.vmmig('snapshot', vm.name, f'{point}-after')
    console.wait_ticks(3)
    console.verify()
    untouched(vm, agent)


def held_at(agent, point, name, vm='web1'):
    """A snapshot that is being taken and stands at a fault point. Returns the guard beside it."""
    arm(agent, point.replace('@', '=hold@') if '@' in point else f'{point}=hold')
    agent.vmmig('snapshot', vm, name, '--background')
    eventually('the step', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    guard, = guards(agent)
    return guard


def test_a_snapshot_is_of_the_time_at_which_the_guest_stood(agent, guest):
    """However long it takes to store what it has."""
    vm, console = guest
    began = int(time.time())
    held_at(agent, 'snapshot.commit', 'dated')
    held = time.time()
    eventually('another second', lambda: int(time.time()) > held + 1)
    arm(agent, 'none')
    eventually('its end', lambda: 'dated' in names(agent))
    created = agent.json('snapshot', 'show', 'web1@dated')['snapshots'][0]['created']
    assert began <= datetime.datetime.fromisoformat(created.replace('Z', '+00:00')).timestamp() <= held
    runs_on(agent, vm, console)
    eventually('the end of the guard', lambda: not guards(agent))


@pytest.mark.parametrize('point', ['snapshot.paused', 'snapshot.memory@9'])
def test_the_agent_and_the_snapshots_guard_die(agent, guest, point):
    """Nobody is left who could help: the next agent does."""
    vm, console = guest
    guard = held_at(agent, point, 'nobody')
    os.kill(guard, signal.SIGKILL)
    agent.kill()
    agent.start(faults='snapshot.arrived=delay:0')
    present(agent)
    console.wait_ticks(3, GOES_ON)
    console.verify(10)
    assert 'nobody' not in names(agent)
    agent.vmmig('snapshot', 'web1', f'{point.split(".")[1].split("@")[0]}-after')
    runs_on(agent, vm, console)


def test_the_guard_alone_dies(agent, guest):
    vm, console = guest
    guard = held_at(agent, 'snapshot.memory@9', 'unguarded')
    os.kill(guard, signal.SIGKILL)
    arm(agent, 'none')
    assert agent.json('watch', 'web1')['state'] == 'done'
    assert 'unguarded' in names(agent)
    runs_on(agent, vm, console)


def test_a_snapshot_waits_until_a_dead_agents_one_is_over(agent, guest):
    vm, console = guest
    guard = held_at(agent, 'snapshot.memory@9', 'slow')
    os.kill(guard, signal.SIGSTOP)  # as if there were much to read
    try:
        agent.kill()
        agent.start(faults='snapshot.arrived=delay:0')
        present(agent)
        agent.vmmig('snapshot', 'web1', 'waits', '--background')
        assert agent.json('status', 'web1')['job']['phase'] == 'preparing'
    finally:
        os.kill(guard, signal.SIGCONT)
    assert agent.json('watch', 'web1')['state'] == 'done'
    runs_on(agent, vm, console)


def test_file_systems_hold_still_for_the_instant(agent, guest):
    """And are thawed whatever happens: at once if the agent dies, by the next one if the guard dies with it."""
    vm, console = guest
    path = os.path.join(agent.cluster.shared, 'qga')
    inside = GuestAgent(path)
    done = agent.json('snapshot', 'web1', 'still', '--guest-agent', path)
    assert done['snapshot']['frozen'] == 2 and not inside.frozen
    assert [word for word in inside.said if 'fsfreeze' in word] == ['guest-fsfreeze-freeze', 'guest-fsfreeze-thaw']
    for both in (False, True):
        arm(agent, 'snapshot.switched=hold')
        agent.vmmig('snapshot', 'web1', 'never', '--guest-agent', path, '--background')
        eventually('the instant', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
        assert inside.frozen
        if both:
            guard, = guards(agent)
            os.kill(guard, signal.SIGKILL)
        agent.kill()
        if both:
            agent.start(faults='snapshot.arrived=delay:0')
        eventually('file systems that are thawed', lambda: not inside.frozen)
        console.wait_ticks(3, GOES_ON)
        if not both:
            agent.start(faults='snapshot.arrived=delay:0')
        present(agent)
    agent.vmmig('snapshot', 'web1', 'still-after')
    runs_on(agent, vm, console)


def nbdkits(agent):
    return processes_of(agent, 'nbdkit', 'vmmig-plugin')


def restart(agent, faults):
    agent.stop()
    agent.start(faults=faults)
    eventually('the VM', lambda: agent.json('status', 'web1')['presence'] == 'present')


def test_storing_fails(agent, guest):
    vm, console = guest
    restart(agent, 'snapshot.memory=error:ENOSPC')
    failed = agent.vmmig('snapshot', 'web1', 'full', check=False)
    assert failed.returncode == 11, failed
    runs_on(agent, vm, console)
    assert 'full' not in names(agent)


def test_no_room_for_what_the_guest_overwrites(agent, guest):
    """The snapshot is given up; the guest notices nothing."""
    vm, console = guest
    scratch = '/var/lib/vmmig/small'
    os.makedirs(agent.host.path(scratch))
    agent.host.run(['mount', '-t', 'tmpfs', '-o', 'size=1M', 'small', scratch])
    agent.options['scratch-dir'] = scratch
    try:
        restart(agent, 'snapshot.protecting=hold')
        monitor = vm.qmp(agent.host)
        monitor.hmp('qemu-io d1 "write -P 0x59 8M 8M"')
        agent.vmmig('snapshot', 'web1', 'cramped', '--background')
        eventually('the step', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
        monitor.hmp('qemu-io d1 "write -P 0x5a 8M 8M"')
        monitor.close()
        arm(agent, 'none')
        failed = agent.vmmig('watch', 'web1', check=False)
        assert failed.returncode == 11 and f'in {scratch}' in failed.stderr.strip().splitlines()[-1], failed
        assert 'cramped' not in names(agent)
        assert agent.host.run(['ls', '-A', scratch]) == ''
        console.wait_ticks(5)
        console.verify()
    finally:
        del agent.options['scratch-dir']
        restart(agent, 'snapshot.arrived=delay:0')
        agent.host.run(['umount', scratch])
    assert left_in_qemu(vm.qmp(agent.host)) == []


@pytest.mark.full
def test_file_systems_do_not_stand_for_as_long_as_a_copy_takes(agent, unprivileged):
    """For 20 s at most: then the snapshot fails, whose user asked for that."""
    vm, console = unprivileged
    path = os.path.join(agent.cluster.shared, 'qga-copied')
    inside = GuestAgent(path)
    arm(agent, 'snapshot.memory=hold@9')
    agent.vmmig('snapshot', vm.name, 'long', '--guest-agent', path, '--background')
    eventually('frozen file systems', lambda: inside.frozen)
    eventually('that are thawed', lambda: not inside.frozen, 40)
    arm(agent, 'none')
    failed = agent.vmmig('watch', vm.name, check=False)
    assert failed.returncode == 10 and 'stand still' in failed.stderr.strip().splitlines()[-1], failed
    console.wait_ticks(3)
    untouched(vm, agent)


def test_a_cancelled_one(agent, guest):
    vm, console = guest
    restart(agent, 'snapshot.memory=delay:300@*')
    agent.vmmig('snapshot', 'web1', 'cancelled', '--background')
    conflict = agent.vmmig('send', 'web1', '--to', 'h1', check=False)
    assert conflict.returncode == 4 and 'snapshot' in conflict.stderr
    agent.vmmig('cancel', 'web1')
    assert agent.vmmig('watch', 'web1', check=False).returncode == 14
    runs_on(agent, vm, console)
    assert 'cancelled' not in names(agent)


def test_nbdkit_dies(agent, guest):
    vm, console = guest
    restart(agent, 'snapshot.arrived=hold,snapshot.failed=hold')
    monitor = vm.qmp(agent.host)
    monitor.hmp('qemu-io d1 "write -P 0x56 4M 1M"')
    agent.vmmig('snapshot', 'web1', 'nbdkit', '--background')
    eventually('data of a disk', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    for pid in nbdkits(agent):
        os.kill(pid, signal.SIGKILL)
    # QEMU would connect to it again, at the number of a descriptor that is something else by then.
    eventually('no node that goes there', lambda: not [
        node for node in monitor('query-named-block-nodes', flat=True) if 'target' in node['node-name']])
    monitor.close()
    assert agent.json('status', 'web1')['job']['state'] == 'running'  # what is left of memory comes later
    arm(agent, 'none')
    failed = agent.vmmig('watch', 'web1', check=False)
    assert failed.returncode in (1, 5, 6) and 'web1@nbdkit' in failed.stderr.strip().splitlines()[-1], failed
    runs_on(agent, vm, console)
    assert 'nbdkit' not in names(agent)


CONNECTS_AGAIN = 2.5  # seconds within which QEMU has tried so at least twice (after 0 and 1 s)


def test_a_dead_nbdkit_costs_qemus_user_no_descriptor(agent, guest):
    """QEMU connects to it again, and again, as long as its node is there; nothing else of QEMU's is touched."""
    vm, console = guest
    restart(agent, 'snapshot.arrived=hold')
    monitor = vm.qmp(agent.host)
    monitor.hmp('qemu-io d1 "write -P 0x57 4M 48M"')  # more than QEMU asks NBD servers for at once: what waits tries again
    agent.vmmig('snapshot', 'web1', 'numbers', '--background')
    eventually('data of a disk', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))
    os.kill(agent.process.pid, signal.SIGSTOP)  # so that the nodes stay
    with contextlib.ExitStack() as ends:
        ends.callback(os.kill, agent.process.pid, signal.SIGCONT)
        for pid in nbdkits(agent):
            os.kill(pid, signal.SIGKILL)
        eventually('a job that noticed', lambda: all(job['status'] == 'concluded' for job in monitor('query-jobs')))
        theirs = []
        for number in range(16):  # at whatever numbers are free now
            ours, qemus = socket.socketpair()
            ends.enter_context(ours).sendall(b'not for NBD' * 8)  # whoever takes it for a server reads that, and closes it
            with qemus:
                monitor.give_fd(qemus.fileno(), f'user-{number}')
            theirs.append(ours)
        assert select.select(theirs, [], [], CONNECTS_AGAIN)[0] == []
        for number in range(16):
            monitor('closefd', fdname=f'user-{number}')
    monitor.close()
    arm(agent, 'none')
    failed = agent.vmmig('watch', 'web1', check=False)
    assert failed.returncode in (1, 5, 6) and 'web1@numbers' in failed.stderr.strip().splitlines()[-1], failed
    runs_on(agent, vm, console)


def test_a_qemu_that_may_not_use_paths(agent, guest):
    """As one that a security module confines: it is given connections."""
    vm, console = guest
    restart(agent, 'snapshot.path=error@*')
    vm.qmp(agent.host).hmp('qemu-io d1 "write -P 0x58 4M 64k"')
    assert agent.json('snapshot', 'web1', 'confined')['state'] == 'done'
    assert 'gets a connection' in agent.log()
    runs_on(agent, vm, console)


@pytest.mark.parametrize('way, point', [
    pytest.param('protected', 'snapshot.waiting', marks=pytest.mark.full), ('protected', 'snapshot.switched'),
    ('protected', 'snapshot.memory@9'), pytest.param('protected', 'snapshot.copied', marks=pytest.mark.full),
    pytest.param('copied', 'snapshot.memory@9', marks=pytest.mark.full), ('copied', 'snapshot.migrated')])
def test_qemu_dies(agent, way, point):
    """Its VM has ended; nothing of the snapshot is visible, or left anywhere, and the name is free again."""
    if agent.process.poll() is not None:  # another step's test has failed
        agent.start(faults='snapshot.arrived=delay:0')
    vm = BareGuest(f'{way}-{point.split(".")[1].split("@")[0]}', mem_mib=64, dirty_mib=4, rate_mbps=1)
    disks(agent.cluster, vm)
    start(agent, vm, unprivileged=way == 'copied')
    held_at(agent, point, 'half', vm.name)
    os.kill(agent.json('status', vm.name)['pid'], signal.SIGKILL)
    agent.host.reap()
    arm(agent, 'none')
    failed = agent.vmmig('watch', vm.name, check=False)
    assert failed.returncode == 13 and f'{vm.name}@half' in failed.stderr.strip().splitlines()[-1], failed
    eventually('the end of the VM', lambda: agent.host.reap() or
               agent.json('status', vm.name)['presence'] == 'ended')
    assert names(agent, vm.name) == []
    eventually('the end of nbdkit and the guard', lambda: not guards(agent) and not nbdkits(agent))
    assert os.listdir(agent.host.path('/var/lib/vmmig/scratch')) == []
    assert [name for name in os.listdir(agent.host.path('/run/vmmig')) if name.endswith('.snapshot')] == []
    agent.vmmig('detach', vm.name)
