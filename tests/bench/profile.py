# SPDX-License-Identifier: Apache-2.0
"""Where the CPU time of vmmig's busiest paths goes, and what changes of them won.

    /usr/bin/python3 tests/bench/profile.py [--path NAME]... [--before BUILD] [--rounds N] [--inputs DIR] [--page FILE]

Paths:
    qemu      1 GiB of a QEMU guest that does not compress, between two hosts, over a link without a limit
    loader    the same by agents that may not write into the QEMU that waits for it
    attach    2 GiB of a guest of vmmig-vmm, half of which does not compress, over the same; it writes 1 MiB a second
    busy      the same of one that writes 200 MiB a second
    import    a disk image into a repository `dir:`

Each path is run once under perf (the clock of the CPU, all of the machine): the functions in which the threads of
vmmig's programs spent most of their time, guests' vCPUs left out. With --before, the folder of another build, both
builds do the same work in turn, A B A B, the first round not counted: medians, and the ratio of the two. VMMIG_BUILD
names the build that is looked at. --inputs is where tests/bench/run keeps its images. --page writes a page for
docs/bench.
"""
import argparse
import collections
import contextlib
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / 'flow')]

import bench_page  # noqa: E402
from agents import UNPRIVILEGED, Cluster  # noqa: E402
from attach import DIRTY, MEMORY_MIB, AttachRace  # noqa: E402
from lab import BareGuest, VmmGuest  # noqa: E402
from migrate import Race, random_guest, start_agents  # noqa: E402

TOP = 10
DONE = {
    'qemu': """Sums of pages and frames are made with AVX2 where the CPU has it, and pages that nobody compresses go to
the connection in the slabs that they were read into. What is left is the kernel's: memory through two sockets and the
link, and the clearing of fresh memory at the destination.""",
    'loader': """QEMU's one loading thread is kept fed: 1 MiB lies between it and the agent instead of 208 KiB, and
stretches of 64 KiB and more are not copied on their way. What binds is the memory that this thread touches first.""",
    'attach': """Pages are copied once, before they are looked at, so that one that the guest writes meanwhile is sent
as one that was; a batch is encoded where it lies. What is left is the kernel's: memory out of one file, through the
link, and into pages of another that are fresh.""",
    'import': """The index takes the entries of several packs at once, a queue wakes one consumer for an item, where the
data of a file ends is remembered, a page that follows the last one found needs no search, and pages are hashed two at a
time where the CPU has instructions for SHA-256.""",
}
METRICS = {'copy_ms': 'copy, ms', 'cpu_s': 'CPU, s', 'total_s': 'time, s'}


class Migrations:
    """A guest that agents of one build move to and fro."""

    def __init__(self, build, make_vm, make_race, wrapper=()):
        self.build = build
        with self.chosen():
            self.cluster = Cluster(plain=True, start=False)
            self.cluster.__enter__()
            start_agents(self.cluster, wrapper)
            self.race = make_race(self.cluster, make_vm())
            self.race.let_run(False)

    @contextlib.contextmanager
    def chosen(self):
        before, os.environ['VMMIG_BUILD'] = os.environ['VMMIG_BUILD'], self.build
        try:
            yield
        finally:
            os.environ['VMMIG_BUILD'] = before

    def run(self):
        with self.chosen():
            self.race.let_run(True)
            self.race.console.wait_ticks(50)
            run = self.race.run('vmmig-qemu')
            self.race.let_run(False)
        return {metric: run[metric] for metric in ('copy_ms', 'cpu_s')}

    def close(self):
        with self.chosen():
            self.race.let_run(True)
            self.race.end()
            self.cluster.__exit__(None, None, None)


class Imports:
    """Imports of one image, each into a new repository."""

    def __init__(self, build, image):
        self.tool, self.image = os.path.join(build, 'tests/unit/repo/repo_tool'), image
        self.folder = tempfile.mkdtemp(dir=os.path.dirname(image))

    def run(self):
        url = f'dir:{self.folder}/repo'
        shutil.rmtree(f'{self.folder}/repo', ignore_errors=True)
        subprocess.run([self.tool, url, 'init'], check=True, stdout=subprocess.DEVNULL)
        used, began = os.times(), time.monotonic()
        subprocess.run([self.tool, url, 'import', self.image, 'image', 'raw'], check=True, stdout=subprocess.DEVNULL)
        took, now = time.monotonic() - began, os.times()
        return {'total_s': took, 'cpu_s': now.children_user + now.children_system - used.children_user
                - used.children_system}

    def close(self):
        shutil.rmtree(self.folder)


def attach_guest(rate):
    return VmmGuest('profiled', mem_mib=MEMORY_MIB, scan_mbps=0, fill='half', **DIRTY[rate])


