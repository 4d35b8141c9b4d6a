# SPDX-License-Identifier: Apache-2.0
"""File systems that were frozen for a snapshot, in a guest that does not let itself be thawed at once: it is not left so."""
import os
import signal
import subprocess

import pytest
from agents import Cluster, eventually, fault_build
from snapshots import THAW, FrozenGuest, GuestAgent, make_agent, notes, thawing, untouched

NONE = 'snapshot.arrived=delay:0'


@pytest.fixture(scope='module')
def agent():
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        yield make_agent(cluster, faults=NONE)


class Guest(FrozenGuest):
    def is_thawed_at_last(self):
        """When its agent obeys again. Then nothing is left that was about it."""
        assert self.inside.frozen
        self.inside.refuses.clear()
        eventually('file systems that are thawed', lambda: not self.inside.frozen)
        eventually('the end of who tried', lambda: not thawing(self.agent) and not notes(self.agent))


@pytest.fixture(scope='module')
def guest(agent):
    return Guest(agent, 'web1')


def left_frozen(guest, name):
    guest.inside.refuses.add(THAW)
    taken = guest.agent.json('snapshot', 'web1', name)
    assert taken['snapshot']['frozen'] == 2 and guest.inside.frozen
    assert 'may still be frozen' in taken['note'] and 'trying again' in taken['note'], taken


def test_a_thaw_that_fails_is_tried_until_it_does_not(agent, guest):
    left_frozen(guest, 'one')
    said = guest.thaws()
    eventually('another attempt', lambda: guest.thaws() > said)
    finding, = agent.json('doctor', 'web1')['findings']
    assert 'frozen' in finding['why'] and 'qemu-ga' in finding['advice'], finding
    guest.is_thawed_at_last()
    finding, = agent.json('doctor', 'web1')['findings']
    assert 'frozen' not in finding['why'], finding
    untouched(guest.vm, agent)


@pytest.mark.parametrize('both', [False, True])
def test_the_agent_dies_meanwhile(agent, guest, both):
    """Who tries lives on; if that dies, too, the next agent starts another one."""
    left_frozen(guest, f'agent-{both}')
    agent.kill()
    if both:
        tries, = thawing(agent)
        os.kill(tries, signal.SIGKILL)
        agent.start(faults=NONE)
        eventually('another one', lambda: [pid for pid in thawing(agent) if pid != tries])
    guest.is_thawed_at_last()
    if not both:
        agent.start(faults=NONE)
    eventually('the VM', lambda: agent.json('status', 'web1')['presence'] == 'present')


def test_the_next_snapshot(agent, guest):
    """It cannot freeze what is frozen: it thaws before, or says why not. What it leaves is thawed by one process."""
    left_frozen(guest, 'first')
    refused = agent.vmmig('snapshot', 'web1', 'refused', '--guest-agent', guest.path, check=False)
    assert refused.returncode == 1 and 'frozen since an earlier snapshot' in refused.stderr, refused
    assert guest.inside.frozen and len(thawing(agent)) == 1
    guest.inside.refuses.clear()
    taken = agent.json('snapshot', 'web1', 'second', '--guest-agent', guest.path)
    assert taken['snapshot']['frozen'] == 2 and not guest.inside.frozen
    eventually('the end of who tried', lambda: not thawing(agent) and not notes(agent))


def test_a_failed_snapshot_says_so(agent, guest):
    """Its user has to know, whatever else went wrong."""
    guest.inside.refuses.add(THAW)
    agent.vmmig('debug', 'faults', '--arm', 'snapshot.memory=error:ENOSPC')
    failed = agent.vmmig('snapshot', 'web1', 'full', check=False)
    assert failed.returncode == 11 and 'may still be frozen' in failed.stderr, failed
    guest.is_thawed_at_last()


def test_the_guest_does_not_wait_until_a_failed_one_has_ended(agent, guest):
    """The rest of its memory is read before that."""
    said = guest.thaws()
    agent.vmmig('debug', 'faults', '--arm', 'snapshot.switched=error:EIO,snapshot.failed=hold')
    agent.vmmig('snapshot', 'web1', 'slow', '--background')
    eventually('file systems that are thawed', lambda: guest.thaws() > said and not guest.inside.frozen)
    assert agent.json('status', 'web1')['job']['state'] == 'running'
    agent.vmmig('debug', 'faults', '--arm', 'none')
    assert agent.vmmig('watch', 'web1', check=False).returncode == 16
    untouched(guest.vm, agent)


