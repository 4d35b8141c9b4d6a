#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Migrations both ways at once, under random faults, for as long as is asked.

    tests/soak/handover.py [--minutes N] [--seed N] [--vms N]

Two hosts, eight small guests that share a part of a core, half of them QEMU's, half vmmig-vmm's, agents whose time-outs
are divided by ten: agents crash, stand still, get errors, slow and full disks, lost and repeated messages, clocks that
jump; links are cut. (VMMs do not die: that may cost a guest, see the matrix.) Every twenty seconds or so the
faults end, everything has to settle, and is judged: each guest runs on exactly one host, its VMMs never ran at the
same instant, its memory is clean, its console without a gap; of descriptors an agent holds what it needs for its VMs,
and none besides. In the second half of the rounds no fault ends an agent, so that what one leaks adds up: its memory
of then is printed, and must be flat. What is done follows from the seed, which is printed, and the minutes: the same
two do the same again, at moments that the machine's load shifts. Ends with status 1 at the first failure."""
import argparse
import os
import random
import statistics
import sys
import time

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
for folder in ('fault', 'flow', ''):
    sys.path.insert(0, os.path.join(TESTS, folder))

from agents import Cluster, eventually, fault_build  # noqa: E402
from harness import PATIENCE, QemuPair, VmmPair, check_end, expect_end  # noqa: E402
from lab import judge  # noqa: E402

CPU_PERCENT = 90   # of one core, for all guests together
STEPS_PER_ROUND = 24
ROUND_SECONDS = 15  # about what one takes: how many rounds the minutes are
SETTLE_LIMIT = 60
LIVES_ON = 0.5     # of the rounds no agent is ended
# Descriptors for a VM that runs under an agent: of its process, and two of QMP or one of the attach protocol.
FDS_PER_VM = {QemuPair: 3, VmmPair: 2}
FLAT_BYTES = 4 << 20

MESSAGES = ('PREPARE', 'COMMIT', 'FINISHED', 'PREPARED', 'LOADED', 'RUNNING', 'ABORT', 'NEVER')
RECORDS = ('SENDING', 'COMMIT', 'DONE', 'ABORTING', 'ABORTED', 'SRC_CLOSED', 'PREPARING', 'LOADED', 'RUN', 'RUNNING',
           'NEVER', 'DST_CLOSED')
ATTACH_MESSAGES = ('TRACK', 'HARVEST', 'CLEAR', 'PAUSE', 'SAVE', 'LOAD', 'RESUME', 'QUIT')
FAULTS = [f'handover.send.{m}={f}' for m in MESSAGES for f in ('drop', 'duplicate', 'delay:300', 'crash')] + \
    [f'handover.{w}.{r}={f}' for r in RECORDS for w in ('before', 'after') for f in ('crash', 'delay:300')] + \
    [f'handover.before.{r}=error:ENOSPC' for r in RECORDS] + \
    [f'attempt.{p}={f}' for p in ('spawn', 'copied', 'loaded', 'resume', 'resumed', 'kill')
     for f in ('crash', 'error', 'delay:300')] + \
    [f'journal.{p}' for p in ('write=error:ENOSPC', 'write=delay:200@*', 'sync=error', 'written=crash')] + \
    [f'qmp.{p}={f}' for p in ('stop', 'cont', 'migrate', 'cont.answer', 'stop.answer') for f in ('error', 'delay:300')] + \
    [f'channel.{p}={f}@3' for p in ('send', 'ack') for f in ('drop', 'corrupt', 'duplicate')] + \
    [f'attach.{w}.{m}={f}' for w in ('send', 'receive') for m in ATTACH_MESSAGES for f in ('error', 'drop', 'crash')] + \
    [f'attach.send.{m}=delay:300' for m in ATTACH_MESSAGES] + \
    ['conn.read=error:ECONNRESET@50', 'conn.write=error:ECONNRESET@50', 'peer.send=drop', 'peer.receive=error',
     'clock.wall=jump:86400000@*', 'clock.wall=jump:-86400000@*']
