# SPDX-License-Identifier: Apache-2.0
"""The agent of another host, driven from here: `vmmig --agent HOST`."""
import re
import signal
import sys

import pytest
from agents import PKI, Cluster, eventually
from lab import BareGuest
from lab.guests import QEMU, built

STRANGER = 65534
# As the agent of h1, with what it has to show: greets the one of h2, and means the agent of a third host. Prints what it
# gets for an answer.
CHAIN = r'''
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1] + '/ca.crt')
context.load_cert_chain(sys.argv[1] + '/host.crt', sys.argv[1] + '/host.key')
connection = context.wrap_socket(socket.create_connection(('h2', 16550)), server_hostname='h2')
connection.sendall(b'VMMG\x01\x03\0\0')
stream = connection.makefile('rb')
assert stream.read(8) == b'VMMG\x01\0\0\0'
connection.sendall(b'VMMG\x08\0\0\0\x01\0\0\0' + b'\x08\x01\x10\x01\x22\x02h1')
print(stream.read())
'''


@pytest.fixture(scope='module')
def cluster():
    """h1 may drive h2, and not the other way."""
    with Cluster(start=False) as made:
        a1, a2 = made.agents
        a1.options = {'control-group': 'nogroup', 'connect-timeout': '1500'}
        a2.options = {'control-peer': 'h1'}
        for agent in made.agents:
            agent.start()
        yield made


def refused(agent, status, pattern, *words):
    done = agent.vmmig(*words, check=False)
    assert done.returncode == status, done
    assert re.fullmatch(f'vmmig: {pattern}\n', done.stderr), done.stderr
    assert not done.stdout


def test_a_vm_is_started_moved_and_called_back_from_afar(cluster):
    """Each command says of h2 what it says on h2."""
    a1, a2 = cluster.agents
    vm = BareGuest('web1', mem_mib=64, dirty_mib=8)
    console = cluster.console('web1')
    assert a1.vmmig('--agent', 'h2', 'run', 'web1', '--', *vm.argv()).stdout.startswith('web1: started')
    console.wait_for('ready')
    for words in (['list'], ['status', 'web1'], ['doctor']):
        assert a1.json(*words, '--agent', 'h2') == a2.json(*words)
    assert a1.json('status', '--agent', 'h2')['host'] == 'h2'
    assert a1.json('list')['vms'] == []

    mark = console.mark()
    a1.vmmig('--agent', 'h2', 'send', 'web1', '--to', 'h1', '--background', '--max-bandwidth', '64KiB')
    eventually('some bytes', lambda: a2.json('status', 'web1')['job']['wire_bytes'])
    assert a1.vmmig('--agent', 'h2', 'cancel', 'web1').stdout
    assert a1.vmmig('--agent', 'h2', 'watch', 'web1', check=False).returncode == 14
    eventually('its end here', lambda: not a1.json('list')['vms'])
    done = a1.vmmig('--agent', 'h2', 'send', 'web1', '--to', 'h1')
    assert done.stdout.startswith('web1 runs at h1 now\n  total time')
    console.wait_ticks(3)
    assert console.check(after=mark) == ['h2', 'h1']
    assert a1.names() == ['web1'] and a1.json('--agent', 'h2', 'list')['vms'] == []
    a1.end('web1')


def test_files_of_this_host_stay_here(cluster):
    a1, a2 = cluster.agents
    a2.vmmig('repo', 'init')
    refused(a1, 5, 'a file of this host cannot be given to the agent of another; do this there',
            '--agent', 'h2', 'image', 'import', built('tests/guest/bare/bare_pc.bin'), 'guest')
    assert a1.json('--agent', 'h2', 'image', 'list')['images'] == []
    refused(a1, 2, '--repo works without an agent: leave it or --agent out',
            '--agent', 'h2', 'image', 'list', '--repo', 'dir:/nowhere')


@pytest.mark.parametrize('agent, status, pattern', [
    ('nowhere.invalid', 6, 'nowhere.invalid: host nowhere.invalid is unknown.*'),
    ('h2:1', 6, 'h2:1: nobody listens at h2 port 1; is vmmigd running there.*'),
    ('a b', 2, '--agent a b: not an address: HOST, HOST:PORT or .* expected'),
], ids=['unknown', 'closed', 'malformed'])
def test_agents_that_cannot_be_reached(cluster, agent, status, pattern):
    refused(cluster.agents[0], status, pattern, '--agent', agent, 'list')


def test_nobody_is_obeyed_who_is_not_listed(cluster):
    """The hosts that move VMs to each other do not command each other for that; nor is anybody root there who is not here."""
    a1, a2 = cluster.agents
    refused(a2, 7, 'h1: host h2 may not drive this agent: it is no control-peer in the configuration here',
            '--agent', 'h1', 'run', 'web9', '--', QEMU)
    assert a1.json('list')['vms'] == []
    member = ['setpriv', f'--reuid={STRANGER}', f'--regid={STRANGER}', '--clear-groups']
    a1.host.run([*member, built('tools/vmmig'), 'list'])  # their own host's agent is theirs
    done = a1.host.popen([*member, built('tools/vmmig'), '--agent', 'h2', 'list'], name='member')
    assert done.wait(20) == 7
    with open(done.log, encoding='utf-8') as file:
        assert file.read() == 'vmmig: h2: the agents of other hosts are for root to drive\n'


def test_what_came_from_afar_goes_no_further(cluster):
    a1, a2 = cluster.agents
    before = len(a2.log())
    assert 'an agent passes on what is said on its own host only' in a1.host.run(
        [sys.executable, '-c', CHAIN, a1.host.path(PKI)])
    assert 'a client drives another agent' not in a2.log()[before:]


def test_an_agent_that_ends_meanwhile(cluster):
    """Who follows a job of its is told, and the agent between goes on."""
    a1, a2 = cluster.agents
    vm = BareGuest('web2', mem_mib=64, dirty_mib=8)
    console = cluster.console('web2')
    a1.vmmig('--agent', 'h2', 'run', 'web2', '--', *vm.argv())
    console.wait_for('ready')
    a1.vmmig('--agent', 'h2', 'send', 'web2', '--to', 'h1', '--background', '--max-bandwidth', '64KiB')
    watch = a1.popen('--agent', 'h2', 'watch', 'web2')
    assert watch.stdout.readline()
    a2.stop(signal.SIGKILL)
    said, _ = watch.communicate(timeout=30)
    assert watch.returncode == 6
    assert said.splitlines()[-1] == ("vmmig: web2: the job's end was not seen, ask `vmmig status web2`: the agent closed "
                                     'the connection')
    assert re.search('msg="the other agent was lost" agent="h2" error="h2 closed the connection"', a1.log())
    a2.start()
    eventually('the guest runs on there', lambda: a1.json('--agent', 'h2', 'status', 'web2')['state'] == 'running')
    eventually('nothing of it here', lambda: not a1.json('list')['vms'])
    a2.end('web2')
