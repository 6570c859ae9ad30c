"""Reaction SMILES for the masked language model of chemical reactions, composed here from building blocks.

Each is a reaction of a textbook class (amide coupling, esterification, Suzuki coupling, reductive amination ...):
precursors ``>>`` product. The package of the model ships no reactions.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import torch
from torch import Tensor

#: the tokens of SMILES
_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%[0-9]{2}|[NOSPFIbcnops()=#+\-./\\:~@?*$BC0-9]")

# Every fragment is a molecule, and begins with the atom that forms the bond.
ARYLS = """c1ccccc1 c1ccc(F)cc1 c1ccc(OC)cc1 c1ccc(C#N)cc1 c1ccc(Cl)cc1 c1ccc(C(F)(F)F)cc1 c1cccc(F)c1 c1cccc(OC)c1
c1ccncc1 c1cccnc1 c1ccc2ncccc2c1 c1ccc2[nH]ccc2c1 c1ccsc1 c1ccoc1 c1cnn(C)c1 c1ccc(C)cc1 c1ccc(C(=O)OC)cc1
c1ccc2OCOc2c1 c1ccc(N(C)C)cc1 c1cccc(C#N)c1 c1ccc([N+](=O)[O-])cc1 c1cc(F)cc(F)c1 c1ccc(S(C)(=O)=O)cc1 c1cncnc1"""
ALKYLS = """C CC CCC C(C)C CCCC CC(C)C CCOC CC1CC1 C1CCCC1 C1CCOCC1 CC(F)(F)F CCN(C)C CC#N CCSC CC=C CCCOC CC(=O)OCC
CCNC(=O)OC(C)(C)C C1CCN(C(=O)OC(C)(C)C)CC1 Cc1ccccc1 Cc1ccc(F)cc1"""
AMINES = """N1CCOCC1 N1CCCC1 N1CCCCC1 N1CCN(C)CC1 N1CCN(c2ccccc2)CC1 NCc1ccccc1 NC1CC1 NC1CCCCC1 NCCOC NCCN(C)C N(C)Cc1ccccc1
Nc1ccccc1 Nc1ccc(F)cc1 Nc1cccnc1 Nc1nccs1 NCC(=O)OC N(C)C NCCc1ccc(OC)cc1 N1CC(F)(F)C1 NC(C)(C)C Nc1ccc(Cl)c(Cl)c1 NCc1ccco1
N1CCC(O)CC1 N1CCN(C(=O)OC(C)(C)C)CC1"""


def reaction(chance: random.Random) -> str:
    """One reaction, such as ``O=C(O)c1ccccc1.N1CCOCC1>>O=C(c1ccccc1)N1CCOCC1``."""
    aryl, other = chance.sample(ARYLS.split(), 2)
    alkyl, amine = chance.choice(ALKYLS.split()), chance.choice(AMINES.split())
    group = chance.choice((aryl, alkyl))
    halide = chance.choice(("Br", "Cl", "I"))
    kinds = (
        f"O=C(O){group}.{amine}>>O=C({group}){amine}",  # amide coupling
        f"O=C(O){aryl}.O{alkyl}>>O=C({aryl})O{alkyl}",  # esterification
        f"{halide}{aryl}.OB(O){other}>>{bonded(aryl, '-' + other)}",  # Suzuki coupling
        f"{halide}{alkyl}.{amine}>>{bonded(amine, alkyl)}",  # alkylation of an amine
        f"{halide}{aryl}.{amine}>>{bonded(amine, aryl)}",  # Buchwald-Hartwig amination
        f"O=C{aryl}.{amine}>>{bonded(amine, 'C' + aryl)}",  # reductive amination
        f"O=S(=O)(Cl){group}.{amine}>>O=S(=O)({group}){amine}",  # sulfonamide
        f"O=C=N{group}.{amine}>>O=C(N{group}){amine}",  # urea
        f"O{aryl}.{halide}{alkyl}>>{bonded('O' + aryl, alkyl)}",  # ether of a phenol
    )
    return chance.choice(kinds)


def bonded(molecule: str, branch: str) -> str:
    """`molecule` with `branch` bonded to its first atom; rings of the branch get numbers that the molecule does not use."""
    first = re.match(r"[A-Za-z][0-9]*", molecule)
    if first is None:
        raise ValueError(f"{molecule!r} does not begin with an atom")
    branch = re.sub(r"\[[^\]]*\]|[0-9]", lambda m: m[0] if m[0][0] == "[" else str(int(m[0]) + 4), branch)
    return f"{first[0]}({branch}){molecule[first.end() :]}"


def masked_reactions(model: Path, count: int = 64, length: int = 80, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Different reactions, each with a sixth of its tokens masked.

    Args:
        model: the model's directory; its ``vocab.txt`` has a token a line.
        count: reactions.
        length: tokens of a row, padded; longer reactions are left out.
        seed: of the choice of reactions and of masked tokens.

    Returns:
        Inputs and labels ``[count, length]``; labels are -100 where nothing is masked.
    """
    vocabulary = {token: i for i, token in enumerate((model / "vocab.txt").read_text(encoding="utf-8").split("\n"))}
    chance = random.Random(seed)
    inputs = torch.full((count, length), vocabulary["[PAD]"])
    labels = torch.full((count, length), -100)
    seen: set[str] = set()
    while len(seen) < count:
        text = reaction(chance)
        tokens = _TOKEN.findall(text)
        if text in seen or len(tokens) > length - 2 or any(token not in vocabulary for token in tokens):
            continue
        ids = torch.tensor([vocabulary[token] for token in ["[CLS]", *tokens, "[SEP]"]])
        row = len(seen)
        seen.add(text)
        inputs[row, : len(ids)] = ids
        masked = torch.tensor(chance.sample(range(1, len(ids) - 1), max(1, len(tokens) // 6)))
        labels[row, masked] = ids[masked]
        inputs[row, masked] = vocabulary["[MASK]"]
    return inputs, labels
