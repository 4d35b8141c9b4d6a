# SPDX-License-Identifier: Apache-2.0
"""vmmig-vmm by itself: its command line, its guest and devices, and guests that move from one VMM to another on one
host without agents (tests/unit/dirtylog/vmm_move.c), so that what the self-checking guest notices is known before
agents come into it."""
import os
import re
import signal
import subprocess

import pytest
from agents import eventually, fault_build
from lab import Lab, VmmGuest, huge_pages
from lab.guests import built

DRIVERS = ['bitmap', 'ring', 'plain']
PROGRAM = 'tools/vmmig-vmm/vmmig-vmm'
needs_faults = pytest.mark.skipif(not os.path.exists(os.path.join(fault_build(), PROGRAM)),
                                  reason=f'NO BUILD WITH FAULT POINTS in {fault_build()}: set VMMIG_FAULTS_BUILD')


@pytest.fixture(scope='module')
def host():
    with Lab(hosts=1) as lab:
        yield lab.hosts[0]


def log_of(process):
    with open(process.log, encoding='utf-8', errors='replace') as file:
        return file.read()


def armed(faults):
    return {**os.environ, **({'VMMIG_FAULTS': faults} if faults else {})}


class Moved:
    """A guest that goes from VMM to VMM on one host. Faults: of its first VMM, and of vmm_move."""

    def __init__(self, host, vm, vmm_faults=None, mover_faults=None):
        self.host, self.vm, self.moves = host, vm, 0
        self.mover_faults = mover_faults
        self.mover = os.path.join(fault_build() if mover_faults else built(''), 'tests/unit/dirtylog/vmm_move')
        self.console = host.lab.console(vm.name)
        self.socket = vm.attach_path
        self.processes = []
        self.process = self.popen(vm.argv(program=os.path.join(fault_build(), PROGRAM) if vmm_faults else None),
                                  vmm_faults)
        self.console.wait_for('ready', timeout=60)

    def popen(self, argv, faults=None):
        self.processes.append(self.host.popen(argv, name=self.vm.name, env=armed(faults)))
        return self.processes[-1]

    def try_move(self, other, socket, rounds=3):
        eventually('a VMM that waits', lambda: other.poll() is not None or os.path.exists(self.host.path(socket)))
        assert other.poll() is None, log_of(other)
        return subprocess.run([self.mover, self.host.path(self.socket), self.host.path(socket), str(rounds)],
                              capture_output=True, text=True, check=False, env=armed(self.mover_faults))

    def move(self, **changes):
        """Returns what vmm_move printed, as a dictionary of numbers."""
        self.moves += 1
        socket = f'{self.vm.attach_path}{self.moves}'
        other = self.popen(self.vm.argv(incoming=True, socket=socket))
        done = self.try_move(other, socket, **changes)
        assert done.returncode == 0, done.stderr + log_of(other)
        assert self.process.wait(10) == 0
        self.process, self.socket = other, socket
        self.console.wait_for('^hb', timeout=10, after=self.console.mark())
        return {name: int(value) for name, value in re.findall(r'(\w+)=(\d+)', done.stdout)}

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()

    def end(self):
        self.console.verify()
        self.console.check()
        self.process.terminate()
        assert self.process.wait(10) == 0


def busy(name, **options):
    return VmmGuest(name, **{'mem_mib': 64, 'vcpus': 4, 'dirty_mib': 8, 'rate_mbps': 2000, 'writer': 2000,
                             **options})


@pytest.fixture
def boot(host):
    """Starts guests, and ends them with the test."""
    guests = []

    def start(vm, **faults):
        guests.append(Moved(host, vm, **faults))
        return guests[-1]

    yield start
    for guest in guests:
        guest.kill()


# ---- moves

@pytest.mark.parametrize('tracking', DRIVERS)
def test_a_busy_guest_moves_from_vmm_to_vmm(boot, tracking):
    guest = boot(busy(f'busy-{tracking}', tracking=tracking))
    for _ in range(2):
        assert guest.move()['pages'] > 64 * 256
    guest.end()


