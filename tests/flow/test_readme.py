# SPDX-License-Identifier: Apache-2.0
"""What the README and the manuals tell their reader to type does what they say."""
import json
import os
import re
import subprocess

from agents import Cluster, install
from lab import BareGuest, VmmGuest
from lab.guests import ROOT, built


def commands(path):
    """The lines that a reader would type, without the words that explain them."""
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
        text = file.read().replace('\\\n', ' ')
    return [re.split(r'\s{3,}', line.strip())[0] for line in re.findall(r'^    (vmmig(?:-vmm)? .*)$', text, re.M)]


def test_two_hosts_as_in_the_readme(tmp_path):
    typed = commands('README.md')
    done = []
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', tmp_path / 'debian12.qcow2', '16M'], check=True)
    with Cluster(start=False) as cluster:
        for agent in cluster.agents:
            folder = os.path.dirname(built('snapshot/vmmig-guard'))
            agent.options.update({'libexec-dir': folder, 'nbdkit-plugin': f'{folder}/nbdkit-vmmig-plugin.so',
                                  'attach-vmm': built('tools/vmmig-vmm/vmmig-vmm')})
            agent.start()
        cluster.agents[1].vmmig('repo', 'init')
        vm, own = BareGuest('web1', mem_mib=64, dirty_mib=8), VmmGuest('web2')
        console, own_console = cluster.console('web1'), cluster.console('web2')
        for name in ('web1b', 'worker-1', 'worker-2'):
            cluster.console(name)
        names = {'host1': 'h1', 'host2': 'h2', '/run/vmmig/vms/web1.qmp': '/run/vmmig/web1.qmp', '/run/web2.vmm': own.attach_path,
                 '--serial null': f'--serial unix:{own.console_path}', 'guest.bin': built('tests/guest/bare/bare_pc.bin')}
        for folder in ('/srv/disks', '/mnt/images'):
            names[folder] = os.path.join(cluster.shared, os.path.basename(folder))
            os.mkdir(names[folder])
        for line in typed:
            for said, real in names.items():
                line = line.replace(said, real)
            program, *words = line.split()
            if words[0] == 'restore':  # which says what it says at the same console
                console.wait_ticks(5)
                assert console.check() == ['h1', 'h2']
            if program == 'vmmig-vmm':
                cluster.hosts[0].popen([built('tools/vmmig-vmm/vmmig-vmm'), *words], name='web2')
                own_console.wait_for('ready')
            elif words[0] in ('repo', 'image'):
                subprocess.run([built('tools/vmmig'), *words, '--repo', f'dir:{tmp_path}/repo'], cwd=tmp_path,
                               check=True, capture_output=True)
            elif words[0] == 'pki':
                subprocess.run([built('tools/vmmig'), *words], cwd=tmp_path, check=True, capture_output=True)
            elif words[0] == 'run':
                cluster.agents[0].vmmig('run', 'web1', '--', *vm.argv())
                console.wait_for('ready')
            elif words[:2] == ['attach', 'web1']:  # instead of `run`: the VM is here already, and the answer says so
                assert cluster.agents[0].vmmig(*words, check=False).returncode == 4
            elif words[0] in ('status', 'snapshot', 'restore', 'template', 'clone', 'mount', 'unmount'):
                cluster.agents[1].vmmig(*words)
            else:
                cluster.agents[0].vmmig(*words)
            done.append(words[0])
        own_console.wait_ticks(5)
        assert own_console.check() == ['h1', 'h2']
    assert {'pki', 'run', 'attach', 'send', 'status', 'repo', 'image', 'snapshot', 'restore', 'clone', 'mount'} <= set(done)


