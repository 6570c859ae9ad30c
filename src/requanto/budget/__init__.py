"""``weights="auto"``: chooses a type for each layer so that the measured error is least within a memory budget.

    requanto.quantize(model, weights="auto", bits=4.5, calibration=samples)
    AutoModel.from_pretrained(path, quantization_config=QuantoConfig(weights="auto", max_memory="80MB"))

`measure` and `sensitivity` estimate the error of each type in each layer, `allocate` solves the knapsack, `choose` combines
them.
"""

from requanto.budget.allocate import Allocation, Option, allocate
from requanto.budget.choose import Choice, choose
from requanto.budget.models import budget_of, resolve
from requanto.config.limit import Limit

__all__ = ["Allocation", "Choice", "Limit", "Option", "allocate", "budget_of", "choose", "resolve"]
