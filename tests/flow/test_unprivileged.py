# SPDX-License-Identifier: Apache-2.0
"""The set-up that the README advises: VMs that come from other hosts run as a user of their own, who may nothing else."""
import os
import re

import pytest
from agents import Cluster, eventually
from lab import HEARTBEAT_PORT, BareGuest, LinuxGuest, check_disk, linux_guest, make_disk
from lab.guests import ROOT

USER, UID, KVM_GID = 'vmmig-vm', 64123, 64124


@pytest.fixture(scope='module')
def cluster():
    with Cluster(start=False) as made:
        for agent in made.agents:
            agent.options = {'vm-user': USER}
            add_user(agent.host)
            agent.start()
        yield made


def add_user(host):
    """As systemd-sysusers makes it, in the group that may use KVM; and devices with the rights that udev gives them. They
    are the host's own, so that nothing is changed outside."""
    host.run(['sh', '-c', f'echo "{USER}:x:{UID}:{UID}::/:/usr/sbin/nologin" >>/etc/passwd; '
                          f'echo "{USER}:x:{UID}:" >>/etc/group; '
                          f'sed -i "/^kvm:/d" /etc/group; echo "kvm:x:{KVM_GID}:{USER}" >>/etc/group'])
    host.run(['sh', '-c', 'mkdir /run/devices && mount -t tmpfs none /run/devices'])
    for device, group, mode in (('/dev/kvm', KVM_GID, '660'), ('/dev/net/tun', 0, '666')):
        if os.path.exists(device):
            own = f'/run/devices/{os.path.basename(device)}'
            host.run(['sh', '-c', f'cp -a {device} {own} && chown 0:{group} {own} && chmod {mode} {own} && '
                                  f'mount --bind {own} {device}'])


def sockets_folder(cluster):
    """The one that the README has sockets made in, as it is installed."""
    with open(os.path.join(ROOT, 'agent/systemd/vmmig.tmpfiles'), encoding='ascii') as file:
        folder, mode, owner, group = re.search(r'^d (/run/vmmig/\S+) (\S+) (\S+) (\S+)$', file.read(), re.M).groups()
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as file:
        assert f'--qmp {folder}/web1.qmp' in file.read()
    for host in cluster.hosts:
        host.run(['install', '-d', '-m', mode, '-o', owner, '-g', group, folder])
    return folder


def goes_and_comes(cluster, name, console):
    """To h2 and back; there and here it is the user's then, who has no privilege."""
    mark = console.mark()
    here, there = cluster.agents
    for _ in range(2):
        here.vmmig('send', name, '--to', there.host.name)
        console.wait_ticks(3)
        with open(f'/proc/{there.json("status", name)["pid"]}/status', encoding='ascii') as file:
            status = file.read()
        assert re.search(rf'^Uid:\t{UID}\t{UID}\t{UID}\t{UID}$', status, re.MULTILINE), status
        assert re.search(r'^Cap(Prm|Eff):\t0+\n.*^CapEff:\t0+$', status, re.MULTILINE | re.DOTALL), status
        here, there = there, here
    assert console.check(after=mark) == ['h1', 'h2', 'h1']
    console.verify()


def test_memory_under_kvm(cluster):
    """Where KVM works."""
    vm = BareGuest('bare', mem_mib=128, dirty_mib=16)
    vm.qmp_path = f'{sockets_folder(cluster)}/bare.qmp'
    goes_and_comes(cluster, vm.name, cluster.boot(vm))
    cluster.agents[0].end(vm.name)


def test_linux_with_its_disk_and_its_network(cluster):
    kernel, initrd = linux_guest(os.environ.get('VMMIG_CACHE', '/var/tmp/vmmig-cache'))
    for host in cluster.hosts:
        host.add_tap('tap1', user=UID)
    disk = make_disk(f'{cluster.shared}/linux.raw', mib=64)
    vm = LinuxGuest('linux', kernel=kernel, initrd=initrd, disk=disk, network=1)
    heartbeats = cluster.udp(HEARTBEAT_PORT)
    console = cluster.boot(vm)
    heartbeats.wait_ticks(20)
    mark = heartbeats.mark()
    goes_and_comes(cluster, vm.name, console)
    heartbeats.wait_ticks(20)
    assert not heartbeats.missing(after=mark)
    here = cluster.agents[0]
    pid = here.json('status', vm.name)['pid']
    console.send('poweroff')
    eventually('the end of the guest', lambda: here.host.reap() or not os.path.exists(f'/proc/{pid}'), timeout=60)
    check_disk(disk)
    here.vmmig('detach', vm.name, check=False)
