# SPDX-License-Identifier: Apache-2.0
"""Why vmmig is behind a peer, where it is: shown beside the figure by report.py. What the tables show themselves (how
long the peer's guest stood still, what the peer put on the wire) is said there, from the figures."""
import fnmatch

CORES = 'The cores bind here, not the link: both hosts, agents, VMMs and the guest share them.'
PLAIN = 'That peer compresses nothing, and vmmig does.'

# (part, case, tool, metric, the best peer), each a pattern; the first that fits is meant.
EXPLANATIONS = [
    (('migrate', 'unshaped/*', '*', 'wire_bytes', '*'),
     'Where the link is no limit vmmig compresses only what takes no longer than sending it.'),
    (('migrate', '*', '*', 'wire_bytes', '*'),
     'LZ4 is taken instead of zstd while the cores are busy.'),
    (('migrate', '*', 'vmmig-qemu', '*cpu_s', '*'),
     'Every page takes one more way: out of QEMU as a stream, and through the agents.'),
    (('migrate', '*/random', 'vmmig-attach', '*cpu_s', '*'), 'Pages are copied once, and their frames carry a sum.'),
    (('migrate', '*', 'vmmig-attach', '*cpu_s', 'qemu-[!m]*'), PLAIN),
    (('migrate', '*', 'vmmig-attach', '*cpu_s', 'qemu-multifd'), PLAIN),
    (('migrate', '*', '*', 'pause_ms', 'qemu-postcopy'), 'It runs the guest before its memory is there.'),
    (('migrate', '*', '*', 'pause_ms', '*'),
     'Once the predicted pause is within the limit, no more than a tenth of the time goes into rounds that would shorten it.'),
    (('migrate', '*', '*', 'total_ms', '*'), CORES),
    (('repo', 'collect', 'vmmig-rados', '*', '*'),
     'It goes through all shards of the catalogue, objects of Ceph each.'),
    (('repo', '*', 'vmmig-rados', '*', 'rbd'), 'rbd copies: it neither hashes nor compresses.'),
    (('repo', '*', '*', 'cpu_s', '*'), 'All cores are used: the time is shorter, the CPU time is not.'),
    (('repo', '*', '*', 'peak_rss_bytes', '*'), 'Buffers of the parallel pipeline: the same for any size of image.'),
    (('repo', '*', '*', 'stored_bytes', '*'),
     'New pages are stored with LZ4; `vmmig repo gc --repack` compresses with zstd, as casync and restic do at once.'),
    (('clone', '*', '*', 'request_ms', '*'), 'Of vmmig it counts from typing the command.'),
    (('growth', 'memory-sparse/*', '*', 'total_ms', '*'),
     'What a hand-over takes whatever the memory: the preflight, journals on both hosts, and the end of the VMM at the '
     'source before its user is told.'),
    (('growth', 'memory-*', '*', 'total_ms', '*'), CORES),
]


def explanation(*key):
    for patterns, text in EXPLANATIONS:
        if all(fnmatch.fnmatch(value, pattern) for value, pattern in zip(key, patterns)):
            return text
    return 'Not explained.'
