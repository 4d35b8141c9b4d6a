# SPDX-License-Identifier: Apache-2.0
"""Snapshots of guests whose VMM links libvmmig-attach. In vmmig-vmm a guest runs that checks all of its memory and
numbers its signs of life; the stand-in (tests/flow/standin_vmm.c) has a hash of all its memory in its state, and takes
no state whose memory is of another instant."""
import os
import re
import signal

import pytest
from agents import Cluster, eventually, fault_build
from lab import VmmGuest, huge_pages
from lab.guests import built
from snapshots import export, make_agent

MIB = 1 << 20
HEARTBEAT = re.compile(r'^hb (\d+) ')
STANDIN = 'tests/flow/standin_vmm'
VMMS = f'{built("tools/vmmig-vmm/vmmig-vmm")}\nattach-vmm = {built(STANDIN)}'


@pytest.fixture(scope='module')
def agent():
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        agent = cluster.agents[0]
        agent.options['attach-vmm'] = VMMS
        yield make_agent(cluster, faults='snapshot.memory=delay:0')


def restart(agent, faults='snapshot.memory=delay:0'):
    if agent.process.poll() is None:
        agent.kill()
    agent.start(faults=faults)
    eventually('no VM that is not known yet',
               lambda: not [vm for vm in agent.json('list')['vms'] if vm['presence'] not in ('present', 'ended')])


@pytest.fixture
def boot(agent):
    """Starts VMMs and has the agent adopt them; ends them with the test."""
    def start(vm, faults=None):
        console = agent.cluster.console(vm.name)
        mark = console.mark()
        program = os.path.join(fault_build(), 'tools/vmmig-vmm/vmmig-vmm') if faults else None
        agent.host.popen(vm.argv(program=program), name=vm.name, env={**os.environ, 'VMMIG_FAULTS': faults or ''})
        console.wait_for('ready', timeout=60, after=mark)
        agent.vmmig('attach', vm.name, '--socket', vm.attach_path)
        return console

    yield start
    if agent.process.poll() is not None:
        restart(agent)
    for vm in agent.json('list')['vms']:
        agent.end(vm['vm'])


def names(agent, vm):
    return [s['name'] for s in agent.json('snapshot', 'list', vm)['snapshots']]


def nothing_left(agent):
    assert [argv for argv in agent.host.processes().values() if 'vmmig-guard' in argv[0]] == []
    assert [name for name in os.listdir(agent.host.path('/run/vmmig')) if name.endswith('.snapshot')] == []
    assert os.listdir(agent.host.path('/var/lib/vmmig/scratch')) == []


def heartbeats(console, after):
    return [int(found.group(1)) for line in console.lines[after:] if (found := HEARTBEAT.match(line.text))]


def busy(name, **options):
    return VmmGuest(name, **{'mem_mib': 96, 'below_4g_mib': 64, 'vcpus': 2, 'dirty_mib': 8, 'rate_mbps': 400,
                             'writer': 1000, **options})


def idle(name, **options):
    return VmmGuest(name, mem_mib=64, dirty_mib=1, rate_mbps=1, scan_mbps=20, **options)


# ---- what a user does

def test_a_busy_guest_and_each_instant_of_it(agent, boot):
    """Memory of one instant, whatever the guest wrote meanwhile; each snapshot goes on from its own."""
    vm = busy('busy')
    console = boot(vm)
    taken = []
    for number in range(3):
        before = heartbeats(console, 0)[-1]
        done = agent.json('snapshot', 'busy', f's{number}')
        console.wait_ticks(3)
        taken.append((before, heartbeats(console, 0)[-1]))
        assert done['state'] == 'done' and 0 < done['pause_ms'] < 1000, done
        assert done['snapshot']['memory_bytes'] == 96 * MIB and done['note'] == ''
        nothing_left(agent)
    assert done['snapshot']['parent'] == 'busy@s1'
    console.verify()
    assert console.check() == ['h1']
    shown, = agent.json('snapshot', 'show', 'busy@s2')['snapshots']
    assert {file['name'] for file in shown['files']} == {'memory.raw', 'memory.high.raw', 'device.state', 'vm.json'}
    assert shown['memory'] and b'"vmm": "attach"' in export(agent, 'busy@s2', 'vm.json')
    agent.end('busy')
    for number, (before, after) in enumerate(taken):
        back = f'back{number}'
        console = agent.cluster.console(back)  # its own, since the VMM's command line has its name
        assert agent.json('restore', f'busy@s{number}', '--as', back)['state'] == 'done'
        console.wait_ticks(5)
        first = heartbeats(console, 0)[0]
        assert before <= first <= after + 1, f's{number} of {before} to {after} goes on with {first}'
        console.verify()
        assert console.check() == ['h1']
        status = agent.json('status', back)
        assert (status['state'], status['origin'], status['socket']) == ('running', 'restored', f'/run/vmmig/{back}.vmm')
        assert agent.json('snapshot', back, 'again')['state'] == 'done'  # as any other VM
        agent.end(back)


