# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of matrix.table: one guest, two hosts, an agent on each; a migration, a fault, what was broken is
started again, and a judgement. Hosts, agents and the guest live on from case to case: a case begins on the host where
the last one left the guest, and only a guest that a case ended is booted anew.

A case is `POINT ROLE FAULT OUTCOME [with=SPEC] [peer=SPEC] [resolve=...] [slow] [quick]`, see matrix.table. A point named
"library." is one of libvmmig-attach, in the VMM itself."""
import json
import os
import re
import signal
import time
from dataclasses import dataclass

from agents import eventually, fault_build
from lab import BareGuest, VmmGuest, judge
from lab.keeper import has_ended
from watch import QemuWatch, VmmWatch

PATIENCE = 10   # limits of the agents are a tenth of what they are in production
IN_DOUBT = 15   # status of an agent that cannot know what is on the disk (base/error.h)
DOUBT = 1.0     # seconds for which is looked whether nobody runs what is in doubt
HANGS = 4.0     # seconds until an agent that hangs is killed: nobody waits for it any longer while the guest stands
# A copy that takes most of a second for what the guest writes in a fifth: long before QEMU finds that next to nothing
# is left, and pauses the guest by itself, the agent has done so.
SLOW = ('--max-bandwidth', '8M', '--downtime-limit', '1000')
OUTCOMES = ('source', 'destination', 'ended', 'operator')
ROLES = ('source', 'destination')
GUEST = {'mem_mib': 64, 'dirty_mib': 4, 'rate_mbps': 20, 'heartbeat_ms': 10}


@dataclass
class Case:
    line: int
    point: str
    role: str
    fault: str
    outcomes: tuple
    options: dict
    words: frozenset
    # what was seen
    seen: str = ''
    recovery: float = float('nan')
    pause: float = float('nan')

    @property
    def name(self):
        return f'{self.point} {self.role} {self.fault}'

    @property
    def quick(self):
        return 'quick' in self.words

    @property
    def comes_late(self):
        """May an attempt of a former case meet its fault?"""
        specs = [self.point, self.options.get('with', ''), self.options.get('peer', '')]
        return self.point.startswith('journal.') or any(LATE.search(spec) for spec in specs)

    @property
    def kind(self):
        """crash, error, delay ...; what happens outside by its own name: vmm, host, cut, freeze, cancel."""
        return re.match('[a-z]+', self.fault.removeprefix('hold+')).group()


# What an attempt does, perhaps, when it is settled: also one of a former case, on the next connection.
LATE = re.compile(r'handover\.(before|after)\.(SRC_CLOSED|DST_CLOSED)|'
                  r'handover\.(send|receive)\.(FINISHED|ABORT|NEVER|RUNNING|ENDED|UNKNOWN)')


def read_table(path):
    """The cases of a table file."""
    cases = []
    with open(path, encoding='ascii') as file:
        for number, line in enumerate(file, 1):
            words = line.split('#')[0].split()
            if not words:
                continue
            point, role, fault, outcome, *rest = words
            outcomes = tuple(outcome.split('|'))
            options = dict(word.split('=', 1) for word in rest if '=' in word)
            words = frozenset(word for word in rest if '=' not in word)
            assert role in ROLES and set(outcomes) <= set(OUTCOMES), f'{path}:{number}: {line}'
            assert set(options) <= {'with', 'peer', 'resolve'} and words <= {'slow', 'quick'}, f'{path}:{number}: {line}'
            cases.append(Case(number, point, role, fault, outcomes, options, words))
    names = [(case.name, tuple(case.options.items())) for case in cases]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]
    return cases


class QemuPair:
    """How guests of one VMM are started and looked at."""
    name = 'qemu'
    not_its_points = ('attach.', 'library.')
    agent_options = {}

    def __init__(self, cluster, prefix):
        self.cluster, self.prefix, self.count = cluster, prefix, 0

    def boot(self, agent, faults='', **options):
        """A guest that runs under the agent. Returns (vm, console, watch). faults: of its VMM; options: of the guest,
        beside or instead of GUEST."""
        assert not faults
        self.count += 1
        vm = BareGuest(f'{self.prefix}{self.count}', **{**GUEST, **options})
        console = self.cluster.console(vm.name)
        watch = QemuWatch({host.name: host.path(vm.judge_path) for host in self.cluster.hosts})
        agent.host.popen(vm.argv(), name=vm.name)
        console.wait_for('ready')
        agent.vmmig('attach', vm.name, '--qmp', vm.qmp_path)
        return vm, console, watch


class VmmPair:
    """The same with vmmig-vmm, which links libvmmig-attach.

    Its fault points are armed when it is started, by a script in its place: the first VMM of a guest by what boot() is
    given, those that wait for it by what arm_incoming() says."""
    name = 'vmmig-vmm'
    not_its_points = ('qmp.', 'stream.')

    SCRIPT = """#!/bin/bash