def test_what_is_installed(tmp_path):
    """By the commands of the README; what they build is built alike by every other test."""
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as file:
        typed = re.search(r'## Install\n[\s\S]*?\n\n((?:    .*\n)+)', file.read())[1].split('\n    ')
    packages, setup, installs, accounts, folders = (line.split() for line in typed)
    assert installs == ['meson', 'install', '-C', 'build'] and accounts == ['systemd-sysusers']
    assert folders == ['systemd-tmpfiles', '--create']
    # A folder that was set up before keeps its options: so it is not the one of tools/quickstart.
    with open(os.path.join(ROOT, 'tools/quickstart'), encoding='utf-8') as file:
        assert re.search(r'^build=\$PWD/(\S+)$', file.read(), re.M)[1] == 'build-quickstart'
    subprocess.run([os.path.join(ROOT, packages[0]), *packages[1:]], check=True, capture_output=True)
    folder = str(tmp_path / 'build')
    subprocess.run([folder if word == 'build' else word for word in setup], cwd=ROOT, check=True, capture_output=True)
    places = json.loads(subprocess.run(['meson', 'introspect', folder, '--installed'], check=True,
                                       capture_output=True).stdout)
    assert {'/usr/bin/vmmig', '/usr/sbin/vmmigd', '/etc/vmmig/vmmigd.conf.sample', '/usr/share/man/man1/vmmig.1',
            '/usr/share/man/man8/vmmigd.8'} <= set(places.values())
    unit, = (made for made, place in places.items() if place.endswith('/vmmigd.service'))
    with open(unit, encoding='ascii') as file:
        assert 'ExecStart=/usr/sbin/vmmigd\n' in file.read()
    rules, = (made for made, place in places.items() if place.endswith('sysusers.d/vmmig.conf'))
    with open(rules, encoding='ascii') as file:
        assert re.search('^u vmmig-vm ', file.read(), re.M)
    rules, = (made for made, place in places.items() if place.endswith('tmpfiles.d/vmmig.conf'))
    with open(rules, encoding='ascii') as file:
        assert re.search('^d /run/vmmig/vms 0770 vmmig-vm ', file.read(), re.M)


def test_systemd_takes_the_unit_that_is_installed(tmp_path):
    """Without a complaint; one that it does not understand would be left out in silence, KillMode=, say, and with it VMs."""
    install(tmp_path, 'libvmmig-client.so')
    unit, = tmp_path.rglob('vmmigd.service')
    text = unit.read_text(encoding='ascii').replace('ExecStart=', f'ExecStart={tmp_path}')
    assert 'KillMode=process\n' in text

    def complaints(name, text):
        (tmp_path / name).write_text(text, encoding='ascii')
        return subprocess.run(['systemd-analyze', 'verify', '--man=no', tmp_path / name], capture_output=True, text=True,
                              check=False).stderr

    assert 'Failed to parse kill mode' in complaints('bad.service', text.replace('=process', '=proces'))
    assert not complaints('vmmigd.service', text)


def test_every_command_of_the_manuals_exists():
    known = subprocess.run([built('tools/vmmig'), '--help'], capture_output=True, text=True, check=True).stdout
    for path in ('README.md', 'docs/vmmig.1.md', 'docs/hand-over.md', 'docs/vmmigd.8.md', 'docs/migration-wire.md'):
        for line in commands(path):
            word = re.match(r'vmmig (?:\[[^\]]*\] )?([a-z]+)', line)
            if word and word.group(1) not in ('option', 'command'):
                assert re.search(rf'^\s+{word.group(1)}\b', known, re.M), f'{path}: {line}'


def test_quickstart_moves_a_linux_guest():
    build = os.path.dirname(os.path.dirname(built('tools/vmmig')))
    done = subprocess.run([os.path.join(ROOT, 'tools/quickstart'), '--keep-build', build], capture_output=True,
                          text=True, timeout=240, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'it ran on h1 then h2' in done.stdout
    lines = done.stdout.splitlines()
    # What it says of its progress comes before what came of it.
    result = lines[lines.index('web1 runs at h2 now') + 1:lines.index('h2# vmmig list')]
    assert result and all(line.startswith('  ') for line in result), done.stdout
    assert lines.index('h1# vmmig send web1 --to h2') < lines.index('web1 runs at h2 now')
    assert os.path.exists(os.path.join(build, 'quickstart.log'))
