# SPDX-License-Identifier: Apache-2.0
"""VMs whose VMM links libvmmig-attach, as the agent's user sees them: adopted, started, listed, moved, refused,
recovered after a crash of an agent. The VMM is tests/flow/standin_vmm.c, which checks its whole memory when it is
loaded; what a real guest sees of a migration is tested elsewhere."""
import contextlib
import os
import signal
import socket
import struct
import subprocess
import time

import pytest
from agents import Cluster, eventually, fault_build
from lab import BareGuest, huge_pages, judge
from lab.guests import built

MIB = 1 << 20
SOCKET = '/run/vmlab/{}.vmm'
PROGRAM = 'tests/flow/standin_vmm'


@pytest.fixture(scope='module')
def cluster():
    with Cluster(start=False) as made:
        for agent in made.agents:
            agent.options['attach-vmm'] = built('tests/flow/standin_vmm')
            agent.start()
        yield made


@pytest.fixture
def a1(cluster):
    yield cluster.agents[0]
    clean(cluster)


@pytest.fixture
def a2(cluster):
    return cluster.agents[1]


def gone(agent, pid):
    agent.host.reap()
    return not os.path.exists(f'/proc/{pid}')


STARTED = []  # VMMs that tests started by hand


def clean(cluster):
    for vmm in STARTED:
        if vmm.poll() is None:
            vmm.kill()
        vmm.wait()
    STARTED.clear()
    for agent in cluster.agents:
        if agent.process.poll() is not None:
            agent.start()
        for vm in agent.json('list')['vms']:
            if vm['presence'] != 'ended' and vm['pid']:
                with contextlib.suppress(ProcessLookupError):  # the agent may not have noticed yet
                    os.kill(vm['pid'], 9)
                eventually('the end of a VMM', lambda pid=vm['pid'], a=agent: gone(a, pid))
            agent.vmmig('detach', vm['vm'], check=False)


def command(path, program=None, **options):
    words = [program or built(PROGRAM), '--socket', path]
    for key, value in options.items():
        words.append('--' + key.replace('_', '-'))
        if value is not True:
            words.append(str(value))
    return words


def by_hand(agent, name, attach=True, faults=None, **options):
    """Starts a VMM as its user would, and has the agent adopt it. Faults: of its library."""
    path = SOCKET.format(name)
    if faults:
        options['program'] = os.path.join(fault_build(), PROGRAM)
    vmm = agent.host.popen(command(path, **options), name=name,
                           env={**os.environ, **({'VMMIG_FAULTS': faults} if faults else {})})
    STARTED.append(vmm)
    eventually('the VMM', lambda: vmm.poll() is not None or 'ready\n' in read(vmm.log))
    assert vmm.poll() is None, f'{name} ended with status {vmm.returncode}'
    if attach:
        agent.vmmig('attach', name, '--socket', path)
    return vmm


def read(path):
    with open(path, encoding='utf-8') as file:
        return file.read()


def run(agent, name, **options):
    agent.vmmig('run', name, '--', *command('@socket@', **options))


def said(agent, name):
    """What a VMM that the agent started said."""
    return read(agent.host.path(f'/var/lib/vmmig/log/{name}.log')).split('\n')[:-1]


def refused(agent, *words, status=5):
    done = agent.vmmig(*words, check=False)
    assert done.returncode == status, done
    assert done.stderr.splitlines()[-1].startswith('vmmig: '), done.stderr
    return done.stderr.splitlines()[-1].removeprefix('vmmig: ')


def running(cluster, name):
    """The hosts whose agent has it, running."""
    return [agent.host.name for agent in cluster.agents for vm in agent.json('list')['vms']
            if vm['vm'] == name and vm['presence'] == 'present' and vm['state'] == 'running']


def nothing_left(agent, name):
    eventually(f'nothing of {name} on {agent.host.name}',
               lambda: not judge.leftovers(agent.host, name, [agent.process.pid]))


# ---- what a user does with it

