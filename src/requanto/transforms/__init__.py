"""Transformations of the float weights that make rounding less harmful and cost nothing at run time.

    requanto.quantize(model, weights="int4", rotation="fold")     # rotations, folded into the weights
    requanto.quantize(model, weights="int4", fold=True)           # column scales, folded into norms and earlier layers

They are tried on a float copy of the model (`requanto.transforms.twin`). The model changes if the copy's output is the same.
"""

from requanto.transforms.fold import Folded, fold_model
from requanto.transforms.request import asks_for_fold, fold_asked, fold_planned

__all__ = ["Folded", "asks_for_fold", "fold_asked", "fold_model", "fold_planned"]
