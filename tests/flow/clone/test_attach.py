# SPDX-License-Identifier: Apache-2.0
"""Templates of guests whose VMM links libvmmig-attach, and their clones: vmmig-vmm's guest numbers its signs of life and
checks all of its memory."""
import os
import re
import signal

import pytest
from agents import UNPRIVILEGED, Cluster, eventually, fault_build
from lab import VmmGuest
from lab.guests import built

from .test_clone import fetchers, leases, make_agent, tool

HEARTBEAT = re.compile(r'^hb (\d+) ')
STANDIN = 'tests/flow/standin_vmm'


def heartbeats(console):
    return [int(found.group(1)) for line in console.lines if (found := HEARTBEAT.match(line.text))]


@pytest.fixture(scope='module')
def agent():
    with Cluster(hosts=2, start=False, plain=True) as cluster:
        for one in cluster.agents:
            one.options['attach-vmm'] = f'{built("tools/vmmig-vmm/vmmig-vmm")}\nattach-vmm = {built(STANDIN)}'
        agent = make_agent(cluster, fault_build())
        restart(agent)
        yield agent


def restart(agent):
    if agent.process.poll() is None:
        agent.kill()
    agent.start(build=fault_build())
    eventually('no VM that is not known yet',
               lambda: not [vm for vm in agent.json('list')['vms'] if vm['presence'] not in ('present', 'ended')])


def snapshot_of(agent, vm):
    """A first snapshot, of a guest that is gone since, and between which signs of life it was taken."""
    console = agent.cluster.console(vm.name)
    agent.host.popen(vm.argv(), name=vm.name)
    console.wait_for('ready', timeout=60)
    agent.vmmig('attach', vm.name, '--socket', vm.attach_path)
    console.wait_ticks(1)
    before = heartbeats(console)[-1]
    agent.vmmig('snapshot', vm.name, 'first')
    console.wait_ticks(2)
    after = heartbeats(console)[-1]
    agent.end(vm.name)
    return before, after


@pytest.fixture(scope='module')
def template(agent):
    """busy:v1, with memory in two slots."""
    vm = VmmGuest('busy', mem_mib=96, below_4g_mib=64, vcpus=2, dirty_mib=8, rate_mbps=100, writer=500)
    instant = snapshot_of(agent, vm)
    return {**agent.json('template', 'publish', 'busy@first', 'busy:v1'), 'instant': instant}


@pytest.fixture(autouse=True)
def nothing_is_left(agent):
    yield
    restart(agent)
    for vm in agent.json('list')['vms']:
        agent.end(vm['vm'])
    eventually('no lease', lambda: leases(agent) == [])


def shared_memory(pid):
    """The files that a process maps as memory which is its own only when written."""
    with open(f'/proc/{pid}/maps', encoding='ascii') as maps:
        return sorted(os.path.basename(line.split()[-1]) for line in maps if 'rw-p' in line and line.rstrip().endswith('.raw'))


def test_clones_go_on_where_the_snapshot_was(agent, template):
    consoles = [agent.cluster.console(f'many-{i}') for i in (1, 2)]
    made = agent.json('clone', 'busy:v1', '--as', 'many', '--count', '2')['clones']
    before, after = template['instant']
    for clone, console in zip(made, consoles):
        console.wait_ticks(10)
        assert before <= heartbeats(console)[0] <= after
        console.verify()
        assert console.check() == ['h1']
        assert shared_memory(clone['pid']) == ['memory.high.raw', 'memory.raw']
        assert ['a name of its own' in note for note in clone['notes']] == [True]
        status = agent.json('status', clone['vm'])
        assert (status['state'], status['socket']) == ('running', f'/run/vmmig/{clone["vm"]}.vmm')


