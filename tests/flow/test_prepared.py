# SPDX-License-Identifier: Apache-2.0
"""A QEMU that its user prepared takes the guest in: it may be what no command line says, and has to have the guest's
disks. And under which names the disks are the same ones."""
import contextlib
import os
import re

import pytest
from agents import UNPRIVILEGED, Cluster, eventually
from lab import BareGuest, LinuxGuest, linux_guest, make_disk
from lab.linux import disk_log, fsck

MIB = 1 << 20


@pytest.fixture(scope='module')
def cluster():
    with Cluster() as made:
        yield made


@pytest.fixture
def vm(cluster, request):
    """A guest with a disk, whose link to storage that both hosts see lies in a folder of either host's own."""
    name = re.sub(r'\W|test|_', '', request.node.name)
    disk = make_file(cluster, f'{name}.raw')
    made = BareGuest(name, mem_mib=64, dirty_mib=4, options=drive(link_of(name), 'raw'))
    for host in cluster.hosts:
        os.symlink(disk, host.path(link_of(name)))
    yield made
    forget(cluster, made)


def forget(cluster, vm):
    for agent in cluster.agents:
        if any(known['vm'] == vm.name for known in agent.json('list')['vms']):
            agent.end(vm.name)
        end_all(agent.host, vm)


def link_of(name):
    return f'/run/vmlab/{name}.raw'


