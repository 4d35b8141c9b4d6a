# SPDX-License-Identifier: Apache-2.0
"""Guests of vmmig-vmm that migrate between agents, as their user and they themselves see it. What the agent does with
such VMMs when things go wrong is in tests/flow/test_attach.py; here a guest runs inside, which checks all of its
memory: four vCPUs write it as fast as they can, each its own and all a shared part, and so does a device."""
import contextlib
import os
import signal

import pytest
from agents import Cluster, eventually, fault_build
from lab import VmmGuest, huge_pages, judge
from lab.guests import built

DRIVERS = ['bitmap', 'ring', 'plain']
MIB = 1 << 20
FAR_MS = 25
PROGRAM = 'tools/vmmig-vmm/vmmig-vmm'


def at_full_speed(name, **options):
    return VmmGuest(name, **{'mem_mib': 64, 'vcpus': 4, 'dirty_mib': 8, 'rate_mbps': 2000, 'writer': 2000,
                             **options})


@pytest.fixture(scope='module')
def cluster():
    with Cluster(start=False) as made:
        for agent in made.agents:
            agent.options['attach-vmm'] = built(PROGRAM)
            agent.start()
        yield made


@pytest.fixture
def boot(cluster):
    """Starts guests and has the first agent adopt them; ends them with the test, wherever they are."""
    started = []

    def start(vm, program=None, runs=True, **options):
        agent = cluster.agents[0]
        console = cluster.console(vm.name)
        started.append(agent.host.popen(vm.argv(program=program), name=vm.name, **options))
        if runs:
            console.wait_for('ready', timeout=60)
        eventually('its socket', lambda: os.path.exists(agent.host.path(vm.attach_path)))
        agent.vmmig('attach', vm.name, '--socket', vm.attach_path)
        return console

    yield start
    for process in started:
        process.kill()
        process.wait()
    for agent in cluster.agents:
        if agent.process.poll() is not None:
            agent.start()
        for vm in agent.json('list')['vms']:
            if vm['presence'] != 'ended' and vm['pid']:
                with contextlib.suppress(ProcessLookupError):  # the agent may not have noticed yet
                    os.kill(vm['pid'], signal.SIGKILL)
                eventually('the end of a VMM', lambda pid=vm['pid'], a=agent: a.host.reap() or gone(pid))
            agent.vmmig('detach', vm['vm'], check=False)


def gone(pid):
    return not os.path.exists(f'/proc/{pid}')


def there_and_back(cluster, console, name, times):
    for i in range(times):
        source, target = cluster.agents[i % 2], cluster.agents[1 - i % 2]
        mark = console.mark()
        job = source.json('send', name, '--to', target.host.name)
        console.wait_for('^hb', after=console.mark())
        assert console.check(after=mark) == [source.host.name, target.host.name]
        assert job['state'] == 'done'
    return job


@pytest.mark.parametrize('tracking', DRIVERS)
def test_five_times_in_a_row(cluster, boot, tracking):
    vm = at_full_speed(f'five-{tracking}', tracking=tracking)
    console = boot(vm)
    assert cluster.agents[0].json('status', vm.name)['tracking'] == tracking
    there_and_back(cluster, console, vm.name, 5)
    console.verify()
    written = int(console.wait_for('written=', after=console.mark()).text.split('written=')[1].split()[0])
    assert written > vm.writer_pages


@pytest.mark.full
@pytest.mark.parametrize('options', [{'tracking': tracking} for tracking in DRIVERS] +
                         [{'tracking': 'ring', 'ring_entries': 1024, 'heartbeat_ms': 10}],
                         ids=[*DRIVERS, 'full-ring'])
def test_fifty_times_in_a_row(cluster, boot, options):
    vm = at_full_speed('fifty-' + '-'.join(map(str, options.values())), mem_mib=256, dirty_mib=32, **options)
    console = boot(vm)
    there_and_back(cluster, console, vm.name, 50)
    console.verify()


@pytest.mark.parametrize('options', [{'below_4g_mib': 32}, {'hugetlb': True},
                                     {'tracking': 'ring', 'ring_entries': 1024}],
                         ids=['above-4g', 'hugetlb', 'full-ring'])
def test_memory_of_any_make(cluster, boot, options):
    vm = at_full_speed('-'.join(options).replace('_', '-'), **options)
    with huge_pages(2 * vm.mem_mib if vm.hugetlb else 0):
        console = boot(vm)
        there_and_back(cluster, console, vm.name, 2)
        console.verify()
        for agent in cluster.agents:
            for record in agent.json('list')['vms']:
                if record['presence'] == 'present':
                    os.kill(record['pid'], signal.SIGKILL)
                    eventually('the end of a VMM', lambda a=agent, pid=record['pid']: a.host.reap() or gone(pid))


