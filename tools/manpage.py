#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A manual page in roff (man(7)), for `man`, out of the Markdown that the programs print of themselves.

usage: manpage.py FILE VERSION >PAGE

It knows what `vmmig --manual` and `vmmigd --manual` print and nothing else, and fails at anything else: a title
"# NAME(SECTION): what it is", "##" and "###" headings, paragraphs, indented code, terms with a ":   " definition, a table,
and `words` as they are typed.
"""
import re
import sys


def literal(text):
    """Text as it stands: a minus that can be copied, and nothing that roff would take for a request."""
    text = text.replace('\\', '\\e').replace('-', '\\-')
    return re.sub(r"^([.'])", r'\\&\1', text)


def prose(text):
    """A paragraph, in which `words` are bold."""
    parts = re.split(r'`([^`]*)`', text.replace('\n', ' '))
    return re.sub(r"^([.'])", r'\\&\1', ''.join(f'\\fB{literal(part)}\\fR' if number % 2 else literal(part)
                                                  for number, part in enumerate(parts)))


def dedent(lines):
    return [literal(line[4:]) for line in lines]


def term(lines):
    """A term, which may take several lines, and what is said of it."""
    at = next(number for number, line in enumerate(lines) if line.startswith(':   '))
    if not at or not all(line.startswith((':   ', '    ')) for line in lines[at:]):
        raise ValueError(f'no term and definition: {lines}')
    said = ' '.join(line[4:].strip() for line in lines[at:])
    return ['.TP', prose(' '.join(lines[:at])), prose(said)]


def table(lines):
    """Rows of a value, its name and its meaning."""
    made = []
    for line in lines[2:]:
        value, name, meaning = (cell.strip() for cell in line.strip('|').split('|'))
        made += ['.TP', prose(f'`{value}` {name}'.rstrip()), prose(meaning)]
    return made


def block(lines):
    first = lines[0]
    if first.startswith('### '):
        return [f'.SS {literal(first[4:])}']
    if first.startswith('## '):
        return [f'.SH {literal(first[3:].upper())}']
    if first.startswith('    '):
        return ['.PP', '.RS 4', '.nf', *dedent(lines), '.fi', '.RE']
    if first.startswith('|'):
        return table(lines)
    if any(line.startswith(':   ') for line in lines):
        return term(lines)
    if re.match(r'[#*>+-] |\d+\. |:', first):
        raise ValueError(f'unknown: {first}')
    return ['.PP', prose('\n'.join(lines))]


def page(text, version):
    text = re.sub(r'\A<!--.*?-->\s*', '', text)
    title, synopsis, *blocks = [part.split('\n') for part in re.split(r'\n{2,}', text.strip('\n'))]
    name, section, what = re.fullmatch(r'# (\w+)\((\d)\): (.*)', title[0]).groups()
    made = [f'.TH {name.upper()} {section} "" "vmmig {version}"', '.ad l', '.nh', '.SH NAME', f'{name} \\- {literal(what)}',
            '.SH SYNOPSIS', '.nf', *dedent(synopsis), '.fi', '.SH DESCRIPTION']
    for lines in blocks:
        added = block(lines)
        made += added[1:] if added[0] == '.PP' and made[-1].startswith(('.SH', '.SS')) else added
    return '\n'.join(made) + '\n'


if __name__ == '__main__':
    with open(sys.argv[1], encoding='utf-8') as file:
        sys.stdout.write(page(file.read(), sys.argv[2]))