def test_it_is_adopted_listed_and_forgotten(a1):
    vmm = by_hand(a1, 'web')
    vm = a1.json('status', 'web')
    assert (vm['driver'], vm['state'], vm['origin'], vm['pid']) == ('attach', 'running', 'attached', vmm_pid(a1, 'web'))
    assert (vm['vmm'], vm['tracking'], vm['socket']) == ('standin 1', 'trace', SOCKET.format('web'))
    assert 'qmp' not in vm
    text = a1.vmmig('status', 'web').stdout
    assert f'socket     {SOCKET.format("web")}\n' in text and 'VMM        standin 1, which tracks by trace\n' in text
    assert a1.json('list')['vms'][0]['driver'] == 'attach'
    a1.vmmig('detach', 'web')
    assert vmm.poll() is None
    a1.vmmig('attach', 'web', '--socket', SOCKET.format('web'))
    vmm.kill()
    eventually('the end', lambda: a1.json('status', 'web')['presence'] == 'ended')
    assert 'ended' in refused(a1, 'send', 'web', '--to', 'h2', status=13)


def vmm_pid(agent, name):
    return next(pid for pid, argv in agent.host.processes().items() if argv[0].endswith('standin_vmm')
                and any(name in word for word in argv))


def test_it_moves_there_and_back(cluster, a1, a2):
    by_hand(a1, 'mover')
    pid = a1.json('status', 'mover')['pid']
    job = a1.json('send', 'mover', '--to', 'h2')
    assert job['state'] == 'done' and job['kind'] == 'send' and job['round'] >= 2
    assert job['total_bytes'] == 66 * MIB
    assert job['pages']['zero']['pages'] * 4096 > 20 * MIB  # holes
    assert running(cluster, 'mover') == ['h2']
    assert said(a2, 'mover') == ['ready', 'loaded', 'running']
    vm = a2.json('status', 'mover')
    assert (vm['driver'], vm['origin'], vm['socket']) == ('attach', 'received', '/run/vmmig/mover.vmm')
    assert '--incoming' in vm['argv'] and not any('@socket@' in word for word in vm['argv'])
    assert gone(a1, pid)
    nothing_left(a1, 'mover')
    a2.json('send', 'mover', '--to', 'h1')
    assert running(cluster, 'mover') == ['h1']
    nothing_left(a2, 'mover')


def test_a_user_starts_it_under_the_agent(cluster, a1, a2):
    run(a1, 'mine')
    assert a1.json('status', 'mine')['socket'] == '/run/vmmig/mine.vmm'
    a1.stop()
    a1.start()  # another agent finds it
    eventually('it is found', lambda: running(cluster, 'mine') == ['h1'])
    a1.json('send', 'mine', '--to', 'h2')
    assert running(cluster, 'mine') == ['h2']
    nothing_left(a1, 'mine')


def test_a_destination_of_the_users_own(cluster, a1, a2):
    by_hand(a1, 'own', by_hand=True)
    assert 'standin 1 does not say how a destination is started' in refused(a1, 'send', 'own', '--to', 'h2')
    by_hand(a2, 'waits', attach=False, incoming=True)
    a1.json('send', 'own', '--to', 'h2', '--dest-socket', SOCKET.format('waits'))
    assert running(cluster, 'own') == ['h2']


def test_a_destination_with_something_in_its_memory(cluster, a1, a2):
    """What is zero at the source is zero afterwards: the VMM compares all of it."""
    by_hand(a1, 'own')
    by_hand(a2, 'full', attach=False, incoming=True, firmware=True)
    job = a1.json('send', 'own', '--to', 'h2', '--dest-socket', SOCKET.format('full'))
    assert running(cluster, 'own') == ['h2']
    assert job['pages']['zero']['pages'] * 4096 > 20 * MIB


def test_holes_of_huge_pages_stay_holes(cluster, a1, a2):
    """The kernel does not say where they are, and there are huge pages enough for what the guest has written alone."""
    with huge_pages(2 * 32 + 8):
        by_hand(a1, 'sparse', hugetlb=True)
        job = a1.json('send', 'sparse', '--to', 'h2')
        assert running(cluster, 'sparse') == ['h2']
        assert job['pages']['zero']['pages'] * 4096 > 30 * MIB
        clean(cluster)  # before the pages go


def test_a_paused_guest_stays_paused(cluster, a1, a2):
    """The agent paused it: an attempt that was undone, say."""
    by_hand(a1, 'asleep', attach=False)
    pause(a1, 'asleep')
    a1.vmmig('attach', 'asleep', '--socket', SOCKET.format('asleep'))
    assert a1.json('status', 'asleep')['state'] == 'paused'
    a1.json('send', 'asleep', '--to', 'h2')
    assert a2.json('status', 'asleep')['state'] == 'paused'
    assert said(a2, 'asleep') == ['ready', 'loaded', 'released']


