# SPDX-License-Identifier: Apache-2.0
"""The second half of tools/quickstart: two agents, a Linux guest, and a migration to look at."""
import os
import sys
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(TOP, 'tests'), os.path.join(TOP, 'tests/flow')]

from agents import Cluster  # noqa: E402
from lab import LinuxGuest, linux_guest, make_disk  # noqa: E402


def shell(agent, *words):
    """Runs a vmmig command on a host and shows it as it was typed, and what it says in the order of a terminal."""
    print(f'{agent.host.name}# vmmig {" ".join(words)}', flush=True)
    with agent.popen(*words) as process:
        for line in process.stdout:
            print(line, end='', flush=True)
    if process.returncode:
        sys.exit(process.returncode)


def main():
    print('Fetching a Linux kernel ...', flush=True)
    kernel, initrd = linux_guest(os.path.join(os.environ['VMMIG_BUILD'], 'guest-cache'))
    with Cluster(rate='1gbit') as cluster:
        h1, h2 = cluster.agents
        disk = make_disk(f'{cluster.shared}/web1.raw', mib=64)
        vm = LinuxGuest('web1', kernel=kernel, initrd=initrd, disk=disk, mem_mib=512)
        console = cluster.console('web1')
        print('Two hosts, h1 and h2, joined by 1 Gbit/s; an agent runs on each. Booting Linux on h1 ...', flush=True)
        shell(h1, 'run', 'web1', '--', *vm.argv())
        console.wait_for('ready', timeout=120)
        console.wait_ticks(5)
        mark = console.mark()
        shell(h1, 'send', 'web1', '--to', 'h2')
        console.wait_ticks(5)
        shell(h2, 'list')
        hosts = console.check(after=mark)
        moved = next(i for i, line in enumerate(console.lines) if i > mark and line.host == 'h2')
        print("The guest's console, with the host that it came from and the time of its arrival:")
        for line in console.lines[moved - 4:moved + 5]:
            print(f'    {line.host}  {line.at - console.lines[moved].at:+7.3f} s  {line.text}')
        print(f'No line is missing, and no check of its memory failed; it ran on {" then ".join(hosts)} and '
              f'stood still for {console.pause(after=mark) * 1000:.0f} ms.')


if __name__ == '__main__':
    started = time.monotonic()
    main()
    print(f'Done in {time.monotonic() - started:.0f} s. Try it yourself: see README.md.')