@pytest.mark.parametrize('options', [{'tracking': 'ring'}, {'tracking': 'plain'}, {'hugetlb': True}],
                         ids=['ring', 'plain', 'hugetlb'])
def test_memory_of_any_make(agent, boot, options):
    vm = busy('-'.join(map(str, options.values())), **options)
    with huge_pages(2 * vm.mem_mib if vm.hugetlb else 0):
        console = boot(vm)
        agent.vmmig('snapshot', vm.name, 'first')
        console.verify()
        agent.end(vm.name)
        back = agent.cluster.console(f'{vm.name}-back')
        agent.vmmig('restore', f'{vm.name}@first', '--as', f'{vm.name}-back')
        back.wait_ticks(5)
        back.verify()
        assert back.check() == ['h1']
        agent.end(f'{vm.name}-back')


def test_an_idle_guest_again_stores_next_to_nothing(agent, boot):
    console = boot(idle('idle', fill='random'))  # whatever time passes, it writes the same MiB
    first = agent.json('snapshot', 'idle', 'one')['snapshot']
    again = agent.json('snapshot', 'idle', 'two')['snapshot']
    assert again['parent'] == 'idle@one'
    assert again['stored_bytes'] < first['stored_bytes'] / 10
    console.verify()


def standin(agent, name, *words, attach=True):
    path = f'/run/vmlab/{name}.vmm'
    vmm = agent.host.popen([built(STANDIN), '--socket', path, *words], name=name)

    def ready():
        with open(vmm.log, encoding='utf-8') as file:
            return 'ready\n' in file.read()
    eventually('the VMM', ready)
    if attach:
        agent.vmmig('attach', name, '--socket', path)
    return vmm


def test_a_paused_guest_stays_paused(agent, boot):
    standin(agent, 'stands', '--rate', '500')
    agent.vmmig('snapshot', 'stands', 'first')
    agent.end('stands')
    agent.vmmig('restore', 'stands@first', '--paused')  # whose `load` compares all memory with its state
    assert agent.json('status', 'stands')['state'] == 'paused'
    done = agent.json('snapshot', 'stands', 'second')
    assert done['pause_ms'] == 0 and agent.json('status', 'stands')['state'] == 'paused'
    nothing_left(agent)
    agent.end('stands')
    agent.vmmig('restore', 'stands@second', '--paused')
    assert agent.json('status', 'stands')['state'] == 'paused'
    again = export(agent, 'stands@second', 'memory.high.raw')
    assert again == export(agent, 'stands@first', 'memory.high.raw')


def test_a_guest_that_its_vmm_holds_is_its_again(agent, boot):
    vmm = standin(agent, 'still', '--still')
    assert agent.json('snapshot', 'still', 'first')['pause_ms'] == 0
    assert agent.json('status', 'still')['state'] == 'paused'
    assert said(vmm)[-1] == 'released'
    nothing_left(agent)


def said(vmm):
    with open(vmm.log, encoding='utf-8') as file:
        return file.read().splitlines()


def wishes(vmm, state):
    """Its user wants it to stand, or to go on."""
    vmm.send_signal(signal.SIGUSR2)
    eventually(f'a guest that is {state}', lambda: said(vmm)[-1] == state)


def test_a_guest_that_its_user_pauses_meanwhile_stays_so(agent, boot):
    """Before its memory is copied, and while it is."""
    vmm = standin(agent, 'naps', '--rate', '20')
    for name, point in (('early', 'attach.send.TRACK'), ('late', 'snapshot.memory')):
        held_at(agent, point, 'naps', name)
        wishes(vmm, 'paused')
        arm(agent, 'none')
        agent.vmmig('watch', 'naps')
        assert said(vmm)[-1] == 'released'
        assert agent.json('status', 'naps')['state'] == 'paused'
        assert b'"state": "paused"' in export(agent, f'naps@{name}', 'vm.json')  # so are its clones
        nothing_left(agent)
        wishes(vmm, 'running')
    agent.end('naps')
    agent.vmmig('restore', 'naps@late')  # whose `load` compares its memory