@pytest.mark.parametrize('moved', [True, False], ids=['moved', 'move undone'])
def test_a_guest_that_its_user_paused_is_his_again(cluster, a1, a2, moved):
    """A VMM's own pause is not the agent's to end, and the guest not the agent's for ever."""
    name = 'napping' if moved else 'dozing'
    vmm = by_hand(a1, name, still=True)
    waits = by_hand(a2, 'waits-' + name, attach=False, incoming=True, **({} if moved else {'fail': 'load'}))
    done = a1.vmmig('send', name, '--to', 'h2', '--dest-socket', SOCKET.format('waits-' + name), check=False)
    assert (done.returncode == 0) == moved, done
    there, vmm = (a2, waits) if moved else (a1, vmm)
    assert there.json('status', name)['state'] == 'paused'
    assert 'released\n' in read(vmm.log)
    os.kill(vmm.pid, signal.SIGUSR2)
    eventually('it runs', lambda: there.json('status', name)['state'] == 'running')
    assert 'the agent has it' not in read(vmm.log)


@pytest.mark.parametrize('who, fault', [
    ('agent', 'attach.send.RELEASE=error'), ('agent', 'attach.receive.RELEASE=error'),
    ('agent', 'attach.send.RELEASE=crash'), ('VMM', 'library.receive.RELEASE=error'),
    ('VMM', 'library.answer.RELEASE=error'), ('VMM', 'library.call.release=error'),
    ('VMM', 'library.called.release=delay:1000'),
])
def test_a_guest_is_given_back_though_that_fails_once(cluster, a1, a2, who, fault):
    """Its user had it stand, the move is undone, and the word that it is his again, or the answer, gets lost."""
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    a1.stop()
    a1.start(**({'faults': fault} if who == 'agent' else {}))
    try:
        vmm = by_hand(a1, 'given', still=True, faults=None if who == 'agent' else fault)
        by_hand(a2, 'waits', attach=False, incoming=True, fail='load')
        done = a1.vmmig('send', 'given', '--to', 'h2', '--dest-socket', SOCKET.format('waits'), check=False)
        assert done.returncode != 0, done
        if fault.endswith('crash'):
            eventually('the crash', lambda: a1.process.poll() is not None)
            a1.start()
        eventually('it is its own again', lambda: 'released\n' in read(vmm.log))
        eventually('the end of it', lambda: not (a1.json('status', 'given')['handover'] or {}).get('state'))
        assert a1.json('status', 'given')['state'] == 'paused'
        os.kill(vmm.pid, signal.SIGUSR2)
        eventually('it runs', lambda: a1.json('status', 'given')['state'] == 'running')
        assert 'the agent has it' not in read(vmm.log)
    finally:
        a1.stop()
        a1.start()


