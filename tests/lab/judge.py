# SPDX-License-Identifier: Apache-2.0
"""Judging processes from outside: memory, cgroups, what a VM left behind."""
import os
import re

from .keeper import CGROUP_TOPS


def rss_anon(pid):
    """Anonymous memory of a process in bytes: its own, without guest memory that it only maps."""
    with open(f'/proc/{pid}/status', encoding='ascii') as file:
        return int(re.search(r'RssAnon:\s*(\d+) kB', file.read()).group(1)) * 1024


def memory_cgroup(pid):
    """The folder of the memory cgroup of a process."""
    with open(f'/proc/{pid}/cgroup', encoding='ascii') as file:
        lines = [line.strip().split(':', 2) for line in file]
    unified, legacy = CGROUP_TOPS
    for _, controllers, path in lines:
        if 'memory' in controllers.split(','):
            return legacy + path
    return unified + next(path for _, controllers, path in lines if controllers == '')


def charged(folder):
    """Bytes charged to a memory cgroup, given by its folder."""
    for name in ('memory.current', 'memory.usage_in_bytes'):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            with open(path, encoding='ascii') as file:
                return int(file.read())
    raise FileNotFoundError(f'{folder} is no memory cgroup')


def open_memfds(pid):
    """Names of the memfds that a process has open or mapped."""
    found = []
    for folder in ('fd', 'map_files'):
        for name in os.listdir(f'/proc/{pid}/{folder}'):
            try:
                target = os.readlink(f'/proc/{pid}/{folder}/{name}')
            except OSError:
                continue
            if target.startswith('/memfd:'):
                found.append(target.removeprefix('/memfd:').removesuffix(' (deleted)'))
    return sorted(set(found))


def leftovers(host, vm_name, agents=()):
    """What of a VM is still on a host, as readable lines: processes whose command line names it, its
    sockets, memory of it that an agent (pid) still holds. Listeners of consoles and events are the tests' own."""
    found = [f'process {pid}: {" ".join(argv)[:120]}' for pid, argv in host.processes().items()
             if any(re.search(rf'\b{re.escape(vm_name)}\b', word) for word in argv)]
    for folder, _, names in os.walk(host.path('/run')):
        found += [f'file {os.path.join(folder, name)}' for name in names
                  if re.search(rf'\b{re.escape(vm_name)}\b', name) and not name.endswith(('.console', '.events'))]
    found += [f'memfd {name} in agent {pid}' for pid in agents for name in open_memfds(pid)]
    return found


# Of a user who migrates by himself at times, by his own tools.
PARAMETERS = {'downtime-limit': 2000, 'max-bandwidth': 12345678}
CAPABILITIES = ['xbzrle']


def set_migration(qmp):
    """Sets QEMU's migration to what no driver of the agent's wants."""
    qmp('migrate-set-parameters', **PARAMETERS)
    qmp('migrate-set-capabilities', capabilities=[{'capability': name, 'state': True} for name in CAPABILITIES])


def migration_is_set(qmp):
    """Whether it is all so again, and nothing else of the agent's is in QEMU for it."""
    parameters = qmp('query-migrate-parameters')
    return {name: parameters[name] for name in PARAMETERS} == PARAMETERS and \
        [c['capability'] for c in qmp('query-migrate-capabilities') if c['state']] == CAPABILITIES and \
        not [o['name'] for o in qmp('qom-list', path='/objects') if o['name'].startswith('vmmig-')]