unset VMMIG_FAULTS
export VMMIG_PATIENCE={patience} VMMIG_FAULTS_TOLD={folder}/told
faults={folder}/first
for word; do [ "$word" = --incoming ] && faults={folder}/incoming; done
[ -s "$faults" ] && export VMMIG_FAULTS=$(<"$faults")
exec -a "$0" {program} "$@"
"""

    def __init__(self, cluster, prefix):
        self.cluster, self.prefix, self.count = cluster, prefix + 'v', 0
        self.folder = os.path.join(cluster.folder, 'faulty')
        os.makedirs(self.folder, exist_ok=True)
        self.program = os.path.join(self.folder, 'vmmig-vmm')
        with open(self.program, 'w', encoding='ascii') as file:
            file.write(self.SCRIPT.format(patience=PATIENCE, folder=self.folder,
                                          program=os.path.join(fault_build(), 'tools/vmmig-vmm/vmmig-vmm')))
        os.chmod(self.program, 0o755)
        # A cgroup for each VMM: its memory is asked for page by page then.
        self.agent_options = {'attach-vmm': self.program, 'vm-cgroup': cluster.cgroup('vms')}

    def write(self, name, text):
        with open(os.path.join(self.folder, name), 'w', encoding='ascii') as file:
            file.write(text)

    def arm_incoming(self, faults):
        self.write('incoming', faults)
        self.write('told', '')

    def told(self):
        """Faults that acted in a VMM, as they were written."""
        with open(os.path.join(self.folder, 'told'), encoding='ascii') as file:
            return file.read().split()

    def boot(self, agent, faults='', **options):
        self.count += 1
        vm = VmmGuest(f'{self.prefix}{self.count}', events=True, **{**GUEST, **options})
        console = self.cluster.console(vm.name)
        watch = VmmWatch({host.name: host.path(vm.events_path) for host in self.cluster.hosts})
        self.write('first', faults)
        self.write('told', '')
        agent.host.popen(vm.argv(program=self.program), name=vm.name)
        console.wait_for('ready')
        agent.vmmig('attach', vm.name, '--socket', vm.attach_path)
        return vm, console, watch


def expect_end(agent, spec):
    """These faults may end it: by a crash, or since it cannot know what is on the disk."""
    if 'crash' in spec:
        agent.may_end.add(-signal.SIGKILL)
    if 'journal.sync=error' in spec:
        agent.may_end.add(IN_DOUBT)


def crash_host(agent):
    agent.may_end.add(-signal.SIGKILL)
    agent.host.crash()


def check_end(agent):
    """An agent that has ended did so because of what the test did to it. None ever ends otherwise."""
    code = agent.process and agent.process.poll()
    assert code is None or code in agent.may_end, f'the agent on {agent.host.name} ended with {code}: ' \
        f'{agent.log()[-2000:]}'


class Harness:
    def __init__(self, cluster, driver, prefix='g', mistakes='', limit=20):
        self.cluster, self.driver = cluster, driver(cluster, prefix)
        self.mistakes, self.limit = mistakes, limit
        self.vm = self.console = self.watch = None
        self.last_look = {}  # of place(), for who asks what is missing
        for agent in cluster.agents:
            agent.options = {'peer-timeout': '2000', 'connect-timeout': '2000', 'log-level': 'debug',
                             **self.driver.agent_options}
            self.start(agent)

    # ---- agents

    def start(self, agent):
        check_end(agent)
        os.environ['VMMIG_PATIENCE'] = str(PATIENCE)
        try:
            agent.start(build=fault_build())
            if self.mistakes:
                self.arm(agent, '')
        finally:
            del os.environ['VMMIG_PATIENCE']

    def arm(self, agent, spec):
        words = [word for word in (spec, self.mistakes) if word]
        expect_end(agent, spec)
        done = agent.vmmig('debug', 'faults', '--arm', ','.join(words) or 'none', check=False)
        # What held goes on at once, perhaps to a crash that was armed with it, before the answer.
        assert done.returncode == 0 or 'crash' in spec, done.stderr
        if done.returncode:
            eventually(f'the crash of {spec}', lambda: self.dead(agent))

    @staticmethod
    def dead(agent):
        return agent.process.poll() is not None

    def points(self, agent):
        return {point['name']: point for point in agent.json('debug', 'faults')['points'] if point['armed']}

    def acted(self, agent, name):
        """Has the fault acted? Its crash is the proof of a crash."""
        if name.startswith('library.'):
            return any(told.startswith(f'{name}=') for told in self.driver.told())
        if self.dead(agent):
            return True
        done = agent.vmmig('debug', 'faults', check=False)
        found = re.search(rf'^{re.escape(name)}=\S+  acted (\d+)', done.stdout, re.M)
        return self.dead(agent) or bool(found and int(found.group(1)))

    # ---- what there is

    def vm_at(self, agent):
        """The VM as its agent has it; {} if it has none, None if the agent does not say."""
        if self.dead(agent):
            return None
        done = agent.vmmig('list', '--json', check=False)
        if done.returncode:
            return None
        return next((vm for vm in json.loads(done.stdout)['vms'] if vm['vm'] == self.vm.name), {})

    @staticmethod
    def unsettled(vm):
        return bool(vm and vm['handover'] and not vm['handover']['settled'])

    def findings(self, agent):
        done = agent.vmmig('doctor', self.vm.name, '--json', check=False)
        return json.loads(done.stdout)['findings'] if done.returncode == 0 else []

    def place(self):
        """The host where the guest runs as its agent and its VMM say; 'ended'; None: not settled."""
        here = []
        for agent in self.cluster.agents:
            vm, findings = self.vm_at(agent), self.findings(agent)
            self.last_look[agent.host.name] = vm, findings
            if vm is None or self.unsettled(vm) or (vm and (vm['job'] or vm['state'] == 'arriving')):
                return None
            if any(f['role'] and f['state'] and not f['owner'] in ('here', 'peer', 'nobody') for f in findings):
                return None
            if vm and vm['presence'] == 'present' and vm['state'] == 'running':
                here.append(agent.host.name)
            elif vm and vm['presence'] != 'ended':
                return None
        runs = self.last_look['guest'] = self.watch.running()
        if len(here) == 1:
            return here[0] if runs == here else None
        return 'ended' if not here and not runs else None

    def pid(self, agent):
        vm = self.vm_at(agent)
        return vm and vm['pid']

    # ---- between cases

    def ready(self, faults=''):
        """A guest that runs and is settled; returns the agents as (source, destination). faults: of its VMM, which is
        a new one then."""
        for agent in self.cluster.agents:
            if self.dead(agent):
                self.start(agent)
            self.arm(agent, '')
        if faults or not self.vm or self.place() in (None, 'ended'):
            self.forget()
            self.vm, self.console, self.watch = self.driver.boot(self.cluster.agents[0], faults)
        where = eventually('a guest', self.place)
        agents = self.cluster.agents
        return agents if where == agents[0].host.name else agents[::-1]

    def quiet(self, agents):
        """What attempts of former cases still have to say and to write, they do on the next connection of their hosts:
        two moves without a fault, so that the fault is met by the case's own attempt."""
        for source, destination in (agents, agents[::-1]):
            source.vmmig('send', self.vm.name, '--to', destination.host.name)
            eventually('a guest that has moved', lambda d=destination: self.place() == d.host.name)
        return agents

    def forget(self):
        if not self.vm:
            return
        self.watch.close()
        for agent in self.cluster.agents:
            for pid, argv in agent.host.processes().items():
                if any(re.search(rf'\b{self.vm.name}\b', word) for word in argv):
                    os.kill(pid, signal.SIGKILL)
            vm = self.vm_at(agent)
            if vm:
                eventually('its end', lambda a=agent: (self.vm_at(a) or {}).get('presence') != 'present')
                agent.vmmig('detach', self.vm.name, check=False)
        self.vm = None

    def broken(self):
        """After a case that failed: everything from the beginning."""
        for agent in self.cluster.agents:
            agent.host.heal()
            crash_host(agent)
            self.start(agent)
            if self.vm:
                agent.vmmig('detach', self.vm.name, check=False)
        if self.vm:
            self.watch.close()
        self.vm = None

    # ---- what happens from outside at a point that holds

    def outside(self, what, agents):
        """`vmm:ROLE` dies; `cut:ROLE:DIRECTION[:SECONDS]` of its link, and `freeze:ROLE[:SECONDS]` of its agent, for one
        second and for 1.5 unless it is said; `host:ROLE` loses its power; `agent:ROLE` is killed; `cancel`."""
        kind, *rest = what.split(':')
        agent = agents[ROLES.index(rest[0])] if rest else agents[0]
        if kind == 'vmm':
            pid = self.vmm_pid(agent)
            os.kill(pid, signal.SIGKILL)  # which takes its time: the agent must not come first
            eventually('the death of a VMM', lambda: not self.lives(agent, pid))
        elif kind == 'cut':
            agent.host.cut(rest[1])
        elif kind == 'freeze':
            agent.process.send_signal(signal.SIGSTOP)
        elif kind == 'host':
            crash_host(agent)
            agent.process.wait(10)  # nobody is to be armed there any more
            self.lose_unsynced(agent)
            eventually('the end of the host', lambda: self.dead(agent))
        elif kind == 'agent':
            agent.kill()
        elif kind == 'cancel':
            agents[0].vmmig('cancel', self.vm.name)
        else:
            raise ValueError(what)

    def lose_unsynced(self, agent):
        """What a host that lost its power had not synced is gone: with that mistake the agent keeps aside what was."""
        synced = agent.host.path('/var/lib/vmmig/journal/data.mdb.synced')
        if 'journal-not-synced' in self.mistakes and os.path.exists(synced):
            os.replace(synced, synced.removesuffix('.synced'))

    def repair(self, what, agents):
        kind, *rest = what.split(':')
        agent = agents[ROLES.index(rest[0])] if rest else agents[0]
        if kind == 'cut':
            time.sleep(float(rest[2]) if len(rest) > 2 else 1.0)
            agent.host.heal()
        elif kind == 'freeze':
            time.sleep(float(rest[1]) if len(rest) > 1 else 1.5)
            agent.process.send_signal(signal.SIGCONT)

    @staticmethod
    def lives(agent, pid):
        agent.host.reap()
        return not has_ended(pid)

    def vmm_pid(self, agent):
        return next(pid for pid, argv in agent.host.processes().items()
                    if any(re.search(rf'\b{self.vm.name}\b', word) for word in argv))

    # ---- a case

    def run(self, case):
        held = case.fault.startswith('hold+')
        spec = f'{case.point}={"hold" if held else case.fault}'
        in_vmm = case.point.startswith('library.')
        agents = self.ready(spec if in_vmm and case.role == 'source' else '')
        if case.comes_late:
            agents = self.quiet(agents)
        if in_vmm and case.role == 'destination':
            self.driver.arm_incoming(spec)
        source, destination = agents
        victim = agents[ROLES.index(case.role)]
        for agent in agents:
            mine = [spec] if agent is victim and not in_vmm else []
            mine += [case.options['with']] if agent is victim and 'with' in case.options else []
            mine += [case.options['peer']] if agent is not victim and 'peer' in case.options else []
            self.arm(agent, ','.join(mine))
        processes = [agent.process for agent in agents]
        mark = self.console.mark()
        self.watch.begin()
        source.vmmig('send', self.vm.name, '--to', destination.host.name, '--background',
                     *(SLOW if 'slow' in case.words else ()))
        eventually(f'{case.name}: the fault', lambda: self.acted(victim, case.point))
        began = time.monotonic()
        if held:
            eventually(f'{case.name}: held', lambda: self.points(victim)[case.point]['holds'])
            for what in case.fault.removeprefix('hold+').split('+'):
                self.outside(what, agents)
            frozen = 'freeze' in case.fault
            rest = case.options.get('with', '')
            if not frozen and not self.dead(victim):
                self.arm(victim, rest)
            for what in case.fault.removeprefix('hold+').split('+'):
                self.repair(what, agents)
            if frozen:
                self.arm(victim, rest)
        elif case.kind == 'hang' and not in_vmm:
            time.sleep(HANGS)
            victim.kill()
        if 'operator' in case.outcomes:
            self.operate(case, agents)
        else:
            for agent in agents:
                if agent is victim and 'crash' in case.fault and not in_vmm:
                    eventually('the crash', lambda: self.dead(victim))
                if self.dead(agent):
                    self.start(agent)
        if in_vmm:
            self.driver.arm_incoming('')
        self.judge(case, agents, mark, began)
        for agent, process in zip(agents, processes):
            option = case.options.get('with' if agent is victim else 'peer', '')
            for name, fault in (spec.split('=', 1) for spec in option.split(',') if spec):
                eventually(f'{name}={fault} has acted', lambda a=agent, p=process, n=name, f=fault:
                           a.process is not p or (self.dead(a) if f.startswith('crash') else self.acted(a, n)))
        if in_vmm and case.fault.startswith(('hang', 'delay')):
            self.forget()  # a callback of it may still be late

    def operate(self, case, agents):
        """The host that may know does not come back: an operator fences it, decides, and later it does come back."""
        role, verdict = case.options['resolve'].split(':')
        agent = agents[ROLES.index(role)]
        other = agents[1 - ROLES.index(role)]
        if other.process.poll() is None:
            crash_host(other)
        eventually('doubt', lambda: (vm := self.vm_at(agent)) and vm['handover'] and vm['handover']['in_doubt'])
        eventually('nobody runs it while it is in doubt', lambda: self.watch.running() == [], 2)
        until = time.monotonic() + DOUBT
        while time.monotonic() < until:
            assert self.watch.running() == [], 'it runs while it is in doubt'
            time.sleep(0.05)
        finding, = self.findings(agent)
        assert finding['owner'] == 'undecided' and other.host.name in finding['advice'], finding
        agent.vmmig('resolve', self.vm.name, f'--{verdict}', '--i-fenced', other.host.name)
        self.start(other)

    def judge(self, case, agents, mark, began):
        names = {agents[0].host.name: 'source', agents[1].host.name: 'destination', 'ended': 'ended'}

        def look():
            assert not self.watch.overlaps(), f'TWO COPIES RAN: {self.watch.overlaps()}'
            for agent in agents:
                if self.dead(agent):
                    self.start(agent)
            return self.place()

        try:
            place = eventually(f'{case.name}: an end', look, self.limit)
        except TimeoutError as error:
            raise TimeoutError(f'{error}; the last look: {self.last_look}') from None
        case.recovery = time.monotonic() - began
        case.seen = names[place]
        assert not self.watch.overlaps(), f'TWO COPIES RAN: {self.watch.overlaps()}'
        assert not self.watch.late, 'the test saw a VMM too late'
        if 'operator' in case.outcomes:
            assert case.seen == self.ordered(case), f'ended as {case.seen}, not as {self.ordered(case)}, as was ordered'
            case.seen = 'operator'
        assert case.seen in case.outcomes, f'ended as {case.seen}, not {"|".join(case.outcomes)}'
        self.judge_doctor(agents, place)
        if place != 'ended':
            self.console.wait_ticks(3)
            hosts = self.console.check(after=mark)
            assert hosts[-1] == place and len(hosts) <= 2, f'the guest spoke on {hosts}'
            self.console.verify()
            case.pause = self.console.pause(after=mark)
        else:  # the record of a VM that ended, and its socket, are there until it is detached
            for agent in agents:
                agent.vmmig('detach', self.vm.name, check=False)
        for agent in agents:
            left = self.left(agent, place == agent.host.name)
            if left:
                eventually(f'{case.name}: left over on {agent.host.name}: {left}',
                           lambda a=agent: not self.left(a, place == a.host.name), 5)

    @staticmethod
    def ordered(case):
        """Where the guest is after what an operator decided: one that is given up has ended, as the other has."""
        role, verdict = case.options['resolve'].split(':')
        return role if verdict == 'here' else 'ended'

    def judge_doctor(self, agents, place):
        """The owner's doctor says that it is here. Nobody else's does, nor that it is nowhere, or undecided."""
        for agent in agents:
            owners = [finding['owner'] for finding in self.findings(agent)]
            here = place == agent.host.name
            wrong = {'here', 'undecided'} | ({'nobody'} if place != 'ended' else set())
            assert owners == ['here'] if here else not set(owners) & wrong, \
                f'the doctor of {agent.host.name} says {owners} of a guest that is on {place}'

    def left(self, agent, owner):
        """What is left of the guest on a host, besides itself if it is there. Sockets of the user's own options are
        QEMU's to remove, which one that was killed did not."""
        found = judge.leftovers(agent.host, self.vm.name, [agent.process.pid])
        if owner:
            found = [what for what in found if not what.startswith(('process', 'file'))] + \
                [what for what in found if what.startswith('process')][1:]
        vm = {} if owner else self.vm_at(agent)
        if vm:
            found.append(f'record of a VM: {vm["state"]}')
        users = ('.judge', f'vmlab/{self.vm.name}.qmp', f'vmlab/{self.vm.name}.vmm')
        return [what for what in found if not what.endswith(users)]


