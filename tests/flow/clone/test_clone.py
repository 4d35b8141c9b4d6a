# SPDX-License-Identifier: Apache-2.0
"""Templates and clones, as their user sees them."""
import hashlib
import os
import signal
import subprocess

import pytest
from agents import Cluster, eventually
from lab import BareGuest
from lab.guests import built

MIB = 1 << 20
REPO = '/var/lib/vmmig/repo'


def tool(agent, *words):
    return subprocess.run([built('tests/unit/repo/repo_tool'), 'dir:' + agent.host.path(REPO), *words],
                          check=True, capture_output=True, text=True).stdout


def leases(agent):
    url = 'dir:' + agent.host.path(REPO)
    done = subprocess.run([built('tests/unit/snapshot/mount_tool'), 'leases', url], check=True,
                          capture_output=True, text=True)
    return [line.split(' ')[0] for line in done.stdout.splitlines()]


def make_agent(cluster, folder=None):
    """The first host's agent, started, with an empty repository. folder: of the build whose programs it uses."""
    agent = cluster.agents[0]
    folder = folder or os.path.dirname(os.path.dirname(built('agent/vmmigd')))
    agent.options.update({
        'nbdkit-plugin': f'{folder}/snapshot/nbdkit-vmmig-plugin.so',
        'libexec-dir': f'{folder}/snapshot',
        'cache-dir': '/var/lib/vmmig/cache',
        'record-time': '1000',
    })
    tool(agent, 'init')
    return agent.start()


@pytest.fixture(scope='module')
def agent():
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        yield make_agent(cluster)


@pytest.fixture(scope='module')
def template(agent):
    """debian12:v1, of a guest with a disk that is gone since."""
    vm = BareGuest('web1', mem_mib=256, dirty_mib=4, rate_mbps=1)
    disk = os.path.join(agent.cluster.shared, 'web1.raw')
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'raw', disk, '64M'], check=True)
    subprocess.run(['qemu-io', '-f', 'raw', '-c', 'write -P 0x11 1M 3M', disk], check=True, capture_output=True)
    vm.options = ['-blockdev', f'driver=raw,node-name=d0,file.driver=file,file.filename={disk}',
                  '-device', 'virtio-blk-pci,drive=d0']
    console = agent.cluster.console('web1')
    agent.host.popen(vm.argv(), name='web1')
    console.wait_for('ready', timeout=60)
    agent.vmmig('attach', 'web1', '--qmp', vm.qmp_path)
    agent.vmmig('snapshot', 'web1', 'first')
    published = agent.json('template', 'publish', 'web1@first', 'debian12:v1')
    assert published['template'] == 'debian12:v1' and published['source'] == 'web1@first'
    vm.qmp(agent.host)('quit')
    eventually('web1 ended', lambda: agent.json('status', 'web1')['state'] == 'ended')
    agent.vmmig('detach', 'web1')
    return published


def kill(agent, *clones):
    for clone in clones:
        try:
            os.kill(clone['pid'], signal.SIGKILL)
        except ProcessLookupError:
            pass
        eventually('it ended', lambda: agent.json('status', clone['vm'])['state'] == 'ended')
        agent.vmmig('detach', clone['vm'])
        folder = agent.host.path(f'/var/lib/vmmig/clones/{clone["vm"]}')
        subprocess.run(['rm', '-rf', folder], check=True)


def clone(agent, template, name, *words):
    console = agent.cluster.console(name)
    made, = agent.json('clone', template, '--as', name, *words)['clones']
    return made, console


def test_a_clone_goes_on_where_the_snapshot_was(agent, template):
    made, console = clone(agent, 'debian12:v1', 'c1')
    assert made['template'] == f'debian12@{template["digest"]}'
    assert ['vmgenid' in note for note in made['notes']] == [True]
    console.wait_ticks(10)
    console.verify()
    assert agent.json('status', 'c1')['state'] == 'running'
    assert leases(agent) == [f't:debian12@{template["digest"]}']
    kill(agent, made)
    eventually('no lease', lambda: leases(agent) == [])


def test_several_at_once_share_what_they_do_not_write(agent, template):
    consoles = [agent.cluster.console(f'many-{i}') for i in (1, 2, 3)]
    made = agent.json('clone', 'debian12:v1', '--as', 'many', '--count', '3')['clones']
    assert [c['vm'] for c in made] == ['many-1', 'many-2', 'many-3']
    for console in consoles:
        console.wait_ticks(10)
        console.verify()
    disks = agent.host.path('/var/lib/vmmig/clones')
    assert sorted(os.listdir(disks)) == ['many-1', 'many-2', 'many-3']
    kill(agent, *made)


def test_the_template_is_deleted_under_a_clone(agent, template):
    digest = template['digest']
    made, console = clone(agent, 'debian12:v1', 'c2')
    agent.vmmig('template', 'delete', 'debian12:v1')
    agent.vmmig('snapshot', 'delete', 'web1@first', check=False)
    assert agent.json('template', 'list')['templates'] == []
    tool(agent, 'collect', '1000')
    console.wait_ticks(10)
    console.verify()  # every page, also those that were never read before
    # The clone's own disk still reads through.
    disk = f'/run/vmmig/images/t:debian12@{digest}/disk0.raw'
    read = agent.host.run(['sh', '-c', f'dd if={disk} bs=1M skip=1 count=3 2>/dev/null | sha256sum'])
    assert read.split()[0] == hashlib.sha256(b'\x11' * (3 * MIB)).hexdigest()
    failed = agent.vmmig('clone', 'debian12:v1', '--as', 'c3', check=False)
    assert failed.returncode == 3 and failed.stderr.count('\n') == 1
    kill(agent, made)
