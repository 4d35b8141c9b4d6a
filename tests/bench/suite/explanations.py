# SPDX-License-Identifier: Apache-2.0
"""Why vmmig is behind a peer, where it is: shown beside the figure by report.py."""
import fnmatch

# (part, case, tool, metric), each a pattern; the first that fits is meant.
EXPLANATIONS = [
    (('migrate', 'unshaped/*', '*', 'wire_bytes'),
     'On a link that is faster than compression vmmig compresses lightly or not at all; multifd with zstd always does.'),
    (('migrate', '*', 'vmmig-qemu', '*cpu_s'),
     'Every byte takes one more way, out of QEMU and through the agent; and of the peers those that compress nothing take '
     'the least.'),
    (('migrate', '*', 'vmmig-attach', '*cpu_s'),
     'Of the peers those that compress nothing take the least.'),
    (('migrate', 'unshaped/*', '*', 'total_ms'),
     'Source, destination, agents and guest share two cores, and nothing but them limits; QEMU copies a byte less often.'),
    (('migrate', '1gbit/*', 'vmmig-qemu', 'total_ms'),
     'zstd needs a core for itself, and the agent has to share it with what reads the stream out of QEMU.'),
    (('migrate', '*', '*', 'pause_ms'), 'Post-copy runs the guest before its memory is there.'),
    (('migrate', '1gbit/*', '*', 'wire_bytes'), 'While the cores are busy vmmig takes LZ4 for a part of the pages.'),
    (('repo', 'verify', '*', '*'), 'qemu-img check reads its tables only, no data.'),
    (('repo', 'collect', 'vmmig-rados', 'total_s'), 'A collection goes through the 256 shards of the catalogue, objects of Ceph each.'),
    (('repo', 'collect', '*', '*'), 'For qemu-img it is the removal of files, no program of its own.'),
    (('repo', '*', '*', 'cpu_s'), 'Both cores are used: the time is shorter, the CPU time is not.'),
    (('repo', '*', '*', 'peak_rss_bytes'), 'Buffers of the parallel pipeline, and footers: bounded, whatever the size.'),
    (('repo', '*', '*', 'stored_bytes'),
     'New pages are stored with LZ4; `vmmig repo gc --repack` compresses them with zstd, as casync and restic do at once.'),
]


def explanation(*key):
    for patterns, text in EXPLANATIONS:
        if all(fnmatch.fnmatch(value, pattern) for value, pattern in zip(key, patterns)):
            return text
    return 'Not explained.'
