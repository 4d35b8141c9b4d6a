# SPDX-License-Identifier: Apache-2.0
"""A page of docs/bench that a program writes with what it measured: the table's rows are lists of texts."""
import pathlib
import time

from suite import results

ROOT = pathlib.Path(__file__).resolve().parents[2]


def machine():
    return f'{results.describe(results.machine())}; {time.strftime("%Y-%m-%d", time.gmtime())}.'


def table(head, rows):
    lines = [head, ['---'] + ['---:'] * (len(head) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def write(path, program, title, text, *parts):
    """text: what the program's head says of what is measured; parts: tables and paragraphs."""
    name = pathlib.Path(program).resolve().relative_to(ROOT)
    head = f'# {title}\n\nMade by `{name}`; no figure is typed by hand. {machine()}'
    path.write_text('\n\n'.join([head, text.strip(), *parts]) + '\n', encoding='utf-8')
