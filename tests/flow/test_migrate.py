# SPDX-License-Identifier: Apache-2.0
"""A QEMU guest moves between two agents, as its user, its console and its own self-check see it."""
import contextlib
import os
import re
import subprocess
import sys
import time

import pytest
from agents import Cluster, eventually
from lab import (HEARTBEAT_PORT, BareGuest, LinuxGuest, check_disk, huge_pages, judge, linux_guest, make_disk, make_vars)
from lab.guests import built
from lab.hosts import inside
from lab.linux import OVMF
from terminal import in_terminal, until_closed

MIB = 1 << 20


@pytest.fixture(scope='module')
def cluster():
    with Cluster() as made:
        yield made


def boot(cluster, vm, agent=None):
    """Starts the guest under plain QEMU and has the agent adopt it."""
    agent = agent or cluster.agents[0]
    console = cluster.console(vm.name)
    agent.host.popen(vm.argv(), name=vm.name)
    console.wait_for('ready', timeout=60 + vm.mem_mib // 20)  # a guest fills its memory first
    agent.vmmig('attach', vm.name, '--qmp', vm.qmp_path)
    return console


def ended(agent, pid):
    agent.host.reap()
    return not os.path.exists(f'/proc/{pid}')


def end(cluster, name):
    """Ends the guest wherever it is, and looks for what it left behind."""
    for agent in cluster.agents:
        for vm in agent.json('list')['vms']:
            if vm['vm'] != name:
                continue
            if vm['presence'] == 'present':
                os.kill(vm['pid'], 9)
                eventually('the end of the guest', lambda: ended(agent, vm['pid']))
            agent.vmmig('detach', name)


@pytest.fixture
def guests(cluster):
    """Whatever becomes of a test, its guests do not outlive it."""
    yield
    for agent in cluster.agents:
        for vm in agent.json('list')['vms']:
            end(cluster, vm['vm'])


@contextlib.contextmanager
def at_rate(cluster, rate):
    """The link between the hosts is that slow meanwhile."""
    for host in cluster.hosts:
        host.set_rate(rate)
    try:
        yield
    finally:
        for host in cluster.hosts:
            host.set_rate(None)


def send(agent, to, name, *options):
    """Sends the VM. Returns the job's JSON."""
    return agent.json('send', name, '--to', to, *options)


def clean(host, name, agent, timeout=20):
    """Nothing of the VM is left on the host."""
    try:
        eventually('nothing left', lambda: not judge.leftovers(host, name, [agent.process.pid]), timeout)
    except TimeoutError:
        assert judge.leftovers(host, name, [agent.process.pid]) == []


def saved(job, encoding):
    return job['pages'][encoding]['pages']


def where(cluster, name):
    """Names of the hosts whose agent has the VM, present."""
    return [agent.host.name for agent in cluster.agents
            if any(vm['vm'] == name and vm['presence'] == 'present' for vm in agent.json('list')['vms'])]


# ---- the bare guest checks every byte of itself

def test_a_busy_guest_converges_within_the_limit(cluster, guests):
    """Forth, back and forth: the agents' figure of the pause is the guest's own, in the median of the three."""
    vm = BareGuest('busy', mem_mib=512, dirty_mib=64, rate_mbps=20)
    console = boot(cluster, vm)
    jobs = []
    mark = console.mark()
    with at_rate(cluster, '1gbit'):
        for here, there in ((0, 1), (1, 0), (0, 1)):
            jobs.append(send(cluster.agents[here], cluster.hosts[there].name, 'busy', '--downtime-limit', '300'))
            console.wait_ticks(5)
    assert where(cluster, 'busy') == ['h2']
    assert console.check(after=mark) == ['h1', 'h2', 'h1', 'h2']
    console.verify()
    pauses = [pause * 1000 for pause in console.hand_overs(after=mark)]
    assert max(pauses) <= 300
    told = [job['pause_ms'] for job in jobs]
    wrong = sorted(abs(pause - agents) for pause, agents in zip(pauses, told))
    assert wrong[1] <= 10, f'the guest saw {pauses} ms, the agents say {told} ms'
    for job in jobs:
        assert job['state'] == 'done'
        assert job['throttle_max_percent'] == 0
        assert job['resent_bytes'] == 0
    clean(cluster.hosts[0], 'busy', cluster.agents[0])


def test_a_prepared_destination_whose_memory_is_a_file_of_an_earlier_run(cluster, guests):
    """Its user's QEMU maps a file with contents: nothing of them is left in the guest's memory."""
    vm = BareGuest('web', mem_mib=64, dirty_mib=8, memory='named')
    console = boot(cluster, vm)
    there = cluster.hosts[1]
    memory = there.path('/run/vmlab/ram')
    with open(memory, 'wb') as file:
        file.write(b'\xaa' * 64 * MIB)
    argv = [word.replace('memory-backend-ram,', 'memory-backend-file,mem-path=/run/vmlab/ram,share=on,')
            for word in vm.argv(incoming='defer')]
    there.popen(argv, name='prepared')
    eventually('the QEMU that waits', lambda: os.path.exists(there.path(vm.judge_path)))
    mark = console.mark()
    job = send(cluster.agents[0], 'h2', 'web', '--dest-qmp', vm.qmp_path)
    console.wait_ticks(5)
    assert console.check(after=mark) == ['h1', 'h2']
    with open(memory, 'rb') as file:
        assert not [number for number, page in enumerate(iter(lambda: file.read(4096), b'')) if page == b'\xaa' * 4096]
    assert saved(job, 'zero') > 0


def test_what_its_user_does_meanwhile_holds(cluster, guests):
    """A guest that is stopped while it is copied stays so; one that is let go on goes on."""
    vm = BareGuest('meanwhile', mem_mib=128, dirty_mib=8, fill='random')
    console = boot(cluster, vm)
    mark = console.mark()
    for here, there, command, state in ((0, 1, 'stop', 'paused'), (1, 0, 'cont', 'running')):
        agent, peer = cluster.agents[here], cluster.agents[there]
        with at_rate(cluster, '100mbit'):
            send(agent, peer.host.name, 'meanwhile', '--background')
            eventually('some memory', lambda: agent.json('status', 'meanwhile')['job']['wire_bytes'] > 2 * MIB)
            vm.qmp(agent.host)(command)
        agent.vmmig('watch', 'meanwhile')
        assert where(cluster, 'meanwhile') == [peer.host.name]
        assert peer.json('status', 'meanwhile')['state'] == state
    console.wait_ticks(5)
    assert console.check(after=mark)[-1] == 'h1'
    console.verify()


def test_a_guest_faster_than_the_link_is_throttled(cluster, guests):
    """What it writes does not compress, so that the link takes less than it writes. Its user sees how it goes."""
    vm = BareGuest('fast', mem_mib=512, dirty_mib=64, rate_mbps=200, pattern='random', fill='random')
    console = boot(cluster, vm)
    mark = console.mark()
    a1, _ = cluster.agents
    with at_rate(cluster, '1gbit'):
        command, terminal = in_terminal(200, inside(a1.host.pid, [
            built('tools/vmmig'), 'send', 'fast', '--to', 'h2', '--downtime-limit', '300']))
        text = until_closed(terminal)
        assert command.wait(20) == 0, text
        console.wait_ticks(5)
    job = a1.json('watch', 'fast')
    size = r'\d[\d.]* [KMGT]?i?B'
    assert re.search(rf'\rcopying round \d+, {size} left, dirty {size}/s, link {size}/s, pause ~\d[\d.]* m?s, '
                     r'(throttle \d+%, )?saved (\w+ )?\d+%', text), text
    assert console.check(after=mark) == ['h1', 'h2']
    console.verify()
    assert job['throttle_max_percent'] > 0
    assert 'throttled' in job['note']
    assert max(console.hand_overs(after=mark)) * 1000 <= 300


VARIANTS = {
    'vcpus': {'vcpus': 2},
    'numa': {'memory': 'numa', 'vcpus': 2},
    'named': {'memory': 'named'},
    'shared': {'memory': 'shared'},
    'mem-path': {'memory': 'mem-path'},
    'hugetlb': {'memory': 'hugetlb', 'mem_mib': 128},
    'vga': {'vga': True},
    'hotplug': {'dimm_slots': 2},
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_kind_of_memory_arrives_whole(cluster, guests, variant):
    name = f'v-{variant}'
    vm = BareGuest(name, **{'mem_mib': 192, 'dirty_mib': 16, 'rate_mbps': 20, **VARIANTS[variant]})
    reserved = None
    if variant == 'hugetlb':
        try:
            reserved = huge_pages(2 * 128)
            reserved.__enter__()
        except (MemoryError, OSError) as why:
            pytest.skip(f'NO HUGE PAGES: {why}')
    try:
        console = boot(cluster, vm)
        if variant == 'hotplug':
            vm.plug_dimm(vm.qmp(cluster.hosts[0]), console)
        mark = console.mark()
        job = send(cluster.agents[0], 'h2', name)
        console.wait_ticks(5)
        assert console.check(after=mark) == ['h1', 'h2']
        console.verify()
        assert job['opaque_bytes'] < 20 * MIB  # its memory went as pages
        mark = console.mark()
        send(cluster.agents[1], 'h1', name)
        console.wait_ticks(5)
        assert console.check(after=mark) == ['h2', 'h1']
        console.verify()
    finally:
        if reserved:
            reserved.__exit__(None, None, None)


def test_virtio_mem_arrives_whole(cluster, guests):
    vm = BareGuest('vmem', mem_mib=192, dirty_mib=16, virtio_mem_mib=128)
    console = boot(cluster, vm)
    mark = console.mark()
    job = send(cluster.agents[0], 'h2', 'vmem')
    console.wait_ticks(5)
    assert console.check(after=mark) == ['h1', 'h2']
    console.verify()
    # QEMU 8 and later write its state before the memory, from which it cannot be told: then all is relayed.
    pages = sum(encoding['pages'] for encoding in job['pages'].values())
    relayed = job['opaque_bytes'] > 192 * MIB
    assert relayed != (pages > 192 * MIB // 4096) and (relayed or job['opaque_bytes'] < 20 * MIB)


def test_what_cannot_move_is_refused_by_name(cluster, guests):
    vm = BareGuest('stuck', mem_mib=64, dirty_mib=8, unmigratable=True)
    console = boot(cluster, vm)
    mark = console.mark()
    done = cluster.agents[0].vmmig('send', 'stuck', '--to', 'h2', check=False)
    assert done.returncode == 5
    assert 'nvme' in done.stderr
    assert done.stderr.splitlines()[-1].startswith('vmmig: ')
    console.wait_ticks(5)
    assert console.check(after=mark) == ['h1']


def test_a_paused_guest_stays_paused(cluster, guests):
    vm = BareGuest('asleep', mem_mib=64, dirty_mib=8)
    console = boot(cluster, vm)
    vm.qmp(cluster.hosts[0])('stop')
    send(cluster.agents[0], 'h2', 'asleep')
    qmp = vm.qmp(cluster.hosts[1])
    assert qmp('query-status')['status'] == 'paused'
    mark = console.mark()
    qmp('cont')
    console.wait_ticks(3)
    assert console.check(after=mark) == ['h2']
    console.verify()


# ---- the link

def test_a_link_that_is_cut_for_5_s_is_waited_for(cluster, guests):
    h1, h2 = cluster.hosts
    a1 = cluster.agents[0]
    vm = BareGuest('cut', mem_mib=512, dirty_mib=16, rate_mbps=10, fill='random')
    console = boot(cluster, vm)
    h1.set_rate('1gbit')
    try:
        mark = console.mark()
        a1.vmmig('send', 'cut', '--to', 'h2', '--background')
        eventually('half of the memory', lambda: a1.json('status', 'cut')['job']['wire_bytes'] > 100 * MIB)
        h1.cut()
        time.sleep(5)  # the length of the outage is what is tested
        assert a1.json('status', 'cut')['job']['state'] == 'running'
        h1.heal()
        job = a1.json('watch', 'cut')
        console.wait_ticks(5)
    finally:
        h1.set_rate(None)
    assert job['state'] == 'done'
    assert job['reconnects'] > 0
    assert job['resent_bytes'] == 0
    assert console.check(after=mark) == ['h1', 'h2']
    assert console.pause(after=mark) < 1
    console.verify()


def test_a_link_that_stays_away_leaves_the_guest_at_the_source(cluster, guests):
    h1, h2 = cluster.hosts
    a1, a2 = cluster.agents
    vm = BareGuest('gone', mem_mib=512, dirty_mib=16, rate_mbps=10, fill='random')
    console = boot(cluster, vm)
    h1.set_rate('1gbit')
    try:
        mark = console.mark()
        a1.vmmig('send', 'gone', '--to', 'h2', '--background')
        eventually('some memory', lambda: a1.json('status', 'gone')['job']['wire_bytes'] > 50 * MIB)
        h1.cut()
        done = a1.vmmig('watch', 'gone', check=False)
        assert done.returncode == 10, done.stderr
        console.wait_ticks(5)
        assert console.check(after=mark) == ['h1']
    finally:
        h1.set_rate(None)
    clean(h2, 'gone', a2)
    console.verify()
    job = send(a1, 'h2', 'gone')
    assert job['state'] == 'done'


# ---- bounds

@pytest.mark.parametrize('mib, options, connections', [
    (512, {}, 2), (512, {'fill': 'random', 'pattern': 'random'}, 8), pytest.param(5120, {}, 2, marks=pytest.mark.full)])
def test_the_agents_memory_is_bounded(cluster, guests, mib, options, connections):
    a1, a2 = cluster.agents
    name = f'bounded-{mib}-{connections}'
    vm = BareGuest(name, mem_mib=mib, dirty_mib=64, rate_mbps=200, **options)
    console = boot(cluster, vm)
    pids = [agent.process.pid for agent in (a1, a2)]
    mark = console.mark()
    a1.vmmig('send', name, '--to', 'h2', '--background', '--connections', str(connections))
    most = used = 0
    while (job := a1.json('status', name, check=False).get('job', {})).get('state') == 'running':
        most, used = max(most, *map(judge.rss_anon, pids)), max(used, job['connections'])
    assert a1.json('watch', name)['state'] == 'done'
    assert most < 100 * MIB
    assert used == connections + 1  # and the one for what QEMU's own loader takes
    console.wait_ticks(5)
    assert console.check(after=mark) == ['h1', 'h2']
    console.verify()


# ---- what it is asked to do

def at_rest(agent, name):
    """May it be sent on from there? What brought it has ended, for its agent too."""
    vm = agent.json('status', name)
    return (not vm['handover'] or vm['handover']['settled']) and (not vm['job'] or vm['job']['state'] != 'running')


def test_pages_are_compressed_as_asked(cluster, guests):
    """A memory of text, to and fro: none sends nothing that is compressed, the others nothing of the other kind, and all
    of it is on the wire."""
    vm = BareGuest('asked', mem_mib=128, dirty_mib=8, rate_mbps=5)
    console = boot(cluster, vm)
    here, there = cluster.agents
    wire = {}
    for compress, never in (('none', ('lz4', 'zstd', 'delta')), ('lz4', ('zstd',)), ('zstd', ('lz4',))):
        job = send(here, there.host.name, 'asked', '--compress', compress)
        used = {encoding for encoding in job['pages'] if saved(job, encoding)}
        assert not used.intersection(never), (compress, job['pages'])
        assert ('raw' if compress == 'none' else compress) in used, (compress, job['pages'])
        assert job['wire_bytes'] >= sum(pages['wire_bytes'] for pages in job['pages'].values())
        wire[compress] = job['wire_bytes'] / sum(pages['pages'] for name, pages in job['pages'].items() if name not in
                                                 ('zero', 'same'))
        here, there = there, here
        eventually('the end of the hand-over', lambda agent=here: at_rest(agent, 'asked'))
    assert wire['none'] >= 4096 > 2 * wire['lz4'] > 2 * wire['zstd'], wire
    console.wait_ticks(3)
    console.verify()


# ---- a real Linux

@pytest.fixture(scope='module')
def linux():
    return linux_guest(os.environ.get('VMMIG_CACHE', '/var/tmp/vmmig-cache'))


def test_linux_goes_back_and_forth(cluster, guests, linux, full):
    kernel, initrd = linux
    disk = make_disk(f'{cluster.shared}/linux.raw', mib=64)
    vm = LinuxGuest('linux', kernel=kernel, initrd=initrd, disk=disk)
    console = boot(cluster, vm)
    mark = console.mark()
    here, there = cluster.agents
    hosts = [here.host.name]
    for _ in range(10 if full else 4):
        job = send(here, there.host.name, 'linux')
        assert job['state'] == 'done'
        console.wait_ticks(3)
        here, there = there, here
        hosts.append(here.host.name)
    assert console.check(after=mark) == hosts
    console.send('poweroff')
    pid = here.json('status', 'linux')['pid']
    eventually('the end of the guest', lambda: ended(here, pid), timeout=30)
    check_disk(disk)
    for agent in cluster.agents:
        if any(v['vm'] == 'linux' for v in agent.json('list')['vms']):
            agent.vmmig('detach', 'linux')


def variables_of(vm, host, variables):
    """What the guest finds where its firmware keeps its variables: at the beginning of the flash that ends at 4 GiB."""
    code = os.path.getsize(f'{OVMF}/OVMF_CODE_4M.fd')
    size = os.path.getsize(variables)
    vm.qmp(host)('pmemsave', val=(4 << 30) - code - size, size=size, filename='/run/vmlab/read')
    with open(host.path('/run/vmlab/read'), 'rb') as file:
        return file.read()


def test_a_guest_with_firmware_moves(cluster, guests, linux):
    """And finds the variables that its firmware wrote as it booted."""
    kernel, initrd = linux
    variables = make_vars(f'{cluster.shared}/vars.fd')
    with open(variables, 'rb') as file:
        empty = file.read()
    vm = LinuxGuest('ovmf', kernel=kernel, initrd=initrd, firmware='ovmf', vars=variables)
    console = boot(cluster, vm)
    h1, h2 = cluster.hosts
    written = variables_of(vm, h1, variables)
    assert written != empty
    mark = console.mark()
    send(cluster.agents[0], 'h2', 'ovmf')
    console.wait_ticks(3)
    assert console.check(after=mark) == ['h1', 'h2']
    assert variables_of(vm, h2, variables) == written
    with open(variables, 'rb') as file:
        assert file.read() == written


# Says so when a guest that just came there announces itself (RARP) to the network.
SNIFFER = '''
import socket, sys
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # all: a bridge's port shows no others
sniffer.bind((sys.argv[1], 0))
sniffer.settimeout(120)
print('listening', flush=True)
while (frame := sniffer.recv(2048))[12:14].hex() != '8035':
    pass
print('announced', frame[6:12].hex(':'), flush=True)
'''


def test_linux_keeps_its_network(linux):
    """Its tap has another name there, where it is announced to the network; no datagram of the guest's is lost. By their
    arrival it stood as long as its console and the agents say, in the median of three moves."""
    kernel, initrd = linux
    with Cluster(start=False) as cluster:
        a1, a2 = cluster.agents
        a1.host.add_tap('tap1')
        a2.host.add_tap('tap9')
        a1.options['map tap9'], a2.options['map tap1'] = 'tap1', 'tap9'
        for agent in cluster.agents:
            agent.start()
        vm = LinuxGuest('online', kernel=kernel, initrd=initrd, network=1)
        heartbeats = cluster.udp(HEARTBEAT_PORT)
        console = boot(cluster, vm)
        heartbeats.wait_ticks(20)
        sniffer = a2.host.popen([sys.executable, '-c', SNIFFER, 'tap9'], stdout=subprocess.PIPE, text=True)
        assert sniffer.stdout.readline() == 'listening\n'
        mark, heartbeat_mark = console.mark(), heartbeats.mark()
        told = []
        for here, there in ((a1, a2), (a2, a1), (a1, a2)):
            told.append(send(here, there.host.name, 'online')['pause_ms'])
            heartbeats.wait_ticks(20)
            console.wait_ticks(5)
        assert sniffer.stdout.readline().startswith('announced 52:54:')
        assert console.check(after=mark) == ['h1', 'h2', 'h1', 'h2']
        assert not heartbeats.missing(after=heartbeat_mark)
        by_serial = [pause * 1000 for pause in console.hand_overs(after=mark)]
        by_udp = [pause * 1000 for pause in heartbeats.stops(console.changes(after=mark), after=heartbeat_mark)]
        for other in by_serial, told:
            wrong = sorted(abs(a - b) for a, b in zip(by_udp, other))
            assert wrong[1] <= 10, f'ms, by UDP {by_udp}, by the serial line {by_serial}, told {told}'
        end(cluster, 'online')


def test_guest_pages_are_charged_to_the_vmm():
    with Cluster(start=False) as cluster:
        a1, a2 = cluster.agents
        group = cluster.cgroup('vms')
        a2.options['vm-cgroup'] = group
        for agent in cluster.agents:
            agent.start()
        vm = BareGuest('charged', mem_mib=256, dirty_mib=16, fill='random')
        console = boot(cluster, vm)
        mark = console.mark()
        send(a1, 'h2', 'charged')
        console.wait_ticks(5)
        assert console.check(after=mark) == ['h1', 'h2']
        qemu = a2.json('status', 'charged')['pid']
        charged = judge.charged(judge.memory_cgroup(qemu))
        assert judge.memory_cgroup(qemu).endswith('charged')
        assert charged > 200 * MIB
        console.verify()
        end(cluster, 'charged')
