# SPDX-License-Identifier: Apache-2.0
"""The test hosts and guests themselves: that what they measure is so, and that they see what is wrong."""
import contextlib
import os
import signal
import struct
import subprocess
import sys
import time

import pytest

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, TESTS)

from lab import (HEARTBEAT_PORT, BareGuest, Lab, LinuxGuest, Timeline, check_disk, huge_pages, judge,  # noqa: E402
                 linux_guest, make_disk, make_vars)

pytest_plugins = ['lab.plugin']
PAGE = 4096
PAGES_MAGIC = 0x74736575676d7600  # tests/guest/bare/pages.h


@pytest.fixture(scope='module')
def lab():
    with Lab(hosts=2) as made:
        yield made


# ---- links

RECEIVE = '''
import socket, time
listener = socket.create_server(('', 5000)); print('listening', flush=True)
connection = listener.accept()[0]; buffer = bytearray(1 << 20)
start = time.monotonic(); total = 0
while count := connection.recv_into(buffer): total += count
print(total / (time.monotonic() - start))
'''
SEND = '''
import socket, sys, time
connection = socket.create_connection(('h2', 5000)); data = bytes(1 << 20)
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end: connection.sendall(data)
'''


def throughput(sender, receiver, seconds):
    """Bytes per second of one TCP connection."""
    sink = receiver.popen([sys.executable, '-c', RECEIVE], stdout=subprocess.PIPE)
    assert sink.stdout.readline() == b'listening\n'
    sender.run([sys.executable, '-c', SEND, seconds])
    rate = float(sink.stdout.readline())
    sink.wait()
    return rate


@pytest.mark.parametrize('rate, bits', [('100mbit', 1e8), ('1gbit', 1e9)])
def test_tcp_gets_the_rate_of_the_link_and_no_more(lab, rate, bits):
    h1, h2 = lab.hosts
    h1.set_rate(rate)
    try:
        got = throughput(h1, h2, 1.5) * 8 / bits
    finally:
        h1.set_rate(None)
    assert 0.93 < got < 1.01


def test_without_a_rate_the_link_is_not_what_binds(lab):
    h1, h2 = lab.hosts
    h1.set_rate('1gbit')
    try:
        shaped = throughput(h1, h2, 0.5)
    finally:
        h1.set_rate(None)
    assert throughput(h1, h2, 0.5) > 2 * shaped


ECHO = '''
import socket
connection = socket.create_server(('', 5001)).accept()[0]
while data := connection.recv(100): connection.sendall(data)
'''


