#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""docs/hand-over.md shows the table of the code: doc_table.py PROGRAM PAGE [--update]"""
import subprocess
import sys

BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

program, page = sys.argv[1:3]
table = subprocess.run([program, "--markdown"], check=True, text=True,
                       stdout=subprocess.PIPE).stdout
with open(page) as f:
    text = f.read()
before, rest = text.split(BEGIN)
shown, after = rest.split(END)
if sys.argv[3:] == ["--update"]:
    with open(page, "w") as f:
        f.write(before + BEGIN + table + END + after)
elif shown != table:
    sys.exit("%s does not show the table of migrate/handover.c: run this with --update" % page)
