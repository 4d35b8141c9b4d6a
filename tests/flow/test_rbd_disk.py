# SPDX-License-Identifier: Apache-2.0
"""A VM moves whose disk is an image in Ceph: both hosts' agents prove it by cluster, pool and image."""
import os

import pytest
from agents import Cluster, eventually
from lab import LinuxGuest, check_disk, linux_guest, make_disk
from lab.linux import disk_log

from repo.conftest import ceph_with


@pytest.fixture(scope='module')
def cluster():
    with Cluster() as made:
        yield made


@pytest.fixture(scope='module')
def ceph(cluster, tmp_path_factory):
    """In the network of h1, where h2 reaches it."""
    h1 = cluster.hosts[0]
    with ceph_with('vms', tmp_path_factory.mktemp('ceph'), osds=2, network_of=h1.pid, address=h1.address) as ceph:
        yield ceph


def convert(host, source, target):
    host.run(['qemu-img', 'convert', '-f', 'raw', '-O', 'raw', source, target])


def test_linux_on_an_image_in_ceph(cluster, ceph):
    """It works on its disk while it moves. A QEMU that was prepared with another image does not get it."""
    here, there = cluster.agents
    kernel, initrd = linux_guest(os.environ.get('VMMIG_CACHE', '/var/tmp/vmmig-cache'))
    local = make_disk(f'{cluster.shared}/linux.raw', mib=32)
    image, other = (f'rbd:vms/{name}:conf={ceph.conf}' for name in ('linux', 'other'))
    for name in image, other:
        convert(here.host, local, name)
    vm = LinuxGuest('linux', kernel=kernel, initrd=initrd, disk=image)
    console = cluster.boot(vm)
    mark = console.mark()

    waits = there.host.popen([word.replace(image, other) for word in vm.argv(incoming='defer')], name='prepared')
    eventually('the QEMU that waits', lambda: os.path.exists(there.host.path(vm.judge_path)))
    refused = here.vmmig('send', vm.name, '--to', 'h2', '--dest-qmp', vm.qmp_path, check=False)
    assert refused.returncode == 5, refused
    assert 'cluster, pool or image differ' in refused.stderr.splitlines()[-1]
    assert '/vms//other' in refused.stderr.splitlines()[-1]
    waits.kill()
    waits.wait()

    job = here.json('send', vm.name, '--to', 'h2')
    assert job['state'] == 'done'
    console.wait_ticks(5)
    assert console.check(after=mark) == ['h1', 'h2']
    pid = there.json('status', vm.name)['pid']
    console.send('poweroff')
    eventually('the end of the guest', lambda: there.host.reap() or not os.path.exists(f'/proc/{pid}'), timeout=60)
    convert(there.host, image, local)
    arrived = next(tick for tick in console.ticks(after=mark) if tick.host == 'h2')
    assert check_disk(local) > 0
    assert float(disk_log(local)[-1].split()[2]) > arrived.clock
    there.vmmig('detach', vm.name, check=False)