def pause(agent, name):
    """As an agent says it: HELLO, then PAUSE (proto/attach.proto, proto/frame.h)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.settimeout(10)
        s.connect(agent.host.path(SOCKET.format(name)))
        for kind, body in ((1, b'\x08\x01\x10\x01\x1a\x04test'), (17, b'')):
            s.send(frame(kind, body))
            s.recv(1 << 20)


def frame(kind, body):
    return struct.pack('<4sIHH', b'VMMG', len(body), kind, 0) + body


def test_how_it_converges_is_shown(cluster, a1):
    """Over a link that is slower than the guest writes: throttled step by step, then paused at the best moment."""
    for host in cluster.hosts:
        host.set_rate('400mbit')
    try:
        by_hand(a1, 'busy', rate=400, working=8)  # a round of 8 MiB takes 0.2 s here
        a1.vmmig('send', 'busy', '--to', 'h2', '--downtime-limit', '20', '--compress', 'none', '--background')
        job = eventually('throttling', lambda: (j := a1.json('status', 'busy')['job'])['throttle_percent'] and j, 60)
        assert 0 < job['dirty_rate'] and job['link_rate'] > 0 and job['round'] >= 2
        assert 0 < job['working_set_bytes'] <= 10 * MIB
        assert job['predicted_pause_ms'] > 20
        text = a1.vmmig('status', 'busy').stdout
        for word in ('dirty ', 'working set', 'link ', 'as predicted'):
            assert word in text, text
        done = a1.vmmig('watch', 'busy', timeout=120)
    finally:
        for host in cluster.hosts:
            host.set_rate(None)
    assert 'throttled      by up to' in done.stdout
    assert running(cluster, 'busy') == ['h2']


# ---- what is refused

def test_what_it_is_not(a1, a2, cluster):
    by_hand(a1, 'web')
    assert f"{SOCKET.format('web')} is no QMP socket" in refused(a1, 'attach', 'two', '--qmp', SOCKET.format('web'))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(a1.host.path('/run/vmlab/stream'))
        listener.listen(1)
        assert 'is no socket of a VMM that links libvmmig-attach' in refused(
            a1, 'attach', 'two', '--socket', '/run/vmlab/stream')
    os.unlink(a1.host.path('/run/vmlab/stream'))
    assert refused(a1, 'attach', 'two', status=2) == '--qmp PATH or --socket PATH is required'
    assert refused(a1, 'attach', 'two', '--qmp', '/a', '--socket', '/b', status=2) == \
        '--qmp and --socket exclude each other'


def test_a_qemu_is_no_destination_and_the_reverse(cluster, a1, a2):
    by_hand(a1, 'web')
    why = refused(a1, 'send', 'web', '--to', 'h2', '--dest-qmp', '/run/x.qmp')
    assert why == ('the guest of a VMM that links libvmmig-attach can be taken in by a VMM that links '
                   'libvmmig-attach only, not by a QEMU')
    vm = BareGuest('qemu', mem_mib=64, dirty_mib=8)
    console = cluster.console('qemu')
    STARTED.append(a2.host.popen(vm.argv(incoming='defer'), name='qemu'))
    eventually('QEMU', lambda: os.path.exists(a2.host.path(vm.judge_path)))
    vm.qmp(a2.host).wait_status('inmigrate')
    why = refused(a1, 'send', 'web', '--to', 'h2', '--dest-socket', vm.qmp_path)
    assert f"{vm.qmp_path} is a QEMU's socket" in why
    STARTED.append(a1.host.popen(vm.argv(), name='qemu'))
    console.wait_for('ready')
    a1.vmmig('attach', 'qemu', '--qmp', vm.qmp_path)
    why = refused(a1, 'send', 'qemu', '--to', 'h2', '--dest-socket', '/run/x.vmm')
    assert why == 'the guest of a QEMU can be taken in by a QEMU only, not by a VMM that links libvmmig-attach'
    by_hand(a2, 'waits', attach=False, incoming=True)
    why = refused(a1, 'send', 'qemu', '--to', 'h2', '--dest-qmp', SOCKET.format('waits'))
    assert f"{SOCKET.format('waits')} is no QMP socket" in why
    assert running(cluster, 'web') == ['h1']


def test_another_machine_is_refused(cluster, a1, a2):
    by_hand(a1, 'web')
    by_hand(a2, 'other', attach=False, incoming=True, machine='standin/2')
    why = refused(a1, 'send', 'web', '--to', 'h2', '--dest-socket', SOCKET.format('other'))
    assert "another machine: 'standin/2', not 'standin/1'" in why
    by_hand(a2, 'small', attach=False, incoming=True, memory=32)
    why = refused(a1, 'send', 'web', '--to', 'h2', '--dest-socket', SOCKET.format('small'))
    assert 'memory slot high' in why
    by_hand(a2, 'runs', attach=False)
    why = refused(a1, 'send', 'web', '--to', 'h2', '--dest-socket', SOCKET.format('runs'))
    assert 'does not wait' in why
    assert running(cluster, 'web') == ['h1']


def test_command_lines_that_cannot_be_run(a1):
    why = refused(a1, 'run', 'bad', '--', built('tests/flow/standin_vmm'), '--socket', '/run/x')
    assert '@socket@ must stand there' in why
    why = refused(a1, 'run', 'bad', '--', *command('@socket@', memory='lots'), status=13)
    assert why.endswith('ended: standin_vmm: lots is no number')
    assert 'is not among the binaries' in refused(a1, 'run', 'bad', '--', '/usr/bin/vmmig-vmm', '@socket@')
    assert a1.json('list')['vms'] == []
    nothing_left(a1, 'bad')


def test_a_binary_that_the_destination_does_not_list(cluster, a1, a2):
    by_hand(a1, 'web')
    a2.stop()
    listed = a2.options.pop('attach-vmm')
    try:
        a2.start()
        why = refused(a1, 'send', 'web', '--to', 'h2')
        assert why.startswith('the peer: standin_vmm is not among the binaries') and '`attach-vmm`' in why
    finally:
        a2.stop()
        a2.options['attach-vmm'] = listed
        a2.start()
    assert running(cluster, 'web') == ['h1']


# ---- VMMs that do not keep to the header: a clear word, and the guest runs on

def runs_on(cluster, agent, name, vmm):
    """It is alive, and runs where it was."""
    assert vmm.poll() is None and running(cluster, name) == [agent.host.name]


@pytest.mark.parametrize('options, why', [
    ({'fail': 'pause'}, "the VMM's callback `pause` failed: Input/output error"),
    ({'fail': 'pause-late'}, "the VMM's callback `pause` failed: Input/output error"),
    ({'hang': 'pause-late'}, "the VMM's callback `pause` has not returned for 0.5 s"),
    ({'fail': 'save'}, "the VMM's callback `save` failed: Input/output error"),
    ({'hang': 'pause'}, "the VMM's callback `pause` has not returned for 0.5 s"),
    ({'hang': 'save'}, "the VMM's callback `save` has not returned for 0.5 s"),
], ids=['pause fails', 'pause fails late', 'pause hangs late', 'save fails', 'pause hangs', 'save hangs'])
def test_a_callback_that_fails_or_never_returns(cluster, a1, a2, options, why):
    vmm = by_hand(a1, 'web', **options)
    done = a1.vmmig('send', 'web', '--to', 'h2', check=False)
    assert done.returncode != 0 and why in done.stderr, done
    runs_on(cluster, a1, 'web', vmm)
    nothing_left(a2, 'web')
    if options.get('fail', options.get('hang')) != 'pause':  # after the guest stood: it goes again
        assert 'running' in read(vmm.log).rsplit('paused', 1)[1]


def test_memory_that_changes_ends_the_job(cluster, a1, a2):
    cluster.hosts[0].set_rate('100mbit')
    try:
        vmm = by_hand(a1, 'web', rate=0)
        a1.vmmig('send', 'web', '--to', 'h2', '--compress', 'none', '--background')
        eventually('some memory', lambda: a1.json('status', 'web')['job']['wire_bytes'] > MIB)
        os.kill(vmm_pid(a1, 'web'), signal.SIGUSR1)
        done = a1.vmmig('watch', 'web', check=False)
        assert done.returncode != 0, done
        assert "the VMM changed the guest's memory slots while they were copied" in done.stderr
    finally:
        cluster.hosts[0].set_rate(None)
    runs_on(cluster, a1, 'web', vmm)
    nothing_left(a2, 'web')
    a1.json('send', 'web', '--to', 'h2')
    assert running(cluster, 'web') == ['h2']


@pytest.mark.parametrize('point', ['attach.send.HARVEST', 'attach.send.SAVE'], ids=['while it runs', 'while it stands'])
def test_a_guest_that_breaks_ends_the_job(cluster, a1, a2, point):
    """A triple fault, say: the guest is where it was, as the VMM says it is, and can be forgotten."""
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    a1.stop()
    a1.start(faults=f'{point}=hold')
    try:
        vmm = by_hand(a1, 'web')
        a1.vmmig('send', 'web', '--to', 'h2', '--background')
        eventually('the step', lambda: any(p['holds'] for p in a1.json('debug', 'faults')['points']))
        vmm.send_signal(signal.SIGHUP)
        eventually('a broken guest', lambda: read(vmm.log).endswith('broken\n'))
        a1.vmmig('debug', 'faults', '--arm', 'none')
        done = a1.vmmig('watch', 'web', check=False)
        assert done.returncode == 5 and 'the guest is broken (triple fault)' in done.stderr, done
        assert vmm.poll() is None
        vm = eventually('the end of it', lambda: not ((v := a1.json('status', 'web'))['handover'] or {}).get('state') and v)
        assert (vm['state'], vm['detail']) == ('broken', 'triple fault'), vm
        assert 'the guest is broken (triple fault): it can be neither moved' in refused(a1, 'send', 'web', '--to', 'h2')
        a1.vmmig('detach', 'web')
        nothing_left(a2, 'web')
    finally:
        a1.stop()
        a1.start()


def test_memory_told_again_just_before_it_is_tracked(cluster, a1, a2):
    """After the agent has looked at it. The VMM compares all that arrives: none of it is lost."""
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    a1.stop()
    a1.start(faults='attach.send.TRACK=hold')
    try:
        vmm = by_hand(a1, 'web')
        a1.vmmig('send', 'web', '--to', 'h2', '--background')
        eventually('the step', lambda: any(p['holds'] for p in a1.json('debug', 'faults')['points']))
        os.kill(vmm_pid(a1, 'web'), signal.SIGUSR1)
        eventually('the same slots again', lambda: 'told its memory' in read(vmm.log))
        a1.vmmig('debug', 'faults', '--arm', 'none')
        a1.vmmig('watch', 'web')
        assert running(cluster, 'web') == ['h2']
        assert said(a2, 'web')[-2:] == ['loaded', 'running']
    finally:
        a1.stop()
        a1.start()


def test_a_destination_that_does_not_load_or_start(cluster, a1, a2):
    """One that the user prepared: the guest goes on where it was."""
    for callback in ('load', 'resume'):
        vmm = by_hand(a1, callback, attach=True)
        by_hand(a2, 'waits-' + callback, attach=False, incoming=True, fail=callback)
        done = a1.vmmig('send', callback, '--to', 'h2', '--dest-socket', SOCKET.format('waits-' + callback), check=False)
        assert done.returncode != 0 and f'callback `{callback}` failed: Input/output error' in done.stderr, done
        runs_on(cluster, a1, callback, vmm)


# ---- when things end in the middle

def test_cancel(cluster, a1, a2):
    cluster.hosts[0].set_rate('100mbit')
    try:
        by_hand(a1, 'web', rate=0)
        a1.vmmig('send', 'web', '--to', 'h2', '--compress', 'none', '--background')
        eventually('some memory', lambda: a1.json('status', 'web')['job']['wire_bytes'] > MIB)
        a1.vmmig('cancel', 'web')
        assert a1.vmmig('watch', 'web', check=False).returncode == 14
    finally:
        cluster.hosts[0].set_rate(None)
    assert running(cluster, 'web') == ['h1']
    nothing_left(a2, 'web')
    a1.json('send', 'web', '--to', 'h2')
    assert running(cluster, 'web') == ['h2']


@pytest.mark.parametrize('side', [pytest.param('source', marks=pytest.mark.full), 'destination'])
def test_a_vmm_that_dies_in_mid_copy(cluster, a1, a2, side):
    cluster.hosts[0].set_rate('100mbit')
    try:
        by_hand(a1, 'web', rate=0)
        a1.vmmig('send', 'web', '--to', 'h2', '--compress', 'none', '--background')
        eventually('some memory', lambda: a1.json('status', 'web')['job']['wire_bytes'] > MIB)
        os.kill(vmm_pid(a1 if side == 'source' else a2, 'web' if side == 'source' else 'incoming'), 9)
        done = a1.vmmig('watch', 'web', check=False)
        assert done.returncode == 13 and 'ended' in done.stderr, done
    finally:
        cluster.hosts[0].set_rate(None)
    assert running(cluster, 'web') == ([] if side == 'source' else ['h1'])
    nothing_left(a2, 'web')


@pytest.mark.parametrize('side', ['source', 'destination'])
def test_an_agent_killed_in_mid_copy(cluster, a1, a2, side):
    cluster.hosts[0].set_rate('100mbit')
    try:
        by_hand(a1, 'web', rate=20)
        a1.vmmig('send', 'web', '--to', 'h2', '--compress', 'none', '--background')
        eventually('some memory', lambda: a1.json('status', 'web')['job']['wire_bytes'] > MIB)
        victim = a1 if side == 'source' else a2
        victim.kill()
        victim.start()
        eventually('the guest on h1', lambda: running(cluster, 'web') == ['h1']
                   and not (a1.json('status', 'web')['handover'] or {}).get('state'), 60)
    finally:
        cluster.hosts[0].set_rate(None)
    nothing_left(a2, 'web')
    a1.json('send', 'web', '--to', 'h2')
    assert running(cluster, 'web') == ['h2']


CRASHES = [
    ('source', 'handover.before.COMMIT', 'h1'),
    ('source', 'handover.after.COMMIT', 'h2'),
    ('source', 'handover.before.DONE', 'h2'),
    ('destination', 'handover.before.LOADED', 'h1'),
    ('destination', 'handover.before.RUN', 'h2'),
    ('destination', 'handover.after.RUN', 'h2'),
    ('destination', 'handover.before.RUNNING', 'h2'),
]


def test_a_destination_that_is_ready_before_the_source_is(cluster, a1, a2):
    """The source learns late that all is sent. What the destination said before that counts then; the source does not
    wait until it is said again (which is lost here)."""
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    for agent, faults in ((a1, 'attempt.copied=delay:1500'), (a2, 'handover.send.LOADED=drop@2')):
        agent.stop()
        agent.start(faults=faults)
    by_hand(a1, 'web')
    try:
        job = a1.json('send', 'web', '--to', 'h2')
        assert job['pause_ms'] >= 1500
        sent, committed = (a1.log().index(f'to={state}') for state in ('SRC_SENT', 'SRC_COMMITTED'))
        assert 'message=LOADED' not in a1.log()[sent:committed]
        assert running(cluster, 'web') == ['h2']
    finally:
        for agent in (a1, a2):
            agent.stop()
            agent.start()


@pytest.mark.parametrize('side, point, outcome', CRASHES)
def test_an_agent_that_dies_during_the_hand_over(cluster, a1, a2, side, point, outcome):
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    victim = a1 if side == 'source' else a2
    victim.stop()
    victim.start(faults=f'{point}=crash')
    vmm = by_hand(a1, 'web')
    a1.vmmig('send', 'web', '--to', 'h2', '--background')
    eventually('the crash', lambda: victim.process.poll() is not None)
    victim.start(build=fault_build())
    eventually(f'the guest on {outcome}', lambda: running(cluster, 'web') == [outcome], 60)
    time.sleep(0.2)  # a second copy would have begun
    if outcome == 'h2':
        assert said(a2, 'web')[-2:] == ['loaded', 'running']
        eventually('the end of the source', lambda: vmm.poll() is not None)
    else:
        assert vmm.poll() is None
        nothing_left(a2, 'web')


def test_a_silent_vmm_delays_no_hand_over_in_doubt(cluster, a1, a2):
    """A new agent takes it up, and hears its peer, before it knows that another VMM says nothing."""
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    by_hand(a1, 'silent')
    by_hand(a1, 'web')
    a1.stop()
    a1.start(faults='handover.after.COMMIT=crash')
    a1.vmmig('send', 'web', '--to', 'h2', '--background')
    eventually('the crash', lambda: a1.process.poll() is not None)
    silent = vmm_pid(a1, 'silent')
    os.kill(silent, signal.SIGSTOP)
    try:
        a1.start(build=fault_build())
        said = eventually('it says that one is silent', lambda: (log := a1.log()) and 'vm=silent reason=' in log and log, 60)
    finally:
        os.kill(silent, signal.SIGCONT)
    assert 'to=SRC_DONE' in said[:said.index('vm=silent reason=')]
    assert running(cluster, 'web') == ['h2']
    eventually('the silent one', lambda: running(cluster, 'silent') == ['h1'])


def test_without_privileges_and_in_a_cgroup_of_its_own(tmp_path, cluster, a1, a2):
    """The destination's VMM runs as `vm-user`, though its socket is in the agent's own folder."""
    a2.stop()
    a2.options['vm-user'] = 'nobody'
    try:
        a2.start()
        by_hand(a1, 'web')
        a1.json('send', 'web', '--to', 'h2')
        pid = a2.json('status', 'web')['pid']
        with open(f'/proc/{pid}/status', encoding='ascii') as file:
            uids = next(line for line in file if line.startswith('Uid:')).split()[1:]
        assert set(uids) == {subprocess.check_output(['id', '-u', 'nobody'], text=True).strip()}
        a2.json('send', 'web', '--to', 'h1')
        assert running(cluster, 'web') == ['h1']
    finally:
        a2.stop()
        a2.options.pop('vm-user')
        a2.start()