def test_a_guest_that_its_user_sets_going_meanwhile_runs(agent, boot):
    vmm = standin(agent, 'wakes', '--still')
    held_at(agent, 'attach.send.PAUSE', 'wakes', 'one')
    wishes(vmm, 'running')
    arm(agent, 'none')
    agent.vmmig('watch', 'wakes')
    assert said(vmm)[-1] == 'running'
    assert agent.json('status', 'wakes')['state'] == 'running'
    nothing_left(agent)


def test_an_agent_that_dies_leaves_a_guest_that_its_vmm_holds_as_it_was(agent, boot):
    """At each step: it stands, and is its user's again before any agent is there."""
    vmm = standin(agent, 'rests', '--still')
    for point in [point for point in BEFORE if point != 'snapshot.waiting']:
        heard = len(said(vmm))
        arm(agent, f'{point}=crash')
        assert agent.vmmig('snapshot', 'rests', point.split('.')[1], check=False).returncode == 6
        agent.process.wait(20)
        eventually('a guest that is given back', lambda n=heard: 'released' in said(vmm)[n:])
        restart(agent)
        assert agent.json('status', 'rests')['state'] == 'paused'
        assert said(vmm)[-1] == 'released'
        wishes(vmm, 'running')
        wishes(vmm, 'paused')


@pytest.mark.parametrize('options, words, says', [
    (['--by-hand'], [], 'standin 1 does not say how one is started'),
    ([], ['--disk-only'], 'nothing is known of disks of standin 1'),
    ([], ['--guest-agent', '/dev/null'], 'nothing is known of disks of standin 1'),
])
def test_what_cannot_be_is_refused(agent, boot, options, words, says):
    standin(agent, 'refused', *options)
    refused = agent.vmmig('snapshot', 'refused', 'never', *words, check=False)
    assert refused.returncode == 5 and says in refused.stderr.strip().splitlines()[-1], refused
    assert names(agent, 'refused') == []
    nothing_left(agent)


def test_a_restore_to_another_machine_is_refused(agent, boot):
    """The VMM that is there is not the one of the snapshot: nothing of the attempt is left."""
    standin(agent, 'other')
    agent.vmmig('snapshot', 'other', 'first')
    agent.end('other')
    agent.stop()
    agent.options['attach-vmm'] = built('tools/vmmig-vmm/vmmig-vmm')
    agent.start(faults='snapshot.memory=delay:0')
    try:
        refused = agent.vmmig('restore', 'other@first', check=False)
        assert refused.returncode == 5 and '`attach-vmm`' in refused.stderr, refused
        assert agent.json('list')['vms'] == []
        assert [name for name in os.listdir(agent.host.path('/run/vmmig')) if name.endswith('.vmm')] == []
    finally:
        agent.stop()
        agent.options['attach-vmm'] = VMMS
        agent.start(faults='snapshot.memory=delay:0')


def test_pages_that_are_lost_are_seen(agent, boot):
    """The same, and an agent that loses what was written last: its snapshot cannot be loaded."""
    # The guest may have stood before the last pass but one already: what saving writes is the last pass's in any case.
    standin(agent, 'loses', '--rate', '500', '--save-writes')
    arm(agent, 'attach.paused.run=drop@*')
    try:
        agent.vmmig('snapshot', 'loses', 'some')
    finally:
        arm(agent, 'none')
    agent.end('loses')
    failed = agent.vmmig('restore', 'loses@some', check=False)
    assert failed.returncode == 1 and 'callback `load` failed' in failed.stderr, failed
    assert agent.json('list')['vms'] == []


# ---- when something dies or fails

def arm(agent, fault):
    agent.vmmig('debug', 'faults', '--arm', fault)


def held_at(agent, point, vm, name):
    """A snapshot that is being taken and stands at a fault point."""
    arm(agent, f'{point}=hold')
    agent.vmmig('snapshot', vm, name, '--background')
    eventually('the step', lambda: any(p['holds'] for p in agent.json('debug', 'faults')['points']))