def paths(options):
    return {
        'qemu': lambda build: Migrations(build, lambda: BareGuest(
            'profiled', mem_mib=1024, dirty_mib=8, rate_mbps=5, scan_mbps=0, fill='random'), Race),
        'loader': lambda build: Migrations(build, random_guest, lambda cluster, vm: Race(
            cluster, vm, dest_qmp=True, wrapper=UNPRIVILEGED), wrapper=UNPRIVILEGED),
        'attach': lambda build: Migrations(build, lambda: attach_guest(1), AttachRace),
        'busy': lambda build: Migrations(build, lambda: attach_guest(200), AttachRace),
        'import': lambda build: Imports(build, str(options.inputs / 'disk.raw')),
    }


class Family(threading.Thread):
    """Gathers the processes that descend from this one, but for those that only measure."""

    def __init__(self):
        super().__init__(daemon=True)
        self.pids, self.done = set(), threading.Event()

    def run(self):
        while not self.done.wait(0.01):
            parents = {}
            for pid in filter(str.isdigit, os.listdir('/proc')):
                with contextlib.suppress(OSError):
                    with open(f'/proc/{pid}/stat', encoding='ascii', errors='replace') as file:
                        name, _, fields = file.read().partition('(')[2].rpartition(')')
                    parents[int(pid)] = int(fields.split()[1]), name
            for pid, (parent, name) in parents.items():
                while parent != os.getpid() and parent in parents:
                    parent = parents[parent][0]
                if parent == os.getpid() and name not in ('perf', 'python3'):
                    self.pids.add(pid)


def profiled(work):
    """{(program or kernel, function): share} of the samples in vmmig's programs and the VMMs that it drives."""
    family = Family()
    family.start()
    with tempfile.TemporaryDirectory() as folder:
        data = f'{folder}/perf.data'
        with subprocess.Popen(['perf', 'record', '-q', '-a', '-e', 'cpu-clock', '-F', '997', '-o', data],
                              stderr=subprocess.DEVNULL) as perf:
            time.sleep(0.5)  # perf says nothing when it has begun
            work.run()
            perf.terminate()
        said = subprocess.run(['perf', 'script', '-i', data, '-F', 'comm,pid,ip,sym,dso'], check=True,
                              capture_output=True, text=True).stdout
    family.done.set()
    family.join()
    samples = collections.Counter()
    for thread, pid, symbol, dso in re.findall(r'^ *(\S.*?) +(\d+) +[0-9a-f]+ (.+?)(?:\+0x\w+)? \((.*?)\)$', said,
                                               re.MULTILINE):
        if int(pid) in family.pids and not thread.startswith(('CPU ', 'vcpu')):
            samples[os.path.basename(dso).replace('[kernel.kallsyms]', 'kernel'), symbol] += 1
    total = sum(samples.values())
    return {key: n / total for key, n in samples.most_common(TOP)}, total


def raced(before, after, rounds):
    runs = {'before': [], 'after': []}
    for number in range(rounds + 1):
        for name, work in (('before', before), ('after', after)):
            run = work.run()
            if number:
                runs[name].append(run)
    return runs


def table_of_profile(shares, total):
    rows = [[f'`{symbol}`', dso, f'{100 * share:.1f}'] for (dso, symbol), share in shares.items()]
    return [f'{total} samples, 997 a second of each CPU.', bench_page.table(['function', 'where', 'share, %'], rows)]


def table_of_race(runs, commits):
    rows = []
    for metric in runs['after'][0]:
        values = {name: [run[metric] for run in runs[name]] for name in runs}
        ratio = statistics.median(values['after']) / statistics.median(values['before'])
        rows.append([METRICS[metric], *(f'{statistics.median(v):.4g} ({min(v):.4g}–{max(v):.4g})'
                                        for v in values.values()), f'{ratio:.2f}'])
    return bench_page.table(['', *commits, 'ratio'], rows)


def commit(build):
    return subprocess.run(['git', '-C', build, 'describe', '--always', '--dirty'], check=True, capture_output=True,
                          text=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--path', action='append', choices=['qemu', 'loader', 'attach', 'busy', 'import'])
    parser.add_argument('--before', type=os.path.abspath)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--inputs', type=pathlib.Path, default='/var/tmp/vmmig-bench')
    parser.add_argument('--page', type=pathlib.Path)
    options = parser.parse_args()
    makers, said = paths(options), []
    builds = [*filter(None, (options.before, os.environ['VMMIG_BUILD']))]
    for name in options.path or makers:
        said += [f'## {name}', DONE[name]]
        with contextlib.ExitStack() as stack:
            works = []
            for build in builds:
                works.append(makers[name](build))
                stack.callback(works[-1].close)
            if options.before:
                said.append(table_of_race(raced(*works, options.rounds), map(commit, builds)))
            else:
                works[-1].run()  # warms up
            said += table_of_profile(*profiled(works[-1]))
        print('\n\n'.join(said), flush=True)
    if options.page:
        bench_page.write(options.page, __file__, "Where vmmig's CPU time goes",
                         f'```text\n{__doc__.partition("Paths:")[2].strip(chr(10))}\n```', *said)


if __name__ == '__main__':
    main()
