# SPDX-License-Identifier: Apache-2.0
"""Paired hosts with an agent on each, as a user would set them up: the lab's hosts, certificates by
`vmmig pki`, a configuration file, vmmigd, and the `vmmig` command.

    with Cluster(rate='1gbit') as cluster:
        a1, a2 = cluster.agents
        a1.vmmig('attach', 'web1', '--qmp', vm.qmp_path)
        summary = a1.json('send', 'web1', '--to', 'h2')
"""
import json
import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lab import Lab  # noqa: E402
from lab.guests import ROOT, built  # noqa: E402
from lab.hosts import inside  # noqa: E402

SOCKET = '/run/vmmig/control.sock'
# Runs a command without the privilege to reach another process's memory.
UNPRIVILEGED = ['setpriv', '--bounding-set=-sys_ptrace', '--inh-caps=-sys_ptrace']
PKI = '/etc/vmmig/pki'


def fault_build():
    """The folder of a build with fault points."""
    return os.environ.get('VMMIG_FAULTS_BUILD', os.path.join(ROOT, 'build-faults'))


STARTED = []  # the agents of the cluster that was used last: the end of their logs is told when a wait ends in vain


def eventually(what, condition, timeout=20):
    """Waits until the condition holds, and returns what it returned."""
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError('\n'.join([f'{what}: not within {timeout} s',
                                          *(line for agent in STARTED for line in agent.last_words())]))
        time.sleep(0.01)


def make_compiler(folder, build):
    """A `cc` in that folder which also links what this build's sanitizers need."""
    options = json.loads(subprocess.run(['meson', 'introspect', build, '--buildoptions'], check=True,
                                        capture_output=True).stdout)
    sanitizers, = (option['value'] for option in options if option['name'] == 'b_sanitize')
    compiler = '/usr/bin/cc' if sanitizers == 'none' else f'/usr/bin/clang -fsanitize={sanitizers}'
    folder.mkdir()
    (folder / 'cc').write_text(f'#!/bin/sh\nexec {compiler} "$@"\n')
    (folder / 'cc').chmod(0o755)


def install(folder, library):
    """Installs vmmig below a folder. Returns the environment of a user who builds with that library of it."""
    build = os.path.dirname(os.path.dirname(built('tools/vmmig')))
    subprocess.run(['meson', 'install', '-C', build, '--no-rebuild', '--destdir', folder], check=True,
                   capture_output=True)
    make_compiler(folder / 'compiler', build)
    found, = folder.rglob(library)
    return {**os.environ, 'PKG_CONFIG_PATH': str(found.parent / 'pkgconfig'), 'PKG_CONFIG_SYSROOT_DIR': str(folder),
            'LD_LIBRARY_PATH': str(found.parent), 'PATH': f'{folder}/compiler:{os.environ["PATH"]}'}


