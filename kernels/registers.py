"""What `ptxas --verbose` says of each kernel, as a table: a line each, sorted, so that a change of one shows in a diff.

    registers.py PTXAS_LOG FOLDER

FOLDER is that of ptx/ and, where only some files were compiled, of the registers.txt with the others: their lines stay.
"""

import pathlib
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


def others(folder):
    """The same of the kernels in a table that is there, but for those that no PTX has any more."""
    table = folder / "registers.txt"
    if not table.exists():
        return
    of = {"sm_90a": "hopper", "sm_80": "portable"}
    ptx = {target: "".join(file.read_text() for file in (folder / "ptx" / of[target]).glob("*.ptx")) for target in of}
    for line in table.read_text().splitlines()[1:]:
        target, name, *numbers = line.split()
        if f".entry {name}(" in ptx[target]:
            yield target, name, *map(int, numbers)


def main():
    log, folder = (pathlib.Path(path) for path in sys.argv[1:])
    rows = {row[:2]: row for row in [*others(folder), *kernels(log.read_text())]}
    print("# By ptxas, of each kernel: target, name, registers of a thread, bytes of static shared memory, bytes that it spills.")
    for target, name, registers, shared, spilled in sorted(rows.values()):
        print(f"{target:<8} {name:<32} {registers:>3} {shared:>6} {spilled:>5}")


main()