ENDS_AN_AGENT = ('crash', 'journal.sync=error')  # who cannot know what is on the disk starts anew


class Guest:
    def __init__(self, soak, number):
        agent = soak.cluster.agents[number % 2]
        self.driver = soak.drivers[number // 2 % 2]
        self.vm, self.console, self.watch = self.driver.boot(agent, mem_mib=48, dirty_mib=2, rate_mbps=5, scan_mbps=50,
                                                             heartbeat_ms=50, seed=number + 1)
        self.name = self.vm.name
        with open(os.path.join(soak.cgroup, 'cgroup.procs'), 'w', encoding='ascii') as file:
            file.write(str(agent.json('status', self.name)['pid']))
        eventually('its VMM to be watched', self.watch.running)
        del self.watch.late[:]  # nobody watched when it was booted
        self.mark = self.console.mark()


class Soak:
    def __init__(self, cluster, options):
        self.cluster, self.options = cluster, options
        self.random = random.Random(options.seed)
        self.cgroup = self.limit_cpu()
        self.drivers = [driver(cluster, 'soak') for driver in (QemuPair, VmmPair)]
        for agent in cluster.agents:
            agent.options = {'peer-timeout': '2000', 'connect-timeout': '2000', 'log-level': 'info',
                             'attach-vmm': self.drivers[1].program, 'vm-cgroup': self.cgroup}
            self.start(agent)
        known = {point['name'] for point in cluster.agents[0].json('debug', 'faults')['points']}
        unknown = {fault.split('=')[0] for fault in FAULTS} - known
        assert not unknown, f'there are no fault points {sorted(unknown)}'
        self.guests = [Guest(self, number) for number in range(options.vms)]
        self.sent = self.faults = self.crashes = self.moved = 0
        self.usage = {agent: [] for agent in cluster.agents}  # (pid, descriptors besides VMs', bytes) at each calm
        self.worst = 0.0

    def limit_cpu(self):
        """A cgroup for all guests; they never sleep, and would leave the agents nothing."""
        name = os.path.basename(self.cluster.folder)
        unified = os.path.exists('/sys/fs/cgroup/cgroup.controllers')
        path = os.path.join('/sys/fs/cgroup' if unified else '/sys/fs/cgroup/cpu', name)
        os.makedirs(path)
        if unified:
            with open('/sys/fs/cgroup/cgroup.subtree_control', 'w', encoding='ascii') as file:
                file.write('+cpu')
        for file_name, value in ((('cpu.max', f'{CPU_PERCENT * 1000} 100000'),) if unified else
                                 (('cpu.cfs_period_us', '100000'), ('cpu.cfs_quota_us', str(CPU_PERCENT * 1000)))):
            with open(os.path.join(path, file_name), 'w', encoding='ascii') as file:
                file.write(value)
        return path

    @staticmethod
    def start(agent):
        os.environ['VMMIG_PATIENCE'] = str(PATIENCE)
        try:
            agent.start(build=fault_build())
        finally:
            del os.environ['VMMIG_PATIENCE']

    @staticmethod
    def dead(agent):
        return agent.process.poll() is not None

    def repair(self):
        for agent in self.cluster.agents:
            if self.dead(agent):
                check_end(agent)
                self.crashes += 1
                self.start(agent)

    # ---- one step

    def step(self, lives_on):
        """Everything that is decided here follows from the seed alone."""
        choose = self.random
        guest = choose.choice(self.guests)
        what = choose.random()
        agent = choose.choice(self.cluster.agents)
        pause = choose.uniform(0.05, 0.5)
        fault = choose.choice(FAULTS)
        direction = choose.choice(('both', 'in', 'out'))
        self.repair()
        self.send(guest)
        if lives_on and (any(end in fault for end in ENDS_AN_AGENT) if what < 0.55 else what < 0.65):
            pass
        elif what < 0.55:
            self.faults += 1
            expect_end(agent, fault)
            agent.vmmig('debug', 'faults', '--arm', fault, check=False)
        elif what < 0.65:
            self.faults += 1
            agent.kill()
        elif what < 0.75:
            self.faults += 1
            agent.host.cut(direction)
            time.sleep(pause)
            agent.host.heal()
        elif what < 0.80:
            self.faults += 1
            agent.process.send_signal(19)
            time.sleep(pause)
            agent.process.send_signal(18)
        time.sleep(pause)

    def send(self, guest):
        """To the other host, if it is not on its way already."""
        runs = guest.watch.running()
        if len(runs) != 1:
            return
        source = next(agent for agent in self.cluster.agents if agent.host.name == runs[0])
        other = next(agent for agent in self.cluster.agents if agent is not source)
        if not self.dead(source) and source.vmmig('send', guest.name, '--to', other.host.name, '--background',
                                                  check=False).returncode == 0:
            self.sent += 1

    # ---- calm

    def settled(self, guest):
        """The host where it runs, and nothing is under way; else None."""
        here = []
        for agent in self.cluster.agents:
            done = agent.vmmig('status', guest.name, check=False)
            if done.returncode == 3 or 'state      ended' in done.stdout:
                continue
            if done.returncode or 'state      running' not in done.stdout or 'job  ' in done.stdout.replace(
                    'last job', ''):
                return None
            here.append(agent.host.name)
        return here[0] if len(here) == 1 and guest.watch.running() == here else None

    def calm(self):
        for agent in self.cluster.agents:
            agent.host.heal()
        self.repair()
        for agent in self.cluster.agents:
            agent.vmmig('debug', 'faults', '--arm', 'none')
        began = time.monotonic()
        places = [eventually(f'{guest.name} on one host', lambda g=guest: self.repair() or self.settled(g), SETTLE_LIMIT)
                  for guest in self.guests]
        self.worst = max(self.worst, time.monotonic() - began)
        for guest, place in zip(self.guests, places):
            self.judge(guest, place)
        self.exchange(places)
        for agent in self.cluster.agents:
            self.measure(agent, [guest for guest, place in zip(self.guests, places) if place == agent.host.name])

    def exchange(self, places):
        """One guest each way, undisturbed: what still waits for a last word that was lost asks over the next connection
        from the other host, and is done with."""
        for agent, other in (self.cluster.agents, self.cluster.agents[::-1]):
            if agent.host.name not in places:
                continue
            number = places.index(agent.host.name)
            guest = self.guests[number]
            # Among eight guests that share a part of a core a VMM may take longer to start than the agents' short limits.
            eventually(f'{guest.name} moves', lambda a=agent, g=guest, o=other: a.vmmig(
                'send', g.name, '--to', o.host.name, check=False).returncode == 0, SETTLE_LIMIT)
            places[number] = eventually(f'{guest.name} on the other host', lambda g=guest: self.settled(g))
            self.sent += 1

    def measure(self, agent, guests):
        """Descriptors and memory of an agent that has these guests, settled. The last connections to the other end a
        moment later."""
        pid, seen = agent.process.pid, self.usage[agent]
        of_vms = sum(FDS_PER_VM[type(guest.driver)] for guest in guests)
        least = min((fds for _, fds, _ in seen), default=None)

        def descriptors():
            found = len(os.listdir(f'/proc/{pid}/fd')) - of_vms
            return found if least is None or found <= least else 0

        try:
            found = eventually('', descriptors, 15)
        except TimeoutError:
            names = [os.readlink(f'/proc/{pid}/fd/{fd}') for fd in os.listdir(f'/proc/{pid}/fd')]
            raise AssertionError(f'agent on {agent.host.name} holds {len(names)} descriptors, {of_vms} for '
                                 f'{len(guests)} VMs, {least} besides before: {sorted(names)}') from None
        seen.append((pid, found, judge.rss_anon(pid)))

    def judge(self, guest, place):
        assert not guest.watch.overlaps(), f'{guest.name}: TWO COPIES RAN: {guest.watch.overlaps()}'
        assert not guest.watch.late, f'{guest.name}: a VMM was seen too late'
        guest.console.wait_ticks(2, timeout=60)
        hosts = guest.console.check(after=guest.mark)
        assert hosts[-1] == place, f'{guest.name}: {hosts}, not on {place}'
        guest.console.verify(timeout=120)
        self.moved += len(hosts) - 1
        guest.mark = guest.console.mark()
        for agent in self.cluster.agents:
            if agent.host.name == place:
                continue
            eventually(f'{guest.name}: left over on {agent.host.name}', lambda a=agent: not [
                what for what in judge.leftovers(a.host, guest.name, [a.process.pid])
                if not what.endswith(('.judge', f'vmlab/{guest.name}.qmp', f'vmlab/{guest.name}.vmm'))], 10)

    def judge_usage(self):
        """Memory of the agents that lived on to the end: flat from the first third of their life on. Their descriptors
        were judged at each calm."""
        for agent in self.cluster.agents:
            life = [rss for pid, _, rss in self.usage[agent] if pid == agent.process.pid]
            third = max(1, len(life) // 3)
            early, late = (statistics.median(part) for part in (life[third:2 * third] or life, life[-third:]))
            _, fds, _ = self.usage[agent][-1]
            print(f'agent on {agent.host.name}, through {len(life)} rounds of its life: {fds} descriptors besides '
                  f'those for its VMs, at the end of every round; its own memory in KiB '
                  + ' '.join(str(rss >> 10) for rss in life))
            assert late <= early + FLAT_BYTES, f'agent on {agent.host.name}: memory grew from {early} to {late}'

    def run(self):
        began = time.monotonic()
        rounds = max(2, round(60 * self.options.minutes / ROUND_SECONDS))
        for number in range(rounds):
            for _ in range(STEPS_PER_ROUND):
                self.step(lives_on=number >= (1 - LIVES_ON) * rounds)
            self.calm()
            print(f'round {number + 1} of {rounds}, at {time.monotonic() - began:.0f} s: {self.sent} migrations begun, '
                  f'{self.moved} arrived, {self.faults} faults, {self.crashes} agents restarted', flush=True)
        self.judge_usage()
        for agent in self.cluster.agents:
            assert agent.stop() == 0, f'the agent on {agent.host.name} ended with status {agent.process.returncode}'
        print(f'soak: seed {self.options.seed}, {rounds} rounds, {self.sent} migrations begun, {self.moved} arrived, '
              f'{self.faults} faults, {self.crashes} agents restarted: 0 guests ran twice, 0 were lost, 0 descriptors, '
              f'processes and files were left; longest time to settle all {self.worst:.1f} s')


def remove(path):
    """Removes a cgroup, once its last process is gone."""
    def gone():
        try:
            for folder, _, _ in os.walk(path, topdown=False):
                os.rmdir(folder)
        except OSError:
            return False
        return True
    eventually(f'{path} to be empty', gone)


def main():
    parser = argparse.ArgumentParser(description='Migrations both ways at once, under random faults.')
    parser.add_argument('--minutes', type=float, default=15)
    parser.add_argument('--seed', type=int, default=random.randrange(1 << 32))
    parser.add_argument('--vms', type=int, default=8)
    options = parser.parse_args()
    print(f'soak: --seed {options.seed}', flush=True)
    if not os.path.exists(os.path.join(fault_build(), 'agent/vmmigd')):
        sys.exit(f'no build with fault points in {fault_build()}: set VMMIG_FAULTS_BUILD')
    soaks = []
    try:
        with Cluster(start=False) as cluster:
            soaks.append(Soak(cluster, options))
            soaks[0].run()
    finally:
        for soak in soaks:
            remove(soak.cgroup)


if __name__ == '__main__':
    main()