def end_all(host, vm):
    """Also a QEMU of which no agent knows; with its sockets, which one that is killed leaves."""
    for pid in [pid for pid, argv in host.processes().items() if f'{vm.name},debug-threads=on' in argv]:
        os.kill(pid, 9)
        eventually('its end', lambda: host.reap() or not os.path.exists(f'/proc/{pid}'))
    for path in (vm.qmp_path, vm.judge_path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(host.path(path))


def make_file(cluster, name):
    path = f'{cluster.shared}/{name}'
    with open(path, 'wb') as file:
        file.truncate(MIB)
    return path


def drive(path, kind, cache='none'):
    return ['-drive', f'if=none,id=disk0,format={kind},cache={cache},file={path}', '-device',
            'virtio-blk-pci,drive=disk0,id=vda']


def prepare(cluster, vm, argv=None, wrapper=()):
    """The QEMU that its user has waiting at h2."""
    h2 = cluster.hosts[1]
    h2.popen([*wrapper, *(argv or vm.argv(incoming='defer'))], name='prepared')
    eventually('the QEMU that waits', lambda: answers(vm, h2))


def answers(vm, host):
    try:
        return vm.qmp(host)('query-status')['status'] == 'inmigrate'
    except OSError:
        return False


def refused(cluster, vm, console, pattern, *options, waits=True):
    """By name; the guest runs on, and the QEMU that its user prepared goes on waiting."""
    mark = console.mark()
    done = cluster.agents[0].vmmig('send', vm.name, '--to', 'h2', *options, check=False)
    assert done.returncode == 5, done
    complaint = done.stderr.splitlines()[-1]
    assert complaint.startswith('vmmig: ') and pattern in complaint, complaint
    if '--dest-qmp' in options and waits:
        assert vm.qmp(cluster.hosts[1])('query-status')['status'] == 'inmigrate'
    console.wait_ticks(2)
    assert console.check(after=mark) == ['h1']
    assert not [name for name in os.listdir(cluster.shared) if name.startswith('.vmmig-proof')]


def moves(cluster, vm, console, *options):
    mark = console.mark()
    job = cluster.agents[0].json('send', vm.name, '--to', 'h2', *options)
    console.wait_ticks(3)
    assert console.check(after=mark) == ['h1', 'h2']
    console.verify()
    return job


# ---- what is on no command line

def test_a_guest_on_a_live_snapshot_moves_with_its_disk(cluster):
    """Linux writes its log on; what it wrote before and after is on the disk that it runs on there."""
    kernel, initrd = linux_guest(os.environ.get('VMMIG_CACHE', '/var/tmp/vmmig-cache'))
    base, overlay = f'{cluster.shared}/linux.raw', f'{cluster.shared}/linux.overlay'
    vm = LinuxGuest('linux', kernel=kernel, initrd=initrd, disk=make_disk(base, mib=64))
    here, there = cluster.agents
    console = cluster.boot(vm)
    console.wait_ticks(3)
    vm.qmp(here.host)('blockdev-snapshot-sync', device='disk0', snapshot_file=overlay, format='qcow2')
    stale = here.vmmig('send', vm.name, '--to', 'h2', check=False)
    assert stale.returncode == 5 and 'prepare the destination yourself and name it with --dest-qmp' in stale.stderr
    argv = [word.replace('format=raw', 'format=qcow2').replace(base, overlay) for word in vm.argv(incoming='defer')]
    prepare(cluster, vm, argv)
    mark = console.mark()
    here.vmmig('send', vm.name, '--to', 'h2', '--dest-qmp', vm.qmp_path)
    console.wait_ticks(10)
    assert console.check(after=mark) == ['h1', 'h2']
    pid = there.json('status', vm.name)['pid']
    console.send('poweroff')
    console.wait_for('lab-guest halted', 60, after=mark)
    eventually('the end of the guest', lambda: there.host.reap() or not os.path.exists(f'/proc/{pid}'), 60)
    whole = f'{cluster.shared}/linux.whole'
    there.host.run(['qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', overlay, whole])
    assert 'journal recovery' not in fsck(whole)
    log = [line.split() for line in disk_log(whole)]
    assert [int(number) for _, number, _ in log] == list(range(len(log)))
    arrived = next(tick.clock for tick in console.ticks(after=mark) if tick.host == 'h2')
    assert float(log[-1][2]) > arrived
    there.vmmig('detach', vm.name, check=False)


def test_a_disk_that_is_snapshotted_during_the_copy_does_not_move(cluster, vm):
    """The destination was started on the image that was open before, and would not have what is written since."""
    (here, there), overlay = cluster.agents, f'{cluster.shared}/{vm.name}.overlay'
    vm.mem_mib, vm.fill = 96, 'random'
    console = cluster.boot(vm)
    send = here.popen('send', vm.name, '--to', 'h2', '--max-bandwidth', '32M')
    eventually('some memory', lambda: (here.json('status', vm.name).get('job') or {}).get('wire_bytes', 0) > 2 * MIB)
    mark = console.mark()
    vm.qmp(here.host)('blockdev-snapshot-sync', device='disk0', snapshot_file=overlay, format='qcow2')
    said, _ = send.communicate(timeout=60)
    assert send.returncode == 5, said
    assert f'disk disk0 was changed while the VM was copied: it has {overlay} open now' in said.splitlines()[-1]
    console.wait_ticks(2)
    assert console.check(after=mark) == ['h1'] and there.names() == []
    disk, = (entry['inserted']['file'] for entry in vm.qmp(here.host)('query-block') if entry['device'] == 'disk0')
    assert disk == overlay


def test_a_guest_with_a_device_that_was_plugged_moves(cluster, vm):
    vm.options += ['-device', 'pcie-root-port,id=port1,chassis=1']
    console = cluster.boot(vm)
    vm.qmp(cluster.hosts[0])('device_add', driver='virtio-rng-pci', id='rng1', bus='port1')
    refused(cluster, vm, console, 'device rng1 (virtio-rng-pci) was plugged while the VM ran')
    prepare(cluster, vm, vm.argv(incoming='defer') + ['-device', 'virtio-rng-pci,id=rng1,bus=port1'])
    job = moves(cluster, vm, console, '--dest-qmp', vm.qmp_path)
    assert job['opaque_bytes'] < 20 * MIB  # an agent that may writes its memory itself


# ---- memory that cannot be reached

def test_a_guest_goes_through_qemus_loader_where_its_memory_cannot_be_reached(cluster):
    """By an agent that may not: every page is in QEMU's own stream."""
    a2, vm = cluster.agents[1], BareGuest('loaded', mem_mib=96, dirty_mib=4, fill='random')
    console = cluster.boot(vm)
    a2.stop()
    a2.start(wrapper=UNPRIVILEGED)
    try:
        prepare(cluster, vm, wrapper=UNPRIVILEGED)
        job = moves(cluster, vm, console, '--dest-qmp', vm.qmp_path)
        assert job['opaque_bytes'] > 64 * MIB  # what is zero of the 96 MiB needs few
        assert sum(encoding['pages'] for encoding in job['pages'].values()) == 0
        a2.end(vm.name)
    finally:
        a2.stop()
        a2.start()


# ---- the disks of the QEMU that waits

def with_options(vm, options):
    """The command line of one that waits, with other options."""
    return BareGuest(vm.name, mem_mib=vm.mem_mib, dirty_mib=vm.dirty_mib, options=options).argv(incoming='defer')


def test_a_prepared_qemu_with_a_file_of_its_own_is_refused(cluster, vm):
    """The guest's own file is there and would prove itself. The user's QEMU goes on waiting, and so does not have to be
    the last: with the right disk it takes the guest."""
    h2 = cluster.hosts[1]
    console = cluster.boot(vm)
    other = '/run/vmlab/other.raw'
    with open(h2.path(other), 'wb') as file:
        file.truncate(MIB)
    prepare(cluster, vm, with_options(vm, drive(other, 'raw')))
    refused(cluster, vm, console, f'disk disk0: {other} is another file here than on the other host', '--dest-qmp', vm.qmp_path)
    end_all(h2, vm)
    prepare(cluster, vm)
    moves(cluster, vm, console, '--dest-qmp', vm.qmp_path)


def test_a_prepared_qemu_with_another_file_beside_it_is_refused(cluster, vm):
    console = cluster.boot(vm)
    other = make_file(cluster, 'other.raw')
    prepare(cluster, vm, with_options(vm, drive(other, 'raw')))
    refused(cluster, vm, console, f'not the same one on both hosts, there it is {other}: the inode differs',
            '--dest-qmp', vm.qmp_path, waits=False)


def test_a_prepared_qemu_has_no_disk_more_and_none_less(cluster, vm):
    h2, other = cluster.hosts[1], make_file(cluster, 'other.raw')
    console = cluster.boot(vm)
    for options, pattern in (
            ([*drive(link_of(vm.name), 'raw')[2:], '-blockdev',
              f'driver=file,node-name=disk0,read-only=on,filename={other}'], 'disk disk0'),
            ([*drive(link_of(vm.name), 'raw'), '-blockdev', f'driver=file,node-name=more,filename={other}'],
             f'has {other} open for writing, which is no disk of the VM')):
        prepare(cluster, vm, with_options(vm, options))
        refused(cluster, vm, console, pattern, '--dest-qmp', vm.qmp_path)
        end_all(h2, vm)


def test_a_disk_through_the_page_cache_is_refused(cluster, vm):
    """Of one host at least; by another machine, which has a boot id of its own. The user can vouch for it."""
    h2, a2 = cluster.hosts[1], cluster.agents[1]
    console = cluster.boot(vm)
    identity = os.path.join(cluster.folder, 'boot_id')
    with open(identity, 'w', encoding='ascii') as file:
        file.write('5f1c9b0e-7d6e-4b53-a9a1-0c1f6a1f5f55\n')
    a2.stop()
    h2.run(['mount', '--bind', identity, '/proc/sys/kernel/random/boot_id'])
    try:
        a2.start()
        prepare(cluster, vm, with_options(vm, drive(link_of(vm.name), 'raw', cache='writeback')))
        refused(cluster, vm, console, f"disk disk0 ({link_of(vm.name)}) goes through a host's page cache",
                '--dest-qmp', vm.qmp_path)
        moves(cluster, vm, console, '--dest-qmp', vm.qmp_path, '--assume-shared')
        a2.end(vm.name)
    finally:
        a2.stop()
        h2.run(['umount', '/proc/sys/kernel/random/boot_id'])
        a2.start()


# ---- names of a disk

def test_an_image_may_be_a_link(cluster, vm):
    """As in the fixture: to storage that both hosts see. The agent that starts the destination proves it, too."""
    console = cluster.boot(vm)
    moves(cluster, vm, console)


@pytest.fixture
def overlay(cluster, request):
    """A guest on an overlay that both hosts see, with an image behind it that either host has for itself."""
    name = re.sub(r'\W|test|_', '', request.node.name)
    base, path = f'/run/vmlab/{name}.raw', f'{cluster.shared}/{name}.qcow2'
    for host in cluster.hosts:
        with open(host.path(base), 'wb') as file:
            file.truncate(64 * MIB)
    cluster.hosts[0].run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', base, '-F', 'raw', path])
    made = BareGuest(name, mem_mib=64, dirty_mib=4, options=drive(path, 'qcow2'))
    yield made, base
    forget(cluster, made)


def test_an_image_behind_another_one_is_the_same(cluster, overlay):
    vm, base = overlay
    console = cluster.boot(vm)
    moves(cluster, vm, console)


def test_an_image_behind_another_one_that_differs_is_refused(cluster, overlay):
    """By a single byte of its last page: another release of that image differs in more."""
    vm, base = overlay
    console = cluster.boot(vm)
    with open(cluster.hosts[1].path(base), 'r+b') as file:
        file.seek(-1, os.SEEK_END)
        file.write(b'x')
    refused(cluster, vm, console, f'{base} is not the same one on both hosts: the contents differ')


def test_a_disk_whose_name_is_another_files_by_now_is_refused(cluster, vm):
    """Both hosts see the new one, which no QEMU has open."""
    console = cluster.boot(vm)
    path = os.readlink(cluster.hosts[0].path(link_of(vm.name)))
    os.rename(make_file(cluster, 'restored.raw'), path)
    refused(cluster, vm, console, 'is not what QEMU has open under that name: it was replaced since')
