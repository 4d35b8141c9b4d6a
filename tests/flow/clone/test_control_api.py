# SPDX-License-Identifier: Apache-2.0
"""docs/control-api.md: its commands and its program do what it says; its tables are those of the product."""
import json
import os
import re
import socket
import subprocess

import pytest
from agents import SOCKET, Cluster, install
from lab import BareGuest
from lab.guests import ROOT
from lab.hosts import inside

from .test_clone import kill, make_agent

PAGE = os.path.join(ROOT, 'docs/control-api.md')


def page():
    with open(PAGE, encoding='utf-8') as file:
        return file.read()


def typed(program):
    return [line.strip() for line in page().splitlines() if line.startswith(f'    {program} ')]


@pytest.fixture(scope='module')
def agent():
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        agent = make_agent(cluster)
        vm = BareGuest('web1', mem_mib=64, dirty_mib=4, rate_mbps=1)
        console = cluster.console('web1')
        agent.host.popen(vm.argv(), name='web1')
        console.wait_for('ready', timeout=60)
        agent.vmmig('attach', 'web1', '--qmp', vm.qmp_path)
        yield agent


@pytest.fixture(autouse=True)
def workers(agent):
    """The consoles of the clones, and their end."""
    consoles = [agent.cluster.console(f'worker-{i}') for i in (1, 2)]
    yield consoles
    kill(agent, *({'vm': vm['vm'], 'pid': vm['pid']} for vm in agent.json('list')['vms'] if 'worker' in vm['vm']))


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """The environment of a user who has installed vmmig's libraries."""
    return install(tmp_path_factory.mktemp('installed'), 'libvmmig-client.so')


def test_its_commands_do_what_it_says(agent, workers):
    lines = typed('vmmig')
    assert len(lines) == 5
    said = [json.loads(agent.vmmig(*line.split()[1:]).stdout) for line in lines]
    assert said[0]['state'] == 'done' and said[1]['template'] == 'debian12:v1'
    assert [clone['vm'] for clone in said[2]['clones']] == ['worker-1', 'worker-2']
    assert said[3]['state'] == 'running' and [s['name'] for s in said[4]['snapshots']] == ['golden']
    for console in workers:
        console.wait_ticks(3)
    agent.vmmig('template', 'delete', 'debian12:v1')
    agent.vmmig('snapshot', 'delete', 'web1@golden')


def run(agent, environment, *words):
    return subprocess.run(inside(agent.host.pid, list(words)), env=environment, capture_output=True, text=True,
                          check=False, timeout=60)


def test_its_program_does_the_same(agent, workers, installed, tmp_path):
    code, = re.findall(r'```c\n(.*?)```', page(), re.S)
    (tmp_path / 'golden.c').write_text(code)
    command, = typed('cc')
    made = subprocess.run(['sh', '-c', f'{command} -Wall -Wextra -Werror'], cwd=tmp_path, env=installed,
                          capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    program = str(tmp_path / 'golden')
    done = run(agent, installed, program, 'web1')
    assert done.returncode == 0, done
    assert re.match(r'web1@golden: the guest stood still for [\d.]+ ms\nworker-1 runs as process \d+\n'
                    r'worker-2 runs as process \d+\n$', done.stdout), done.stdout
    for console in workers:
        console.wait_ticks(3)
    again = run(agent, installed, program, 'web1')
    assert (again.returncode, again.stderr.count('\n')) == (1, 1) and 'web1@golden' in again.stderr
    nobody = run(agent, installed, program, 'nobody')
    assert (nobody.returncode, nobody.stderr.count('\n')) == (3, 1) and 'nobody' in nobody.stderr


def test_its_bytes_are_understood(agent):
    hello, = re.findall(r'is `([0-9a-f ]+)` behind `([0-9a-f ]+)`', page())
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(10)
        s.connect(agent.host.path(SOCKET))
        s.sendall(bytes.fromhex(hello[1]) + bytes.fromhex(hello[0]))
        answer = s.recv(4096)
    assert answer[:4] == b'VMMG' and answer[8:10] == b'\x02\x00' and answer[12:14] == b'\x08\x01'


def test_its_kinds_are_those_of_the_product():
    with open(os.path.join(ROOT, 'base/error.h'), encoding='utf-8') as file:
        kinds = re.findall(r'X\(\w+, "([\w-]+)", (\d+), "([^"]+)"\)', file.read())
    assert re.findall(r'^\| `([\w-]+)` \| (\d+) \| (.*) \|$', page(), re.M) == kinds