def test_a_guest_that_refuses_to_freeze_is_not_thawed(agent, guest):
    """Somebody else may have frozen it, and wants it so."""
    guest.inside.refuses.add('guest-fsfreeze-freeze')
    said = guest.thaws()
    taken = agent.json('snapshot', 'web1', 'unfrozen')
    assert taken['snapshot']['frozen'] == 0 and 'were not frozen' in taken['note'], taken
    refused = agent.vmmig('snapshot', 'web1', 'never', '--guest-agent', guest.path, check=False)
    assert refused.returncode == 1 and 'refuses' in refused.stderr, refused
    guest.inside.refuses.clear()
    assert guest.thaws() == said and not notes(agent)


def test_a_restored_guest_is_thawed_at_last(agent, guest):
    """And who tried for a VM that has ended ends, too."""
    agent.vmmig('snapshot', 'web1', 'still')
    guest.vm.qmp(agent.host)('quit')
    eventually('the end of the VM', lambda: agent.host.reap() or agent.json('status', 'web1')['presence'] == 'ended')
    guest.inside.frozen = True
    guest.inside.refuses.add(THAW)
    done = agent.json('restore', 'web1@still', '--as', 'back')
    assert 'trying again' in done['note'], done
    guest.is_thawed_at_last()
    finding, = agent.json('doctor', 'back')['findings']
    assert 'restored' in finding['why'], finding
    guest.inside.refuses.add(THAW)
    agent.vmmig('snapshot', 'back', 'again')
    assert guest.inside.frozen and len(thawing(agent)) == 1
    os.kill(agent.json('status', 'back')['pid'], signal.SIGKILL)
    eventually('the end of who tried', lambda: agent.host.reap() or not thawing(agent) and not notes(agent), 60)


@pytest.mark.parametrize('words, point', [
    (['restore', 'web1@still', '--as', 'told'], 'restore.kept'),
    (['clone', 'still:v1', '--as', 'told', '--set', 'mac=keep'], 'clone.telling')])
def test_the_agent_dies_before_it_has_thawed_it(agent, guest, words, point):
    """It is a VM already, runs on, and the next agent sees that it is thawed."""
    agent.stop()
    agent.start(build=fault_build())  # whose fetchers know no point of a snapshot
    inside = guest.inside
    if words[0] == 'clone':
        inside = GuestAgent(guest.path.replace('web1', 'told'))  # a clone has sockets of its own
        agent.vmmig('template', 'publish', 'web1@still', 'still:v1')
        agent.cluster.console('told')
    inside.refuses.clear()
    inside.frozen = True
    agent.vmmig('debug', 'faults', '--arm', f'{point}=crash')
    assert agent.vmmig(*words, check=False).returncode == 6
    agent.process.wait(20)
    assert inside.frozen
    agent.start(build=fault_build())
    eventually('the VM', lambda: agent.json('status', 'told')['state'] == 'running')
    eventually('file systems that are thawed', lambda: not inside.frozen)
    eventually('the end of who tried', lambda: not thawing(agent) and not notes(agent))
    agent.end('told')
    if words[0] == 'clone':
        subprocess.run(['rm', '-rf', agent.host.path('/var/lib/vmmig/clones/told')], check=True)
    agent.stop()
    agent.start(faults=NONE)


def test_one_that_is_restored_paused_is_thawed_when_it_runs(agent, guest):
    """After the test before: there is a snapshot, and its VM has ended."""
    guest.inside.frozen = True
    guest.inside.refuses.add(THAW)  # as one that stands does not answer
    done = agent.json('restore', 'web1@still', '--as', 'stands', '--paused')
    assert 'when' in done['note'] or 'after it goes on' in done['note'], done
    said = guest.thaws()
    eventually('another attempt', lambda: guest.thaws() > said)
    guest.vm.qmp(agent.host, of='stands')('cont')
    guest.is_thawed_at_last()
    os.kill(agent.json('status', 'stands')['pid'], signal.SIGKILL)