def print_matrix(cases, out):
    """The table that a reader of the test's output sees."""
    width = max(len(case.point) for case in cases)
    fault = max(len(case.fault) for case in cases)
    print(f'\n{"point":{width}}  {"role":11}  {"fault":{fault}}  {"expected":20}  {"seen":11}  recovery    pause',
          file=out)
    for case in cases:
        print(f'{case.point:{width}}  {case.role:11}  {case.fault:{fault}}  {"|".join(case.outcomes):20}  '
              f'{case.seen:11}  {case.recovery:6.2f} s  {case.pause * 1000:6.0f} ms', file=out)
    kinds = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    print(f'\n{"kind of fault":13}  cases  recovery: median   worst  pause of the guest: median    worst', file=out)
    for kind, those in sorted(kinds.items()):
        print(f'{kind:13}  {len(those):5}  {figures(case.recovery for case in those):>24}  '
              f'{figures(case.pause for case in those):>35}', file=out)
    longest = max((case for case in cases if case.pause == case.pause), key=lambda case: case.pause, default=None)
    if longest:
        print(f'the longest pause of a guest: {longest.pause:.2f} s, {longest.name}', file=out)
    print(f'{len(cases)} cases; recovery: median and worst {figures(case.recovery for case in cases)} (limits divided by '
          f'{PATIENCE})', file=out)


def figures(values):
    """Median and worst; a guest that ended had no pause."""
    values = sorted(value for value in values if value == value)
    return f'{values[len(values) // 2]:6.2f} s {values[-1]:6.2f} s' if values else '-'
