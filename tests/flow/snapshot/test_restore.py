# SPDX-License-Identifier: Apache-2.0
"""A Linux guest that writes a log to its disk is snapshotted while it runs; each snapshot runs on from its instant."""
import json
import os
import re
import socket
import subprocess
import time

import pytest
from agents import Cluster, eventually
from lab import LinuxGuest, check_disk, linux_guest, make_disk
from lab.linux import disk_log, fsck
from snapshots import export_file, make_agent, start, untouched

TICK = re.compile(r'^tick (\d+) ')


@pytest.fixture(scope='module')
def agent():
    with Cluster(hosts=1, start=False, plain=True) as cluster:
        yield make_agent(cluster)


def state(agent, name):
    found = [vm for vm in agent.json('list')['vms'] if vm['vm'] == name]
    return found[0] if found else None


def end(agent, name):
    vm = state(agent, name)
    assert vm['pid'], vm
    os.kill(vm['pid'], 9)
    eventually('the end of the VM', lambda: agent.host.reap() or state(agent, name)['presence'] == 'ended')
    agent.vmmig('detach', name)


def ticks(console, after):
    return [int(found.group(1)) for line in console.lines[after:] if (found := TICK.match(line.text))]


def log_at(agent, image):
    """What the snapshot's disk has of the log. A running guest's disk needs its journal first, as after a power
    failure."""
    with export_file(agent, image, 'disk0.raw') as path:
        assert subprocess.run(['e2fsck', '-f', '-y', path], capture_output=True, check=False).returncode in (0, 1)
        return disk_log(path)


def check_instant(agent, image, disk):
    """The log that was on the disk at the instant was gone on with by the memory of the same instant: the disk of the
    restored guest, which has ended, is clean, and its log is that log and the numbers after it, none missing or
    twice."""
    at_instant = log_at(agent, image)
    assert check_disk(disk) > len(at_instant) > 0
    assert disk_log(disk)[:len(at_instant)] == at_instant


def interfaces(agent, path):
    """What the guest's own agent says of them: {name: MAC}."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(agent.host.path(path))
        connection.sendall(b'\xff{"execute": "guest-network-get-interfaces"}\n')
        with connection.makefile('rb') as lines:
            for line in lines:
                said = json.loads(line.replace(b'\xff', b''))
                if isinstance(said.get('return'), list):  # and not what it says of the byte before
                    return {one['name']: one['hardware-address'] for one in said['return']}
    raise EOFError(path)


def test_a_guest_with_an_agent_is_thawed_and_takes_its_mac_over(agent):
    """Linux and qemu-ga. Its file systems stood still for the instant; a clone's write on."""
    kernel, initrd = linux_guest(agent=True)
    vm = LinuxGuest('ga', kernel=kernel, initrd=initrd, agent=True,
                    disk=make_disk(os.path.join(agent.cluster.shared, 'ga.raw')))
    vm.options = ['-netdev', 'user,id=n0', '-device', 'virtio-net-pci,netdev=n0']
    console = start(agent, vm)
    console.wait_ticks(3)
    former = interfaces(agent, vm.agent_path)
    assert agent.json('snapshot', 'ga', 'one', '--guest-agent', vm.agent_path)['snapshot']['frozen'] == 1
    agent.vmmig('template', 'publish', 'ga@one', 'ga:v1')
    end(agent, 'ga')
    console = agent.cluster.console('clone')
    made, = agent.json('clone', 'ga:v1', '--as', 'clone')['clones']
    assert not [note for note in made['notes'] if 'MAC' in note or 'frozen' in note], made
    now = interfaces(agent, vm.agent_path.replace('ga.qga', 'clone.qga'))
    assert now['lo'] == former['lo'] and now['eth0'] != former['eth0'] == '52:54:00:12:34:56'
    with open(f'/proc/{made["pid"]}/cmdline', encoding='utf-8') as file:
        assert f'mac={now["eth0"]}' in file.read()
    console.wait_ticks(20)
    console.send('poweroff')
    console.wait_for('lab-guest halted', 60)
    eventually('its end', lambda: agent.host.reap() or state(agent, 'clone')['presence'] == 'ended')
    disk = os.path.join(agent.cluster.shared, 'clone.raw')
    overlay = agent.host.path('/var/lib/vmmig/clones/clone/disk0.qcow2')
    agent.host.run(['qemu-img', 'convert', '-O', 'raw', overlay, disk])
    check_instant(agent, 'ga@one', disk)


