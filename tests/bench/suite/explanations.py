# SPDX-License-Identifier: Apache-2.0
"""Why vmmig is behind a peer, where it is: shown beside the figure by report.py."""
import fnmatch

# (part, case, tool, metric), each a pattern; the first that fits is meant.
EXPLANATIONS = [
]


def explanation(*key):
    for patterns, text in EXPLANATIONS:
        if all(fnmatch.fnmatch(value, pattern) for value, pattern in zip(key, patterns)):
            return text
    return 'Not explained.'
