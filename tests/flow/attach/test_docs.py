# SPDX-License-Identifier: Apache-2.0
"""docs/attach.md: its commands do what it says, and the VMM that it walks through needs only what is installed."""
import os
import re
import subprocess

import pytest
from agents import Cluster, install
from lab import VmmGuest
from lab.guests import ROOT, built

PAGE = os.path.join(ROOT, 'docs/attach.md')


def typed():
    """The commands that a reader would type."""
    with open(PAGE, encoding='utf-8') as file:
        return [line.strip() for line in file if line.startswith('    ')]


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """The environment of a user who has installed vmmig's libraries."""
    folder = tmp_path_factory.mktemp('installed')
    return {**install(folder, 'libvmmig-attach.so'), 'FOLDER': str(folder)}


def test_the_example_is_built_with_what_is_installed(installed, tmp_path):
    command, = [line for line in typed() if line.startswith('cc ')]
    program = tmp_path / 'vmmig-vmm'
    line = command.replace('-o vmmig-vmm', f'-o {program}')
    assert line != command
    done = subprocess.run(['sh', '-c', line], cwd=ROOT, env=installed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = subprocess.run([program, '--help'], env=installed, capture_output=True, text=True, check=True).stdout
    assert '--attach' in said and all(len(row) <= 80 for row in said.splitlines())


def test_static_linking_needs_no_library_of_ours_at_run_time(installed, tmp_path):
    program = tmp_path / 'vmmig-vmm'
    line = (f'cc -std=gnu11 -D_GNU_SOURCE tools/vmmig-vmm/*.c -o {program} $(pkg-config --cflags vmmig-attach) '
            '-Wl,-Bstatic $(pkg-config --libs vmmig-attach) -Wl,-Bdynamic -lprotobuf-c')
    done = subprocess.run(['sh', '-c', line], cwd=ROOT, env=installed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'vmmig' not in subprocess.run(['ldd', program], capture_output=True, text=True, check=True).stdout.replace(
        str(program), '')


def test_its_commands_do_what_it_says():
    vm = VmmGuest('web1', mem_mib=256, vcpus=2)
    lines = [re.split(r'\s{3,}', line)[0] for line in typed() if line.startswith('vmmig')]
    assert len(lines) == 5
    names = {'/run/web1.vmm': vm.attach_path, '--serial null': f'--serial unix:{vm.console_path}', 'host2': 'h2',
             'guest.bin': built('tests/guest/bare/bare_pc.bin')}
    with Cluster(start=False) as cluster:
        console = cluster.console('web1')
        for agent in cluster.agents:
            agent.options['attach-vmm'] = built('tools/vmmig-vmm/vmmig-vmm')
            agent.options['libexec-dir'] = os.path.dirname(built('snapshot/vmmig-guard'))
            agent.start()
        cluster.agents[0].vmmig('repo', 'init')
        for line in lines:
            for said, real in names.items():
                line = line.replace(said, real)
            words = line.split()
            if words[0] == 'vmmig-vmm':
                cluster.hosts[0].popen([built('tools/vmmig-vmm/vmmig-vmm'), *words[1:]], name='web1')
                console.wait_for('ready')
            else:
                cluster.agents[0].vmmig(*words[1:])
        console.wait_for('^hb', after=console.mark())
        assert console.check() == ['h1', 'h2']


def test_the_table_of_places_is_true():
    """Names of files and functions that the page mentions exist."""
    with open(PAGE, encoding='utf-8') as file:
        text = file.read()
    folder = os.path.join(ROOT, 'tools/vmmig-vmm')
    source = ''
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), encoding='utf-8') as file:
            source += file.read()
    for name in re.findall(r'`(\w+\.c)`', text):
        assert os.path.exists(os.path.join(folder, name)), name
    for name in set(re.findall(r'`([a-z]+_[a-z_]+)`', text)):
        assert re.search(rf'\b{name}\b', source), name
    assert source.count('vmmig: ') >= 8
