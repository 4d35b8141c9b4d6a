# SPDX-License-Identifier: Apache-2.0
"""A mount of a repository, without an agent."""
import json
import os
import signal
import subprocess
import time

import pytest

from repo.conftest import Failed, ROOT, build, ceph, ceph_url, fault_build  # noqa: F401 (fixtures)


def mount_tool(*words):
    done = subprocess.run([os.path.join(build(), 'tests/unit/snapshot/mount_tool'), *map(str, words)],
                          capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise Failed(done.returncode, done.stderr)
    return done.stdout


def eventually(what, test, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = test()
        if found:
            return found
        time.sleep(.02)
    raise AssertionError(f'{what}: not within {seconds} s')


class Mount:
    """The holder of a mount of `url`, in folders below `folder`."""

    def __init__(self, url, folder, faults=None, options=(), start=True):
        self.url, self.folder = url, str(folder)
        self.path = os.path.join(self.folder, 'images')
        self.cache = os.path.join(self.folder, 'cache')
        self.socket = os.path.join(self.folder, 's')
        self.log_path = os.path.join(self.folder, 'holder.log')
        self.options = options
        os.makedirs(self.path, exist_ok=True)
        self.process = None
        if start:
            self.start(faults)

    def start(self, faults=None):
        folder = os.path.join(fault_build() if faults else build(), 'snapshot')
        # Memory that was freed does not look as if it were still what it was.
        env = dict(os.environ, MALLOC_PERTURB_='165', **({'VMMIG_FAULTS': faults} if faults else {}))
        with open(self.log_path, 'ab') as log:
            self.process = subprocess.Popen(
                [f'{folder}/vmmig-mount', '--mount', self.path, '--repository', self.url, '--cache', self.cache,
                 '--control', self.socket, '--fetcher', f'{folder}/vmmig-fetch', '--owner', 'test-host',
                 *self.options], stdout=log, stderr=log, env=env)
        eventually('a fetcher', lambda: self.process.poll() is not None or
                   (os.path.exists(self.socket) and self.status()['fetchers']))
        return self

    def file(self, image, name='disk0.raw'):
        return os.path.join(self.path, image.replace('/', '%2F'), name)

    def status(self):
        try:
            return json.loads(mount_tool('status', self.socket))
        except Failed:
            return {'fetchers': 0}

    def log(self):
        with open(self.log_path, encoding='utf-8') as file:
            return file.read()

    def stop(self):
        if not self.process:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise
        finally:
            subprocess.run(['umount', '-l', self.path], capture_output=True, check=False)


@pytest.fixture
def mounts(tmp_path):
    """A maker of mounts, all of which end with the test."""
    made = []

    def make(url, name='mount', **options):
        made.append(Mount(url, tmp_path / name, **options))
        return made[-1]
    yield make
    for mount in made:
        mount.stop()


@pytest.fixture
def url(tmp_path):
    url = f'dir:{tmp_path}/repo'
    subprocess.run([os.path.join(build(), 'tests/unit/repo/repo_tool'), url, 'init'], check=True)
    return url


def store(url, name, **files):
    """An image of files; keys have '_' for '.': disk0_raw=PATH."""
    mount_tool('store', url, name, *(f'{key.replace("_", ".")}={path}' for key, path in files.items()))


def leases(url):
    return [line.split(' ')[0] for line in mount_tool('leases', url).splitlines()]


def repo_tool(url, *words):
    done = subprocess.run([os.path.join(build(), 'tests/unit/repo/repo_tool'), url, *map(str, words)],
                          capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise Failed(done.returncode, done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]