def test_one_runs_on_whatever_becomes_of_template_and_agent(agent, template):
    console = agent.cluster.console('lives')
    agent.vmmig('template', 'publish', 'busy@first', 'other:v1')
    agent.vmmig('clone', 'other:v1', '--as', 'lives')
    agent.vmmig('template', 'delete', 'other:v1')
    tool(agent, 'collect', '1000')
    agent.kill()
    console.wait_ticks(5)
    restart(agent)
    assert agent.json('status', 'lives')['state'] == 'running'
    console.verify()  # every page, also those that were never read before
    assert console.check() == ['h1']


def test_a_clone_is_snapshotted(agent, template):
    """While it writes, twice; it shares with its template what it did before, and each snapshot is a whole guest."""
    console = agent.cluster.console('taken')
    made, = agent.json('clone', 'busy:v1', '--as', 'taken')['clones']
    console.wait_ticks(3)
    signs = []
    for name in ('one', 'two'):
        console.wait_ticks(2)
        before = heartbeats(console)[-1]
        assert agent.json('snapshot', 'taken', name)['state'] == 'done'
        console.wait_ticks(2)
        signs.append((before, heartbeats(console)[-1]))
    console.verify()
    assert console.check() == ['h1'] and shared_memory(made['pid']) == ['memory.high.raw', 'memory.raw']
    agent.end('taken')
    for name, (before, after) in zip(('one', 'two'), signs):
        console = agent.cluster.console(f'back-{name}')
        assert agent.json('restore', f'taken@{name}', '--as', f'back-{name}')['state'] == 'done'
        console.wait_ticks(3)
        assert before <= heartbeats(console)[0] <= after
        console.verify()
        assert console.check() == ['h1'] and shared_memory(agent.json('status', f'back-{name}')['pid']) == []


def test_a_clone_is_moved(agent, template):
    """To a host that has nothing of the template: all of its memory goes along, and is its own from then on."""
    there = agent.cluster.agents[1]
    there.start(build=fault_build())
    console = agent.cluster.console('moves')
    agent.vmmig('clone', 'busy:v1', '--as', 'moves')
    console.wait_ticks(3)
    mark = console.mark()
    assert agent.json('send', 'moves', '--to', 'h2')['state'] == 'done'
    console.wait_ticks(5)
    console.verify()
    assert console.check(mark)[-1] == 'h2'
    assert shared_memory(there.json('status', 'moves')['pid']) == []
    there.end('moves')
    there.stop()


def test_a_clone_whose_memory_cannot_be_read_stays(agent, template):
    """By an agent that may not trace processes."""
    console = agent.cluster.console('stays')
    agent.vmmig('clone', 'busy:v1', '--as', 'stays')
    agent.kill()
    agent.start(build=fault_build(), wrapper=UNPRIVILEGED)
    eventually('the VM', lambda: agent.json('status', 'stays')['presence'] == 'present')
    there = agent.cluster.agents[1]
    there.start(build=fault_build())
    for words in (['snapshot', 'stays', 'never'], ['send', 'stays', '--to', 'h2']):
        refused = agent.vmmig(*words, check=False)
        assert refused.returncode == 5, refused
        assert 'this guest is a clone, whose memory is private to its VMM' in refused.stderr.strip().splitlines()[-1]
    there.stop()
    console.wait_ticks(3)
    assert agent.json('status', 'stays')['state'] == 'running'
    there.stop()