@pytest.mark.parametrize('pace', [{'dirty_mib': 4, 'rate_mbps': 4, 'writer': 0}, {}], ids=['idle', 'busy'])
def test_over_a_long_link(cluster, boot, pace):
    """A round trip takes 50 ms, and so does a round of a guest that writes next to nothing: no reason to throttle it. The
    last pages, LOADED and COMMIT go one after the other, which a prediction includes."""
    a1 = cluster.agents[0]
    name = f'far-{len(pace)}'
    console = boot(at_full_speed(name, **pace))
    mark = console.mark()
    with cluster.hosts[0].far(FAR_MS):
        job = a1.json('send', name, '--to', 'h2')
    console.wait_ticks(5)
    assert console.check(after=mark) == ['h1', 'h2']
    console.verify()
    assert job['pause_ms'] >= 3 * FAR_MS and job['predicted_pause_ms'] >= 3 * FAR_MS
    if pace:
        assert job['throttle_max_percent'] == 0 and job['predicted_pause_ms'] < 300


def test_a_lost_run_is_seen(cluster, boot):
    """The same, and a source agent that loses a run of written pages in the last pass over each piece of memory."""
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    a1 = cluster.agents[0]
    a1.stop()
    a1.start(faults='attach.paused.run=drop@*')
    try:
        console = boot(at_full_speed('lost'))
        mark = console.mark()
        a1.json('send', 'lost', '--to', 'h2')
        with pytest.raises(AssertionError, match='BAD|errors='):
            console.verify()
            console.check(after=mark)
    finally:
        a1.stop()
        a1.start()


def test_a_vmm_that_does_not_answer_any_more_runs_its_guest_on(cluster, boot, monkeypatch):
    """The library's thread hangs in the midst of the copy; the agent's patience is a tenth of what it is."""
    if not os.path.exists(os.path.join(fault_build(), PROGRAM)):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    a1, a2 = cluster.agents
    a1.stop()
    monkeypatch.setenv('VMMIG_PATIENCE', '10')
    a1.start(build=fault_build())
    try:
        vm = at_full_speed('silent')
        console = boot(vm, program=os.path.join(fault_build(), PROGRAM),
                       env={**os.environ, 'VMMIG_FAULTS': 'library.receive.HARVEST=hang@2'})
        mark = console.mark()
        done = a1.vmmig('send', 'silent', '--to', 'h2', check=False, timeout=20)
        assert done.returncode == 10 and 'the VMM does not answer' in done.stderr, done
        console.wait_ticks(20)
        assert console.check(after=mark) == ['h1']
        console.verify()
        vm = next(vm for vm in a1.json('list')['vms'] if vm['vm'] == 'silent')
        assert vm['presence'] == 'unreachable' and 'no answer' in vm['detail'], vm
        assert a2.names() == []
    finally:
        monkeypatch.undo()
        a1.stop()
        a1.start()


def test_a_guest_that_is_moved_before_it_ran(cluster, boot, tmp_path):
    """An agent at the door is answered before the VMM has set its guest going. It goes on at the destination, since
    nobody had it stand."""
    if not os.path.exists(os.path.join(fault_build(), PROGRAM)):
        pytest.skip(f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')
    a1, a2 = cluster.agents
    vm = at_full_speed('early', options=['--record', str(tmp_path / 'trace')])
    console = boot(vm, program=os.path.join(fault_build(), PROGRAM), runs=False,
                   env={**os.environ, 'VMMIG_FAULTS': 'library.told=delay:6000'})
    assert a1.json('status', 'early')['state'] == 'running'
    a1.json('send', 'early', '--to', 'h2')
    console.wait_for('ready', timeout=60)
    console.wait_ticks(5)
    assert console.check()[-1] == 'h2'
    console.verify()
    assert a2.json('status', 'early')['state'] == 'running'
    assert not any('--record' in word for word in a2.json('status', 'early')['argv'])


def test_guest_pages_are_charged_to_the_vmm(cluster, boot):
    a1, a2 = cluster.agents
    a2.stop()
    a2.options['vm-cgroup'] = cluster.cgroup('vms')
    try:
        a2.start()
        console = boot(at_full_speed('charged', mem_mib=256, fill='random'))
        there_and_back(cluster, console, 'charged', 1)
        group = judge.memory_cgroup(a2.json('status', 'charged')['pid'])
        assert group.endswith('charged')
        assert judge.charged(group) > 200 * MIB
        console.verify()
    finally:
        a2.stop()
        del a2.options['vm-cgroup']
        a2.start()


def test_a_killed_agent_leaves_a_guest_that_runs(cluster, boot):
    a1 = cluster.agents[0]
    vm = at_full_speed('survivor', fill='random')
    console = boot(vm)
    cluster.hosts[0].set_rate('100mbit')
    try:
        a1.vmmig('send', vm.name, '--to', 'h2', '--compress', 'none', '--background')
        eventually('some memory', lambda: a1.json('status', vm.name)['job']['wire_bytes'] > MIB)
        a1.kill()
        console.wait_ticks(10)
    finally:
        cluster.hosts[0].set_rate(None)
    a1.start()
    eventually('the guest is known again', lambda: [v['presence'] for v in a1.json('list')['vms']] == ['present']
               and not (a1.json('status', vm.name)['handover'] or {}).get('state'), 60)
    there_and_back(cluster, console, vm.name, 1)
    assert console.check() == ['h1', 'h2']
    console.verify()
