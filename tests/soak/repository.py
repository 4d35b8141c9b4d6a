#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Writers, users, collections and a scrub on one repository, killed at random.

    repository.py [dir|rados] [--minutes N] [--seed N] [--folder DIR] [--writers N]

One store after the other, or the one that is named, for so many minutes each. Eight writers import overlapping images,
some with a parent; users export and delete; two collections run all the time, of which one always repacks, and a scrub.
Any of them may be killed, or, with a build that has fault points
(VMMIG_FAULTS_BUILD), kill itself at a named one. On rados each of three "hosts" is a client of its own; an OSD is
killed and comes back, and the monitor is restarted: clients wait for both, and none of them fails because of it.

During the run every export must be right, and a scrub find nothing. At the end every committed image reads back with
the right SHA-256, a scrub is clean, a collection leaves nothing unreferenced, and after the deletion of all images
nothing is left at all. Exits 0 if so, else 1 with what went wrong. The seed that is printed makes the same images and
the same decisions again, if not the same timing.
"""
import argparse
import functools
import glob
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(TESTS)
sys.path[:0] = [os.path.join(TESTS, 'ceph'), os.path.join(TESTS, 'flow', 'repo')]

import cluster as ceph_cluster  # noqa: E402
from objects import objects  # noqa: E402

MIB = 1 << 20
SOURCES, SOURCE_MIB, NAMES_MAX, HOSTS, PATIENCE_S = 12, 8, 24, 3, 300
# What may come of being fenced, of a parent that was deleted, or of a name that went.
EXPECTED = {'refused', 'conflict', 'not-found'}
POINTS = sorted({point for path in glob.glob(os.path.join(ROOT, 'repo', '*.c'))
                 for point in re.findall(r'FAULT\("(repo\.[^"]+)"\)', open(path).read())})
# What must have come to its end at least once, or nothing was tried.
DONE = ('imported', 'exported', 'deleted', 'collected', 'repacked', 'settled', 'scrubbed')


def tool(variable, default):
    return os.path.join(os.environ.get(variable, os.path.join(ROOT, default)), 'tests/unit/repo/repo_tool')


@functools.lru_cache(None)
def block(seed):
    """A MiB as files are: words of a few, some of it random, some zero."""
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(3, 12)) for _ in range(300)]
    out = bytearray(b''.join(rng.choices(words, k=180000))[:MIB].ljust(MIB, b'.'))
    for at in range(0, MIB, 64 << 10):
        kind = rng.randrange(6)
        if kind == 0:
            out[at:at + (16 << 10)] = rng.randbytes(16 << 10)
        elif kind == 1:
            out[at:at + (32 << 10)] = bytes(32 << 10)
    return bytes(out)


def sha256(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest() if hasattr(hashlib, 'file_digest') \
            else hashlib.sha256(f.read()).hexdigest()


class Soak:
    def __init__(self, urls, seconds, seed, folder, n_writers):
        self.urls, self.seconds, self.seed, self.folder = urls, seconds, seed, folder
        self.n_writers = n_writers
        self.lock = threading.Lock()
        self.names = {}      # what is committed for sure: name -> source
        self.doubtful = {}   # imports and deletions that were killed: name -> source
        self.problems = []
        self.began = time.monotonic()
        self.counts = {}
        self.ended = threading.Event()
        self.overtime = False
        self.sources = []
        for i in range(SOURCES):
            rng = random.Random(f'{seed}/{i}')
            path = os.path.join(folder, f'source{i}.raw')
            with open(path, 'wb') as f:
                for j in range(SOURCE_MIB):
                    part = bytearray(block(f'{seed}/{rng.randrange(3 * SOURCE_MIB)}'))
                    if rng.randrange(3) == 0:  # as it is elsewhere, but for some pages
                        for _ in range(20):
                            at = rng.randrange(256) * 4096
                            part[at:at + 4096] = rng.randbytes(4096)
                    f.write(part)
            self.sources.append((path, sha256(path)))

    def count(self, what):
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def note(self, what):
        """Something that happened to the cluster."""
        self.count(what)
        print(f'after {time.monotonic() - self.began:.0f} s: {what}', flush=True)

    def problem(self, text):
        with self.lock:
            self.problems.append(text)
        print(f'PROBLEM after {time.monotonic() - self.began:.0f} s:', text, flush=True)
        self.ended.set()

    # -- one command

    def run(self, rng, host, *words, kill=0.0, timeout=300):
        """(lines, None), or (None, kind of the error or 'killed')."""
        program, env, doomed = tool('VMMIG_BUILD', 'build'), dict(os.environ), rng.random() < kill
        faults = tool('VMMIG_FAULTS_BUILD', 'build-faults')
        after = rng.random() ** 2 * 3
        if doomed and rng.randrange(2) and os.path.exists(faults):
            program = faults
            env['VMMIG_FAULTS'] = f'{rng.choice(POINTS)}=crash@{rng.randrange(1, 4)}'
        with subprocess.Popen([program, self.urls[host % len(self.urls)], *map(str, words)], env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, errors = process.communicate(timeout=after if doomed else timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                out, errors = process.communicate()
                if not doomed:
                    self.problem(f'{words} did not end within {timeout} s')
        if process.returncode == 0:
            return [json.loads(line) for line in out.splitlines()], None
        if process.returncode == -9:
            self.count('killed')
            return None, 'killed'
        kind = [line for line in errors.splitlines() if not line.startswith('ts=')][-1:]
        kind = kind[0].partition(':')[0] if kind else f'status {process.returncode}'
        if kind not in EXPECTED:
            self.problem(f'{words}: {errors.strip()[-500:]}')
        self.count(kind)
        return None, kind

    # -- who is at work

    def writer(self, number):
        rng = random.Random(f'{self.seed}/writer{number}')
        serial = 0
        while not self.ended.is_set():
            serial += 1
            name, source = f'w{number}/{serial}', rng.randrange(SOURCES)
            with self.lock:
                parents = sorted(self.names)
            parent = rng.choice(parents) if parents and rng.randrange(3) == 0 else '-'
            with self.lock:
                self.doubtful[name] = source
            _, failed = self.run(rng, number, 'import', self.sources[source][0], name, 'raw', parent, kill=0.2)
            with self.lock:
                if not failed:
                    self.names[name] = source
                if failed != 'killed':
                    self.doubtful.pop(name)
            if not failed:
                self.count('imported')
            while len(self.names) > NAMES_MAX and not self.ended.wait(0.2):
                pass

    def user(self, number):
        rng = random.Random(f'{self.seed}/user{number}')
        while not self.ended.wait(0.1):
            with self.lock:
                names = sorted(self.names)
            if not names:
                continue
            name = rng.choice(names)
            if len(names) > NAMES_MAX // 2 and rng.randrange(2):
                self.delete(rng, number, name)
            else:
                self.export(rng, number, name)

    def delete(self, rng, number, name):
        with self.lock:
            if name not in self.names:
                return
            self.doubtful[name] = self.names.pop(name)
        _, failed = self.run(rng, number, 'delete', name, kill=0.1)
        if not failed:
            self.count('deleted')
            with self.lock:
                self.doubtful.pop(name)

    def export(self, rng, number, name, out=None):
        out = out or os.path.join(self.folder, f'out{number}.raw')
        source = self.names.get(name)
        _, failed = self.run(rng, number, 'export', name, out)
        if not failed:
            self.count('exported')
            if source is not None and sha256(out) != self.sources[source][1]:
                self.problem(f'image {name} reads back wrong')
        if os.path.exists(out):
            os.unlink(out)
        with self.lock:
            there = name in self.names
        if failed and failed != 'killed' and there:
            self.problem(f'image {name} cannot be exported: {failed}')

    def collector(self, number):
        rng = random.Random(f'{self.seed}/collector{number}')
        while not self.ended.wait(0.2 if number else 2):  # who finds a list open repacks nothing
            # Mostly the second repacks; at times both do, at once.
            repacks = number or self.overtime or rng.randrange(4) == 0
            words = ('collect', 3000, 'recompress', 10) if repacks else ('collect', 3000)
            lines, failed = self.run(rng, number, *words, kill=0.0 if self.overtime else 0.25)
            if not failed:
                self.count('collected')
                if lines[0]['repacked']:
                    self.count('repacked')
                if lines[0]['settled']:
                    self.count('settled')

    def scrubber(self):
        rng = random.Random(f'{self.seed}/scrub')
        while not self.ended.wait(1):
            lines, failed = self.run(rng, 2, 'scrub', rng.choice((0, 5)), kill=0.2)
            if not failed:
                self.count('scrubbed')
                self.look_at(lines, '')

    def play(self, disturb=None):
        jobs = [(self.writer, i) for i in range(self.n_writers)]
        jobs += [(self.user, 100), (self.user, 101), (self.collector, 0), (self.collector, 1), (self.scrubber,)]
        if disturb:
            jobs.append((disturb, self))
        threads = [threading.Thread(target=self.guarded, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        self.ended.wait(self.seconds)
        # Collections take turns, and a slow machine its time: until each was done once, beside all the others.
        self.overtime = True
        limit = time.monotonic() + PATIENCE_S
        while (self.missing() or disturb and threads[-1].is_alive()) and time.monotonic() < limit:
            if self.ended.wait(0.2):
                break
        self.ended.set()
        for thread in threads:
            thread.join()
        self.counts['seconds'] = int(time.monotonic() - self.began)

    def guarded(self, job, *args):
        try:
            job(*args)
        except Exception as problem:  # whatever it is, the run is not what it should have been
            self.problem(f'{job.__name__}{args}: {problem!r}')

    # -- the end

    def verify(self):
        rng = random.Random(0)
        lines, failed = self.run(rng, 0, 'list')
        if failed:
            self.problem(f'images cannot be listed: {failed}; {self.counts}')
            return
        listed = [line['name'] for line in lines]
        lost = set(self.names) - set(listed)
        if lost:
            self.problem(f'committed, but not there: {sorted(lost)}')
        for name in listed:
            if name not in self.names and name not in self.doubtful:
                self.problem(f'image {name} is there, though nobody committed it')
        for name in listed:
            self.names.setdefault(name, self.doubtful.get(name))
            self.export(rng, 0, name)
        self.clean(rng, 'after the run')
        for _ in range(4):
            report = self.run(rng, 0, 'collect', 1)[0]
        if not report or report[0]['condemned'] or report[0]['fenced']:
            self.problem(f'collections do not come to an end: {report}')
        self.clean(rng, 'after the last collection')
        for name in listed:
            self.run(rng, 0, 'delete', name)
        self.run(rng, 0, 'collect', 1)
        self.run(rng, 0, 'collect', 1)
        store = objects(self.urls[0])
        rest = store.names('pack.') + store.names('tree.')
        rest += [key for shard in range(256) for key in store.pairs(f'cat.{shard:02x}') if key != 'epoch']
        rest += [key for name in ['quarantine'] + [f'scrub.{i:02x}' for i in range(256)]
                 for key in store.pairs(name)]
        if rest:
            self.problem(f'nothing needs these any more: {rest[:20]}')
        self.look_at_counts()
        print(f'{len(listed)} images verified;', ', '.join(f'{k} {v}' for k, v in sorted(self.counts.items())),
              flush=True)

    def clean(self, rng, when):
        lines, _ = self.run(rng, 0, 'scrub')
        self.look_at(lines or [{'damage': 'nothing, since it fails'}, None], when + ' ')

    def look_at(self, lines, when):
        """A forwarding that leads nowhere, beside a pack that is whole, is no damage."""
        found = [line for line in lines[:-1] if 'forwarding' not in line]
        if found:
            self.problem(f'a scrub {when}finds {found}')
        for _ in range(len(lines) - 1 - len(found)):
            self.count('forwardings to nowhere')

    def missing(self):
        return [what for what in DONE if not self.counts.get(what)]

    def look_at_counts(self):
        for what in self.missing():
            self.problem(f'nothing was {what}')


def disturb_cluster(ceph):
    def disturb(soak):
        soak.ended.wait(soak.seconds / 5)
        ceph.kill('osd.1')
        ceph.wait_osds(2)
        soak.note('OSD killed')
        soak.ended.wait(soak.seconds / 5)
        ceph.start_osd(1)
        ceph.wait_osds(3)
        soak.note('OSD back')
        soak.ended.wait(soak.seconds / 10)
        ceph.kill('mon.a')
        ceph.start_monitor()
        soak.note('monitor restarted')
        ceph.wait_clean()
        soak.note('placement groups clean')
    return disturb


def run(driver, urls, args, folder, disturb=None):
    print(f'{driver}: seed {args.seed}, {args.minutes:g} minutes, {args.writers} writers', flush=True)
    subprocess.run([tool('VMMIG_BUILD', 'build'), urls[0], 'init'], check=True)
    soak = Soak(urls, args.minutes * 60, args.seed, folder, args.writers)
    soak.play(disturb)
    soak.verify()
    for text in soak.problems:
        print('FAILED:', text, f'(seed {args.seed})')
    return 1 if soak.problems else 0


def run_on(driver, args, folder):
    if driver == 'dir':
        return run(driver, [f'dir:{folder}/repo'], args, folder)
    lacking = ceph_cluster.missing()
    if lacking:
        print(f'SKIPPED: no Ceph: {", ".join(lacking)} not installed')
        return 77
    with ceph_cluster.CephCluster(os.path.join(folder, 'ceph')) as ceph:
        ceph.create_pool('images')
        hosts = [ceph.create_user(f'client.host{i}', 'allow rw pool=images namespace=soak') for i in range(HOSTS)]
        urls = [f'rados:images/soak?conf={conf}&id=host{i}' for i, conf in enumerate(hosts)]
        return run(driver, urls, args, folder, disturb_cluster(ceph))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('driver', nargs='?', choices=['dir', 'rados'])
    parser.add_argument('--minutes', type=float, default=1)
    parser.add_argument('--seed', type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument('--folder', default='/var/tmp', help='where images and repositories lie meanwhile')
    parser.add_argument('--writers', type=int, default=8)
    args = parser.parse_args()
    status = 0
    for driver in [args.driver] if args.driver else ['dir', 'rados']:
        folder = tempfile.mkdtemp(prefix='vmmig-soak.', dir=args.folder)
        try:
            status = max(status, run_on(driver, args, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return status


if __name__ == '__main__':
    sys.exit(main())
