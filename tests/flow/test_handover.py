# SPDX-License-Identifier: Apache-2.0
"""Agents that die during a migration: afterwards exactly one copy of the guest runs, all of it, and where
nobody can know, an operator decides."""
import contextlib
import fcntl
import os
import re
import signal
import struct
import time

import pytest
from agents import Cluster, eventually, fault_build
from lab import BareGuest, judge

MIB = 1 << 20


@pytest.fixture(scope='module')
def cluster():
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    with Cluster(start=False) as made:
        yield made


@pytest.fixture
def fresh():
    """Hosts whose journals are empty: what is said of the second record is said of the hand-over's."""
    with Cluster(start=False) as made:
        yield made


class Pair:
    """A guest on h1, two agents, and what became of them."""

    def __init__(self, cluster, name, faults=('', ''), **options):
        self.cluster, self.name = cluster, name
        self.a1, self.a2 = cluster.agents[:2]
        for agent, spec in zip(cluster.agents, faults):
            if agent.process and agent.process.poll() is None:
                agent.stop()
            agent.start(faults=spec, build=fault_build())
        self.vm = BareGuest(name, **{'mem_mib': 128, 'dirty_mib': 16, 'rate_mbps': 20, **options})
        self.console = cluster.console(name)
        self.qemu = self.a1.host.popen(self.vm.argv(), name=name)
        self.console.wait_for('ready')
        self.a1.vmmig('attach', name, '--qmp', self.vm.qmp_path)
        self.mark = self.console.mark()

    def begin(self, *options):
        self.a1.vmmig('send', self.name, '--to', 'h2', '--background', *options)

    def wait_death(self, agent):
        eventually(f'the crash of the agent on {agent.host.name}', lambda: agent.process.poll() is not None)

    def running(self):
        """Hosts where a QEMU of this guest runs its vCPUs, as QEMU itself says."""
        found = []
        for host in self.cluster.hosts:
            try:
                if self.vm.qmp(host, wait=0)('query-status')['status'] == 'running':
                    found.append(host.name)
            except OSError:  # a QEMU that was killed leaves its socket, and one that ends takes its answer along
                continue
        return found

    def settled(self):
        """The hosts whose agent has it as present and settled."""
        found = []
        for agent in self.cluster.agents:
            for vm in agent.json('list')['vms']:
                if vm['vm'] == self.name and vm['presence'] == 'present' and vm['state'] == 'running':
                    found.append(agent.host.name)
        return found

    def expect(self, host, timeout=40):
        """Exactly one copy runs, on that host, whole; nothing is left on the other."""
        eventually(f'{self.name} on {host}', lambda: self.settled() == [host] == self.running(), timeout)
        self.console.wait_ticks(5)
        hosts = self.console.check(after=self.mark)
        assert hosts in (['h1'], ['h1', 'h2']) and hosts[-1] == host
        self.console.verify()
        other = next(agent for agent in self.cluster.agents if agent.host.name != host)
        try:
            eventually('nothing left', lambda: not self.left(other))
        except TimeoutError:
            assert self.left(other) == []

    def left(self, agent):
        """What is left on a host. The sockets of the user's own -qmp options do not count: a QEMU whose agent was
        killed while it received ends by itself, and leaves them."""
        return [what for what in judge.leftovers(agent.host, self.name, [agent.process.pid])
                if not what.endswith(('.qmp', '.judge'))]

    @staticmethod
    def ended(agent, pid):
        agent.host.reap()
        return not os.path.exists(f'/proc/{pid}')

    def end(self):
        for agent in self.cluster.agents:
            for vm in agent.json('list')['vms']:
                if vm['vm'] == self.name:
                    if vm['presence'] == 'present':
                        os.kill(vm['pid'], 9)
                        eventually('its end', lambda: self.ended(agent, vm['pid']))
                    agent.vmmig('detach', self.name, check=False)  # it may just have gone by itself


@pytest.mark.parametrize('side', ['source', 'destination'])
def test_an_agent_killed_in_mid_copy(cluster, side):
    """Also what its user had set for migrations of his own is in QEMU as it was."""
    pair = Pair(cluster, f'mid-{side}', fill='random', mem_mib=512)
    monitor = pair.vm.qmp(pair.a1.host)
    judge.set_migration(monitor)
    monitor.close()
    cluster.hosts[0].set_rate('1gbit')
    try:
        pair.begin()
        eventually('some memory', lambda: pair.a1.json('status', pair.name)['job']['wire_bytes'] > 50 * MIB)
        victim = pair.a1 if side == 'source' else pair.a2
        victim.kill()
        time.sleep(0.5)  # the guest runs on while its agent is away
        pair.console.wait_ticks(5)
        victim.start(build=fault_build())
        pair.expect('h1')
        monitor = pair.vm.qmp(pair.a1.host)
        eventually('the settings', lambda: judge.migration_is_set(monitor))
        monitor.close()
    finally:
        cluster.hosts[0].set_rate(None)
    pair.end()


