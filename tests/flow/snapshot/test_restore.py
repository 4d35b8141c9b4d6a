# SPDX-License-Identifier: Apache-2.0
"""A Linux guest that writes a log to its disk is snapshotted while it runs; each snapshot runs on from its instant."""
import os
import re
import subprocess
import time

import pytest
from agents import Cluster, eventually
from lab import LinuxGuest, check_disk, linux_guest, make_disk
from lab.linux import disk_log
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


def check_instant(agent, image, disk):
    """The log that was on the disk at the instant was gone on with by the memory of the same instant: the disk of the
    restored guest, which has ended, is clean, and its log is that log and the numbers after it, none missing or
    twice. What is on a running guest's disk needs its journal first, as after a power failure."""
    with export_file(agent, image, 'disk0.raw') as path:
        assert subprocess.run(['e2fsck', '-f', '-y', path], capture_output=True, check=False).returncode in (0, 1)
        at_instant = disk_log(path)
    assert check_disk(disk) > len(at_instant) > 0
    assert disk_log(disk)[:len(at_instant)] == at_instant


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
        console.send('poweroff')
        console.wait_for('lab-guest halted', 60, after=mark)
        eventually('the end of the VM', lambda name=f'back{number}': agent.host.reap()
                   or state(agent, name)['presence'] == 'ended')
        agent.vmmig('detach', f'back{number}')
        check_instant(agent, f'web1@s{number}', os.path.join(folder, f'back{number}-disk0.raw'))
    refused = agent.vmmig('restore', 'web1@s0', check=False)
    assert refused.returncode == 4 and disk in refused.stderr
    refused = agent.vmmig('restore', 'web1@s0', '--as', 'back0', '--disk-dir', folder, check=False)
    assert refused.returncode == 4 and 'back0-disk0.raw' in refused.stderr
    assert state(agent, 'back0') is None and os.path.exists(os.path.join(folder, 'back0-disk0.raw'))