@pytest.mark.parametrize('ends', ['cancelled', 'by itself'])
def test_a_copy_does_not_wait_for_ever_for_a_clones_memory(agent, monkeypatch, ends):
    """Nothing answers for most of it, which the guest does not look at, nor anybody has before."""
    name = 'calm-' + ends.replace(' ', '-')
    snapshot_of(agent, VmmGuest(name, mem_mib=96, dirty_mib=4, rate_mbps=5, scan_mbps=0))
    agent.vmmig('template', 'publish', f'{name}@first', f'{name}:v1')
    there = agent.cluster.agents[1]
    there.start(build=fault_build())
    if ends == 'by itself':
        agent.kill()
        monkeypatch.setenv('VMMIG_PATIENCE', '20')  # 3 s instead of a minute
        agent.start(build=fault_build())
        monkeypatch.undo()
    agent.vmmig('clone', f'{name}:v1', '--as', name)
    console = agent.cluster.console(name)
    console.wait_ticks(120)  # it has been round in what it writes
    stopped = fetchers(agent)
    assert stopped
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        agent.vmmig('send', name, '--to', 'h2', '--background')
        if ends == 'cancelled':
            eventually('it waits', lambda: readers(agent))
            agent.vmmig('cancel', name)
        done = agent.vmmig('watch', name, check=False, timeout=60)
        if ends == 'cancelled':
            assert done.returncode == 14, done
        else:
            assert done.returncode == 10 and 'what lies behind it has not answered for 3 s' in done.stderr, done
        console.wait_ticks(5)
        assert agent.json('status', name)['state'] == 'running'
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    eventually('nothing reads', lambda: not readers(agent))
    mark = console.mark()
    assert agent.json('send', name, '--to', 'h2')['state'] == 'done'
    console.wait_ticks(3)
    console.verify()
    assert console.check(after=mark) == ['h1', 'h2']
    there.end(name)
    there.stop()


def readers(agent):
    """The processes that read the memory of a clone for its agent."""
    return [pid for pid in agent.host.processes() if comm(pid) == 'vmmig-reader']


def comm(pid):
    try:
        with open(f'/proc/{pid}/comm', encoding='ascii') as file:
            return file.read().strip()
    except OSError:
        return None


@pytest.mark.parametrize('words, says', [
    (['--disk-size', '1G'], 'no disk to make larger'),
    (['--set', 'net0=tap7'], 'nothing is known of NICs'),
])
def test_what_it_has_not_is_refused(agent, template, words, says):
    refused = agent.vmmig('clone', 'busy:v1', '--as', 'never', *words, check=False)
    assert refused.returncode == 5 and says in refused.stderr, refused
    assert agent.json('list')['vms'] == []


def test_a_vmm_that_takes_no_files(agent):
    """It can be restored, and not cloned; nothing of the attempt is left."""
    path = '/run/vmlab/plain.vmm'
    vmm = agent.host.popen([built(STANDIN), '--socket', path], name='plain')

    def ready():
        with open(vmm.log, encoding='utf-8') as file:
            return 'ready\n' in file.read()
    eventually('the VMM', ready)
    agent.vmmig('attach', 'plain', '--socket', path)
    agent.vmmig('snapshot', 'plain', 'first')
    agent.vmmig('template', 'publish', 'plain@first', 'plain:v1')
    agent.end('plain')
    refused = agent.vmmig('clone', 'plain:v1', '--as', 'never', check=False)
    assert refused.returncode == 5 and "cannot run on a template's memory" in refused.stderr, refused
    assert agent.json('list')['vms'] == []
    assert [argv for argv in agent.host.processes().values() if 'standin' in argv[0]] == []
    assert [name for name in os.listdir(agent.host.path('/run/vmmig')) if name.endswith('.vmm')] == []


@pytest.mark.parametrize('point', ['clone.leased', 'clone.spawn', 'clone.spawned', 'clone.kept'])
def test_the_agent_dies(agent, template, point):
    """There is a whole clone, or none."""
    console = agent.cluster.console(f'dies-{point}')
    agent.vmmig('debug', 'faults', '--arm', f'{point}=crash')
    assert agent.vmmig('clone', 'busy:v1', '--as', f'dies-{point}', check=False).returncode == 6
    agent.process.wait(20)
    restart(agent)
    if point == 'clone.kept':
        console.wait_ticks(3)
        console.verify()
        return
    assert agent.json('list')['vms'] == []
    eventually('no VMM', lambda: agent.host.reap() or [argv for argv in agent.host.processes().values()
                                                       if 'vmmig-vmm' in argv[0]] == [])
    assert [name for name in os.listdir(agent.host.path('/run/vmmig')) if name.endswith('.vmm')] == []
    assert not os.path.exists(agent.host.path(f'/var/lib/vmmig/clones/dies-{point}'))