def goes_on(agent, console, vm):
    console.wait_ticks(5)
    console.verify()
    eventually('a running guest', lambda: agent.json('status', vm)['state'] == 'running')
    nothing_left(agent)


BEFORE = ['snapshot.waiting', 'snapshot.memory', 'snapshot.paused', 'snapshot.switched', 'snapshot.copied',
          'snapshot.commit']


def test_the_agent_dies_at_each_step(agent, boot):
    """The guest goes on before any agent is there again; there is no half snapshot."""
    console = boot(busy('steps'))
    for point in [*BEFORE, 'snapshot.committed']:
        name = point.split('.')[1]
        arm(agent, f'{point}=crash')
        assert agent.vmmig('snapshot', 'steps', name, check=False).returncode == 6
        agent.process.wait(20)
        console.wait_ticks(3, 5)
        restart(agent)
        assert (name in names(agent, 'steps')) == (point == 'snapshot.committed')
        eventually('the end of the guard', lambda: not [argv for argv in agent.host.processes().values()
                                                        if 'vmmig-guard' in argv[0]])
        goes_on(agent, console, 'steps')
    assert agent.json('snapshot', 'steps', 'after')['state'] == 'done'
    assert console.check() == ['h1']
    agent.end('steps')
    console = agent.cluster.console('steps-after')
    agent.vmmig('restore', 'steps@after', '--as', 'steps-after')
    console.wait_ticks(3)
    console.verify()


def test_the_agent_and_the_guard_die(agent, boot):
    """Then a guest that was paused stands until the next agent is there."""
    console = boot(busy('both'))
    held_at(agent, 'snapshot.paused', 'both', 'never')
    guard, = [pid for pid, argv in agent.host.processes().items() if 'vmmig-guard' in argv[0]]
    os.kill(guard, signal.SIGKILL)
    agent.kill()
    restart(agent)
    assert names(agent, 'both') == []
    goes_on(agent, console, 'both')
    assert agent.json('snapshot', 'both', 'after')['state'] == 'done'


def test_the_vmm_dies(agent, boot):
    boot(idle('dies'))
    held_at(agent, 'snapshot.memory', 'dies', 'never')
    os.kill(agent.json('status', 'dies')['pid'], signal.SIGKILL)
    arm(agent, 'none')
    failed = agent.vmmig('watch', 'dies', check=False)
    assert failed.returncode == 13, failed
    assert names(agent, 'dies') == []
    nothing_left(agent)


def test_a_cancelled_one(agent, boot):
    console = boot(busy('cancelled'))
    for point in ('snapshot.memory', 'snapshot.paused'):
        held_at(agent, point, 'cancelled', 'never')
        conflict = agent.vmmig('send', 'cancelled', '--to', 'h1', check=False)
        assert conflict.returncode == 4 and 'snapshot' in conflict.stderr
        agent.vmmig('cancel', 'cancelled')
        arm(agent, 'none')
        assert agent.vmmig('watch', 'cancelled', check=False).returncode == 14
        assert names(agent, 'cancelled') == []
        goes_on(agent, console, 'cancelled')


def test_no_room_for_the_copy(agent, boot):
    console = boot(busy('full'))
    arm(agent, 'snapshot.memory=error:ENOSPC')
    failed = agent.vmmig('snapshot', 'full', 'never', check=False)
    assert failed.returncode == 11, failed
    assert names(agent, 'full') == []
    goes_on(agent, console, 'full')


@pytest.mark.parametrize('callback', ['pause', 'save'])
def test_a_callback_that_fails(agent, boot, callback):
    console = boot(busy(f'fails-{callback}'), faults=f'library.call.{callback}=error:EIO')
    failed = agent.vmmig('snapshot', f'fails-{callback}', 'never', check=False)
    assert failed.returncode == 1 and f'callback `{callback}` failed' in failed.stderr, failed
    goes_on(agent, console, f'fails-{callback}')
    assert agent.json('snapshot', f'fails-{callback}', 'once')['state'] == 'done'
    assert names(agent, f'fails-{callback}') == ['once']


def test_a_resume_that_fails_is_tried_again(agent, boot):
    console = boot(busy('again'), faults='library.call.resume=error:EIO')
    assert agent.json('snapshot', 'again', 'once')['state'] == 'done'
    goes_on(agent, console, 'again')