def power_off(agent, console, name, mark):
    console.send('poweroff')
    console.wait_for('lab-guest halted', 60, after=mark)
    eventually('the end of the VM', lambda: agent.host.reap() or state(agent, name)['presence'] == 'ended')
    agent.vmmig('detach', name)


def boots_anew(agent, console, folder):
    """A VM of disks alone, which the guest finds as after a power failure: it begins another log after the one that was
    there at the instant."""
    mark = console.mark()
    done = agent.json('restore', 'web1@disks', '--as', 'booted', '--disk-dir', folder)
    assert done['state'] == 'done' and done['snapshot']['memory_bytes'] == 0, done
    console.wait_for(TICK.pattern, 60, after=mark)
    console.wait_ticks(5)
    assert ticks(console, mark)[0] == 0
    power_off(agent, console, 'booted', mark)
    path = os.path.join(folder, 'booted-disk0.raw')
    assert 'journal recovery' not in fsck(path)
    at_instant, log = log_at(agent, 'web1@disks'), disk_log(path)
    assert log[:len(at_instant)] == at_instant and at_instant
    again = [int(line.split()[1]) for line in log[len(at_instant):]]
    assert again == list(range(len(again))) and again


def test_every_snapshot_runs_on_from_its_instant(agent, request):
    count, interval = (10, 5) if request.config.getoption('--full', False) else (3, 2)
    kernel, initrd = linux_guest()
    disk = make_disk(os.path.join(agent.cluster.shared, 'web1.raw'))
    vm = LinuxGuest('web1', kernel=kernel, initrd=initrd, disk=disk)
    console = start(agent, vm)
    said = []
    for number in range(count):
        began = time.monotonic()
        before = ticks(console, 0)[-1]
        agent.json('snapshot', 'web1', f's{number}')
        said.append((before, ticks(console, 0)[-1]))
        untouched(vm, agent)
        time.sleep(max(0, interval - (time.monotonic() - began)))  # the rate at which they are taken
    agent.json('snapshot', 'web1', 'disks', '--disk-only')
    console.wait_ticks(3)
    assert console.check() == ['h1']
    end(agent, 'web1')
    folder = os.path.join(agent.cluster.shared, 'restored')
    os.mkdir(folder)
    for number, (before, after) in enumerate(said):
        mark = console.mark()
        done = agent.json('restore', f'web1@s{number}', '--as', f'back{number}', '--disk-dir', folder)
        assert done['state'] == 'done', done
        console.wait_for(TICK.pattern, after=mark)
        console.wait_ticks(5)
        seen = ticks(console, mark)
        assert before <= seen[0] <= after + 1, f'snapshot {number} of ticks {before} to {after} goes on with {seen[0]}'
        assert seen == list(range(seen[0], seen[0] + len(seen)))
        assert not [line.text for line in console.lines[mark:] if line.text.startswith('BAD') or 'errors=' in
                    line.text and 'errors=0' not in line.text]
        assert state(agent, f'back{number}')['origin'] == 'restored'
        power_off(agent, console, f'back{number}', mark)
        check_instant(agent, f'web1@s{number}', os.path.join(folder, f'back{number}-disk0.raw'))
    boots_anew(agent, console, folder)
    refused = agent.vmmig('restore', 'web1@s0', check=False)
    assert refused.returncode == 4 and disk in refused.stderr
    refused = agent.vmmig('restore', 'web1@s0', '--as', 'back0', '--disk-dir', folder, check=False)
    assert refused.returncode == 4 and 'back0-disk0.raw' in refused.stderr
    assert state(agent, 'back0') is None and os.path.exists(os.path.join(folder, 'back0-disk0.raw'))