VARIANTS = {
    'above-4g': {'below_4g_mib': 32},
    'hugetlb': {'hugetlb': True},
    'small-ring': {'tracking': 'ring', 'ring_entries': 1024},
    'eight-vcpus': {'vcpus': 8},
    'random': {'fill': 'random', 'pattern': 'random'},
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_guest_of_any_make_moves(boot, variant):
    vm = busy(variant, **VARIANTS[variant])
    with huge_pages(2 * vm.mem_mib if vm.hugetlb else 0):
        guest = boot(vm)
        guest.move()
        guest.end()


# ---- what the guest sees when a rule is broken

BROKEN = {
    'what is written last lost': ({'mover_faults': 'attach.paused.run=drop@*'}, {}),
    'a run lost in the first round': ({'mover_faults': 'attach.live.run=drop'}, {'dirty_mib': 1}),
    'a first harvest that is not everything': ({'vmm_faults': 'attach.first.harvest=drop'}, {}),
    'copied, then cleared': ({'mover_faults': 'attach.clear=drop@*'}, {'dirty_mib': 32, 'rate_mbps': 200}),
    'no pass after the state was saved': ({'mover_faults': 'attach.saved.pass=drop'}, {}),
    'what a device wrote is not marked': ({'vmm_faults': 'attach.mark=drop@*'}, {}),
}


# Not every driver can break every rule: a bitmap that is INITIALLY_SET is everything by itself, at first; the others
# clear in the harvest, which comes before any copy.
CASES = [(rule, tracking) for rule in BROKEN for tracking in DRIVERS
         if (tracking == 'bitmap') != (rule == 'a first harvest that is not everything')
         or rule not in ('a first harvest that is not everything', 'copied, then cleared')]


@needs_faults
@pytest.mark.parametrize('rule, tracking', CASES)
def test_the_guest_notices_a_broken_rule(boot, rule, tracking):
    faults, options = BROKEN[rule]
    guest = boot(busy(f'broken-{list(BROKEN).index(rule)}-{tracking}', tracking=tracking, **options), **faults)
    # What is not everything at first is not even taken for a copy.
    with pytest.raises((AssertionError, TimeoutError), match='BAD|errors=|no line|first harvest is not all'):
        guest.move()  # without its program it does not even go on
        guest.console.verify()
        guest.console.check()


# ---- the command line

@pytest.mark.parametrize('words, said', [
    ([], '--attach SOCKET is missing'),
    (['--attach', '/s'], '--kernel FILE or --incoming is missing'),
    (['--attach', '/s', '--incoming', '--vcpus', '9'], '--vcpus is 1 to 8'),
    (['--attach', '/s', '--incoming', '--memory', '10'], '--memory is at least 16 MiB'),
    (['--attach', '/s', '--incoming', '--memory', '17M', '--hugetlb'], 'multiple of 2048 KiB'),
    (['--attach', '/s', '--incoming', '--memory', '1x'], '--memory 1x is no SIZE'),
    (['--attach', '/s', '--incoming', '--tracking', 'magic'], '--tracking magic is no KIND'),
    (['--attach'], '--attach needs a value: SOCKET'),
    (['--incoming=yes'], '--incoming takes no value'),
    (['--nonsense'], 'unknown option --nonsense'),
])
def test_a_wrong_command_line(words, said):
    done = subprocess.run([built(PROGRAM), *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert done.stderr.startswith('vmmig-vmm: ') and said in done.stderr


@pytest.mark.parametrize('options, said', [
    (['--kernel', '/nonexistent'], 'cannot open /nonexistent: No such file'),
    (['--kernel', '/dev/null'], 'cannot read /dev/null'),
    (['--kernel', __file__], 'is no multiboot kernel'),
    (['--incoming', '--serial', 'unix:/nonexistent'], 'cannot connect to /nonexistent'),
    (['--incoming', '--serial', 'modem'], 'is none of stdio, null'),
    (['--incoming', '--tracking', 'trace:/nonexistent'], 'cannot open the recording /nonexistent'),
    (['--incoming', '--tracking', 'ring', '--ring-entries', '1000'], 'ring'),
])
def test_what_cannot_be_had(tmp_path, options, said):
    done = subprocess.run([built(PROGRAM), '--attach', tmp_path / 's', *options], capture_output=True, text=True,
                          check=False, timeout=30, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and said in done.stderr and done.stderr.count('\n') == 1, done
    assert not (tmp_path / 's').exists()


@needs_faults
def test_a_vmm_that_ends_while_an_agent_pauses_it_ends(host, boot, monkeypatch):
    """The pause comes when its vCPUs are gone."""
    monkeypatch.setenv('VMMIG_FAULTS_TOLD', '/run/vmlab/told')
    guest = boot(busy('ending', vcpus=2), vmm_faults='library.call.pause=delay:2000')
    monkeypatch.undo()  # the others have no fault points
    other = guest.popen(guest.vm.argv(incoming=True, socket=guest.vm.attach_path + '1'))
    eventually('a VMM that waits', lambda: os.path.exists(host.path(guest.vm.attach_path + '1')))
    with subprocess.Popen([guest.mover, host.path(guest.socket), host.path(guest.vm.attach_path + '1'), '1'],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as mover:
        eventually('the pause', lambda: os.path.exists(host.path('/run/vmlab/told')))
        guest.process.terminate()
        assert guest.process.wait(30) == 0
        mover.wait(30)
    assert other.poll() is None


def test_a_user_pauses_his_guest_by_himself(boot):
    guest = boot(busy('his', vcpus=2))
    guest.console.wait_ticks(3)
    guest.process.send_signal(signal.SIGUSR2)
    with pytest.raises(TimeoutError):
        while True:
            guest.console.wait_ticks(1, timeout=2)
    guest.process.send_signal(signal.SIGUSR2)
    guest.console.wait_ticks(3)
    assert guest.console.pause() > 1.5
    guest.end()


@needs_faults
def test_its_user_has_no_say_in_a_guest_that_is_the_agents(host, boot, tmp_path):
    """One that is waited for, and one that is loaded, but may go on where it came from yet."""
    guest = boot(busy('agents', vcpus=2), mover_faults='attach.send.RESUME=delay:2000')
    socket = guest.vm.attach_path + '1'
    other = guest.popen(guest.vm.argv(incoming=True, socket=socket))
    eventually('a VMM that waits', lambda: os.path.exists(host.path(socket)))
    told = tmp_path / 'told'

    def wish(number):
        other.send_signal(signal.SIGUSR2)
        eventually('what it says', lambda: log_of(other).count('the agent has the guest') == number)

    wish(1)
    with subprocess.Popen([guest.mover, host.path(guest.socket), host.path(socket), '2'], text=True,
                          env={**armed(guest.mover_faults), 'VMMIG_FAULTS_TOLD': str(told)},
                          stderr=subprocess.PIPE) as mover:
        eventually('a guest that is loaded', told.exists)
        wish(2)
        assert mover.wait(60) == 0, mover.stderr.read() + log_of(other)
    guest.process.wait(10)
    guest.process = other
    guest.console.wait_ticks(3)
    assert guest.console.pause() > 1.5
    other.send_signal(signal.SIGUSR2)  # from here on it is his
    with pytest.raises(TimeoutError):
        while True:
            guest.console.wait_ticks(1, timeout=2)
    other.send_signal(signal.SIGUSR2)
    guest.console.wait_ticks(3)
    guest.end()


# ---- states

def test_a_damaged_state_is_refused_and_the_guest_runs_on(host, boot):
    guest = boot(busy('damaged', rate_mbps=20, vcpus=1))
    other = guest.popen(guest.vm.argv(incoming=True, socket=guest.vm.attach_path + '1'))
    guest.mover_faults = 'move.state=corrupt'
    guest.mover = os.path.join(fault_build(), 'tests/unit/dirtylog/vmm_move')
    done = guest.try_move(other, guest.vm.attach_path + '1')
    assert done.returncode == 1 and 'callback `load` failed' in done.stderr
    assert 'its checksum is wrong' in log_of(other)
    assert other.poll() is None
    guest.console.wait_ticks(3)
    assert guest.console.check() == ['h1']


def test_without_kvm_a_recording_is_replayed(host, boot, tmp_path):
    vm = busy('recorded', options=['--record', str(tmp_path / 'trace')])
    guest = boot(vm)
    guest.move()
    guest.end()
    assert (tmp_path / 'trace').read_text().startswith('vmmig-trace 1\n')
    sockets = [str(tmp_path / 'a'), str(tmp_path / 'b')]
    replays = [host.popen([built(PROGRAM), '--attach', path, '--memory', '64M', '--serial', 'null', '--tracking',
                           f'trace:{tmp_path / "trace"}', *more]) for path, more in zip(sockets, ([], ['--incoming']))]
    try:
        eventually('two VMMs', lambda: all(map(os.path.exists, sockets)))
        done = subprocess.run([guest.mover, *sockets, '2'], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + log_of(replays[1])
        assert replays[0].wait(10) == 0
    finally:
        for process in replays:
            process.kill()
            process.wait()
