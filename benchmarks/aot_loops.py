"""Finds the main loop in disassembled machine code: its natural loops, from the graph of basic blocks.

Compilers move rarely executed parts behind the end of a kernel (waits for a barrier) and put others under a branch (stores
of a persistent kernel's finished tile), so the text between a label and a branch back to it is not what a turn executes.
"""

import re
from collections.abc import Callable

BRANCH = re.compile(r"^(@\S+\s+)?(BRA\S*|s_branch|s_cbranch\w*)\b(.*)")
END = re.compile(r"^(EXIT|RET\S*|s_endpgm|s_setpc\S*)\b")


def blocks_of(lines: list[str]) -> tuple[list[list[str]], list[list[int]]]:
    """(basic blocks, the blocks that each may continue with)."""
    blocks: list[list[str]] = [[]]
    starts: dict[str, int] = {}
    for line in lines:
        if line.endswith(":"):
            if blocks[-1]:
                blocks.append([])
            starts[line[:-1]] = len(blocks) - 1
            continue
        blocks[-1].append(line)
        if BRANCH.match(line) or END.match(line) or "BSYNC" in line:
            blocks.append([])
    joins: dict[str, str] = {}  # BSSY names the place where the lanes of a BSYNC meet again
    after: list[list[int]] = []
    for i, block in enumerate(blocks):
        for line in block:
            if hit := re.search(r"BSSY\S*\s+(B\d+),.*?(\.L\w+)", line):
                joins[hit[1]] = hit[2]
        last = block[-1] if block else ""
        targets, falls = [], True
        if hit := BRANCH.match(last):
            label = re.search(r"(\.L\w+|BB\w+)", hit[3])
            targets = [starts[label[1]]] if label and label[1] in starts else []
            sometimes = hit[1] or "cbranch" in hit[2] or re.search(r"\bU?P\d|DIV|CONV", hit[2] + hit[3].split("(")[0])
            falls = bool(sometimes)
        elif END.match(last):
            falls = False
        elif (hit := re.search(r"BSYNC\S*\s+(B\d+)", last)) and joins.get(hit[1]) in starts:
            targets, falls = [starts[joins[hit[1]]]], False
        if falls and i + 1 < len(blocks):
            targets.append(i + 1)
        after.append(targets)
    return blocks, after


def dominators_of(after: list[list[int]]) -> list[set[int]]:
    """For each block the blocks that are on every way to it; empty for those that are never reached."""
    before: list[list[int]] = [[] for _ in after]
    for i, targets in enumerate(after):
        for target in targets:
            before[target].append(i)
    found: list[set[int] | None] = [None for _ in after]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in range(1, len(after)):
            known = [found[j] for j in before[i] if found[j] is not None]
            if known and (new := set.intersection(*known) | {i}) != found[i]:
                found[i], changed = new, True
    return [known or set() for known in found]


def loops_of(lines: list[str]) -> list[tuple[list[str], list[str]]]:
    """(what each turn executes, what only some turns or some warps execute) of each natural loop."""
    blocks, after = blocks_of(lines)
    dominators = dominators_of(after)
    before: list[list[int]] = [[] for _ in after]
    latches: dict[int, list[int]] = {}
    for i, targets in enumerate(after):
        for target in targets:
            before[target].append(i)
            if target in dominators[i]:
                latches.setdefault(target, []).append(i)
    found = []
    for header, ends in latches.items():
        inside, waiting = {header}, list(ends)
        while waiting:
            if (block := waiting.pop()) not in inside:
                inside.add(block)
                waiting.extend(before[block])
        always = set.intersection(*(dominators[end] for end in ends)) & inside
        turn = [line for i in sorted(always) for line in blocks[i]]
        found.append((turn, [line for i in sorted(inside - always) for line in blocks[i]]))
    return found


def main_loop(lines: list[str], is_matrix: Callable[[str], object]) -> tuple[list[str], list[str]]:
    """The shortest loop with a matrix instruction, else the one with the most FFMA; as `loops_of` gives it."""
    loops = loops_of(lines)
    matrix = [loop for loop in loops if any(is_matrix(line) for part in loop for line in part)]
    if matrix:
        return min(matrix, key=lambda loop: len(loop[0]) + len(loop[1]))
    best = max(loops, key=lambda loop: sum("FFMA" in line for line in loop[0]), default=([], []))
    return best if any("FFMA" in line for line in best[0]) else ([], [])
