"""Run in a process of its own with the real optimum-quanto: a calibrated model with static activation scales.

python _quanto_oracle_static.py write OUT MODEL:WEIGHTS:ACTIVATIONS ...   quantizes, calibrates, saves OUT/model-weights-...
python _quanto_oracle_static.py load MODEL OUT ...                        loads core directories that Requanto wrote

MODEL is a name of `tiny_models`. Both write logits.pt into each directory: what the model loaded from it computes.
"""

import json
import sys
from pathlib import Path

import torch
from optimum.quanto import Calibration, freeze, qtypes, quantization_map, quantize, requantize
from safetensors.torch import load_file, save_file
from tiny_models import TINY, output


def write(tiny, out, weights, activations):
    model = tiny.build()
    quantize(model, weights=qtypes[weights], activations=qtypes[activations], exclude="lm_head")
    with torch.no_grad(), Calibration():
        model(**tiny.inputs())
    freeze(model)
    out.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "quanto_qmap.json").write_text(json.dumps(quantization_map(model)))


def load(tiny, out):
    model = tiny.build()
    requantize(model, load_file(out / "model.safetensors"), json.loads((out / "quanto_qmap.json").read_text()))
    if model.config.tie_word_embeddings:
        model.tie_weights()
    logits = output(model, tiny.inputs())
    torch.save(logits.dequantize(), out / "logits.pt")


if __name__ == "__main__":
    if sys.argv[1] == "write":
        for case in sys.argv[3:]:
            name, *kinds = case.split(":")
            directory = Path(sys.argv[2], case.replace(":", "-"))
            write(TINY[name], directory, *kinds)
            load(TINY[name], directory)
    else:
        for directory in sys.argv[3:]:
            load(TINY[sys.argv[2]], Path(directory))
