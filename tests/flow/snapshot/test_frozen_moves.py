# SPDX-License-Identifier: Apache-2.0
"""A guest whose file systems are still frozen for a snapshot is sent to another host: it is thawed there."""
import os
import signal

import pytest
from agents import Cluster, eventually
from snapshots import THAW, FrozenGuest, make_agent, notes, thawing


@pytest.fixture(scope='module')
def agents():
    with Cluster(hosts=2, start=False, plain=True) as cluster:
        first, second = cluster.agents
        make_agent(cluster)
        second.options['libexec-dir'] = first.options['libexec-dir']
        second.start()
        yield first, second


def left_frozen(first, name):
    guest = FrozenGuest(first, name)
    guest.inside.refuses.add(THAW)
    assert first.json('snapshot', name, 'one')['snapshot']['frozen'] == 2 and guest.inside.frozen
    return guest


def is_thawed_at_last(guest, agent):
    assert guest.inside.frozen
    guest.inside.refuses.clear()
    eventually('file systems that are thawed', lambda: not guest.inside.frozen)
    eventually('the end of who tried', lambda: not thawing(agent) and not notes(agent))
    guest.console.wait_ticks(3)


def test_who_has_it_thaws_it(agents):
    first, second = agents
    guest = left_frozen(first, 'web1')
    assert first.json('send', 'web1', '--to', 'h2')['state'] == 'done'
    eventually('the end of who tried here', lambda: not thawing(first) and not notes(first), 60)
    said = guest.thaws()
    eventually('another attempt', lambda: guest.thaws() > said)
    finding, = second.json('doctor', 'web1')['findings']
    assert 'frozen' in finding['why'], finding
    is_thawed_at_last(guest, second)
    second.end('web1')


def test_the_other_agent_dies_when_it_has_it(agents):
    first, second = agents
    guest = left_frozen(first, 'web2')
    assert first.json('send', 'web2', '--to', 'h2')['state'] == 'done'
    tries, = eventually('who tries', lambda: thawing(second))
    second.kill()
    assert thawing(second) == [tries]
    os.kill(tries, signal.SIGKILL)
    second.start()
    eventually('another one', lambda: [pid for pid in thawing(second) if pid != tries])
    is_thawed_at_last(guest, second)
    second.end('web2')
    eventually('the end of who tried here', lambda: not thawing(first) and not notes(first), 60)


def test_one_that_stays_is_thawed_where_it_is(agents):
    first, second = agents
    guest = left_frozen(first, 'web3')
    first.vmmig('send', 'web3', '--to', 'h2', '--max-bandwidth', '1M', '--background')
    eventually('the copy', lambda: (first.json('status', 'web3').get('job') or {}).get('phase') == 'copying')
    assert len(notes(second)) == 1 and not thawing(second)
    first.vmmig('cancel', 'web3')
    assert first.vmmig('watch', 'web3', check=False).returncode == 14
    eventually('no note there', lambda: not notes(second))
    is_thawed_at_last(guest, first)
    first.end('web3')


def test_one_that_could_not_be_thawed_there_stays(agents):
    """Its command line does not tell where its agent is."""
    first, second = agents
    guest = FrozenGuest(first, 'web4', port=False)
    guest.inside.refuses.add(THAW)
    first.vmmig('snapshot', 'web4', 'one', '--guest-agent', guest.path)
    refused = first.vmmig('send', 'web4', '--to', 'h2', check=False)
    lines = [line for line in refused.stderr.splitlines() if line.startswith('vmmig:')]
    assert refused.returncode == 5 and len(lines) == 1 and 'frozen' in lines[0], refused
    assert second.names() == [] and notes(second) == []
    is_thawed_at_last(guest, first)
    assert first.json('send', 'web4', '--to', 'h2')['state'] == 'done'
    second.end('web4')
