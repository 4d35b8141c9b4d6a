# SPDX-License-Identifier: Apache-2.0
"""A clone moves to another host that has the template and sees its overlay; to no other."""
import subprocess

import pytest
from agents import Cluster, eventually
from lab import BareGuest
from lab.guests import built

from .test_clone import content, export, kill, leases, publish, start_agent, write

MIB = 1 << 20


@pytest.fixture(scope='module')
def agents():
    """Two hosts with one repository, and a template in it. Overlays lie where both see them."""
    with Cluster(hosts=2, start=False, plain=True) as cluster:
        shared = cluster.shared
        for agent in cluster.agents:
            agent.options.update({'repository': f'dir:{shared}/repo', 'clone-dir': f'{shared}/clones'})
        first, second = cluster.agents
        subprocess.run([built('tests/unit/repo/repo_tool'), f'dir:{shared}/repo', 'init'], check=True)
        for agent in (first, second):
            start_agent(agent)
        publish(first, BareGuest('web1', mem_mib=128, dirty_mib=4, rate_mbps=1), 'debian12:v1')
        yield first, second


def test_a_clone_arrives_and_is_snapshotted_there(agents):
    first, second = agents
    console = first.cluster.console('c1')
    made, = first.json('clone', 'debian12:v1', '--as', 'c1')['clones']
    write(first, 'c1', '-P 0x22 8M 64k')
    console.wait_ticks(3)
    mark = console.mark()
    sent = first.json('send', 'c1', '--to', 'h2')
    assert sent['state'] == 'done', sent
    console.wait_ticks(5)
    console.verify()
    assert console.check(mark)[-1] == 'h2'
    whole = bytes(MIB) + b'\x11' * (3 * MIB) + bytes(4 * MIB) + b'\x22' * (64 << 10)
    whole += bytes(64 * MIB - len(whole))
    assert content(second, f'{second.cluster.shared}/clones/c1/disk0.qcow2') == whole
    assert leases(second) == [made['template'].join(('t:', ''))]
    taken = second.json('snapshot', 'c1', 'there')['snapshot']
    assert taken['parent'] == f't:{made["template"]}' and taken['disk_read_bytes'] == 64 << 10
    assert export(second, 'c1@there', 'disk0.raw') == whole
    kill(second, {'vm': 'c1', 'pid': second.json('status', 'c1')['pid']})


def refused(first, name, *says, status):
    console = first.cluster.console(name)
    made, = first.json('clone', 'debian12:v1', '--as', name)['clones']
    failed = first.vmmig('send', name, '--to', 'h2', check=False)
    lines = [line for line in failed.stderr.splitlines() if line.startswith('vmmig:')]
    assert failed.returncode == status and len(lines) == 1 and all(word in lines[0] for word in says), failed
    console.wait_ticks(3)
    assert first.json('status', name)['state'] == 'running'
    kill(first, made)


def restart(agent, **options):
    agent.stop()
    agent.options.update(options)
    agent.start()


def test_without_the_template_there_it_stays(agents):
    first, second = agents
    subprocess.run([built('tests/unit/repo/repo_tool'), f'dir:{first.cluster.shared}/other', 'init'], check=True)
    restart(second, repository=f'dir:{first.cluster.shared}/other')
    try:
        refused(first, 'c2', 'debian12@', 'repository', status=3)
    finally:
        restart(second, repository=f'dir:{first.cluster.shared}/repo')


def test_with_its_overlay_on_the_host_alone_it_stays(agents):
    first, _ = agents
    restart(first, **{'clone-dir': '/var/lib/vmmig/clones'})
    try:
        refused(first, 'c3', 'disk0.qcow2', 'No such file', status=3)
    finally:
        restart(first, **{'clone-dir': f'{first.cluster.shared}/clones'})


def test_a_vm_on_its_way_is_not_snapshotted(agents):
    first, _ = agents
    console = first.cluster.console('c4')
    made, = first.json('clone', 'debian12:v1', '--as', 'c4')['clones']
    first.vmmig('send', 'c4', '--to', 'h2', '--max-bandwidth', '1M', '--background')
    eventually('the copy', lambda: (first.json('status', 'c4').get('job') or {}).get('phase') == 'copying')
    said = first.vmmig('snapshot', 'c4', 'never', check=False)
    assert said.returncode == 4 and 'c4' in said.stderr and said.stderr.count('\n') == 1, said
    first.vmmig('cancel', 'c4')
    assert first.vmmig('watch', 'c4', check=False).returncode == 14
    first.vmmig('snapshot', 'c4', 'now')
    console.wait_ticks(3)
    assert first.json('snapshot', 'list', 'c4')['snapshots'][0]['name'] == 'now'
    kill(first, made)
