#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Read every #include and fail on an edge between folders that the design does not have.

usage: includes.py SOURCE_ROOT

ALLOWED says which folders a folder may include from; OWNERS says in which files a library of others
may appear at all. See HACKING.md, "Layout and direction".
"""
import fnmatch
import pathlib
import re
import sys

ALLOWED = {
    'base': {'base'},
    'proto': {'base', 'proto'},
    'client': {'base', 'proto', 'client'},
    'dirtylog': {'base', 'proto', 'dirtylog'},
    'vmm': {'base', 'proto', 'dirtylog', 'vmm'},
    'repo': {'base', 'proto', 'repo'},
    'migrate': {'base', 'proto', 'dirtylog', 'vmm', 'migrate'},
    'snapshot': {'base', 'proto', 'repo', 'dirtylog', 'vmm', 'snapshot'},
    'agent': {'base', 'proto', 'dirtylog', 'vmm', 'repo', 'migrate', 'snapshot', 'agent'},
    'tools': {'base', 'proto', 'client', 'repo', 'tools'},
    'models': {'base', 'migrate', 'models'},
}

# Programs that stand for those of others: they use what is installed, and headers of their own folder.
STANDALONE = {'tools/vmmig-vmm/'}

# Header of a library, and the files that may include it.
OWNERS = {
    'event*.h': ['base/loop.c'],
    'event2/*': ['base/loop.c'],
    'openssl/*': ['migrate/tls.c', 'tools/pki.c', 'repo/*'],
    'rados/*': ['repo/store_rados.c'],
    'jansson.h': ['vmm/*', 'tools/*', 'snapshot/*', 'repo/*'],
    'lmdb.h': ['migrate/journal.c', 'repo/*'],
    'fuse*.h': ['snapshot/holder.h'],
    'vmm/qmp.h': ['vmm/*'],
    'getopt.h': [],
}

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.M)


def problems_of(path, text):
    """What is wrong with the includes of one file, `path` relative to the root."""
    folder = path.split('/')[0]
    for kind, name in INCLUDE.findall(text):
        for pattern, files in OWNERS.items():
            if fnmatch.fnmatch(name, pattern) and not any(fnmatch.fnmatch(path, f) for f in files):
                yield f'{path}: includes {name}, which belongs to {", ".join(files) or "nobody"}'
        if kind == '<':
            continue
        if any(path.startswith(own) for own in STANDALONE):
            if '/' in name:
                yield f'{path}: uses what is installed, and may not include {name}'
        elif '/' not in name:
            yield f'{path}: "{name}" does not name its folder'
        elif name.split('/')[0] not in ALLOWED[folder]:
            yield f'{path}: {folder} may not include {name}'


def problems(root):
    found = []
    seen = 0
    for folder in ALLOWED:
        for path in sorted((root / folder).rglob('*.[ch]')):
            seen += 1
            found += problems_of(str(path.relative_to(root)), path.read_text())
    if seen < 20:
        found.append(f'only {seen} files found below {root}: is that the source?')
    return found


def self_test():
    """The rules find what they are there for."""
    bad = [
        ('base/x.c', '#include "proto/frame.h"'),
        ('proto/x.c', '#include "vmm/guest.h"'),
        ('migrate/x.c', '#include "snapshot/take.h"'),
        ('snapshot/x.c', '#include "migrate/sender.h"'),
        ('tools/x.c', '#include "agent/jobs.h"'),
        ('repo/x.c', ' #  include "vmm/guest.h"'),
        ('agent/x.c', '#include "jobs.h"'),
        ('agent/x.c', '#include <event2/event.h>'),
        ('agent/x.c', '#include "vmm/qmp.h"'),
        ('tools/vmmig-vmm/x.c', '#include "base/error.h"'),
        ('migrate/x.c', '#include <openssl/ssl.h>'),
    ]
    good = [
        ('agent/x.c', '#include "agent/jobs.h"\n#include <stdio.h>'),
        ('base/loop.c', '#include <event2/event.h>'),
        ('tools/vmmig-vmm/x.c', '#include "vmm.h"\n#include <vmmig-attach.h>'),
        ('vmm/qemu.c', '#include "vmm/qmp.h"\n/* #include "repo/x.h" */'),
    ]
    for path, text in bad:
        assert list(problems_of(path, text)), (path, text)
    for path, text in good:
        assert not list(problems_of(path, text)), (path, text)


def main():
    self_test()
    found = problems(pathlib.Path(sys.argv[1]))
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == '__main__':
    sys.exit(main())
