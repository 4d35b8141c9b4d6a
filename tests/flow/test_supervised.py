# SPDX-License-Identifier: Apache-2.0
"""A VM that somebody on its host looks after: who would start it again there, beside the guest that has moved, is named,
and the VM stays."""
import os
import re

import pytest
from agents import Cluster, eventually
from lab import BareGuest

# Says of the unit what the test has it say, as the real one does.
SYSTEMCTL = '''#!/bin/sh
case "$*" in "show --property=Restart,RestartForceExitStatus -- kept.service") ;; *) echo "asked: $*" >&2; exit 1;; esac
cat /run/vmlab/restart 2>/dev/null && exit
echo "Failed to connect to bus: Host is down" >&2
exit 1
'''


@pytest.fixture(scope='module')
def cluster():
    with Cluster(start=False) as made:
        folder = os.path.join(made.folder, 'bin')
        os.mkdir(folder)
        with open(os.path.join(folder, 'systemctl'), 'w', encoding='ascii', opener=lambda path, flags:
                  os.open(path, flags, 0o755)) as file:
            file.write(SYSTEMCTL)
        for agent in made.agents:
            agent.start(wrapper=['env', f'PATH={folder}:{os.environ["PATH"]}'])
        yield made


def boot(cluster, name, cgroup):
    return cluster.boot(BareGuest(name, mem_mib=64, dirty_mib=4), cgroup=cgroup)


def says(cluster, text):
    with open(cluster.hosts[0].path('/run/vmlab/restart'), 'w', encoding='ascii') as file:
        file.write(text)


def moved(cluster, name, console, mark):
    _, a2 = cluster.agents
    console.wait_ticks(3)
    assert console.check(after=mark) == ['h1', 'h2']
    a2.end(name)
    eventually('the end at h1', lambda: cluster.hosts[0].reap() or not cluster.agents[0].json('list')['vms'])


def test_a_unit_that_would_start_it_again_is_named(cluster):
    a1 = cluster.agents[0]
    console = boot(cluster, 'kept', 'kept.service')
    mark = console.mark()
    for text, pattern in (
            (None, 'the VM belongs to the unit kept.service of systemd: systemctl cannot say .*bus: Host is down'),
            ('Restart=always\nRestartForceExitStatus=\n', 'its unit kept.service has Restart='),
            ('Restart=on-failure\nRestartForceExitStatus=\n', 'Give it Restart=no .systemctl edit --runtime kept.service'),
            ('Restart=no\nRestartForceExitStatus=SIGKILL\n', 'its unit kept.service has Restart')):
        if text:
            says(cluster, text)
        done = a1.vmmig('send', 'kept', '--to', 'h2', check=False)
        assert done.returncode == 5, done
        complaint = done.stderr.splitlines()[-1]
        assert complaint.startswith('vmmig: ') and re.search(pattern, complaint), complaint
        console.wait_ticks(2)
        assert console.check(after=mark) == ['h1']
    says(cluster, 'Restart=no\nRestartForceExitStatus=\n')
    a1.vmmig('send', 'kept', '--to', 'h2')
    moved(cluster, 'kept', console, mark)


def test_a_domain_of_libvirts_is_named(cluster):
    """Libvirt starts it again only when it is told to: it moves, and its user is told."""
    a1 = cluster.agents[0]
    console = boot(cluster, 'domain', 'machine-qemu\\x2d1\\x2ddomain.scope')
    mark = console.mark()
    job = a1.json('send', 'domain', '--to', 'h2')
    assert 'libvirt here may be told to start it again (machine-qemu\\x2d1\\x2ddomain.scope)' in job['note']
    moved(cluster, 'domain', console, mark)
