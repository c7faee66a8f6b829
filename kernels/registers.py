"""What `ptxas --verbose` says of each kernel, as a table: a line each, sorted, so that a change of one shows in a diff.

    registers.py PTXAS_LOG > registers.txt
"""

import re
import sys


def kernels(log):
    """(target, kernel, registers, bytes of static shared memory, bytes spilled) of each kernel."""
    entry = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
    for part in re.split(r"(?=ptxas info\s*: Compiling entry)", log)[1:]:
        name, target = entry.search(part).groups()
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", part)))
        registers = re.search(r"Used (\d+) registers", part).group(1)
        shared = re.search(r"(\d+) bytes smem", part)
        yield target, name, int(registers), int(shared.group(1)) if shared else 0, spilled


def main():
    print("# By ptxas, of each kernel: target, name, registers of a thread, bytes of static shared memory, bytes that it spills.")
    for target, name, registers, shared, spilled in sorted(kernels(open(sys.argv[1]).read())):
        print(f"{target:<8} {name:<32} {registers:>3} {shared:>6} {spilled:>5}")


main()