@pytest.fixture
def echo(lab):
    """A connection from the observer's place in h1 to an echo server in h2."""
    h1, h2 = lab.hosts
    server = h2.popen([sys.executable, '-c', ECHO])
    client = h1.popen([sys.executable, '-u', '-c', '''
import socket, sys
while True:
    try:
        connection = socket.create_connection(('h2', 5001))
        break
    except ConnectionRefusedError:
        pass
for line in sys.stdin:
    connection.sendall(line.encode())
    print(connection.recv(100).decode(), end='')
'''], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    os.set_blocking(client.stdout.fileno(), False)
    yield client
    client.kill()
    server.kill()
    h1.heal()
    h2.heal()


def answer(client, timeout):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if line := client.stdout.readline():
            return line.strip()
        time.sleep(0.01)
    return None


@pytest.mark.parametrize('direction', ['both', 'in', 'out'])
def test_a_cut_is_silent_and_what_was_sent_arrives_after_it(lab, echo, direction):
    echo.stdin.write('one\n')
    assert answer(echo, 10) == 'one'
    lab.hosts[0].cut(direction)
    echo.stdin.write('two\n')
    assert answer(echo, 1) is None
    assert echo.poll() is None
    lab.hosts[0].heal()
    assert answer(echo, 10) == 'two'


def test_a_host_that_is_far_answers_late(lab, echo):
    h1, h2 = lab.hosts
    echo.stdin.write('one\n')
    assert answer(echo, 10) == 'one'
    with h1.far(25):
        start = time.monotonic()
        echo.stdin.write('two\n')
        assert answer(echo, 10) == 'two' and time.monotonic() - start >= 0.05
        assert throughput(h1, h2, 0.5) > 0
    echo.stdin.write('three\n')
    assert answer(echo, 10) == 'three'


def test_a_link_that_is_down_is_noticed(lab):
    h1, h2 = lab.hosts
    h1.link_down()
    try:
        with pytest.raises(RuntimeError, match='unreachable'):
            h1.run([sys.executable, '-c', SEND, 1])
    finally:
        h1.link_up()
    assert throughput(h1, h2, 0.1) > 0


# ---- hosts

def test_own_folders_are_own_and_reachable_from_the_test(lab):
    h1, h2 = lab.hosts
    for host in lab.hosts:
        host.run(['sh', '-c', f'echo {host.name} | tee /run/vmmig/x /var/lib/vmmig/x /etc/vmmig/x'])
    for host in lab.hosts:
        for path in ('/run/vmmig/x', '/var/lib/vmmig/x', '/etc/vmmig/x'):
            assert host.run(['cat', path]) == f'{host.name}\n'
            assert open(host.path(path), encoding='ascii').read() == f'{host.name}\n'
            assert not os.path.exists(path)
    h1.run(['touch', f'{lab.shared}/x'])
    assert h2.run(['ls', lab.shared]) == 'x\n'
    assert h1.run(['hostname']) == 'h1\n'


def test_a_crash_ends_everything_in_one_host(lab):
    h1, h2 = lab.hosts
    there, here = (host.popen(['setsid', 'sleep', '1000']) for host in (h1, h2))
    for host, process in ((h1, there), (h2, here)):
        while process.pid not in host.processes():
            assert process.poll() is None
    h1.crash()
    assert there.wait(10) == -signal.SIGKILL
    assert not h1.processes()
    assert here.poll() is None
    here.kill()


def test_memory_is_charged_to_the_cgroup_of_the_process(lab):
    process = lab.hosts[0].popen([sys.executable, '-c', 'x = b"x" * (64 << 20); print(1); input()'],
                                 cgroup='vmm', stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.read(1)
    assert judge.memory_cgroup(process.pid) == lab.cgroup('vmm')
    assert 64 << 20 < judge.charged(lab.cgroup('vmm')) < 128 << 20
    assert 64 << 20 < judge.rss_anon(process.pid) < 128 << 20
    process.communicate(b'\n')


DIES = '''
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from lab import Lab
with Lab(hosts=1) as lab:
    sleeper = lab.hosts[0].popen(['setsid', 'sleep', '1000'])
    lab.cgroup('vmm')
    print(lab.folder, sleeper.pid, lab.switch_pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
'''


def test_a_lab_leaves_nothing_behind_even_when_the_test_is_killed():
    done = subprocess.run([sys.executable, '-c', DIES, TESTS], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    folder, *pids = done.stdout.split()
    end = time.monotonic() + 20
    while os.path.exists(folder) or any(os.path.exists(f'/proc/{pid}') for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not os.path.exists(os.path.join('/sys/fs/cgroup/memory', os.path.basename(folder)))
    assert os.path.basename(folder) not in open('/proc/mounts', encoding='ascii').read()


# ---- the bare guest

def start(lab, host, vm, incoming=None):
    console = lab.console(vm.name)
    return console, host.popen(vm.argv(incoming))


def test_no_line_is_lost_when_a_console_is_read_late(lab, monkeypatch):
    """The kernel keeps 278 single bytes for a reader; the guest keeps the rest."""
    vm = BareGuest('read-late', mem_mib=48, dirty_mib=2, heartbeat_ms=10)
    console, process = start(lab, lab.hosts[0], vm)
    console.wait_for('ready')
    console.wait_ticks(5)
    mark, read, stall = console.mark(), type(lab.collector)._read, [1.5]

    def late(self, *arguments):
        if stall:
            time.sleep(stall.pop())  # the length of the outage is what is tested
        read(self, *arguments)

    monkeypatch.setattr(type(lab.collector), '_read', late)
    console.wait_for('^hb', after=mark)
    console.wait_ticks(200)
    assert console.check(after=mark) == ['h1']
    process.kill()


@pytest.mark.parametrize('stopped', ['between two ticks', 'within a tick'])
def test_a_guest_whose_clock_goes_on_tells_its_pause_itself(stopped):
    """Stopped for 30 ms while ticks are 20 ms apart, either between two of them or in the middle of one's line."""
    timeline = Timeline('web')
    timeline.feed(0, 'h1', b'vmmig-guest ready mem=64 tsc_khz=1000\n')
    for number in range(10):
        timeline.feed(number * 0.02, 'h1', b'hb %d %x\n' % (number, number * 20000))
    gap, none = b' gap=30000\n', b'\n'
    if stopped == 'within a tick':
        timeline.feed(0.2, 'h1', b'hb 10 ')
        gap, none = none, gap
    else:
        timeline.feed(0.23, 'h2', b'hb 10 ')
    timeline.feed(0.23, 'h2', b'%x' % 200000 + gap)
    timeline.feed(0.24, 'h2', b'hb 11 %x' % 240000 + none)
    for number in range(12, 20):
        timeline.feed(number * 0.02, 'h2', b'hb %d %x\n' % (number, number * 20000))
    assert timeline.check() == ['h1', 'h2']
    assert timeline.hand_overs() == [pytest.approx(0.03, abs=0.001)]


def test_a_migration_by_qemu_is_seen_as_it_was(lab):
    h1, h2 = lab.hosts
    vm = BareGuest('moved', mem_mib=256, vcpus=2, dirty_mib=16, rate_mbps=20, heartbeat_ms=10)
    h1.set_rate('1gbit')
    console, source = start(lab, h1, vm)
    console.wait_for('ready')
    _, destination = start(lab, h2, vm, incoming='tcp:0:4444')
    from_qmp, to_qmp = vm.qmp(h1), vm.qmp(h2)
    to_qmp.wait_status('inmigrate')
    console.wait_ticks(20)
    mark, sent = console.mark(), h1.bytes_sent()
    from_qmp('migrate-set-parameters', max_bandwidth=10 << 30, downtime_limit=200)
    from_qmp('migrate', uri='tcp:h2:4444')
    result = from_qmp.wait_migration()
    assert result['status'] == 'completed'
    to_qmp.wait_status('running')
    sent = h1.bytes_sent() - sent
    h1.set_rate(None)
    console.wait_ticks(20)

    assert console.check(after=mark) == ['h1', 'h2']
    downtime = result['downtime'] / 1000  # without the destination's part, which takes 5 to 60 ms
    assert downtime - 0.01 < console.pause(after=mark) < downtime + 0.15
    assert console.pause(after=mark) <= console.gap(after=mark) + 0.002
    assert result['ram']['transferred'] < sent < result['ram']['transferred'] * 1.05
    assert sent * 8 / 1e9 < result['total-time'] / 1000 * 1.05
    console.wait_cycles(1)  # of the slowest vCPU: both run on
    console.verify()
    source.kill()
    destination.kill()


def guest_memory(process):
    """The memfd of a guest's RAM, which is mapped from guest address 0 on."""
    folder = f'/proc/{process.pid}/fd'
    for name in os.listdir(folder):
        if os.readlink(f'{folder}/{name}').startswith('/memfd:memory-backend'):
            return open(f'{folder}/{name}', 'r+b', buffering=0)
    raise AssertionError('no memfd')


@pytest.fixture(scope='module')
def shared_guest(lab):
    """A paused guest whose memory the test can change."""
    vm = BareGuest('victim', mem_mib=64, dirty_mib=8, rate_mbps=50, memory='shared', scan_mbps=500)
    console, process = start(lab, lab.hosts[0], vm)
    console.wait_for('ready')
    with guest_memory(process) as memory:
        yield console, vm.qmp(lab.hosts[0]), memory
    process.kill()


def find_page(memory, worked):
    """The address of a page that the guest rewrites, or does not, somewhere in the middle."""
    pages = os.fstat(memory.fileno()).st_size // PAGE
    for number in range(pages // 2, pages):
        magic, = struct.unpack('Q', os.pread(memory.fileno(), 8, number * PAGE))
        if (magic == PAGES_MAGIC) == worked:
            return (number + 5) * PAGE
    raise AssertionError('no such page')


def flip_a_byte(memory, _):
    address = find_page(memory, worked=False)
    byte = os.pread(memory.fileno(), 1, address + 77)[0]
    os.pwrite(memory.fileno(), bytes([byte ^ 0x10]), address + 77)
    return address, 'expected=0 .*word=9$'


def lose_a_page(memory, _):
    address = find_page(memory, worked=True)
    os.pwrite(memory.fileno(), bytes(PAGE), address)
    return address, r'expected=\d+ found=none word=0$'


def bring_back_a_stale_page(memory, run_on):
    address = find_page(memory, worked=True)
    stale = os.pread(memory.fileno(), PAGE, address)
    run_on()
    os.pwrite(memory.fileno(), stale, address)
    number = int.from_bytes(stale[24:32], 'little')
    return address, rf'expected=(?!{number} )\d+ found={number} word=3$'


def tear_a_page(memory, run_on):
    address = find_page(memory, worked=True)
    old_half = os.pread(memory.fileno(), PAGE // 2, address + 32)
    run_on()
    os.pwrite(memory.fileno(), old_half, address + 32)
    return address, r'expected=(\d+) found=\1 word=\d+$'


@pytest.mark.parametrize('damage', [flip_a_byte, lose_a_page, bring_back_a_stale_page, tear_a_page])
def test_the_guest_sees_damaged_memory(shared_guest, damage):
    console, qmp, memory = shared_guest
    mark = console.mark()

    def run_on():
        """Until the guest has rewritten all of its working set."""
        qmp('cont')
        console.wait_cycles(2)
        qmp('stop')

    qmp('stop')
    address, report = damage(memory, run_on)
    qmp('cont')
    console.wait_for(f'^BAD page={address:x} {report}', after=mark)
    with pytest.raises(AssertionError):
        console.check(after=mark)
    with pytest.raises(AssertionError, match='BAD'):
        console.verify()
    assert len([line for line in console.trouble(mark) if line.startswith('BAD')]) == 1


def test_a_stopped_guest_is_a_pause_of_that_length(shared_guest):
    console, qmp, _ = shared_guest
    console.wait_ticks(3)
    mark = console.mark()
    console.wait_ticks(3)
    qmp('stop')
    stopped = time.monotonic()
    time.sleep(0.3)
    resumed = time.monotonic()
    qmp('cont')
    console.wait_ticks(10)
    assert resumed - stopped - 0.005 < console.pause(after=mark) < resumed - stopped + 0.02
    assert not console.missing(after=mark)


@pytest.mark.parametrize('pattern', ['seq', 'random'])
def test_the_guest_dirties_as_fast_as_it_was_asked_to(lab, pattern):
    vm = BareGuest(f'pace-{pattern}', mem_mib=64, dirty_mib=4, rate_mbps=100, vcpus=2, pattern=pattern)
    console, process = start(lab, lab.hosts[0], vm)
    console.wait_for('ready')
    console.wait_cycles(1)
    first = console.wait_for('cycles=', after=console.mark())
    console.wait_cycles(40)
    last = console.wait_for('cycles=', after=console.mark())
    cycles = [int(line.text.split('cycles=')[1].split()[0]) for line in (first, last)]
    rate = (cycles[1] - cycles[0]) * (vm.dirty_mib << 20) / (last.at - first.at)
    assert 0.9 < rate / 100e6 < 1.1
    process.kill()


def test_without_kvm_the_guest_runs_under_tcg_and_says_so():
    said = subprocess.run(
        ['unshare', '--mount', 'sh', '-c', '[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm; exec "$@"', 'sh',
         sys.executable, '-c',
         f'import sys; sys.path.insert(0, {TESTS!r}); import lab; print(lab.accelerator())'],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
    assert 'NO KVM' in said and "['-accel', 'tcg']" in said


def test_a_clock_set_back_stops_nothing(lab):
    vm = BareGuest('clock', mem_mib=64, dirty_mib=4, rate_mbps=100, vcpus=2)
    console, process = start(lab, lab.hosts[0], vm)
    console.wait_for('ready')
    for step in (3, 50, 5000):
        console.wait_ticks(2)
        console.send(f'back {step}')
        mark = console.mark()
        console.wait_cycles(4, timeout=4)
        assert not console.missing(after=mark)
    assert console.pause() > 4.9  # the clock really was set back
    console.verify()
    process.kill()


VARIANTS = {
    'two vCPUs': {'vcpus': 2, 'pattern': 'random', 'rate_mbps': 100},
    'five GiB': {'mem_mib': 5120, 'fill': 'zero', 'scan_mbps': 0},
    'NUMA': {'memory': 'numa'},
    'named backend': {'memory': 'named'},
    'mem-path': {'memory': 'mem-path'},
    'VGA': {'vga': True},
    'virtio-mem': {'virtio_mem_mib': 256},
    'does not migrate': {'unmigratable': True},
    'TCG': {'tcg': True},
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_runs(lab, variant):
    name = variant.replace(' ', '-')
    vm = BareGuest(name, **{'mem_mib': 128, 'dirty_mib': 32, **VARIANTS[variant]})
    console, process = start(lab, lab.hosts[0], vm)
    ready = console.wait_for('ready').text
    assert f'vcpus={vm.vcpus} ' in ready
    assert vm.mem_mib - 8 < int(ready.split('mem=')[1].split()[0]) <= vm.mem_mib
    console.wait_ticks(5)
    assert console.verify() > (vm.mem_mib - 8) * 256 * (vm.fill != 'zero')
    assert console.check() == ['h1']
    process.kill()
    process.wait()


def test_huge_pages_back_the_guest(lab):
    vm = BareGuest('huge', mem_mib=64, dirty_mib=8, memory='hugetlb')
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(huge_pages(64))
        except MemoryError as error:
            pytest.skip(str(error))
        console, process = start(lab, lab.hosts[0], vm)
        console.wait_for('ready')
        console.verify()
        with open(f'/proc/{process.pid}/smaps', encoding='ascii') as file:
            assert 'KernelPageSize:     2048 kB' in file.read()
        process.kill()
        process.wait()


def test_memory_plugged_into_the_running_guest_is_worked_in(lab):
    vm = BareGuest('plugged', mem_mib=64, dirty_mib=8, dimm_slots=2)
    console, process = start(lab, lab.hosts[0], vm)
    console.wait_for('ready')
    qmp = vm.qmp(lab.hosts[0])
    vm.plug_dimm(qmp, console, mib=128)
    assert console.verify() > 180 * 256
    assert [each['data']['size'] for each in qmp('query-memory-devices')] == [128 << 20]
    assert not console.trouble()
    process.kill()


# ---- the Linux guest

@pytest.fixture(scope='module')
def linux():
    kernel, initrd = linux_guest()
    return {'kernel': kernel, 'initrd': initrd}


def event_time(qmp, name):
    """When QEMU says that it happened last, in seconds of the host's clock."""
    stamp = [event for event in qmp.events if event['event'] == name][-1]['timestamp']
    return stamp['seconds'] + stamp['microseconds'] / 1e6


def test_linux_moves_with_its_disk_and_network(lab, linux):
    h1, h2 = lab.hosts
    for host in lab.hosts:
        host.add_tap('tap1')
    vm = LinuxGuest('penguin', disk=make_disk(f'{lab.shared}/penguin.raw'), network=1, **linux)
    console, source = start(lab, h1, vm)
    heartbeats = lab.udp(HEARTBEAT_PORT)
    console.wait_for('lab-guest ready')
    heartbeats.wait_ticks(20)
    _, destination = start(lab, h2, vm, incoming='tcp:0:4445')
    from_qmp, to_qmp = vm.qmp(h1), vm.qmp(h2)
    to_qmp.wait_status('inmigrate')
    mark, heartbeat_mark = console.mark(), heartbeats.mark()
    console.wait_ticks(2)
    from_qmp('stop')  # QEMU before 9.0 loses writes of a guest that runs under TCG meanwhile
    from_qmp('migrate-set-parameters', max_bandwidth=10 << 30)
    from_qmp('migrate', uri='tcp:h2:4445')
    assert from_qmp.wait_migration()['status'] == 'completed'
    to_qmp.wait_status('paused')
    to_qmp('cont')
    console.wait_ticks(5)
    heartbeats.wait_ticks(20)

    assert console.check(after=mark) == ['h1', 'h2']
    assert not heartbeats.missing(after=heartbeat_mark)
    stood = event_time(to_qmp, 'RESUME') - event_time(from_qmp, 'STOP')
    assert stood - 0.01 < heartbeats.pause(after=heartbeat_mark) < stood + 0.1
    assert console.verify() >= vm.work_mib * 256
    from_qmp('quit')
    source.wait()
    vm.power_off(console, destination)
    assert check_disk(vm.disk) > 5
    assert not judge.leftovers(h1, 'penguin') and not judge.leftovers(h2, 'penguin')


def test_linux_sees_damaged_memory(lab, linux):
    vm = LinuxGuest('bruised', mem_mib=128, work_mib=16, memory='shared', **linux)
    console, process = start(lab, lab.hosts[0], vm)
    console.wait_for('lab-guest ready')
    console.verify()
    qmp = vm.qmp(lab.hosts[0])
    qmp('stop')
    with guest_memory(process) as memory:
        for address in range(0, vm.mem_mib << 20, PAGE):
            magic, page, _, number = struct.unpack('4Q', os.pread(memory.fileno(), 32, address))
            if magic == PAGES_MAGIC and number > 1:
                break
        os.pwrite(memory.fileno(), b'?', address + 77)
    qmp('cont')
    console.wait_for(f'^BAD page={page} expected={number} found={number} word=9')
    with pytest.raises(AssertionError):
        console.verify()
    process.kill()


def test_linux_boots_from_ovmf(lab, linux):
    vm = LinuxGuest('ovmf', firmware='ovmf', vars=make_vars(f'{lab.shared}/ovmf.fd'), **linux)
    console, process = start(lab, lab.hosts[0], vm)
    console.wait_for('lab-guest ready', timeout=60)
    assert judge.leftovers(lab.hosts[0], 'ovmf')
    vm.power_off(console, process)
    assert not judge.leftovers(lab.hosts[0], 'ovmf')


def test_linux_takes_the_memory_of_virtio_mem(lab, linux):
    vm = LinuxGuest('virtio-mem-linux', virtio_mem_mib=256, work_mib=300, **linux)
    console, process = start(lab, lab.hosts[0], vm)
    console.wait_for('lab-guest ready')
    assert console.verify() >= 200 * 256
    process.kill()
