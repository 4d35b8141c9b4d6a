# SPDX-License-Identifier: Apache-2.0
"""A page of docs/bench that a program writes with what it measured: the table's rows are lists of texts."""
import os
import pathlib
import platform
import re
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def machine():
    model = re.search(r'model name\s*:\s*(.*)', pathlib.Path('/proc/cpuinfo').read_text(errors='replace')).group(1)
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return (f'{os.cpu_count()} cores of {model}, {memory >> 30} GiB, Linux {platform.release()}; '
            f'{time.strftime("%Y-%m-%d", time.gmtime())}.')


def table(head, rows):
    lines = [head, ['---'] + ['---:'] * (len(head) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def write(path, program, title, text, *parts):
    """text: what the program's head says of what is measured; parts: tables and paragraphs."""
    name = pathlib.Path(program).resolve().relative_to(ROOT)
    head = f'# {title}\n\nMade by `{name}`; no figure is typed by hand. {machine()}'
    path.write_text('\n\n'.join([head, text.strip(), *parts]) + '\n', encoding='utf-8')