class Agent:
    """One host's agent."""

    def __init__(self, cluster, host):
        self.cluster, self.host = cluster, host
        self.process = None
        self.may_end = set()  # exit statuses of what the test did to it
        self.options = {}
        os.makedirs(host.path('/etc/vmmig/pki'), exist_ok=True)

    def write_config(self):
        lines = {'host': self.host.name, 'log-dir': '/var/lib/vmmig/log', 'log-level': 'debug',
                 'peer-timeout': '15000', 'vm-user': 'root', **self.options}
        if self.cluster.plain:
            lines['insecure-plain'] = 'yes'
        with open(self.host.path('/etc/vmmig/vmmigd.conf'), 'w', encoding='ascii') as file:
            file.writelines(f'{key} = {value}\n' for key, value in lines.items())

    def start(self, faults=None, build=None, wrapper=()):
        """Starts vmmigd and waits until it answers. faults: what VMMIG_FAULTS says, in a build that has them; wrapper:
        the command that runs it."""
        self.write_config()
        binary = os.path.join(build or (fault_build() if faults else os.path.dirname(
            os.path.dirname(built('agent/vmmigd')))), 'agent/vmmigd')
        environment = {**os.environ, **({'VMMIG_FAULTS': faults} if faults else {})}
        self.may_end = set()
        self.process = self.host.popen([*wrapper, binary], name='vmmigd', env=environment)
        STARTED[:] = [agent for agent in STARTED if agent.cluster is self.cluster and agent is not self] + [self]
        eventually(f'vmmigd on {self.host.name}', self.answers)
        return self

    def answers(self):
        if self.process.poll() is not None:
            with open(self.process.log, encoding='utf-8', errors='replace') as file:
                raise RuntimeError(f'vmmigd on {self.host.name} ended: {file.read()[-2000:]}')
        return self.vmmig('list', check=False).returncode == 0

    def stop(self, number=signal.SIGTERM):
        self.may_end.add(0 if number == signal.SIGTERM else -number)
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
        if self.process:
            self.process.wait(30)
        return self.process.returncode if self.process else None

    def kill(self):
        return self.stop(signal.SIGKILL)

    def end(self, name):
        """Kills the VMM of that name, unless it has ended, and forgets it."""
        vm = self.json('status', name)
        if vm['presence'] != 'ended':
            os.kill(vm['pid'], signal.SIGKILL)
            eventually('the end of the VMM',
                       lambda: self.host.reap() or self.json('status', name)['presence'] == 'ended')
        self.vmmig('detach', name)

    def log(self):
        with open(self.process.log, encoding='utf-8', errors='replace') as file:
            return file.read()

    def last_words(self):
        if not os.path.exists(self.process.log):  # the cluster is no more
            return []
        return [f'{self.host.name}: {line[:300]}' for line in self.log().splitlines()[-12:]]

    def vmmig(self, *words, check=True, timeout=120):
        done = subprocess.run(inside(self.host.pid, [built('tools/vmmig'), *words]), text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
        if check and done.returncode:
            raise AssertionError(f'vmmig {" ".join(map(str, words))}: status {done.returncode}\n{done.stdout}'
                                 f'{done.stderr}')
        return done

    def json(self, *words, **options):
        return json.loads(self.vmmig(*words, '--json', **options).stdout)

    def popen(self, *words):
        return subprocess.Popen(inside(self.host.pid, [built('tools/vmmig'), *words]), text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def names(self):
        """Names of the VMs that this agent has and that run."""
        return [vm['vm'] for vm in self.json('list')['vms'] if vm['presence'] == 'present']


class Cluster(Lab):
    """Hosts with agents that trust each other. plain: without TLS; wrapper: the command that runs each agent."""

    def __init__(self, hosts=2, rate=None, plain=False, start=True, wrapper=()):
        super().__init__(hosts=hosts, rate=rate)
        self.plain = plain
        try:
            self.agents = [Agent(self, host) for host in self.hosts]
            if not plain:
                self.make_certificates()
            if start:
                for agent in self.agents:
                    agent.start(wrapper=wrapper)
        except BaseException:
            print(self.report(), file=sys.stderr)
            self.close()
            raise

    def boot(self, vm, **options):
        """A QEMU that its user started at the first host (options: of its process), known to the agent there. Returns
        its console."""
        console = self.console(vm.name)
        self.agents[0].host.popen(vm.argv(), name=vm.name, **options)
        console.wait_for('ready', timeout=60)
        self.agents[0].vmmig('attach', vm.name, '--qmp', vm.qmp_path)
        return console

    def make_certificates(self):
        """As the README says: a CA in one place, a certificate for each host, carried there."""
        pki = os.path.join(self.folder, 'pki')
        vmmig = built('tools/vmmig')
        subprocess.run([vmmig, 'pki', 'init', pki], check=True, capture_output=True)
        for host in self.hosts:
            subprocess.run([vmmig, 'pki', 'issue', pki, host.name, '--ip', host.address], check=True,
                           capture_output=True)
            for source, target in (('ca.crt', 'ca.crt'), (f'{host.name}.crt', 'host.crt'),
                                   (f'{host.name}.key', 'host.key')):
                with open(os.path.join(pki, source), 'rb') as file:
                    data = file.read()
                path = host.path(f'{PKI}/{target}')
                with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 'wb') as file:
                    file.write(data)