def test_what_the_user_prepared_is_his_also_after_a_restart(cluster):
    """The agent that received into it was killed: the next one ends the QEMU, and leaves the socket of the user's. It
    has another name than that by which a QEMU that quits removes it."""
    pair = Pair(cluster, 'prepared', fill='random', mem_mib=256)
    h2, socket = pair.a2.host, pair.vm.qmp_path.replace('.qmp', '.mine.qmp')
    h2.popen(pair.vm.argv(incoming='defer'), name='prepared')
    eventually('the destination', lambda: os.path.exists(h2.path(pair.vm.judge_path)))
    os.rename(h2.path(pair.vm.qmp_path), h2.path(socket))
    cluster.hosts[0].set_rate('1gbit')
    try:
        pair.begin('--dest-qmp', socket)
        eventually('some memory', lambda: pair.a1.json('status', pair.name)['job']['wire_bytes'] > 20 * MIB)
        pair.a2.kill()
        pair.a2.start(build=fault_build())
        pair.expect('h1')
        assert os.path.exists(h2.path(socket))
    finally:
        cluster.hosts[0].set_rate(None)
        for path in (socket, pair.vm.judge_path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(h2.path(path))
    pair.end()


CRASHES = [
    ('source', 'handover.before.COMMIT', 'h1'),
    ('source', 'handover.after.COMMIT', 'h2'),
    ('source', 'handover.before.DONE', 'h2'),
    ('destination', 'handover.before.LOADED', 'h1'),
    ('destination', 'handover.before.RUN', 'h2'),
    ('destination', 'handover.after.RUN', 'h2'),
    ('destination', 'handover.before.RUNNING', 'h2'),
    ('destination', 'handover.after.RUNNING', 'h2'),
]


@pytest.mark.parametrize('side, point, outcome', CRASHES)
def test_an_agent_that_dies_during_the_hand_over(cluster, side, point, outcome):
    spec = f'{point}=crash'
    pair = Pair(cluster, f'{side[0]}-{point.removeprefix("handover.").replace(".", "-")}',
                faults=(spec, '') if side == 'source' else ('', spec))
    victim = pair.a1 if side == 'source' else pair.a2
    pair.begin()
    pair.wait_death(victim)
    victim.start(build=fault_build())
    pair.expect(outcome)
    pair.end()


def test_a_guest_that_is_not_to_run_arrives_though_the_agent_dies(cluster):
    """The next agent need not let it run, so it need not reach it for that; it is that agent's all the same."""
    pair = Pair(cluster, 'stands', faults=('', 'handover.after.RUN=crash'))
    pair.console.wait_ticks(2)
    monitor = pair.vm.qmp(pair.a1.host)
    monitor('stop')
    monitor.close()
    pair.begin()
    pair.wait_death(pair.a2)
    pair.a2.start(build=fault_build())
    def states(agent):
        return [vm['state'] for vm in agent.json('list')['vms'] if vm['vm'] == 'stands']
    eventually('the end of the hand-over', lambda: not states(pair.a1))
    eventually('its state', lambda: states(pair.a2) == ['paused'])
    assert pair.a2.process.poll() is None and pair.running() == []
    monitor = pair.vm.qmp(pair.a2.host)
    monitor('cont')
    monitor.close()
    pair.expect('h2')
    pair.end()


@pytest.mark.parametrize('runs', [True, False])
def test_what_its_user_did_to_a_guest_in_mid_copy_is_known_after_a_crash(cluster, runs):
    """He let it go on, or stopped it, after the copy had begun. The next agent takes the guest back as he wants it."""
    pair = Pair(cluster, f'changed-{runs}', faults=('handover.before.COMMIT=crash', ''), fill='random')
    pair.console.wait_ticks(2)
    monitor = pair.vm.qmp(pair.a1.host)
    cluster.hosts[0].set_rate('200mbit')
    try:
        if runs:
            monitor('stop')
        pair.begin()
        eventually('some memory', lambda: pair.a1.json('status', pair.name)['job']['wire_bytes'] > 10 * MIB)
        monitor('cont' if runs else 'stop')
        pair.wait_death(pair.a1)
        assert monitor.status() == 'postmigrate'
        pair.a1.start(build=fault_build())
        eventually('the end of the hand-over', lambda: not (known := pair.a1.json('status', pair.name)['handover']) or
                   known['settled'])
        assert monitor.status() == ('running' if runs else 'postmigrate')
        if not runs:
            monitor('cont')
        monitor.close()
        pair.expect('h1')
    finally:
        cluster.hosts[0].set_rate(None)
    pair.end()


def test_what_a_snapshot_left_does_not_wake_a_guest_that_was_sent(cluster):
    """A mark in QEMU by which the next agent lets a guest go on that stands for a snapshot. The guest stands for another
    reason when that agent comes."""
    pair = Pair(cluster, 'marked', faults=('handover.after.COMMIT=hold', 'handover.before.RUN=hold'))
    monitor = pair.vm.qmp(pair.a1.host)
    monitor('object-add', qom_type='secret', id='vmmig-snapshot', data='x')
    pair.begin()
    held(pair.a1, 'handover.after.COMMIT')
    assert 'vmmig-snapshot' not in [child['name'] for child in monitor('qom-list', path='/objects')]
    pair.a1.kill()
    pair.a1.start(build=fault_build())
    held(pair.a2, 'handover.before.RUN')
    eventually('the next agent to know of it', lambda: pair.a1.json('status', 'marked')['presence'] == 'present')
    assert monitor.status() == 'postmigrate'
    monitor.close()
    go_on(pair.a2)
    pair.expect('h2')
    pair.end()


def test_a_name_that_is_arriving_already_keeps_its_socket():
    """Two hosts send VMs of one name. Who is second is refused, and takes nothing from the first."""
    with Cluster(hosts=3, start=False) as cluster:
        pair = Pair(cluster, 'twin', faults=('', 'attempt.ready=hold', ''))
        a3 = cluster.agents[2]
        twin = BareGuest('twin', mem_mib=64, dirty_mib=4)
        a3.host.popen(twin.argv(), name='twin')
        eventually('its monitor', lambda: os.path.exists(a3.host.path(twin.qmp_path)))
        a3.vmmig('attach', 'twin', '--qmp', twin.qmp_path)
        pair.begin()
        held(pair.a2, 'attempt.ready')
        refused = a3.vmmig('send', 'twin', '--to', 'h2', check=False)
        assert refused.returncode and 'receive is under way' in refused.stderr
        go_on(pair.a2)
        eventually('the first to be there', lambda: pair.a2.json('status', 'twin')['state'] == 'running')
        pair.a2.kill()
        pair.a2.start(build=fault_build())
        eventually('the next agent reaches it', lambda: pair.a2.json('status', 'twin')['state'] == 'running')


def test_the_doctor_of_a_host_between_knows_where_a_guest_went(cluster):
    """It came, and its former host's last word was lost; it went back, and only then was it noticed that its VMM here
    has ended."""
    pair = Pair(cluster, 'returns', faults=('handover.send.FINISHED=drop@*', ''), mem_mib=64)
    pair.begin()
    pair.expect('h2')
    pair.a2.vmmig('send', 'returns', '--to', 'h1')
    eventually('the end of the first hand-over', lambda: re.search('vm=returns .*record=(ENDED|DST_CLOSED)', pair.a2.log()))
    finding = advice(pair.a2, 'returns')
    assert finding['owner'] == 'peer' and finding['owner_host'] == 'h1', finding
    assert advice(pair.a1, 'returns')['owner'] == 'here'
    pair.end()


def test_a_destination_that_never_comes_back_needs_an_operator(cluster):
    pair = Pair(cluster, 'doubt', faults=('', 'handover.before.RUN=crash'))
    pair.begin()
    pair.wait_death(pair.a2)
    status = eventually('doubt', lambda: (s := pair.a1.json('status', 'doubt')).get('handover', {}).get(
        'in_doubt') and s)
    assert status['handover']['peer'].startswith('h2')
    assert pair.running() == []
    refused = pair.a1.vmmig('resolve', 'doubt', '--here', '--i-fenced', 'h3', check=False)
    assert refused.returncode == 2 and 'h2' in refused.stderr
    late = pair.a1.vmmig('cancel', 'doubt', check=False)
    assert late.returncode == 5 and 'too late' in late.stderr
    pair.a2.host.crash()  # the operator fences h2
    pair.a1.vmmig('resolve', 'doubt', '--here', '--i-fenced', 'h2')
    eventually('the guest on h1', lambda: pair.running() == ['h1'])
    pair.console.wait_ticks(5)
    assert pair.console.check(after=pair.mark) == ['h1']
    pair.console.verify()
    pair.a2.start(build=fault_build())
    pair.end()


def commit_in_doubt(cluster, name, faults='handover.before.RUN=crash'):
    """A guest whose source has committed itself, and whose destination died before it heard."""
    pair = Pair(cluster, name, faults=('', faults), mem_mib=64)
    pair.begin()
    pair.wait_death(pair.a2)
    eventually('doubt', lambda: (pair.a1.json('status', name)['handover'] or {}).get('in_doubt'))
    pair.a2.host.crash()
    return pair


def advice(agent, name):
    finding, = agent.json('doctor', name)['findings']
    return finding


def test_a_guest_that_somebody_wakes_in_doubt_is_stopped(cluster):
    """Also when its agent was away at that time."""
    pair = commit_in_doubt(cluster, 'woken')
    monitor = pair.vm.qmp(pair.a1.host)
    for away in (False, True):
        if away:
            pair.a1.kill()
        monitor('cont')
        assert monitor.status() == 'running' or not away
        if away:
            pair.a1.start(build=fault_build())
        monitor.wait_status('paused', timeout=15)
        eventually('it to be said', lambda: 'somebody set it going here meanwhile' in advice(pair.a1, 'woken')['why'])
        assert 'somebody set the guest going' in pair.a1.log()
    monitor.close()
    pair.a2.start(build=fault_build())  # whose copy is gone
    pair.expect('h1')
    pair.end()


def test_a_guest_that_somebody_wakes_before_commit_stays(cluster):
    """What was sent is not the guest any more."""
    pair = Pair(cluster, 'woken-early', ('', 'attempt.loaded=hold'), mem_mib=64)
    pair.begin()
    held(pair.a2, 'attempt.loaded')
    monitor = pair.vm.qmp(pair.a1.host)
    monitor('cont')
    monitor.close()
    go_on(pair.a2)
    pair.expect('h1')
    assert pair.a1.vmmig('watch', 'woken-early', check=False).returncode == 5
    pair.end()


def test_an_operator_gives_up_a_copy_step_by_step(cluster):
    pair = commit_in_doubt(cluster, 'given-up')
    said = pair.a1.vmmig('status', 'given-up').stdout
    assert 'resolve given-up --here --i-fenced' in said and 'resolve given-up --gone' in said
    began = time.monotonic()
    pair.a1.vmmig('resolve', 'given-up', '--gone')
    assert pair.ended(pair.a1, pair.qemu.pid)
    said = pair.a1.vmmig('status', 'given-up').stdout
    assert 'the destination has the only copy' in said and '--here' not in said
    assert advice(pair.a1, 'given-up')['owner'] == 'undecided'
    refused = pair.a1.vmmig('resolve', 'given-up', '--here', '--i-fenced', 'h2', check=False)
    assert refused.returncode == 5 and '--here means nothing' in refused.stderr, refused
    pair.a1.vmmig('resolve', 'given-up', '--gone')
    assert time.monotonic() - began < 10  # nothing of this waits for a host that is away
    assert 'an operator gave up' in advice(pair.a1, 'given-up')['why']
    pair.a2.start(build=fault_build())
    pair.end()


def test_a_guest_that_is_taken_back_is_not_in_doubt(cluster):
    """The destination says NEVER, the guest runs on, the agent dies before it has recorded so, the destination's host
    is gone: nothing may be said of it by which an operator kills the only copy."""
    pair = Pair(cluster, 'taken-back', faults=('handover.before.ABORTED=crash', 'attempt.resume=error'), mem_mib=64)
    pair.begin()
    pair.wait_death(pair.a1)
    assert pair.running() == ['h1']
    pair.a2.host.crash()
    pair.a1.start(build=fault_build())
    eventually('an end', lambda: (vm := pair.a1.json('status', 'taken-back'))['state'] == 'running' and
               vm['handover']['settled'])
    assert not pair.a1.json('status', 'taken-back')['handover']['in_doubt']
    assert advice(pair.a1, 'taken-back')['owner'] == 'here'
    refused = pair.a1.vmmig('resolve', 'taken-back', '--gone', check=False)
    assert refused.returncode != 0 and pair.running() == ['h1']
    pair.console.wait_ticks(5)
    pair.console.verify()
    pair.a2.start(build=fault_build())
    pair.end()


def let_a_bystander_go(pair, name):
    """Another VM, which its user has stopped: the record may be of it as well. What is decided about that VM decides
    nothing about the first."""
    other = BareGuest('bystander', mem_mib=64, dirty_mib=4)
    console = pair.cluster.console('bystander')
    pair.a1.host.popen(other.argv(), name='bystander')
    console.wait_for('ready')
    pair.a1.vmmig('attach', 'bystander', '--qmp', other.qmp_path)
    monitor = other.qmp(pair.a1.host)
    monitor('stop')
    monitor.close()
    assert advice(pair.a1, 'bystander')['owner'] == 'undecided'
    pair.a1.vmmig('resolve', 'bystander', '--here', '--i-fenced', 'h2')
    assert advice(pair.a1, 'bystander')['owner'] == 'here' and advice(pair.a1, name)['owner'] == 'undecided'
    pair.a1.end('bystander')


@pytest.mark.parametrize('verdict', ['here', 'gone'])
def test_a_damaged_record_leaves_the_guest_to_an_operator(fresh, verdict):
    """What COMMIT left on the disk is damaged, and the source's agent is restarted: nobody there knows of the
    hand-over, and nobody claims to."""
    name = f'damaged-{verdict}'
    pair = Pair(fresh, name, faults=('journal.record=corrupt@2,handover.after.COMMIT=crash', ''), mem_mib=64)
    pair.begin()
    pair.wait_death(pair.a1)
    pair.a1.start(build=fault_build())
    eventually('the destination to ask', lambda: advice(pair.a2, name)['state'] == 'DST_LOADED')
    finding = advice(pair.a1, name)
    assert finding['owner'] == 'undecided' and f'resolve {name} --gone' in finding['advice'], finding
    assert advice(pair.a2, name)['owner'] == 'undecided' and pair.running() == []
    if verdict == 'here':
        let_a_bystander_go(pair, name)
        pair.a2.host.crash()  # the operator fences it
        pair.a1.vmmig('resolve', name, '--here', '--i-fenced', 'h2')
        pair.a2.start(build=fault_build())
    else:
        pair.a1.vmmig('resolve', name, '--gone')
        assert pair.ended(pair.a1, pair.qemu.pid)
        pair.a2.vmmig('resolve', name, '--here', '--i-fenced', 'h1')
    pair.expect('h1' if verdict == 'here' else 'h2')
    assert not [f for f in pair.a1.json('doctor')['findings'] if not f['vm']]
    pair.end()


@pytest.mark.parametrize('fault, outcome', [('attempt.copied=crash', 'h1'), ('handover.after.COMMIT=crash', 'h2')])
def test_an_agent_whose_word_of_the_vm_is_damaged(cluster, fault, outcome):
    """The registry's file of a VM is damaged when its agent restarts in the hand-over: the journal knows how to reach
    it."""
    name = f'lost-word-{outcome}'
    pair = Pair(cluster, name, faults=(fault, ''), mem_mib=64)
    pair.begin()
    pair.wait_death(pair.a1)
    with open(pair.a1.host.path(f'/var/lib/vmmig/vms/{name}.vm'), 'r+b') as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    pair.a1.start(build=fault_build())
    pair.expect(outcome)
    if outcome == 'h1':
        assert pair.a1.json('status', name)['pid'] == pair.qemu.pid
        pair.a1.vmmig('send', name, '--to', 'h2')  # as good as it was
        pair.expect('h2')
    pair.end()


class ImageLock:
    """Locks of a file that belong to a descriptor, as QEMU's locks of its images do."""
    GET, SET, FORM = 36, 37, 'hh4xqqi4x'  # F_OFD_GETLK, F_OFD_SETLK, struct flock

    def __init__(self, path):
        self.path = path

    def is_held(self):
        with open(self.path, 'r+b') as file:
            found = fcntl.fcntl(file, self.GET, struct.pack(self.FORM, fcntl.F_WRLCK, 0, 0, 0, 0))
        return struct.unpack(self.FORM, found)[0] != fcntl.F_UNLCK

    @contextlib.contextmanager
    def taken(self):
        with open(self.path, 'r+b') as file:
            fcntl.fcntl(file, self.SET, struct.pack(self.FORM, fcntl.F_WRLCK, 0, 0, 0, 0))
            yield


def with_disk(cluster, name, faults):
    disk = f'{cluster.shared}/{name}.raw'
    with open(disk, 'wb') as file:
        file.truncate(1 << 20)
    pair = Pair(cluster, name, faults=faults, mem_mib=64, options=[
        '-drive', f'if=none,id=disk0,format=raw,file={disk}', '-device', 'virtio-blk-pci,drive=disk0'])
    return pair, ImageLock(disk)


def held(agent, point):
    def look():
        return next(p for p in agent.json('debug', 'faults')['points'] if p['name'] == point)['holds']
    eventually(f'{point} to be reached', look)


def go_on(agent):
    agent.vmmig('debug', 'faults', '--arm', 'none')


def test_nobody_holds_the_image_while_it_changes_hands(cluster):
    """QEMU's locking is left on: who runs has its images locked. Between saving and running nobody has."""
    pair, image = with_disk(cluster, 'images', ('', 'handover.before.RUN=hold'))
    assert image.is_held()
    pair.begin()
    held(pair.a2, 'handover.before.RUN')
    assert not image.is_held() and pair.running() == []
    go_on(pair.a2)
    pair.expect('h2')
    assert image.is_held()
    pair.end()


def test_an_image_that_somebody_else_has_locked(cluster):
    """The destination cannot start the guest: it is dead before the source tries, which cannot either, says so, and does
    as soon as it can."""
    pair, image = with_disk(cluster, 'foreign-lock', ('attempt.resume=hold', 'handover.before.RUN=hold'))
    pair.begin()
    held(pair.a2, 'handover.before.RUN')
    with image.taken():
        go_on(pair.a2)
        held(pair.a1, 'attempt.resume')
        assert not [argv for argv in pair.a2.host.processes().values() if 'foreign-lock' in argv]
        assert pair.running() == []
        go_on(pair.a1)
        eventually('it to be said', lambda: 'does not start: trying again' in
                   pair.a1.vmmig('status', 'foreign-lock').stdout)
        assert advice(pair.a1, 'foreign-lock')['owner'] == 'here' and pair.running() == []
    pair.expect('h1')
    assert image.is_held()
    pair.end()


def test_an_answer_that_is_lost_and_a_guest_that_cannot_start(cluster):
    """After that a refusal proves nothing: the guest stays the destination's, which says that it does not start, and
    starts it as soon as it can."""
    pair, image = with_disk(cluster, 'unsure', ('', 'handover.before.RUN=hold'))
    pair.begin()
    held(pair.a2, 'handover.before.RUN')
    with image.taken():
        pair.a2.vmmig('debug', 'faults', '--arm', 'qmp.cont.answer=corrupt')
        eventually('it to be said', lambda: 'owned, but the VM does not start: trying again' in
                   pair.a2.vmmig('status', 'unsure').stdout)
        assert advice(pair.a2, 'unsure')['owner'] == 'here' and pair.running() == []
        assert advice(pair.a1, 'unsure')['owner'] == 'undecided'
    pair.expect('h2')
    assert image.is_held()
    pair.end()


def test_a_vmm_that_hangs_is_not_waited_for_in_silence(cluster):
    """After RUN, and the agent starts anew: status says that the guest does not start, and a cancel that it is too late."""
    pair = Pair(cluster, 'hangs', ('', 'handover.after.RUN=hold'), mem_mib=64)
    pair.begin()
    held(pair.a2, 'handover.after.RUN')
    vmm = next(pid for pid, argv in pair.a2.host.processes().items() if 'qemu' in argv[0])
    os.kill(vmm, signal.SIGSTOP)
    try:
        pair.a2.kill()
        pair.a2.start(build=fault_build())
        eventually('it to be said', lambda: 'owned, but the VM does not ' in pair.a2.vmmig('status', 'hangs').stdout)
        for agent in (pair.a1, pair.a2):
            done = agent.vmmig('cancel', 'hangs', check=False)
            assert done.returncode == 5 and 'too late' in done.stderr, done
    finally:
        os.kill(vmm, signal.SIGCONT)
    pair.expect('h2')
    pair.end()


def test_a_cancel_after_commit_is_too_late_for_the_next_agent_too(cluster):
    pair = Pair(cluster, 'decided', ('handover.after.COMMIT=crash', 'handover.before.RUN=hold'), mem_mib=64)
    pair.begin()
    pair.wait_death(pair.a1)
    pair.a1.start(build=fault_build())
    eventually('its hand-over', lambda: 'committed' in pair.a1.vmmig('status', 'decided').stdout)
    done = pair.a1.vmmig('cancel', 'decided', check=False)
    assert done.returncode == 5 and 'too late' in done.stderr, done
    go_on(pair.a2)
    pair.expect('h2')
    pair.end()


def test_a_source_that_cannot_run_on_and_dies(cluster):
    """Cancelled when the destination had loaded all, and could not say so: while the source's VMM stands as it was sent,
    its death costs nothing."""
    pair = Pair(cluster, 'dies-standing', faults=('attempt.resume=error@*', 'handover.send.LOADED=hold'), mem_mib=64)
    pair.begin()
    held(pair.a2, 'handover.send.LOADED')
    pair.a1.vmmig('cancel', 'dies-standing', check=False)
    eventually('it to be said', lambda: 'does not start: trying again' in
               pair.a1.vmmig('status', 'dies-standing').stdout)
    pair.qemu.kill()
    pair.qemu.wait()
    eventually('the question', lambda: 'asking for the destination' in
               pair.a1.vmmig('status', 'dies-standing').stdout)
    assert advice(pair.a1, 'dies-standing')['owner'] == 'undecided' and pair.running() == []
    go_on(pair.a2)
    pair.expect('h2')
    pair.end()


def test_cancel_before_the_pause_leaves_the_guest_where_it_is(cluster):
    pair = Pair(cluster, 'cancelled', fill='random', mem_mib=512)
    cluster.hosts[0].set_rate('100mbit')
    try:
        pair.begin()
        eventually('some memory', lambda: pair.a1.json('status', pair.name)['job']['wire_bytes'] > 5 * MIB)
        pair.a1.vmmig('cancel', 'cancelled')
        done = pair.a1.vmmig('watch', 'cancelled', check=False)
        assert done.returncode == 14
        pair.expect('h1')
    finally:
        cluster.hosts[0].set_rate(None)
    pair.end()


def test_a_guest_that_stands_goes_on_after_a_cancel_and_after_a_cut(cluster):
    """Its QEMU gave everything away, and the destination never acknowledges the last of it. The agents are patient with
    a link: that is not what frees the guest."""
    for agent in cluster.agents:
        agent.options['peer-timeout'] = '60000'
    pair = Pair(cluster, 'withheld', mem_mib=64)

    def stand():
        pair.a2.vmmig('debug', 'faults', '--arm', 'stream.write=hold')
        pair.begin()
        eventually('a guest that stands', lambda: pair.vm.qmp(pair.a1.host)('query-status')['status'] == 'postmigrate')
        assert pair.a1.json('status', 'withheld')['job']['state'] == 'running'

    def goes_on(timeout):
        eventually('the guest goes on', lambda: pair.running() == ['h1'], timeout)
        return pair.a1.vmmig('watch', 'withheld', check=False)

    try:
        stand()
        pair.a1.vmmig('cancel', 'withheld')
        assert goes_on(timeout=10).returncode == 14
        pair.a2.vmmig('debug', 'faults', '--arm', 'none')
        eventually('nothing left', lambda: not pair.left(pair.a2) and not pair.a2.json('list')['vms'])
        stand()
        cluster.hosts[0].cut()
        done = goes_on(timeout=20)
        assert done.returncode == 10 and 'the link was lost while the guest stood' in done.stderr
        cluster.hosts[0].heal()
        pair.a2.vmmig('debug', 'faults', '--arm', 'none')
        pair.expect('h1')
        pair.end()
    finally:
        cluster.hosts[0].heal()
        for agent in cluster.agents:
            del agent.options['peer-timeout']


def test_a_guest_does_not_stand_for_a_destination_that_takes_nothing(cluster, monkeypatch):
    """The link is there, and nothing moves over it: that is waited for as long as a destination may load, 30 s, here a
    tenth of that."""
    monkeypatch.setenv('VMMIG_PATIENCE', '10')
    pair = Pair(cluster, 'stuck', faults=('', 'stream.write=hold'), mem_mib=64)
    pair.begin()
    done = pair.a1.vmmig('watch', 'stuck', check=False)
    assert done.returncode == 10 and 'the destination took nothing while the guest stood' in done.stderr, done
    eventually('the guest goes on', lambda: pair.running() == ['h1'])
    pair.a2.vmmig('debug', 'faults', '--arm', 'none')
    pair.expect('h1')
    pair.end()


@pytest.mark.parametrize('how', ['frozen', 'cut'])
def test_a_source_that_falls_silent_does_not_hold_the_destination(cluster, monkeypatch, how):
    """Its connections stay. It is waited for as long as it waits for a link, here 2 s, and 10 s more, here a tenth."""
    monkeypatch.setenv('VMMIG_PATIENCE', '10')
    h1, _ = cluster.hosts
    for agent in cluster.agents:
        agent.options['peer-timeout'] = '2000'
    pair = Pair(cluster, f'silent-{how}', fill='random', mem_mib=512)
    try:
        h1.set_rate('100mbit')
        pair.begin()
        eventually('some memory', lambda: pair.a1.json('status', pair.name)['job']['wire_bytes'] > 5 * MIB)
        assert [vm['vm'] for vm in pair.a2.json('list')['vms']] == [pair.name]
        if how == 'frozen':
            pair.a1.process.send_signal(signal.SIGSTOP)
        else:
            h1.cut('out')
        eventually('nothing left', lambda: not pair.left(pair.a2) and not pair.a2.json('list')['vms'])
        assert 'nothing came from the source for 3 s' in pair.a2.log()
        pair.console.wait_ticks(5)
        pair.a1.process.send_signal(signal.SIGCONT)
        done = pair.a1.vmmig('watch', pair.name, check=False)
    finally:
        pair.a1.process.send_signal(signal.SIGCONT)
        h1.set_rate(None)
        for agent in cluster.agents:
            del agent.options['peer-timeout']
    assert done.returncode == 10, done
    if how == 'frozen':
        assert 'the peer: nothing came from the source for 3 s' in done.stderr
    pair.expect('h1')
    pair.end()


def test_a_link_that_comes_back_when_the_destination_has_given_up(cluster, monkeypatch):
    """The source is patient, the destination waits for 3 s: its reason is what the user is told, whatever connection
    comes first."""
    monkeypatch.setenv('VMMIG_PATIENCE', '10')
    h1, _ = cluster.hosts
    a1, a2 = cluster.agents
    a1.options['peer-timeout'], a2.options['peer-timeout'] = '60000', '2000'
    pair = Pair(cluster, 'too-late', fill='random', mem_mib=512)
    try:
        h1.set_rate('100mbit')
        pair.begin('--connections', '8')
        eventually('some memory', lambda: a1.json('status', pair.name)['job']['wire_bytes'] > 5 * MIB)
        h1.cut()
        eventually('nothing left', lambda: not pair.left(a2) and not a2.json('list')['vms'])
        h1.set_rate(None)
        done = a1.vmmig('watch', pair.name, check=False)
    finally:
        h1.set_rate(None)
        for agent in cluster.agents:
            del agent.options['peer-timeout']
    assert done.returncode == 10 and re.search(
        r'(the peer|the receiver ended channel \d): (nothing came from the source|no data connection) for 3 s',
        done.stderr), done
    pair.expect('h1')
    pair.end()


@pytest.mark.full
def test_a_link_that_comes_back_when_tcp_has_given_it_up(cluster):
    """After 30 s the destination has no connection left of a source that waits for 60."""
    h1, _ = cluster.hosts
    for agent in cluster.agents:
        agent.options['peer-timeout'] = '60000'
    pair = Pair(cluster, 'long-cut', fill='random', mem_mib=512)
    try:
        h1.set_rate('100mbit')
        pair.begin()
        eventually('some memory', lambda: pair.a1.json('status', pair.name)['job']['wire_bytes'] > 5 * MIB)
        h1.cut()
        time.sleep(40)  # the length of the outage is what is tested
        assert pair.a2.log().count('connection of a channel lost') > 1
        h1.set_rate(None)
        job = pair.a1.json('watch', pair.name)
        assert job['state'] == 'done' and job['resent_bytes'] == 0
        pair.expect('h2')
    finally:
        h1.set_rate(None)
        for agent in cluster.agents:
            del agent.options['peer-timeout']
    pair.end()


def test_a_stream_that_cannot_be_taken_apart_is_relayed(cluster):
    """As one of a QEMU with a live section before its memory: nothing of it goes as pages, and all of it arrives."""
    pair = Pair(cluster, 'opaque', faults=('stream.opaque=error', ''), fill='random')
    job = pair.a1.json('send', 'opaque', '--to', 'h2')
    assert job['opaque_bytes'] > 128 * MIB
    assert sum(encoding['pages'] for encoding in job['pages'].values()) == 0
    pair.expect('h2')
    pair.end()


def test_a_guest_that_dies_at_the_source_ends_the_job(cluster):
    pair = Pair(cluster, 'dies', fill='random', mem_mib=512)
    cluster.hosts[0].set_rate('100mbit')
    try:
        pair.begin()
        eventually('some memory', lambda: pair.a1.json('status', pair.name)['job']['wire_bytes'] > 5 * MIB)
        pid = pair.a1.json('status', 'dies')['pid']
        os.kill(pid, 9)
        done = pair.a1.vmmig('watch', 'dies', check=False)
        assert done.returncode == 13, done.stderr
        # Whoever sees it first says so.
        assert re.fullmatch(rf"vmmig: (the VM's process {pid} ended|QEMU's connection was lost during the migration|"
                            r'.*QEMU closed the connection)', done.stderr.splitlines()[-1]), done.stderr
        eventually('nothing left', lambda: not pair.left(pair.a2), timeout=40)
    finally:
        cluster.hosts[0].set_rate(None)
    pair.end()
